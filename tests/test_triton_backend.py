"""The drop-in TensorFlow backend, asked over real HTTP and gRPC through the real server."""

import json
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tritonclient import grpc, http
from tritonclient.utils import InferenceServerException, np_to_triton_dtype, triton_to_np_dtype

from mnist_preprocess import INPUT_NAME, MODEL_NAME, OUTPUT_NAME, ROOT

# Two rows of three for each of Triton's data types, the extremes among them.
ROWS = {
    "BOOL": [[True, False, False], [False, True, True]],
    **{
        name: [[np.iinfo(dtype).min, 1, np.iinfo(dtype).max], [2, 3, 4]]
        for name in ("UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64")
        for dtype in [triton_to_np_dtype(name)]
    },
    **{
        name: [[-0.5, 0.0, np.inf], [np.finfo(dtype).max, np.finfo(dtype).tiny, 1.0]]
        for name, dtype in (("FP16", np.float16), ("FP32", np.float32), ("FP64", np.float64))
    },
    "BF16": [[-0.5, 0.0, np.inf], [2.0**127, 2.0**-126, 1.0]],
    "BYTES": [[b"sieben", "\u4e03".encode(), b""], [b"\x00\xff\x00", b"a b", b"x" * 5000]],
}
LOOKUP = """
max_batch_size: 8
input { name: "index" data_type: TYPE_INT32 dims: [1] }
input { name: "text" data_type: TYPE_STRING dims: [1] }
input { name: "numbers" data_type: TYPE_FP32 dims: [-1] }
output { name: "value" data_type: TYPE_FP32 dims: [1] }
output { name: "echo" data_type: TYPE_STRING dims: [1] }
output { name: "total" data_type: TYPE_FP32 dims: [1] }
# It waits long enough for eight rows of several clients to become one batch on a busy machine.
dynamic_batching { preferred_batch_size: [8] max_queue_delay_microseconds: 10000000 }
instance_group { count: 1 }
"""
SCALE = """
input { name: "factor" dims: [1] }
output { name: "scaled" }
output { name: "total" dims: [1] }
output { name: "note" dims: [1] }
"""
ONE_INSTANCE = "max_batch_size: 8 instance_group { count: 1 }"
DOUBLE = """
backend: "tensorflow"
max_batch_size: 8
input {{ name: "{input}" data_type: {data_type} dims: [{size}] }}
output {{ name: "{output}" data_type: TYPE_FP32 dims: [2] }}
instance_group {{ count: 1 }}
"""


@pytest.fixture(params=[http, grpc], ids=["http", "grpc"])
def protocol(request, triton):
    """A client module and a client of it."""
    with getattr(triton, request.param.__name__.rpartition(".")[2]) as client:
        yield request.param, client


@pytest.fixture(scope="module")
def load(triton, triton_repository):
    """Load a model with this text as its config.pbtxt, or with none; returns its completed configuration."""

    def load(name, config=None):
        if config is not None:
            (triton_repository / name / "config.pbtxt").write_text(config)
        with triton.http as client:
            client.load_model(name)
            return client.get_model_config(name)

    return load


@pytest.fixture
def load_double(load, triton, triton_repository, request):
    """Load the model `double` with this config.pbtxt under a name of the test's own, until the test ends."""
    name = re.sub(r"\W+", "_", request.node.name)[:100]
    shutil.copytree(triton_repository / "double", triton_repository / name)
    yield lambda config: load(name, config)
    with triton.http as client:
        client.unload_model(name)


@pytest.fixture(scope="module")
def every_type(load):
    return load("every_type")


@pytest.fixture(scope="module")
def lookup(load):
    return load("lookup", LOOKUP)


@pytest.fixture(scope="module")
def scale(load):
    return load("scale", SCALE)


