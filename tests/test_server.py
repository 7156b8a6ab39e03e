"""flask/server.py: its answers, through Flask's client, and the server itself, with slow, rude and many clients."""

import base64
import io
import json
import os
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPException
from pathlib import Path

import flask
import jsonschema
import numpy as np
import openapi_spec_validator
import pytest
import serving
from conftest import flask_server, free_ports, require, require_ipv6, wait_for
from engines import EngineError
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from server import create_app
from serving import MAX_HELD, MAX_UPLOAD

from mnist_preprocess import HOST, MODEL_NAME, ROOT, SAMPLE_IMAGE, open_image, preprocess

SCRIPT = ROOT / "flask" / "server.py"
BOUNDARY = "boundary"
HEADERS = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
CLIENTS = 16


def form(upload, field="image"):
    """Return an upload as curl -F sends it, its headers being HEADERS."""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{field}"; filename="digit.png"\r\n\r\n'
    return head.encode() + upload + f"\r\n--{BOUNDARY}--\r\n".encode()


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def png_that_claims(width, height):
    """Return a PNG whose header promises a size that its pixels do not have."""
    broken = bytearray(SAMPLE_IMAGE.read_bytes())
    broken[16:24] = struct.pack(">II", width, height)
    broken[29:33] = struct.pack(">I", zlib.crc32(broken[12:29]))
    return bytes(broken)


SAMPLE = SAMPLE_IMAGE.read_bytes()
DIGIT = png(np.asarray(open_image(SAMPLE_IMAGE).convert("L").resize((28, 28))))  # Quick to read, for many clients.
SEVEN = b'{"Prediction":"7"}\n'


class FakeEngine:
    """Sees a 7 in everything, takes a millisecond for it, and remembers what it was given."""

    name = "a fake"

    def begin(self):
        self.batch = None

    def predict(self, batch):
        self.batch = batch
        time.sleep(0.001)
        return np.array([[0, 0, 0.0625, 0, 0, 0, 0, 0.875, 0.0625, 0]], np.float32), "3"


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def client(engine):
    return create_app(engine).test_client()


def test_flask_is_the_installed_package():
    assert not (ROOT / "flask" / "__init__.py").exists()
    assert not Path(flask.__file__).is_relative_to(ROOT / "flask")


def test_answer_is_exactly_what_the_tutorial_shows(client, engine):
    answer = client.post("/mnist_infer", data=form(SAMPLE), headers=HEADERS)
    assert (answer.status_code, answer.data, answer.mimetype) == (200, SEVEN, "application/json")
    np.testing.assert_array_equal(engine.batch, preprocess(open_image(SAMPLE_IMAGE))[None])
    assert engine.batch.dtype == np.float32


def test_picture_is_found_among_other_fields(client):
    body = form(b"of a seven", "note").removesuffix(f"--{BOUNDARY}--\r\n".encode()) + form(SAMPLE)
    assert client.post("/mnist_infer", data=body, headers=HEADERS).data == SEVEN


@pytest.mark.parametrize(
    "unusual",
    [
        pytest.param(form(SAMPLE).replace(b'filename="digit.png"', b"filename*=UTF-8''%e4%b8%83.png"), id="filename*"),
        pytest.param(form(SAMPLE).replace(b'digit.png"', b'\xe9.png"'), id="Latin-1 name"),
        pytest.param(form(SAMPLE).replace(b'digit.png"', 'é.png"'.encode()), id="UTF-8 name"),
        pytest.param(form(SAMPLE).replace(b'digit.png"', b'"'), id="no name"),
        pytest.param(b"hello\r\n" + form(SAMPLE), id="text before the form"),
        pytest.param(form(SAMPLE).replace(b'png"\r\n', b'png"\r\n' + b"X-Header: 1\r\n" * 20, 1), id="many headers"),
    ],
)
def test_forms_as_clients_write_them(client, unusual):
    assert client.post("/mnist_infer", data=unusual, headers=HEADERS).data == SEVEN


