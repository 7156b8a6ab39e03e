"""Measure the Flask server and Triton side by side; scripts/benchmark.sh --help tells how.

h2load asks, the same C++ program for all: over HTTP/1.1 as over gRPC, which is HTTP/2 with a frame of five bytes around
the message. It writes down how long each single request took.
"""

import argparse
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from urllib.request import Request, urlopen

import grpc
import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from tritonclient import http as httpclient
from tritonclient.grpc import service_pb2

sys.path.append(str(Path(__file__).resolve().parents[2]))

from mnist_preprocess import HOST, INPUT_NAME, MODEL_NAME, MODEL_REPOSITORY, ROOT, SAMPLE_IMAGE, open_image, preprocess

DIGIT = 7  # What the sample picture shows: every server must answer it before it is measured.
PHOTO_SIZE = (4000, 3000)  # Pixels: what a phone takes.
FLOOR = ", constant"  # How the name of a way ends that answers a constant in place of the model's answer.
GRPC_METHOD = "/inference.GRPCInferenceService/ModelInfer"
START_SECONDS, STOP_SECONDS = 120, 60
PORTS = itertools.count(25000)  # Below those that Linux gives to connections.


@dataclass
class Way:
    """A way to ask a server: the address and what it sends there, over HTTP/1.1 or as a gRPC message in its frame."""

    name: str
    url: str
    headers: dict[str, str]
    body: bytes
    is_grpc: bool = False
    answer_bytes: int = 0


@dataclass
class Server:
    """A server to start, and after that its process."""

    name: str
    command: list
    ways: list[Way]
    process: subprocess.Popen = None
    ready_seconds: float = 0


def tensor():
    """Return the sample picture as the model reads it, (1, 28, 28, 1) float32."""
    return preprocess(open_image(SAMPLE_IMAGE))[None]


def ask(way):
    """Ask once; return the digit that is answered and the number of bytes in the answer."""
    if way.is_grpc:
        with grpc.insecure_channel(way.url.split("/")[2]) as channel:
            answer = bytes(5) + channel.unary_unary(GRPC_METHOD)(way.body[5:], timeout=10)
    else:
        with urlopen(Request(way.url, way.body, way.headers), timeout=10) as response:
            answer = response.read()
    if "/mnist_infer" in way.url:
        return int(json.loads(answer)["Prediction"]), len(answer)
    return np.frombuffer(answer[-40:], np.float32).argmax(), len(answer)  # Ten probabilities stand at the end.


def servers_to_measure(args, directory):
    """Return the servers that the options ask for, not started yet."""
    servers = [flask_server("flask/server.py", "", args), triton_server(args.model_repository, MODEL_NAME, "")]
    if args.against:
        servers.append(flask_server(args.against.resolve(), ", other", args))
    if args.floor:
        constant = constant_repository(args.model_repository, directory)
        servers.append(flask_server("scripts/benchmark/flask_floor.py", FLOOR, args))
        servers.append(triton_server(constant, "constant", FLOOR))
    return servers


def flask_server(script, end, args):
    """Ask with an HTML form that uploads the picture as MNIST stores it, and with one that uploads a photo."""
    port = next(PORTS)
    digit = Image.fromarray(tensor()[0, :, :, 0].round().astype(np.uint8))
    photo = Image.effect_noise(PHOTO_SIZE, 8).convert("RGB")  # A gray page, as grainy as a camera's.
    photo.paste("black", (1500, 1000), digit.resize((900, 900)))
    url, headers, ways = f"http://{HOST}:{port}/mnist_infer", {"content-type": "multipart/form-data; boundary=form"}, []
    for name, picture, file_format in [("Flask", digit, "PNG"), ("Flask, photo", photo, "JPEG")][: 1 + args.photo]:
        file = io.BytesIO()
        picture.save(file, file_format)
        head = b'--form\r\nContent-Disposition: form-data; name="image"; filename="seven"\r\n\r\n'
        ways.append(Way(name + end, url, headers, head + file.getvalue() + b"\r\n--form--\r\n"))
    command = [sys.executable, ROOT / script, f"--port={port}", f"--model-repository={args.model_repository}"]
    return Server(f"Flask{end}", command, ways)


def triton_server(repository, model_name, end):
    """Ask over HTTP and over gRPC with the picture as a tensor, in the same messages that tritonclient sends."""
    ports = {service: next(PORTS) for service in ("http", "grpc", "metrics")}
    batch = tensor()
    picture = httpclient.InferInput(INPUT_NAME, batch.shape, "FP32").set_data_from_numpy(batch)
    body, json_size = httpclient.InferenceServerClient.generate_request_body([picture])
    headers = {"content-type": "application/octet-stream", "inference-header-content-length": str(json_size)}
    http = Way(f"Triton HTTP{end}", f"http://{HOST}:{ports['http']}/v2/models/{model_name}/infer", headers, body)
    request = service_pb2.ModelInferRequest(model_name=model_name, raw_input_contents=[batch.tobytes()])
    request.inputs.add(name=INPUT_NAME, datatype="FP32", shape=batch.shape)
    frame = b"\0" + request.ByteSize().to_bytes(4, "big") + request.SerializeToString()
    headers = {"te": "trailers", "content-type": "application/grpc"}
    grpc_way = Way(f"Triton gRPC{end}", f"http://{HOST}:{ports['grpc']}{GRPC_METHOD}", headers, frame, is_grpc=True)
    command = [ROOT / "scripts" / "triton_local.sh", *(f"--{service}-port={port}" for service, port in ports.items())]
    command += [f"--model-repository={repository}", "--model-control-mode=explicit", f"--load-model={model_name}"]
    return Server(f"Triton{end}", command, [http, grpc_way])


