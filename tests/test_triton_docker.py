"""The Docker scripts against a docker that records: every option's command line, and a sentence for every failure."""

import os
import pty
import re
import shlex
import shutil
import signal
import socket
import subprocess
import uuid

import pytest
from conftest import NEWEST, PATIENCE, await_nothing, read_terminal, wait_for

from mnist_preprocess import HOST, MODEL_NAME, ROOT, TRITON_GRPC_PORT, TRITON_HTTP_PORT, TRITON_METRICS_PORT

SCRIPTS = {device: ROOT / "scripts" / f"triton_{device}.sh" for device in ("cpu", "gpu")}
TOOLS = ("awk", "bash", "cat", "dirname", "env", "find", "id", "mktemp", "rm", "sed", "sleep", "tail")
OTHER_HOST = "127.0.0.5"  # For runs past the check that the ports are free: nothing listens there, whatever runs here.
TABLE = """\
+-------------+---------+--------+
| Model       | Version | Status |
+-------------+---------+--------+
| mnist_model | 1       | READY  |
+-------------+---------+--------+
"""
LOG = f"I1123 starting\n+---------+------+\n| Backend | Path |\n+---------+------+\n\n{TABLE}\nI1123 started\n"


class Machine:
    """A machine of which only PATH is made up: the tools that the scripts use, and the programs that a test adds."""

    def __init__(self, folder):
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.add("uname", {"-s": "echo Linux", "-sm": "echo Linux x86_64", "-m": "echo x86_64"})
        self.repository = folder / "model repository"
        (self.repository / MODEL_NAME / "1" / "model.savedmodel").mkdir(parents=True)
        folder.chmod(0o755)

    def add(self, program, answers=()):
        """Put a program on PATH that records its arguments, and runs the shell code of the first pattern they match."""
        cases = "".join(f"  {pattern.replace(' ', '?')}) {code} ;;\n" for pattern, code in dict(answers).items())
        # A line in one write, for programs that run at the same time.
        record = f'printf -v line "%q " {program} "$@"; echo "$line" >>"{self.folder}/{program}.txt"'
        (self.bin / program).write_text(f'#!/usr/bin/env bash\n{record}\ncase "$*" in\n{cases}esac\n')
        (self.bin / program).chmod(0o755)

    def calls(self, program="docker"):
        record = self.folder / f"{program}.txt"
        return [shlex.split(line) for line in record.read_text().splitlines()] if record.exists() else []

    def environment(self, **variables):
        # In other locales the shell quotes an umlaut in a way that shlex does not read.
        return {"PATH": str(self.bin), "HOME": str(self.folder), "LC_ALL": "C.UTF-8"} | variables

    def run(self, device, *arguments, **variables):
        command = [SCRIPTS[device], *arguments]
        return subprocess.run(
            command,
            env=self.environment(**variables),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )

    def serve(self, device="cpu", *arguments):
        """Run the script for real, on the made-up model repository."""
        options = (f"--listen={OTHER_HOST}", f"--model-repository={self.repository}")
        return self.run(device, *(word for option in options for word in option.split("=")), *arguments)


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


@pytest.fixture
def docker(machine):
    """A machine whose Docker works; no container exists, and every image is there."""
    machine.add("docker", {"container inspect*": "exit 1"})
    return machine


@pytest.fixture
def gpu(docker):
    """A machine with Docker, an NVIDIA GPU and the container toolkit."""
    docker.add("nvidia-smi", {"--list-gpus": "echo 'GPU 0: NVIDIA T4 (UUID: GPU-1)'"})
    docker.add("nvidia-ctk")
    return docker


def commands(text):
    """Return the argument lists of the commands that --dry-run prints."""
    return [shlex.split(line) for line in text.replace("\\\n", " ").splitlines()]


def run_command(
    image, *tritonserver, listen=HOST, device=(), repository=ROOT / "model_repository", mode=(), label="", memory="8g"
):
    ports = (TRITON_HTTP_PORT, TRITON_GRPC_PORT, TRITON_METRICS_PORT)
    return [
        *("docker", "run", "--rm", "--name=triton_mnist", *device, *mode),
        *(f"--publish={listen}:{port}:{port}" for port in ports),
        *("--user=triton-server", "--ulimit=memlock=-1", f"--volume={repository}:/models:ro{label}"),
        *("--ulimit=stack=67108864", "--shm-size=1g", "--read-only", "--tmpfs=/tmp", f"--memory={memory}"),
        *("--pids-limit=4096", "--cap-drop=ALL", "--security-opt=no-new-privileges"),
        *(image, "tritonserver", "--model-repository=/models", *tritonserver),
    ]


