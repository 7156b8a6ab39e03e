"""scripts/benchmark.sh: a short real run, and what it says when it cannot measure."""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import grpc
import pytest
from conftest import require
from PIL import Image

from mnist_preprocess import MODEL_NAME, ROOT

BENCHMARK = ROOT / "scripts" / "benchmark" / "benchmark.py"
ROW = re.compile(r"^(\w[\w ,]*?) +(\d+) +(\d+) +(\d+\.\d\d) +(\d+\.\d\d) +(\d+)(?: +(\d+\.\d\d))?$", re.M)
MEMORY_ROW = re.compile(r"^(\w[\w ,]*?) +(\d+\.\d) +(\d+) +(\d+)$", re.M)


@pytest.fixture
def h2load():
    require(shutil.which("h2load"), "no h2load on PATH: run 'sudo apt install nghttp2-client'")


def benchmark(*options):
    return subprocess.run([sys.executable, BENCHMARK, *options], capture_output=True, text=True)


def measured(*options):
    """Return what a run of one round prints, and its rows (rate, p50, p99, errors, of floor) by (way, clients)."""
    result = benchmark("--rounds=1", *options)
    assert result.returncode == 0, result.stderr
    assert max(map(len, result.stdout.splitlines())) <= 80
    rows = {(row[0], int(row[1])): row[2:] for row in ROW.findall(result.stdout)}
    for (_, clients), (rate, p50, p99, errors, _) in rows.items():
        assert 0 < float(p50) <= float(p99) and errors == "0"
        # So many clients, each of which waits for its answer: Little's law. Half of it, as a median is not a mean.
        assert float(p50) / 1000 * int(rate) < 2 * clients
    return result.stdout, rows


def test_a_short_run_measures_both_servers_and_their_floors(h2load, trained_repository, tmp_path):
    picture = tmp_path / "benchmark.png"
    options = ("--clients", "1", "4", "--seconds=1", "--floor", "--picture", picture)
    printed, rows = measured(*options, "--model-repository", trained_repository)
    ways = ("Flask", "Triton HTTP", "Triton gRPC")
    constants = [f"{way}, constant" for way in ways]
    assert rows.keys() == {(name, clients) for name in (*ways, *constants) for clients in (1, 4)}
    for (name, clients), (rate, *_, of_floor) in rows.items():
        if name in ways:
            floor = int(rows[f"{name}, constant", clients][0])
            assert float(of_floor) == pytest.approx(int(rate) / floor, rel=0.1, abs=0.02)
        else:
            assert of_floor == ""

    servers = {row[0]: row[1:] for row in MEMORY_ROW.findall(printed)}
    assert servers.keys() == {"Flask", "Triton", "Flask, constant", "Triton, constant"}
    assert all(
        float(ready) > 0 and int(processes) >= 2 and int(size) > 0 for ready, processes, size in servers.values()
    )
    with Image.open(picture) as image:
        assert image.format == "PNG" and len(image.convert("RGB").getcolors(2**24)) > 10


def test_photos_are_measured_too(h2load, trained_repository, tmp_path):
    # Long enough for the first photo, which takes a while.
    options = ("--clients=4", "--seconds=3", "--photo", "--picture", tmp_path / "benchmark.png")
    _, rows = measured(*options, "--model-repository", trained_repository)
    assert rows.keys() == {(name, 4) for name in ("Flask", "Flask, photo", "Triton HTTP", "Triton gRPC")}


def test_requests_that_grpc_fails_are_counted(h2load, monkeypatch, tmp_path):
    """gRPC answers an error under HTTP's status 200 and without a message, so h2load takes it for a success."""
    monkeypatch.syspath_prepend(BENCHMARK.parent)
    import benchmark

    class Failing(grpc.GenericRpcHandler):
        def service(self, details):
            def fail(message, context):
                context.abort(grpc.StatusCode.INTERNAL, "broken")

            return grpc.unary_unary_rpc_method_handler(fail)

    server = grpc.server(ThreadPoolExecutor(1), handlers=[Failing()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        _, way = benchmark.triton_server(tmp_path, MODEL_NAME, "").ways
        way = replace(way, url=f"http://127.0.0.1:{port}{benchmark.GRPC_METHOD}", answer_bytes=85)
        rate, _, _, errors = benchmark.measure(way, clients=2, seconds=1, rate=100, directory=tmp_path)
    finally:
        server.stop(None).wait()
    assert (rate, errors) == (0, 100)


def test_an_untrained_model_is_one_sentence(tmp_path):
    result = benchmark("--model-repository", tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    reason = f"no trained model in {tmp_path / MODEL_NAME}: run 'python train.py' first"
    assert result.stderr == f"Starting Flask …\nbenchmark.py: Flask did not start: server.py: {reason}\n"


@pytest.mark.parametrize("options", [("--clients",), ("--clients=0",), ("--seconds=-1",), ("--fast",)])
def test_wrong_usage_is_status_2(options):
    result = benchmark(*options)
    assert (result.returncode, result.stdout) == (2, "")
    assert "error: " in result.stderr


def test_without_h2load_the_script_says_what_to_install(tmp_path):
    for program in ("bash", "dirname"):
        (tmp_path / program).symlink_to(shutil.which(program))
    script = ROOT / "scripts" / "benchmark.sh"
    result = subprocess.run([script], capture_output=True, text=True, env=os.environ | {"PATH": str(tmp_path)})
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        "benchmark.sh: no h2load on PATH: run 'sudo apt install nghttp2-client' on Debian or Ubuntu\n"
    )


def test_the_help_names_every_option():
    script = subprocess.run([ROOT / "scripts" / "benchmark.sh", "--help"], capture_output=True, text=True)
    options = set(re.findall(r"--\w[\w-]+", benchmark("--help").stdout)) - {"--help"}
    assert script.returncode == 0
    assert options == set(re.findall(r"--\w[\w-]+", script.stdout))


def test_what_it_draws_by_default_is_ignored_by_git(git, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARK.parent)
    import benchmark

    picture = benchmark.parse_args([]).picture
    assert git("check-ignore", picture) == [str(picture)]
