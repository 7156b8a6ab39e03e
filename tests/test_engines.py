"""flask/engines.py: versions that come and go under a server, and Tritons that do."""

import io
import json
import os
import shutil
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException

import grpc
import numpy as np
import pytest
import tensorflow as tf
from conftest import PATIENCE, flask_server, free_ports, start_triton, stop_triton, wait_for
from engines import EngineError, LocalEngine, TritonEngine, numeric_target
from saved_models import double, save
from test_server import DIGIT
from tritonclient.grpc import service_pb2, service_pb2_grpc

from mnist_preprocess import HOST, INPUT_NAME, MODEL_NAME, OUTPUT_NAME, open_image, preprocess
from saved_model import SAVED_MODEL, ModelError, SavedModel

CLIENTS = 16
PAUSE_SECONDS = 0.02  # Of each client between two requests: some of them wait for an answer at any moment, and what is
# started beside them has time to start.
PIXELS = preprocess(open_image(io.BytesIO(DIGIT)))


@pytest.fixture
def model_directory(trained_repository, tmp_path):
    """A model directory of the test's own, in which version 1 is served."""
    shutil.copytree(trained_repository, tmp_path / "repository")
    return tmp_path / "repository" / MODEL_NAME


def publish(model_directory, number, damaged=False):
    """Make version 1 appear as another one, whole at once, or as one that does not load."""
    shutil.copytree(model_directory / "1", model_directory / ".new")
    if damaged:
        (model_directory / ".new" / SAVED_MODEL / "saved_model.pb").write_bytes(b"damaged")
    (model_directory / ".new").rename(model_directory / str(number))


