"""scripts/setup.sh: which Python it takes, when it makes the environment anew, and what it says when it cannot.

With an empty requirements.txt, so that nothing is downloaded; bare_machine.sh runs it in full.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PATIENCE, wait_for

from mnist_preprocess import ROOT

TOOLS = ("awk", "bash", "cat", "cmp", "dirname", "mkdir", "rm", "sed")
PYTHON = Path(sys.base_prefix, "bin", "python3")
# A Python that is too new: it says so, and fails the check of its shared library.
TOO_NEW = 'case "$1" in --version) echo Python 3.14.2 ;; *) exit 1 ;; esac'


class Project:
    """A clone in a folder whose name is not a plain one, and a PATH of which the tests know every program."""

    def __init__(self, folder):
        self.folder = folder / "Übung 1 [x]"
        (self.folder / "scripts" / "triton").mkdir(parents=True)
        for name in ("scripts/setup.sh", "scripts/triton/local.py"):
            shutil.copy(ROOT / name, self.folder / name)
        (self.folder / "requirements.txt").touch()
        self.bin = folder / "bin"
        self.bin.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.add_disk(megabytes=8000)

    @property
    def environment(self):
        return {"PATH": str(self.bin), "HOME": str(self.folder), "LC_ALL": "C"}

    def add(self, program, code):
        (self.bin / program).write_text(f"#!/usr/bin/env bash\n{code}\n")
        (self.bin / program).chmod(0o755)

    def add_disk(self, megabytes):
        self.add("df", f"echo head; echo '/dev/sda1 9000000 1000000 {1024 * megabytes} 89% /'")

    def setup(self, **variables):
        command = [self.folder / "scripts" / "setup.sh"]
        return subprocess.run(
            command, env=self.environment | variables, capture_output=True, text=True, timeout=PATIENCE
        )

    def home(self):
        """Return the folder of the Python from which .venv was made."""
        [home] = re.findall("^home = (.*)$", (self.folder / ".venv" / "pyvenv.cfg").read_text(), re.MULTILINE)
        return Path(home)


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


@pytest.fixture
def ready(project):
    """A project whose environment is made."""
    (project.bin / "python3").symlink_to(PYTHON)
    result = project.setup()
    assert (result.returncode, result.stdout) == (0, "")
    assert "Making .venv with Python 3" in result.stderr
    return project


def check_failure(result, sentence):
    assert (result.returncode, result.stdout) == (1, "")
    last = result.stderr.splitlines()[-1]
    assert last.startswith("setup.sh: ") and sentence in last, result.stderr


def test_second_run_does_nothing(ready):
    result = ready.setup()
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_environment_that_moved_or_lost_pip_is_made_anew(ready):
    moved = ready.folder.rename(ready.folder.with_name("moved"))
    ready.folder = moved
    assert "Making .venv" in ready.setup().stderr
    [pip] = moved.glob(".venv/lib/python3*/site-packages/pip")
    shutil.rmtree(pip)
    assert "Making .venv" in ready.setup().stderr
    assert ready.setup().stderr == ""


def test_takes_the_first_python_with_its_shared_library(project):
    project.add("python3", TOO_NEW)
    project.add("python3.12", "exit 1")
    (project.bin / "python3.11").symlink_to(PYTHON)
    assert project.setup().returncode == 0
    # Not that of the link, through which a Python that was moved is not found.
    assert project.home() == PYTHON.resolve().parent


def test_uv_fetches_a_python_where_there_is_none(project):
    project.add("python3", TOO_NEW)
    fetched = project.folder / ".uv" / "cpython-3.12.9-linux" / "bin"
    project.add("uv", f'echo "$*" >"$HOME/uv.txt"\nmkdir -p "{fetched}"\nln -s "{PYTHON}" "{fetched}/python3.12"')
    (project.bin / "ln").symlink_to(shutil.which("ln"))
    result = project.setup()
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
    assert "this is Python 3.14.2: fetching 3.12 …" in result.stderr
    assert (project.folder / "uv.txt").read_text() == "python install --no-bin --install-dir .uv 3.12\n"
    assert project.home() == PYTHON.resolve().parent


@pytest.mark.parametrize(
    "found, way",
    [("3.14.2", "install such a Python"), ("3.11.2", "on Debian or Ubuntu run 'sudo apt install libpython3.11'")],
)
def test_python_that_cannot_be_fetched(project, found, way):
    project.add("python3", TOO_NEW.replace("3.14.2", found))
    project.add("uv", "echo 'error: dns error' >&2; exit 2")
    result = project.setup()
    check_failure(result, f"found Python {found}, and uv could not fetch Python 3.10 to 3.12 with its shared library")
    check_failure(result, f": {way}, or name one with PYTHON=/path/to/python, or a mirror ")
    assert "error: dns error" in result.stderr
    assert not (project.folder / ".venv").exists()


def test_python_that_is_named_is_taken_or_refused(project):
    check_failure(project.setup(PYTHON="/nowhere/python"), "PYTHON=/nowhere/python is no Python 3.10 to 3.12")
    assert project.setup(PYTHON=str(PYTHON)).returncode == 0
    assert project.home() == PYTHON.resolve().parent


def test_no_python(project):
    check_failure(project.setup(), "there is no python3: install Python")


def test_python_without_ensurepip(project):
    project.add("python3", f'[[ "$*" != *ensurepip* ]] && exec "{PYTHON}" "$@"')
    check_failure(
        project.setup(), "cannot make a virtual environment: on Debian or Ubuntu run 'sudo apt install python3-v"
    )


def test_environment_that_cannot_be_made(project):
    (project.folder / ".venv").write_text("a file in its place")
    check_failure(project.setup(PYTHON=str(PYTHON)), f"{PYTHON} cannot make .venv: Error: [Errno 20] Not a directory")


def test_full_disk(project):
    project.add_disk(megabytes=976)
    (project.folder / ".venv").mkdir()  # As a run leaves it that was stopped.
    check_failure(
        project.setup(PYTHON=str(PYTHON)), "has 976 MB of free space, and the project needs 3500: make room first"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write everywhere")
def test_folder_that_cannot_be_written(project):
    project.folder.chmod(0o555)
    check_failure(project.setup(PYTHON=str(PYTHON)), "cannot write into")
    project.folder.chmod(0o755)


def test_ctrl_c_gives_one_line(project):
    (project.bin / "python3").symlink_to(PYTHON)
    # The Python that makes .venv takes a minute for it.
    slow = "import sys, time\nif 'venv' in sys.orig_argv: print(file=open('making', 'w')); time.sleep(60)\n"
    (project.folder / "sitecustomize.py").write_text(slow)
    environment = project.environment | {"PYTHONPATH": str(project.folder)}
    command = [project.folder / "scripts" / "setup.sh"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for((project.folder / "making").exists)
    os.killpg(process.pid, signal.SIGINT)
    stderr = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 130
    assert stderr.splitlines()[1:] == ["setup.sh: stopped; run it again to go on"]


def test_requirements_that_cannot_be_installed(project):
    (project.folder / "requirements.txt").write_text("no-such-package-for-this-project==1.0\n")
    result = project.setup(PYTHON=str(PYTHON), PIP_NO_INDEX="1")
    check_failure(result, "pip could not install requirements.txt: look at its message above, then try again")
    assert "No matching distribution found for no-such-package-for-this-project==1.0" in result.stderr