@pytest.fixture(scope="module")
def twin(load, triton_repository):
    """The model `double` with a LiteRT twin, under the name `twin`."""
    shutil.copytree(triton_repository / "double", triton_repository / "twin")
    path = triton_repository / "twin" / "1" / "model.savedmodel"
    result = subprocess.run([sys.executable, ROOT / "saved_model.py", path], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return load("twin", ONE_INSTANCE)["name"]


def libraries(triton_repository, model):
    """Return which files the processes that run a model have mapped, as one text."""
    found = ""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"{triton_repository / model}/" in (process / "cmdline").read_text():
                found += (process / "maps").read_text()
        except OSError:  # It is another user's, or has just ended.
            continue
    return found


def infer(client_module, client, model, outputs=None, **arrays):
    """Run the model on the arrays and return the outputs by name."""
    inputs = []
    for name, array in arrays.items():
        tensor = client_module.InferInput(name, array.shape, np_to_triton_dtype(array.dtype))
        inputs.append(tensor.set_data_from_numpy(array))
    requested = [client_module.InferRequestedOutput(name) for name in outputs] if outputs else None
    results = client.infer(model, inputs, outputs=requested)
    response = results.get_response()
    response = response if isinstance(response, dict) else grpc_dictionary(response)
    return {output["name"]: results.as_numpy(output["name"]) for output in response["outputs"]}


def grpc_dictionary(response):
    return {"outputs": [{"name": output.name} for output in response.outputs]}


def lookup_rows(*indices, length=1):
    """Inputs of the model `lookup`, one row per index."""
    return {
        "index": np.array(indices, np.int32).reshape(-1, 1),
        "text": np.array([str(index).encode() for index in indices], np.object_).reshape(-1, 1),
        "numbers": np.full((len(indices), length), 2, np.float32),
    }


def ask_together(triton, requests):
    """Send the requests at once; returns their outputs or exceptions, and how many runs Triton made of them."""

    def counted():
        """Return how many rows Triton has run, and in how many runs."""
        (statistics,) = client.get_inference_statistics("lookup").model_stats
        rows = sum(batch.batch_size * batch.compute_infer.count for batch in statistics.batch_stats)
        return rows, statistics.execution_count

    def ask(inputs):
        try:
            return infer(grpc, client, "lookup", **inputs)
        except InferenceServerException as error:
            return error

    with triton.grpc as client, ThreadPoolExecutor(len(requests)) as pool:
        rows, executions = counted()
        rows += sum(len(inputs["index"]) for inputs in requests)
        answers = list(pool.map(ask, requests))
        deadline = time.monotonic() + 10  # Triton counts a run after it has sent the answers.
        while counted()[0] < rows and time.monotonic() < deadline:
            time.sleep(0.01)
        return answers, counted()[1] - executions


def test_every_data_type_there_and_back(protocol, every_type):
    arrays = {name: np.array(rows, triton_to_np_dtype(name)) for name, rows in ROWS.items()}
    weight = np.array([[1], [2]], np.float32)
    outputs = infer(*protocol, "every_type", weight=weight, **{f"in_{name}": array for name, array in arrays.items()})
    assert (outputs.pop("doubled") == 2 * weight).all()
    assert set(outputs) == {f"out_{name}" for name in ROWS}
    for name, array in arrays.items():
        assert outputs[f"out_{name}"].dtype == array.dtype, name
        assert (outputs[f"out_{name}"] == array[:, ::-1]).all(), name


def test_without_config_everything_comes_from_the_signature(every_type):
    assert every_type["backend"] == "tensorflow"
    assert every_type["max_batch_size"] == 4
    assert every_type["dynamic_batching"]["preferred_batch_size"] == [4]
    types = {name: "TYPE_STRING" if name == "BYTES" else f"TYPE_{name}" for name in ROWS}
    for side, prefix, scalar in (("input", "in", "weight"), ("output", "out", "doubled")):
        tensors = {tensor["name"]: (tensor["data_type"], tensor["dims"]) for tensor in every_type[side]}
        assert tensors.pop(scalar) == ("TYPE_FP32", [1])
        assert tensors == {f"{prefix}_{name}": (data_type, [3]) for name, data_type in types.items()}


def test_unbatched_model_with_scalars_whose_dims_are_given(protocol, scale):
    assert scale["max_batch_size"] == 0
    assert {tensor["name"]: tensor["dims"] for tensor in scale["input"]} == {"matrix": [2, -1], "factor": [1]}
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    outputs = infer(*protocol, "scale", matrix=matrix, factor=np.array([3], np.float32))
    assert (outputs["scaled"] == 3 * matrix).all()
    assert outputs["total"].tolist() == [15.0]
    assert outputs["note"].tolist() == [b"\x003\x00"]


@pytest.mark.parametrize("line", ['platform: "tensorflow_savedmodel"', 'backend: "tensorflow"'])
def test_one_line_of_config_is_enough(triton, load_double, line):
    config = load_double(line)
    assert [(t["name"], t["data_type"], t["dims"]) for t in config["input"]] == [("x", "TYPE_FP32", [2])]
    with triton.grpc as client:
        outputs = infer(grpc, client, config["name"], x=np.array([[1, 2]], np.float32))
    assert outputs["y"].tolist() == [[2, 4]]


def test_dims_that_count_the_batch_leave_the_model_unbatched(triton, load_double):
    config = load_double('input { name: "x" data_type: TYPE_FP32 dims: [-1, 2] }')
    assert config["max_batch_size"] == 0
    assert config["output"][0]["dims"] == [-1, 2]
    with triton.grpc as client:
        assert infer(grpc, client, config["name"], x=np.ones((9, 2), np.float32))["y"].tolist() == [[2, 2]] * 9


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"input": "z"}, "unexpected inference input 'z', allowed inputs are: x"),
        ({"output": "output_1"}, "unexpected inference output 'output_1', allowed outputs are: y"),
        (
            {"data_type": "TYPE_UINT8"},
            "configuration expects datatype TYPE_UINT8 for input 'x', model provides TYPE_FP32",
        ),
        (
            {"size": 3},
            "tensor 'x': the model expects 2 dimensions (shape [-1,2]) but the model configuration specifies 2 "
            "dimensions (an initial batch dimension because max_batch_size > 0 followed by the explicit tensor shape, "
            "making complete shape [-1,3])",
        ),
    ],
)
def test_config_that_contradicts_the_signature_is_refused(load_double, given, sentence):
    values = {"input": "x", "data_type": "TYPE_FP32", "size": 2, "output": "y"} | given
    with pytest.raises(InferenceServerException) as refusal:
        load_double(DOUBLE.format(**values))
    assert sentence in str(refusal.value)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("complex", "input 'x': Triton has no data type for TensorFlow's complex64"),
        (
            "any_rank",
            "Unable to autofill for 'any_rank': the rank of model tensor 'x' is 0 and dimensions are not defined",
        ),
    ],
)
def test_signature_that_triton_cannot_carry_is_refused(load, model, sentence):
    with pytest.raises(InferenceServerException) as refusal:
        load(model)
    assert sentence in str(refusal.value)


