"""Measure the Flask server and Triton side by side; scripts/benchmark.sh --help tells how.

h2load asks, the same C++ program for all: over HTTP/1.1 as over gRPC, which is HTTP/2 with a frame of five bytes around
the message. It writes down how long each single request took. wrk speaks no HTTP/2, Triton's own perf_analyzer sends no
forms and its package holds no program, and a client in Python takes longer than the servers, as --tritonclient shows.
"""

import argparse
import io
import json
import math
import os
import platform
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from http.client import HTTPConnection, HTTPException
from importlib.metadata import version
from pathlib import Path

import grpc
import numpy as np
from PIL import Image
from tritonclient import grpc as grpcclient
from tritonclient import http as httpclient
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

sys.path.append(str(Path(__file__).resolve().parents[1]))

from mnist_preprocess import (
    CLASSES,
    HOST,
    INPUT_NAME,
    MODEL_NAME,
    MODEL_REPOSITORY,
    OUTPUT_NAME,
    ROOT,
    SAMPLE_IMAGE,
    open_image,
    preprocess,
)
from saved_model import ModelError, newest_version

DIGIT = 7  # What the sample picture shows: every server must answer it before it is measured.
CONSTANT_NAME = "constant"
GRPC_METHOD = "/inference.GRPCInferenceService/ModelInfer"
START_SECONDS, STOP_SECONDS = 120, 60
PARTS = ROOT / "scripts" / "benchmark"
CANDIDATE_PORTS = iter(random.sample(range(20000, 32768), 1000))


class BenchmarkError(RuntimeError):
    """A server that does not start, or gives no right answer; the message is a sentence for the user."""


@dataclass
class Way:
    """A way to ask a server: h2load's options and address, and what it sends; or a function that asks from Python."""

    name: str
    url: str
    options: list[str]
    body: bytes
    probe: callable  # Asks once from Python: returns the digit and the number of bytes in the answer.
    floor: str | None = None  # The name of the way that answers a constant.
    ask: callable = None  # Asks for so many seconds from Python: returns each request's milliseconds.
    first_rate: int | None = None  # Requests a second to expect at first, where h2load counts them: see measure().
    answer_bytes: int = 0


@dataclass
class Server:
    """A server to start, and after that its process; memory in MB: (processes, RSS, largest RSS, PSS)."""

    name: str
    command: list
    ways: list[Way]
    environment: dict = field(default_factory=dict)
    process: subprocess.Popen = None
    ready_seconds: float = 0
    memory: list[tuple] = field(default_factory=list)


@dataclass
class Result:
    """One run: requests a second, milliseconds, and how many requests failed."""

    rate: float
    p50: float
    p99: float
    errors: int


# What is sent, and how one answer is read.


def picture():
    """Return the sample picture as MNIST stores it: a tensor (1, 28, 28, 1) float32, and the bytes of a 28x28 PNG."""
    pixels = preprocess(open_image(SAMPLE_IMAGE))
    png = io.BytesIO()
    Image.fromarray(pixels[:, :, 0].round().astype(np.uint8)).save(png, "PNG")
    return pixels[None], png.getvalue()


def ask_http(port, path, headers, body, read_digit):
    """POST once; return the digit in the answer and the answer's length in bytes."""
    connection = HTTPConnection(HOST, port, timeout=10)
    try:
        connection.request("POST", path, body, headers)
        response = connection.getresponse()
        answer = response.read()
    finally:
        connection.close()
    if response.status != 200:
        raise BenchmarkError(f"status {response.status}: {answer.decode(errors='replace').strip()}")
    return read_digit(answer), len(answer)


def ask_grpc(port, message):
    """Send a ModelInferRequest once; return the digit in the answer and the answer's length in bytes."""
    with grpc.insecure_channel(f"{HOST}:{port}") as channel:
        answer = channel.unary_unary(GRPC_METHOD)(message, timeout=10)
    response = service_pb2.ModelInferResponse.FromString(answer)
    return read_probabilities(response.raw_output_contents[0]), len(answer) + 5


