#!/usr/bin/env bash
# sbatch recipes/launch/slurm.sh RECIPE [key=value …]
# One task per GPU. SIGTERM comes 120 s before the limit or on pre-emption: the run saves, SLURM requeues the job, and
# the same command goes on from that save.
#SBATCH --job-name=dualenc
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
set -euo pipefail
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=${MASTER_PORT:-29500}
srun --kill-on-bad-exit=1 python -m dualenc train "$@"
