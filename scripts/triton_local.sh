#!/usr/bin/env bash
# Serve model_repository with the real NVIDIA Triton server, without Docker, until Ctrl-C; --help lists the options.
set -euo pipefail
root="$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="${VIRTUAL_ENV:-$root/.venv}/bin:$PATH"
exec python3 "$root/scripts/triton/local.py" "$@"
