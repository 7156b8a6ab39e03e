#!/usr/bin/env bash
# Measure both servers side by side: start them, ask them from 1 to 64 clients, show a table and draw a picture.
#
#   scripts/benchmark.sh [OPTION …]
#
# --clients N …           how many clients ask at once; 1 4 16 64 unless given
# --seconds S             how long each server is asked at a time; 3 unless given
# --rounds N              how often; the servers take turns, and the table shows medians; 5 unless given
# --floor                 also measure both servers with a constant instead of the model: what no model could beat
# --photo                 also send the Flask server a photo of 12 megapixels
# --against SERVER        also measure another flask/server.py, of an older checkout for example
# --picture FILE          where the picture goes; benchmark.png unless given
# --model-repository DIR  the model to serve, in Triton's layout; model_repository unless given
#
# Needs a trained model, Linux, and h2load to ask: 'sudo apt install nghttp2-client'. Status 1 when a request failed.
# How to read the figures: scripts/benchmark/README.md
set -euo pipefail

if [[ "${1:-}" == "--help" ]]; then
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit 0
fi
if ! command -v h2load >/dev/null; then
  echo "benchmark.sh: no h2load on PATH: run 'sudo apt install nghttp2-client' on Debian or Ubuntu" >&2
  exit 1
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh tests/requirements.txt
exec .venv/bin/python scripts/benchmark/benchmark.py "$@"
