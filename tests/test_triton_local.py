"""scripts/triton_local.sh: what it says when it cannot start, and that it starts, reloads and stops cleanly."""

import os
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
from conftest import (
    PATIENCE,
    PATIENT,
    await_nothing,
    children,
    copy_configuration,
    free_ports,
    require_ipv6,
    start_triton,
    stop_triton,
    wait_for,
    wait_until_caught,
)
from tritonclient import grpc, http
from tritonclient.utils import InferenceServerException

from mnist_preprocess import (
    HOST,
    INPUT_NAME,
    MODEL_NAME,
    OUTPUT_NAME,
    ROOT,
    TRITON_GRPC_PORT,
    TRITON_HTTP_PORT,
    TRITON_METRICS_PORT,
)

SCRIPT = ROOT / "scripts" / "triton_local.sh"
SHARED_MEMORY = Path("/dev/shm")
MOMENTS = int(os.environ.get("STOP_MOMENTS", "2"))  # At how many, within 5 s of the start, each signal comes.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run(*options, script=SCRIPT, disguise="", path=None, **environment):
    """Run the script with this Python, to which the code `disguise`, put in `path`, shows another machine."""
    environment = os.environ | {"VIRTUAL_ENV": sys.prefix} | environment
    if disguise:
        Path(path, "sitecustomize.py").write_text(disguise)
        environment["PYTHONPATH"] = str(path)
    return subprocess.run(
        [script, *options], capture_output=True, text=True, env=environment, timeout=PATIENCE, stdin=subprocess.DEVNULL
    )


