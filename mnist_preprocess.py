"""Turn any picture of a digit into what the model reads, and name what both servers share.

from mnist_preprocess import open_image, preprocess

pixels = preprocess(open_image("images/sample_image.png"))  # (28, 28, 1) float32, 0 to 255, white on black
"""

from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

ROOT = Path(__file__).resolve().parent
MODEL_REPOSITORY = ROOT / "model_repository"
SAMPLE_IMAGE = ROOT / "images" / "sample_image.png"

MODEL_NAME = "mnist_model"
INPUT_NAME = "input_1"
OUTPUT_NAME = "output_1"
IMAGE_SHAPE = (28, 28, 1)
CLASSES = 10

HOST = "127.0.0.1"
FLASK_PORT = 5000
TRITON_HTTP_PORT = 8000
TRITON_GRPC_PORT = 8001
TRITON_METRICS_PORT = 8002


class ImageError(ValueError):
    """A picture that cannot be read, or that shows no digit; the message is a sentence for the user."""


class NoDigitError(ImageError):
    """A picture that was read and shows nothing that could be a digit."""


def open_image(file) -> Image.Image:
    """Open a picture from a path or a binary file object.

    Raises ImageError when it is not a picture that Pillow reads; OSError when the file itself cannot be read.
    """
    try:
        image = Image.open(file)
        image.load()
    except UnidentifiedImageError as error:
        raise ImageError("the file is not a picture that can be read") from error
    return image


def preprocess(image: Image.Image) -> np.ndarray:
    """Return the digit as MNIST stores it: (28, 28, 1) float32, raw values 0 to 255, white ink on black."""
    gray = np.asarray(image.convert("L").resize(IMAGE_SHAPE[:2]), np.float32)
    return gray.reshape(IMAGE_SHAPE)