def read_prediction(answer):
    return int(json.loads(answer)["Prediction"])


def read_probabilities(answer):
    """Return the digit of the probabilities (10,) float32 that stand at the end of an answer."""
    return int(np.frombuffer(answer[-4 * CLASSES :], np.float32).argmax())


def http_way(name, port, path, headers, body, read_digit, floor):
    options = ["--h1", *(f"--header={key}: {value}" for key, value in headers.items())]
    probe = partial(ask_http, port, path, headers, body, read_digit)
    return Way(name, f"http://{HOST}:{port}{path}", options, body, probe, floor)


def flask_way(name, port, floor=None):
    """Ask with an HTML form that uploads the picture."""
    _, png = picture()
    start = 'Content-Disposition: form-data; name="image"; filename="seven.png"\r\nContent-Type: image/png'
    body = b"--form\r\n%b\r\n\r\n%b\r\n--form--\r\n" % (start.encode(), png)
    headers = {"content-type": "multipart/form-data; boundary=form"}
    return http_way(name, port, "/mnist_infer", headers, body, read_prediction, floor)


def triton_ways(names, http_port, grpc_port, model_name, floors=(None, None, None)):
    """Ask with the picture as a tensor, in the same messages that tritonclient sends; or with tritonclient itself."""
    batch, _ = picture()
    tensor = httpclient.InferInput(INPUT_NAME, batch.shape, "FP32").set_data_from_numpy(batch)
    outputs = [httpclient.InferRequestedOutput(OUTPUT_NAME, binary_data=True)]
    body, json_size = httpclient.InferenceServerClient.generate_request_body([tensor], outputs=outputs)
    headers = {"content-type": "application/octet-stream", "inference-header-content-length": str(json_size)}
    path = f"/v2/models/{model_name}/infer"

    request = service_pb2.ModelInferRequest(model_name=model_name, raw_input_contents=[batch.tobytes()])
    request.inputs.add(name=INPUT_NAME, datatype="FP32", shape=batch.shape)
    message = request.SerializeToString()
    frame = b"\0" + len(message).to_bytes(4, "big") + message
    grpc_options = ["--header=te: trailers", "--header=content-type: application/grpc"]
    grpc_url, probe = f"http://{HOST}:{grpc_port}{GRPC_METHOD}", partial(ask_grpc, grpc_port, message)
    ask = partial(ask_tritonclient, f"{HOST}:{grpc_port}", model_name, batch)
    ways = [
        http_way(names[0], http_port, path, headers, body, read_probabilities, floors[0]),
        Way(names[1], grpc_url, grpc_options, frame, probe, floors[1], first_rate=1000),
    ]
    return ways + [Way(name, "", [], b"", probe, floors[2], ask=ask) for name in names[2:]]


def ask_tritonclient(address, model_name, batch, seconds):
    """Ask over gRPC with tritonclient for so many seconds; return each request's milliseconds."""
    tensor = grpcclient.InferInput(INPUT_NAME, batch.shape, "FP32").set_data_from_numpy(batch)
    outputs = [grpcclient.InferRequestedOutput(OUTPUT_NAME)]
    milliseconds = []
    with grpcclient.InferenceServerClient(address) as client:
        end = time.perf_counter() + seconds
        while (started := time.perf_counter()) < end:
            client.infer(model_name, [tensor], outputs=outputs).as_numpy(OUTPUT_NAME)
            milliseconds.append((time.perf_counter() - started) * 1000)
    return milliseconds


# The servers.


