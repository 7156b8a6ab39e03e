"""Serve the newest MNIST model over HTTP: a picture of a digit in, the digit out.

python flask/server.py
curl -X POST -F image=@images/sample_image.png http://127.0.0.1:5000/mnist_infer
"""

import signal

if __name__ == "__main__":
    # Until serve() waits for them: Ctrl-C while packages load shall print no traceback. NumPy's threads inherit it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})

import argparse
import base64
import io
import os
import re
import sys
import threading
import time
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

import numpy as np
from flask import Flask, render_template, request, send_file
from multipart import MultipartError, MultipartParser
from PIL import Image
from werkzeug.exceptions import BadRequest, HTTPException, LengthRequired, RequestEntityTooLarge, UnsupportedMediaType

# Appended, so that nothing in the project's folder can shadow an installed package, as flask/ would shadow flask.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from engines import EngineError, LocalEngine, TritonEngine
from serving import MAX_UPLOAD, draining, finish, free_address, receive_upload, serve

from mnist_preprocess import FLASK_PORT, HOST, IMAGE_SHAPE, MODEL_NAME, MODEL_REPOSITORY, ImageError, NoDigitError
from picture_process import read_picture
from saved_model import ModelError

FIELD = "image"  # The form's file.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def create_app(engine, allow_origin=None, access_log=False) -> Flask:
    """Return the application that answers with an engine of engines.py, also to pages of the origin `allow_origin`."""
    import metrics  # Here, in the worker, for the folder that the workers share is known now.

    engine.begin()
    app = Flask(__name__)
    one_at_a_time = threading.Lock()  # A picture may take 400 MB and 2 s to decode.

    @app.get("/")
    def page():
        """The page to draw on. It loads nothing from elsewhere, and the browser is told to see to that."""
        return render_template("index.html"), {"Content-Security-Policy": CONTENT_SECURITY_POLICY}

    @app.get("/openapi.json")
    def openapi():
        return send_file("openapi.json")

    app.get("/metrics")(metrics.exposition)

    @app.get("/healthz")
    def healthz():
        """Tell that the process lives."""
        return {"Status": "alive"}

    @app.get("/readyz")
    def readyz():
        """Tell whether a picture would be answered."""
        if draining.is_set():
            raise EngineError("the server is stopping; ask again in a moment")
        engine.predict(np.zeros((1, *IMAGE_SHAPE), np.float32))
        return {"Status": "ready"}

    @app.post("/mnist_infer")
    def mnist_infer():
        """Answer {"Prediction": digit} for the picture in the form's file `image`, or in the body; ?details=1 adds."""
        with one_at_a_time, closing(uploaded_picture()) as upload:
            pixels = read_picture(upload)
        start = time.perf_counter()
        (probabilities,), version = engine.predict(pixels[None])
        seconds = time.perf_counter() - start
        metrics.observe_inference(seconds, version)
        answer = {"Prediction": str(probabilities.argmax())}
        if request.query_string and request.args.get("details") == "1":  # Even no query takes time to parse.
            answer |= {
                "Confidence": float(probabilities.max()),
                "Probabilities": probabilities.tolist(),
                "ModelVersion": version,
                "Engine": engine.name,
                "Milliseconds": 1000 * seconds,
                "Input": png_uri(pixels),
            }
        return answer

    @app.errorhandler(ImageError)
    def image_error(error):
        return {"Error": str(error)}, 422 if isinstance(error, NoDigitError) else 400

    @app.errorhandler(HTTPException)
    def http_error(error):
        """Answer every other error in JSON too, as one sentence."""
        sentences = {
            404: f"there is nothing at {request.path}: POST a picture to /mnist_infer",
            405: f"{request.path} takes no {request.method}: POST a picture to /mnist_infer",
            413: f"the upload is larger than {MAX_UPLOAD // 2**20} MiB: send a smaller picture",
            500: "the server failed: its log says why",
        }
        headers = dict(error.get_headers()) | {"Content-Type": "application/json"}  # It names the methods of a 405.
        if error.code == 503:
            headers["Retry-After"] = "1"
        return {"Error": sentences.get(error.code, error.description)}, error.code, headers

    # One function before and one after each request: Flask takes 3 us for each.
    @app.before_request
    def before():
        request.environ["mnist.began"] = time.perf_counter()
        receive_upload(request.environ)

    @app.after_request
    def after(response):
        response.headers["X-Content-Type-Options"] = "nosniff"
        if allow_origin:
            response.headers["Access-Control-Allow-Origin"] = allow_origin
            response.headers["Access-Control-Allow-Headers"] = "Content-Type"
            response.headers["Access-Control-Expose-Headers"] = "Retry-After"
        finish(request.environ, response)
        seconds = time.perf_counter() - request.environ["mnist.began"]
        metrics.count(response.status_code, seconds)
        if access_log:
            metrics.log(response, seconds)
        return response

    return app