def copy_project(folder):
    """Copy what triton_local.sh reads, without any trained model and without .triton; returns the copy's script."""
    for name in ("saved_model.py", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    copy_configuration(folder / "model_repository")
    return folder / "scripts" / "triton_local.sh"


def ports_options(ports):
    return [f"--{name}-port={port}" for name, port in zip(("http", "grpc", "metrics"), ports, strict=True)]


def test_ports_are_those_of_the_project():  # setup.sh runs local.py before there is a NumPy to import them with.
    services = runpy.run_path(str(ROOT / "scripts" / "triton" / "local.py"))["SERVICES"]
    assert services == {"http": TRITON_HTTP_PORT, "grpc": TRITON_GRPC_PORT, "metrics": TRITON_METRICS_PORT}


def test_help_is_the_header():
    result = run("--help")
    assert result.returncode == 0
    assert result.stdout.startswith("Serve model_repository with the real NVIDIA Triton server, without Docker")
    assert "set -e" not in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("disguise", "sentence"),
    [
        ("import platform; platform.system = lambda: 'Darwin'", "needs Linux on x86-64 or arm64, this is Darwin"),
        ("import platform; platform.machine = lambda: 'riscv64'", "this is Linux riscv64"),
        ("import platform; platform.libc_ver = lambda: ('glibc', '2.31')", "glibc 2.35 or newer"),
        ("import platform; platform.libc_ver = lambda: ('', '')", "glibc 2.35 or newer"),
        ("import sys; sys.version_info = (3, 13, 0, 'final', 0)", "is Python 3.13: use a virtual environment of"),
        (
            "import sys, sysconfig; sys.base_prefix = '/nowhere'; sysconfig.get_config_vars = lambda *_: [None, None]",
            f"libpython{sys.version_info[0]}.{sys.version_info[1]}.so.1.0: run 'sudo apt install libpython",
        ),
        (
            "import importlib.util as u; u.find_spec = lambda name: None if name == 'tensorflow' else name",
            f"has no tensorflow: run '{sys.prefix}/bin/python3 -m pip install -r {ROOT}/requirements.txt'",
        ),
        (
            "import os, types; os.statvfs = lambda path: types.SimpleNamespace(f_bavail=10, f_frsize=1 << 20)",
            "/dev/shm has 10 MB of space that can be used, and Triton needs 16 MB: make room there",
        ),
        (
            "import importlib.metadata as m; m.version = lambda name: '2.4.1'",
            "has NumPy 2, whose arrays this Triton garbles",
        ),
    ],
)
def test_machine_that_cannot_run_triton(tmp_path, disguise, sentence):
    result = run(*ports_options(free_ports(3)), disguise=disguise, path=tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("triton_local.sh: ")
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1


def test_ipv6_address_where_the_kernel_has_no_ipv6(tmp_path):
    disguise = """
import socket
class Socket(socket.socket):
    def __init__(self, family=-1, *others, **named):
        if family == socket.AF_INET6:
            raise OSError(97, "Address family not supported by protocol")
        super().__init__(family, *others, **named)
socket.socket = Socket
"""
    ports = free_ports(3)
    result = run("--http-address=::1", *ports_options(ports), disguise=disguise, path=tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    sentence = f"triton_local.sh: cannot listen on ::1:{ports[0]} (Address family not supported by protocol): "
    assert result.stderr.startswith(sentence) and result.stderr.count("\n") == 1


@pytest.mark.parametrize("service", ["http", "grpc", "metrics"])
@pytest.mark.parametrize("form", ["--{}-port={}", "--{}-port {}"])
def test_busy_port(service, form):
    with socket.create_server((HOST, 0)) as listener:
        port = listener.getsockname()[1]
        options = dict(zip(("http", "grpc", "metrics"), ports_options(free_ports(3)), strict=True))
        result = run(*(options | {service: ""}).values(), *form.format(service, port).split())
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        f"triton_local.sh: cannot listen on {HOST}:{port} (Address already in use): "
        "stop what does, or give other --http-port, --grpc-port and --metrics-port\n"
    )


def test_all_busy_ports_are_named_at_once():
    require_ipv6()
    with (
        socket.create_server((HOST, 0)) as grpc_listener,
        socket.create_server(("::1", 0), family=socket.AF_INET6) as http_listener,
    ):
        grpc_port, http_port = (listener.getsockname()[1] for listener in (grpc_listener, http_listener))
        options = ports_options([http_port, grpc_port, *free_ports(1)])
        result = run("--http-address=::1", *options)
    assert result.returncode == 1
    assert (
        f"on ::1:{http_port} (Address already in use) and {HOST}:{grpc_port} (Address already in use):" in result.stderr
    )


def test_warns_where_other_machines_reach_it(tmp_path):
    for options, warns in ((("--http-address=0.0.0.0",), True), (("--grpc-address", "::"), True), ((), False)):
        result = run(*ports_options(free_ports(3)), *options, f"--model-repository={tmp_path}/none")
        warning = r"warning: Triton \d\d\.\d\d has holes through which whoever reaches its ports may take it over"
        assert bool(re.search(warning, result.stderr)) == warns
        assert f"there is no model repository {tmp_path}/none: give --model-repository a folder" in result.stderr


def test_port_that_is_no_number_is_wrong_usage():
    result = run("--http-port=http")
    assert (result.returncode, result.stdout) == (2, "")
    assert "argument --http-port: invalid int value: 'http'" in result.stderr


def test_missing_model(tmp_path):
    result = run(*ports_options(free_ports(3)), script=copy_project(tmp_path))
    assert (result.returncode, result.stdout) == (1, "")
    model = tmp_path / "model_repository" / MODEL_NAME
    assert result.stderr == f"triton_local.sh: no trained model in {model}: run 'python train.py' first\n"


def test_download_that_fails_leaves_nothing(tmp_path):
    script = copy_project(tmp_path)
    result = run("--download", script=script, PIP_NO_INDEX="1", PIP_FIND_LINKS="", PIP_CONFIG_FILE=os.devnull)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1].startswith("triton_local.sh: cannot download nvidia-pytriton==")
    assert list((tmp_path / ".triton").iterdir()) == []


def keep_asking(server, enough, answers):
    """Ask for one blank picture after the other; append the version that answered, or the error."""
    picture = grpc.InferInput(INPUT_NAME, [1, 28, 28, 1], "FP32")
    picture.set_data_from_numpy(np.zeros((1, 28, 28, 1), np.float32))
    with server.grpc as client:
        while not enough.is_set():
            try:
                answers.append(client.infer(MODEL_NAME, [picture]).get_response().model_version)
            except InferenceServerException as error:
                answers.append(error)


