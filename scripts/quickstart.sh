#!/usr/bin/env bash
# Trains on the handwritten digits, then, in a new process, restores the checkpoint and reports on the held-out images.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${VENV:-.venv}/bin/python
run=${RUN:-runs/quickstart}

rm -rf "$run"
"$python" -m fastvim_jax train digits/fastvim_digits --run-dir "$run"
"$python" -m fastvim_jax quickstart-report "$run" --at-least 0.97
