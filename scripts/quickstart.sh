#!/usr/bin/env bash
# The whole tutorial in one command: set up, train, serve with Flask and with Triton, ask both.
#
#   scripts/quickstart.sh [--serve]
#
# --serve  keep both servers up after the questions, until Ctrl-C
#
# Trains only when model_repository holds no version yet. Whatever it starts, it stops.
set -euo pipefail

if [[ "${1:-}" == "--help" ]]; then
  sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p;}' "${BASH_SOURCE[0]}"
  exit 0
fi
die() {
  echo "quickstart.sh: $*" >&2
  exit 1
}
serve="${1:-}"
if [[ $# -gt 1 || ! "$serve" =~ ^(--serve)?$ ]]; then
  echo "quickstart.sh: unknown option in '$*': see --help" >&2
  exit 2
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."

answers() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
for port in 5000 8000 8001 8002; do
  ! answers "$port" || die "port $port is taken: stop what listens on it, then try again"
done

scripts/setup.sh
PATH="$PWD/.venv/bin:$PATH"
export VIRTUAL_ENV="$PWD/.venv"

logs="$(mktemp -d)"
pids=()
stop() {
  trap - EXIT
  ((${#pids[@]} == 0)) || { kill "${pids[@]}" && wait "${pids[@]}"; } 2>/dev/null || true
  rm -rf "$logs"
}
trap stop EXIT
trap 'exit 130' INT TERM

# start NAME COMMAND …: run a server in the background, its output in a file; ready NAME PORT waits for its port.
start() {
  "${@:2}" >"$logs/$1" 2>&1 &
  pids+=($!)
}
ready() {
  for ((tenths = 0; tenths < 1200; tenths++)); do
    kill -0 "${pids[-1]}" 2>/dev/null || break
    ! answers "$2" || return 0
    sleep 0.1
  done
  tail -n 20 "$logs/$1" >&2
  die "$1 did not start: its last lines stand above"
}
show() {
  echo "\$ $*"
  "$@"
}

compgen -G "model_repository/mnist_model/[1-9]*" >/dev/null || show python train.py
start Triton scripts/triton_local.sh
ready Triton 8000
start Flask python flask/server.py
ready Flask 5000

echo
if command -v curl >/dev/null; then
  show curl -sS -X POST -F image=@images/sample_image.png http://127.0.0.1:5000/mnist_infer
else
  python -c 'import requests
print(requests.post("http://127.0.0.1:5000/mnist_infer", files={"image": open("images/sample_image.png", "rb")}).text, end="")'
fi
show python triton-infer.py

if [[ -n "$serve" ]]; then
  echo
  echo "Flask listens on http://127.0.0.1:5000, Triton on 127.0.0.1:8000 (HTTP) and 8001 (gRPC), until Ctrl-C."
  wait -n "${pids[@]}" || true
  die "a server stopped"
fi
