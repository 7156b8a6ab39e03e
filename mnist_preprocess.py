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
    ink = _ink(*_page(pixels))
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
    paper = np.median(colours[opaque], axis=0)
    drawn = opaque & (np.abs(colours - paper).max(axis=-1) > 48)
    drawn = drawn[1:, 1:] & drawn[:-1, 1:] & drawn[1:, :-1] & drawn[:-1, :-1]
    if drawn.sum() < 0.003 * opaque.sum() or opaque.sum() < 0.9 * _filled(opaque).sum():
        return 255 - alpha[..., None]
    a = alpha[..., None] / np.float32(255)
    return np.uint8(paper + (colours - paper) * a)


def _filled(mask):
    """every pixel that has mask pixels on both sides, in its row and in its column"""
    ahead = np.logical_or.accumulate
    rows = ahead(mask, 1) & ahead(mask[:, ::-1], 1)[:, ::-1]
    return rows & ahead(mask, 0) & ahead(mask[::-1], 0)[::-1]


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


def _projected(colours):
    """along the colour axis of the largest variation from 0"""
    if colours.shape[2] == 1:
        return colours[..., 0]
    flat = colours.reshape(-1, colours.shape[2])
    return colours @ np.linalg.eigh(flat.T @ flat)[1][:, -1]


def _otsu(values):
    """Otsu: threshold, and the share of variance that it explains"""
    count, edges = np.histogram(values, 64)
    p = count / count.sum()
    centre = (edges[1:] + edges[:-1]) / 2
    weight, mass = np.cumsum(p), np.cumsum(p * centre)
    mean = mass[-1]
    between = (mean * weight - mass)[:-1] ** 2 / np.maximum(weight * (1 - weight), 1e-9)[:-1]
    best = int(between.argmax())
    return edges[best + 1], between[best] / max((centre - mean) ** 2 @ p, 1e-9)


