"""The engines that answer for the Flask server: the model in its own processes, or a Triton that is asked over gRPC.

An engine has a `name`, and predict(batch), which takes (n, 28, 28, 1) float32 and returns probabilities (n, 10) float32
and the model's version, or raises EngineError. Each worker calls begin() before it opens the port, and refresh() once a
second then.
"""

import json
import multiprocessing
import re
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
from werkzeug.exceptions import ServiceUnavailable

from mnist_preprocess import CLASSES, IMAGE_SHAPE, INPUT_NAME, MODEL_NAME, OUTPUT_NAME
from saved_model import SAVED_MODEL, ModelError, SavedModel, TensorSpec, newest_version, versions

TRITON_SECONDS = 5  # How long Triton may take for an answer, with all attempts: gRPC tells it the deadline.
DNS_SECONDS = 5  # gRPC looks a name up again at most so often; by default every 30 s, too slow for a rolling update.
RETRY = {
    "maxAttempts": 5,
    "initialBackoff": "0.05s",
    "maxBackoff": "0.5s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],
}
SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [{"name": [{"service": "inference.GRPCInferenceService"}], "retryPolicy": RETRY}],
}
SCHEMES = ("dns:", "ipv4:", "ipv6:", "unix:")  # Of names that gRPC resolves itself.


class EngineError(ServiceUnavailable):
    """An engine that cannot answer; the description is a sentence for the user."""


class LocalEngine:
    """The newest version of the model in a directory, in this process: refresh() takes over what is published there."""

    def __init__(self, model_directory):
        """Find a version to begin with. Raises ModelError when there is none, or none that can be served."""
        self._directory = Path(model_directory)
        self._refused = {}  # Why, by number.
        self._last_complaint = multiprocessing.Value("q", -1)  # What it is about: one for all workers.
        self._lock = threading.Lock()
        self._model, self._version = None, newest_version(model_directory).name
        self.refresh(run=False)
        self.name = self._model.runtime.partition(":")[0]

    def begin(self):
        self._model = None
        self.refresh()

    def refresh(self, run=True):
        """Take over the newest version that can be served, unless it is already. ModelError when there is none."""
        numbers = versions(self._directory)
        for number in reversed(numbers):
            if self._model and str(number) == self._version:
                break
            if number not in self._refused:
                try:
                    model = load(self._directory / str(number), run)
                except (ModelError, OSError) as error:
                    self._refused[number] = error
                else:
                    with self._lock:
                        self._model, self._version = model, str(number)
                    break
        newest = max(numbers, default=0)
        if self._model is None:
            raise self._refused.get(newest) or ModelError(f"no version in {self._directory} any more")
        if not numbers:
            self._complain(0, f"no version in {self._directory} any more: {self._version} goes on being served")
        elif newest in self._refused:
            self._complain(newest, f"{self._version} is served, not {newest}: {self._refused[newest]}")

    def predict(self, batch):
        # A second call at the same time would open the version's files, which may be gone by now.
        with self._lock:
            try:
                return self._model.predict({INPUT_NAME: batch})[OUTPUT_NAME], self._version
            except ModelError as error:
                raise EngineError(str(error)) from error

    def _complain(self, number, sentence):
        with self._last_complaint.get_lock():
            if self._last_complaint.value != number:
                self._last_complaint.value = number
                print(f"server.py: {sentence}", file=sys.stderr, flush=True)


def load(version, run):
    """Return the SavedModel of a version's directory, warm if it shall `run`. ModelError when it is not one of MNIST's.

    TensorFlow does not survive a fork, so the main process runs no model.
    """
    model = SavedModel(version / SAVED_MODEL)
    batch, probabilities = TensorSpec("float32", (None, *IMAGE_SHAPE)), TensorSpec("float32", (None, CLASSES))
    if model.inputs != {INPUT_NAME: batch} or model.outputs.get(OUTPUT_NAME) != probabilities:
        raise ModelError(f"{version} takes or gives other tensors than {INPUT_NAME} and {OUTPUT_NAME} of train.py")
    if run:
        answer = model.predict({INPUT_NAME: np.zeros((1, *IMAGE_SHAPE), np.float32)})[OUTPUT_NAME]
        if answer.shape != (1, CLASSES) or not np.isfinite(answer).all():
            raise ModelError(f"{version} answers {answer.shape} or no numbers")
    return model


