#!/usr/bin/env bash
# Prints the path of the newest Python 3.13, 3.12 or 3.11 that really works, or of the newest one of a series named as argument.
#
#   scripts/find_python.sh            the newest of all
#   scripts/find_python.sh 3.11      the newest 3.11.x, if there is one
#
# An interpreter counts when it starts, is of the right series, and can import what a virtual environment needs. pyenv's
# shims are on PATH but refuse to start unless a version is selected, so pyenv's versions are looked at one by one.
set -euo pipefail

series=("${@:-}")
[ -n "${series[0]}" ] || series=(3.13 3.12 3.11)

probe='
import sys
import ctypes, ensurepip, ssl, venv, zlib
# in a virtual environment, the interpreter that it was made with: the environment may be about to go
print("%d.%d %d" % sys.version_info[:3], getattr(sys, "_base_executable", None) or sys.executable)
'

# Prints "MICRO PATH" if the interpreter at $2 works and is of series $1.
check() {
  local answer
  [ -x "$2" ] || return 0
  answer=$("$2" -I -c "$probe" </dev/null 2>/dev/null) || return 0
  case "$answer" in
    "$1 "*) printf '%s\n' "${answer#* }" ;;
  esac
}

candidates() {
  local root directory path
  for root in "${PYENV_ROOT:-}" "${HOME:-}/.pyenv"; do
    [ -n "$root" ] || continue
    for path in "$root"/versions/"$1"*/bin/python; do
      check "$1" "$path"
    done
  done
  local IFS=:
  for directory in ${PATH:-} /usr/local/bin /opt/homebrew/bin /usr/bin; do
    for path in "$directory/python$1" "$directory/python3" "$directory/python"; do
      check "$1" "$path"
    done
  done
}

for wanted in "${series[@]}"; do
  best=$(candidates "$wanted" | sort -rn -k1,1 -s | head -n 1)
  if [ -n "$best" ]; then
    printf '%s\n' "${best#* }"
    exit 0
  fi
done

echo "No working Python ${series[*]} found (looked in pyenv's versions and on PATH)." >&2
echo "Install one, or name it: make PYTHON=/path/to/python3.12 ..." >&2
exit 1
