"""The server that people write first, for benchmark.sh --peers: Flask's development server and Keras's model.predict.

MODEL=model_repository/mnist_model python scripts/benchmark/keras_peer.py PORT

It stands for the tutorial's original server. It has no reloader and runs without debugging, so it is if anything
faster and smaller than that.
"""

import logging
import os
import sys
from pathlib import Path

import keras
from flask import Flask, jsonify, request

sys.path.append(str(Path(__file__).resolve().parents[2]))

from mnist_preprocess import HOST, IMAGE_SHAPE, OUTPUT_NAME, open_image, preprocess
from saved_model import SAVED_MODEL, SIGNATURE, newest_version

path = newest_version(os.environ["MODEL"]) / SAVED_MODEL
model = keras.Sequential([keras.Input(IMAGE_SHAPE), keras.layers.TFSMLayer(path, call_endpoint=SIGNATURE)])
app = Flask(__name__)


@app.post("/mnist_infer")
def mnist_infer():
    pixels = preprocess(open_image(request.files["image"].stream))
    probabilities = model.predict(pixels[None], verbose=0)[OUTPUT_NAME][0]
    return jsonify(Prediction=str(probabilities.argmax()))


if __name__ == "__main__":
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # A line for each request would slow it down.
    app.run(HOST, int(sys.argv[1]))
