#!/usr/bin/env bash
# The whole tutorial in one command: set up, train, serve with Flask and with Triton, ask both.
#
#   scripts/quickstart.sh [--serve]
#
# --serve  keep both servers up after the questions, until Ctrl-C
#
# Trains only when model_repository holds no version yet. Whatever it starts, it stops; what the servers say is kept in
# .venv/logs.
set -euo pipefail

if [[ "${1:-}" == "--help" ]]; then
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
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

# Every program has a session of its own, so that stopping it stops all of it, and Ctrl-C reaches this script alone.
stop() {
  trap '' INT TERM HUP
  for session in $(jobs -p); do
    kill -TERM -- "-$session" "$session" || true
  done 2>/dev/null
  wait
}
trap stop EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

# run COMMAND …: in the background, since bash heeds no signal while it waits for one in the foreground.
# start NAME COMMAND …: a server, its output in a file, stopped by the kernel should this script be killed.
# ready NAME PORT PROCESS: wait until the server listens.
run() {
  setsid "$@" &
  wait $!
}
start() {
  setsid setpriv --pdeathsig=TERM "${@:2}" >"$logs/$1" 2>&1 &
}
ready() {
  for ((tenths = 0; tenths < 1200; tenths++)); do
    ! answers "$2" || return 0
    kill -0 "$3" 2>/dev/null || break
    sleep 0.1
  done
  tail -n 20 "$logs/$1" >&2
  die "$1 did not start: its last lines stand above"
}
show() {
  echo "\$ $*"
  run "$@"
}

run scripts/setup.sh
PATH="$PWD/.venv/bin:$PATH"
export VIRTUAL_ENV="$PWD/.venv"
logs="$PWD/.venv/logs"
mkdir -p "$logs"
export no_proxy="127.0.0.1,${no_proxy:-${NO_PROXY:-}}" # Proxies know no server of this machine.
run scripts/triton_local.sh --download
compgen -G "model_repository/mnist_model/[1-9]*" >/dev/null || show python train.py

echo "Starting Triton and Flask …" >&2
start Triton scripts/triton_local.sh
triton=$!
start Flask python flask/server.py
flask=$!
ready Triton 8000 "$triton"
ready Flask 5000 "$flask"

echo
if command -v curl >/dev/null; then
  show curl -sS -X POST -F image=@images/sample_image.png http://127.0.0.1:5000/mnist_infer
else
  echo "\$ # Without curl: images/sample_image.png to http://127.0.0.1:5000/mnist_infer"
  python -c 'import requests
print(requests.post("http://127.0.0.1:5000/mnist_infer", files={"image": open("images/sample_image.png", "rb")}).text, end="")'
fi
show python triton-infer.py

if [[ -n "$serve" ]]; then
  echo
  echo "Open http://127.0.0.1:5000 in a browser; Triton listens on 127.0.0.1:8000 (HTTP) and 8001 (gRPC). Ctrl-C ends both."
  wait -n || true
  die "a server stopped"
fi
