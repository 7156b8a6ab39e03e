#!/usr/bin/env bash
# Run NVIDIA Triton in Docker on the CPU, serving model_repository on 127.0.0.1; --help lists the options.
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/triton/docker.sh" cpu "$@"