def _image(pixels):
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def _page(pixels):
    """Cut to the page that the digit is on: a table around, a frame, a window"""
    everywhere = np.ones(pixels.shape[:2], bool)
    factor = -(-max(pixels.shape[:2]) // 128)
    image = _image(pixels).reduce(factor)
    small = np.asarray(image, np.float32).reshape(image.height, image.width, -1)
    value = _projected(small - small.mean(axis=(0, 1)))
    split = _otsu(value)[0]
    best, page = 0, None
    for side in (value > split, value <= split):
        parts = _Components(side, diagonal=False)
        region = parts.mask(np.arange(parts.count) == parts.area.argmax())
        hull = _filled(region)
        if not 0.2 * hull.size < hull.sum() < 0.97 * hull.size or region.sum() < 0.5 * hull.sum():
            continue
        rest = _Components(~region)
        outside = np.bincount(rest.label, rest.sums(~hull), rest.count) > 0
        outside |= (rest.top == 0) | (rest.left == 0) | (rest.bottom == hull.shape[0]) | (rest.right == hull.shape[1])
        hole = np.where(outside, 0, rest.area)
        largest = hole.argmax()
        if hole[largest] > best and rest.size[largest] > 0.08 * min(hull.shape):
            best, page = hole[largest], hull
    if page is None:
        return pixels, everywhere
    rows, columns = np.flatnonzero(page.any(1)), np.flatnonzero(page.any(0))
    t, b, l, r = rows[0] * factor, (rows[-1] + 1) * factor, columns[0] * factor, (columns[-1] + 1) * factor
    page = np.pad(page, 1)
    page = page[1:-1, 1:-1] & page[:-2, 1:-1] & page[2:, 1:-1] & page[1:-1, :-2] & page[1:-1, 2:]
    inside = page.repeat(factor, 0).repeat(factor, 1)[: pixels.shape[0], : pixels.shape[1]]
    pixels = np.where(inside[..., None], pixels, np.uint8(np.median(pixels[inside], axis=0)))
    return pixels[t:b, l:r], inside[t:b, l:r]


def _ink(pixels, inside):
    image = _image(pixels)
    scale = 24 / max(image.size)
    grid = image.resize([max(1, round(s * scale)) for s in image.size], Image.Resampling.BOX)
    paper = grid.filter(ImageFilter.MedianFilter(15)).resize(image.size, Image.Resampling.BICUBIC)
    local = _positive(_projected(pixels - np.asarray(paper, np.float32).reshape(pixels.shape)))
    rim = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    even = _positive(_projected(pixels - np.median(rim, axis=0).astype(np.float32)))
    (t_l, e_l), (t_e, e_e) = _otsu(local), _otsu(even)
    if e_e > e_l and (even > t_e).sum() < 2.5 * (local > t_l).sum():
        local = even
    return np.where(inside, local, 0)


def _positive(d):
    return -d if (d**3).sum() < 0 else d


def _threshold(ink):
    sigma = 1.48 * np.median(np.abs(ink))
    t = floor = max(3 * sigma, 8)
    for _ in range(6):
        strong = ink[ink > t]
        if strong.size == 0:
            raise NoDigitError("no ink")
        level = (strong**2).sum() / strong.sum()
        t = max(floor, 0.45 * level)
    return t, level


def _digit(ink):
    t, level = _threshold(ink)
    lines = _lines(ink > t)
    if lines.any():
        ink = np.where(lines, 0, ink)
        t, level = _threshold(ink)
    keep = _main(ink > t)
    return np.clip(ink / level, 0, 1), keep


def _lines(mask):
    return _rules(mask) | _rules(mask.T).T


def _rules(mask):
    """lines that run from side to side"""
    height, width = mask.shape
    none = np.zeros_like(mask)
    tall = mask.sum(1).max()
    if tall < 0.3 * width:
        return none
    thick = max(3, width // 80)
    runs = _Components(mask.T)
    thin = runs.runs_mask(runs.end - runs.start <= thick).T
    parts = _Components(thin)
    long = np.flatnonzero((parts.right - parts.left > 0.12 * width) & (parts.bottom - parts.top < 0.3 * (parts.right - parts.left)))
    if not long.size:
        return none
    y, x = np.nonzero(thin)
    member = parts.labels()[y, x]
    lines = none
    done = np.zeros(parts.count, bool)
    for part in long:
        if done[part]:
            continue
        mine = member == part
        slope, offset = np.polyfit(x[mine], y[mine], 1)
        near = np.abs(y - slope * x - offset) <= thick * 0.75 + 0.5
        covered = np.bincount(x[near], minlength=width) > 0
        if covered.mean() > 0.5 and covered[: width // 8].mean() > 0.4 and covered[-(width // 8) :].mean() > 0.4:
            lines[y[near], x[near]] = True
            done[np.unique(member[near])] = True
    return lines


class _Components:
    """connected components by runs"""

    def __init__(self, mask, diagonal=True):
        self.shape = mask.shape
        self.stride = stride = mask.shape[1] + 2
        padded = np.zeros((mask.shape[0], stride), np.int8)
        padded[:, 1:-1] = mask
        edges = np.diff(padded.ravel())
        self.start, self.end = start, end = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
        first = np.searchsorted(end, start + stride, "left" if diagonal else "right")
        last = np.searchsorted(start, end + stride, "right" if diagonal else "left")
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
        names, self.label = np.unique(label, return_inverse=True)
        self.count = n = len(names)
        row, left = start // stride, start % stride
        self.area = np.bincount(self.label, end - start, n)
        self.top = np.full(n, 10**9)
        self.left = np.full(n, 10**9)
        self.bottom, self.right = np.zeros(n, int), np.zeros(n, int)
        np.minimum.at(self.top, self.label, row)
        np.maximum.at(self.bottom, self.label, row + 1)
        np.minimum.at(self.left, self.label, left)
        np.maximum.at(self.right, self.label, left + end - start)
        self.size = np.maximum(self.bottom - self.top, self.right - self.left)

    def runs_mask(self, kept, value=1):
        flat = np.zeros(self.shape[0] * self.stride + 1, np.int32)
        value = np.broadcast_to(value, kept.shape)
        flat[self.start[kept]] += value[kept]
        flat[self.end[kept]] -= value[kept]
        return np.cumsum(flat[:-1]).reshape(-1, self.stride)[:, :-2].astype(bool if value.max(initial=1) == 1 else int)

    def mask(self, kept):
        return self.runs_mask(kept[self.label])

    def labels(self):
        return self.runs_mask(np.ones(len(self.start), bool), self.label + 1).astype(int) - 1

    def sums(self, values):
        """sum of values (a mask) over each run"""
        padded = np.zeros((self.shape[0], self.stride), int)
        padded[:, 1:-1] = values
        total = np.cumsum(padded.ravel())
        return total[self.end] - total[self.start]


def _main(mask):
    c = _Components(mask)
    top, bottom, left, right, area, size, n = c.top, c.bottom, c.left, c.right, c.area, c.size, c.count
    touching = (top == 0) | (left == 0) | (bottom == mask.shape[0]) | (right == mask.shape[1])
    main = int(np.argmax(np.where(touching, 0.3, 1) * area))
    group = np.zeros(n, bool)
    group[main] = True
    box = [top[main], left[main], bottom[main], right[main]]
    while True:
        extent = max(box[2] - box[0], box[3] - box[1])
        gap = np.maximum(np.maximum(top - box[2], box[0] - bottom), np.maximum(left - box[3], box[1] - right))
        more = ~group & (gap < 0.2 * extent) & (size > 0.15 * extent)
        if not more.any():
            break
        group |= more
        box = [top[group].min(), left[group].min(), bottom[group].max(), right[group].max()]
    return c.mask(group)


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
