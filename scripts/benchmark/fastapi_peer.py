"""The same LiteRT model and the same preprocessing behind FastAPI, for benchmark.sh --peers.

MODEL=model_repository/mnist_model uvicorn --app-dir scripts/benchmark --factory fastapi_peer:create_app --workers 2
"""

import os
import sys
from pathlib import Path

from fastapi import FastAPI, UploadFile

sys.path.append(str(Path(__file__).resolve().parents[2]))

from mnist_preprocess import INPUT_NAME, OUTPUT_NAME, open_image, preprocess
from saved_model import SAVED_MODEL, SavedModel, newest_version


def create_app() -> FastAPI:
    """Return the application; uvicorn calls it in each worker, and FastAPI runs it in the event loop itself."""
    model = SavedModel(newest_version(os.environ["MODEL"]) / SAVED_MODEL)
    model.warm_up()
    app = FastAPI()

    @app.post("/mnist_infer")
    async def mnist_infer(image: UploadFile):
        pixels = preprocess(open_image(image.file))
        probabilities = model.predict({INPUT_NAME: pixels[None]})[OUTPUT_NAME][0]
        return {"Prediction": str(probabilities.argmax())}

    return app
