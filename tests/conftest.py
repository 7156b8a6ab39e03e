"""What the tests share: a trained model, the real servers, and the rule for what is missing."""

import itertools
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path

import pytest
from tritonclient import grpc, http
from tritonclient.utils import InferenceServerException, np_to_triton_dtype
from xdist.scheduler import LoadFileScheduling

from mnist_preprocess import HOST, MODEL_NAME, MODEL_REPOSITORY, ROOT

# Far more than anything takes on a busy machine: what exceeds it never happens.
PATIENCE = 300
# Triton may take as long to end its processes. triton_local.sh leaves it 10 s, of which no test depends but its own.
PATIENT = f"--exit-timeout-secs={PATIENCE}"
SERVER = ROOT / "flask" / "server.py"
# The sentences of triton_local.sh that are about the machine and not about this project.
MACHINE_LACKS = r"needs Linux|needs glibc|lacks its shared library|cannot download"
# The newest Triton release that the Docker scripts know.
[NEWEST] = re.findall(r"^newest=(\S+)", (ROOT / "scripts" / "triton" / "docker.sh").read_text(), re.MULTILINE)
# Files that run one after the other where the files run two at a time: they use the project's own ports and the same
# images, or a server that has many models to load. In CI test_wild.py trains for two minutes: it is not to come last.
GROUPS = {
    "test_docker_engine.py": "ports",
    "test_kubernetes_images.py": "ports",
    "test_readme.py": "ports",
    "test_quickstart.py": "ports",
    "test_triton_docker.py": "ports",
    "test_triton_acceptance.py": "models",
    "test_triton_configuration.py": "models",
    "test_triton_backend.py": "models",
    "test_triton_sequences.py": "models",
    "test_wild.py": "training",
}
# Below the ports that the kernel gives to clients, so that none takes one before its server does; each of the processes
# that run tests at the same time has its own, and begins anywhere among them.
FIRST_PORT = 10_000 + 2_000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
PORTS = itertools.cycle(range(FIRST_PORT, FIRST_PORT + 2_000))
next(itertools.islice(PORTS, random.randrange(2_000), None))
# A shell has what it starts in the background ignore Ctrl-C, and so would the programs to which tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Begin with the files of GROUPS, which take long."""
    items.sort(key=lambda item: [*GROUPS, item.path.name].index(item.path.name))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Have one of xdist's processes run all tests of a file, or of the files that GROUPS puts together."""

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = Path(super()._split_scope(nodeid)).name
            return GROUPS.get(file, file)

    return Scheduling(config, log)


def pytest_terminal_summary(terminalreporter):
    """Print the tables that tests have recorded: a process of xdist's has no terminal to print them to."""
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for _, table in report.user_properties:
            terminalreporter.write_line(f"\n{table}")


def require(present, reason):
    """Skip the test when something of the machine's is not there; in CI, where all of it must be, fail."""
    if not present:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)


def require_ipv6():
    """Skip the test, or fail in CI, where no program can listen on ::1: in most containers."""
    with suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return
    require(False, "this machine has no IPv6")


