#!/usr/bin/env bash
# Makes the virtual environment and installs this project into it; does nothing, quickly, when that is already done.
#
#   scripts/setup.sh [base|test|dev|docs|notebooks|several of them with commas]
#
# Read from the environment:
#   VENV    folder of the virtual environment (default .venv)
#   PYTHON  interpreter to make it with (default: the environment's own, or else the newest that works)
#   GPU     cuda12, cuda13 or cpu: which JAX to install (default: what the environment has, or else cpu)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extra=${1:-base}
venv=${VENV:-.venv}
state=$venv/.fastvim # what has been installed, in files of one line

# Another project's settings must not leak into this environment.
unset PYTHONHOME PYTHONPATH
export PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0 PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf '%s\n' "$*" >&2; }

version_of() { "$1" -I -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' </dev/null 2>/dev/null; }

# Two commands started at the same time in one folder take turns.
mkdir -p "$(dirname "$venv")"
if command -v flock >/dev/null 2>&1; then
  exec 9>"$venv.lock"
  flock 9
fi

have=
[ -f "$state/created" ] && have=$(version_of "$venv/bin/python" || true)

if [ -n "${PYTHON:-}" ]; then
  want=$(version_of "$PYTHON" || true)
  case "$want" in
    3.11.* | 3.12.* | 3.13.*) ;;
    '') say "PYTHON=$PYTHON does not start."; exit 1 ;;
    *) say "PYTHON=$PYTHON is Python $want; this project needs 3.11, 3.12 or 3.13."; exit 1 ;;
  esac
  if [ -n "$have" ] && [ "$have" != "$want" ]; then
    say "$venv holds Python $have; making it anew with $want."
    have=
  fi
fi

# An installation cut short may leave packages that look complete and are not: start over.
if [ -n "$have" ] && [ -f "$state/installing" ]; then
  say "An earlier installation into $venv was interrupted; starting over."
  have=
fi

gpu=${GPU:-}
if [ -z "$gpu" ]; then
  gpu=cpu
  [ -n "$have" ] && [ -f "$state/gpu" ] && gpu=$(cat "$state/gpu")
fi
case "$gpu" in
  cpu | cuda12 | cuda13) ;;
  *) say "GPU=$gpu is unknown: use cuda12, cuda13 or cpu."; exit 1 ;;
esac

if [ -z "$have" ]; then
  python=${PYTHON:-$(scripts/find_python.sh)}
  have=$(version_of "$python")
  say "Making $venv with Python $have ($python)"
  rm -rf "$venv"
  "$python" -m venv "$venv"
  mkdir -p "$state"
  touch "$state/created"
fi

# What an installation depends on: this folder (the package is installed in place), the requirements and the choice of JAX.
key=$(printf '%s\n' "$PWD" "$gpu" "$have"; cat pyproject.toml)
key=$(printf '%s' "$key" | cksum)
present=yes
for each in ${extra//,/ }; do
  [ "$(cat "$state/$each" 2>/dev/null || true)" = "$key" ] || present=
done
[ -n "$present" ] && exit 0

extras=
[ "$extra" = base ] || extras=$extra
[ "$gpu" = cpu ] || extras=${extras:+$extras,}$gpu

say "Installing fastvim-jax${extras:+[$extras]} into $venv; the first time this downloads JAX and takes a minute or two."
touch "$state/installing"
"$venv/bin/python" -m pip install --quiet --prefer-binary --editable ".${extras:+[$extras]}" >&2
printf '%s' "$gpu" >"$state/gpu"
# A larger set holds the smaller ones.
for each in ${extra//,/ }; do
  printf '%s' "$key" >"$state/$each"
  if [ "$each" = dev ]; then printf '%s' "$key" >"$state/test"; fi
done
printf '%s' "$key" >"$state/base"
rm -f "$state/installing"
