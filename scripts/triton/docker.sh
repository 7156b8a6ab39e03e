#!/usr/bin/env bash
# Run NVIDIA Triton in Docker, serving model_repository on 127.0.0.1: ports 8000 (HTTP), 8001 (gRPC), 8002 (metrics).
#
#   scripts/triton_cpu.sh [OPTION]... [-- TRITONSERVER-ARGUMENT...]
#   scripts/triton_gpu.sh [OPTION]... [-- TRITONSERVER-ARGUMENT...]
#
#   --tag XX.YY             the Triton release; default TRITON_TAG from the environment, else NEWEST.
#                           From 25.03 on, NVIDIA's image has no TensorFlow backend: mnist-triton:XX.YY, built once
#                           from scripts/triton/Dockerfile, adds it. Up to 25.02, NVIDIA's image runs as it is.
#   --model-repository DIR  the models to serve, mounted read-only; default model_repository.
#   --listen ADDRESS        the IPv4 address of this machine to publish the ports on; default 127.0.0.1.
#                           0.0.0.0 opens them to the network, where Triton answers whoever asks.
#   --memory SIZE           the most main memory that the container may take; default 8g.
#   --detach                return as soon as the models are READY; 'docker stop triton_mnist' ends them.
#   --dry-run               print the commands; needs neither Docker, nor a GPU, nor a trained model.
#   --help                  print this text.
#
# Without --detach, Triton stays in the foreground until Ctrl-C. Status 1: it failed; 2: wrong usage.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
newest=26.09 # The newest release that this project knows.
name=triton_mnist
ports=(8000 8001 8002)
ready_seconds=300

die() {
  echo "triton_$device.sh: $1" >&2
  exit "${2:-1}"
}

usage() {
  die "$1; --help lists the options" 2
}

warn() {
  echo "triton_$device.sh: warning: $1" >&2
}

# Print a command so that it can be pasted into a shell: one argument a line.
print_command() {
  printf '%s %s' "$1" "$2"
  printf ' \\\n  %q' "${@:3}"
  echo
}

check_docker() {
  command -v docker >/dev/null ||
    die "there is no docker command: install Docker (https://docs.docker.com/engine/install/), or run ./scripts/triton_local.sh, which needs none"
  local message
  if ! message="$(docker version 2>&1 >/dev/null)"; then
    case "$message" in
      *"permission denied"*)
        die "you may not use Docker: run 'sudo usermod -aG docker $(id -un)' and log in again, or run this with sudo" ;;
      *"Cannot connect"* | *"daemon is running"*)
        die "the Docker daemon does not run: start it with 'sudo systemctl start docker', or start Docker Desktop" ;;
      *) die "docker version fails: ${message%%$'\n'*}" ;;
    esac
  fi
}

check_gpu() {
  [[ "$(uname -s)" != Darwin ]] || die "Docker on a Mac reaches no NVIDIA GPU: run ./scripts/triton_cpu.sh"
  local gpus
  gpus="$(nvidia-smi --list-gpus 2>/dev/null)" && [[ "$gpus" == GPU* ]] ||
    die "nvidia-smi finds no NVIDIA GPU: install NVIDIA's driver (https://www.nvidia.com/drivers), or run ./scripts/triton_cpu.sh"
  command -v nvidia-container-runtime-hook >/dev/null || command -v nvidia-ctk >/dev/null ||
    [[ "$(docker info --format '{{json .Runtimes}}' 2>/dev/null)" == *nvidia* ]] ||
    die "Docker cannot use the GPU without the NVIDIA Container Toolkit: install it (https://docs.nvidia.com/datacenter/cloud-native/container-toolkit/latest/install-guide.html) and restart Docker"
}

check_repository() {
  local versions=("$repository"/mnist_model/[1-9]*/)
  [[ -d "${versions[0]}" ]] || die "no trained model in $repository/mnist_model: run 'python train.py' first"
}

# Print whether the container runs, true or false; nothing where there is none.
is_running() {
  docker container inspect --format '{{.State.Running}}' "$name" 2>/dev/null || true
}

