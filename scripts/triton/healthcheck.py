"""Ask every model that Triton serves for inferences, of zeros: Docker's HEALTHCHECK, run in the container.

Triton calls a model ready whose process is dead; this leaves with status 1 then, and where no answer comes.
A refusal is an answer: a model need not take zeros.
"""

import json
import sys
from http.client import HTTPConnection
from math import prod
from urllib.parse import quote

SECONDS = 20
LARGEST = 1_000_000  # Elements of an input; a model that takes more is not asked, since that would cost it too much.
ZEROS = {"BOOL": False, "BYTES": ""}  # Of the other data types, it is 0.


def ask(path, body=None):
    """Return Triton's answer, which may be {"error": …}."""
    connection = HTTPConnection("127.0.0.1", 8000, timeout=SECONDS)
    connection.request("POST" if body else "GET", f"/v2/{path}", json.dumps(body) if body else None)
    return json.load(connection.getresponse())


def zeros(metadata):
    """Return the smallest inputs that a model's metadata allows."""
    inputs = []
    for tensor in metadata["inputs"]:
        shape = [max(size, 1) for size in tensor["shape"]]
        data = [ZEROS.get(tensor["datatype"], 0)] * min(prod(shape), LARGEST + 1)
        inputs.append({"name": tensor["name"], "datatype": tensor["datatype"], "shape": shape, "data": data})
    return inputs


def instances(config):
    """Return how many processes run a model: Triton gives them requests in turn, so that one alone may be dead."""
    return sum(group["count"] * max(1, len(group.get("gpus", []))) for group in config["instance_group"])


def main():
    """Return the exit status."""
    try:
        for model in ask("repository/index", {"ready": True}):
            path = f"models/{quote(model['name'])}"
            inputs = zeros(ask(path))
            if all(len(tensor["data"]) <= LARGEST for tensor in inputs):
                for _ in range(2 * instances(ask(f"{path}/config"))):
                    error = ask(f"{path}/infer", {"inputs": inputs}).get("error", "")
                    if "is not healthy" in error:
                        print(error, file=sys.stderr)
                        return 1
    except (OSError, ValueError) as error:
        print(f"Triton does not answer: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
