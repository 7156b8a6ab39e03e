"""Turn any picture of a digit into what the model reads, and name what both servers share.

    from mnist_preprocess import open_image, preprocess

    pixels = preprocess(open_image("images/sample_image.png"))  # (28, 28, 1) float32, 0 to 255, white on black
"""

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter, UnidentifiedImageError

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

# What people upload. A decoder that nobody needs is only a way in for a broken file.
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "MPO", "ICO")
MAX_PIXELS = 100_000_000
WORK_SIDE = 400  # Large pictures are worked on at this longer side or up to twice it: a digit 1/20 as high has 20 pixels.
# What Pillow's decoders raise for broken files, found by feeding them 100 000.
DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, ArithmeticError, MemoryError,
    AttributeError, NotImplementedError, RuntimeError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


class ImageError(ValueError):
    """A picture that cannot be read; the message is a sentence for the user."""


class NoDigitError(ImageError):
    """A picture that can be read and shows no digit."""


def open_image(file) -> Image.Image:
    """Open a picture from a path or a binary file object."""
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ImageError("the file is not a picture that can be read") from error
    if image.width * image.height > MAX_PIXELS:
        raise ImageError("too large")
    try:
        image.draft(None, (WORK_SIDE, WORK_SIDE))
        image.load()
    except DECODE_ERRORS as error:
        raise ImageError("the picture is damaged") from error
    return image


def preprocess(image: Image.Image) -> np.ndarray:
    """Return the digit as MNIST stores it: (28, 28, 1) float32, raw values 0 to 255, white ink on black."""
    pixels = _upright_pixels(image)
    if (exact := _already_mnist(pixels)) is not None:
        return exact
    ink = _ink(pixels)
    ink, mask = _digit(ink)
    return _as_mnist(ink, mask)


