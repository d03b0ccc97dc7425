#!/usr/bin/env bash
# By hand, without a scheduler: the same command on every host, one process each with all of the host's GPUs.
#
#   node1$ experiments/launch/manual.sh node1:12345 2 0
#   node2$ experiments/launch/manual.sh node1:12345 2 1
#
# Instead of the flags, JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID may be set; and with several
# processes on a host JAX_LOCAL_DEVICE_IDS (for example 0,1,2,3) says which GPUs are whose.
set -euo pipefail

COORDINATOR=$1 PROCESSES=$2 PROCESS=$3
RUN=${RUN:-runs/imagenet/fastvim_base}                     # on a file system that all hosts share
FASTVIM=${FASTVIM:-.venv/bin/fastvim}
export FASTVIM_IMAGENET_DIR=${FASTVIM_IMAGENET_DIR:-$HOME/imagenet}

"$FASTVIM" train imagenet/fastvim_base --run-dir "$RUN" --data.workers 40 \
  --coordinator "$COORDINATOR" --processes "$PROCESSES" --process "$PROCESS"
