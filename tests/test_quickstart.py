"""scripts/quickstart.sh: both servers asked and stopped, behind dead proxies, and whenever it is stopped."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid

import pytest
from conftest import PATIENCE, await_nothing, children, require, wait_until_caught

from mnist_preprocess import FLASK_PORT, HOST, MODEL_NAME, ROOT, TRITON_GRPC_PORT, TRITON_HTTP_PORT, TRITON_METRICS_PORT

PORTS = (FLASK_PORT, TRITON_HTTP_PORT, TRITON_GRPC_PORT, TRITON_METRICS_PORT)
MOMENTS = int(os.environ.get("STOP_MOMENTS", "2"))  # At how many, within 5 s of the start, each signal comes.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL)


@pytest.fixture(scope="module")
def project(trained_repository, triton, tmp_path_factory):  # `triton` has fetched the server into .triton.
    """A clone that is set up and has a trained model, in a folder whose name is not a plain one."""
    folder = tmp_path_factory.mktemp("quickstart") / "Übung 1 [x]"
    made = shutil.ignore_patterns(".git", ".venv", ".uv", ".triton", ".*_cache", "__pycache__", "[0-9]*")
    shutil.copytree(ROOT, folder, ignore=made)
    shutil.copytree(trained_repository / MODEL_NAME / "1", folder / "model_repository" / MODEL_NAME / "1")
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / ".triton").symlink_to(ROOT / ".triton")
    (folder / "scripts" / "setup.sh").write_text("#!/bin/sh\n")
    return folder


@pytest.fixture(autouse=True)
def free_ports():
    for port in PORTS:
        with socket.socket() as client:
            require(client.connect_ex((HOST, port)) != 0, f"port {port} is taken, and quickstart.sh uses it")


def start(project, *options, **variables):
    """Start the script; returns (process, the mark of all that it starts)."""
    mark = f"mark={uuid.uuid4()}"
    command = [project / "scripts" / "quickstart.sh", *options]
    environment = os.environ | {"TRITON_TEST": mark} | variables
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True), mark


@pytest.mark.parametrize("curl", [True, False], ids=["curl", "no curl"])
def test_asks_both_servers_behind_dead_proxies(curl, project, tmp_path):
    dead = f"http://{HOST}:9"
    variables = {f"{scheme}_proxy": dead for scheme in ("http", "https", "all", "grpc")}
    variables |= {name.upper(): value for name, value in variables.items()}
    if curl:
        require(shutil.which("curl"), "there is no curl command")
    else:
        for program in ("bash", "dirname", "env", "mkdir", "sed", "setpriv", "setsid", "sleep", "tail"):
            (tmp_path / program).symlink_to(shutil.which(program))
        variables["PATH"] = str(tmp_path)
    process, mark = start(project, **variables)
    stdout, stderr = process.communicate(timeout=PATIENCE)
    assert (process.returncode, stderr) == (0, "Starting Triton and Flask …\n"), stderr
    assert ("$ curl" in stdout, "$ # Without curl" in stdout) == (curl, not curl)
    answers = [line for line in stdout.splitlines() if not line.startswith("$ ")]
    assert answers == ["", '{"Prediction":"7"}', "HTTP Service | Prediction: 7", "gRPC Service | Prediction: 7"]
    assert await_nothing(mark) == {}


def test_serve_says_what_to_open_and_ends_with_a_server(project):
    process, mark = start(project, "--serve")
    for line in process.stdout:
        if line.startswith("Open http://127.0.0.1:5000 in a browser"):
            break
    assert [child for child, command in children(process.pid).items() if "flask/server.py" in command]
    for child, command in children(process.pid).items():
        if "flask/server.py" in command:
            os.kill(child, signal.SIGTERM)
    stderr = process.communicate(timeout=PATIENCE)[1]
    assert (process.returncode, stderr) == (1, "Starting Triton and Flask …\nquickstart.sh: a server stopped\n")
    assert await_nothing(mark) == {}


def test_taken_port(project):
    with socket.create_server((HOST, TRITON_GRPC_PORT)):
        process, _ = start(project)
        stdout, stderr = process.communicate(timeout=PATIENCE)
    assert (process.returncode, stdout) == (1, "")
    assert stderr == "quickstart.sh: port 8001 is taken: stop what listens on it, then try again\n"


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_stopped_at_any_moment_it_leaves_nothing(number, project):
    for moment in range(MOMENTS):
        process, mark = start(project, "--serve")
        wait_until_caught(signal.SIGTERM, process.pid)
        time.sleep(5 * (moment + SIGNALS.index(number) / len(SIGNALS)) / MOMENTS)  # Between those of the others.
        os.killpg(process.pid, number)
        process.communicate(timeout=60)
        assert process.returncode in (128 + number, -number)
        assert await_nothing(mark, 15 if number == signal.SIGKILL else 5) == {}