def test_new_version_takes_over_under_load_and_ctrl_c_leaves_nothing(trained_repository, tmp_path, monkeypatch):
    mark = f"mark={uuid.uuid4()}"
    monkeypatch.setenv("TRITON_TEST", mark)
    model = tmp_path / "models" / MODEL_NAME
    shutil.copytree(trained_repository / MODEL_NAME, model)
    polling = ("--model-control-mode=poll", "--repository-poll-secs=1", "--disable-auto-complete-config", PATIENT)
    server = start_triton(tmp_path / "triton.log", f"--model-repository={model.parent}", *polling)
    enough, answers = threading.Event(), []
    asking = threading.Thread(target=keep_asking, args=(server, enough, answers))
    asking.start()
    try:
        # As train.py publishes: complete under a temporary name, then renamed.
        shutil.copytree(model / "1", model / ".unfinished")
        (model / ".unfinished").rename(model / "2")
        wait_for(lambda: answers[-1:] == ["2"])
    finally:
        enough.set()
        asking.join()
        stubs = children(server.pid)
        os.killpg(server.process.pid, signal.SIGINT)
        status = server.process.wait(PATIENCE)
    assert set(answers) == {"1", "2"}
    assert answers == sorted(answers)
    assert status == 0, server.log.read_text()
    regions = [argument for command in stubs.values() for argument in command if argument.startswith("triton_local_")]
    assert regions
    assert not [region for region in regions if (SHARED_MEMORY / region).exists()]
    assert await_nothing(mark) == {}


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_stopped_at_any_moment_it_leaves_nothing(number, trained_repository, tmp_path):
    for moment in range(MOMENTS):
        mark = f"mark={uuid.uuid4()}"
        ports = free_ports(3)
        command = [SCRIPT, *ports_options(ports), f"--model-repository={trained_repository}"]
        environment = os.environ | {"VIRTUAL_ENV": sys.prefix, "TRITON_TEST": mark}
        log = tmp_path / f"{moment}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(command, env=environment, start_new_session=True, stdout=output, stderr=output)
        wait_until_caught(signal.SIGTERM, process.pid)
        time.sleep(5 * (moment + SIGNALS.index(number) / len(SIGNALS)) / MOMENTS)  # Between those of the others.
        os.killpg(process.pid, number)
        status = process.wait(30)
        assert status in (0, 128 + number), log.read_text()
        assert await_nothing(mark) == {}
        assert list(SHARED_MEMORY.glob(f"triton_local_{process.pid}_*")) == []
        for port in ports:
            socket.create_server((HOST, port)).close()


SLOW_MODEL = """
import time
from pathlib import Path
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        Path(pb_utils.get_model_dir(), "asked").touch()
        time.sleep(4)
        return [pb_utils.InferenceResponse([pb_utils.get_input_tensor_by_name(r, "x")]) for r in requests]
"""
SLOW_CONFIG = """
backend: "python"
input { name: "x" data_type: TYPE_FP32 dims: [1] }
output { name: "x" data_type: TYPE_FP32 dims: [1] }
"""


def test_stop_waits_for_requests_and_not_long_for_idle_connections(tmp_path):
    version = tmp_path / "models" / "slow" / "1"
    version.mkdir(parents=True)
    (version / "model.py").write_text(SLOW_MODEL)
    (version.parent / "config.pbtxt").write_text(SLOW_CONFIG)
    server = start_triton(tmp_path / "triton.log", f"--model-repository={version.parents[1]}")
    answers = []
    with server.http as idle, server.grpc as client:
        assert idle.is_server_ready()
        number = np.float32([7])
        tensor = grpc.InferInput("x", [1], "FP32").set_data_from_numpy(number)
        client.async_infer("slow", [tensor], lambda result, error: answers.append(error or result.as_numpy("x")))
        wait_for((version / "asked").exists)
        began = time.monotonic()
        stop_triton(server)  # With status 1, since a client was left.
        assert time.monotonic() - began < 20  # Triton itself gives an idle connection 30 s.
    assert answers == [number]


