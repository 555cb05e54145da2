#!/usr/bin/env bash
# The main job on the embedded model (SmolLM2-135M, 8 pairs, depth 22), from a fresh clone, without a GPU.
# Arguments go to finetune.py: bash scripts/demo.sh train.max_steps=20
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
lp_setup
setup_seconds=$SECONDS

export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
# Every value is given, so that accelerate does not warn about its defaults (one of them is a single CPU thread).
# --quiet: when the program stops with a message, accelerate adds no stack trace of its own.
accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
    --num_cpu_threads_per_process "${OMP_NUM_THREADS:-$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)}" \
    lp_train/finetune.py configs/demo.yaml --overwrite "$@"
echo "demo: $((SECONDS - setup_seconds)) s of work after $setup_seconds s of set-up"
echo "next: source .venv/bin/activate; lp-train export runs/demo runs/demo-fused; lp-train --help"
