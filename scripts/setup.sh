#!/usr/bin/env bash
# Make the virtual environment .venv and install what the project needs into it; quick when that is done already.
#
#   scripts/setup.sh [REQUIREMENTS]
#
# REQUIREMENTS  requirements.txt unless given, or tests/requirements.txt
# PYTHON        the Python 3.10 to 3.12 to use; without it the first one found on PATH
set -euo pipefail

if [[ "${1:-}" == "--help" ]]; then
  sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p;}' "${BASH_SOURCE[0]}"
  exit 0
fi
die() {
  echo "setup.sh: $*" >&2
  exit 1
}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
requirements="${1:-requirements.txt}"
[[ -f "$requirements" ]] || die "there is no file $requirements: give requirements.txt or tests/requirements.txt"

is_supported() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }

# A whole environment holds a copy of the requirements that were installed: what was interrupted is done anew.
installed=".venv/installed-${requirements//\//-}"
if is_supported .venv/bin/python && cat requirements.txt "$requirements" | cmp -s - "$installed"; then
  exit 0
fi
if ! is_supported .venv/bin/python || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  for python in ${PYTHON:+"$PYTHON"} python3 python3.12 python3.11 python3.10; do
    is_supported "$python" && break
    python=
  done
  [[ -n "$python" ]] || die "no Python 3.10, 3.11 or 3.12 on PATH: install one, or name it with PYTHON=/path/to/python"
  echo "Making .venv with $("$python" --version) …" >&2
  "$python" -m venv --clear .venv ||
    die "$python cannot make a virtual environment: on Debian or Ubuntu run 'sudo apt install python3-venv'"
fi
echo "Installing $requirements into .venv; TensorFlow is large, so the first time takes a minute or more …" >&2
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements" ||
  die "pip could not install $requirements: look at its message above, then try again"
cat requirements.txt "$requirements" >"$installed"
