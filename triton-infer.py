"""Ask Triton what digit a picture shows, over HTTP and over gRPC.

python triton-infer.py
python triton-infer.py my_digit.png another_digit.jpg
python triton-infer.py --top 3 --show my_digit.png
"""

import argparse
import os
import re
import signal
import struct
import sys
import zlib
from contextlib import contextmanager

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:

    def stop(*_):
        os.write(2, b"triton-infer.py: stopped\n")
        os._exit(130)

    signal.signal(signal.SIGINT, stop)  # Ctrl-C is one line at every moment, while the clients are imported as well.

from http.client import HTTPException

import numpy as np
from tritonclient import grpc as grpcclient
from tritonclient import http as httpclient
from tritonclient.utils import InferenceServerException

from mnist_preprocess import (
    CLASSES,
    HOST,
    IMAGE_SHAPE,
    INPUT_NAME,
    MODEL_NAME,
    OUTPUT_NAME,
    SAMPLE_IMAGE,
    TRITON_GRPC_PORT,
    TRITON_HTTP_PORT,
    ImageError,
    open_image,
    preprocess,
)

EXPECTED = {"inputs": (INPUT_NAME, "FP32", [-1, *IMAGE_SHAPE]), "outputs": (OUTPUT_NAME, "FP32", [-1, CLASSES])}
# Probability, class, and label where there is one: a damaged labels.txt may have another digit's there.
CLASS = re.compile(rb"(\d\.\d+):(\d+)(?::(\2\s*|\D.*|))?", re.DOTALL)
# What the clients raise for answers that are not Triton's: other JSON, deep JSON, lengths that are not true.
NONSENSE = (
    ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, RuntimeError, TypeError, ValueError,
    struct.error, zlib.error,
)  # fmt: skip


class ServerError(Exception):
    """A server that gave no answer; the message is a sentence for the user."""


class TooLate(SystemExit):
    """No answer in time. gevent, on which the HTTP client stands, lets no other kind out of its event loop."""


def infer(client_module, url, model_name, batch, timeout, top=None):
    """Return the model's probabilities (n, 10) float32 for a batch of pictures (n, 28, 28, 1) float32.

    With `top`, return of each picture the so many best classes instead, (n, top) as Triton writes them:
    b"0.999:7:7" is probability, class and its line in labels.txt.

    client_module is tritonclient.http or tritonclient.grpc, url its "host:port", timeout in seconds.
    """
    # Of a name's addresses HTTP tries one after the other, gRPC all. HTTP goes past proxies, and gRPC shall, too.
    if client_module is httpclient:
        client_options = {"connection_timeout": timeout / 2, "network_timeout": 2 * timeout}
    else:
        client_options = {"channel_args": [("grpc.enable_http_proxy", 0)]}
    with client_module.InferenceServerClient(url, **client_options) as client:
        check_model(client_module, client, model_name)
        inputs = [client_module.InferInput(INPUT_NAME, batch.shape, "FP32")]
        inputs[0].set_data_from_numpy(batch)
        outputs = [client_module.InferRequestedOutput(OUTPUT_NAME, class_count=top or 0)]
        results = client.infer(model_name, inputs, outputs=outputs)
        return results.as_numpy(OUTPUT_NAME)


def ask(client_module, url, model_name, batch, timeout, top=None):
    """Return what infer() does.

    Raises ServerError when the server is away, takes longer than timeout, serves no such model, or answers otherwise.
    """
    try:
        with time_limit(timeout):
            answer = infer(client_module, url, model_name, batch, timeout, top)
        if is_valid(answer, len(batch), top):
            return answer
        labels = ", or its labels.txt names other digits" if top else ""
        raise ServerError(f"what {url} answered is not the {OUTPUT_NAME} of {model_name} for one picture{labels}")
    except TooLate:
        raise ServerError(f"{url} did not answer within {timeout:g} s: see --timeout") from None
    except (OSError, HTTPException) as error:
        raise ServerError(f"no Triton answers at {url} ({error}): start it with scripts/triton_local.sh") from error
    except InferenceServerException as error:
        what = str(error.message()).partition("\n")[0]
        if error.status() == "StatusCode.UNAVAILABLE":
            raise ServerError(f"no Triton answers at {url} ({what}): start it with scripts/triton_local.sh") from error
        raise ServerError(f"Triton at {url} did not answer: {what}") from error
    except NONSENSE as error:
        raise ServerError(f"what answers at {url} is not Triton: stop it, or give Triton's address") from error


