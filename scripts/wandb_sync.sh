#!/usr/bin/env bash
# Uploads what runs have kept for Weights & Biases, from a machine that reaches it (`wandb login` before it).
#
#     bash scripts/wandb_sync.sh [--dry-run] RUN_FOLDER...
#
# A run that was resumed has several parts with one id: they are uploaded in the order they were written. Parts of runs
# that were online are looked at too: what they lost with the network is uploaded.
set -euo pipefail
options=(--yes --include-online)
if [ "${1:-}" = --dry-run ]; then
    options+=(--dry-run)
    shift
fi
[ $# -gt 0 ] || { sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 2; }
parts=()
for folder in "$@"; do
    found=("$folder"/wandb/*run-2*)
    [ -d "${found[0]}" ] || { echo "error: $folder: nothing kept in it; name a run folder" >&2; exit 2; }
    mapfile -t found < <(printf '%s\n' "${found[@]}" | sed 's/.*run-\(2[0-9_]*\)/\1 &/' | sort | cut -d' ' -f2-)  # by time
    parts+=("${found[@]}")
done
command -v wandb >/dev/null || { echo "error: no wandb here; run: pip install wandb" >&2; exit 2; }
exec wandb sync "${options[@]}" "${parts[@]}"
