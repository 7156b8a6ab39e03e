"""triton-infer.py against the real Triton: its exact answers, and its sentence for whatever goes wrong."""

import importlib
import json
import os
import re
import shutil
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer

import grpc
import numpy as np
import pytest
from conftest import PATIENCE, free_ports, require, require_ipv6
from google.protobuf import json_format
from tritonclient import grpc as grpcclient
from tritonclient import http as httpclient
from tritonclient.grpc import service_pb2, service_pb2_grpc

from mnist_preprocess import HOST, MODEL_NAME, ROOT, SAMPLE_IMAGE, open_image, preprocess

triton_infer = importlib.import_module("triton-infer")

LONG = f"--timeout={PATIENCE}"  # For what shall be answered, on a busy machine as well.
over = threading.Event()  # So that a server which is silent stays so until a test is.


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
    addresses = f"--http-url={triton.http_url}", f"--grpc-url={triton.grpc_url}"
    return lambda *options: run(*addresses, LONG, *options)


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
        "--http-url=::1:8000",
        "--http-url=[::1]",
        "--http-url=[::1:8000",
        "--grpc-url=a b:8001",
        "--http-url=a@b:8000",
        "--top=0",
        "--top=11",
        "--top=all",
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


@pytest.mark.parametrize("service", ["http", "grpc"])
def test_server_is_away(ask, service):
    url = f"{HOST}:{free_ports(1)[0]}"
    status, out, err = ask(f"--{service}-url={url}")
    # The service that does answer may have answered already.
    assert (status, err.count("\n")) == (1, 1)
    assert err.startswith(f"triton-infer.py: no Triton answers at {url} (")
    assert err.endswith("): start it with scripts/triton_local.sh\n")
    assert out.count("\n") == ["http", "grpc"].index(service)


@pytest.mark.parametrize("client_module", [httpclient, grpcclient], ids=["http", "grpc"])
def test_server_that_never_answers(client_module):
    with socket.create_server((HOST, 0)) as listener:
        url = f"{HOST}:{listener.getsockname()[1]}"
        assert url in refused(client_module, url)


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
            status, _, err = ask(f"--{service}-url={url}")
        finally:
            server.shutdown()
            thread.join()
    assert (status, err.count("\n")) == (1, 1), err
    assert err.startswith("triton-infer.py: ")
    assert url in err


METADATA = {
    "name": MODEL_NAME,
    "inputs": [{"name": "input_1", "datatype": "FP32", "shape": [-1, 28, 28, 1]}],
    "outputs": [{"name": "output_1", "datatype": "FP32", "shape": [-1, 10]}],
}
PROBABILITIES = [0.01] * 7 + [0.91] + [0.01] * 2
FLOATS = np.float32(PROBABILITIES).tobytes()
SILENCE_SECONDS = 50  # Longer than any client here waits, and less than the 60 s after which the HTTP client gives up.


