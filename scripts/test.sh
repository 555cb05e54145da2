#!/usr/bin/env bash
# Lint, format, types, tests: everything that CI runs, stopping at the first failure.
# bash scripts/test.sh [--fast] [pytest arguments]      --fast leaves out the tests marked slow
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh

arguments=()
for argument in "$@"; do
    if [ "$argument" = --fast ]; then
        arguments+=(-m "not slow")
    else
        arguments+=("$argument")
    fi
done
stage() {
    echo "== $*"
    "$@"
}

lp_setup
stage ruff check .
stage ruff format --check .
stage mypy lp_train scripts
stage pytest -q --durations=10 ${arguments[@]+"${arguments[@]}"}
