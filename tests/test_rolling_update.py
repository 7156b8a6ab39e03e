"""A rolling update as in a cluster: Flask asks three real Tritons by gRPC, each gives way to one with a newer model.

What Kubernetes does is done here by hand, in its order: the new pod is ready, the name in DNS gets its address and
loses the old one's, the old pod gets the preStop pause and then SIGTERM. Pods are addresses of this machine.
"""

import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from contextlib import ExitStack
from http.client import HTTPConnection, HTTPException
from itertools import count

import pytest
import yaml
from conftest import PATIENCE, free_ports, wait_for, wait_until_ok
from test_server import DIGIT

from mnist_preprocess import HOST, MODEL_NAME, ROOT

CLIENTS = 16
PAUSE_SECONDS = 0.02  # Of each client between two requests, so that the new Tritons have time to start.
PODS = 3
SHARE = 200  # Requests that each Triton has answered before their shares are compared.
DNS_CACHE_SECONDS = 30  # What the pause in the manifest allows for caches of DNS: there is none here.
MANIFEST = ROOT / "scripts" / "kubernetes" / "base" / "triton.yaml"
[DEPLOYMENT] = [each for each in yaml.safe_load_all(MANIFEST.read_text()) if each["kind"] == "Deployment"]
[CONTAINER] = DEPLOYMENT["spec"]["template"]["spec"]["containers"]
PAUSE = CONTAINER["lifecycle"]["preStop"]["sleep"]["seconds"] - DNS_CACHE_SECONDS
GRACE = DEPLOYMENT["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]


class Names(threading.Thread):
    """A DNS server that knows one name, and answers its addresses as Kubernetes does for a headless Service."""

    def __init__(self):
        super().__init__(daemon=True)
        self.addresses = []
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind((HOST, 0))
        self.port = self.socket.getsockname()[1]

    def run(self):
        while True:
            query, client = self.socket.recvfrom(512)
            end = query.index(b"\0", 12) + 5  # Of the question: a name, its type and class (RFC 1035, section 4).
            addresses = self.addresses if query[end - 4 : end - 2] == b"\0\1" else []  # Type A; there is no IPv6.
            answer = query[:2] + struct.pack("!5H", 0x8580, 1, len(addresses), 0, 0) + query[12:end]
            for address in addresses:
                answer += struct.pack("!HHHIH", 0xC00C, 1, 1, 0, 4) + socket.inet_aton(address)
            self.socket.sendto(answer, client)


class Pod:
    """A Triton on an address of its own, started with the manifest's arguments."""

    def __init__(self, address, ports, repository, log):
        self.address, self.ports, self.log = address, ports, log
        arguments = [each for each in CONTAINER["args"][1:] if not each.startswith("--model-repository=")]
        arguments.append("--exit-timeout-secs=30")  # Triton's own default, which triton_local.sh lowers.
        for service, port in ports.items():
            arguments += [f"--{service}-address={address}", f"--{service}-port={port}"]
        command = [ROOT / "scripts" / "triton_local.sh", f"--model-repository={repository}", *arguments]
        with log.open("wb") as output:
            environment = os.environ | {"VIRTUAL_ENV": sys.prefix}
            self.process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)

    def wait_until_ready(self):
        url = f"http://{self.address}:{self.ports['http']}/v2/models/{MODEL_NAME}/ready"
        wait_until_ok(url, self.log.read_text, lambda: self.process.poll() is None)

    def answered(self):
        """Return how many requests it has answered."""
        metrics = urllib.request.urlopen(f"http://{self.address}:{self.ports['metrics']}/metrics", timeout=PATIENCE)
        counters = re.findall(r"^nv_inference_request_success{.*} (\d+)", metrics.read().decode(), re.M)
        return sum(map(int, counters))

    def terminate(self):
        """End it as the kubelet does: the preStop pause, SIGTERM, and SIGKILL for what outlives the grace period."""
        time.sleep(PAUSE)
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(GRACE - PAUSE)

    def kill(self):
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(PATIENCE)


