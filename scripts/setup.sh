#!/usr/bin/env bash
# Make the virtual environment .venv and install what the project needs into it; quick when that is done already.
#
#   scripts/setup.sh [REQUIREMENTS]
#
# REQUIREMENTS  requirements.txt unless given, or tests/requirements.txt
# PYTHON        the Python 3.10 to 3.12 to use; without it the first one on PATH that has its shared library, which
#               Triton needs; where there is none, uv fetches Python 3.12 into .uv, from GitHub or from the mirror
#               that UV_PYTHON_INSTALL_MIRROR names
set -euo pipefail

if [[ "${1:-}" == "--help" ]]; then
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit 0
fi
die() {
  echo "setup.sh: $*" >&2
  exit 1
}
trap 'echo "setup.sh: stopped; run it again to go on" >&2; exit 130' INT
cd "$(dirname "${BASH_SOURCE[0]}")/.."
requirements="${1:-requirements.txt}"
[[ -f "$requirements" ]] || die "there is no file $requirements: give requirements.txt or tests/requirements.txt"

# A supported Python with its shared library, and an environment that has pip and has not been moved.
is_usable() { "$1" scripts/triton/local.py --check-python >/dev/null 2>&1; }
is_environment() {
  is_usable .venv/bin/python && .venv/bin/python -m pip --version >/dev/null 2>&1 &&
    bash -c 'source .venv/bin/activate && [[ "$VIRTUAL_ENV" -ef .venv ]]'
}

# A whole environment holds a copy of the requirements that were installed: what was interrupted is done anew.
installed=".venv/installed-${requirements//\//-}"
if is_environment && cat requirements.txt "$requirements" | cmp -s - "$installed"; then
  exit 0
fi
[[ -w . ]] || die "cannot write into $PWD: make it writable, or clone the project into a folder of yours"
free="$(df -Pk . | awk 'NR == 2 { print int($4 / 1024) }')"
((free > 3500)) || [[ -e .venv/installed-requirements.txt ]] ||
  die "$PWD has $free MB of free space, and the project needs 3500: make room first"

# make_environment PYTHON FOLDER
make_environment() {
  "$1" -c 'import ensurepip' 2>/dev/null ||
    die "$1 cannot make a virtual environment: on Debian or Ubuntu run 'sudo apt install python3-venv'"
  # The environment of a Python that has been moved, such as those of uv, finds it by its own name and by no link to it.
  local python message
  python="$("$1" -c 'import os, sys; print(os.path.realpath(sys.executable))')"
  message="$("$python" -m venv --clear "$2" 2>&1)" || die "$1 cannot make $2: ${message##*$'\n'}"
}
install() {
  # The temporary files of pip are as large as the packages, and /tmp is often small.
  mkdir -p "$1/tmp"
  TMPDIR="$PWD/$1/tmp" "$1/bin/python" -m pip install --disable-pip-version-check "${@:2}" >&2
}
# Have uv fetch Python 3.12 into .uv, itself installed there unless it is on PATH.
fetch_python() {
  local uv=uv
  if ! command -v uv >/dev/null; then
    uv=.uv/bin/uv
    [[ -x "$uv" ]] || { make_environment python3 .uv && install .uv uv; } || return
  fi
  UV_SYSTEM_CERTS=true "$uv" python install --no-bin --install-dir .uv 3.12 >&2
}

find_python() {
  for python in ${PYTHON:+"$PYTHON"} python3 python3.12 python3.11 python3.10 "$PWD"/.uv/cpython-3.12*/bin/python3.12; do
    ! is_usable "$python" || return 0
  done
  return 1
}

if ! is_environment; then
  if [[ -n "${PYTHON:-}" ]] && ! is_usable "$PYTHON"; then
    die "PYTHON=$PYTHON is no Python 3.10 to 3.12 with its shared library"
  fi
  if ! find_python; then
    found="$(python3 --version 2>&1)" || die "there is no python3: install Python"
    echo "Triton needs Python 3.10 to 3.12 with its shared library, and this is $found: fetching 3.12 …" >&2
    if ! { fetch_python && find_python; }; then
      way="install such a Python"
      [[ ! "$found" =~ 3\.1[0-2] ]] || way="on Debian or Ubuntu run 'sudo apt install libpython${BASH_REMATCH[0]}'"
      die "found $found, and uv could not fetch Python 3.10 to 3.12 with its shared library: $way, or name one with PYTHON=/path/to/python, or a mirror of uv's releases of Python with UV_PYTHON_INSTALL_MIRROR=URL"
    fi
  fi
  echo "Making .venv with $("$python" --version) …" >&2
  make_environment "$python" .venv
fi
echo "Installing $requirements into .venv; TensorFlow is large, so the first time takes a minute or more …" >&2
install .venv -r "$requirements" || die "pip could not install $requirements: look at its message above, then try again"
rm -rf .venv/tmp
cat requirements.txt "$requirements" >"$installed"