def test_form_with_unix_line_ends(client):
    head, tail = f'--{BOUNDARY}\nContent-Disposition: form-data; name="image"; filename="d"\n\n', f"\n--{BOUNDARY}--\n"
    assert client.post("/mnist_infer", data=head.encode() + SAMPLE + tail.encode(), headers=HEADERS).data == SEVEN


@pytest.mark.parametrize("query", ["?q=中文", "?q=%E9", "?q=%e4%b8%ad%ff", "?details=%c3"])
def test_query_that_is_not_ours(client, query):
    assert client.post("/mnist_infer" + query, data=form(SAMPLE), headers=HEADERS).data == SEVEN


def test_28x28_picture_reaches_the_model_bit_by_bit(client, engine, mnist_test):
    picture = mnist_test[0][0]
    client.post("/mnist_infer", data=form(png(picture[..., 0])), headers=HEADERS)
    assert np.array_equal(engine.batch[0], picture)


@pytest.mark.parametrize("kind", ["image/png", "image/x-of-some-kind", "application/octet-stream"])
def test_picture_as_the_body(client, kind):
    assert client.post("/mnist_infer", data=SAMPLE, content_type=kind).data == SEVEN
    assert client.post("/mnist_infer", data=b"", content_type=kind).status_code == 400


def test_body_of_unknown_length_may_have_been_cut(client):
    chunked = {"input_stream": io.BytesIO(SAMPLE), "headers": {"Transfer-Encoding": "chunked"}}
    assert client.post("/mnist_infer", content_type="image/png", **chunked).status_code == 411


def test_details(client, engine):
    start = time.perf_counter()
    answer = client.post("/mnist_infer?details=1", data=form(SAMPLE), headers=HEADERS).json
    seen = Image.open(io.BytesIO(base64.b64decode(answer.pop("Input").removeprefix("data:image/png;base64,"))))
    assert np.array_equal(np.asarray(seen), engine.batch[0, ..., 0].round())
    assert 1 <= answer.pop("Milliseconds") <= 1000 * (time.perf_counter() - start)
    assert answer == {
        "Prediction": "7",
        "Confidence": 0.875,
        "Probabilities": [0, 0, 0.0625, 0, 0, 0, 0, 0.875, 0.0625, 0],
        "ModelVersion": "3",
        "Engine": "a fake",
    }


@pytest.mark.parametrize("query", ["", "?details=0", "?details", "?Details=1"])
def test_no_details_without_asking(client, query):
    assert client.post(f"/mnist_infer{query}", data=form(SAMPLE), headers=HEADERS).data == SEVEN


def test_openapi_document_is_valid_and_true(client):
    document = client.get("/openapi.json", buffered=True).json
    openapi_spec_validator.validate(document)
    schemas = document["components"]["schemas"]
    details = client.post("/mnist_infer?details=1", data=form(SAMPLE), headers=HEADERS).json
    jsonschema.validate(details, schemas["Answer"])
    assert details.keys() == schemas["Answer"]["properties"].keys()
    jsonschema.validate(client.post("/mnist_infer").json, schemas["Error"])


