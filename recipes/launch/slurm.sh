#!/usr/bin/env bash
# sbatch --account=ACCOUNT --partition=PARTITION recipes/launch/slurm.sh RECIPE [key=value …]
# Activate the environment before: the job takes that of the shell that submits it. docs/cluster/launch.md says more.
# One task per GPU. SIGTERM comes 120 s before the time limit, or on pre-emption: the run saves and ends with 130, the
# job is queued again, and the same command goes on from that save. Any other failure stays as it is, to be looked at.
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
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
code=0
srun --kill-on-bad-exit=1 python -m dualenc train "$@" || code=$?
if [ "$code" -eq 130 ]; then
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$code"