def servers_to_measure(args, directory):
    """Return the servers that the options ask for, not started yet."""
    flask, triton = "Flask", ("Triton HTTP", "Triton gRPC", "tritonclient")[: 3 if args.tritonclient else 2]
    flask_floor, triton_floor = f"{flask}, constant", [f"{way}, constant" for way in triton]
    floors = (flask_floor, triton_floor) if args.floor else (None, [None] * 3)
    repository = args.model_repository
    servers = [
        flask_server("Flask", flask, "flask/server.py", repository, floors[0]),
        triton_server("Triton", triton, repository, MODEL_NAME, floors[1]),
    ]
    if args.floor:
        constant = constant_repository(repository, directory)
        servers += [
            flask_server("Flask, constant", flask_floor, "scripts/benchmark/flask_floor.py", repository),
            triton_server("Triton, constant", triton_floor, constant, CONSTANT_NAME),
        ]
    if args.peers:
        servers += peers(repository)
    return servers


def flask_server(name, way, script, repository, floor=None):
    [port] = free_ports(1)
    command = [sys.executable, ROOT / script, f"--port={port}", f"--model-repository={repository}"]
    return Server(name, command, [flask_way(way, port, floor)])


def triton_server(name, ways, repository, model_name, floors=(None, None, None)):
    ports = dict(zip(("http", "grpc", "metrics"), free_ports(3), strict=True))
    command = [ROOT / "scripts" / "triton_local.sh", *(f"--{service}-port={port}" for service, port in ports.items())]
    command += [f"--model-repository={repository}", "--model-control-mode=explicit", f"--load-model={model_name}"]
    environment = {"VIRTUAL_ENV": sys.prefix}  # Which Python triton_local.sh shall take.
    ways = triton_ways(ways, ports["http"], ports["grpc"], model_name, floors)
    return Server(name, command, ways, environment)


def constant_repository(repository, directory):
    """Return a model repository with the constant model, its configuration the real model's but for the backend."""
    model = Path(directory, "repository", CONSTANT_NAME)
    (model / "1").mkdir(parents=True)
    (model / "1" / "model.py").symlink_to(PARTS / "constant_model.py")
    (model / "1" / "mnist_preprocess.py").symlink_to(ROOT / "mnist_preprocess.py")  # Whose names it takes.
    for file in Path(repository, MODEL_NAME).glob("*.*"):
        text = file.read_text()
        # Two instances, as Triton makes them where the backend is tensorflow: for python it makes one.
        text = text.replace('backend: "tensorflow"', 'backend: "python"\ninstance_group { count: 2 }')
        (model / file.name).write_text(text)
    return model.parent


def peers(repository):
    """Return the servers of other kinds that serve the same model."""
    ports = free_ports(2)
    environment = {"MODEL": str(Path(repository, MODEL_NAME))}
    fastapi = [sys.executable, "-m", "uvicorn", f"--host={HOST}", f"--port={ports[0]}", f"--workers={os.cpu_count()}"]
    fastapi += [f"--app-dir={PARTS}", "--no-access-log", "--factory", "fastapi_peer:create_app"]
    keras = [sys.executable, PARTS / "keras_peer.py", str(ports[1])]
    keras_way = replace(flask_way("Flask dev., Keras", ports[1]), first_rate=10)
    return [
        Server("FastAPI", fastapi, [flask_way("FastAPI on uvicorn", ports[0])], environment),
        Server("Keras", keras, [keras_way], environment),
    ]


def free_ports(count):
    """Return port numbers on which nothing listens now, none of them twice in one run.

    They lie below those that Linux gives to connections, so that none of these takes one before its server starts.
    """
    ports = []
    for port in CANDIDATE_PORTS:
        with socket.socket() as listener:
            try:
                listener.bind((HOST, port))
            except OSError:
                continue
        ports.append(port)
        if len(ports) == count:
            break
    return ports