def reply(body, status="200 OK", length=None, **headers):
    """Return an HTTP answer; a body that is not of bytes becomes JSON."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Length": len(body) if length is None else length} | headers
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status}\r\n{lines}\r\n".encode() + body


def output(**changes):
    """Return an answer to an inference, right but for the changes; None leaves a member out."""
    tensor = {"name": "output_1", "datatype": "FP32", "shape": [1, 10], "data": PROBABILITIES} | changes
    return reply({"outputs": [{name: value for name, value in tensor.items() if value is not None}]})


def binary(size=40, raw=FLOATS, header_length=None, **changes):
    """Return the same with its numbers as bytes behind the JSON, as the client asks for them."""
    tensor = {"name": "output_1", "datatype": "FP32", "shape": [1, 10], "parameters": {"binary_data_size": size}}
    header = json.dumps({"outputs": [tensor | changes]}).encode()
    length = len(header) if header_length is None else header_length
    return reply(header + raw, Inference_Header_Content_Length=length)


def classes(*texts):
    raw = b"".join(struct.pack("<I", len(text)) + text for text in texts)
    return binary(len(raw), raw, datatype="BYTES", shape=[1, len(texts)])


def silence():
    yield b""
    over.wait(SILENCE_SECONDS)


def drip():
    yield b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"
    while True:
        time.sleep(0.2)
        yield b" "


def drip_headers():
    yield b"HTTP/1.1 200 OK\r\n"
    while True:
        time.sleep(0.2)
        yield b"X: y\r\n"


def torrent():
    yield b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    while True:
        yield b"10000\r\n" + b" " * 0x10000 + b"\r\n"


# What an HTTP server may say when it is asked for the model's metadata, and then, where the metadata is right, for an
# inference. Each is a sentence, in time, and never a digit.
BAD_METADATA = {
    "deep JSON": reply(b"[" * 100_000 + b"]" * 100_000),
    "deep object": reply(b'{"inputs":' * 100_000),
    "a number": reply(7),
    "a string": reply("inputs"),
    "null": reply(None),
    "not UTF-8": reply(b'{"inputs": "\xff\xfe"}'),
    "inputs of text": reply(METADATA | {"inputs": "input_1"}),
    "inputs of numbers": reply(METADATA | {"inputs": [1, 2]}),
    "inputs null": reply(METADATA | {"inputs": None}),
    "no outputs": reply({"inputs": METADATA["inputs"]}),
    "shape of text": reply(METADATA | {"inputs": [{"name": "input_1", "datatype": "FP32", "shape": ["x"]}]}),
    "shape null": reply(METADATA | {"inputs": [{"name": "input_1", "datatype": "FP32", "shape": None}]}),
    "infinite shape": reply(b'{"inputs": [{"name": "a", "datatype": "b", "shape": [1e999]}]}'),
    "closed at once": b"",
    "half a header": b"HTTP/1.1 200 OK\r\nContent-Le",
    "half a body": reply(b"{}", length=1000),
    "impossible length": reply(b"{}", length="many"),
    "negative length": reply(b"{}", length=-1),
    "enormous length": reply(b"{}", length=10**30),
    "bad chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
    "a moved page": reply(b"", "302 Found", Location="http://127.0.0.1:1/"),
    "no entry": reply(b"", "401 Unauthorized"),
    "no content": b"HTTP/1.1 204 No Content\r\n\r\n",
    "an error that is a number": reply({"error": 7}, "400 Bad Request"),
    "an error that is null": reply({"error": None}, "400 Bad Request"),
    "no status": b"HTTP/1.1\r\n\r\n",
    "HTTP/2": b"\x00\x00\x12\x04\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x80\x00\x04\x00\x01\x00\x00",
    "a long header": b"HTTP/1.1 200 OK\r\nX: " + b"y" * 1_000_000 + b"\r\n\r\n{}",
    "silence": silence,
    "a byte now and then": drip,
    "a header now and then": drip_headers,
    "no end": torrent,
}
BAD_ANSWERS = {
    "deep JSON": reply(b"[" * 100_000 + b"]" * 100_000),
    "a list": reply([1]),
    "no outputs": reply({}),
    "outputs null": reply({"outputs": None}),
    "outputs empty": reply({"outputs": []}),
    "another name": output(name="output_0"),
    "no name": output(name=None),
    "no data": output(data=None),
    "nine": output(data=PROBABILITIES[:9]),
    "eleven": output(data=[*PROBABILITIES, 0.0]),
    "of shape 9": output(data=PROBABILITIES[:9], shape=[1, 9]),
    "of shape 1": output(data=[1.0], shape=[1, 1]),
    "two pictures": output(data=PROBABILITIES * 2, shape=[2, 10]),
    "no batch": output(shape=[10]),
    "no shape": output(shape=None),
    "negative shape": output(shape=[-1, -10]),
    "enormous shape": output(shape=[1 << 70, 10]),
    "shape of text": output(shape="10"),
    "NaN": binary(raw=np.full(10, np.nan, np.float32).tobytes()),
    "one NaN": binary(raw=np.float32([*PROBABILITIES[:9], np.nan]).tobytes()),
    "infinite": binary(raw=np.float32([np.inf, *PROBABILITIES[:9]]).tobytes()),
    "null probabilities": output(data=[None] * 10),
    "text": output(data=["x"] * 10),
    "objects": output(data=[{}] * 10),
    "FP64": output(datatype="FP64"),
    "INT32": output(datatype="INT32", data=[0] * 10),
    "BYTES": output(datatype="BYTES", data=["7"] * 10),
    "unknown datatype": output(datatype="FP31"),
    "size too small": binary(size=36),
    "bytes missing": binary(raw=FLOATS[:36]),
    "negative size": binary(size=-4),
    "size of text": binary(size="40"),
    "size 0": binary(size=0, raw=b""),
    "header too long": binary(header_length=10_000),
    "header negative": binary(header_length=-1),
    "header of text": binary(header_length="many"),
    "not deflated": reply(b"junk", Content_Encoding="deflate"),
    "not zipped": reply(b"junk", Content_Encoding="gzip"),
    "failure": reply({"error": "it is broken"}, "500 Internal Server Error"),
    "empty failure": reply(b"", "503 Service Unavailable"),
    "silence": silence,
    "a byte now and then": drip,
}
BAD_CLASSES = {
    "no classes": output(),
    "fewer": classes(b"0.9:7:7", b"0.1:1:1"),
    "NaN": classes(b"nan:7:7", b"0.1:1:1", b"0.0:2:2"),
    "no number": classes(b"0.9", b"0.1", b"0.0"),
    "empty": classes(b"", b"", b""),
    "labels of other digits": classes(b"0.9:7:6", b"0.1:1:0", b"0.0:2:1"),
    "a length that lies": binary(8, b"\xff\xff\xff\x7f0.9:", datatype="BYTES", shape=[1, 3]),
}


GOOD = reply(METADATA)


@contextmanager
def fake_http(metadata, answer=b"", host=HOST):
    """Say these bytes, or what these functions yield, when asked for metadata or an inference; gives "host:port"."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            says = GOOD
            while says is GOOD and (request := self.rfile.readline()):
                lengths = [
                    int(line[15:]) for line in iter(self.rfile.readline, b"\r\n") if line[:15] == b"Content-Length:"
                ]
                self.rfile.read(sum(lengths))
                says = answer if request.startswith(b"POST") else metadata
                with suppress(OSError):
                    for part in [says] if isinstance(says, bytes) else says():
                        self.wfile.write(part)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads, block_on_close = True, False
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

    over.clear()
    with Server((host, 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"[{host}]:{server.server_address[1]}" if ":" in host else f"{host}:{server.server_address[1]}"
        finally:
            over.set()
            server.shutdown()
            thread.join()


def refused(client_module, url, timeout=1, top=None):
    """Ask with a blank picture; returns the sentence, for which nobody may wait as long as a server is silent."""
    start = time.monotonic()
    with pytest.raises(triton_infer.ServerError) as error:
        triton_infer.ask(client_module, url, MODEL_NAME, np.zeros((1, 28, 28, 1), np.float32), timeout, top)
    assert time.monotonic() - start < SILENCE_SECONDS
    return str(error.value)


def test_model_of_another_shape(run):
    inputs = [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}]
    with fake_http(reply(METADATA | {"name": "double", "inputs": inputs})) as url:
        status, out, err = run(f"--http-url={url}", "--model-name=double", LONG)
    assert is_sentence(status, out, err), err
    assert "the inputs of double are x FP32 [-1, 2], not input_1 FP32 [-1, 28, 28, 1]" in err


@pytest.mark.parametrize("kind", BAD_METADATA)
def test_http_server_with_bad_metadata(kind):
    with fake_http(BAD_METADATA[kind]) as url:
        assert url in refused(httpclient, url)


@pytest.mark.parametrize("kind", BAD_ANSWERS)
def test_http_server_with_bad_answer(kind):
    with fake_http(GOOD, BAD_ANSWERS[kind]) as url:
        assert url in refused(httpclient, url)


@pytest.mark.parametrize("kind", BAD_CLASSES)
def test_http_server_with_bad_classes(kind):
    with fake_http(GOOD, BAD_CLASSES[kind]) as url:
        assert url in refused(httpclient, url, top=3)


@pytest.mark.parametrize(("answer", "top"), [(output(), None), (binary(), None), (classes(b"0.91:7:7", b"0.01:1"), 2)])
def test_http_server_with_good_answer(answer, top):  # So that what refused() sees is the fault that is meant.
    with fake_http(GOOD, answer) as url:
        batch = np.zeros((1, 28, 28, 1), np.float32)
        (found,) = triton_infer.ask(httpclient, url, MODEL_NAME, batch, PATIENCE, top)
    assert (triton_infer.best(found) == "7 (91.00%), 1 (1.00%)") if top else found.argmax() == 7


class FakeTriton(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers right, but for what `change` does to an answer."""

    def __init__(self, change, seconds):
        self.change, self.seconds = change, seconds

    def ModelMetadata(self, request, context):
        time.sleep(self.seconds)
        return json_format.ParseDict(METADATA, service_pb2.ModelMetadataResponse())

    def ModelInfer(self, request, context):
        response = service_pb2.ModelInferResponse(raw_output_contents=[FLOATS])
        response.outputs.add(name="output_1", datatype="FP32", shape=[1, 10])
        time.sleep(self.seconds)
        return self.change(response, context) or response


@contextmanager
def fake_grpc(change=lambda *_: None, host=HOST, seconds=0):
    server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.so_reuseport", 0)])
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(FakeTriton(change, seconds), server)
    address = f"[{host}]" if ":" in host else host
    port = server.add_insecure_port(f"{address}:0")
    over.clear()
    server.start()
    try:
        yield f"{address}:{port}"
    finally:
        over.set()
        server.stop(None).wait()


def raw(content, **changes):
    def change(response, context):
        response.raw_output_contents[0] = content
        for name, value in changes.items():
            if name == "shape":
                response.outputs[0].shape[:] = value
            else:
                setattr(response.outputs[0], name, value)

    return change


def abort(response, context):
    context.abort(grpc.StatusCode.INTERNAL, "it is\nbroken \x1b[31m")


BAD_GRPC_ANSWERS = {
    "no outputs": lambda response, context: response.ClearField("outputs"),
    "no bytes": lambda response, context: response.ClearField("raw_output_contents"),
    "nothing": lambda response, context: service_pb2.ModelInferResponse(),
    "another name": raw(FLOATS, name="output_0"),
    "nine": raw(FLOATS[:36]),
    "eleven": raw(FLOATS + FLOATS[:4]),
    "not of four bytes": raw(FLOATS[:39]),
    "of shape 9": raw(FLOATS[:36], shape=[1, 9]),
    "no batch": raw(FLOATS, shape=[10]),
    "negative shape": raw(FLOATS, shape=[-1, -10]),
    "enormous shape": raw(FLOATS, shape=[1 << 62, 1 << 62]),
    "NaN": raw(np.full(10, np.nan, np.float32).tobytes()),
    "FP64": raw(FLOATS, datatype="FP64"),
    "INT32": raw(FLOATS, datatype="INT32"),
    "BYTES": raw(FLOATS, datatype="BYTES"),
    "unknown datatype": raw(FLOATS, datatype="FP31"),
    "failure": abort,
    "silence": lambda response, context: list(silence()),
}


@pytest.mark.parametrize("kind", BAD_GRPC_ANSWERS)
def test_grpc_server_with_bad_answer(kind):
    with fake_grpc(BAD_GRPC_ANSWERS[kind]) as url:
        assert url in refused(grpcclient, url)


@contextmanager
def fake_triton(host=HOST):
    """Serve right answers by both protocols; gives the options that name them."""
    with fake_http(GOOD, output(), host) as http_url, fake_grpc(host=host) as grpc_url:
        yield f"--http-url={http_url}", f"--grpc-url={grpc_url}", LONG


TWO_LINES = "HTTP Service | Prediction: 7\ngRPC Service | Prediction: 7\n"


def script(*options, before=(), stdout=subprocess.PIPE):
    """Start the script itself, by the command `before` if there is one."""
    command = [*before, sys.executable, ROOT / "triton-infer.py", *options]
    return subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, text=True)


def test_time_limit_is_for_both_calls_together():
    with fake_grpc(seconds=0.7) as url:
        assert url in refused(grpcclient, url)


def test_proxies_are_not_asked(run, monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, f"http://{HOST}:9")
    with fake_triton() as options:
        assert run(*options) == (0, TWO_LINES, "")


def test_ipv6_address(run):
    require_ipv6()
    with fake_triton("::1") as options:
        assert run(*options) == (0, TWO_LINES, "")


@pytest.mark.parametrize("host", [HOST, "::1"])
def test_name_of_which_one_address_answers(tmp_path, host):
    if host != HOST:
        require_ipv6()
    (tmp_path / "hosts").write_text("::1 triton.test\n127.0.0.1 triton.test\n")
    namespace = ["unshare", "--mount", *(["--user", "--map-root-user"] if os.geteuid() else [])]
    mount = [*namespace, "sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"', tmp_path / "hosts"]
    able = subprocess.run([*mount, "true"], capture_output=True, text=True)
    require(able.returncode == 0, f"nothing can be mounted here: {able.stderr}")
    with fake_triton(host) as options:
        named = [re.sub(r"=.*:", "=triton.test:", option) for option in options]
        command = [*mount, sys.executable, ROOT / "triton-infer.py", *named]
        result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, TWO_LINES, "")


@pytest.mark.parametrize("service", ["http", "grpc"])
def test_ctrl_c_is_one_line(service):
    asked = threading.Event()

    def wait(*_):
        asked.set()
        yield from silence()

    with fake_triton() as options, fake_http(wait) as http_url, fake_grpc(lambda *_: list(wait())) as grpc_url:
        silent = f"--http-url={http_url}" if service == "http" else f"--grpc-url={grpc_url}"
        with script(*options, silent) as process:
            assert asked.wait(PATIENCE)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (130, "triton-infer.py: stopped\n")
    assert out == ("" if service == "http" else "HTTP Service | Prediction: 7\n")


@pytest.mark.parametrize("how", ["full", "closed", "gone"])
def test_answer_that_cannot_be_written_is_one_sentence(how):
    with fake_triton() as options, open("/dev/full", "w") as full:
        closed = ["sh", "-c", 'exec "$0" "$@" >&-']
        how_to_start = {"full": {"stdout": full}, "closed": {"before": closed}, "gone": {}}[how]
        with script(*options, **how_to_start) as process:
            if how == "gone":
                process.stdout.close()
            err = process.stderr.read()
    assert (process.returncode, err.count("\n")) == (1, 1)
    assert err.startswith("triton-infer.py: cannot write to standard output: ")


def test_top_names_the_best(ask, run):
    status, out, err = ask("--top=10")
    assert (status, err) == (0, "")
    http_line, grpc_line = out.splitlines()
    assert http_line.removeprefix("HTTP") == grpc_line.removeprefix("gRPC")
    found = re.findall(r"(\d) \((\d+\.\d\d)%\)", http_line)
    assert http_line == f"HTTP Service | Prediction: {', '.join(f'{label} ({share}%)' for label, share in found)}"
    assert sorted(label for label, _ in found) == list("0123456789")
    shares = [float(share) for _, share in found]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=0.1)
    assert ask()[1].splitlines()[0] == f"HTTP Service | Prediction: {found[0][0]}"
    assert ask("--top=1")[1].splitlines()[1] == f"gRPC Service | Prediction: {found[0][0]} ({found[0][1]}%)"


def test_top_prints_the_label(run):
    with fake_http(GOOD, classes("0.91:7:sieben ü".encode(), b"0.01:1", b"0.0:2:")) as url:
        _, out, _ = run(f"--http-url={url}", f"--grpc-url={HOST}:{free_ports(1)[0]}", "--top=3", LONG)
    assert out == "HTTP Service | Prediction: sieben ü (91.00%), 1 (1.00%), 2 (0.00%)\n"


def test_show_prints_what_the_model_sees(run):
    with fake_triton() as options:
        status, out, err = run(*options, "--show")
    assert (status, err) == (0, "")
    *rows, http_line, grpc_line = out.splitlines()
    assert f"{http_line}\n{grpc_line}\n" == TWO_LINES
    pairs = np.array([re.findall(r"\x1b\[38;5;(\d+);48;5;(\d+)m▀", row) for row in rows], int)
    assert pairs.shape == (14, 28, 2)
    grays = pairs.transpose(0, 2, 1).reshape(28, 28)
    np.testing.assert_array_equal(grays, 232 + preprocess(open_image(SAMPLE_IMAGE))[..., 0] // (256 / 24))
    assert all(row.endswith("\x1b[0m") for row in rows)


def test_sentence_is_one_line_whatever_the_server_says(run):
    with fake_http(GOOD, output()) as http_url, fake_grpc(abort) as grpc_url:
        status, out, err = run(f"--http-url={http_url}", f"--grpc-url={grpc_url}", LONG)
    assert (status, out) == (1, "HTTP Service | Prediction: 7\n")
    assert err == f"triton-infer.py: Triton at {grpc_url} did not answer: it is\n"


def test_line_that_is_no_http(ask):
    def answer():
        connection, _ = listener.accept()
        connection.recv(1000)
        connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
        connection.close()

    with socket.create_server((HOST, 0)) as listener:
        thread = threading.Thread(target=answer)
        thread.start()
        status, out, err = ask(f"--http-url={HOST}:{listener.getsockname()[1]}")
        thread.join()
    assert is_sentence(status, out, err), err


def test_default_is_the_project_s_own_model():
    args = triton_infer.parse_args([])
    assert (args.images, args.model_name) == ([SAMPLE_IMAGE], MODEL_NAME)
    assert (args.http_url, args.grpc_url) == ("127.0.0.1:8000", "127.0.0.1:8001")
