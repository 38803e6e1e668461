#!/usr/bin/env bash
# One node with GPUs: bash tpu/gpu.sh [--dry-run] [KEY=VALUE]...   One process drives all of its GPUs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
RECIPE=${RECIPE:-configs/qwen3_8b_h100-8.yaml}
RUN_DIR=${RUN_DIR:-runs/8b}

dry_run=
if [ "${1:-}" = --dry-run ]; then
  dry_run="echo"
  shift
fi
if [ ! -x .venv/bin/srrl ]; then
  $dry_run "${PYTHON:-python3}" -m venv .venv
  $dry_run .venv/bin/python -m pip install --quiet -e '.[cuda12]'
fi
$dry_run .venv/bin/srrl train "$RECIPE" "run_dir=$RUN_DIR" "$@"