@contextmanager
def time_limit(seconds):
    """Raise TooLate when the block takes longer. The clients' own limits are for each byte, or for each call."""

    def stop(*_):
        raise TooLate

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def check_model(client_module, client, model_name):
    """Raise ServerError unless the model has the inputs and outputs that this client sends and reads."""
    metadata = client.get_model_metadata(model_name, **({"as_json": True} if client_module is grpcclient else {}))
    for side, expected in EXPECTED.items():
        # gRPC's JSON writes sizes as strings.
        found = [(tensor["name"], tensor["datatype"], [int(n) for n in tensor["shape"]]) for tensor in metadata[side]]
        if expected not in found or (side == "inputs" and len(found) > 1):
            raise ServerError(f"the {side} of {model_name} are {describe(found)}, not {describe([expected])}")


def describe(tensors):
    return ", ".join(f"{name} {datatype} {shape}" for name, datatype, shape in tensors)


def is_valid(answer, count, top):
    """Tell whether the answer is what infer() returns for `count` pictures."""
    if top:
        return np.shape(answer) == (count, top) and all(CLASS.fullmatch(text) for text in answer.flat)
    return np.shape(answer) == (count, CLASSES) and answer.dtype == np.float32 and np.isfinite(answer).all()


def shown(picture):
    """Return a picture (28, 28, 1) of 0 to 255 in the terminal's 24 grays, two pixels in each character."""
    grays = (232 + picture[..., 0] * (24 / 256)).astype(int)
    pairs = np.stack([grays[::2], grays[1::2]], axis=-1)  # The colour of an upper half block, and of what is below it.
    return "\n".join("".join(f"\x1b[38;5;{upper};48;5;{lower}m▀" for upper, lower in row) + "\x1b[0m" for row in pairs)


def best(classes):
    """Return Triton's names of classes as people read them: b"0.999:7:7" as 7 (99.90%)."""
    found = [CLASS.fullmatch(text).groups() for text in classes]
    return printable(
        ", ".join(
            f"{(label or number).decode(errors='replace')} ({float(share):.2%})" for share, number, label in found
        )
    )


def printable(text):
    """Return what a server says, as one line that does nothing to a terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text)[:1000]


def parse_args(argv=None):
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=form)
    option, count = parser.add_argument, range(1, CLASSES + 1)
    option("images", nargs="*", default=argparse.SUPPRESS, metavar="IMAGE", help="pictures of a digit each")
    address = {"type": host_and_port, "metavar": "HOST:PORT", "help": "where Triton is"}
    option("--http-url", default=f"{HOST}:{TRITON_HTTP_PORT}", **address)
    option("--grpc-url", default=f"{HOST}:{TRITON_GRPC_PORT}", **address)
    option("--model-name", default=MODEL_NAME, metavar="NAME", help="the model to ask")
    option("--top", type=int, choices=count, metavar="N", help="print the N best digits and their probabilities")
    option("--show", action="store_true", help="print the picture, too, as the model sees it")
    option("--timeout", type=seconds, default=10, metavar="SECONDS", help="how long to wait for an answer")
    return parser.parse_args(argv, argparse.Namespace(images=[SAMPLE_IMAGE]))


def host_and_port(text):
    # An IPv6 address stands in brackets.
    match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^][:/?#@\s]+):([0-9]{1,5})", text)
    if not match or int(match[2]) not in range(1, 2**16):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form HOST:PORT")
    return text


def seconds(text):
    number = float(text)
    if not 0 < number <= 86_400:
        raise argparse.ArgumentTypeError(f"{text} is not in 0 to 86400")
    return number


def main(argv=None) -> int:
    args = parse_args(argv)
    try:
        if sys.stdout is None:
            raise OSError("it is closed")
        sys.stdout.reconfigure(errors="backslashreplace")  # A file's name may hold what the terminal cannot show.
        return run(args)
    except OSError as error:
        sys.stdout = None  # Or Python would try to write the rest at its end.
        print(f"triton-infer.py: cannot write to standard output: {error}", file=sys.stderr)
        return 1


def run(args) -> int:
    for path in args.images:
        try:
            batch = preprocess(open_image(path))[None]
        except (ImageError, OSError) as error:
            print(f"triton-infer.py: cannot read a digit from {path}: {error}", file=sys.stderr)
            return 1
        if args.show:
            print(shown(batch[0]))
        prefix = f"{path}: " if len(args.images) > 1 else ""
        for service, client_module, url in (("HTTP", httpclient, args.http_url), ("gRPC", grpcclient, args.grpc_url)):
            try:
                answer = ask(client_module, url, args.model_name, batch, args.timeout, args.top)[0]
            except ServerError as error:
                print(f"triton-infer.py: {printable(str(error))}", file=sys.stderr)
                return 1
            prediction = best(answer) if args.top else answer.argmax()
            print(f"{prefix}{service} Service | Prediction: {prediction}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
