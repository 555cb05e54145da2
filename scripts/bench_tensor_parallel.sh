#!/usr/bin/env bash
# Decoding under tensor parallelism, in order against fused: random weights on the shapes of Llama 3.1 8B, Llama 2 7B and
# Llama 3.2 3B. Each measurement is a line of a file in OUT as soon as it is done. Graphs, eager steps, prefill and requests
# took six minutes on two H200 (006fd0e); what compiles comes last and waits for the host's CPU.
#
#     scripts/bench_tensor_parallel.sh [OUT] [PROCESSES] [FILE ...]     # default: runs/tensor_parallel 2, and all files; OUT from the root
#     LP_TINY=1 scripts/bench_tensor_parallel.sh OUT                    # the same calls on tiny models, processes on the CPU
#
# LP_SECONDS: nothing goes on after so many seconds. Ends with 1 where something failed or was not run, with 2 for an unknown FILE.
set -u
shopt -s extglob nullglob
cd "$(dirname "$0")/.." || exit
out=${1:-runs/tensor_parallel} processes=${2:-2}
only=" ${*:3} " limit=${LP_SECONDS:-86400}
mkdir -p "$out" && rm -f "$out/failed"
export PYTHONPATH=.:scripts${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1
export LP_COMMIT=${LP_COMMIT:-$(git describe --always --abbrev=40 --exclude='*' --dirty=+changes 2>/dev/null)}

known=$(sed -n 's/^measure [0-9]* \([a-z0-9_]*\) .*/\1/p' scripts/bench_tensor_parallel.sh)
for name in ${*:3}; do
    grep -qx "$name" <<<"$known" || { echo "$name: not measured here; name some of" $known >&2 && exit 2; }
done

# $1: seconds, $2: file, $3: shape, $4: pairs, the rest: what is measured
measure() {
    local left=$((limit - SECONDS)) seconds=$1 file=$2 shape=$3 pairs=$4
    shift 4
    [[ $only == "  " || $only == *" $file "* ]] || return 0
    if [ "$left" -lt 20 ]; then
        echo "$file $*: not run" | tee -a "$out/failed" >&2
        return
    fi
    if [ -n "${LP_TINY:-}" ]; then
        seconds=600
        # the last of an option counts: behind all others, and out of what --also says
        set -- "${@//graph/eager}" --contexts 16 --batches 1 --tokens 4 --repeats 2 --layers 4 --vocab 64 --dtype float32
        set -- "${@//--@(contexts|batches|repeats) +([0-9,])/}"
        pairs="0:2 0:4" shape=llama-1b
    fi
    # shellcheck disable=SC2086  # several windows
    timeout -k 5 $((left < seconds ? left : seconds)) python3 -m torch.distributed.run --standalone \
        --nproc-per-node "$processes" -m benchmarks.infer --shape "$shape" --pairs $pairs --forms sequential,fused \
        --out "$out/$file.jsonl" "$@" >/dev/null 2>"$out/$file.log" || echo "$file $*: ended with $?" | tee -a "$out/failed" >&2
    grep -E "tokens/s|rror" "$out/$file.log" | tail -60
    echo "$file: ended after $SECONDS s"
}

steps=(--modes graph --parts decode --contexts 512,4096 --batches 8,32 --also "--batches 1 --profile")
eager=(--also "--modes eager --batches 1 --repeats 10")
eager+=(--also "--modes eager --parts prefill --batches 1 --contexts 2048,16384 --repeats 15")
requests=(--tokens 256 --also "--parts generate --batches 1,64 --repeats 10")
long=(--tokens 4096 --also "--parts generate --batches 1 --contexts 16 --repeats 10")
compiled=(--modes compile --parts decode --contexts 512 --batches 1)
measure 210 8b llama-8b "15:29 5:27 1:31" "${steps[@]}" "${eager[@]}" "${requests[@]}"
measure 190 llama2 llama2-7b "9:23 5:27" "${steps[@]}" "${eager[@]}" "${long[@]}"
measure 100 3b llama-3b "9:19 5:23" "${steps[@]}" "${eager[@]}"
measure 225 8b_compiled llama-8b 15:29 "${compiled[@]}"
measure 150 llama2_compiled llama2-7b 9:23 "${compiled[@]}"
measure 150 3b_compiled llama-3b 9:19 "${compiled[@]}"
measured=("$out"/*.jsonl)
[ ${#measured[@]} -eq 0 ] || python3 -m benchmarks.infer_table "${measured[@]}" && [ ! -e "$out/failed" ]