def constant_repository(repository, directory):
    """Return a model repository with the constant model, its configuration the real model's but for the backend."""
    model = Path(directory, "repository", "constant")
    (model / "1").mkdir(parents=True)
    (model / "1" / "model.py").symlink_to(ROOT / "scripts" / "benchmark" / "constant_model.py")
    for name in ("mnist_preprocess.py", "picture_file.py"):  # It takes the names of the first, which imports the other.
        (model / "1" / name).symlink_to(ROOT / name)
    for file in Path(repository, MODEL_NAME).glob("*.*"):
        # Two instances, as Triton makes them where the backend is tensorflow: for python it makes one.
        python = 'backend: "python"\ninstance_group { count: 2 }'
        (model / file.name).write_text(file.read_text().replace('backend: "tensorflow"', python))
    return model.parent


def start(server, directory):
    """Start a server and wait until every way to ask it gives the right answer."""
    print(f"Starting {server.name} …", file=sys.stderr)
    log = Path(directory, f"{server.name}.log")
    # Which Python triton_local.sh shall take; and a session of its own, so that Ctrl-C reaches this process only.
    options = {"env": os.environ | {"VIRTUAL_ENV": sys.prefix}, "start_new_session": True}
    started = time.monotonic()
    with log.open("wb") as output:
        server.process = subprocess.Popen(server.command, stdout=output, stderr=output, **options)
    for way in server.ways:
        while not way.answer_bytes:
            ended = server.process.poll() is not None or time.monotonic() > started + START_SECONDS
            try:
                digit, way.answer_bytes = ask(way)
            except (OSError, grpc.RpcError) as error:
                if ended:
                    words = log.read_text(errors="replace").strip().rpartition("\n")[2] or error
                    sys.exit(f"benchmark.py: {server.name} did not start: {words}")
                time.sleep(0.02)
        if digit != DIGIT:
            sys.exit(f"benchmark.py: {way.name} takes a {DIGIT} for a {digit}: train the model longer")
    server.ready_seconds = time.monotonic() - started


def stop(server):
    """Stop a server as `kill` does; what outlives STOP_SECONDS is killed."""
    if server.process:
        server.process.terminate()
        try:
            server.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(server.process.pid, signal.SIGKILL)