def test_page_loads_nothing_from_elsewhere(client):
    answer = client.get("/")
    assert (answer.status_code, answer.mimetype) == (200, "text/html")
    policy = dict(part.split(maxsplit=1) for part in answer.headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["script-src"] == policy["style-src"] == "'self'"
    for address in re.findall(r"(?:src|href)=\"(?!data:|#)([^\"]+)\"", answer.text):
        assert client.get(f"/{address}", buffered=True).status_code == 200


def test_health(client, engine):
    for path, status in (("/healthz", "alive"), ("/readyz", "ready")):
        answer = client.get(path)
        assert (answer.status_code, answer.json) == (200, {"Status": status})

    def fail(batch):
        raise EngineError("Triton at x does not answer; ask again in a moment")

    engine.predict = fail
    assert client.get("/healthz").status_code == 200
    answer = client.get("/readyz")
    assert answer.status_code == 503 and "Triton at x does not answer" in answer.json["Error"]


def test_not_ready_while_stopping(client, monkeypatch):
    for event in ("draining", "closed"):
        monkeypatch.setattr(getattr(serving, event), "_flag", True)
    answer = client.get("/readyz")
    assert answer.status_code == 503 and "is stopping" in answer.json["Error"]
    assert answer.headers["Connection"] == "close"


def test_other_origins(engine, client):
    assert "Access-Control-Allow-Origin" not in client.post("/mnist_infer", data=form(SAMPLE), headers=HEADERS).headers
    origin = "http://localhost:8080"
    open_client = create_app(engine, origin).test_client()
    for answer in (open_client.post("/mnist_infer"), open_client.options("/mnist_infer"), open_client.get("/nothing")):
        assert answer.headers["Access-Control-Allow-Origin"] == origin
        assert answer.headers["Access-Control-Allow-Headers"] == "Content-Type"


@pytest.mark.parametrize("path", ["/", "/static/page.js", "/nothing", "/mnist_infer"])
def test_answers_are_what_they_say(client, path):
    assert client.get(path, buffered=True).headers["X-Content-Type-Options"] == "nosniff"


def test_engine_that_is_away(client, engine):
    def fail(batch):
        raise EngineError("Triton at x does not answer; ask again in a moment")

    engine.predict = fail
    answer = client.post("/mnist_infer", data=form(SAMPLE), headers=HEADERS)
    assert (answer.status_code, answer.json) == (503, {"Error": "Triton at x does not answer; ask again in a moment"})
    assert answer.headers["Retry-After"] == "1"


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        pytest.param(b"", {}, 400, id="nothing"),
        pytest.param(form(SAMPLE, "picture"), HEADERS, 400, id="other field"),
        pytest.param(f"--{BOUNDARY}--\r\n".encode(), HEADERS, 400, id="empty form"),
        pytest.param(form(b""), HEADERS, 400, id="empty file"),
        pytest.param(form(b"This is no picture."), HEADERS, 400, id="text"),
        pytest.param(form(SAMPLE[: len(SAMPLE) // 2]), HEADERS, 400, id="truncated"),
        pytest.param(form(png_that_claims(100_000, 100_000)), HEADERS, 400, id="huge"),
        pytest.param(form(png_that_claims(0, 0)), HEADERS, 400, id="no pixel"),
        pytest.param(form(png(np.full((50, 50), 255, np.uint8))), HEADERS, 422, id="blank"),
        pytest.param(SAMPLE, {"Content-Type": "text/plain"}, 400, id="no picture by its type"),
        pytest.param(form(SAMPLE), {"Content-Type": "multipart/form-data"}, 400, id="no boundary"),
        pytest.param(b"image=digit.png", {"Content-Type": "application/x-www-form-urlencoded"}, 400, id="not a file"),
        pytest.param(form(SAMPLE)[:100], HEADERS, 400, id="form cut off"),
        pytest.param(form(SAMPLE).removesuffix(b"--\r\n"), HEADERS, 400, id="form without its end"),
        pytest.param(form(SAMPLE)[100:], HEADERS, 400, id="form without its start"),
        pytest.param(form(SAMPLE).replace(b"; filename", b"; x"), HEADERS, 400, id="text field"),
        pytest.param(form(SAMPLE), {"Content-Type": 'multipart/form-data; boundary="\xe9"'}, 400, id="odd boundary"),
        pytest.param(form(bytes(MAX_UPLOAD)), HEADERS, 413, id="too large"),
        pytest.param(form(SAMPLE), HEADERS | {"Content-Encoding": "gzip"}, 415, id="compressed"),
    ],
)
def test_bad_upload_is_one_sentence(client, body, headers, status):
    answer = client.post("/mnist_infer", data=body, headers=headers)
    assert answer.status_code == status
    answers = client.get("/openapi.json", buffered=True).json["paths"]["/mnist_infer"]["post"]["responses"]
    assert str(status) in answers
    assert list(answer.json) == ["Error"]
    assert re.fullmatch(r"[a-z][^\n]{20,}", answer.json["Error"])
    assert not re.search(r"\\|\bb'|[{}()\[\]]|Error|None", answer.json["Error"]), "Python speaks there"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/no/such", 404),
        ("GET", "/caf%E9", 404),
        ("GET", "/中文", 404),
        ("POST", "/%ff", 404),
        ("GET", "/mnist_infer", 405),
    ],
)
def test_wrong_address_or_method_is_one_sentence(client, method, path, status):
    answer = client.open(path, method=method)
    assert answer.status_code == status
    assert "POST a picture to" in answer.json["Error"]
    assert set(answer.allow) == ({"POST", "OPTIONS"} if status == 405 else set())


