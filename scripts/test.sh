#!/usr/bin/env bash
# Lint, format, types, tests: everything that CI runs, stopping at the first failure.
# bash scripts/test.sh [--fast] [pytest arguments]      --fast leaves out the tests marked slow
# All tests, without an argument, end with the share of lp_train's lines that they run, which is at least 90 %; the slow
# ones and those that compile are not counted (conftest.py).
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
# The types are checked beside the first tests, and end them where one is wrong.
types=$(mktemp)
mypy lp_train scripts >"$types" 2>&1 &
mypy=$!
echo "== pytest ${arguments[*]-}"
lp_pytest ${arguments[@]+"${arguments[@]}"} &
tests=$!
trap 'kill "$mypy" "$tests" 2>/dev/null || :; rm -f "$types"' EXIT
wrong=0
wait "$mypy" || wrong=$?
echo "== mypy lp_train scripts: $(cat "$types")"
[ "$wrong" = 0 ] || exit "$wrong"
wait "$tests"
