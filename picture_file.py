"""Read what people upload: which files and how many pixels, and any mode of Pillow as 8-bit gray or RGB."""

import struct
import warnings
import zlib

import numpy as np
from PIL import Image, ImageFilter

# What people upload. A decoder that nobody needs is only a way in for broken files.
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
# A worker needs up to 330 MB for a picture of 52 million pixels, and for WebP 16 bytes a pixel, never fewer.
MAX_PIXELS = 52_000_000
MAX_PIXELS_WEBP = 20_000_000
WORK_SIDE = 512  # Larger pictures are reduced to at most this side; a digit 1/20 as high still has 13 to 26 pixels.
# What Pillow's decoders raise for broken files beside UnidentifiedImageError, which is an OSError.
BROKEN_FILE = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, ArithmeticError, MemoryError, RuntimeError,
    AttributeError, struct.error, zlib.error, Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip
# Pillow's advice against decompression bombs: https://pillow.readthedocs.io/en/stable/reference/Image.html
warnings.simplefilter("error", Image.DecompressionBombWarning)


class ImageError(ValueError):
    """A picture that cannot be read; the message is a sentence for the user."""


class NoDigitError(ImageError):
    """A picture that can be read, and shows no digit."""


def as_pixels(image: Image.Image) -> np.ndarray:
    """Return (height, width, 1 or 3) uint8; one channel when all three are the same."""
    orientation = orientation_of(image)
    try:
        image = reduced(image)
    except BROKEN_FILE as error:
        raise ImageError(f"a picture of mode {image.mode} cannot be read") from error
    if orientation in TURNED_BACK:
        image = image.transpose(TURNED_BACK[orientation])
    pixels = np.asarray(image)
    if image.mode in ("I", "F", "I;16"):
        pixels = eight_bits(pixels)
    if pixels.ndim == 2:
        return pixels[..., None]
    if image.mode in ("LA", "RGBA"):
        pixels = on_paper(pixels[..., :-1], pixels[..., -1])
    return pixels if (pixels != pixels[..., :1]).any() else pixels[..., :1]


# What undoes the orientation in EXIF tag 274, by its value; 1 is upright.
TURNED_BACK = dict(zip(range(2, 9), (Image.Transpose(method) for method in (0, 3, 1, 5, 4, 6, 2)), strict=True))


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 when there is none that can be read."""
    if not any(name in image.info for name in ("exif", "xmp", "Raw profile type exif", "XML:com.adobe.xmp")):
        return 1  # getexif() would take longer than everything else that a 28x28 picture needs.
    try:
        return image.getexif().get(274, 1)
    except BROKEN_FILE:
        return 1


def reduced(image: Image.Image) -> Image.Image:
    """Return the picture as L, LA, RGB, RGBA, I, F or I;16, its sides divided so that it is at most WORK_SIDE."""
    factor = -(-max(image.size) // WORK_SIDE)
    if factor == 1:
        return plain(image)
    width, height = (-(-side // factor) for side in image.size)
    rows = factor * 64  # In strips, because what plain() makes of a large picture may be four times as large.
    strips = []
    for top in range(0, image.height, rows):
        strip = plain(image.crop((0, top, image.width, min(top + rows, image.height))))
        if strip.mode == "I;16":  # reduce() does not know it.
            strip = strip.resize((width, -(-strip.height // factor)), Image.Resampling.BOX)
        elif strip.mode in ("LA", "RGBA"):  # With alpha multiplied in, the colour of what is invisible does not leak.
            strip = strip.convert(strip.mode[:-1] + "a").reduce(factor).convert(strip.mode)
        else:
            strip = strip.reduce(factor)
        strips.append(strip)
    whole = Image.new(strips[0].mode, (width, height))
    for index, strip in enumerate(strips):
        whole.paste(strip, (0, 64 * index))
    return whole


def plain(image: Image.Image) -> Image.Image:
    """Return the picture in one of the modes L, LA, RGB, RGBA, I, F and I;16."""
    if "transparency" in image.info and image.mode in ("L", "RGB", "P"):
        return image.convert("LA" if image.mode == "L" else "RGBA")
    if image.mode in ("L", "LA", "RGB", "RGBA", "I", "F", "I;16"):
        return image
    if image.mode.startswith("I;16"):
        return image.convert("I")
    return image.convert({"1": "L", "PA": "RGBA", "La": "LA", "RGBa": "RGBA"}.get(image.mode, "RGB"))


def eight_bits(values: np.ndarray) -> np.ndarray:
    """Return numbers of any range as 0 to 255; what is not a finite number becomes the median.

    A sensor's few dead pixels, one in ten thousand, do not count for the range.
    """
    finite = np.isfinite(values)
    if not finite.any():
        raise NoDigitError("the picture holds no finite number")
    values = values.astype(np.float64)
    values[~finite] = np.median(values[finite])
    few = values.size // 10_000
    ordered = np.partition(values, (few, -1 - few), axis=None)
    low, high = ordered[few], ordered[-1 - few]
    return np.uint8((values.clip(low, high) - low) * (255 / max(high - low, 1e-300)))


def on_paper(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Return (height, width, 1 or 3) without alpha: what is opaque is either ink of any colour, or a page."""
    if not alpha.any():
        raise NoDigitError("the picture is transparent everywhere")
    opaque = alpha > alpha.max() / 2
    colour = np.median(colours[opaque], axis=0)
    # A page has straight sides, and other colours well inside of it: an ink's edges may be blended with another colour.
    reach = max(2, int(max(opaque.any(0).sum(), opaque.any(1).sum())) // 20)
    inside = np.asarray(Image.fromarray(np.uint8(opaque) * 255).filter(ImageFilter.BoxBlur(reach))) == 255
    difference = np.float32(colours) - np.float32(colour)
    drawn = inside & (np.square(difference) @ np.ones(len(colour), np.float32) > 40**2)
    if drawn.sum() < 0.003 * opaque.sum() or not four_sided(opaque):
        return 255 - alpha[..., None]
    return np.uint8(colour + (colours - colour) * (alpha[..., None] / np.float32(255)))


def four_sided(region: np.ndarray) -> bool:
    """Tell whether a region fills 7/8 of the smallest rectangle around it, however turned; an ellipse fills pi/4."""
    rows = np.flatnonzero(region.any(1))
    first, last = region[rows].argmax(1), region.shape[1] - 1 - region[rows, ::-1].argmax(1)
    x, y = np.concatenate([first, last]), np.concatenate([rows, rows])
    angle = np.linspace(0, np.pi / 2, 24, endpoint=False)[:, None]
    width = np.ptp(np.cos(angle) * x + np.sin(angle) * y, axis=1) + 1
    height = np.ptp(np.cos(angle) * y - np.sin(angle) * x, axis=1) + 1
    return bool(region.sum() > 7 / 8 * (width * height).min())


def as_image(pixels: np.ndarray) -> Image.Image:
    """Return (height, width, 1 or 3) uint8 as a picture."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
