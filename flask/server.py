"""Serve the newest MNIST model over HTTP: a picture of a digit in, the digit out.

python flask/server.py
curl -X POST -F image=@images/sample_image.png http://127.0.0.1:5000/mnist_infer
"""

import argparse
import ctypes
import io
import os
import signal
import socket
import struct
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

from flask import Flask, jsonify, request
from granian import Granian
from granian.constants import Interfaces, Loops
from granian.rsgi import ProtocolClosed
from multipart import MultipartError, MultipartParser
from werkzeug.exceptions import BadRequest, HTTPException

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

MAX_UPLOAD = 32 * 2**20  # Bytes: a 50-megapixel JPEG fits.
MAX_DROPPED = 8 * MAX_UPLOAD
ACCEPT_SECONDS = 0.1  # How long a stopping worker accepts the connections that were made before.
DRAIN_SECONDS = 0.5  # How long it then tells its clients that it closes the connection.
SO_ATTACH_FILTER = 26  # From Linux's asm-generic/socket.h; Python's socket does not name it.


def create_app(model) -> Flask:
    """Return the application that answers with `model`, a SavedModel or whatever predicts like one."""
    app = Flask(__name__)
    app.config["MAX_CONTENT_LENGTH"] = MAX_UPLOAD

    @app.post("/mnist_infer")
    def mnist_infer():
        """Answer {"Prediction": digit} for the picture in the form's file `image`; ?details=1 adds probabilities."""
        upload = uploaded_file("image")
        if upload is None:
            return jsonify(Error="no picture came: send it as the form's file 'image'"), 400
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
    """Return the file `name` of the request's form, open in memory, or None where there is none.

    Flask's own request.files compiles regular expressions for the form's boundary, which browsers and curl choose anew
    each time: 0.3 ms, more than the rest of the request. The package multipart takes 0.02 ms. Raises BadRequest for a
    damaged form.
    """
    boundary = request.mimetype_params.get("boundary")
    if request.mimetype != "multipart/form-data" or not boundary:
        return None
    try:
        for part in MultipartParser(request.stream, boundary, memory_limit=MAX_UPLOAD, spool_limit=MAX_UPLOAD):
            if part.name == name and part.filename is not None:
                return part.file
    except MultipartError as error:
        raise BadRequest(f"the form is damaged ({error}): send the picture again") from error
    return None


class Worker:
    """Runs a WSGI application in a granian worker, over granian's own interface RSGI.

    Through granian's WSGI interface an application waits for its upload in a thread, and a few slow clients stop the
    server. Here Rust and the event loop wait for any number of them, and the application finds its upload complete.
    """

    def __init__(self, app, parent):
        self.app = app
        self.parent = parent
        self.draining = False

    def __rsgi_init__(self, loop):
        # Ctrl-C reaches a whole process group: leave it, so that the main process alone says when to stop.
        os.setpgrp()
        # granian stops a worker on SIGTERM as on SIGINT, and at once: a client that has just connected, or that is
        # about to send its next request, loses it. So SIGTERM drains the worker first, and SIGINT then stops it.
        loop.add_signal_handler(signal.SIGTERM, self.drain, loop)
        loop.call_soon(signal.pthread_sigmask, signal.SIG_UNBLOCK, [signal.SIGTERM])
        self.watch_parent(loop)

    def watch_parent(self, loop):
        """Stop soon after the main process was killed: without it, a worker would hold the port for ever."""
        if os.getppid() == self.parent:
            loop.call_later(1, self.watch_parent, loop)
        else:
            self.drain(loop)

    def drain(self, loop):
        """Take no more connections, let the answers on the open ones say that they are the last, then stop."""
        self.draining = True
        # The kernel completes connections before granian accepts them, and a closing listener resets those that wait.
        # So none is begun first: Linux's clients ask again after a second, and find another worker.
        for number in listeners():
            refuse_new_connections(number)
        loop.call_later(ACCEPT_SECONDS, close_listeners)
        loop.call_later(ACCEPT_SECONDS + DRAIN_SECONDS, os.kill, os.getpid(), signal.SIGINT)

    async def __rsgi__(self, scope, protocol):
        headers = scope.headers
        try:
            body, complete = await read_body(headers, protocol)
        except ProtocolClosed:  # The client went away: nobody waits for an answer.
            return
        server_name, _, server_port = scope.server.rpartition(":")
        environ = {
            "REQUEST_METHOD": scope.method,
            "SCRIPT_NAME": "",
            "PATH_INFO": scope.path,
            "QUERY_STRING": scope.query_string,
            "CONTENT_TYPE": headers.get("content-type") or "",
            "CONTENT_LENGTH": str(len(body) if complete else MAX_UPLOAD + 1),
            "SERVER_NAME": server_name,
            "SERVER_PORT": server_port,
            "SERVER_PROTOCOL": f"HTTP/{scope.http_version}",
            "HTTP_HOST": headers.get("host") or scope.server,
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": scope.scheme,
            "wsgi.input": io.BytesIO(body),
            "wsgi.errors": sys.stderr,
            "wsgi.multithread": False,
            "wsgi.multiprocess": True,
            "wsgi.run_once": False,
        }
        started = []
        chunks = self.app(environ, lambda status, headers, exc_info=None: started.extend((status, headers)))
        status, headers = started
        if self.draining or not complete:
            headers.append(("Connection", "close"))
        protocol.response_bytes(int(status.partition(" ")[0]), headers, b"".join(chunks))