def uploaded_picture():
    """Return the picture of the request, open in memory. Raises HTTPException where none came whole.

    It is the body, or the form's file FIELD. Flask's own request.files compiles regular expressions for the form's
    boundary, which browsers and curl choose anew each time: 0.3 ms, more than the rest of the request. The package
    multipart takes 0.02 ms. What it does not know, such as line ends without CR or `filename*` alone, Flask reads.
    """
    body, boundary = request.environ["wsgi.input"], request.mimetype_params.get("boundary")
    if request.environ.get("HTTP_CONTENT_ENCODING", "identity") != "identity":
        raise UnsupportedMediaType("send the picture as it is, without Content-Encoding")
    if request.mimetype.startswith("image/") or request.mimetype == "application/octet-stream":
        if "HTTP_TRANSFER_ENCODING" in request.environ:  # granian does not tell whether chunks came to their end.
            raise LengthRequired("send the picture's size along, as Content-Length")
        return body
    limits = {"memory_limit": MAX_UPLOAD, "spool_limit": MAX_UPLOAD}
    if request.mimetype == "multipart/form-data" and boundary:
        with suppress(MultipartError):
            for part in MultipartParser(body, boundary, charset="latin1", **limits).parts():  # It reads every name.
                if part.name == FIELD and part.filename is not None:
                    return part.file
        body.seek(0)
        parser = request.make_form_data_parser()
        parser.stream_factory = lambda *_, **__: io.BytesIO()  # Its own would need a disk, which may be full.
        with suppress(RequestEntityTooLarge):  # It has a thousand parts.
            _, _, files = parser.parse(body, request.mimetype, None, request.mimetype_params)
            if FIELD in files:
                return files[FIELD]
    raise BadRequest(f"no whole picture came: send it as the form's file '{FIELD}', or as image/png")


def png_uri(pixels):
    """Return (28, 28, 1) float32 of 0 to 255 as the data URI of a gray PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0].round().astype(np.uint8)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def parse_args(argv=None):
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=form)
    option = parser.add_argument
    option("--host", default=HOST, help="the address to listen on, 0.0.0.0 or :: for every network")
    option("--port", type=int, default=FLASK_PORT, help="the port to listen on")
    option("--model-repository", type=Path, default=MODEL_REPOSITORY, metavar="DIR", help="Triton's layout")
    option("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="processes that answer")
    option("--triton", metavar="HOST:PORT", help="let Triton answer, over gRPC: HOST:PORT[,HOST:PORT...]")
    option("--access-log", action="store_true", help="write a line for each request")
    option("--allow-origin", metavar="URL", help="let pages of this origin ask, such as http://localhost:8080")
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"argument --workers: {args.workers} is not a positive number")
    if not 0 < args.port < 2**16:
        parser.error(f"argument --port: {args.port} is not between 1 and {2**16 - 1}")
    if args.triton and not re.fullmatch(r"([^,/]+:\d+)(,[^,/]+:\d+)*|(dns|unix):\S+", args.triton):
        parser.error(f"argument --triton: {args.triton} is no HOST:PORT, nor a list of them, nor dns:///NAME:PORT")
    if args.allow_origin and not re.fullmatch(r"https?://[^/\s]+|\*", args.allow_origin):
        parser.error(f"argument --allow-origin: {args.allow_origin} is no origin, such as http://localhost:8080")
    return args


def main(argv=None) -> int:
    args = parse_args(argv)
    try:
        address = free_address(args.host, args.port)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", "no name of a host")
        sys.exit(f"server.py: cannot listen on {args.host} port {args.port}: {reason}; try another")
    try:
        engine = TritonEngine(args.triton) if args.triton else LocalEngine(args.model_repository / MODEL_NAME)
    except (OSError, ModelError) as error:
        sys.exit(f"server.py: {error}")
    host = f"[{address}]" if ":" in address else address
    print(f"{engine.name} answers at http://{host}:{args.port}/", flush=True)
    load_app = partial(create_app, engine, args.allow_origin, args.access_log)
    try:
        serve(load_app, engine.refresh, address, args.port, args.workers)
    except OSError as error:
        sys.exit(f"server.py: cannot start: {error.strerror}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