def test_requests_are_joined_and_each_gets_its_own_rows(triton, lookup):
    requests = [lookup_rows(3), lookup_rows(0, 1), lookup_rows(1, 2, 3, 0, 2)]
    answers, executions = ask_together(triton, requests)
    assert executions == 1
    for request, answer in zip(requests, answers, strict=True):
        assert (answer["value"] == request["index"] + 0.5).all()
        assert (answer["echo"] == request["text"] + b"!").all()
        assert (answer["total"] == 2).all()


def test_one_bad_request_fails_alone(triton, lookup):
    answers, executions = ask_together(triton, [lookup_rows(index) for index in (0, 1, 2, 9, 3, 2, 1, 0)])
    assert executions == 1
    error = answers.pop(3)
    assert error.message() == "TensorFlow cannot run the model on these inputs: indices[0,0] = 9 is not in [0, 4)"
    assert [answer["value"].tolist() for answer in answers] == [[[index + 0.5]] for index in (0, 1, 2, 3, 2, 1, 0)]


def test_only_requested_outputs_are_sent(protocol, lookup):
    outputs = infer(*protocol, "lookup", outputs=["echo"], **lookup_rows(0, 1, 2, 3, 0, 1, 2, 3))
    assert set(outputs) == {"echo"}


def test_a_twin_runs_without_tensorflow_until_it_is_asked_what_it_cannot_answer(triton, triton_repository, twin):
    assert "twin_0_0: run by LiteRT on the CPU" in triton.log.read_text()
    with triton.grpc as client:
        for rows in (1, 3, 8, 2):
            x = np.arange(2 * rows, dtype=np.float32).reshape(rows, 2)
            assert (infer(grpc, client, twin, x=x)["y"] == 2 * x).all()
        loaded = libraries(triton_repository, twin)
        assert "litert" in loaded
        assert "libtensorflow" not in loaded
        assert np.isnan(infer(grpc, client, twin, x=np.full((1, 2), np.nan, np.float32))["y"]).all()
    assert "libtensorflow" in libraries(triton_repository, twin)


def test_mnist_digits(protocol):
    with np.load(ROOT / "images" / "mnist.npz") as data:
        pictures, digits = data["x_test"][:16, ..., None].astype(np.float32), data["y_test"][:16]
    scores = infer(*protocol, MODEL_NAME, **{INPUT_NAME: pictures})[OUTPUT_NAME]
    assert np.allclose(scores.sum(axis=1), 1, atol=1e-5)
    assert (scores.argmax(axis=1) == digits).mean() > 0.9


def test_classes_come_with_their_labels(protocol):
    client_module, client = protocol
    pictures = client_module.InferInput(INPUT_NAME, [1, 28, 28, 1], "FP32")
    pictures.set_data_from_numpy(np.zeros((1, 28, 28, 1), np.float32))
    best = client_module.InferRequestedOutput(OUTPUT_NAME, class_count=3)
    rows = client.infer(MODEL_NAME, [pictures], outputs=[best]).as_numpy(OUTPUT_NAME)
    fields = [entry.decode().split(":") for entry in rows.ravel()]
    assert len(fields) == 3
    assert all(index == label and 0 <= float(probability) <= 1 for probability, index, label in fields)


def test_plain_json_over_http(triton):
    body = {"inputs": [{"name": INPUT_NAME, "shape": [1, 28, 28, 1], "datatype": "FP32", "data": [0] * 784}]}
    request = urllib.request.Request(
        f"http://{triton.http_url}/v2/models/{MODEL_NAME}/infer", json.dumps(body).encode(), method="POST"
    )
    with urllib.request.urlopen(request) as response:
        (output,) = json.load(response)["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == (OUTPUT_NAME, "FP32", [1, 10])
    assert sum(output["data"]) == pytest.approx(1, abs=1e-5)