class TritonEngine:
    """The model in Triton, at the addresses HOST:PORT[,HOST:PORT...] or at a name for gRPC such as dns:///NAME:PORT."""

    def __init__(self, addresses):
        """Raises OSError when one of several hosts is not found; gRPC goes on looking for a single one."""
        self.name = f"Triton at {addresses}"
        pairs = [(host.strip("[]"), port) for host, _, port in (part.rpartition(":") for part in addresses.split(","))]
        named = addresses.startswith(SCHEMES) or len(pairs) == 1
        self._target = addresses if named else numeric_target(pairs)
        self._arguments = [
            ("grpc.service_config", json.dumps(SERVICE_CONFIG)),
            ("grpc.dns_min_time_between_resolutions_ms", 1000 * DNS_SECONDS),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 1000),
            ("grpc.max_reconnect_backoff_ms", 1000),  # Else a Triton that comes back is found after up to 2 minutes.
            ("grpc.enable_http_proxy", int(not all(re.match(r"127\.|::1$|localhost$", host) for host, _ in pairs))),
        ]

    def begin(self):
        import grpc  # Here, for gRPC does not survive a fork.
        from tritonclient.grpc import InferResult, service_pb2, service_pb2_grpc

        self._grpc, self._messages, self._result = grpc, service_pb2, InferResult
        channel = grpc.insecure_channel(self._target, self._arguments)
        self._model_infer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer

    def refresh(self):
        """Do nothing: Triton looks for new versions."""

    def predict(self, batch):
        # The message itself, which takes half the time that tritonclient's own classes do to make it.
        request = self._messages.ModelInferRequest(
            model_name=MODEL_NAME,
            inputs=[{"name": INPUT_NAME, "datatype": "FP32", "shape": batch.shape}],
            raw_input_contents=[batch.tobytes()],
        )
        try:
            response = self._infer(request, time.monotonic() + TRITON_SECONDS)
            probabilities = self._result(response).as_numpy(OUTPUT_NAME)
        except self._grpc.RpcError as error:
            if error.code().name in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
                raise EngineError(f"{self.name} does not answer; ask again in a moment") from error
            raise EngineError(f"{self.name} has no answer: {' '.join(error.details().split())}") from error
        if probabilities is None or probabilities.shape != (len(batch), CLASSES):
            raise EngineError(f"{self.name} gives no {OUTPUT_NAME} of shape {(len(batch), CLASSES)}: is it our model?")
        return probabilities, response.model_version

    def _infer(self, request, deadline):
        """Ask again where a Triton stops: it still answers, but cancels requests and has no model, and others do."""
        while True:
            try:
                return self._model_infer(request, timeout=deadline - time.monotonic())
            except self._grpc.RpcError as error:
                give_up = time.monotonic() > deadline - TRITON_SECONDS / 2
                if error.code().name not in ("NOT_FOUND", "CANCELLED") or give_up:
                    raise
                time.sleep(0.05)


def numeric_target(pairs):
    """Return gRPC's name for several hosts and ports, which takes addresses of one family. Raises OSError."""
    families = {socket.AF_INET: ("ipv4", "{}:{}"), socket.AF_INET6: ("ipv6", "[{}]:{}")}
    for family, (scheme, form) in families.items():
        with suppress(socket.gaierror):
            found = [socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)[0][4] for host, port in pairs]
            return f"{scheme}:{','.join(form.format(*address[:2]) for address in found)}"
    raise OSError(f"no addresses of one family for {', '.join(host for host, _ in pairs)}")
