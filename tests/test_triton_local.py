"""scripts/triton_local.sh: what it says when it cannot start, and that it starts, reloads and stops cleanly."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import copy_configuration, free_ports

from mnist_preprocess import HOST, MODEL_NAME, ROOT

SCRIPT = ROOT / "scripts" / "triton_local.sh"
SHARED_MEMORY = Path("/dev/shm")


def run(*options, script=SCRIPT, disguise="", path=None, **environment):
    """Run the script in this Python's environment, where the Python code `disguise` changes what the machine looks like."""
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
    result = run(*ports_options(free_ports(3)), script=script, PIP_INDEX_URL=f"http://{HOST}:9/", PIP_RETRIES="0", PIP_FIND_LINKS="", PIP_NO_INDEX="1")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1].startswith("triton_local.sh: cannot download nvidia-pytriton 0.7.0 from")
    assert list((tmp_path / ".triton").iterdir()) == []