# Docker removes a container a moment after it has ended.
await_removal() {
  local tries=20
  while [[ "$(is_running)" == false ]] && ((tries--)); do
    sleep 0.2
  done
}

check_free() {
  await_removal
  case "$(is_running)" in
    true) die "the container $name is already running: run 'docker stop $name' first" ;;
    false) die "a stopped container is named $name: run 'docker rm $name' first" ;;
  esac
  local port
  for port in "${ports[@]}"; do
    if (: <>"/dev/tcp/$address/$port") 2>/dev/null; then
      die "port $port on $address is already in use: stop the program that uses it"
    fi
  done
}

# Get NVIDIA's image where it is not here yet; what docker pull reports goes to stderr.
pull() {
  docker image inspect "$nvidia_image" >/dev/null 2>&1 && return
  local message
  if ! message="$(docker pull "$nvidia_image" 3>&1 1>&2 2>&3)"; then
    case "$message" in
      *"no matching manifest"*)
        die "NVIDIA publishes no Triton $tag for this machine's processor ($(uname -m)): try a newer --tag" ;;
      *"manifest unknown"* | *"not found"*)
        die "NVIDIA publishes no Triton $tag: choose one of https://catalog.ngc.nvidia.com/orgs/nvidia/containers/tritonserver/tags" ;;
      *) die "docker cannot pull $nvidia_image: ${message%%$'\n'*}" ;;
    esac
  fi
}

# Look, as Triton's user, for a file that it cannot read (hidden folders are versions in the making), in a container with
# the same options; leave out what this image or this host cannot do.
probe() {
  local message find=(-name '.?*' -prune -o '(' ! -readable -o -type d ! -executable ')' -print -quit)
  until message="$(docker run --rm "${optional[@]}" "${options[@]}" --entrypoint=find "$image" /models "${find[@]}" 2>&1)"; do
    case "${optional[*]} $message" in
      --user=triton-server*"unable to find user"*)
        warn "$image has no user triton-server: Triton runs as the image's own user"
        optional[0]=--user= ;;
      *--ulimit=memlock*rlimit*)
        warn "Docker on this machine cannot lift the limit on locked memory: Triton runs with the limit as it is"
        unset "optional[1]" ;;
      *) die "docker cannot run $image: ${message%%$'\n'*}" ;;
    esac
  done
  message="$(sed -n '/^\/models/{p;q;}' <<<"$message")"
  [[ -z "$message" ]] || die "Triton's user may not read $repository${message#/models}: run 'chmod -R a+rX $repository'"
}

# Start the container and return when Triton is ready; on any other way out, stop it.
run_detached() {
  command -v curl >/dev/null || die "--detach asks Triton whether it is ready with curl: install curl"
  log="$(mktemp)"
  started=""
  follower=""
  trap finish EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  "${run_command[@]}" >/dev/null || die "docker cannot start Triton: its message stands above"
  started=yes
  docker logs --follow "$name" >"$log" 2>&1 &
  follower=$!
  local end=$((SECONDS + ready_seconds))
  until curl --silent --fail --noproxy '*' --output /dev/null "http://$address:${ports[0]}/v2/health/ready"; do
    if ! kill -0 "$follower" 2>/dev/null; then
      cat "$log" >&2
      die "Triton ended before the models were READY: its log stands above"
    elif ((SECONDS > end)); then
      cat "$log" >&2
      die "the models are not READY after $ready_seconds s: Triton's log stands above"
    fi
    sleep 0.2
  done
  started=""
  # Triton prints several tables; this one lists the models.
  docker logs "$name" 2>&1 |
    awk '/^[+]/ { border = $0 } /^[|] Model / { print border; found = 1 } !/^[+|]/ { found = 0 } found'
}

finish() {
  [[ -z "$follower" ]] || kill "$follower" 2>/dev/null || true
  if [[ -n "$started" ]]; then
    docker stop "$name" >/dev/null 2>&1 || true
    await_removal
  fi
  rm -f "$log"
}