def build_command(tag, device, image):
    return [
        *("docker", "build", f"--file={ROOT}/scripts/triton/Dockerfile"),
        f"--build-arg=TRITON_IMAGE=nvcr.io/nvidia/tritonserver:{tag}-py3",
        *(f"--build-arg=DEVICE={device}", f"--tag={image}", str(ROOT)),
    ]


IMAGE = f"mnist-triton:{NEWEST}"
CPU = build_command(NEWEST, "cpu", IMAGE)
GPU = build_command(NEWEST, "gpu", f"{IMAGE}-gpu")
OLD = "nvcr.io/nvidia/tritonserver:22.08-py3"


@pytest.mark.parametrize(
    ("device", "arguments", "expected"),
    [
        ("cpu", [], [CPU, run_command(IMAGE)]),
        ("gpu", [], [GPU, run_command(f"{IMAGE}-gpu", device=["--gpus=all"])]),
        ("cpu", ["--tag", "22.08"], [run_command(OLD)]),
        ("gpu", ["--tag", "22.08"], [run_command(OLD, device=["--gpus=all"])]),
        ("cpu", ["--tag", "25.02"], [run_command("nvcr.io/nvidia/tritonserver:25.02-py3")]),
        (
            "cpu",
            ["--tag", "25.03"],
            [build_command("25.03", "cpu", "mnist-triton:25.03"), run_command("mnist-triton:25.03")],
        ),
        ("cpu", ["--listen", "0.0.0.0"], [CPU, run_command(IMAGE, listen="0.0.0.0")]),
        ("cpu", ["--detach"], [CPU, run_command(IMAGE, mode=["--detach"])]),
        ("cpu", ["--memory", "2g"], [CPU, run_command(IMAGE, memory="2g")]),
        ("cpu", ["--model-repository", "/a b"], [CPU, run_command(IMAGE, repository="/a b")]),
        ("cpu", ["--", "--log-verbose=1", "a b"], [CPU, run_command(IMAGE, "--log-verbose=1", "a b")]),
    ],
)
def test_dry_run_prints_the_command_and_needs_nothing(machine, device, arguments, expected):
    result = machine.run(device, "--dry-run", *arguments)
    assert (result.returncode, commands(result.stdout)) == (0, expected)
    assert "--strict-model-config" not in result.stdout


def test_what_dry_run_prints_can_be_pasted(docker):
    printed = docker.run("cpu", "--dry-run", "--model-repository", "it's a b").stdout
    subprocess.run(["bash", "-c", printed], env=docker.environment(), check=True)
    assert docker.calls() == commands(printed)
    assert f"--volume={docker.folder}/it's a b:/models:ro" in docker.calls()[-1]


@pytest.mark.parametrize(("device", "arguments"), [("cpu", []), ("gpu", []), ("cpu", ["--tag", "22.08"])])
def test_runs_what_dry_run_prints(gpu, device, arguments):
    printed = commands(gpu.serve(device, *arguments, "--dry-run").stdout)
    result = gpu.serve(device, *arguments)
    assert result.returncode == 0, result.stderr
    assert [call for call in gpu.calls() if call in printed] == printed
    assert gpu.calls()[-1] == printed[-1]


def test_the_release_may_come_from_the_environment_and_an_option_wins(machine):
    assert commands(machine.run("cpu", "--dry-run", TRITON_TAG="22.08").stdout) == [run_command(OLD)]
    wins = machine.run("cpu", "--dry-run", "--tag", NEWEST, TRITON_TAG="22.08")
    assert commands(wins.stdout) == [CPU, run_command(IMAGE)]


def test_old_releases_come_with_a_warning(machine):
    for tag in ("22.08", "25.02", "26.05"):
        warning = machine.run("cpu", "--dry-run", "--tag", tag).stderr
        assert re.fullmatch(
            rf"triton_cpu\.sh: warning: Triton {tag} .*NVIDIA's security bulletins.*26\.06.*\n", warning
        )
    assert machine.run("cpu", "--dry-run", "--tag", "26.06").stderr == ""


def test_takes_the_terminal_only_where_there_is_one(machine):
    controller, terminal = pty.openpty()
    command = [SCRIPTS["cpu"], "--dry-run"]
    subprocess.run(command, env=machine.environment(), stdin=terminal, stdout=terminal, check=True)
    os.close(terminal)
    printed = read_terminal(controller)
    os.close(controller)
    assert commands(printed) == [CPU, run_command(IMAGE, mode=["-it"])]


