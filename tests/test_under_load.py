"""Both servers under load: trained again meanwhile, and for long.

The soak lasts some seconds by default; SOAK_MINUTES=10 is the full run, which shows the memory with `pytest -s`.
"""

import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import closing, contextmanager
from functools import partial
from http.client import HTTPException
from pathlib import Path

import numpy as np
import pytest
from conftest import PATIENT, children, flask_server, start_triton, stop_triton, wait_for
from PIL import Image
from serving import HEADER_SECONDS
from tritonclient import grpc
from tritonclient.utils import InferenceServerException
from wild_digits import encoded

from mnist_preprocess import INPUT_NAME, MODEL_NAME, OUTPUT_NAME, ROOT, SAMPLE_IMAGE, open_image, preprocess
from saved_model import SAVED_MODEL, SavedModel

SOAK_MINUTES = float(os.environ.get("SOAK_MINUTES", "0.2"))
DIGIT = Image.fromarray(preprocess(open_image(SAMPLE_IMAGE))[..., 0].round().astype(np.uint8))
# One is decoded in the Flask server's workers, one beside them.
UPLOADS = {"digit": encoded(DIGIT), "photo": (ROOT / "images" / "pen_stroke.jpg").read_bytes()}
ROUND = ("digit",) * 100 + ("photo",)
PIXELS = {name: preprocess(open_image(io.BytesIO(upload)))[None] for name, upload in UPLOADS.items()}


@contextmanager
def ask_flask(server):
    """Give what asks with one of UPLOADS, over one connection, and returns the model's version and probabilities."""
    last = time.monotonic()

    def ask(name):
        nonlocal last
        if time.monotonic() > last + HEADER_SECONDS / 2:  # The server ends it after twice as long.
            connection.close()
        kind = {"Content-Type": "application/octet-stream"}
        connection.request("POST", "/mnist_infer?details=1", UPLOADS[name], kind)
        answer = json.loads(connection.getresponse().read())
        last = time.monotonic()
        if "Error" in answer:
            raise HTTPException(answer["Error"])
        return answer["ModelVersion"], answer["Probabilities"]

    with closing(server.connect()) as connection:
        yield ask


@contextmanager
def ask_triton(server):
    """Give the same for Triton, over gRPC."""
    tensors = {
        name: [grpc.InferInput(INPUT_NAME, pixels.shape, "FP32").set_data_from_numpy(pixels)]
        for name, pixels in PIXELS.items()
    }

    def ask(name):
        result = client.infer(MODEL_NAME, tensors[name])
        return result.get_response().model_version, result.as_numpy(OUTPUT_NAME)[0]

    with server.grpc as client:
        yield ask


def keep_asking(asker, enough, outcomes):
    """Ask until told otherwise, or one fails; count the answers, (upload, version, probabilities), and the failure."""
    with asker() as ask:
        while not enough.is_set():
            for name in ROUND:
                try:
                    version, probabilities = ask(name)
                    outcomes[name, version, tuple(np.round(probabilities, 4).tolist())] += 1
                except (OSError, HTTPException, InferenceServerException) as error:
                    outcomes[repr(error)] += 1
                    return


@contextmanager
def clients(servers, count):
    """Keep `count` clients of each server asking; give a counter of outcomes for each client, by the server's name."""
    enough = threading.Event()
    outcomes = {name: [Counter() for _ in range(count)] for name in servers}
    threads = [
        threading.Thread(target=keep_asking, args=(asker(name, server), enough, counter))
        for name, server in servers.items()
        for counter in outcomes[name]
    ]
    for thread in threads:
        thread.start()
    try:
        yield outcomes
    finally:
        enough.set()
        for thread in threads:
            thread.join()


def total(outcomes):
    """Return the outcomes of all clients, which may go on, by the server's name."""
    return {name: sum((counter.copy() for counter in counters), Counter()) for name, counters in outcomes.items()}


