#!/usr/bin/env bash
# Trains on the handwritten digits, then, in a new process, restores the checkpoint and reports on the held-out images.
#
# Read from the environment: VENV (default .venv), RUN, the run's folder (default runs/quickstart), EPOCHS (default: the experiment's
# 40) and AT_LEAST, the accuracy below which it fails (default 0.97).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${VENV:-.venv}/bin/python
run=${RUN:-runs/quickstart}

rm -rf "$run"
"$python" -m fastvim_jax train digits/fastvim_digits --run-dir "$run" ${EPOCHS:+--epochs "$EPOCHS"}
"$python" -m fastvim_jax quickstart-report "$run" --at-least "${AT_LEAST:-0.97}"