@pytest.fixture(scope="session")
def git(tmp_path_factory):
    """Run a git command on the project's files, none of them committed, be this a clone or not; returns its lines."""
    require(shutil.which("git"), "there is no git command")
    folder = tmp_path_factory.mktemp("git")
    subprocess.run(["git", "init", "--quiet", folder], check=True)

    def run(*arguments):
        options = ["-c", "core.quotePath=false", f"--git-dir={folder}/.git", f"--work-tree={ROOT}"]
        command = ["git", *options, *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()

    return run


def free_ports(count):
    """Return port numbers on which nothing listens now."""
    free = []
    for port in PORTS:
        with suppress(OSError), socket.create_server((HOST, port)):
            free.append(port)
        if len(free) == count:
            return free


@dataclass
class Triton:
    """A tritonserver that triton_local.sh started: its addresses (host:port), its process and its log."""

    http_url: str
    grpc_url: str
    process: subprocess.Popen
    log: Path

    @property
    def pid(self):
        """The id of tritonserver itself, which triton_local.sh starts and watches."""
        [pid] = children(self.process.pid)
        return pid

    @property
    def http(self):
        return http.InferenceServerClient(self.http_url, connection_timeout=PATIENCE, network_timeout=PATIENCE)

    @property
    def grpc(self):
        return grpc.InferenceServerClient(self.grpc_url)


def children(pid):
    """Return the command lines of the processes that `pid` started, by their own pid."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):  # It ended meanwhile.
            if int(status.read_text(errors="replace").rpartition(")")[2].split()[1]) == pid:
                found[int(status.parent.name)] = (status.parent / "cmdline").read_text().split("\0")
    return found


def marked(mark):
    """Return the command lines, by id, of the processes that have `mark` in their environment."""
    found = {}
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            if mark.encode() in environment.read_bytes():
                found[int(environment.parent.name)] = environment.with_name("cmdline").read_text().split("\0")
    return found


def await_nothing(mark, seconds=5):
    """Return the processes marked `mark` that are there after so many seconds, or none as soon as all have ended."""
    deadline = time.monotonic() + seconds
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def wait_for(condition, seconds=PATIENCE):
    """Wait until condition() is true, for so many seconds at most."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"it did not happen within {seconds} s"
        time.sleep(0.05)


def wait_until_caught(number, pid):
    """Wait until a process has a handler for the signal: before, as while Python starts, it ends in other ways."""
    status = Path(f"/proc/{pid}/status")
    wait_for(lambda: int(re.search(r"^SigCgt:\s+(\w+)", status.read_text(), re.MULTILINE)[1], 16) >> number - 1 & 1)


def read_terminal(controller):
    """Return all that a terminal shows until the last program on it ends, which Linux reports as an OSError."""
    shown = b""
    with suppress(OSError):
        while True:
            shown += os.read(controller, 4096)
    return shown.decode().replace("\r\n", "\n")


def wait_until_ok(url, log, lives=lambda: True):
    """Wait until a URL answers 200; fail with what log() returns when that takes too long, or lives() is not true."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            if urllib.request.urlopen(url, timeout=10).status == 200:
                return
        except OSError:
            assert lives() and time.monotonic() < deadline, log()
        time.sleep(0.1)


def start_triton(log, *options, script=ROOT / "scripts" / "triton_local.sh", ports=None):
    """Start triton_local.sh on three ports, wait until the server is ready and return it as Triton."""
    ports = dict(zip(("http", "grpc", "metrics"), ports or free_ports(3), strict=True))
    command = [script, *(f"--{name}-port={port}" for name, port in ports.items())]
    # This Python's environment, whether it was activated or not, and a process group, so that a test can press Ctrl-C.
    environment = os.environ | {"VIRTUAL_ENV": sys.prefix}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, *options], stdout=output, stderr=output, env=environment, start_new_session=True
        )
    server = Triton(f"{HOST}:{ports['http']}", f"{HOST}:{ports['grpc']}", process, log)
    deadline = time.monotonic() + PATIENCE
    while not is_ready(server):
        if process.poll() is not None or time.monotonic() > deadline:
            stop_triton(server)
            text = log.read_text()
            require(not re.search(MACHINE_LACKS, text), text.strip())
            pytest.fail(f"Triton did not become ready:\n{text}")
        time.sleep(0.1)
    return server


def is_ready(server):
    try:
        with server.http as client:
            return client.is_server_ready()
    except OSError:
        return False


def ask(server, model, inputs, protocol="grpc", outputs=(), **options):
    """Run the model on {name: array} and return its outputs by name, of which `outputs` may be a selection.

    protocol: "grpc", "http", or "json", which is HTTP with the numbers in JSON. The client takes the options.
    """
    module, binary = (grpc, {}) if protocol == "grpc" else (http, {"binary_data": protocol == "http"})
    tensors = [
        module.InferInput(name, array.shape, np_to_triton_dtype(array.dtype)).set_data_from_numpy(array, **binary)
        for name, array in inputs.items()
    ]
    requested = [module.InferRequestedOutput(name, **binary) for name in outputs]
    with server.grpc if module is grpc else server.http as client:
        result = client.infer(model, tensors, outputs=requested or None, **options)
    response = result.get_response()
    names = [tensor.name for tensor in response.outputs] if module is grpc else [t["name"] for t in response["outputs"]]
    return {name: result.as_numpy(name) for name in names}


def stub(server, name):
    """Return the directory in /proc of the process that runs instance 0 of the model."""
    [pid] = [pid for pid, command in children(server.pid).items() if f"{name}_0_0" in command]
    return Path("/proc", str(pid))


def stop_triton(server):
    """Stop the server as `kill` does and return its exit status; what outlives PATIENCE is killed."""
    server.process.send_signal(signal.SIGTERM)
    try:
        return server.process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(server.process.pid, signal.SIGKILL)
        return server.process.wait()


def copy_configuration(repository):
    """Copy the project's model directory without its versions, and return the copy."""
    model = Path(repository, MODEL_NAME)
    shutil.copytree(MODEL_REPOSITORY / MODEL_NAME, model, ignore=shutil.ignore_patterns("[0-9]*", ".*"))
    return model


@dataclass
class FlaskServer:
    """A `python flask/server.py` of the tests': where to ask it, its process and its log."""

    host: str
    port: int
    process: subprocess.Popen
    log: Path

    def connect(self):
        return HTTPConnection(self.host, self.port, timeout=PATIENCE)


@contextmanager
def flask_server(log, repository, *options, host=HOST, port=None, program=(SERVER,)):
    """Start flask/server.py, wait until it answers, and stop it at the end if the test did not; any port by default."""
    port = port or free_ports(1)[0]
    command = [sys.executable, *program, f"--port={port}", "--model-repository", repository]
    # A process group of its own, so that a test can press Ctrl-C.
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, *options], stdout=output, stderr=output, start_new_session=True, cwd=ROOT / "flask"
        )
    server = FlaskServer(host, port, process, log)
    try:
        deadline = time.monotonic() + PATIENCE
        while not answers(server):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the Flask server did not become ready:\n{log.read_text()}")
            time.sleep(0.05)
        # One worker answers. A test may kill that one, or take away what others have still to load: all shall listen.
        given = re.search(r"--workers=(\d+)", " ".join(map(str, options)))
        workers = int(given[1]) if given else len(os.sched_getaffinity(0))
        wait_for(lambda: listeners(server.port) == workers)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise


