"""Serve model_repository with the real NVIDIA Triton server, without Docker, until Ctrl-C.

  scripts/triton_local.sh [TRITONSERVER OPTION …]

Needs Linux (x86-64 or arm64, glibc 2.35 or newer) and Python 3.10 to 3.12 with requirements.txt installed: that of the
active virtual environment, else of .venv, else python3. The first run downloads Triton (55 MB) into .triton;
--download alone does that and ends. HTTP listens on 127.0.0.1:8000, gRPC on 8001, metrics on 8002. Options go to
tritonserver, paths in them absolute but for --model-repository, for example
  --http-port=9000 --grpc-port=9001 --metrics-port=9002   other ports
  --http-address=0.0.0.0 --grpc-address=0.0.0.0           let other machines ask
  --model-repository=DIR                                  other models
  --model-control-mode=poll                               serve a new version as soon as it is trained
"""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WHEEL = "nvidia-pytriton==0.7.0"
RELEASE = "24.10"  # Of the Triton in that wheel.
PYTHONS = ("3.10", "3.11", "3.12")  # For these the wheel has stubs, the programs that run Python models.
SERVICES = {"http": 8000, "grpc": 8001, "metrics": 8002}
SHARED_MEMORY = Path("/dev/shm")
SHARED_MEMORY_BYTES = 16 << 20  # A stub needs 1 MB, and more for larger tensors.
WATCH_SECONDS = 2
LAST_SECONDS = 10  # How long a Triton that stops may wait for its clients, and one with a dead stub take at all.
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def die(sentence):
    """Leave with status 1 and the sentence on stderr."""
    sys.exit(f"triton_local.sh: {sentence}")


def check_machine():
    """Refuse a machine on which the wheel's programs do not run."""
    machine = f"{platform.system()} {platform.machine()}"
    if machine not in ("Linux x86_64", "Linux aarch64"):
        die(f"Triton's wheel needs Linux on x86-64 or arm64, this is {machine}: use Docker, scripts/triton_cpu.sh")
    libc, release = platform.libc_ver()
    if libc != "glibc" or tuple(map(int, release.split("."))) < (2, 35):
        die(f"Triton needs glibc 2.35 or newer (Debian 12, Ubuntu 22.04), this is {libc} {release}")


def find_library():
    """Return the folder of this Python's shared library, which the stub loads; refuse a Python without one."""
    version = sysconfig.get_python_version()
    if version not in PYTHONS:
        die(f"{sys.executable} is Python {version}: use a virtual environment of Python {', '.join(PYTHONS)}")
    if platform.system() != "Linux":
        return None
    library = f"libpython{version}.so.1.0"
    folder, architecture = sysconfig.get_config_vars("LIBDIR", "MULTIARCH")
    folder = Path(folder or "/usr/lib")
    for place in (Path(sys.base_prefix, "lib"), folder, folder / (architecture or "")):
        if (place / library).exists():
            return place
    die(
        f"{sys.executable} lacks its shared library {library}: run 'sudo apt install libpython{version}' on Debian or "
        "Ubuntu, or use a Python built with --enable-shared"
    )


def check_packages():
    """Refuse a Python without the packages that the stub imports."""
    install = f"run '{sys.executable} -m pip install -r {ROOT}/requirements.txt'"
    for name in ("numpy", "ai_edge_litert", "tensorflow"):
        if not importlib.util.find_spec(name):
            die(f"{sys.executable} has no {name}: {install}")
    if not importlib.metadata.version("numpy").startswith("1."):
        die(f"{sys.executable} has NumPy 2, whose arrays this Triton garbles: {install}")


def find_repositories(given):
    """Return the paths under which Triton shall read the model repositories; refuse one that is not there or empty."""
    if not given:
        model = ROOT / "model_repository" / "mnist_model"
        if not any(model.glob("[1-9]*/model.savedmodel")):
            die(f"no trained model in {model}: run 'python train.py' first")
        given = [model.parent]
    repositories = []
    for repository in given:
        if "://" in str(repository):  # In a store such as s3://…
            repositories.append(repository)
        elif os.path.isdir(repository):
            repositories.append(plain(os.path.abspath(repository)))
        else:
            die(f"there is no model repository {repository}: give --model-repository a folder of models")
    return repositories


def check_addresses(addresses):
    """Refuse ports that are taken; warn where other machines will reach this release."""
    taken = []
    for address in addresses:
        try:
            with socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET) as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(address)
        except OSError as error:
            taken.append("{}:{} ({})".format(*address, error.strerror))
    if taken:
        ports = "--http-port, --grpc-port and --metrics-port"
        die(f"cannot listen on {' and '.join(taken)}: stop what does, or give other {ports}")
    if not all(re.match(r"127\.|::1$|localhost$", host) for host, _ in addresses):
        print(
            f"triton_local.sh: warning: Triton {RELEASE} has holes through which whoever reaches its ports may take it "
            "over; NVIDIA's security bulletins for Triton Inference Server (5687, 5828 and later) name them",
            file=sys.stderr,
        )


