"""Serve the newest MNIST model over HTTP: a picture of a digit in, the digit out.

python flask/server.py
curl -X POST -F image=@images/sample_image.png http://127.0.0.1:5000/mnist_infer
"""

import argparse
import io
import os
import socket
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

from flask import Flask, Request, jsonify, request
from multipart import MultipartError, MultipartParser
from serving import MAX_UPLOAD, finish, receive_upload, serve
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

# Appended, so that nothing in the project's folder can shadow an installed package, as flask/ would shadow flask.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from mnist_preprocess import (
    FLASK_PORT,
    HOST,
    INPUT_NAME,
    MODEL_NAME,
    MODEL_REPOSITORY,
    OUTPUT_NAME,
    ImageError,
    NoDigitError,
    open_image,
    preprocess,
)
from saved_model import SAVED_MODEL, ModelError, SavedModel, newest_version


class RequestInMemory(Request):
    def _get_file_stream(self, *sizes, **names):
        """Return what a file of a form is read into: Werkzeug's own would need a disk, which may be full."""
        return io.BytesIO()


def create_app(model) -> Flask:
    """Return the application that answers with `model`, a SavedModel or whatever predicts like one."""
    model.warm_up()
    app = Flask(__name__, static_folder=None)
    app.request_class = RequestInMemory
    app.before_request(receive_upload)
    app.after_request(finish)

    @app.post("/mnist_infer")
    def mnist_infer():
        """Answer {"Prediction": digit} for the picture in the form's file `image`; ?details=1 adds probabilities."""
        upload = uploaded_file("image")
        if upload is None:
            return jsonify(Error="no whole picture came: send it as the form's file 'image'"), 400
        try:
            pixels = preprocess(open_image(upload))
        except NoDigitError as error:
            return jsonify(Error=str(error)), 422
        except ImageError as error:
            return jsonify(Error=str(error)), 400
        probabilities = model.predict({INPUT_NAME: pixels[None]})[OUTPUT_NAME][0]
        answer = {"Prediction": str(probabilities.argmax())}
        if request.query_string and request.args.get("details") == "1":  # Even no query takes time to parse.
            answer["Probabilities"] = probabilities.tolist()
        return jsonify(answer)

    @app.errorhandler(HTTPException)
    def http_error(error):
        """Answer every other error in JSON too, as one sentence."""
        sentences = {
            404: f"there is nothing at {request.path}: POST a picture to /mnist_infer",
            405: f"{request.path} takes no {request.method}: POST a picture to it",
            413: f"the upload is larger than {MAX_UPLOAD // 2**20} MiB: send a smaller picture",
            500: "the server failed: its log says why",
        }
        return jsonify(Error=sentences.get(error.code, error.description)), error.code

    return app


def uploaded_file(name):
    """Return the file `name` of the request's form, open in memory, or None where none came whole.

    Flask's own request.files compiles regular expressions for the form's boundary, which browsers and curl choose anew
    each time: 0.3 ms, more than the rest of the request. The package multipart takes 0.02 ms. What it does not know,
    such as line ends without CR or `filename*` alone, Flask reads.
    """
    form, boundary = request.environ["wsgi.input"], request.mimetype_params.get("boundary")
    if request.mimetype != "multipart/form-data" or not boundary:
        return None
    limits = {"memory_limit": MAX_UPLOAD, "spool_limit": MAX_UPLOAD}
    with suppress(MultipartError):
        for part in MultipartParser(form, boundary, charset="latin1", **limits).parts():  # Latin-1 reads every name.
            if part.name == name and part.filename is not None:
                return part.file
    form.seek(0)
    with suppress(RequestEntityTooLarge):  # It has a thousand parts.
        return request.files.get(name)


def free_address(host, port):
    """Return the IP address of `host`; OSError or UnicodeError where there is none, or its port is taken.

    Workers share the port, so granian would also share it with a server that is there already.
    """
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # A server that has just stopped is no obstacle.
        listener.bind(address)
    return address[0]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--host", default=HOST, help="the address to listen on, 0.0.0.0 or :: for every network")
    parser.add_argument("--port", type=int, default=FLASK_PORT, help="the port to listen on")
    parser.add_argument(
        "--model-repository", type=Path, default=MODEL_REPOSITORY, metavar="DIR", help="Triton's layout"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N", help="processes that answer")
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"argument --workers: {args.workers} is not a positive number")
    if not 0 < args.port < 2**16:
        parser.error(f"argument --port: {args.port} is not between 1 and {2**16 - 1}")
    return args


def main(argv=None) -> int:
    args = parse_args(argv)
    try:
        address = free_address(args.host, args.port)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", "no name of a host")
        print(f"server.py: cannot listen on {args.host} port {args.port}: {reason}; try another", file=sys.stderr)
        return 1
    try:
        version = newest_version(args.model_repository / MODEL_NAME)
        model = SavedModel(version / SAVED_MODEL)
    except (OSError, ModelError) as error:
        print(f"server.py: {error}", file=sys.stderr)
        return 1
    print(f"{MODEL_NAME} version {version.name}, run by {model.runtime}", flush=True)
    serve(partial(create_app, model), address, args.port, args.workers)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
