"""scripts/triton_local.sh: what it says when it cannot start, and that it starts, reloads and stops cleanly."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import copy_configuration, free_ports, start_triton
from tritonclient import grpc
from tritonclient.utils import InferenceServerException

from mnist_preprocess import HOST, INPUT_NAME, MODEL_NAME, ROOT

SCRIPT = ROOT / "scripts" / "triton_local.sh"
SHARED_MEMORY = Path("/dev/shm")


def run(*options, script=SCRIPT, disguise="", path=None, **environment):
    """Run the script with this Python, to which the code `disguise`, put in `path`, shows another machine."""
    environment = os.environ | {"VIRTUAL_ENV": sys.prefix} | environment
    if disguise:
        Path(path, "sitecustomize.py").write_text(disguise)
        environment["PYTHONPATH"] = str(path)
    return subprocess.run(
        [script, *options], capture_output=True, text=True, env=environment, timeout=60, stdin=subprocess.DEVNULL
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
            f"has no tensorflow: run '{sys.executable} -m pip install -r {ROOT}/requirements.txt'",
        ),
        (
            "import importlib.metadata as m; m.version = lambda name: '2.4.1'",
            "has NumPy 2, whose arrays this Triton garbles",
        ),
    ],
)
def test_machine_that_cannot_run_triton(tmp_path, disguise, sentence):
    result = run(disguise=disguise, path=tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("triton_local.sh: ")
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1


def test_no_python_at_all():
    result = run(VIRTUAL_ENV="/nowhere")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "triton_local.sh: no Python at /nowhere/bin/python: install Python 3.10 to 3.12\n"


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
        f"stop what does, or give --{service}-port\n"
    )


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
    (tmp_path / "model_repository" / MODEL_NAME / "1").mkdir()
    result = run(
        *ports_options(free_ports(3)), script=script, PIP_NO_INDEX="1", PIP_FIND_LINKS="", PIP_CONFIG_FILE=os.devnull
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1].startswith("triton_local.sh: cannot download nvidia-pytriton 0.7.0 from")
    assert list((tmp_path / ".triton").iterdir()) == []


def children(pid):
    """Return the command lines of the processes that `pid` started, by their own pid."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(status.read_text().rpartition(")")[2].split()[1]) == pid:
                found[int(status.parent.name)] = (status.parent / "cmdline").read_text().split("\0")
        except (FileNotFoundError, ProcessLookupError):  # It ended meanwhile.
            continue
    return found


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


def test_new_version_takes_over_under_load_and_ctrl_c_leaves_nothing(trained_repository, tmp_path):
    model = tmp_path / "models" / MODEL_NAME
    shutil.copytree(trained_repository / MODEL_NAME, model)
    polling = ("--model-control-mode=poll", "--repository-poll-secs=1", "--disable-auto-complete-config")
    server = start_triton(tmp_path / "triton.log", f"--model-repository={model.parent}", *polling)
    enough, answers = threading.Event(), []
    asking = threading.Thread(target=keep_asking, args=(server, enough, answers))
    asking.start()
    try:
        # As train.py publishes: complete under a temporary name, then renamed.
        shutil.copytree(model / "1", model / ".unfinished")
        (model / ".unfinished").rename(model / "2")
        deadline = time.monotonic() + 120
        while answers[-1:] != ["2"] and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        enough.set()
        asking.join()
        stubs = children(server.process.pid)
        os.killpg(server.process.pid, signal.SIGINT)
        status = server.process.wait(60)
    assert set(answers) == {"1", "2"}
    assert answers == sorted(answers)
    assert status == 0, server.log.read_text()
    regions = [argument for command in stubs.values() for argument in command if "shm_region" in argument]
    assert regions
    assert not [region for region in regions if (SHARED_MEMORY / region).exists()]
    assert not [pid for pid in stubs if Path("/proc", str(pid)).exists()]
