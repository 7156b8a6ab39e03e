#!/usr/bin/env bash
# Serve model_repository with the real NVIDIA Triton server, without Docker, until Ctrl-C.
#
#   scripts/triton_local.sh [TRITONSERVER OPTION …]
#
# Needs Linux (x86-64 or arm64, glibc 2.35 or newer) and Python 3.10 to 3.12 with requirements.txt installed: that of
# the active virtual environment, else of .venv, else python3. The first run downloads Triton (55 MB) into .triton.
# HTTP listens on 127.0.0.1:8000, gRPC on 8001, metrics on 8002. Options go to tritonserver, for example
#   --http-port=9000 --grpc-port=9001 --metrics-port=9002   other ports
#   --http-address=0.0.0.0 --grpc-address=0.0.0.0           let other machines ask
#   --model-repository=DIR                                  other models
#   --model-control-mode=poll                               serve a new version as soon as it is trained
set -euo pipefail

if [[ "${1:-}" == "--help" ]]; then
  sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p;}' "${BASH_SOURCE[0]}"
  exit 0
fi
die() {
  echo "triton_local.sh: $*" >&2
  exit 1
}
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python=python3
if [[ -n "${VIRTUAL_ENV:-}" ]]; then
  python="$VIRTUAL_ENV/bin/python"
elif [[ -x "$root/.venv/bin/python" ]]; then
  python="$root/.venv/bin/python"
fi
command -v "$python" >/dev/null || die "no Python at $python: install Python 3.10 to 3.12"

# Whatever would make tritonserver fail late and in many words is said here, first and in one sentence.
# Prints the default model repository, if it is wanted, Python's version, its program's folder and its library's.
checked="$("$python" - "$root" "$@" <<'PYTHON'
import argparse, importlib.metadata, importlib.util, platform, socket, sys, sysconfig
from pathlib import Path

def die(sentence):
    sys.exit(f"triton_local.sh: {sentence}")

root, version = Path(sys.argv[1]), "%d.%d" % sys.version_info[:2]
machine = f"{platform.system()} {platform.machine()}"
if machine not in ("Linux x86_64", "Linux aarch64"):
    die(f"Triton's wheel needs Linux on x86-64 or arm64, this is {machine}: use Docker, scripts/triton_cpu.sh")
libc, release = platform.libc_ver()
if libc != "glibc" or tuple(map(int, release.split("."))) < (2, 35):
    die(f"Triton needs glibc 2.35 or newer (Debian 12, Ubuntu 22.04), this is {libc} {release}")
if version not in ("3.10", "3.11", "3.12"):
    die(f"{sys.executable} is Python {version}: use a virtual environment of Python 3.10, 3.11 or 3.12")
places = sysconfig.get_config_vars("LIBDIR", "MULTIARCH")
library = f"libpython{version}.so.1.0"
folders = [Path(sys.base_prefix, "lib"), Path(places[0] or "/usr/lib"), Path(places[0] or "/usr/lib", places[1] or "")]
folders = [folder for folder in folders if (folder / library).exists()]
if not folders:
    die(f"{sys.executable} lacks its shared library {library}: run 'sudo apt install libpython{version}' on Debian or "
        "Ubuntu, or use a Python built with --enable-shared")
install = f"run '{sys.executable} -m pip install -r {root}/requirements.txt'"
for name in ("numpy", "tensorflow"):
    if not importlib.util.find_spec(name):
        die(f"{sys.executable} has no {name}: {install}")
if importlib.metadata.version("numpy").split(".")[0] != "1":
    die(f"{sys.executable} has NumPy 2, whose arrays this Triton garbles: {install}")

options = argparse.ArgumentParser(prog="triton_local.sh", add_help=False, allow_abbrev=False)
services = {"http": 8000, "grpc": 8001, "metrics": 8002}
for service, port in services.items():
    options.add_argument(f"--{service}-port", type=int, default=port)
    options.add_argument(f"--{service}-address", default="127.0.0.1")
options.add_argument("--model-repository", "--model-store")
given = vars(options.parse_known_args(sys.argv[2:])[0])
for service in services:
    address, port = given[f"{service}_address"], given[f"{service}_port"]
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((address, port))
        except OSError as error:
            die(f"cannot listen on {address}:{port} ({error.strerror}): stop what does, or give --{service}-port")
sys.path.append(str(root))
from saved_model import ModelError, newest_version
try:
    given["model_repository"] or newest_version(root / "model_repository" / "mnist_model")
except ModelError as error:
    die(error)
repository = "" if given["model_repository"] else root / "model_repository"
print(repository, version, Path(sys.executable).parent, folders[0], sep="\n")
PYTHON
)"
{ read -r repository; read -r version; read -r bin; read -r library; } <<<"$checked"
options=(--http-address=127.0.0.1 --grpc-address=127.0.0.1 --metrics-address=127.0.0.1 --allow-gpu-metrics=false)
[[ -z "$repository" ]] || options+=("--model-repository=$repository")

# Fetch and lay out under a temporary name and rename: what stands in .triton is whole.
wheel="$root/.triton/nvidia-pytriton-0.7.0"
backends="$wheel/backends-$version"
mkdir -p "$root/.triton"
temporary="$(mktemp -d "$root/.triton/unfinished.XXXXXX")"
trap 'rm -rf "$temporary"' EXIT
publish() { # Another run may have been faster; its result is as good.
  mv -T "$temporary/$1" "$2" 2>/dev/null || [[ -d "$2" ]] || die "cannot write $2"
}
if [[ ! -d "$wheel" ]]; then
  echo "Downloading Triton (55 MB) to $wheel …" >&2
  "$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$temporary/wheel" \
    nvidia-pytriton==0.7.0 ||
    die "cannot download nvidia-pytriton 0.7.0 from the package index: look at pip's message above, then try again"
  publish wheel "$wheel"
fi
if [[ ! -d "$backends" ]]; then
  # Triton's Python backend with the stub for this Python, and the drop-in TensorFlow backend beside it. Triton wants
  # libtriton_python.so itself there and takes no link for it.
  mkdir -p "$temporary/backends/tensorflow"
  cp -R "$wheel/pytriton/tritonserver/backends/python" "$temporary/backends"
  cp "$wheel/pytriton/tritonserver/python_backend_stubs/$version/triton_python_backend_stub" "$temporary/backends/python"
  ln -s ../../../../{scripts/triton/backends/tensorflow/model.py,saved_model.py} "$temporary/backends/tensorflow"
  publish backends "$backends"
fi
rm -rf "$temporary"

# The stub that runs the model finds its Python by the python3 on PATH and loads its shared library.
export PATH="$bin:$PATH" TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-1}"
export LD_LIBRARY_PATH="$wheel/nvidia_pytriton.libs:$library${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
exec "$wheel/pytriton/tritonserver/bin/tritonserver" --backend-directory="$backends" "${options[@]}" "$@"
