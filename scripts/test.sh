#!/usr/bin/env bash
# Set everything up, then check and test the project.
#
#   scripts/test.sh [PYTEST OPTION …]
#
# Lints and checks the format of the Python files (ruff), lints the shell scripts (ShellCheck) and the Dockerfile
# (hadolint), and runs the tests (pytest), two files at a time, since most of them wait for servers. What the machine
# lacks is skipped, with the reason; with CI=true it fails.
set -euo pipefail

if [[ "${1:-}" == "--help" ]]; then
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit 0
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh tests/requirements.txt
PATH="$PWD/.venv/bin:$PATH"
export VIRTUAL_ENV="$PWD/.venv"

ruff check .
ruff format --check .
shellcheck .ci/run scripts/*.sh scripts/*/*.sh tests/*.sh
hadolint scripts/triton/Dockerfile flask/Dockerfile
python -m pytest --numprocesses=2 --no-loadscope-reorder "$@"
