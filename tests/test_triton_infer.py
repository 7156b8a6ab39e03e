"""triton-infer.py against the real Triton: its exact answers, and its sentence for whatever goes wrong."""

import importlib
import shutil
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from conftest import free_ports

from mnist_preprocess import HOST, MODEL_NAME, ROOT, SAMPLE_IMAGE

triton_infer = importlib.import_module("triton-infer")


@pytest.fixture
def run(capsys):
    """Run triton-infer.py's main in this process; returns its status, stdout and stderr."""

    def run(*options):
        try:
            status = triton_infer.main([str(option) for option in options])
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def ask(run, triton):
    """Run it against the real server; a later option wins."""
    return lambda *options: run(f"--http-url={triton.http_url}", f"--grpc-url={triton.grpc_url}", *options)


def is_sentence(status, out, err):
    return (status, out) == (1, "") and err.startswith("triton-infer.py: ") and err.count("\n") == 1


def test_answers_two_lines(ask, keras_model, mnist_test, tmp_path):
    status, out, err = ask()
    digit = out.strip()[-1]
    assert digit.isdecimal()
    assert (status, err) == (0, "")
    assert out == f"HTTP Service | Prediction: {digit}\ngRPC Service | Prediction: {digit}\n"


def test_several_pictures_are_told_apart(ask, tmp_path):
    copy = tmp_path / "copy of it.png"
    shutil.copy(SAMPLE_IMAGE, copy)
    (_, one, _), (status, out, err) = ask(SAMPLE_IMAGE), ask(SAMPLE_IMAGE, copy)
    assert (status, err) == (0, "")
    assert out == "".join(f"{path}: {line}\n" for path in (SAMPLE_IMAGE, copy) for line in one.splitlines())


def test_help_and_usage_through_the_script_itself():
    result = subprocess.run([sys.executable, ROOT / "triton-infer.py", "--help"], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("usage: triton-infer.py")


@pytest.mark.parametrize(
    "option",
    [
        "--no-such-option",
        "--http-url=127.0.0.1",
        "--http-url=http://127.0.0.1:8000",
        "--grpc-url=:8001",
        "--grpc-url=127.0.0.1:port",
        "--grpc-url=127.0.0.1:70000",
        "--timeout=soon",
        "--timeout=0",
        "--timeout=-1",
        "--timeout=nan",
    ],
)
def test_wrong_usage(run, option):
    status, out, err = run(option)
    assert (status, out) == (2, "")
    assert err.startswith("usage: ")


@pytest.mark.parametrize("content", [None, b"", b"This is no picture.\n", SAMPLE_IMAGE.read_bytes()[:500]])
def test_file_that_is_no_picture(ask, tmp_path, content):
    path = tmp_path / "digit.png"
    if content is not None:
        path.write_bytes(content)
    status, out, err = ask(path)
    assert is_sentence(status, out, err), err
    assert f"cannot read a digit from {path}: " in err


def test_folder_is_no_picture(ask, tmp_path):
    assert is_sentence(*ask(tmp_path))


def test_unknown_model(ask):
    status, out, err = ask("--model-name=no_such_model")
    assert is_sentence(status, out, err), err
    assert "no_such_model" in err


def test_model_of_another_shape(ask, triton):
    with triton.http as client:
        client.load_model("double")
    try:
        status, out, err = ask("--model-name=double")
    finally:
        with triton.http as client:
            client.unload_model("double")
    assert is_sentence(status, out, err), err
    assert "the inputs of double are x FP32 [-1, 2], not input_1 FP32 [-1, 28, 28, 1]" in err


@pytest.mark.parametrize("service", ["http", "grpc"])
def test_server_is_away(ask, service):
    url = f"{HOST}:{free_ports(1)[0]}"
    status, out, err = ask(f"--{service}-url={url}")
    # The service that does answer may have answered already.
    assert (status, err.count("\n")) == (1, 1)
    assert err.startswith(f"triton-infer.py: no Triton answers at {url} (")
    assert err.endswith("): start it with scripts/triton_local.sh\n")
    assert out.count("\n") == ["http", "grpc"].index(service)


@pytest.mark.parametrize("service", ["http", "grpc"])
def test_server_that_never_answers(ask, service):
    with socket.create_server((HOST, 0)) as listener:
        url = f"{HOST}:{listener.getsockname()[1]}"
        start = time.monotonic()
        status, _, err = ask(f"--{service}-url={url}", "--timeout=1")
        assert time.monotonic() - start < 10
    assert (status, err.count("\n")) == (1, 1)
    assert err.startswith("triton-infer.py: ")
    assert url in err


GARBAGE = {
    "a page": (200, b"<html>It works!</html>"),
    "other JSON": (200, b'{"hello": "world"}'),
    "a list": (200, b"[1]"),
    "nothing": (200, b""),
    "an error page": (500, b"<html>It does not work!</html>"),
    "another service": (404, b"<html>Not found</html>"),
}


class Garbage(BaseHTTPRequestHandler):
    """Answers every request with something that Triton does not say."""

    def do_GET(self):
        status, body = GARBAGE[self.server.kind]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *arguments):
        pass


@pytest.mark.parametrize("kind", GARBAGE)
@pytest.mark.parametrize("service", ["http", "grpc"])
def test_server_that_is_no_triton(ask, service, kind):
    with HTTPServer((HOST, 0), Garbage) as server:
        server.kind = kind
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            url = f"{HOST}:{server.server_port}"
            status, _, err = ask(f"--{service}-url={url}", "--timeout=5")
        finally:
            server.shutdown()
            thread.join()
    assert (status, err.count("\n")) == (1, 1), err
    assert err.startswith("triton-infer.py: ")
    assert url in err


def test_line_that_is_no_http(ask):
    def answer():
        connection, _ = listener.accept()
        connection.recv(1000)
        connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
        connection.close()

    with socket.create_server((HOST, 0)) as listener:
        thread = threading.Thread(target=answer)
        thread.start()
        status, out, err = ask(f"--http-url={HOST}:{listener.getsockname()[1]}", "--timeout=5")
        thread.join()
    assert is_sentence(status, out, err), err


def test_default_is_the_project_s_own_model():
    args = triton_infer.parse_args([])
    assert (args.images, args.model_name) == ([SAMPLE_IMAGE], MODEL_NAME)
    assert (args.http_url, args.grpc_url) == ("127.0.0.1:8000", "127.0.0.1:8001")