@pytest.mark.parametrize("device", SCRIPTS)
def test_help_is_the_header(machine, device):
    result = machine.run(device, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("Run NVIDIA Triton in Docker")
    options = re.findall(r"^  (--[a-z-]+)", result.stdout, re.MULTILINE)
    assert options == ["--tag", "--model-repository", "--listen", "--memory", "--detach", "--dry-run", "--help"]
    assert f"else {NEWEST}." in result.stdout
    assert "set -e" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--nonsense"], "unknown option '--nonsense'"),
        ([NEWEST], f"unknown option '{NEWEST}'"),
        (["--tag"], "--tag needs a value"),
        (["--tag", "26.9"], "not '26.9'"),
        (["--tag", "26.13"], "not '26.13'"),
        (["--tag", f"{NEWEST}-py3"], f"not '{NEWEST}-py3'"),
        (["--listen", "everywhere"], "--listen takes an IPv4 address, not 'everywhere'"),
        (["--model-repository", "a:b"], "cannot mount a folder with a colon in its name: 'a:b'"),
    ],
)
def test_wrong_usage(docker, arguments, sentence):
    result = docker.run("cpu", *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(rf"triton_cpu\.sh: .*{re.escape(sentence)}; --help lists the options\n", result.stderr)
    assert docker.calls() == []


def check_failure(result, sentence, device="cpu"):
    assert (result.returncode, result.stdout) == (1, "")
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"triton_{device}.sh: ") and sentence in last, result.stderr


def test_no_docker(machine):
    check_failure(machine.serve(), "there is no docker command: install Docker")


@pytest.mark.parametrize(
    ("pattern", "code", "arguments", "sentence"),
    [
        (
            "version*",
            "echo 'Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?'"
            " >&2; exit 1",
            [],
            "the Docker daemon does not run: start it with 'sudo systemctl start docker'",
        ),
        (
            "version*",
            "echo 'permission denied while trying to connect to the Docker daemon socket' >&2; exit 1",
            [],
            "you may not use Docker: run 'sudo usermod -aG docker ",
        ),
        ("version*", "echo 'client is too new' >&2; exit 1", [], "docker version fails: client is too new"),
        ("container inspect*", "echo true", [], "the container triton_mnist is already running: run 'docker stop"),
        ("container inspect*", "echo false", [], "a stopped container is named triton_mnist: run 'docker rm"),
        (
            "pull *",
            "echo 'manifest for nvcr.io/nvidia/tritonserver:99.12-py3 not found: manifest unknown' >&2; exit 1",
            ["--tag", "99.12"],
            "NVIDIA publishes no Triton 99.12: choose one of https://",
        ),
        (
            "pull *",
            "echo 'no matching manifest for linux/arm64/v8 in the manifest list entries: not found' >&2; exit 1",
            ["--tag", "22.08"],
            "NVIDIA publishes no Triton 22.08 for this machine's processor (x86_64): try a newer --tag",
        ),
        (
            "pull *",
            "echo 'Error response from daemon: i/o timeout' >&2; exit 1",
            [],
            f"docker cannot pull nvcr.io/nvidia/tritonserver:{NEWEST}-py3: Error response from daemon: i/o timeout",
        ),
        ("build *", "exit 1", [], f"docker cannot build {IMAGE}: its message stands above"),
        (
            "run *--entrypoint=find*",
            "echo 'no space left' >&2; exit 125",
            [],
            f"cannot run {IMAGE}: no",
        ),
    ],
)
def test_what_docker_cannot_do(machine, pattern, code, arguments, sentence):
    machine.add("docker", {"container inspect*": "exit 1", "image inspect*": "exit 1", pattern: code})
    check_failure(machine.serve("cpu", *arguments), sentence)


@pytest.mark.parametrize(
    ("programs", "sentence"),
    [
        ({}, "nvidia-smi finds no NVIDIA GPU: install NVIDIA's driver"),
        ({"nvidia-smi": "echo 'NVIDIA-SMI has failed'; exit 9"}, "nvidia-smi finds no NVIDIA GPU"),
        ({"nvidia-smi": "echo 'GPU 0: NVIDIA T4'"}, "without the NVIDIA Container Toolkit: install it (https://"),
    ],
)
def test_no_gpu(docker, programs, sentence):
    for program, code in programs.items():
        docker.add(program, {"*": code})
    check_failure(docker.serve("gpu"), sentence, "gpu")


def test_toolkit_may_be_known_to_the_daemon_alone(gpu):
    (gpu.bin / "nvidia-ctk").unlink()
    gpu.add("docker", {"container inspect*": "exit 1", "info *": """echo '{"nvidia":{},"runc":{}}'"""})
    assert gpu.serve("gpu").returncode == 0