def start(server, directory):
    """Start a server and wait until every way to ask it gives the right answer."""
    print(f"Starting {server.name} …", file=sys.stderr)
    log = Path(directory, f"{server.name}.log")
    started = time.monotonic()
    with log.open("wb") as output:
        # In a session of its own: Ctrl-C reaches this process only, which then stops the servers.
        server.process = subprocess.Popen(
            server.command, stdout=output, stderr=output, env=os.environ | server.environment, start_new_session=True
        )
    for way in server.ways:
        while True:
            alive = server.process.poll() is None
            try:
                digit, way.answer_bytes = way.probe()
                break
            except (OSError, HTTPException, grpc.RpcError, BenchmarkError) as error:
                if not alive or time.monotonic() > started + START_SECONDS:
                    raise BenchmarkError(f"{server.name} did not start: {last_words(log) or error}") from error
            time.sleep(0.02)
        if digit != DIGIT:
            raise BenchmarkError(
                f"{way.name} takes the {DIGIT} of {SAMPLE_IMAGE} for a {digit}: train the model longer"
            )
    server.ready_seconds = time.monotonic() - started
    server.memory.append(memory(server.process.pid))


def last_words(log):
    """Return the line of a server's log that says why it stopped: the first that looks like an error, or the last."""
    text = log.read_text(errors="replace").strip()
    errors = re.findall(r"^(?:error: |\w+\.(?:py|sh): |\w*Error: ).*", text, re.M)
    return errors[0] if errors else text.rpartition("\n")[2]


def stop(server):
    """Stop the server as `kill` does; what outlives STOP_SECONDS is killed."""
    if server.process:
        server.process.send_signal(signal.SIGTERM)
        try:
            server.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(server.process.pid, signal.SIGKILL)
            server.process.wait()


def memory(pid):
    """Return how many processes a server is, and their memory in MB: RSS, the largest one's RSS, PSS.

    RSS counts a page that processes share in each of them, PSS once.
    """
    totals = {"Rss": [], "Pss": []}
    for process in process_tree(pid):
        rollup = dict(re.findall(r"^(\w+): +(\d+) kB", Path(f"/proc/{process}/smaps_rollup").read_text(), re.M))
        for key, values in totals.items():
            values.append(int(rollup[key]) / 1024)
    return len(totals["Rss"]), sum(totals["Rss"]), max(totals["Rss"]), sum(totals["Pss"])


