#!/usr/bin/env bash
# One process per node under SLURM, each with all 8 GPUs of its node. `sbatch experiments/launch/slurm_per_node.sh`
#
# Fewer processes read the data with more workers each. Each GPU keeps an eighth of the parameters, moments and average
# (fsdp), which the fast links inside a node gather, and every node keeps a copy of all (data). What is trained is the
# same as with one process per GPU.
#
#SBATCH --job-name=fastvim
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

RUN=${RUN:-runs/imagenet/fastvim_base}
export FASTVIM_IMAGENET_DIR=${FASTVIM_IMAGENET_DIR:-$HOME/imagenet}
FASTVIM=${FASTVIM:-.venv/bin/fastvim}

srun --kill-on-bad-exit=1 \
  "$FASTVIM" train imagenet/fastvim_base --run-dir "$RUN" --data.workers 80 --mesh.fsdp 8 || status=$?

if [ "${status:-0}" -eq 75 ]; then # see slurm_per_gpu.sh
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "${status:-0}"