def serve(*options):
    """Run a server that is expected to end by itself, also where no name server answers."""
    environment = os.environ | {"RES_OPTIONS": "timeout:1 attempts:1"}
    command = [sys.executable, SCRIPT, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


@pytest.mark.parametrize(
    "option",
    [
        *("--workers=0", "--workers=many", "--port=http", "--port=70000", "--port=-1", "--no-such-option"),
        *(
            "--triton=localhost",
            "--triton=a:1,b",
            "--triton=http://a:1",
            "--allow-origin=a",
            "--allow-origin=http://a/b",
        ),
    ],
)
def test_wrong_usage(option):
    result = serve(option)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("usage: ")


def refused(result):
    """Return the one sentence of a server that did not start."""
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("server.py: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.mark.parametrize("shared", [False, True])
def test_busy_port(trained_repository, shared):
    with socket.socket() as listener:
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((HOST, 0))
        listener.listen()
        port = listener.getsockname()[1]
        sentence = refused(serve(f"--port={port}", "--model-repository", trained_repository))
    assert f"cannot listen on {HOST} port {port}: Address already in use" in sentence


@pytest.mark.parametrize(
    ("host", "reason"),
    [("no.such.host.invalid", "ame"), ("192.0.2.1", "assign"), ("::2", "assign"), ("a..b", "name of a host")],
)
def test_address_that_is_not_ours(trained_repository, host, reason):
    sentence = refused(serve(f"--host={host}", "--model-repository", trained_repository))
    assert f"cannot listen on {host}" in sentence and reason in sentence


def test_missing_model(tmp_path):
    (port,) = free_ports(1)
    sentence = refused(serve(f"--port={port}", "--model-repository", tmp_path))
    assert f"no trained model in {tmp_path / MODEL_NAME}: run 'python train.py' first" in sentence


def test_damaged_model(tmp_path):
    version = tmp_path / MODEL_NAME / "1" / "model.savedmodel"
    version.mkdir(parents=True)
    (version / "saved_model.pb").write_bytes(b"damaged")
    (port,) = free_ports(1)
    assert str(version) in refused(serve(f"--port={port}", "--model-repository", tmp_path))


@pytest.fixture(scope="module")
def server(trained_repository, tmp_path_factory):
    """A server that the tests ask and leave running; its log is free of tracebacks in the end."""
    with flask_server(tmp_path_factory.mktemp("flask") / "log", trained_repository, "--workers=2") as server:
        yield server
    assert server.process.returncode == 0
    assert "Traceback" not in server.log.read_text()


@pytest.fixture
def stoppable(trained_repository, tmp_path):
    """A server on two CPUs that the test may stop."""
    every = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(every)[:2])
    try:
        with flask_server(tmp_path / "log", trained_repository, "--workers=2") as server:
            yield server
    finally:
        os.sched_setaffinity(0, every)


def ask(server, path="/mnist_infer", body=None, **headers):
    """Ask once, over a connection of its own; returns the status and the body."""
    connection = server.connect()
    try:
        connection.request("POST", path, form(SAMPLE) if body is None else body, HEADERS | headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def processes(server):
    """Return the pids of the server's workers."""
    return [
        int(pid) for pid in Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    ]


def memory(server):
    """Return the resident memory of every worker in KiB, by its pid."""
    found = {}
    for pid in processes(server):
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        found[pid] = int(lines["VmRSS"].split()[0])
    return found


def growth(server, before):
    """Return by how many KiB the memory of the worker that has grown most exceeds its memory `before`."""
    return max(now - before[pid] for pid, now in memory(server).items())


def cpus(server):
    """Return the CPUs on which each worker may run, in order."""
    return sorted(sorted(os.sched_getaffinity(pid)) for pid in processes(server))


def test_curl_line_of_the_tutorial(server):
    require(shutil.which("curl"), "there is no curl command")
    command = ["curl", "-sS", "-X", "POST", "-F", f"image=@{SAMPLE_IMAGE}", f"http://{HOST}:{server.port}/mnist_infer"]
    assert subprocess.run(command, capture_output=True, check=True).stdout.startswith(b'{"Prediction":"')


def test_details_over_http(server):
    status, body = ask(server, "/mnist_infer?details=1")
    assert status == 200
    details = json.loads(body)
    assert sum(details["Probabilities"]) == pytest.approx(1, abs=1e-4)
    assert (details["ModelVersion"], details["Engine"]) == ("1", "LiteRT on the CPU")


HEAD = f"POST /mnist_infer HTTP/1.1\r\nHost: x\r\nContent-Type: {HEADERS['Content-Type']}\r\n"
CHUNKED = f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode()
STALLED = f"{HEAD}Content-Length: {len(form(SAMPLE))}\r\n\r\n".encode() + form(SAMPLE)[:50]


@contextmanager
def stalled_uploads(server, count, sent=STALLED):
    """Connections that send this much of an upload, and no more."""
    with ExitStack() as stack:
        yield [stack.enter_context(hang(server, sent)) for _ in range(count)]


def hang(server, sent):
    connection = socket.create_connection((HOST, server.port), timeout=60)
    connection.sendall(sent)
    return connection


@pytest.mark.parametrize("sent", [STALLED, b""], ids=["half an upload", "nothing"])
def test_slow_clients_stop_nobody(server, sent):
    # More than all files that a process may open by default, whichever worker the kernel gives them to.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2000), hard))
    with stalled_uploads(server, 1500, sent) as stalled:
        start = time.monotonic()
        assert [ask(server)[0] for _ in range(20)] == [200] * 20
        assert time.monotonic() - start < 20
        if sent:  # Whoever goes on is answered too.
            stalled[0].sendall(form(SAMPLE)[50:])
            assert stalled[0].makefile("rb").readline().startswith(b"HTTP/1.1 200")
    assert ask(server)[0] == 200  # The log of the fixture shows that those who left caused no traceback.


def answer_to(server, sent, half_close=False):
    """Return the status and all that the server says to these bytes, until it closes the connection."""
    with hang(server, sent) as connection:
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: connection.recv(2**16), b""))
    return int(answer.split()[1]), answer


