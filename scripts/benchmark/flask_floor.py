"""flask/server.py without the model: its application receives and decodes the same upload and answers a constant.

python scripts/benchmark/flask_floor.py --port 5001
"""

import sys
from pathlib import Path

sys.path += [str(Path(__file__).resolve().parents[2] / folder) for folder in ("flask", "")]

import server
from flask import Flask, jsonify
from server import load_worker, uploaded_file

from mnist_preprocess import open_image


def load_floor(*args):
    """Return what a granian worker serves: all of it the server's own, but for the application."""
    worker = load_worker(*args)
    worker.app = create_floor()
    return worker


def create_floor() -> Flask:
    """Return the application that reads and decodes its upload and answers 7."""
    app = Flask(__name__)

    @app.post("/mnist_infer")
    def mnist_infer():
        open_image(uploaded_file("image"))
        return jsonify(Prediction="7")

    return app


if __name__ == "__main__":
    server.load_worker = load_floor
    raise SystemExit(server.main())