def listeners(port):
    """Return how many sockets listen on a port: one in each worker of the Flask server."""
    state = re.compile(rf":{port:04X} 0+:0000 0A ")  # After the local address that of the client, none, and the state.
    return sum(len(state.findall(table.read_text())) for table in Path("/proc/net").glob("tcp*"))


def answers(server):
    connection = server.connect()
    try:
        connection.request("GET", "/")
        connection.getresponse()
        return True
    except OSError:
        return False
    finally:
        connection.close()


@pytest.fixture(scope="session")
def mnist_test():
    """MNIST's test pictures (10000, 28, 28, 1) uint8 and their digits (10000,) uint8."""
    import train

    return train.prepare(train.DATA)[1]


@pytest.fixture(scope="session")
def keras_model():
    """The model of train.py, trained for one short epoch."""
    import keras

    import train

    pictures, digits = train.prepare(train.DATA, 10_000)[0]
    keras.utils.set_random_seed(0)
    model = train.build()
    train.train(model, pictures, digits, epochs=1)
    return model


@pytest.fixture(scope="session")
def trained_repository(keras_model, mnist_test, tmp_path_factory):
    """A model repository of the tests' own, with the project's configuration and keras_model as version 1."""
    import train

    repository = tmp_path_factory.mktemp("trained")
    train.publish(keras_model, copy_configuration(repository), mnist_test[0][:100])
    return repository


@pytest.fixture(scope="session")
def saved_models(tmp_path_factory):
    """A model repository with the small SavedModels of saved_models.py, none of which has a configuration."""
    repository = tmp_path_factory.mktemp("saved_models")
    command = [sys.executable, "-m", "tests.saved_models", repository]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return repository


@pytest.fixture(scope="session")
def triton(trained_repository, tmp_path_factory):
    """The real Triton server with the trained model, started once."""
    log = tmp_path_factory.mktemp("triton") / "triton.log"
    server = start_triton(log, f"--model-repository={trained_repository}", PATIENT)
    yield server
    status = stop_triton(server)
    assert status == 0, log.read_text()


class ModelServer(Triton):
    """A Triton that has nothing to serve until a test gives it something, under a name of the test's own."""

    def add(self, name, saved_model, config=None):
        """Put this one of `saved_models` into the repository, with this config.pbtxt or none; return its directory."""
        model = self.repository / name
        shutil.copytree(self.saved_models / saved_model, model, copy_function=os.link)
        if config is not None:
            (model / "config.pbtxt").write_text(config)
        return model

    def load(self, name, saved_model=None, config=None):
        """Load the model, added first where a SavedModel is given; return its completed configuration.

        Where a stub gets no CPU for a second while it loads, Triton 24.10 takes it for dead, and may then wait for ever
        until it is: what fails so is done once more.
        """
        if saved_model:
            self.add(name, saved_model, config)
        with self.grpc as client:
            try:
                client.load_model(name, client_timeout=PATIENCE / 3)
            except InferenceServerException as error:
                if error.status() != "StatusCode.DEADLINE_EXCEEDED" and "is not healthy" not in error.message():
                    raise
                for pid, command in children(self.pid).items():
                    if f"/{name}/" in " ".join(command):
                        with suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
                client.load_model(name)
        with self.http as client:
            return client.get_model_config(name)


@contextmanager
def model_server(saved_models, folder, *options):
    """Start a ModelServer with these options of tritonserver; it stops at the end, which must go well."""
    repository = folder / "models"
    repository.mkdir()
    options = (f"--model-repository={repository}", "--model-control-mode=explicit", PATIENT, *options)
    server = ModelServer(**vars(start_triton(folder / "triton.log", *options)))
    server.saved_models, server.repository = saved_models, repository
    try:
        yield server
    finally:
        status = stop_triton(server)
    assert status == 0, server.log.read_text()


@pytest.fixture(scope="session")
def models(saved_models, tmp_path_factory):
    """The ModelServer that the tests share."""
    with model_server(saved_models, tmp_path_factory.mktemp("models")) as server:
        yield server


@pytest.fixture(scope="module")
def served(request, models):
    """Load what the module lists in SERVED, {name: (SavedModel, config.pbtxt)}, several at a time, until it ends.

    A model's entry is the Future of its completed configuration.
    """
    with ThreadPoolExecutor(3) as pool:
        loading = {name: pool.submit(models.load, name, *model) for name, model in request.module.SERVED.items()}
    yield loading
    with models.http as client:
        for name in loading:
            client.unload_model(name)