def _upright_pixels(image):
    orientation = image.getexif().get(0x0112, 1)
    factor = -(-max(image.size) // (2 * WORK_SIDE))
    if image.mode in ("P", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
    elif image.mode in ("1", "CMYK", "YCbCr", "LAB", "HSV", "RGBX"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    elif image.mode in ("I", "F", "I;16", "I;16B", "I;16L", "I;16N"):
        image = _eight_bit(image)
    if factor > 1:
        image = image.reduce(factor)
    transpose = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}.get(orientation)
    if transpose is not None:
        image = image.transpose(Image.Transpose(transpose))
    pixels = np.asarray(image)
    if pixels.ndim == 2:
        return pixels[..., None]
    if image.mode in ("LA", "La", "RGBA", "RGBa"):
        pixels = _composed(pixels[..., :-1], pixels[..., -1])
    if pixels.shape[2] == 3 and (pixels == pixels[..., :1]).all():
        pixels = pixels[..., :1]
    return pixels


def _eight_bit(image):
    values = np.asarray(image, np.float32)
    finite = np.isfinite(values)
    if not finite.any():
        raise NoDigitError("blank")
    low, high = values[finite].min(), values[finite].max()
    values = np.where(finite, values, np.median(values[finite]))
    return Image.fromarray(np.uint8((values - low) * (255 / max(high - low, 1e-30))))


def _composed(colours, alpha):
    opaque = alpha > 127
    if opaque.all():
        return colours
    if not opaque.any():
        raise NoDigitError("transparent")
    rows, columns = np.flatnonzero(opaque.any(1)), np.flatnonzero(opaque.any(0))
    share = opaque.sum() / ((np.ptp(rows) + 1) * (np.ptp(columns) + 1))
    inside = colours[opaque].astype(np.float32)
    if share < 0.6 or inside.std(axis=0).max() < 16:
        return 255 - alpha[..., None]
    paper = np.median(inside, axis=0)
    a = alpha[..., None] / np.float32(255)
    return np.uint8(paper + (colours - paper) * a)


def _already_mnist(pixels):
    if pixels.shape != IMAGE_SHAPE:
        return None
    for p in (pixels, 255 - pixels):
        if p.max() >= 254:
            rows, columns = np.flatnonzero(p.any(axis=(1, 2))), np.flatnonzero(p.any(axis=(0, 2)))
            h, w = np.ptp(rows) + 1, np.ptp(columns) + 1
            if 19 <= max(h, w) <= 20:
                s = p.sum(dtype=float)
                cy = (p.sum(axis=(1, 2)) * np.arange(28)).sum() / s
                cx = (p.sum(axis=(0, 2)) * np.arange(28)).sum() / s
                if 13.4 < cy < 14.6 and 13.4 < cx < 14.6:
                    return p.astype(np.float32)
    return None


def _ink(pixels):
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    scale = 24 / max(image.size)
    grid = image.resize([max(1, round(s * scale)) for s in image.size], Image.Resampling.BOX)
    paper = grid.filter(ImageFilter.MedianFilter(15)).resize(image.size, Image.Resampling.BICUBIC)
    d = pixels.astype(np.float32) - np.asarray(paper, np.float32).reshape(pixels.shape)
    if d.shape[2] == 3:
        flat = d.reshape(-1, 3)
        axis = np.linalg.eigh(flat.T @ flat)[1][:, -1]
        d = d @ axis
    else:
        d = d[..., 0]
    if (d**3).sum() < 0:
        d = -d
    return d


def _box(a, r):
    return np.asarray(Image.fromarray(a).filter(ImageFilter.BoxBlur(r)))


def _digit(ink):
    sigma = 1.48 * np.median(np.abs(ink))
    t = max(3 * sigma, 8)
    for _ in range(6):
        strong = ink[ink > t]
        if strong.size == 0:
            raise NoDigitError("no ink")
        level = (strong**2).sum() / strong.sum()
        t = max(3 * sigma, 8, 0.45 * level)
    mask = ink > t
    keep = _main(mask)
    return np.clip(ink / level, 0, 1), keep


def _runs(mask):
    h, w = mask.shape
    padded = np.zeros((h, w + 2), np.int8)
    padded[:, 1:-1] = mask
    edges = np.diff(padded.ravel())
    return np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)  # start (in padded coordinates, minus 1), end


def _components(mask):
    """labels of runs"""
    stride = mask.shape[1] + 2
    start, end = _runs(mask)
    first = np.searchsorted(end, start + stride)   # runs in the next row that end at or after our start: 8-connected
    last = np.searchsorted(start, end + stride, "right")
    count = np.maximum(last - first, 0)
    a = np.repeat(np.arange(len(start)), count)
    b = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + np.repeat(first, count)
    label = np.arange(len(start))
    while True:
        low = np.minimum(label[a], label[b])
        new = label.copy()
        np.minimum.at(new, label[a], low)
        np.minimum.at(new, label[b], low)
        new = new[new]
        if (new == label).all():
            break
        label = new
    return start, end, np.unique(label, return_inverse=True)[1]


def _main(mask):
    stride = mask.shape[1] + 2
    start, end, label = _components(mask)
    n = label.max() + 1
    row = start // stride
    area = np.bincount(label, end - start, n)
    top = np.full(n, 10**9); np.minimum.at(top, label, row)
    bottom = np.zeros(n, int); np.maximum.at(bottom, label, row + 1)
    left = np.full(n, 10**9); np.minimum.at(left, label, start % stride)
    right = np.zeros(n, int); np.maximum.at(right, label, start % stride + end - start)
    size = np.maximum(bottom - top, right - left)
    main = int(np.argmax(area))
    group = np.zeros(n, bool); group[main] = True
    box = [top[main], left[main], bottom[main], right[main]]
    while True:
        extent = max(box[2] - box[0], box[3] - box[1])
        gap = np.maximum(np.maximum(top - box[2], box[0] - bottom), np.maximum(left - box[3], box[1] - right))
        more = ~group & (gap < 0.2 * extent) & (size > 0.15 * extent)
        if not more.any():
            break
        group |= more
        box = [top[group].min(), left[group].min(), bottom[group].max(), right[group].max()]
    flat = np.zeros(mask.shape[0] * stride + 1, np.int8)
    kept = group[label]
    flat[start[kept]] += 1
    flat[end[kept]] -= 1
    return np.cumsum(flat[:-1]).reshape(-1, stride)[:, :-2].astype(bool)


def _as_mnist(ink, mask):
    grown = np.asarray(Image.fromarray(np.uint8(mask) * 255).filter(ImageFilter.MaxFilter(3))) > 0
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    ink = np.where(grown, ink, 0)
    h, w = bottom - top, right - left
    scale = 80 / max(h, w)
    hh, ww = max(4, round(h * scale)), max(4, round(w * scale))
    padded = np.pad(ink[top:bottom, left:right], 1)
    canvas = Image.fromarray(padded).resize((ww, hh), Image.Resampling.BICUBIC, (1, 1, w + 1, h + 1))
    canvas = np.clip((np.asarray(canvas) - 0.25) * 2, 0, 1)
    canvas = np.pad(canvas, ((0, 80 - hh), (0, 80 - ww)))
    small = canvas.reshape(20, 4, 20, 4).mean(axis=(1, 3))
    small *= 255 / small.max()
    total = small.sum()
    cy = (small.sum(1) * np.arange(20)).sum() / total
    cx = (small.sum(0) * np.arange(20)).sum() / total
    oy, ox = np.clip([round(14 - cy), round(14 - cx)], 0, 8)
    out = np.zeros((28, 28), np.float32)
    out[oy : oy + 20, ox : ox + 20] = small
    return out.reshape(IMAGE_SHAPE)