def process_tree(pid):
    """Yield the process and those it started, directly or not."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            yield from process_tree(int(child))


# The measurement.


def measure(way, clients, seconds, expected_rate, directory):
    """Ask from so many clients for so many seconds, each over a connection of its own that it keeps open.

    A way that has a first_rate is asked as many requests as take so long at `expected_rate`, in requests a second.
    """
    if way.ask:
        return measure_threads(way, clients, seconds)
    data, log = Path(directory, "body"), Path(directory, "requests")
    data.write_bytes(way.body)
    log.unlink(missing_ok=True)
    amount = f"--duration={seconds}"
    if way.first_rate:
        # When its time is up, h2load leaves with requests under way, and Triton 24.10 may crash when a gRPC client
        # does (mended since: https://github.com/triton-inference-server/server/pull/7840). And a connection that is
        # closed right then, as Flask's development server closes each after one request, it opens anew, for ever.
        amount = f"--requests={max(clients, round(expected_rate * seconds))}"
    command = ["h2load", f"--clients={clients}", amount, f"--data={data}", f"--log-file={log}"]
    try:
        run = subprocess.run(
            [*command, *way.options, way.url], capture_output=True, text=True, timeout=seconds + STOP_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise BenchmarkError(f"{way.name} keeps h2load waiting with {clients} clients") from error
    counts = re.search(r"(\d+) succeeded, (\d+) failed", run.stdout)
    received = re.search(r"\((\d+)\) data", run.stdout)
    rate = re.search(r"([\d.]+) req/s", run.stdout)
    succeeded, failed = map(int, counts.groups()) if counts else (0, 0)
    if run.returncode != 0 or not succeeded:
        words = run.stderr.strip() or "give it more --seconds"
        raise BenchmarkError(f"{way.name} answered none of {clients} clients within {seconds} s: {words}")
    # gRPC reports its errors in a trailer, under the status 200 and with no message: missing bytes give them away.
    wrong = max(0, succeeded - int(received[1]) // way.answer_bytes)
    microseconds = np.loadtxt(log, np.int64, usecols=2, ndmin=1)
    p50, p99 = np.percentile(microseconds, (50, 99)) / 1000
    return Result(float(rate[1]) * (1 - wrong / succeeded), p50, p99, failed + wrong)


def measure_threads(way, clients, seconds):
    """Ask from so many threads of this process, each for so many seconds."""
    try:
        with ThreadPoolExecutor(clients) as pool:
            runs = list(pool.map(way.ask, [seconds] * clients))
    except InferenceServerException as error:
        raise BenchmarkError(f"{way.name} failed with {clients} clients: {error}") from error
    milliseconds = np.concatenate(runs)
    return Result(len(milliseconds) / seconds, *np.percentile(milliseconds, (50, 99)), 0)


def measure_all(ways, args, directory):
    """Return the results of all rounds for each (name, clients), after a short round that does not count."""
    results = {(way.name, clients): [] for way in ways for clients in args.clients}
    rates = {(way.name, clients): way.first_rate for way in ways for clients in args.clients}
    for number in range(args.rounds + 1):
        print(f"Round {number} of {args.rounds} …" if number else "Warming up …", file=sys.stderr)
        for clients in args.clients:
            for way in ways:
                seconds = args.seconds if number else min(args.seconds, 3)
                result = measure(way, clients, seconds, rates[way.name, clients], directory)
                rates[way.name, clients] = result.rate
                if number:
                    results[way.name, clients].append(result)
    return results


def median(results, quantity):
    return statistics.median(getattr(result, quantity) for result in results)


def ratio(results, name, other, clients):
    """Return the median of name's rate over other's, each taken in the same round."""
    pairs = zip(results[name, clients], results[other, clients], strict=True)
    return statistics.median(one.rate / two.rate if two.rate else math.nan for one, two in pairs)


# The report.


def describe_machine(args, triton_version):
    """Return lines of at most 80 characters on what was measured where and how."""
    cpu = re.search(r"^model name\s*: (.+)", Path("/proc/cpuinfo").read_text(), re.M)
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    h2load = subprocess.run(["h2load", "--version"], capture_output=True, text=True).stdout.split("/")[-1].strip()
    return [
        f"{(cpu[1] if cpu else platform.machine())[:50]}, {os.cpu_count()} cores, {gigabytes:.0f} GB",
        f"{platform.system()} {platform.release().partition('-')[0]}, Python {platform.python_version()}, "
        f"Flask {version('flask')}, granian {version('granian')}",
        f"LiteRT {version('ai-edge-litert')}, Triton {triton_version}",
        f"h2load {h2load} asks, on the same cores; medians of {args.rounds} x {args.seconds} s",
    ]


def report(servers, results, args):
    """Return the tables as lines of at most 80 characters."""
    lines = [f"{'':22}{'clients':>8}{'requests/s':>12}{'p50 ms':>9}{'p99 ms':>9}{'errors':>8}{'of floor':>10}".rstrip()]
    for clients in args.clients:
        for way in (way for server in servers for way in server.ways):
            runs = results[way.name, clients]
            rate, p50, p99 = (median(runs, quantity) for quantity in ("rate", "p50", "p99"))
            errors = sum(run.errors for run in runs)
            of_floor = f"{ratio(results, way.name, way.floor, clients):10.2f}" if way.floor else ""
            lines.append(f"{way.name:22}{clients:8}{rate:12.0f}{p50:9.2f}{p99:9.2f}{errors:8}{of_floor}")
        lines.append("")
    lines.append(f"{'':22}{'ready s':>8}{'processes':>11}{'RSS MB':>8}{'largest':>9}{'PSS':>7}{'RSS at first':>14}")
    for server in servers:
        first, (processes, rss, largest, pss) = server.memory[0], server.memory[-1]
        sizes = f"{processes:11}{rss:8.0f}{largest:9.0f}{pss:7.0f}{first[1]:14.0f}"
        lines.append(f"{server.name:22}{server.ready_seconds:8.1f}{sizes}")
    if args.peers:
        lines.append("")
        for clients in args.clients:
            times = [ratio(results, "Flask", server.ways[0].name, clients) for server in servers[-2:]]
            lines.append(
                f"Flask, {clients} clients: {times[0]:.2f} times FastAPI, {times[1]:.0f} times Flask dev., Keras"
            )
    return lines


def draw(ways, results, args, description, path):
    """Draw requests a second and latency over the number of clients."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(10, 5.4), dpi=120, layout="constrained")
    rates, latencies = figure.subplots(1, 2)
    colors = {}
    for way in ways:
        values = {
            quantity: [median(results[way.name, clients], quantity) for clients in args.clients]
            for quantity in ("rate", "p50", "p99")
        }
        # A floor has the color of what stands on it.
        owner = next((other.name for other in ways if other.floor == way.name), way.name)
        color = colors.setdefault(owner, f"C{len(colors)}")
        constant = owner != way.name
        rates.plot(args.clients, values["rate"], f"o{':' if constant else '-'}", color=color, label=way.name)
        if not constant:
            latencies.plot(args.clients, values["p50"], "o-", color=color, label=f"{way.name}, median")
            latencies.plot(args.clients, values["p99"], "^--", color=color, label=f"{way.name}, p99")
    rates.set(title="Requests per second: more is better", ylim=(0, None))
    latencies.set(title="Latency in ms: less is better", yscale="log")
    latencies.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    latencies.yaxis.set_major_formatter("{x:g}")
    latencies.yaxis.set_minor_formatter(NullFormatter())
    for axes in (rates, latencies):
        axes.set_xscale("log", base=2)
        axes.set_xticks(args.clients, map(str, args.clients))
        axes.set_xlabel("concurrent clients")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.supxlabel("\n".join(description), fontsize="x-small", color="gray")
    figure.savefig(path)


