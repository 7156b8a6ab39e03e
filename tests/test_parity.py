"""One model, four ways to ask it: Keras, Flask, Triton over HTTP and over gRPC give the same answers."""

import io
import json
import shutil
import subprocess
import urllib.request
from http.client import HTTPConnection

import numpy as np
import pytest
from conftest import flask_server, require
from PIL import Image
from tritonclient import grpc, http

from mnist_preprocess import HOST, INPUT_NAME, MODEL_NAME, OUTPUT_NAME

COUNT = 1000
BATCH_SIZE = 4  # No more than any sensible max_batch_size in config.pbtxt.


@pytest.fixture(scope="module")
def pictures(mnist_test):
    return mnist_test[0][:COUNT]


@pytest.fixture(scope="module")
def expected(keras_model, pictures):
    return keras_model.predict(pictures, verbose=0)


def ask_flask(port, pictures):
    answers = []
    connection = HTTPConnection(HOST, port, timeout=60)
    head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="digit.png"\r\n\r\n'
    for picture in pictures:
        file = io.BytesIO()
        Image.fromarray(picture[..., 0]).save(file, "PNG")
        body = head + file.getvalue() + b"\r\n--x--\r\n"
        connection.request("POST", "/mnist_infer?details=1", body, {"Content-Type": "multipart/form-data; boundary=x"})
        answer = json.load(connection.getresponse())
        assert answer["Prediction"] == str(np.argmax(answer["Probabilities"]))
        answers.append(answer["Probabilities"])
    connection.close()
    return np.array(answers)


def ask_triton(client_module, client, pictures):
    answers = []
    for start in range(0, len(pictures), BATCH_SIZE):
        batch = pictures[start : start + BATCH_SIZE].astype(np.float32)
        inputs = [client_module.InferInput(INPUT_NAME, batch.shape, "FP32")]
        inputs[0].set_data_from_numpy(batch)
        outputs = [client_module.InferRequestedOutput(OUTPUT_NAME)]
        answers.append(client.infer(MODEL_NAME, inputs, outputs=outputs).as_numpy(OUTPUT_NAME))
    return np.concatenate(answers)


def check(answers, expected):
    assert answers.shape == expected.shape == (COUNT, 10)
    assert np.array_equal(answers.argmax(1), expected.argmax(1))
    np.testing.assert_allclose(answers, expected, rtol=0, atol=1e-5)


def test_the_model_has_learnt_something(expected, mnist_test):
    """Else every server could answer the same digit to all, and be right."""
    assert (expected.argmax(1) == mnist_test[1][:COUNT]).mean() > 0.5
    assert len(set(expected.argmax(1))) == 10


def test_flask_answers_as_keras_does(expected, pictures, trained_repository, tmp_path):
    with flask_server(tmp_path / "log", trained_repository) as server:
        check(ask_flask(server.port, pictures), expected)


@pytest.mark.parametrize("client_module", [http, grpc], ids=["HTTP", "gRPC"])
def test_triton_answers_as_keras_does(expected, pictures, triton, client_module):
    with triton.http if client_module is http else triton.grpc as client:
        check(ask_triton(client_module, client, pictures), expected)


def test_raw_json_request_of_784_numbers(expected, pictures, triton, tmp_path):
    require(shutil.which("curl"), "there is no curl command")
    tensor = {"name": "input_1", "shape": [1, 28, 28, 1], "datatype": "FP32", "data": pictures[0].ravel().tolist()}
    assert len(tensor["data"]) == 784
    (tmp_path / "request.json").write_text(json.dumps({"inputs": [tensor]}))
    url = f"http://{triton.http_url}/v2/models/mnist_model/infer"
    command = ["curl", "-sS", "-X", "POST", "-d", f"@{tmp_path / 'request.json'}", url]
    answer = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    (output,) = answer["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("output_1", "FP32", [1, 10])
    np.testing.assert_allclose(output["data"], expected[0], rtol=0, atol=1e-5)


def test_config_is_json(triton):
    with urllib.request.urlopen(f"http://{triton.http_url}/v2/models/mnist_model/config") as answer:
        config = json.load(answer)
    assert [tensor["name"] for tensor in (*config["input"], *config["output"])] == ["input_1", "output_1"]