def asker(name, server):
    return partial({"Flask": ask_flask, "Triton": ask_triton}[name], server)


@pytest.fixture
def served(trained_repository, tmp_path):
    """A model directory of the test's own, and both servers, which look there for new versions."""
    repository = tmp_path / "repository"
    shutil.copytree(trained_repository, repository)
    polling = ("--model-control-mode=poll", "--repository-poll-secs=1", "--disable-auto-complete-config", PATIENT)
    triton = start_triton(tmp_path / "triton.log", f"--model-repository={repository}", *polling)
    try:
        with flask_server(tmp_path / "flask.log", repository) as flask:
            yield repository / MODEL_NAME, {"Flask": flask, "Triton": triton}
    finally:
        assert stop_triton(triton) == 0
    assert "Traceback" not in (tmp_path / "flask.log").read_text()


def check(outcomes, model_directory):
    """Assert that every answer is that of the version that it names, and return how many there were of each."""
    failed = [outcome for outcome in outcomes if isinstance(outcome, str)]
    assert not failed
    expected = {}
    for upload, version, probabilities in outcomes:
        if version not in expected:
            model = SavedModel(model_directory / version / SAVED_MODEL)
            expected[version] = {u: model.predict({INPUT_NAME: x})[OUTPUT_NAME][0] for u, x in PIXELS.items()}
        np.testing.assert_allclose(probabilities, expected[version][upload], rtol=0, atol=2e-4)
    counts = Counter()
    for (_, version, _), count in outcomes.items():
        counts[version] += count
    return counts


def test_five_trainings(served):
    """Nothing fails, every answer is its version's, and each version is served soon after it is there."""
    model_directory, servers = served
    with clients(servers, 16) as outcomes:
        for number in range(2, 7):
            options = ("--train-size=500", "--epochs=1", "--min-accuracy=0", f"--seed={number}")
            command = [sys.executable, ROOT / "train.py", *options, "--model-repository", model_directory.parent]
            assert subprocess.run(command, capture_output=True).returncode == 0
            began = time.monotonic()
            for name, server in servers.items():
                with asker(name, server)() as ask:
                    wait_for(lambda ask=ask, newest=str(number): ask("digit")[0] == newest, seconds=60)
                print(f"{name} serves version {number} after {time.monotonic() - began:.1f} s")

        def answer_by_newest():
            """Tell whether only the newest version answers for a second, from both servers and all their processes."""
            before = total(outcomes)
            time.sleep(1)
            return all(
                check(now - before[name], model_directory).keys() == {"6"} for name, now in total(outcomes).items()
            )

        wait_for(answer_by_newest)
    for name, answers in total(outcomes).items():
        print(name, dict(check(answers, model_directory)))


def test_soak(served):
    """64 clients of each server: nothing fails, and after the first minute memory grows by 5 % at most."""
    model_directory, servers = served
    minute = min(60, SOAK_MINUTES * 30)  # At least two looks.
    memory = []
    with clients(servers, 64) as outcomes:
        end = time.monotonic() + 60 * SOAK_MINUTES
        while time.monotonic() < end:
            time.sleep(minute)
            now = {name: resident(server.process.pid) for name, server in servers.items()}
            answers = {name: sum(counter.total() for counter in outcomes[name]) for name in outcomes}
            print(f"{len(memory) + 1:3} answers {answers}, memory in MB by process {now}", flush=True)
            memory.append({name: sum(processes.values()) for name, processes in now.items()})
    for answers in total(outcomes).values():
        assert check(answers, model_directory).keys() == {"1"}
    if SOAK_MINUTES >= 2:  # Else there has been no first minute.
        for name in servers:
            assert max(look[name] for look in memory) <= 1.05 * memory[0][name]


def resident(pid):
    """Return the resident memory of a process and all that it has started, in MB, by pid."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    found = {pid: round(int(status["VmRSS"].split()[0]) / 1024, 1)}
    for child in children(pid):
        found |= resident(child)
    return found
