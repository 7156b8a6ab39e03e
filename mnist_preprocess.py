"""Turn any picture of a digit into what the model reads, and name what both servers share.

from mnist_preprocess import open_image, preprocess

pixels = preprocess(open_image("images/sample_image.png"))  # (28, 28, 1) float32, 0 to 255, white on black
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageChops

from picture_file import ImageError as ImageError  # For those who call open_image().
from picture_file import NoDigitError, as_image, as_pixels, decoded

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


def open_image(file) -> Image.Image:
    """Open and decode a picture from a path or a binary file object; of an animation, its first frame.

    Raises ImageError when it is not a picture that can be read, or has more pixels or parts than picture_file.py
    allows; OSError when there is no such file.
    """
    if hasattr(file, "read"):
        file.seek(0)
        return decoded(file.read())
    return decoded(Path(file).read_bytes())


def preprocess(image: Image.Image) -> np.ndarray:
    """Return the digit as MNIST stores it: (28, 28, 1) float32, raw values 0 to 255, white ink on black.

    MNIST's makers fitted NIST's black and white digits into 20x20 pixels, keeping the aspect ratio, anti-aliased, and
    put their centre of mass at the centre of 28x28 (http://yann.lecun.com/exdb/mnist/; LeCun et al., Gradient-Based
    Learning Applied to Document Recognition, Proceedings of the IEEE 86, 1998, section III A). A picture that is
    already like that is returned unchanged. Raises NoDigitError when there is no ink.
    """
    mnist = as_it_is(image)  # Before anything else: what follows takes longer than the model does.
    if mnist is None:
        pixels = as_pixels(image)
        mnist = as_it_is(as_image(pixels)) if pixels.shape == IMAGE_SHAPE else None
    if mnist is None:
        from digit_finder import find_digit  # Here, because SciPy's import takes 0.14 s, which most uploads can spare.

        mnist = size_normalised(find_digit(pixels))
    return mnist.reshape(IMAGE_SHAPE)


def as_it_is(image: Image.Image) -> np.ndarray | None:
    """Return a picture that is already MNIST-like, as float32 and white on black; None when it is not.

    All of MNIST's 70 000 pictures have these marks: 28x28 gray, paper exactly 0, ink up to 254 or 255, the longer side
    of the ink's box 19 or 20 pixels, and the centre of mass within half a pixel of (14, 14).
    """
    if image.mode != "L" or image.size != IMAGE_SHAPE[:2] or image.info:
        return None
    if image.getpixel((0, 0)) >= 128:
        image = ImageChops.invert(image)
    left, top, right, bottom = image.getbbox() or (0, 0, 0, 0)
    if image.getextrema()[1] < 254 or not 19 <= max(right - left, bottom - top) <= 20:
        return None
    pixels = np.frombuffer(image.tobytes(), np.uint8).astype(np.float32)
    x, y, ink = (pixels @ MOMENTS).tolist()
    return pixels if max(abs(x / ink - 14), abs(y / ink - 14)) < 0.53 else None


# What the pixels, row by row, are weighted with to sum up to x times ink, y times ink, and ink.
MOMENTS = np.stack([*reversed(np.indices((28, 28))), np.ones((28, 28))], axis=-1).reshape(-1, 3).astype(np.float32)


def size_normalised(ink: np.ndarray) -> np.ndarray:
    """Return (28, 28) float32 of (height, width) ink: fitted into 20x20, its centre of mass in the middle."""
    # Drawn with sharp edges at four times the size, as NIST's digits were black and white, then averaged.
    height, width = ink.shape
    scale = 80 / max(height, width)
    size = max(4, round(width * scale)), max(4, round(height * scale))
    large = Image.fromarray(np.pad(ink, 1)).resize(size, Image.Resampling.BICUBIC, (1, 1, width + 1, height + 1))
    canvas = np.zeros((80, 80), np.float32)
    canvas[: size[1], : size[0]] = np.clip(2 * np.asarray(large) - 0.5, 0, 1)
    small = canvas.reshape(20, 4, 20, 4).mean(axis=(1, 3))
    if not small.any():
        raise NoDigitError("no digit to be seen: the ink is too faint")
    small *= 255 / small.max()
    row, column = (np.average(np.arange(20), weights=small.sum(axis)) for axis in (1, 0))
    top, left = (int(np.clip(round(14 - centre), 0, 8)) for centre in (row, column))
    mnist = np.zeros(IMAGE_SHAPE[:2], np.float32)
    mnist[top : top + 20, left : left + 20] = small
    return mnist