def keep_asking(port, enough, answers):
    """Upload one picture after the other on one connection; count (prediction, model version), or what went wrong."""
    connection = HTTPConnection(HOST, port, timeout=PATIENCE)
    while not enough.is_set():
        try:
            connection.request("POST", "/mnist_infer?details=1", DIGIT, {"content-type": "image/png"})
            answer = json.load(connection.getresponse())
            answers[answer.get("Prediction", str(answer)), answer.get("ModelVersion")] += 1
        except (OSError, HTTPException, ValueError) as error:
            answers[repr(error), None] += 1
            connection.close()
        time.sleep(PAUSE_SECONDS)
    connection.close()


@pytest.fixture
def versions(trained_repository, tmp_path):
    """Two model repositories: the second holds the newer version, as two images with the models inside do."""
    repositories = []
    for version in ("1", "2"):
        repository = tmp_path / f"image-{version}"
        shutil.copytree(trained_repository / MODEL_NAME, repository / MODEL_NAME)
        (repository / MODEL_NAME / "1").rename(repository / MODEL_NAME / version)
        repositories.append(repository)
    return repositories


def test_no_request_fails_while_each_triton_is_replaced(versions, tmp_path):
    addresses = (f"127.0.0.{number}" for number in count(2))
    ports = dict(zip(("http", "grpc", "metrics"), free_ports(3), strict=True))
    names, enough, answers, drains = Names(), threading.Event(), Counter(), []
    names.start()
    with ExitStack() as stack:

        def new_pod(repository):
            address = next(addresses)
            pod = Pod(address, ports, repository, tmp_path / f"{address}.log")
            stack.callback(pod.kill)
            return pod

        def check_shares(pods):
            """Wait until each pod has answered as many requests as the others within 20 %, of those sent from now on.

            They may take some seconds longer to: a pod gets none while a connection to it is made anew.
            """
            before = [pod.answered() for pod in pods]

            def equal():
                shares = [pod.answered() - earlier for pod, earlier in zip(pods, before, strict=True)]
                mean = sum(shares) / PODS
                return mean >= SHARE and all(abs(each - mean) <= 0.2 * mean for each in shares)

            wait_for(equal, seconds=60)

        old_pods = [new_pod(versions[0]) for _ in range(PODS)]
        for pod in old_pods:
            pod.wait_until_ready()
        names.addresses = [pod.address for pod in old_pods]

        [port] = free_ports(1)
        target = f"dns://{HOST}:{names.port}/triton-grpc:{ports['grpc']}"
        command = [sys.executable, ROOT / "flask" / "server.py", f"--port={port}", "--workers=2", f"--triton={target}"]
        log = tmp_path / "flask.log"
        with log.open("wb") as output:
            flask = subprocess.Popen(command, stdout=output, stderr=output)
        stack.callback(flask.wait, PATIENCE)
        stack.callback(flask.terminate)
        wait_until_ok(f"http://{HOST}:{port}/readyz", log.read_text, lambda: flask.poll() is None)

        clients = [threading.Thread(target=keep_asking, args=(port, enough, answers)) for _ in range(CLIENTS)]
        for client in clients:
            client.start()
        try:
            check_shares(old_pods)
            before, new_pods = Counter(answers), []
            for old in old_pods:
                new_pods.append(new_pod(versions[1]))
                new_pods[-1].wait_until_ready()
                names.addresses = [*(each for each in names.addresses if each != old.address), new_pods[-1].address]
                drains.append(threading.Thread(target=old.terminate))
                drains[-1].start()
            for drain in drains:
                drain.join()
            after = Counter(answers)
            check_shares(new_pods)
        finally:
            enough.set()
            for client in clients:
                client.join()

    assert {prediction for prediction, _ in answers} == {"7"}, answers
    assert before.keys() == {("7", "1")} and (answers - after).keys() == {("7", "2")}
    for pod in old_pods:
        assert pod.process.returncode == 0