device="${1:?run scripts/triton_cpu.sh or scripts/triton_gpu.sh}"
tag="${TRITON_TAG:-$newest}"
memory=8g
repository="$root/model_repository"
listen=127.0.0.1
detach=""
dry_run=""
triton_arguments=()
shift
while (($#)); do
  case "$1" in
    --tag | --model-repository | --listen | --memory) (($# > 1)) || usage "$1 needs a value" ;;
  esac
  case "$1" in
    --tag) tag="$2" && shift ;;
    --model-repository) repository="$2" && shift ;;
    --listen) listen="$2" && shift ;;
    --memory) memory="$2" && shift ;;
    --detach) detach=yes ;;
    --dry-run) dry_run=yes ;;
    --help) sed -n "s/NEWEST/$newest/; 2,/^[^#]/s/^# \{0,1\}//p" "${BASH_SOURCE[0]}" && exit ;;
    --) shift && triton_arguments=("$@") && break ;;
    *) usage "unknown option '$1'" ;;
  esac
  shift
done
[[ "$tag" =~ ^[0-9]{2}\.(0[1-9]|1[0-2])$ ]] || usage "a Triton release is two digits, a dot and a month, as $newest, not '$tag'"
[[ "$listen" =~ ^[0-9]{1,3}(\.[0-9]{1,3}){3}$ ]] || usage "--listen takes an IPv4 address, not '$listen'"
[[ "$repository" != *:* ]] || usage "docker cannot mount a folder with a colon in its name: '$repository'"
[[ "$repository" == /* ]] || repository="$PWD/$repository"
address="${listen/#0.0.0.0/127.0.0.1}"
release=$((10#${tag/./}))

nvidia_image="nvcr.io/nvidia/tritonserver:$tag-py3"
image="$nvidia_image"
build_command=()
if ((release >= 2503)); then
  image="mnist-triton:$tag"
  [[ "$device" == cpu ]] || image+="-gpu"
  build_command=(docker build "--file=$root/scripts/triton/Dockerfile" "--build-arg=TRITON_IMAGE=$nvidia_image"
    "--build-arg=DEVICE=$device" "--tag=$image" "$root")
fi

if ((release < 2606)); then
  warn "Triton $tag has holes through which whoever reaches its ports may take it over; NVIDIA's security bulletins for Triton Inference Server (5687, 5828 and later) name them, and the releases 25.07, 26.03 and 26.06 closed them"
fi
if [[ "$(uname -sm)" == "Darwin arm64" ]]; then
  warn "on Apple silicon Docker runs the image's linux/arm64 variant on the CPU, which this project's tests do not cover"
fi

mount="$repository:/models:ro"
! selinuxenabled 2>/dev/null || mount+=",z" # SELinux shows the container what bears its label.
optional=(--user=triton-server --ulimit=memlock=-1)
options=("--volume=$mount" --ulimit=stack=67108864 --shm-size=1g --read-only --tmpfs=/tmp "--memory=$memory"
  --pids-limit=4096 --cap-drop=ALL --security-opt=no-new-privileges)
if [[ -z "$dry_run" ]]; then
  check_docker
  [[ "$device" == cpu ]] || check_gpu
  check_repository
  check_free
  pull
  [[ "${#build_command[@]}" == 0 ]] || "${build_command[@]}" >&2 || die "docker cannot build $image: its message stands above"
  probe
  check_free # Once more: to pull and to build takes minutes the first time.
fi

run_command=(docker run --rm "--name=$name")
[[ "$device" == cpu ]] || run_command+=(--gpus=all)
if [[ -n "$detach" ]]; then
  run_command+=(--detach)
elif [[ -t 0 && -t 1 ]]; then
  run_command+=(-it)
fi
for port in "${ports[@]}"; do
  run_command+=("--publish=$listen:$port:$port")
done
run_command+=("${optional[@]}" "${options[@]}" "$image" tritonserver --model-repository=/models ${triton_arguments[@]+"${triton_arguments[@]}"})

if [[ -n "$dry_run" ]]; then
  [[ "${#build_command[@]}" == 0 ]] || print_command "${build_command[@]}"
  print_command "${run_command[@]}"
elif [[ -n "$detach" ]]; then
  run_detached
else
  exec "${run_command[@]}"
fi
