"""flask/server.py without the model: its application receives and decodes the same upload and answers a constant.

python scripts/benchmark/flask_floor.py --port 5001
"""

import sys
from pathlib import Path

sys.path += [str(Path(__file__).resolve().parents[2] / folder) for folder in ("flask", "")]

import server
from flask import Flask, jsonify, request

from mnist_preprocess import open_image


def load_floor(model):
    """Return what a granian worker serves, in place of server.load_worker."""
    app = Flask(__name__)

    @app.post("/mnist_infer")
    def mnist_infer():
        open_image(request.files["image"].stream)
        return jsonify(Prediction="7")

    return server.Worker(app)


if __name__ == "__main__":
    server.load_worker = load_floor  # All else stays the server's own: granian's settings, workers, options.
    raise SystemExit(server.main())