def triton_version(servers):
    """Return the version that Triton gives of itself, beside its name at the root of its HTTP service."""
    url = servers[1].ways[0].url
    with httpclient.InferenceServerClient(url.split("/")[2]) as client:
        return client.get_server_metadata()["version"]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--clients", type=positive, nargs="+", default=[1, 4, 16, 64], metavar="N", help="at once")
    parser.add_argument("--seconds", type=positive, default=3, metavar="S", help="how long each server is asked")
    parser.add_argument("--rounds", type=positive, default=5, metavar="N", help="how often, in turn")
    parser.add_argument("--floor", action="store_true", help="also measure a constant in place of the model")
    parser.add_argument("--tritonclient", action="store_true", help="also ask Triton over gRPC from Python")
    parser.add_argument("--peers", action="store_true", help="also measure other kinds of server")
    parser.add_argument(
        "--picture", type=Path, default=ROOT / "images" / "benchmark.png", metavar="FILE", help="to draw"
    )
    parser.add_argument(
        "--model-repository", type=Path, default=MODEL_REPOSITORY, metavar="DIR", help="Triton's layout"
    )
    return parser.parse_args(argv)


def positive(text):
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def terminate(number, frame):
    """End on SIGTERM as on an error, all servers stopped; a second SIGTERM does not keep them from it."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


def main(argv=None) -> int:
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, terminate)
    try:
        newest_version(args.model_repository / MODEL_NAME)
        with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
            servers = servers_to_measure(args, directory)
            for server in servers:
                stack.callback(stop, server)
                start(server, directory)
            ways = [way for server in servers for way in server.ways]
            results = measure_all(ways, args, directory)
            for server in servers:
                server.memory.append(memory(server.process.pid))
            description = describe_machine(args, triton_version(servers))
    except (BenchmarkError, ModelError) as error:
        print(f"benchmark.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print("\n".join([*description, "", *report(servers, results, args)]))
    draw(ways, results, args, description, args.picture)
    errors = sum(result.errors for runs in results.values() for result in runs)
    if errors:
        print(f"benchmark.py: {errors} requests failed: the column 'errors' says where", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    raise SystemExit(main())
