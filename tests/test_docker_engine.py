"""The Docker scripts with a real Docker engine, on a stand-in for NVIDIA's image (stand_in_image.sh)."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest
from conftest import NEWEST, PATIENCE, copy_configuration, read_terminal, require, wait_for

from mnist_preprocess import HOST, MODEL_NAME, ROOT, TRITON_HTTP_PORT

SCRIPT = ROOT / "scripts" / "triton_cpu.sh"
NVIDIA_IMAGE = f"nvcr.io/nvidia/tritonserver:{NEWEST}-py3"
IMAGE = f"mnist-triton:{NEWEST}"
CONTAINER = "triton_mnist"
READY = rf"\| {MODEL_NAME} *\| 1 *\| READY *\|"


def docker(*arguments):
    return subprocess.run(["docker", *arguments], capture_output=True, text=True)


@pytest.fixture(scope="session")
def image(request):
    """The stand-in under the name that the script asks for; it and what is built on it are gone afterwards."""
    require(shutil.which("docker"), "there is no docker command")
    answer = docker("version")
    require(answer.returncode == 0, f"Docker does not answer: {answer.stderr.strip()}")
    require(shutil.which("mmdebstrap"), "the stand-in image needs mmdebstrap")
    for name in (NVIDIA_IMAGE, IMAGE):
        label = docker("image", "inspect", "--format", '{{index .Config.Labels "mnist.stand-in"}}', name)
        replaceable = label.returncode != 0 or label.stdout == "yes\n"
        require(replaceable, f"the image {name} is here already, and these tests would put a stand-in in its place")
    if docker("image", "inspect", NVIDIA_IMAGE).returncode != 0:
        request.getfixturevalue("triton")  # It has fetched the wheel.
        [wheel] = (ROOT / ".triton").glob("nvidia-pytriton-*")
        command = [ROOT / "tests" / "stand_in_image.sh", NVIDIA_IMAGE, wheel]
        stand_in = subprocess.run(command, capture_output=True, text=True)
        assert stand_in.returncode == 0, stand_in.stdout + stand_in.stderr
    yield IMAGE
    stop()
    docker("image", "rm", IMAGE, NVIDIA_IMAGE)


@pytest.fixture(scope="module")
def repository(trained_repository, tmp_path_factory):
    """A copy of the trained model that every user can read, in a folder whose name Docker has to take as it is."""
    folder = tmp_path_factory.mktemp("served") / "mein Modell [ü]"
    shutil.copytree(trained_repository, folder)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


def serve(*arguments, folder="/"):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_TAG"}
    return subprocess.run([SCRIPT, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def is_ready(host):
    try:
        return urllib.request.urlopen(f"http://{host}:{TRITON_HTTP_PORT}/v2/health/ready", timeout=60).status == 200
    except OSError:
        return False


def is_there():
    return bool(docker("container", "ls", "--all", "--quiet", "--filter", f"name=^{CONTAINER}$").stdout)


def stop():
    """Stop the container; Docker removes it a moment after that."""
    status = docker("stop", CONTAINER).returncode
    wait_for(lambda: not is_there())
    return status


def wait_until_ready(process):
    wait_for(lambda: process.poll() is not None or (is_there() and is_ready(HOST)))
    assert process.poll() is None


@pytest.fixture(scope="class")
def container(image, repository, tmp_path_factory):
    """What `triton_cpu.sh --detach` prints; the container runs until the tests of the class have ended."""
    result = serve("--detach", "--model-repository", repository, folder=tmp_path_factory.mktemp("elsewhere"))
    assert result.returncode == 0, result.stderr
    yield result.stdout
    assert stop() == 0


class TestDetached:
    def test_detach_prints_the_table(self, container):
        border, header, line, model, end = container.splitlines()
        assert border == line == end and re.fullmatch(r"\| Model *\| Version *\| Status *\|", header)
        assert re.fullmatch(READY, model)

    def test_client_asks_the_container(self, container):
        result = subprocess.run([sys.executable, ROOT / "triton-infer.py"], capture_output=True, text=True)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout == "HTTP Service | Prediction: 7\ngRPC Service | Prediction: 7\n"

    def test_only_this_machine_can_ask(self, container):
        assert is_ready(HOST)
        assert not is_ready("127.0.0.2")

    def test_triton_runs_without_privileges(self, container):
        status = docker("exec", CONTAINER, "cat", "/proc/1/status").stdout
        assert status.startswith("Name:\ttritonserver\n")
        assert re.search(r"^Uid:\t1000\t1000\t1000\t1000$", status, re.MULTILINE)
        assert re.search(r"^CapBnd:\t0+$", status, re.MULTILINE)
        assert re.search(r"^NoNewPrivs:\t1$", status, re.MULTILINE)

    def test_nothing_but_temporary_files_can_be_written(self, container):
        for place, writable in (("/opt/mnist", False), ("/home", False), ("/tmp", True), ("/dev/shm", True)):
            assert (docker("exec", "--user=root", CONTAINER, "touch", f"{place}/file").returncode == 0) == writable
        limits = docker("inspect", "--format", "{{.HostConfig.Memory}} {{.HostConfig.PidsLimit}}", CONTAINER).stdout
        assert limits == f"{8 << 30} 4096\n"

    def test_repository_is_read_only(self, container):
        owner = f"--user={os.getuid()}"  # Root has lost its privileges there.
        result = docker("exec", owner, CONTAINER, "touch", f"/models/{MODEL_NAME}/config.pbtxt")
        assert result.returncode != 0 and "Read-only file system" in result.stderr

    def test_second_start_is_refused(self, container, repository):
        result = serve("--model-repository", repository)
        assert (result.returncode, result.stdout) == (1, "")
        sentence = f"triton_cpu.sh: the container {CONTAINER} is already running: run 'docker stop {CONTAINER}' first\n"
        assert result.stderr == sentence
        assert is_ready(HOST)


def test_health_check_finds_a_dead_stub(image, repository):
    def check():
        """Run the image's own HEALTHCHECK now; returns its status and message."""
        command = docker("inspect", "--format", "{{json .Config.Healthcheck.Test}}", CONTAINER).stdout
        result = docker("exec", CONTAINER, *json.loads(command)[1:])
        return result.returncode, result.stderr

    serve("--detach", "--model-repository", repository)
    try:
        assert check() == (0, "")
        stubs = docker("top", CONTAINER, "-eo", "pid,args").stdout
        for pid in re.findall(r"^ *(\d+) .*triton_python_backend_stub ", stubs, re.MULTILINE):
            inside = re.search(r"^NSpid:.*\t(\d+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)[1]
            docker("exec", CONTAINER, "python3", "-c", f"import os; os.kill({inside}, 9)")
        status, message = check()
        assert status == 1
        assert "is not healthy" in message
        assert is_ready(HOST)
    finally:
        stop()


def test_model_that_tritons_user_cannot_read(image, repository, tmp_path):
    closed = tmp_path / "models"
    shutil.copytree(repository, closed)
    tmp_path.chmod(0o755)
    (closed / MODEL_NAME / "1").chmod(0)
    result = serve("--model-repository", closed)
    (closed / MODEL_NAME / "1").chmod(0o755)
    assert (result.returncode, result.stdout) == (1, "")
    sentence = f"Triton's user may not read {closed}/{MODEL_NAME}/1: run 'chmod -R a+rX {closed}'\n"
    assert result.stderr.endswith(sentence)


def test_listen_opens_the_ports(image, repository):
    result = serve("--detach", "--listen", "0.0.0.0", "--model-repository", repository)
    try:
        assert result.returncode == 0, result.stderr
        assert is_ready("127.0.0.2")
    finally:
        stop()


def test_model_that_does_not_load(image, tmp_path):
    model = copy_configuration(tmp_path)
    (model / "1" / "model.savedmodel").mkdir(parents=True)
    (model / "1" / "model.savedmodel" / "saved_model.pb").write_bytes(b"no model")
    tmp_path.chmod(0o755)
    result = serve("--detach", "--model-repository", tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert "UNAVAILABLE" in result.stderr
    assert result.stderr.endswith("triton_cpu.sh: Triton ended before the models were READY: its log stands above\n")
    wait_for(lambda: not is_there())


def test_interrupt_stops_it(image, repository, tmp_path):
    with (tmp_path / "log.txt").open("wb") as log:
        process = subprocess.Popen([SCRIPT, "--model-repository", repository], stdout=log, stderr=log)
    wait_until_ready(process)
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == 0
    assert re.search(READY, (tmp_path / "log.txt").read_text())
    wait_for(lambda: not is_there())


def test_ctrl_c_on_a_terminal_stops_it(image, repository):
    controller, terminal = pty.openpty()
    process = subprocess.Popen([SCRIPT, "--model-repository", repository], stdin=terminal, stdout=terminal)
    os.close(terminal)
    printed = []
    reader = threading.Thread(target=lambda: printed.append(read_terminal(controller)))
    reader.start()
    wait_until_ready(process)
    os.write(controller, b"\x03")
    assert process.wait(PATIENCE) == 0
    reader.join(PATIENCE)
    os.close(controller)
    assert re.search(READY, printed[0])
    wait_for(lambda: not is_there())
