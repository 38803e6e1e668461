#!/usr/bin/env bash
# Multi-node GPUs: sbatch tpu/slurm.sh [KEY=VALUE]...   (bash tpu/slurm.sh --dry-run prints the command)
# One process a node with all of its GPUs; srrl finds the coordinator and the GPUs in SLURM's variables.
#SBATCH --job-name=srrl
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}" # the checkout, on a file system that all nodes share; so is RUN_DIR
RECIPE=${RECIPE:-configs/qwen3_32b_h100-32.yaml}
RUN_DIR=${RUN_DIR:-runs/32b}

dry_run=
if [ "${1:-}" = --dry-run ]; then
  dry_run="echo"
  shift
fi
$dry_run srun --kill-on-bad-exit=1 .venv/bin/srrl train "$RECIPE" "run_dir=$RUN_DIR" "$@"