def test_apple_silicon(docker):
    docker.add("uname", {"-s": "echo Darwin", "-sm": "echo Darwin arm64", "-m": "echo arm64"})
    assert "on Apple silicon Docker runs the image's linux/arm64 variant on the CPU" in docker.serve("cpu").stderr
    check_failure(docker.serve("gpu"), "Docker on a Mac reaches no NVIDIA GPU: run ./scripts/triton_cpu.sh", "gpu")


def test_no_model_trained_yet(docker):
    shutil.rmtree(docker.repository / MODEL_NAME / "1")
    check_failure(docker.serve(), f"no trained model in {docker.repository}/{MODEL_NAME}: run 'python train.py' first")


def test_model_that_tritons_user_cannot_read(docker):
    closed = "echo 'WARNING: no limit for swap' >&2; echo /models/mnist_model/1"
    docker.add("docker", {"container inspect*": "exit 1", "run *--entrypoint=find*": closed})
    sentence = f"Triton's user may not read {docker.repository}/mnist_model/1: run 'chmod -R a+rX {docker.repository}'"
    check_failure(docker.serve(), sentence)


def test_mount_is_labelled_where_selinux_is_on(docker):
    for status, label in (("1", ""), ("0", ",z")):
        docker.add("selinuxenabled", {"*": f"exit {status}"})
        assert commands(docker.run("cpu", "--dry-run").stdout) == [CPU, run_command(IMAGE, label=label)]


def test_port_in_use(docker):
    with socket.create_server((OTHER_HOST, TRITON_GRPC_PORT)):
        check_failure(docker.serve(), f"port {TRITON_GRPC_PORT} on {OTHER_HOST} is already in use")


def test_leaves_out_what_the_host_or_the_image_cannot_do(docker):
    limit = "echo 'runc: error setting rlimit type 8: operation not permitted' >&2; exit 125"
    user = "echo 'docker: unable to find user triton-server: no matching entries in passwd file' >&2; exit 125"
    docker.add("docker", {"container inspect*": "exit 1", "run *memlock=-1*": limit, "run *triton-server*": user})
    result = docker.serve()
    assert result.returncode == 0
    assert "cannot lift the limit on locked memory" in result.stderr and "has no user triton-server" in result.stderr
    assert "--user=" in docker.calls()[-1] and "--ulimit=memlock=-1" not in docker.calls()[-1]


def test_pulls_an_image_once(docker):
    docker.serve()
    assert not [call for call in docker.calls() if call[1] == "pull"]
    docker.add("docker", {"container inspect*": "exit 1", "image inspect*": "exit 1"})
    docker.serve()
    pulls = [call for call in docker.calls() if call[1] == "pull"]
    assert pulls == [["docker", "pull", f"nvcr.io/nvidia/tritonserver:{NEWEST}-py3"]]


def detached(machine, logs, curl):
    answers = {"logs --follow *": logs, "logs *": f"cat '{machine.folder}/log.txt'"}
    machine.add("docker", {"container inspect*": "exit 1"} | answers)
    machine.add("curl", {"*": curl})
    (machine.folder / "log.txt").write_text(LOG)


def test_detach_returns_when_ready_with_the_table_of_models(docker):
    detached(docker, "exec sleep 60", "exit 0")
    result = docker.serve("cpu", "--detach")
    assert (result.returncode, result.stdout) == (0, TABLE), result.stderr
    assert docker.calls("curl")[-1][-1] == f"http://{OTHER_HOST}:{TRITON_HTTP_PORT}/v2/health/ready"
    assert ["docker", "stop", "triton_mnist"] not in docker.calls()


def test_detach_tells_when_triton_ends(docker):
    detached(docker, "echo 'error: creating server: failed to load all models'", "exit 7")
    result = docker.serve("cpu", "--detach")
    check_failure(result, "Triton ended before the models were READY: its log stands above")
    assert "failed to load all models" in result.stderr


def test_ctrl_c_while_waiting_stops_the_container(docker):
    detached(docker, "exec sleep 60", "exit 7")
    command = [SCRIPTS["cpu"], "--detach", "--listen", OTHER_HOST, "--model-repository", docker.repository]
    mark = f"mark={uuid.uuid4()}"
    process = subprocess.Popen(command, env=docker.environment(TRITON_TEST=mark), start_new_session=True)
    wait_for(lambda: docker.calls("curl"))
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(PATIENCE) == 130
    assert ["docker", "stop", "triton_mnist"] in docker.calls()
    assert await_nothing(mark) == {}
