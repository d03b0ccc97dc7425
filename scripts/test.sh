#!/usr/bin/env bash
# Runs pytest in the virtual environment: scripts/test.sh NAME [pytest arguments]. The counts go to build/tests/NAME.xml as well.
# Compiled programs are kept in build/jax_cache: the test processes, the programs that tests start and later runs share them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
name=$1
shift
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/build/jax_cache}
# Bytecode is kept whatever the caller's settings: otherwise each process that a test starts compiles all sources again.
export PYTHONDONTWRITEBYTECODE=
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1
exec "${VENV:-.venv}/bin/python" -m pytest -n "${WORKERS:-2}" --junitxml "build/tests/$name.xml" --durations 15 "$@"