def ask(server):
    """Ask once; return the status and the answer."""
    connection = server.connect()
    try:
        connection.request("POST", "/mnist_infer?details=1", DIGIT, {"Content-Type": "image/png"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


class Clients:
    """So many clients that ask again and again; `outcomes` counts the statuses, versions and lost requests."""

    def __init__(self, server, count=CLIENTS):
        self.server, self.enough, self.outcomes, self.lock = server, threading.Event(), Counter(), threading.Lock()
        self.threads = [threading.Thread(target=self.keep_asking) for _ in range(count)]

    def keep_asking(self):
        connection = self.server.connect()
        while not self.enough.is_set():
            try:
                connection.request("POST", "/mnist_infer?details=1", DIGIT, {"Content-Type": "image/png"})
                answer = connection.getresponse()
                said = json.loads(answer.read())
                outcome = answer.status, said.get("Prediction"), said.get("ModelVersion"), said.get("Error")
            except (OSError, HTTPException) as error:
                outcome = type(error).__name__, None, None, None
                connection.close()
            with self.lock:
                self.outcomes[outcome] += 1
            time.sleep(PAUSE_SECONDS)
        connection.close()

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.enough.set()
        for thread in self.threads:
            thread.join()

    def wait_for(self, more):
        enough = self.outcomes.total() + more
        wait_for(lambda: self.outcomes.total() >= enough)


def versions_of(server):
    """Return the versions that answer, whichever worker is asked: none is passed over 20 times in a row."""
    return {ask(server)[1]["ModelVersion"] for _ in range(20)}


def expected_digit(model_directory):
    model = SavedModel(model_directory / "1" / SAVED_MODEL)
    return str(model.predict({INPUT_NAME: PIXELS[None]})[OUTPUT_NAME].argmax())


def test_new_versions_are_served_under_load(model_directory, tmp_path):
    digit = expected_digit(model_directory)
    with flask_server(tmp_path / "log", model_directory.parent) as server, Clients(server) as clients:
        clients.wait_for(100)
        for number in range(2, 5):
            publish(model_directory, number)
            wait_for(lambda number=number: versions_of(server) == {str(number)})
    assert {(status, prediction) for status, prediction, *_ in clients.outcomes} == {(200, digit)}


def test_broken_version_is_refused_once(model_directory, tmp_path):
    log = tmp_path / "log"
    with flask_server(log, model_directory.parent) as server:
        publish(model_directory, 2, damaged=True)
        sentence = f"server.py: 1 is served, not 2: cannot load the SavedModel in {model_directory / '2' / SAVED_MODEL}"
        wait_for(lambda: sentence in log.read_text())
        time.sleep(3)  # In which both workers look again, three times.
        assert versions_of(server) == {"1"}
        assert log.read_text().count(sentence) == 1
        publish(model_directory, 3)
        wait_for(lambda: versions_of(server) == {"3"})


def test_broken_newest_version_is_no_reason_not_to_start(model_directory, tmp_path):
    publish(model_directory, 2, damaged=True)
    log = tmp_path / "log"
    with flask_server(log, model_directory.parent) as server:
        assert ask(server)[1]["ModelVersion"] == "1"
    assert log.read_text().count("server.py: 1 is served, not 2: ") == 1


def test_repository_that_goes_away(model_directory, tmp_path):
    log = tmp_path / "log"
    with flask_server(log, model_directory.parent) as server:
        shutil.rmtree(model_directory)
        sentence = f"server.py: no version in {model_directory} any more: 1 goes on being served"
        wait_for(lambda: sentence in log.read_text())
        with Clients(server) as clients:
            clients.wait_for(200)
            time.sleep(2)  # In which both workers look again, twice.
    assert {(status, version) for status, _, version, _ in clients.outcomes} == {(200, "1")}
    assert log.read_text().count(sentence) == 1


def test_no_version_can_be_served(model_directory):
    shutil.rmtree(model_directory / "1" / SAVED_MODEL)
    with pytest.raises(ModelError, match="no SavedModel in"):
        LocalEngine(model_directory)


def test_model_of_something_else(tmp_path):
    save(tmp_path, "other", double, x=([None, 2], tf.float32))
    with pytest.raises(ModelError, match="takes or gives other tensors than"):
        LocalEngine(tmp_path / "other")


def serve_triton(tmp_path, repository, ports):
    return start_triton(tmp_path / f"{ports[0]}-{time.monotonic()}", f"--model-repository={repository}", ports=ports)


def test_two_tritons_one_of_which_is_killed(trained_repository, tmp_path):
    ports = free_ports(3), free_ports(3)
    tritons = [serve_triton(tmp_path, trained_repository, three) for three in ports]
    addresses = f"localhost:{ports[0][1]},{HOST}:{ports[1][1]}"
    try:
        with flask_server(tmp_path / "log", tmp_path / "nothing", f"--triton={addresses}") as server:
            with Clients(server) as clients:
                clients.wait_for(500)
                os.kill(tritons[0].pid, signal.SIGKILL)
                tritons[0].process.wait()
                clients.wait_for(1000)
                tritons[0] = serve_triton(tmp_path, trained_repository, ports[0])
                clients.wait_for(500)
            assert {(status, error) for status, _, _, error in clients.outcomes} == {(200, None)}
            assert {engine_of(server)} == {f"Triton at {addresses}"}
            before = [inferences(triton) for triton in tritons]

            def both_answer():
                assert ask(server)[0] == 200
                return all(inferences(triton) > count for triton, count in zip(tritons, before, strict=True))

            wait_for(both_answer)  # gRPC leaves an address alone for a second that did not answer.
            stop_triton(tritons[1])
            assert {ask(server)[0] for _ in range(20)} == {200}
    finally:
        for triton in tritons:
            stop_triton(triton)


def engine_of(server):
    return ask(server)[1]["Engine"]


def inferences(triton):
    with triton.http as client:
        return client.get_inference_statistics(MODEL_NAME)["model_stats"][0]["inference_count"]


def test_triton_that_is_away_and_comes(trained_repository, tmp_path, monkeypatch):
    for proxy in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")
    ports = free_ports(3)
    with flask_server(tmp_path / "log", tmp_path / "nothing", f"--triton={HOST}:{ports[1]}") as server:
        sentence = f"Triton at {HOST}:{ports[1]} does not answer; ask again in a moment"
        assert ask(server) == (503, {"Error": sentence})
        triton = serve_triton(tmp_path, trained_repository, ports)
        try:
            wait_for(lambda: ask(server)[1].get("ModelVersion") == "1", seconds=10)
        finally:
            stop_triton(triton)
        assert ask(server)[0] == 503
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.fixture
def triton_seconds(monkeypatch):
    """How long Triton may take, for tests in which it shall not be too long on a busy machine either."""
    monkeypatch.setattr("engines.TRITON_SECONDS", PATIENCE)
    return PATIENCE


@pytest.mark.usefixtures("triton_seconds")
def test_both_engines_answer_alike(trained_repository, triton):
    triton_engine = TritonEngine(triton.grpc_url)
    triton_engine.begin()
    local_engine = LocalEngine(trained_repository / MODEL_NAME)
    local_engine.begin()
    batch = np.float32(np.random.default_rng(0).integers(256, size=(3, *PIXELS.shape)))
    answers = [engine.predict(batch) for engine in (local_engine, triton_engine)]
    np.testing.assert_allclose(answers[0][0], answers[1][0], atol=1e-6)
    assert answers[0][1] == answers[1][1] == "1"
    for engine in (local_engine, triton_engine):
        with pytest.raises(EngineError):
            engine.predict(batch[:, :14])


class OtherTriton(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers with one output, or with the errors given before."""

    def __init__(self, name, shape, errors=()):
        self.name, self.shape, self.errors, self.seconds = name, shape, list(errors), []

    def ModelInfer(self, request, context):
        self.seconds.append(context.time_remaining())
        if self.errors:
            context.abort(self.errors.pop(0), "no\nmodel")
        return service_pb2.ModelInferResponse(
            model_version="3",
            outputs=[{"name": self.name, "datatype": "FP32", "shape": self.shape}],
            raw_output_contents=[np.ones(self.shape, np.float32).tobytes()],
        )

    def ask(self):
        """Return what an engine answers for one picture that asks this Triton."""
        server = grpc.server(ThreadPoolExecutor(1))
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, server)
        engine = TritonEngine(f"{HOST}:{server.add_insecure_port(f'{HOST}:0')}")
        server.start()
        try:
            engine.begin()
            return engine.predict(PIXELS[None])
        finally:
            server.stop(None).wait()


@pytest.mark.usefixtures("triton_seconds")
@pytest.mark.parametrize(("name", "shape"), [("output_0", (1, 10)), (OUTPUT_NAME, (1, 9)), (OUTPUT_NAME, (2, 10))])
def test_triton_with_another_model(name, shape):
    with pytest.raises(EngineError, match=rf"gives no {OUTPUT_NAME} of shape \(1, 10\): is it our model\?"):
        OtherTriton(name, shape).ask()


def test_triton_that_stops_is_asked_again_and_told_the_deadline(triton_seconds):
    errors = [grpc.StatusCode.NOT_FOUND, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE]
    triton = OtherTriton(OUTPUT_NAME, (1, 10), errors)
    probabilities, version = triton.ask()
    assert (probabilities.tolist(), version) == ([[1] * 10], "3")
    assert len(triton.seconds) == 4
    assert all(0 < seconds < 1.05 * triton_seconds for seconds in triton.seconds)  # gRPC rounds it up a little.


@pytest.mark.usefixtures("triton_seconds")
def test_error_of_triton_is_one_sentence():
    with pytest.raises(EngineError, match=r": Triton at \S+ has no answer: no model$"):
        OtherTriton(OUTPUT_NAME, (1, 10), [grpc.StatusCode.INVALID_ARGUMENT]).ask()


@pytest.mark.parametrize(
    ("pairs", "target"),
    [
        ([("127.0.0.1", "1"), ("127.0.0.2", "2")], "ipv4:127.0.0.1:1,127.0.0.2:2"),
        ([("::1", "1"), ("::2", "2")], "ipv6:[::1]:1,[::2]:2"),
    ],
)
def test_several_addresses(pairs, target):
    assert numeric_target(pairs) == target


def test_several_addresses_of_two_families():
    with pytest.raises(OSError, match=r"no addresses of one family for ::1, 127\.0\.0\.1"):
        numeric_target([("::1", "1"), ("127.0.0.1", "1")])
