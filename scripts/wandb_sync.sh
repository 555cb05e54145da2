#!/usr/bin/env bash
# Uploads what runs have kept offline for Weights & Biases, from a machine that reaches it (`wandb login` before it).
#
#     bash scripts/wandb_sync.sh [--dry-run] RUN_FOLDER...
#
# A run that was resumed offline has several parts with one id: they are uploaded in the order they were written.
set -euo pipefail
options=(--yes)
if [ "${1:-}" = --dry-run ]; then
    options+=(--dry-run)
    shift
fi
[ $# -gt 0 ] || { sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 2; }
parts=()
for folder in "$@"; do
    found=("$folder"/wandb/offline-run-*)
    [ -d "${found[0]}" ] || { echo "error: $folder: nothing kept offline in it; name a run folder" >&2; exit 2; }
    parts+=("${found[@]}")
done
command -v wandb >/dev/null || { echo "error: no wandb here; run: pip install wandb" >&2; exit 2; }
exec wandb sync "${options[@]}" "${parts[@]}"
