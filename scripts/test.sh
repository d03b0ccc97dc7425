#!/usr/bin/env bash
# Runs pytest in the virtual environment: scripts/test.sh NAME [pytest arguments]. The counts go to build/tests/NAME.xml as well.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
name=$1
shift
exec "${VENV:-.venv}/bin/python" -m pytest -n "${WORKERS:-2}" --junitxml "build/tests/$name.xml" --durations 15 "$@"