def test_current_folder_does_not_matter(trained_repository, tmp_path, monkeypatch):
    for name in ("model.py", "saved_model.py", "triton_python_backend_utils.py"):
        (tmp_path / name).write_text("raise RuntimeError('the wrong file')")
    (tmp_path / "models").symlink_to(trained_repository)
    monkeypatch.chdir(tmp_path)
    server = start_triton(tmp_path / "triton.log", "--model-repository=models", PATIENT)
    try:
        with server.http as client:
            assert client.is_model_ready(MODEL_NAME)
    finally:
        assert stop_triton(server) == 0


@pytest.mark.parametrize("victim", ["stub", "tritonserver", "triton_local.sh"])
def test_killed_part_takes_all_with_it(victim, trained_repository, tmp_path, monkeypatch):
    mark = f"mark={uuid.uuid4()}"
    monkeypatch.setenv("TRITON_TEST", mark)
    server = start_triton(tmp_path / "triton.log", f"--model-repository={trained_repository}")
    stub = min(children(server.pid))
    os.kill({"stub": stub, "tritonserver": server.pid, "triton_local.sh": server.process.pid}[victim], signal.SIGKILL)
    status = server.process.wait(30)
    assert await_nothing(mark, 10) == {}
    assert list(SHARED_MEMORY.glob(f"triton_local_{server.process.pid}_*")) == []
    last = server.log.read_text().splitlines()[-1]
    if victim == "stub":
        assert (status, last) == (
            1,
            "triton_local.sh: a process that ran a model has died (was memory short?), and Triton without it answers "
            "errors: start anew",
        )
    elif victim == "tritonserver":
        assert (status, last) == (1, "triton_local.sh: Triton was killed by SIGKILL")


def test_project_and_models_in_folders_of_any_name(trained_repository, tmp_path, monkeypatch):
    folder = tmp_path / "Übung 1 [x] $y 'z' \"q\""
    folder.mkdir()
    script = copy_project(folder)
    shutil.copytree(trained_repository / MODEL_NAME, folder / "model_repository" / MODEL_NAME, dirs_exist_ok=True)
    wheel = next((ROOT / ".triton").glob("nvidia-pytriton-*"))
    shutil.copytree(wheel, folder / ".triton" / wheel.name, ignore=shutil.ignore_patterns("backends-*"))
    (folder / "other: models ü").symlink_to(trained_repository)
    # An environment of a Python in such a folder, as setup.sh makes it where uv has fetched one, with our packages.
    (folder / "ü").symlink_to(sys.base_prefix)
    environment = folder / ".venv"
    subprocess.run([folder / "ü" / "bin" / "python3", "-m", "venv", "--without-pip", environment], check=True)
    [packages] = environment.glob("lib/python3*/site-packages")
    (tmp_path / "packages").symlink_to(sysconfig.get_path("purelib"))  # In the C locale, Python reads a .pth as ASCII.
    (packages / "ours.pth").write_text(str(tmp_path / "packages"))
    start = folder / "start.sh"
    start.write_text(f'#!/bin/sh\nVIRTUAL_ENV="$(dirname "$0")/.venv" exec {shlex.quote(str(script))} "$@"\n')
    start.chmod(0o755)
    monkeypatch.setenv("LC_ALL", "C")
    for options in ((), ("--model-repository", folder / "other: models ü")):
        server = start_triton(tmp_path / "triton.log", PATIENT, *options, script=start)
        try:
            with server.http as client:
                assert client.is_model_ready(MODEL_NAME)
                picture = http.InferInput(INPUT_NAME, [1, 28, 28, 1], "FP32")
                picture.set_data_from_numpy(np.zeros((1, 28, 28, 1), np.float32))
                assert client.infer(MODEL_NAME, [picture]).as_numpy(OUTPUT_NAME).shape == (1, 10)
        finally:
            assert stop_triton(server) == 0
