#!/usr/bin/env bash
# One process per GPU under Open MPI: HOSTS=node1,node2 experiments/launch/open_mpi.sh
#
# MPI only starts the processes; they talk through JAX's own coordinator and NCCL. Ranks on other hosts are not told
# where rank 0 runs, so the address is passed on (-x); on a single host it can be left out.
set -euo pipefail

HOSTS=${HOSTS:-localhost}
GPUS=${GPUS:-8}                                            # per host
RUN=${RUN:-runs/imagenet/fastvim_base}                     # on a file system that all hosts share
FASTVIM=${FASTVIM:-.venv/bin/fastvim}
export FASTVIM_IMAGENET_DIR=${FASTVIM_IMAGENET_DIR:-$HOME/imagenet}
export JAX_COORDINATOR_ADDRESS=${HOSTS%%,*}:12345

# hosts a,b become a:8,b:8
mpirun --host "${HOSTS//,/:$GPUS,}:$GPUS" -x JAX_COORDINATOR_ADDRESS -x FASTVIM_IMAGENET_DIR \
  "$FASTVIM" train imagenet/fastvim_base --run-dir "$RUN" --data.workers 10
