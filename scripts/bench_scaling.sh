#!/usr/bin/env bash
# Training on several GPUs of one host, random weights on the shape: steps of 8B under DDP on 1, 2 and all GPUs, under
# FSDP2 and ZeRO-3, of 70B under FSDP2; the adapters of one GPU and of all; runs that are killed and resumed on as many and
# on half as many. Under ten minutes on four GPUs; each figure is a line of OUT/scaling.jsonl as soon as it is there.
#
#     scripts/bench_scaling.sh [OUT] [GPUS] [PART ...]        # default: runs/scaling 4 ddp fsdp2 zero3 runs 70b
#     LP_TINY=1 scripts/bench_scaling.sh OUT 2                # the same calls on tiny models, processes on the CPU
#
# LP_SECONDS, 570 if not set: nothing begins or goes on after so many seconds.
set -u
cd "$(dirname "$0")/.." || exit
out=${1:-runs/scaling} gpus=${2:-4}
parts=${*:3} limit=${LP_SECONDS:-$([ -n "${LP_TINY:-}" ] && echo 3600 || echo 570)}
mkdir -p "$out"
export PYTHONPATH=.:scripts${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
export LP_COMMIT=${LP_COMMIT:-$(git describe --always --abbrev=40 --exclude='*' --dirty=+changes 2>/dev/null)}

# $1: seconds, $2: cell, $3: accelerate's configuration, $4: processes, the rest: what is done
launch() {
    local left=$((limit - SECONDS)) seconds=$1 cell=$2 engine=$3 processes=$4
    shift 4
    if [ "$left" -lt 30 ]; then
        echo "$cell: not run" >&2
        return
    fi
    local environment=(LP_CELL="$cell")
    if [ -n "${LP_TINY:-}" ]; then
        seconds=600
        case $engine in
        single | ddp) environment+=(ACCELERATE_USE_CPU=true) ;;
        *) environment+=(ACCELERATE_TORCH_DEVICE=cpu DS_ACCELERATOR=cpu) ;;
        esac
        set -- "$@" --layers 4 --vocab 64 --dtype float32 --seq 16
        [ "$1" = step ] && set -- "${@//llama-*b/smollm2-135m}" --batch 2 --steps 3 --warmup 1 --no-compile
    fi
    env "${environment[@]}" timeout -k 10 $((left < seconds ? left : seconds)) python3 -m accelerate.commands.launch \
        --config_file "configs/accelerate/$engine.yaml" --num_processes "$processes" --main_process_port 0 \
        -m benchmarks.scaling "$@" --out "$out" --cell "$cell" >"$out/$cell.log" 2>&1
    local code=$?
    [ "$code" = 0 ] && tail -1 "$out/scaling.jsonl" | cut -c 1-160 && return
    [[ $cell == *-killed ]] || echo "$cell: ended with $code: $(grep -E 'Error|error:' "$out/$cell.log" | tail -1)" >&2
    return "$code"
}

# the same, beside others; one after the other on CPUs
beside() {
    if [ -n "${LP_TINY:-}" ]; then launch "$@"; else launch "$@" & fi
}

for part in ${parts:-ddp fsdp2 zero3 runs 70b}; do
    case $part in
    ddp)
        CUDA_VISIBLE_DEVICES=0 beside 150 ddp-1 single 1 step --shape llama-8b
        [ "$gpus" -gt 2 ] && CUDA_VISIBLE_DEVICES=1,2 beside 150 ddp-2 ddp 2 step --shape llama-8b
        wait
        launch 150 "ddp-$gpus" ddp "$gpus" step --shape llama-8b
        ;;
    fsdp2)
        launch 120 fsdp2 fsdp2 "$gpus" step --shape llama-8b --steps 6 --warmup 4 ||
            launch 90 fsdp2-uncompiled fsdp2 "$gpus" step --shape llama-8b --steps 6 --warmup 2 --no-compile
        ;;
    # nothing compiled: train.torch_compile auto leaves the blocks alone too, since DeepSpeed's hooks are on every module
    zero3) launch 100 zero3-uncompiled zero3 "$gpus" step --shape llama-8b --steps 6 --warmup 2 --no-compile ;;
    70b)
        launch 150 fsdp2-70b fsdp2 "$gpus" step --shape llama-70b --in-parts --batch 4 --steps 3 --warmup 2 --gradient-checkpointing
        ;;
    runs)
        engines="ddp fsdp2 zero3"
        beside 120 one single 1 train
        for engine in $engines; do
            beside 120 "$engine-whole" "$engine" "$gpus" train
            beside 120 "$engine-killed" "$engine" "$gpus" train --kill 6
        done
        wait
        for engine in $engines; do
            cp -r "$out/$engine-killed" "$out/$engine-again"
            beside 120 "$engine-again" "$engine" "$gpus" train --resume
            [ "$engine" = zero3 ] && continue # DeepSpeed leaves each process its part of the optimizer
            cp -r "$out/$engine-killed" "$out/$engine-fewer"
            beside 120 "$engine-fewer" "$([ "$gpus" = 2 ] && [ "$engine" = ddp ] && echo single || echo "$engine")" \
                $((gpus / 2)) train --resume
        done
        wait
        ;;
    *) echo "$part: no such part; name some of ddp fsdp2 zero3 runs 70b" >&2 ;;
    esac
done
python3 -m benchmarks.scaling show --out "$out"
