#!/usr/bin/env bash
# Lint, format, types, tests: everything that CI runs, stopping at the first failure.
# bash scripts/test.sh [--fast] [pytest arguments]      --fast leaves out the tests marked slow
# All tests, without an argument, end with the share of lp_train's lines that they run, which is at least 90 %.
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
[ $# -gt 0 ] || arguments=(--cov=lp_train --cov-report= --cov-fail-under=90)
stage() {
    echo "== $*"
    "$@"
}

lp_setup
stage ruff check .
stage ruff format --check .
stage mypy lp_train scripts
stage lp_pytest ${arguments[@]+"${arguments[@]}"}