def test_upload_that_takes_too_long(trained_repository, tmp_path):
    """The server's limit of a minute, made one of two seconds."""
    quick = "import serving; serving.UPLOAD_SECONDS = serving.HEADER_SECONDS = 2; import server; server.main()"
    with (
        flask_server(tmp_path / "log", trained_repository, "--workers=1", program=["-c", quick]) as server,
        ThreadPoolExecutor(2) as pool,
        hang(server, STALLED) as dripping,
    ):
        stalled, without_end = (pool.submit(answer_to, server, sent) for sent in (STALLED, CHUNKED + b"4\r\nabcd\r\n"))
        with pytest.raises(ConnectionError):
            for _ in range(300):
                dripping.sendall(b"x")
                time.sleep(0.1)
        status, answer = stalled.result()
        assert status == 408 and b"the upload took more than 2 seconds: send it again" in answer
        assert without_end.result()[0] == 408
        assert ask(server)[0] == 200


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(STALLED, id="length"),
        pytest.param(CHUNKED + f"{len(form(SAMPLE)):x}\r\n".encode() + form(SAMPLE)[:99], id="within a chunk"),
        pytest.param(CHUNKED + b"63\r\n" + form(SAMPLE)[:99] + b"\r\n", id="between chunks"),
        pytest.param(CHUNKED + b"no number\r\n" + form(SAMPLE), id="no chunk"),
        pytest.param(
            CHUNKED + f"{len(form(SAMPLE)):x}\r\n".encode() + form(SAMPLE) + b"\r\n", id="before the last chunk"
        ),
    ],
)
def test_upload_cut_short(server, sent):
    status, answer = answer_to(server, sent, half_close=True)
    assert status == 400 and b'{"Error":"' in answer