def memory(pid):
    """Return how many processes a server is, and their memory in MB; what they share counts once (PSS)."""
    own = int(re.search(r"^Pss: +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)[1]) / 1024
    children = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):  # The thread has ended meanwhile.
            children += file.read_text().split()
    return np.sum([(1, own), *map(memory, children)], axis=0)


def measure(way, clients, seconds, rate, directory):
    """Ask on a connection for each client; return requests/s, median and 99th percentile in ms, failed requests."""
    data, log = Path(directory, "body"), Path(directory, "requests")
    data.write_bytes(way.body)
    log.unlink(missing_ok=True)
    # When its time is up, h2load leaves with requests under way, and Triton 24.10 may crash when a gRPC client does
    # (mended since: https://github.com/triton-inference-server/server/pull/7840): it is asked a number of times.
    number = max(clients, round(rate * seconds))
    amount = [f"--requests={number}"] if way.is_grpc else [f"--duration={seconds}", "--h1"]
    command = ["timeout", str(STOP_SECONDS + 20 * seconds), "h2load", f"--clients={clients}", *amount, way.url]
    command += [f"--data={data}", f"--log-file={log}", *(f"--header={key}: {way.headers[key]}" for key in way.headers)]
    run = subprocess.run(command, capture_output=True, text=True)
    counts = re.search(r"([\d.]+) req/s.*?(\d+) succeeded, (\d+) failed.*?\((\d+)\) data", run.stdout, re.S)
    rate, succeeded, failed, received = map(float, counts.groups()) if counts else (0, 0, 0, 0)
    if not succeeded:
        words = run.stderr.strip() or "give it more --seconds"
        sys.exit(f"benchmark.py: {way.name} answered none of {clients} clients within {seconds} s: {words}")
    # gRPC reports its errors in a trailer, under the status 200 and with no message: missing bytes give them away.
    wrong = max(0, succeeded - received // way.answer_bytes)
    p50, p99 = np.percentile(np.loadtxt(log, np.int64, usecols=2, ndmin=1), (50, 99)) / 1000
    return rate * (1 - wrong / succeeded), p50, p99, failed + wrong


def measure_all(ways, args, directory):
    """Return {(way's name, clients): array (rounds, 4) of what measure() returns}; a first round does not count."""
    results = {(way.name, clients): [] for clients in args.clients for way in ways}
    for number in range(args.rounds + 1):
        print(f"Round {number} of {args.rounds} …" if number else "Warming up …", file=sys.stderr)
        for clients, way in itertools.product(args.clients, ways):
            runs = results[way.name, clients]
            runs.append(measure(way, clients, args.seconds, runs[-1][0] if runs else 1000, directory))
    return {key: np.array(runs[1:]) for key, runs in results.items()}


def describe_machine(args):
    """Return lines of at most 80 characters on what was measured where and how."""
    cpu = re.search(r"^model name\s*: (.+)", Path("/proc/cpuinfo").read_text(), re.M)
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    packages = ", ".join(f"{name} {version(name)}" for name in ("flask", "granian", "ai-edge-litert"))
    return [
        f"{(cpu[1] if cpu else os.uname().machine)[:50]}, {os.cpu_count()} cores, {gigabytes:.0f} GB",
        f"Linux {os.uname().release.partition('-')[0]}, Python {sys.version.split()[0]}, {packages}",
        f"h2load asks, on the same cores; medians of {args.rounds} x {args.seconds} s",
    ]


def report(servers, results):
    """Return the tables as lines of at most 80 characters."""
    lines = [f"{'':22}{'clients':>8}{'requests/s':>12}{'p50 ms':>9}{'p99 ms':>9}{'errors':>8}{'of floor':>10}"]
    for (name, clients), runs in results.items():
        rate, p50, p99, _ = np.median(runs, axis=0)
        lines.append(f"{name:22}{clients:8}{rate:12.0f}{p50:9.2f}{p99:9.2f}{runs[:, 3].sum():8.0f}")
        if (floor := results.get((name + FLOOR, clients))) is not None:
            lines[-1] += f"{np.median(runs[:, 0] / floor[:, 0]):10.2f}"  # Each taken in the same round.
    lines += ["", f"{'':22}{'ready s':>8}{'processes':>11}{'memory MB':>11}"]
    for server in servers:
        processes, megabytes = memory(server.process.pid)
        lines.append(f"{server.name:22}{server.ready_seconds:8.1f}{processes:11.0f}{megabytes:11.0f}")
    return lines


def draw(results, description, path):
    """Draw requests a second and latency over the number of clients; a floor dotted, in the color of what has it."""
    figure = Figure(figsize=(10, 5.4), dpi=120, layout="constrained")
    rates, latencies = figure.subplots(1, 2)
    names, clients = (list(dict.fromkeys(part)) for part in zip(*results, strict=True))
    owners = list(dict.fromkeys(name.removesuffix(FLOOR) for name in names))
    for name in names:
        rate, p50, p99, _ = np.median([results[name, count] for count in clients], axis=1).T
        color = f"C{owners.index(name.removesuffix(FLOOR))}"
        rates.plot(clients, rate, "o-" if name in owners else "o:", color=color, label=name)
        if name in owners:
            latencies.plot(clients, p50, "o-", color=color, label=f"{name}, median")
            latencies.plot(clients, p99, "^--", color=color, label=f"{name}, p99")
    rates.set(title="Requests per second: more is better", ylim=(0, None))
    latencies.set(title="Latency in ms: less is better", yscale="log")
    latencies.yaxis.set_major_formatter("{x:g}")
    for axes in (rates, latencies):
        axes.set_xscale("log", base=2)
        axes.set_xticks(clients, map(str, clients))
        axes.set_xlabel("concurrent clients")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.supxlabel("\n".join(description), fontsize="x-small", color="gray")
    figure.savefig(path)


def parse_args(argv=None):
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=formatter)
    add = parser.add_argument
    add("--clients", type=positive, nargs="+", default=[1, 4, 16, 64], metavar="N", help="at once")
    add("--seconds", type=positive, default=3, metavar="S", help="how long each server is asked")
    add("--rounds", type=positive, default=5, metavar="N", help="how often, in turn")
    add("--floor", action="store_true", help="also measure a constant in place of the model")
    add("--photo", action="store_true", help="also send Flask a photo of 12 megapixels")
    add("--against", type=Path, metavar="SERVER", help="also measure another flask/server.py")
    add("--picture", type=Path, default=ROOT / "benchmark.png", metavar="FILE", help="to draw")
    add("--model-repository", type=Path, default=MODEL_REPOSITORY, metavar="DIR", help="Triton's layout")
    return parser.parse_args(argv)


def positive(text):
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def main(argv=None) -> int:
    args = parse_args(argv)
    for number in (signal.SIGINT, signal.SIGTERM):  # End as on an error, all servers stopped.
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        servers = servers_to_measure(args, directory)
        for server in servers:
            stack.callback(stop, server)
            start(server, directory)
        results = measure_all([way for server in servers for way in server.ways], args, directory)
        tables, description = report(servers, results), describe_machine(args)
    print("\n".join([*description, "", *tables]))
    draw(results, description, args.picture)
    errors = int(sum(runs[:, 3].sum() for runs in results.values()))
    if errors:
        sys.exit(f"benchmark.py: {errors} requests failed: the column 'errors' says where")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
