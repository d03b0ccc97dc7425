#!/usr/bin/env bash
# One process per GPU under SLURM: 4 nodes of 8 GPUs, 32 processes. `sbatch experiments/launch/slurm_per_gpu.sh`
#
# fastvim finds the processes, their numbers and the first node by SLURM's variables, and gives each process the GPU of
# its number on the node. The batch of 1,024 images is that of all GPUs together: with other --nodes the curve stays.
#
#SBATCH --job-name=fastvim
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
# SIGTERM reaches the tasks two minutes before the time is up: they save, and exit with status 75.
#SBATCH --signal=TERM@120
# The same script again goes on from there, also after a failed node; do not let a new log replace the old one.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

RUN=${RUN:-runs/imagenet/fastvim_base}                     # on a file system that all nodes share
export FASTVIM_IMAGENET_DIR=${FASTVIM_IMAGENET_DIR:-$HOME/imagenet} # holds train/ and val/
FASTVIM=${FASTVIM:-.venv/bin/fastvim} # from `make setup GPU=cuda13`, on the shared file system

# A process that fails takes the others with it; without this they would wait for it.
srun --kill-on-bad-exit=1 \
  "$FASTVIM" train imagenet/fastvim_base --run-dir "$RUN" --data.workers 10 --mesh.fsdp 1 || status=$?

# Saved and stopped because the time was up: put the job back into the queue.
if [ "${status:-0}" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "${status:-0}"
