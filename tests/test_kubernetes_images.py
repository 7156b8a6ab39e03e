"""The images of scripts/kubernetes with a real Docker engine, built as its README says, restricted as its pods are."""

import json
import re
import shlex
import shutil
import subprocess
import urllib.request
from pathlib import Path

import pytest
import test_docker_engine
import yaml
from conftest import PATIENCE, free_ports, wait_until_ok
from test_docker_engine import NVIDIA_IMAGE, docker

from mnist_preprocess import HOST, MODEL_NAME, ROOT, SAMPLE_IMAGE

FOLDER = ROOT / "scripts" / "kubernetes"
NETWORK = "mnist-kubernetes"
BUILDS = re.findall(r"^docker build .*$", (FOLDER / "README.md").read_text(), re.M)
PYTHON_IMAGE = re.search(r"^ARG PYTHON_IMAGE=(.*)$", (ROOT / "flask" / "Dockerfile").read_text(), re.M)[1]

image = test_docker_engine.image  # The stand-in for NVIDIA's image, and for Python's.


def manifest(name):
    """Return the pod's specification and the container's in the Deployment of that name."""
    documents = yaml.safe_load_all((FOLDER / "base" / f"{name}.yaml").read_text())
    [spec] = [each["spec"]["template"]["spec"] for each in documents if each["kind"] == "Deployment"]
    return spec, spec["containers"][0]


def docker_size(quantity):
    """Return Kubernetes's way to write a size in Docker's: 512Mi as 512m."""
    return re.sub(r"([MG])i$", lambda unit: unit[1].lower(), quantity)


def run(name, image, alias):
    """Start a container under the restrictions that the manifest sets, with its arguments; publish its first port."""
    spec, container = manifest(name)
    context, own = spec["securityContext"], container["securityContext"]
    assert own["readOnlyRootFilesystem"] and not own["allowPrivilegeEscalation"]
    [port] = free_ports(1)
    options = [f"--user={context['runAsUser']}:{context['runAsGroup']}", "--read-only"]
    options += [f"--cap-drop={each}" for each in own["capabilities"]["drop"]] + ["--security-opt=no-new-privileges"]
    options.append(f"--memory={docker_size(container['resources']['limits']['memory'])}")
    volumes = {volume["name"]: docker_size(volume["emptyDir"]["sizeLimit"]) for volume in spec["volumes"]}
    for mount in container["volumeMounts"]:
        size = volumes[mount["name"]]
        shared = mount["mountPath"] == "/dev/shm"
        options.append(f"--shm-size={size}" if shared else f"--tmpfs={mount['mountPath']}:size={size},mode=1777")
    options.append(f"--publish={HOST}:{port}:{container['ports'][0]['containerPort']}")
    options += [f"--network={NETWORK}", f"--network-alias={alias}", f"--name={NETWORK}-{name}"]
    started = docker("run", "--detach", *options, image, *container["args"])
    assert started.returncode == 0, started.stderr
    return port


def wait_for_probe(name, probe, port):
    """Wait until what the manifest's probe asks for is answered."""
    url = f"http://{HOST}:{port}{manifest(name)[1][probe]['httpGet']['path']}"
    wait_until_ok(url, lambda: docker("logs", f"{NETWORK}-{name}"))


@pytest.fixture(scope="module")
def images(image, git, trained_repository, tmp_path_factory):
    """The names of both images, built by the README's commands in a copy of the project that has a trained model."""
    project = tmp_path_factory.mktemp("project")
    for name in git("ls-files", "--others", "--exclude-standard"):
        if not name.startswith(("images/", "tests/", "model_repository/")):
            (project / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, project / name)
    shutil.copytree(trained_repository, project / "model_repository")
    for base in (NVIDIA_IMAGE, PYTHON_IMAGE):
        if docker("image", "inspect", base).returncode != 0:
            docker("tag", NVIDIA_IMAGE, base)
    names = []
    for command in BUILDS[:2]:
        built = subprocess.run(shlex.split(command), cwd=project, capture_output=True, text=True)
        assert built.returncode == 0, built.stdout + built.stderr
        names += re.findall(r"--tag=(\S+)", command)
    yield names
    docker("image", "rm", *names, PYTHON_IMAGE)


@pytest.fixture(scope="module")
def ports(images):
    """The ports of Triton and Flask on this machine; Flask finds Triton by the name that the Service has."""
    docker("network", "create", NETWORK)
    try:
        triton = run("triton", images[0], "triton-grpc")
        wait_for_probe("triton", "startupProbe", triton)
        flask = run("flask", images[1], "flask")
        wait_for_probe("flask", "readinessProbe", flask)
        yield triton, flask
    finally:
        for name in ("triton", "flask"):
            docker("rm", "--force", f"{NETWORK}-{name}")
        docker("network", "rm", NETWORK)


def test_flask_answers_through_triton(ports):
    flask = manifest("flask")[1]
    for path in (flask["startupProbe"]["httpGet"]["path"], "/metrics"):
        assert urllib.request.urlopen(f"http://{HOST}:{ports[1]}{path}", timeout=PATIENCE).status == 200
    url = f"http://{HOST}:{ports[1]}/mnist_infer"
    request = urllib.request.Request(url, SAMPLE_IMAGE.read_bytes(), {"content-type": "image/png"})
    assert json.load(urllib.request.urlopen(request, timeout=PATIENCE)) == {"Prediction": "7"}


def test_the_front_holds_no_runtime(images):
    packages = docker("run", "--rm", "--entrypoint=ls", images[1], "/opt/mnist/lib", "-R").stdout
    assert "tritonclient" in packages
    assert not re.search(r"^(tensorflow|ai_edge_litert|keras)$", packages, re.M)


def test_both_run_with_nothing_that_they_do_not_need(ports):
    for name in ("triton", "flask"):
        container = f"{NETWORK}-{name}"
        status = docker("exec", container, "cat", "/proc/1/status").stdout
        assert re.search(r"^Uid:\t1000\t1000\t1000\t1000$", status, re.M)
        assert re.search(r"^CapBnd:\t0+$", status, re.M) and re.search(r"^NoNewPrivs:\t1$", status, re.M)
        assert docker("exec", container, "touch", "/opt/mnist/x").returncode != 0
        state = docker("inspect", "--format", "{{.State.OOMKilled}} {{.HostConfig.Memory}}", container).stdout
        assert re.fullmatch(r"false \d{10}\n", state)


def test_the_probe_fails_when_one_stub_of_two_is_dead(ports):
    triton = manifest("triton")[1]
    probe = ["exec", f"{NETWORK}-triton", *triton["readinessProbe"]["exec"]["command"]]
    assert docker(*probe).returncode == 0
    top = docker("top", f"{NETWORK}-triton", "-eo", "pid,comm").stdout
    stubs = re.findall(r"^ *(\d+) +triton_python", top, re.M)
    assert len(stubs) == 2
    # From inside, where its owner may do so.
    inside = re.search(r"^NSpid:.*\t(\d+)$", Path("/proc", stubs[0], "status").read_text(), re.M)[1]
    assert docker("exec", f"{NETWORK}-triton", "python3", "-c", f"import os; os.kill({inside}, 9)").returncode == 0
    for _ in range(triton["livenessProbe"]["failureThreshold"]):
        assert docker(*probe).returncode == 1
    # What Triton says of itself.
    ready = urllib.request.urlopen(f"http://{HOST}:{ports[0]}/v2/models/{MODEL_NAME}/ready", timeout=PATIENCE)
    assert ready.status == 200