def test_upload_in_chunks(server):
    whole = CHUNKED.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    for part in (form(SAMPLE)[:100], form(SAMPLE)[100:]):
        whole += f"{len(part):x}\r\n".encode() + part + b"\r\n"
    assert answer_to(server, whole + b"0\r\n\r\n")[0] == 200


def sample_values(server):
    """Return the metrics by their names with labels."""
    connection = server.connect()
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return {
        f"{sample.name}{sorted(sample.labels.items())}": sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_of_all_workers(trained_repository, tmp_path):
    # A server that answers to nobody else: it still counts those whose clients have left.
    with flask_server(tmp_path / "log", trained_repository, "--workers=2") as server:
        before = sample_values(server)
        assert [ask(server)[0] for _ in range(40)] == [200] * 40
        assert [ask(server, body=form(b"no picture"))[0] for _ in range(5)] == [400] * 5
        after = sample_values(server)
    for name, more in (
        ("mnist_requests_total[('status', '200')]", 41),  # And the first question for the metrics.
        ("mnist_requests_total[('status', '400')]", 5),
        ("mnist_request_seconds_count[]", 46),
        ("mnist_inference_seconds_count[]", 40),
    ):
        assert after[name] - before.get(name, 0) == more
    assert after["mnist_model_version[]"] == 1
    assert after["mnist_request_seconds_sum[]"] > after["mnist_inference_seconds_sum[]"] > 0


def test_access_log(trained_repository, tmp_path):
    with flask_server(tmp_path / "log", trained_repository, "--access-log") as server:
        sizes = [len(ask(server, path)[1]) for path in ("/mnist_infer?details=1&secret=1", "/a%0Ab")]
    lines = [line for line in (tmp_path / "log").read_text().splitlines() if " POST " in line]
    time_of_day = r"2\d{3}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00"
    assert re.fullmatch(rf"{time_of_day} POST /mnist_infer 200 {sizes[0]} \d+\.\d", lines[0])
    assert re.fullmatch(rf"{time_of_day} POST /a%0Ab 404 {sizes[1]} \d+\.\d", lines[1])


def test_uploads_have_a_budget_together(server):
    """Four times as many as it allows stall after 19 MiB each: nobody is told off, but those who come too late."""
    most = form(bytes(19 * 2**20))
    head = f"{HEAD}Content-Length: {len(most)}\r\n\r\n".encode()
    before = memory(server)
    with ExitStack() as stack:
        # The kernel spreads them over the two workers, but not evenly.
        for _ in range(2 * 4 * MAX_HELD // len(most)):
            connection = stack.enter_context(socket.create_connection((HOST, server.port), timeout=60))
            with suppress(ConnectionError):
                connection.sendall(head + most[:-1])
        # malloc keeps, for many of the threads, some of what an upload left behind as it grew or was dropped.
        assert growth(server, before) < 3 * MAX_HELD / 1024
        assert 503 in {ask(server, body=most)[0] for _ in range(20)}
    wait_for(lambda: {ask(server)[0] for _ in range(20)} == {200})


def test_answered_uploads_leave_memory(server):
    photo = form(bytes(19 * 2**20))
    connection = server.connect()
    highest = []
    for _ in range(60):
        connection.request("POST", "/mnist_infer", photo, HEADERS)
        answer = connection.getresponse()
        assert answer.status == 400 and answer.read()
        highest.append(max(memory(server).values()))
    connection.close()
    assert highest[-1] < highest[2] + 30 * 1024


def test_http_2_is_not_spoken(server):
    with hang(server, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9)) as connection, suppress(ConnectionError):
        assert connection.makefile("rb").readline() in (b"", b"HTTP/1.1 400 Bad Request\r\n")


def holds_signals_back(process):
    """Tell whether a process has begun to block SIGINT, as server.py does in its first line."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"^SigBlk:\s+(\w+)", status, re.MULTILINE)[1], 16) >> (signal.SIGINT - 1) & 1


@pytest.mark.parametrize(
    ("number", "seconds"),
    [*((signal.SIGINT, each) for each in (0, 0.5, 1.0, 2.0)), *((signal.SIGTERM, each) for each in (0.3, 0.7, 1.5))],
)
def test_signal_while_it_starts(trained_repository, number, seconds):
    (port,) = free_ports(1)
    command = [sys.executable, SCRIPT, f"--port={port}", "--model-repository", trained_repository]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        wait_for(lambda: holds_signals_back(process))  # Until then Python itself answers, with a traceback.
        time.sleep(seconds)
        process.send_signal(number)
        output, _ = process.communicate(timeout=30)
    assert "Traceback" not in output
    assert process.returncode in (0, -number)
    assert not list(Path("/dev/shm").glob(f"flask-{process.pid}-*"))


def test_raw_bytes_in_the_address(server):
    request = "GET /中文?q=中 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    for encoded in (request.encode(), request.replace("中文", "%d6%d0").encode()):
        status, answer = answer_to(server, encoded)
        assert status == 404 and b'{"Error":"there is nothing at /' in answer


@pytest.mark.parametrize("host", ["::1", "::"])
def test_ipv6(trained_repository, tmp_path, host):
    require_ipv6()
    with flask_server(tmp_path / "log", trained_repository, f"--host={host}", host="::1") as server:
        assert ask(server)[0] == 200
        assert f"cannot listen on {host}" in refused(
            serve(f"--host={host}", f"--port={server.port}", "--model-repository", trained_repository)
        )


def test_upload_past_the_limit(server):
    before = memory(server)
    (status, body) = ask(server, body=bytes(MAX_UPLOAD + 1))
    assert (status, list(json.loads(body))) == (413, ["Error"])

    # Without its length: endless, if the server let it.
    chunk = b"100000\r\n" + bytes(2**20) + b"\r\n"
    sent, grown = 0, []
    with hang(server, CHUNKED) as connection, suppress(ConnectionError):  # It has answered and closes the connection.
        while sent < 1000:
            connection.sendall(chunk)
            sent += 1
            grown.append(growth(server, before))
    assert MAX_UPLOAD / 2**20 <= sent < 1000
    assert max(grown) < 120 * 1024


def keep_asking(server, enough, outcomes, reuse):
    """Ask until told otherwise; count the answers, the refused connections, and the requests without an answer."""
    connection = server.connect()
    while not enough.is_set():
        closed = True
        try:
            connection.request("POST", "/mnist_infer", form(DIGIT), HEADERS)
            answer = connection.getresponse()
            answer.read()
            outcomes[answer.status] += 1
            closed = answer.getheader("connection") == "close"
        except ConnectionRefusedError:
            outcomes["refused"] += 1
            time.sleep(0.01)
        except (OSError, HTTPException) as error:
            outcomes[f"lost: {type(error).__name__}"] += 1
        if closed or not reuse:
            connection.close()  # The next request makes another.
    connection.close()


def under_load(server, act, reuse):
    """Act while 16 clients ask; return what became of their requests before and after, counted together."""
    enough, outcomes = threading.Event(), [Counter() for _ in range(CLIENTS)]
    clients = [threading.Thread(target=keep_asking, args=(server, enough, outcome, reuse)) for outcome in outcomes]
    for client in clients:
        client.start()
    try:
        wait_for(lambda: all(outcome[200] for outcome in outcomes))
        act()
    finally:
        enough.set()
        for client in clients:
            client.join()
    return sum(outcomes, Counter())


def is_gone(pid):
    return not Path("/proc", str(pid)).exists()


@pytest.mark.parametrize("reuse", [True, False], ids=["kept connections", "new connections"])
@pytest.mark.parametrize(
    ("stop", "stalled"), [("SIGTERM", 0), ("SIGTERM", 4), ("Ctrl-C", 0)], ids=["SIGTERM", "beside stalled", "Ctrl-C"]
)
def test_stopping_loses_no_request(stoppable, stop, stalled, reuse):
    workers = processes(stoppable)

    def act():
        start = time.monotonic()
        if stop == "SIGTERM":
            stoppable.process.send_signal(signal.SIGTERM)
        else:
            os.killpg(stoppable.process.pid, signal.SIGINT)
        assert stoppable.process.wait(30) == 0
        assert time.monotonic() - start < 12

    with stalled_uploads(stoppable, stalled):
        outcomes = under_load(stoppable, act, reuse)
        # A connection that was just made may be reset by the closing listener, but a second one is too many.
        assert sum(outcomes.values()) - outcomes[200] - outcomes["refused"] <= 1, outcomes
        wait_for(lambda: all(map(is_gone, workers)))
    assert "Traceback" not in stoppable.log.read_text()


def test_stopping_while_workers_start(trained_repository):
    (port,) = free_ports(1)
    command = [sys.executable, SCRIPT, f"--port={port}", "--model-repository", trained_repository, "--workers=4"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert any("Spawning worker-4" in line for line in process.stdout)
        process.terminate()
        try:
            assert process.wait(30) == 0
        finally:
            process.kill()


@pytest.mark.parametrize("reuse", [True, False], ids=["kept connections", "new connections"])
def test_reloading_loses_no_request(stoppable, reuse):
    workers = processes(stoppable)

    def act():
        stoppable.process.send_signal(signal.SIGHUP)
        wait_for(lambda: all(map(is_gone, workers)))

    assert under_load(stoppable, act, reuse).keys() == {200}
    assert len(processes(stoppable)) == len(workers)
    wait_for(lambda: len(set(map(tuple, cpus(stoppable)))) == len(os.sched_getaffinity(0)))


def test_killed_worker_is_replaced(stoppable):
    workers = processes(stoppable)
    each_on = [[cpu] for cpu in sorted(os.sched_getaffinity(0))]
    each_on *= len(workers) // len(each_on)  # On the only one, where there is but one.
    wait_for(lambda: cpus(stoppable) == each_on)
    os.kill(workers[0], signal.SIGKILL)
    wait_for(lambda: len(set(processes(stoppable)) - set(workers)) == 1)
    assert [ask(stoppable)[0] for _ in range(20)] == [200] * 20
    wait_for(lambda: cpus(stoppable) == each_on)


def test_paused_server_goes_on(stoppable):
    workers = processes(stoppable)
    os.killpg(stoppable.process.pid, signal.SIGSTOP)
    time.sleep(2)
    os.killpg(stoppable.process.pid, signal.SIGCONT)
    time.sleep(2)
    assert {ask(stoppable)[0] for _ in range(20)} == {200}
    assert processes(stoppable) == workers
    assert "Stopping" not in stoppable.log.read_text()


def test_killed_server_leaves_no_worker(stoppable):
    workers = processes(stoppable)
    (folder,) = Path("/dev/shm").glob(f"flask-{stoppable.process.pid}-*")
    with stalled_uploads(stoppable, 4):
        stoppable.process.kill()
        stoppable.process.wait()
        wait_for(lambda: all(map(is_gone, workers)))
    assert not folder.exists()


def test_memory_does_not_grow(stoppable):
    def ask_often(count):
        connection = stoppable.connect()
        statuses = Counter()
        for _ in range(count):
            connection.request("POST", "/mnist_infer", form(DIGIT), HEADERS)
            answer = connection.getresponse()
            answer.read()
            statuses[answer.status] += 1
        connection.close()
        return statuses

    def grows():
        """Tell whether it takes 600 bytes or more for each of 3,200 requests. At first there are threads to make."""
        before = sum(memory(stoppable).values())
        with ThreadPoolExecutor(64) as pool:
            assert sum(pool.map(ask_often, [50] * 64), Counter()) == {200: 3200}
        return sum(memory(stoppable).values()) > before + 3200 * 600 / 1024

    workers = processes(stoppable)
    wait_for(lambda: not grows())
    assert max(memory(stoppable).values()) < 100 * 1024
    assert processes(stoppable) == workers
