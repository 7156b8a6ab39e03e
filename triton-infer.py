"""Ask Triton what digit a picture shows, over HTTP and over gRPC.

python triton-infer.py
python triton-infer.py my_digit.png another_digit.jpg
"""

import argparse
import sys
from http.client import HTTPException

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


class ServerError(RuntimeError):
    """A server that gave no answer; the message is a sentence for the user."""


def infer(client_module, url, model_name, batch, timeout):
    """Return the model's probabilities (n, 10) float32 for a batch of pictures (n, 28, 28, 1) float32.

    client_module is tritonclient.http or tritonclient.grpc, url its "host:port", timeout in seconds. Raises
    ServerError when the server is away, or does not serve such a model.
    """
    # The two clients differ in where they take their time limit.
    if client_module is httpclient:
        client_options, call_options = {"connection_timeout": timeout, "network_timeout": timeout}, {}
    else:
        client_options, call_options = {}, {"client_timeout": timeout}
    try:
        with client_module.InferenceServerClient(url, **client_options) as client:
            check_model(client_module, client, model_name, call_options)
            inputs = [client_module.InferInput(INPUT_NAME, batch.shape, "FP32")]
            inputs[0].set_data_from_numpy(batch)
            outputs = [client_module.InferRequestedOutput(OUTPUT_NAME)]
            results = client.infer(model_name, inputs, outputs=outputs, **call_options)
            return results.as_numpy(OUTPUT_NAME)
    except (OSError, HTTPException) as error:
        raise ServerError(f"no Triton answers at {url} ({error}): start it with scripts/triton_local.sh") from error
    except InferenceServerException as error:
        what = error.message().partition("\n")[0]
        if error.status() == "StatusCode.UNAVAILABLE":
            raise ServerError(f"no Triton answers at {url} ({what}): start it with scripts/triton_local.sh") from error
        raise ServerError(f"Triton at {url} did not answer: {what}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ServerError(f"what answers at {url} is not Triton: stop it, or give Triton's address") from error


def check_model(client_module, client, model_name, call_options):
    """Raise ServerError unless the model has the inputs and outputs that this client sends and reads."""
    if client_module is grpcclient:
        call_options = call_options | {"as_json": True}
    metadata = client.get_model_metadata(model_name, **call_options)
    for side, expected in EXPECTED.items():
        # gRPC's JSON writes sizes as strings.
        found = [(tensor["name"], tensor["datatype"], [int(n) for n in tensor["shape"]]) for tensor in metadata[side]]
        if expected not in found or (side == "inputs" and len(found) > 1):
            raise ServerError(f"the {side} of {model_name} are {describe(found)}, not {describe([expected])}")


def describe(tensors):
    return ", ".join(f"{name} {datatype} {shape}" for name, datatype, shape in tensors)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "images", nargs="*", default=argparse.SUPPRESS, metavar="IMAGE", help="pictures of a digit each"
    )
    for service, port in (("http", TRITON_HTTP_PORT), ("grpc", TRITON_GRPC_PORT)):
        parser.add_argument(
            f"--{service}-url",
            type=host_and_port,
            default=f"{HOST}:{port}",
            metavar="HOST:PORT",
            help="where Triton is",
        )
    parser.add_argument("--model-name", default=MODEL_NAME, metavar="NAME", help="the model to ask")
    parser.add_argument("--timeout", type=seconds, default=10, metavar="SECONDS", help="how long to wait for an answer")
    return parser.parse_args(argv, argparse.Namespace(images=[SAMPLE_IMAGE]))


def host_and_port(text):
    host, _, port = text.rpartition(":")
    if not host or "/" in text or not port.isdecimal() or int(port) not in range(1, 2**16):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form HOST:PORT")
    return text


def seconds(text):
    number = float(text)
    if not 0 < number <= 86_400:
        raise argparse.ArgumentTypeError(f"{text} is not in 0 to 86400")
    return number


def main(argv=None) -> int:
    args = parse_args(argv)
    for path in args.images:
        try:
            batch = preprocess(open_image(path))[None]
        except (ImageError, OSError) as error:
            print(f"triton-infer.py: cannot read a digit from {path}: {error}", file=sys.stderr)
            return 1
        prefix = f"{path}: " if len(args.images) > 1 else ""
        for service, client_module, url in (("HTTP", httpclient, args.http_url), ("gRPC", grpcclient, args.grpc_url)):
            try:
                probabilities = infer(client_module, url, args.model_name, batch, args.timeout)[0]
            except ServerError as error:
                print(f"triton-infer.py: {error}", file=sys.stderr)
                return 1
            print(f"{prefix}{service} Service | Prediction: {probabilities.argmax()}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
