"""What the Flask server tells Prometheus, and its access log, of each request."""

from datetime import datetime, timezone
from urllib.parse import quote

from flask import Response, request
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

REQUESTS = Counter("mnist_requests", "Requests answered, by status", ["status"])
BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
SECONDS = Histogram("mnist_request_seconds", "From a request's headers to its answer", buckets=BUCKETS)
INFERENCE_SECONDS = Histogram("mnist_inference_seconds", "What the engine took of it", buckets=BUCKETS)
MODEL_VERSION = Gauge("mnist_model_version", "The version that answered last", multiprocess_mode="mostrecent")


def count(status, seconds):
    """Count an answer, and how long it took."""
    REQUESTS.labels(status).inc()
    SECONDS.observe(seconds)


def log(response, seconds):
    """Write the time, the request, the answer's status and bytes, and the milliseconds that it took; no content."""
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    size = response.content_length or 0
    print(
        f"{now} {request.method} {quote(request.path)} {response.status_code} {size} {1000 * seconds:.1f}", flush=True
    )


def observe_inference(seconds, version):
    INFERENCE_SECONDS.observe(seconds)
    MODEL_VERSION.set(int(version))


def exposition():
    """Return what GET /metrics answers: the sums over all workers."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry)
    return Response(generate_latest(registry), content_type=CONTENT_TYPE_LATEST)
