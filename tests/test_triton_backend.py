"""The drop-in TensorFlow backend, asked over real HTTP and gRPC through the real server."""

import json
import shutil
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import stub, wait_for
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
dynamic_batching { preferred_batch_size: [8] max_queue_delay_microseconds: 60000000 }
instance_group { count: 1 }
"""
SCALE = """
input { name: "factor" dims: [1] }
output { name: "scaled" }
output { name: "total" dims: [1] }
output { name: "note" dims: [1] }
instance_group { count: 1 }
"""
UNBATCHED = 'input { name: "x" data_type: TYPE_FP32 dims: [-1, 2] } instance_group { count: 1 }'
ONE_INSTANCE = "max_batch_size: 8 instance_group { count: 1 }"


SERVED = {
    "every_type": ("every_type", None),
    "lookup": ("lookup", LOOKUP),
    "scale": ("scale", SCALE),
    "unbatched": ("double", UNBATCHED),
    "twin": ("double_lite", ONE_INSTANCE),
}


@pytest.fixture(params=[http, grpc], ids=["http", "grpc"])
def protocol(request, models):
    """A client module and a client of it."""
    with getattr(models, request.param.__name__.rpartition(".")[2]) as client:
        yield request.param, client


@pytest.fixture(scope="module")
def mnist(models, trained_repository):
    """Load the trained model as the project configures it."""
    shutil.copytree(trained_repository / MODEL_NAME, models.repository / MODEL_NAME)
    models.load(MODEL_NAME)


@pytest.fixture(scope="module", autouse=True)
def _(served):
    """Load the models of the table."""


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


def ask_together(models, requests):
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

    with models.grpc as client, ThreadPoolExecutor(len(requests)) as pool:
        rows, executions = counted()
        rows += sum(len(inputs["index"]) for inputs in requests)
        answers = list(pool.map(ask, requests))
        wait_for(lambda: counted()[0] >= rows)  # Triton counts a run after it has sent the answers.
        return answers, counted()[1] - executions


def test_every_data_type_there_and_back(protocol):
    arrays = {name: np.array(rows, triton_to_np_dtype(name)) for name, rows in ROWS.items()}
    weight = np.array([[1], [2]], np.float32)
    outputs = infer(*protocol, "every_type", weight=weight, **{f"in_{name}": array for name, array in arrays.items()})
    assert (outputs.pop("doubled") == 2 * weight).all()
    assert set(outputs) == {f"out_{name}" for name in ROWS}
    for name, array in arrays.items():
        assert outputs[f"out_{name}"].dtype == array.dtype, name
        assert (outputs[f"out_{name}"] == array[:, ::-1]).all(), name


def test_without_config_everything_comes_from_the_signature(served):
    every_type = served["every_type"].result()
    assert every_type["backend"] == "tensorflow"
    assert every_type["max_batch_size"] == 4
    assert every_type["dynamic_batching"]["preferred_batch_size"] == [4]
    types = {name: "TYPE_STRING" if name == "BYTES" else f"TYPE_{name}" for name in ROWS}
    for side, prefix, scalar in (("input", "in", "weight"), ("output", "out", "doubled")):
        tensors = {tensor["name"]: (tensor["data_type"], tensor["dims"]) for tensor in every_type[side]}
        assert tensors.pop(scalar) == ("TYPE_FP32", [1])
        assert tensors == {f"{prefix}_{name}": (data_type, [3]) for name, data_type in types.items()}


def test_unbatched_model_with_scalars_whose_dims_are_given(protocol, served):
    scale = served["scale"].result()
    assert scale["max_batch_size"] == 0
    assert {tensor["name"]: tensor["dims"] for tensor in scale["input"]} == {"matrix": [2, -1], "factor": [1]}
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    outputs = infer(*protocol, "scale", matrix=matrix, factor=np.array([3], np.float32))
    assert (outputs["scaled"] == 3 * matrix).all()
    assert outputs["total"].tolist() == [15.0]
    assert outputs["note"].tolist() == [b"\x003\x00"]


def test_dims_that_count_the_batch_leave_the_model_unbatched(models, served):
    config = served["unbatched"].result()
    assert config["max_batch_size"] == 0
    assert config["output"][0]["dims"] == [-1, 2]
    with models.grpc as client:
        assert infer(grpc, client, "unbatched", x=np.ones((9, 2), np.float32))["y"].tolist() == [[2, 2]] * 9


def test_requests_are_joined_and_each_gets_its_own_rows(models):
    requests = [lookup_rows(3), lookup_rows(0, 1), lookup_rows(1, 2, 3, 0, 2)]
    answers, executions = ask_together(models, requests)
    assert executions == 1
    for request, answer in zip(requests, answers, strict=True):
        assert (answer["value"] == request["index"] + 0.5).all()
        assert (answer["echo"] == request["text"] + b"!").all()
        assert (answer["total"] == 2).all()


def test_one_bad_request_fails_alone(models):
    answers, executions = ask_together(models, [lookup_rows(index) for index in (0, 1, 2, 9, 3, 2, 1, 0)])
    assert executions == 1
    error = answers.pop(3)
    assert error.message() == "TensorFlow cannot run the model on these inputs: indices[0,0] = 9 is not in [0, 4)"
    assert [answer["value"].tolist() for answer in answers] == [[[index + 0.5]] for index in (0, 1, 2, 3, 2, 1, 0)]


def test_only_requested_outputs_are_sent(protocol):
    outputs = infer(*protocol, "lookup", outputs=["echo"], **lookup_rows(0, 1, 2, 3, 0, 1, 2, 3))
    assert set(outputs) == {"echo"}


def test_a_twin_runs_without_tensorflow_until_it_is_asked_what_it_cannot_answer(models):
    wait_for(lambda: "twin_0_0: run by LiteRT on the CPU" in models.log.read_text())  # Log lines take their own way.
    libraries = stub(models, "twin") / "maps"
    with models.grpc as client:
        for rows in (1, 3, 8, 2):
            x = np.arange(2 * rows, dtype=np.float32).reshape(rows, 2)
            assert (infer(grpc, client, "twin", x=x)["y"] == 2 * x).all()
        assert "litert" in libraries.read_text()
        assert "libtensorflow" not in libraries.read_text()
        assert np.isnan(infer(grpc, client, "twin", x=np.full((1, 2), np.nan, np.float32))["y"]).all()
    assert "libtensorflow" in libraries.read_text()


def test_mnist_digits(protocol, mnist):
    with np.load(ROOT / "images" / "mnist.npz") as data:
        pictures, digits = data["x_test"][:16, ..., None].astype(np.float32), data["y_test"][:16]
    scores = infer(*protocol, MODEL_NAME, **{INPUT_NAME: pictures})[OUTPUT_NAME]
    assert np.allclose(scores.sum(axis=1), 1, atol=1e-5)
    assert (scores.argmax(axis=1) == digits).mean() > 0.9


def test_classes_come_with_their_labels(protocol, mnist):
    client_module, client = protocol
    pictures = client_module.InferInput(INPUT_NAME, [1, 28, 28, 1], "FP32")
    pictures.set_data_from_numpy(np.zeros((1, 28, 28, 1), np.float32))
    best = client_module.InferRequestedOutput(OUTPUT_NAME, class_count=3)
    rows = client.infer(MODEL_NAME, [pictures], outputs=[best]).as_numpy(OUTPUT_NAME)
    fields = [entry.decode().split(":") for entry in rows.ravel()]
    assert len(fields) == 3
    assert all(index == label and 0 <= float(probability) <= 1 for probability, index, label in fields)


def test_plain_json_over_http(models, mnist):
    body = {"inputs": [{"name": INPUT_NAME, "shape": [1, 28, 28, 1], "datatype": "FP32", "data": [0] * 784}]}
    request = urllib.request.Request(
        f"http://{models.http_url}/v2/models/{MODEL_NAME}/infer", json.dumps(body).encode(), method="POST"
    )
    with urllib.request.urlopen(request) as response:
        (output,) = json.load(response)["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == (OUTPUT_NAME, "FP32", [1, 10])
    assert sum(output["data"]) == pytest.approx(1, abs=1e-5)