def check_shared_memory():
    """Refuse a machine without room for the shared memory through which Triton and the stubs exchange tensors."""
    free = 0
    with suppress(OSError):
        status = os.statvfs(SHARED_MEMORY)
        free = status.f_bavail * status.f_frsize
    if free < SHARED_MEMORY_BYTES or not os.access(SHARED_MEMORY, os.W_OK):
        die(
            f"{SHARED_MEMORY} has {free >> 20} MB of space that can be used, and Triton needs "
            f"{SHARED_MEMORY_BYTES >> 20} MB: make room there, or give the container more (--shm-size)"
        )


def install():
    """Download Triton and lay its backends out, where that is still to be done; returns the folders of both.

    Either is made under a temporary name and renamed: what stands in .triton is whole. Another run may have been
    faster; its result is as good.
    """
    version = sysconfig.get_python_version()
    triton = ROOT / ".triton" / WHEEL.replace("==", "-")
    backends = triton / f"backends-{version}"
    if backends.is_dir():
        return triton, backends
    try:
        triton.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="unfinished.", dir=triton.parent) as temporary:
            if not triton.is_dir():
                print(f"Downloading Triton (55 MB) to {triton} …", file=sys.stderr)
                pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-deps"]
                environment = os.environ | {"TMPDIR": temporary}
                target = Path(temporary, "wheel")
                if subprocess.run([*pip, "--target", target, WHEEL], stdout=sys.stderr, env=environment).returncode:
                    die(f"cannot download {WHEEL} from the package index: look at pip's message above, then try again")
                rename(target, triton)
            # Triton's Python backend with the stub for this Python, and the drop-in TensorFlow backend beside it.
            # Triton wants libtriton_python.so itself there and takes no link for it.
            made = Path(temporary, "backends")
            server = triton / "pytriton" / "tritonserver"
            shutil.copytree(server / "backends" / "python", made / "python")
            shutil.copy(server / "python_backend_stubs" / version / "triton_python_backend_stub", made / "python")
            (made / "tensorflow").mkdir()
            for name in ("scripts/triton/backends/tensorflow/model.py", "saved_model.py"):
                (made / "tensorflow" / Path(name).name).symlink_to(f"../../../../{name}")
            rename(made, backends)
    except OSError as error:
        die(f"cannot write into {triton.parent} ({error.strerror}): make room there, or make it writable")
    return triton, backends


def rename(made, name):
    """Give a folder its name, unless another run has put its own there meanwhile."""
    try:
        made.rename(name)
    except OSError:
        if not name.is_dir():
            raise


def plain(folder):
    """Return the folder's path, or where that has a space, an umlaut or the like, one through a file of this process.

    Triton starts its stubs by an unquoted `bash -c`, and their Python takes file names for ASCII.
    """
    if re.fullmatch(r"[\w@%+=,./-]+", str(folder), re.ASCII):
        return str(folder)
    return f"/proc/{os.getpid()}/fd/{os.open(folder, os.O_PATH | os.O_DIRECTORY)}"


@contextmanager
def python_folder():
    """Give the folder of a python3 from which the stub finds this Python's packages."""
    folder = Path(sys.executable).parent  # In the folder above it, Python looks for its environment.
    if sys.prefix == sys.base_prefix or sys.base_prefix.isascii():
        yield f"{plain(folder.parent)}/{folder.name}"
        return
    # The environment names the Python that it was made from, and the stub cannot read that name: make one like it.
    with tempfile.TemporaryDirectory(dir=SHARED_MEMORY) as environment:
        Path(environment, "pyvenv.cfg").write_text(f"home = {plain(sys.base_prefix)}/bin\n")
        Path(environment, "lib").symlink_to(Path(sys.prefix, "lib"))
        Path(environment, "bin").mkdir()
        Path(environment, "bin", "python3").symlink_to(Path(sys.base_prefix, "bin", "python3"))
        yield f"{environment}/bin"


def is_serving(addresses):
    """Return whether Triton listens; it begins when it has loaded the models."""
    for address in addresses:
        with suppress(OSError), socket.create_connection(address, timeout=1):
            return True
    return False


