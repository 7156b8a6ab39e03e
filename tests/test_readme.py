"""The README's commands, run as printed from top to bottom in a copy of the project, and their answers compared."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import PATIENCE, require, wait_for

from mnist_preprocess import FLASK_PORT, HOST, ROOT, TRITON_GRPC_PORT, TRITON_HTTP_PORT, TRITON_METRICS_PORT

README = (ROOT / "README.md").read_text()
# Commands that serve until they are stopped, and the port that tells when they are ready.
SERVERS = {
    "python flask/server.py": FLASK_PORT,
    "scripts/triton_local.sh": TRITON_HTTP_PORT,
    "python flask/server.py --port 5001 --triton 127.0.0.1:8001": 5001,
}
# Commands that another test runs, since they need more than this one has, such as a Docker host.
ELSEWHERE = {
    "./scripts/quickstart.sh": "test_quickstart.py",
    "./scripts/test.sh": "this very run",
    "./scripts/triton_cpu.sh --detach": "test_docker_engine.py",
    "docker stop triton_mnist": "test_docker_engine.py",
}


def commands():
    """Return (command, the text printed below it or None) for each command in the README, in its order."""
    found = []
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE):
        if language == "sh":
            found += [[line, None] for line in block.splitlines()]
        elif language == "text" and found[-1][1] is None:
            found[-1][1] = block
    return [tuple(pair) for pair in found]


def listens(port):
    with socket.socket() as client:
        return client.connect_ex((HOST, port)) == 0


def without_figures(text):
    """Return the text without what differs from run to run: accuracies, times, version numbers."""
    return re.sub(r"\d+(\.\d+)?", "#", text)


@pytest.fixture
def copy(git, tmp_path):
    """A clone as a reader has it, set up already, with fewer pictures so that training takes seconds."""
    folder = tmp_path / "project"
    for name in git("ls-files", "--others", "--exclude-standard"):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
    with np.load(ROOT / "images" / "mnist.npz") as data:
        np.savez(folder / "images" / "mnist.npz", **{name: data[name][:10000] for name in data.files})
    commit = ["git", "-c", "user.name=reader", "-c", "user.email=reader@localhost"]
    for command in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", "The project"]):
        subprocess.run([*commit, *command], cwd=folder, check=True)
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / ".triton").symlink_to(ROOT / ".triton")
    return folder


def test_each_command_answers_as_printed(copy, triton):  # `triton` has fetched the server into .triton.
    require(shutil.which("curl"), "there is no curl command")
    for port in (FLASK_PORT, TRITON_HTTP_PORT, TRITON_GRPC_PORT, TRITON_METRICS_PORT):
        require(not listens(port), f"port {port} is taken, and the README's commands use it")
    servers = []
    try:
        for command, printed in commands():
            if command in ELSEWHERE:
                continue
            line = ["bash", "-c", f"source .venv/bin/activate; {'exec ' if command in SERVERS else ''}{command}"]
            if command in SERVERS:
                log = copy.parent / f"server-{len(servers)}.log"
                with log.open("wb") as output:
                    process = subprocess.Popen(line, cwd=copy, stdout=output, stderr=output, start_new_session=True)
                servers.append(process)
                wait_for(lambda port=SERVERS[command], process=process: listens(port) or process.poll() is not None)
                assert process.poll() is None, f"{command}:\n{log.read_text()}"
                if printed:
                    assert without_figures(printed) in without_figures(log.read_text()), command
                continue
            result = subprocess.run(line, cwd=copy, capture_output=True, text=True)
            assert result.returncode == 0, f"{command}:\n{result.stdout}{result.stderr}"
            if printed and command.startswith("python train.py"):
                assert without_figures(result.stdout).endswith(without_figures(printed)), command
            elif printed:
                assert result.stdout.endswith(printed), command
    finally:
        for process in servers:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(PATIENCE)
    status = subprocess.run(["git", "status", "--porcelain"], cwd=copy, capture_output=True, text=True)
    assert status.stdout == ""


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_each_file_that_is_linked_is_there(target):
    assert target.startswith("https://") or Path(ROOT, target).exists()


@pytest.mark.parametrize(
    "listing", re.findall(r"^```(?:python|protobuf)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
)
def test_each_listing_is_the_code_that_runs(listing):
    files = [*ROOT.glob("*.py"), *ROOT.glob("flask/*.py"), *ROOT.glob("model_repository/*/config.pbtxt")]
    assert any(without_indentation(listing) in without_indentation(file.read_text()) for file in files), listing


def without_indentation(text):
    """Return the text's lines without the white space before them, and without empty ones."""
    return "\n".join(line.strip() for line in text.splitlines() if line.strip())
