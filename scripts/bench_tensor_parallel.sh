#!/usr/bin/env bash
# Decoding under tensor parallelism, in order against fused: random weights on the shapes of Llama 3.1 8B, Llama 2 7B and
# Llama 3.2 3B. About ten minutes on two GPUs; each measurement is a line of a file in OUT as soon as it is done.
#
#     scripts/bench_tensor_parallel.sh [OUT] [PROCESSES]      # default: runs/tensor_parallel, 2
#     LP_TINY=1 scripts/bench_tensor_parallel.sh OUT          # the same calls on tiny models, processes on the CPU
set -u
cd "$(dirname "$0")/.." || exit
out=${1:-runs/tensor_parallel}
mkdir -p "$out"
export PYTHONPATH=.:scripts HF_HUB_OFFLINE=1 LP_COMMIT=${LP_COMMIT:-$(git rev-parse --short HEAD 2>/dev/null)}

# $1: seconds, $2: file, $3: shape, $4: pairs, the rest: what is measured
measure() {
    local seconds=$1 file=$2 shape=$3 pairs=$4
    shift 4
    if [ -n "${LP_TINY:-}" ]; then
        set -- "$@" --layers 4 --vocab 64 --dtype float32 --contexts 16 --batches 1 --tokens 4 --repeats 2
        set -- "${@//graph/eager}"
        pairs="0:2 0:4" shape=llama-1b
    fi
    # shellcheck disable=SC2086  # several windows
    timeout "$seconds" torchrun --standalone --nproc-per-node "${PROCESSES:-2}" -m benchmarks.infer --shape "$shape" \
        --pairs $pairs --forms sequential,fused --out "$out/$file.jsonl" "$@" >/dev/null 2>"$out/$file.log" ||
        echo "$file $*: ended with $?" >&2
    grep -E "tokens/s|rror" "$out/$file.log" | tail -40
}
PROCESSES=${2:-2}

measure 170 8b llama-8b "15:29 5:27 1:31" --modes graph --parts decode --batches 1,8,32 --contexts 512,4096 --profile
measure 110 llama2 llama2-7b "9:23 5:27" --modes graph --parts decode --batches 1,8,32 --contexts 512,4096 --profile
measure 110 llama2 llama2-7b "9:23 5:27" --modes graph --parts generate --batches 1 --contexts 16 --tokens 4096 --repeats 10
measure 80 3b llama-3b "9:19 5:23" --modes graph --parts decode --batches 1,8,32 --contexts 512,4096 --profile
measure 80 8b llama-8b "15:29 5:27 1:31" --modes eager --parts decode,prefill --batches 1 --contexts 2048,16384 --repeats 20
measure 60 8b llama-8b "15:29 5:27" --modes graph --parts generate --batches 64 --contexts 512 --tokens 512 --repeats 10
measure 150 8b llama-8b "15:29 5:27" --modes compile --parts decode --batches 1 --contexts 512
python3 -m benchmarks.infer_table "$out"/*.jsonl