def dead_children(process):
    """Return the ids of the children of a process that have ended, and for which it has not waited."""
    dead = set()
    for children in Path("/proc", str(process), "task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):  # The thread or the child is gone meanwhile.
            for child in children.read_text().split():
                if Path("/proc", child, "stat").read_text().rpartition(") ")[2].startswith("Z"):
                    dead.add(child)
    return dead


def serve(command, environment, addresses):
    """Run tritonserver until it ends or shall end, and leave nothing of it; returns the exit status.

    It has a session of its own, so that Ctrl-C reaches this program alone; if this program is killed, the kernel tells
    tritonserver to stop.
    """
    region = f"triton_local_{os.getpid()}_"
    program, *options = command
    command = ["setpriv", "--pdeathsig=TERM", program, f"--backend-config=python,shm-region-prefix-name={region}"]
    stops = {number for number in STOPS if signal.getsignal(number) != signal.SIG_IGN}
    signal.pthread_sigmask(signal.SIG_BLOCK, {*stops, signal.SIGCHLD})
    server = os.posix_spawnp(command[0], [*command, *options], environment, setsid=True, setsigmask=())

    stop, dead, failed_at = None, set(), None
    while not (ended := os.waitpid(server, os.WNOHANG))[0]:
        received = signal.sigtimedwait({*stops, signal.SIGCHLD}, WATCH_SECONDS)
        if received and received.si_signo in stops:
            # While Triton loads it answers nobody, and would stop only afterwards. Asked twice, it shall not wait.
            gently = not stop and is_serving(addresses)
            stop = received.si_signo
            os.kill(server, signal.SIGTERM) if gently else os.killpg(server, signal.SIGKILL)
        elif not stop and not failed_at:
            before, dead = dead, dead_children(server)
            if dead & before:
                failed_at = time.monotonic()
                os.kill(server, signal.SIGTERM)
        elif failed_at and time.monotonic() > failed_at + LAST_SECONDS:
            os.killpg(server, signal.SIGKILL)

    with suppress(ProcessLookupError):
        os.killpg(server, signal.SIGKILL)
    for block in SHARED_MEMORY.glob(f"{region}*"):
        block.unlink(missing_ok=True)
    status = os.waitstatus_to_exitcode(ended[1])
    if failed_at:
        die("a process that ran a model has died (was memory short?), and Triton without it answers errors: start anew")
    if status < 0 and not stop:
        die(f"Triton was killed by {signal.Signals(-status).name}")
    return status if status >= 0 else 128 + stop


def read_arguments(arguments):
    """Return what this program reads of a command line, as a dictionary, and the options that it leaves to Triton."""
    parser = argparse.ArgumentParser(prog="triton_local.sh", usage="see --help", add_help=False, allow_abbrev=False)
    for option in ("--help", "--download", "--check-python"):
        parser.add_argument(option, action="store_true")
    parser.add_argument("--model-repository", "--model-store", action="append")
    for service, port in SERVICES.items():
        parser.add_argument(f"--{service}-port", type=int, default=port)
        parser.add_argument(f"--{service}-address", default="127.0.0.1")
    given, others = parser.parse_known_args(arguments)
    return vars(given), others


def main(arguments):
    """Do what the command line says; returns the exit status."""
    given, others = read_arguments(arguments)
    if given["help"]:
        print(__doc__.strip())
        return 0
    for number in STOPS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    if given["check_python"]:
        find_library()
        return 0
    check_machine()
    library = find_library()
    check_packages()
    if given["download"]:
        install()
        return 0
    addresses = {name: (given[f"{name}_address"], given[f"{name}_port"]) for name in SERVICES}
    check_addresses(addresses.values())
    check_shared_memory()
    repositories = find_repositories(given["model_repository"])
    triton, backends = install()

    command = [
        f"{plain(triton / 'pytriton' / 'tritonserver' / 'bin')}/tritonserver",
        f"--backend-directory={plain(backends)}",
        *(f"--model-repository={repository}" for repository in repositories),
        *(f"--{service}-address={address}" for service, (address, _) in addresses.items()),
        *(f"--{service}-port={port}" for service, (_, port) in addresses.items()),
        "--allow-gpu-metrics=false",
        # By default 30: as long it would wait for a client that merely keeps its connection open.
        f"--exit-timeout-secs={LAST_SECONDS}",
        *others,
    ]
    # The stub takes its packages from the python3 on PATH, and loads that Python's shared library.
    libraries = [plain(triton / "nvidia_pytriton.libs"), plain(library), os.environ.get("LD_LIBRARY_PATH")]
    environment = {"TF_CPP_MIN_LOG_LEVEL": "1"} | os.environ
    # A stub looks for modules in the current folder first, and would take a model.py there for the backend's.
    os.chdir(backends / "python")
    with python_folder() as programs:
        environment["PATH"] = f"{programs}:{os.environ['PATH']}"
        environment["LD_LIBRARY_PATH"] = ":".join(filter(None, libraries))
        return serve(command, environment, addresses.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