async def read_body(headers, protocol):
    """Return what was uploaded, and whether that is all of it: no more than MAX_UPLOAD is kept.

    What is too large is read on and dropped, up to MAX_DROPPED: most clients read no answer before they have sent all.
    """
    length = headers.get("content-length")
    if length is not None and int(length) <= MAX_UPLOAD:
        return await protocol(), True
    body, size = bytearray(), 0
    async for chunk in protocol:
        size += len(chunk)
        if size > MAX_DROPPED:
            break
        if size <= MAX_UPLOAD:
            body += chunk
    return (bytes(body), True) if size <= MAX_UPLOAD else (b"", False)


def listeners():
    """Return the numbers of this process's listening sockets, which granian keeps to itself."""
    numbers = []
    for number in map(int, os.listdir("/dev/fd")):
        try:
            with socket.socket(fileno=os.dup(number)) as candidate:
                if candidate.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    numbers.append(number)
        except OSError:
            continue  # Not a socket, or closed since it was listed.
    return numbers


def refuse_new_connections(number):
    """Let a listening socket drop what begins a connection, on Linux: no connection is then in its queue for long.

    The filter is classic BPF (Documentation/networking/filter.rst in Linux), and reads from the TCP header on.
    """
    if sys.platform != "linux":
        return
    program = ctypes.create_string_buffer(
        struct.pack("=HBBI", 0x30, 0, 0, 13)  # Load the byte of the TCP header that holds the flags;
        + struct.pack("=HBBI", 0x45, 0, 1, 0x02)  # where SYN is set,
        + struct.pack("=HBBI", 0x06, 0, 0, 0)  # drop the packet,
        + struct.pack("=HBBI", 0x06, 0, 0, 0xFFFFFFFF)  # else keep all of it.
    )
    # A sandbox need not have filters: the worker stops all the same.
    with suppress(OSError), socket.socket(fileno=os.dup(number)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("@HP", 4, ctypes.addressof(program)))


def close_listeners():
    """Close this process's listening sockets, and keep their numbers taken."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number in listeners():
        os.dup2(nothing, number)


def load_worker(model, parent):
    """Return what a granian worker of the process `parent` serves, its model warm before the worker opens the port."""
    model.warm_up()
    return Worker(create_app(model), parent)


def hold_sigterm_over_fork():
    """Hold SIGTERM back from a worker from its birth: __rsgi_init__ lets it through once there is what drains it.

    The handler that a fork inherits would swallow the signal, and the main process wait for ever for a worker that goes
    on; as would uvloop, for a signal that comes before it runs.
    """
    mask = partial(signal.pthread_sigmask, signal.SIG_BLOCK, [signal.SIGTERM])
    unmask = partial(signal.pthread_sigmask, signal.SIG_UNBLOCK, [signal.SIGTERM])
    os.register_at_fork(before=mask, after_in_parent=unmask)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--host", default=HOST, help="the address to listen on, 0.0.0.0 for every network")
    parser.add_argument("--port", type=int, default=FLASK_PORT, help="the port to listen on")
    parser.add_argument(
        "--model-repository", type=Path, default=MODEL_REPOSITORY, metavar="DIR", help="Triton's layout"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N", help="processes that answer")
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"argument --workers: {args.workers} is not a positive number")
    return args


def main(argv=None) -> int:
    args = parse_args(argv)
    try:
        address = socket.gethostbyname(args.host)
        # Workers share the port, so granian would also share it with a server that is there already.
        socket.create_server((address, args.port)).close()
        version = newest_version(args.model_repository / MODEL_NAME)
        model = SavedModel(version / SAVED_MODEL)
    except (OSError, OverflowError) as error:
        print(f"server.py: cannot listen on {args.host}:{args.port}: {error}; try another --port", file=sys.stderr)
        return 1
    except ModelError as error:
        print(f"server.py: {error}", file=sys.stderr)
        return 1
    print(f"{MODEL_NAME} version {version.name}, run by {model.runtime}", flush=True)
    server = Granian(
        __name__,
        address,
        args.port,
        interface=Interfaces.RSGI,
        loop=Loops.uvloop,  # 1.08 times as fast as asyncio with one client, 1.04 with 16.
        workers=args.workers,
        websockets=False,
        respawn_failed_workers=True,
    )
    hold_sigterm_over_fork()
    # Fork or pickle hands the converted model to each worker, and to each that replaces a dead one.
    server.serve(target_loader=partial(load_worker, model, os.getpid()), wrap_loader=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
