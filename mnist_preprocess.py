"""Turn any picture of a digit into what the model reads, and name what both servers share.

from mnist_preprocess import open_image, preprocess

pixels = preprocess(open_image("images/sample_image.png"))  # (28, 28, 1) float32, 0 to 255, white on black
"""

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageFilter, UnidentifiedImageError

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

# What people upload. A decoder that nobody needs is only a way in for broken files.
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
# A worker needs up to 330 MB for a picture of 52 million pixels, and for WebP 16 bytes a pixel, never fewer.
MAX_PIXELS = 52_000_000
MAX_PIXELS_WEBP = 20_000_000
WORK_SIDE = 512  # Larger pictures are reduced to at most this side; a digit 1/20 as high still has 13 to 26 pixels.
PAPER_GRID = 24  # Cells along the longer side of the grid on which the paper's brightness is estimated.
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


def open_image(file) -> Image.Image:
    """Open and decode a picture from a path or a binary file object; of an animation, its first frame.

    Large JPEGs are decoded at a reduced scale. Raises ImageError when it is not a picture that can be read, or has
    more than MAX_PIXELS (a WebP: MAX_PIXELS_WEBP); OSError when there is no such file.
    """
    if not hasattr(file, "read"):
        with open(file, "rb") as opened:
            return open_image(opened)
    try:
        image = Image.open(file, formats=FORMATS)
        most = MAX_PIXELS_WEBP if image.format == "WEBP" else MAX_PIXELS
        if image.width * image.height > most:
            raise ImageError(f"the picture has more than {most // 1_000_000} million pixels")
        scale = 0.625 * WORK_SIDE / max(image.size)  # draft() halves as often as both sides stay at least this large.
        image.draft(None, (int(image.width * scale), int(image.height * scale)))
        image.load()
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"the file is not a picture in one of the formats {', '.join(FORMATS)}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"the picture has more than {MAX_PIXELS // 1_000_000} million pixels") from error
    except BROKEN_FILE as error:
        raise ImageError("the picture is damaged: it cannot be decoded") from error
    return image


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
        mnist = as_it_is(as_image(pixels))
        if mnist is None:
            ink = ink_on_paper(*page(pixels))
            ink = without_ruled_lines(ink)
            mnist = size_normalised(*digit_in(ink))
    return mnist.reshape(IMAGE_SHAPE)


# 1. Pixels: any mode of Pillow as 8-bit gray or RGB, upright, opaque, not larger than WORK_SIDE.


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


# 2. MNIST's own pictures, and what else is made the same way.


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

# 3. The page: what surrounds it (a table, a frame, a window) has edges that are stronger than any ink's.


def page(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels cut to the page, if one is seen, and a boolean array of what belongs to it.

    A page is a region of one brightness with four sides and something in it, that does not fill the picture.
    """
    factor = -(-max(pixels.shape) // 128)
    small = as_image(pixels).reduce(factor)
    small = np.asarray(small, np.float32).reshape(small.height, small.width, -1)
    value = (small - small.mean(axis=(0, 1))) @ main_axis(small - small.mean(axis=(0, 1)))
    middle, separation = otsu(value)
    splits = [middle]
    if separation < 0.95:  # More than two kinds of brightness: table, page and ink.
        splits += [otsu(value[value > middle])[0], otsu(value[value <= middle])[0]]
    largest, found = 0, None
    for split in splits:
        for side in (value > split, value <= split):
            hull, content = page_in(value, side)
            if content > largest:
                largest, found = content, hull
    if found is None:
        return pixels, np.ones(pixels.shape[:2], bool)
    rows, columns = np.flatnonzero(found.any(1)) * factor, np.flatnonzero(found.any(0)) * factor
    cut = slice(rows[0], rows[-1] + factor), slice(columns[0], columns[-1] + factor)
    # The outermost cells are blurred with what surrounds the page.
    found = np.asarray(Image.fromarray(np.uint8(found) * 255).filter(ImageFilter.BoxBlur(1))) == 255
    inside = found.repeat(factor, 0).repeat(factor, 1)[: pixels.shape[0], : pixels.shape[1]]
    paper = np.uint8(np.median(pixels[inside], axis=0))
    return np.where(inside[..., None], pixels, paper)[cut], inside[cut]


def page_in(value: np.ndarray, side: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the largest region of `side`, its bays filled, and how large the largest thing in it is; 0 for no page."""
    if side.sum() < 0.2 * side.size:
        return side, 0
    regions = Parts(side, diagonal=False)
    region = regions.labels == regions.largest()
    hull = filled(region)
    covered = hull.sum() / hull.size
    if not 0.2 < covered < 0.97 or region.sum() < 0.6 * hull.sum() or not four_sided(hull):
        return hull, 0
    others = Parts(~region)
    outside = np.bincount(others.labels[~hull], minlength=len(others.area)) > 0
    holes = np.where(outside | others.touch_edge, 0, others.area)
    content = holes.argmax()
    bays = hull.sum() - region.sum() - holes.sum()  # What crosses the border would be cut off.
    if holes[content] == 0 or others.side[content] < 0.08 * min(hull.shape) or bays > 0.01 * hull.sum():
        return hull, 0
    # The page ends at once, unlike light that fades.
    contrast = abs(np.median(value[region]) - np.median(value[others.labels == content]))
    near, far = (step_at_border(value, hull, reach) for reach in (1, 4))
    return hull, int(holes[content]) if near > max(0.12 * contrast, 0.6 * far) else 0


def step_at_border(value: np.ndarray, region: np.ndarray, reach: int) -> float:
    """Return how much the values differ between the two sides of a region's border, within `reach` pixels of it."""
    share = np.asarray(Image.fromarray(np.uint8(region) * 255).filter(ImageFilter.BoxBlur(reach)))
    within, beyond = value[region & (share < 255)], value[~region & (share > 0)]
    return abs(np.median(within) - np.median(beyond)) if within.size and beyond.size else 0.0


def four_sided(region: np.ndarray) -> bool:
    """Tell whether a region fills 7/8 of the smallest rectangle around it, however turned; an ellipse fills pi/4."""
    rows = np.flatnonzero(region.any(1))
    first, last = region[rows].argmax(1), region.shape[1] - 1 - region[rows, ::-1].argmax(1)
    x, y = np.concatenate([first, last]), np.concatenate([rows, rows])
    angle = np.linspace(0, np.pi / 2, 24, endpoint=False)[:, None]
    width = np.ptp(np.cos(angle) * x + np.sin(angle) * y, axis=1) + 1
    height = np.ptp(np.cos(angle) * y - np.sin(angle) * x, axis=1) + 1
    return bool(region.sum() > 7 / 8 * (width * height).min())


# 4. Ink: how far every pixel is from the paper around it, along the colour axis on which they differ most.


def ink_on_paper(pixels: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Return the ink, (height, width) float32 in gray levels, near 0 on paper and 0 outside of the page."""
    image = as_image(pixels)
    scale = PAPER_GRID / max(image.size)
    grid = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BOX)
    # A median keeps slopes and straight edges of light and shadow, and takes out strokes, which fill less than half.
    uneven = np.asarray(grid.filter(ImageFilter.MedianFilter(15)), np.float32).reshape(grid.height, grid.width, -1)
    rim = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    even = np.broadcast_to(np.median(rim, axis=0).astype(np.float32), uneven.shape)
    step = -(-max(image.size) // 128)
    sample = pixels[::step, ::step].astype(np.float32)
    tries = []
    for paper in (uneven, even):
        difference = sample - enlarged(paper, sample.shape[1::-1]).reshape(sample.shape)
        axis = main_axis(difference)
        value = difference @ axis
        axis = axis if (value * value * value).sum() > 0 else -axis  # Ink is the side with the few large values.
        threshold, separation = otsu(difference @ axis)
        tries.append((separation, (difference @ axis > threshold).sum(), paper, axis))
    paper, axis = tries[0][2:]
    # Thick strokes fill more than half somewhere: then even paper separates better, with a little more ink, not a
    # shadow's worth of it. Where light is uneven, less of the rim, or nearly nothing inside, is as bright as the paper.
    at_rim, anywhere = (np.abs((colours - even[0, 0]) @ tries[1][3]) for colours in (rim, sample))
    is_even = max(np.percentile(at_rim, 75), np.percentile(anywhere, 25)) < 0.1 * anywhere.max()
    if is_even and tries[1][0] > tries[0][0] and tries[1][1] < 2.5 * tries[0][1]:
        paper, axis = tries[1][2:]
    return (pixels @ axis - enlarged((paper @ axis)[..., None], image.size)) * inside


def enlarged(grid: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return float32 (height, width, channels) resized smoothly to (width, height), channels of 1 dropped."""
    channels = [Image.fromarray(grid[..., i]).resize(size, Image.Resampling.BILINEAR) for i in range(grid.shape[2])]
    return np.squeeze(np.stack(channels, axis=-1), -1) if len(channels) == 1 else np.stack(channels, axis=-1)


def main_axis(colours: np.ndarray) -> np.ndarray:
    """Return the unit vector along which colours differ most from 0, float32 (channels,)."""
    flat = colours.reshape(-1, colours.shape[-1])
    return np.linalg.eigh(flat.T @ flat)[1][:, -1].astype(np.float32)


def otsu(values: np.ndarray) -> tuple[float, float]:
    """Return the threshold that splits values best into two classes, and the share of the variance that it explains.

    Otsu, A Threshold Selection Method from Gray-Level Histograms, IEEE Transactions on Systems, Man, and Cybernetics
    9, 1979.
    """
    if values.size == 0 or values.max() <= values.min():
        return float(values.max(initial=0)), 0.0
    low, width = float(values.min()), float(np.ptp(values)) / 63.99
    share = np.bincount(((values - low) / width).astype(np.uint8).ravel(), minlength=64) / values.size
    level = np.arange(64)
    below, mass = np.cumsum(share)[:-1], np.cumsum(share * level)
    mean = mass[-1]
    between = (mean * below - mass[:-1]) ** 2 / (below * (1 - below)).clip(1e-9)
    best = between.argmax()
    return low + (best + 1) * width, float(between[best] / (share @ (level - mean) ** 2).clip(1e-9))


# 5. The digit: without the paper's ruled lines and without dirt, and with all of its strokes.


def ink_level(ink: np.ndarray) -> tuple[float, float]:
    """Return the typical strength of the ink and the threshold above which a pixel is ink, not noise."""
    least = threshold = faintest(ink)
    strong = ink[ink > threshold]
    for _ in range(6):
        if not strong.size:
            raise NoDigitError("no digit to be seen: the picture shows no ink that differs from its paper")
        level = float(strong @ strong / strong.sum())
        threshold = max(least, 0.45 * level)
        strong = strong[strong > threshold]
    return level, threshold


def faintest(ink: np.ndarray) -> float:
    """Return three standard deviations of the noise, and not less than 8 gray levels."""
    # Of normal noise, a quarter is within 0.32 standard deviations; a quarter of the picture or more is paper.
    return max(9.4 * float(np.percentile(np.abs(ink[::2, ::2]), 25)), 8.0)


def without_ruled_lines(ink: np.ndarray) -> np.ndarray:
    """Return the ink without lines that run from one side of the page to the other."""
    threshold = ink_level(ink)[1]
    mask = ink > max(threshold / 2, faintest(ink))  # Faint lines too: what is left of them would join the digit.
    across = ruled_lines(mask)
    down = ruled_lines((mask & ~across).T).T
    return np.where(across | down, 0, ink)


def ruled_lines(mask: np.ndarray) -> np.ndarray:
    """Return the pixels of thin straight lines from the left to the right; strokes that cross them are not theirs."""
    lines = np.zeros_like(mask)
    width = mask.shape[1]
    if mask.any(axis=0).mean() < 0.8:
        return lines
    thick = max(3, width // 80)
    length = run_lengths(mask.T).T
    thin = mask & (length <= thick)
    bridged = thin.copy()  # Lines the other way cut these.
    for shift in range(1, min(thick, width - 1) + 1):
        bridged[:, shift:] |= thin[:, :-shift]
    parts = Parts(bridged)
    y, x = np.nonzero(thin)
    owner = parts.labels[y, x]
    wide, high = parts.right - parts.left, parts.bottom - parts.top
    waiting = (wide > max(0.12 * width, 4)) & (high < 0.3 * wide)
    waiting[0] = False
    for part in np.flatnonzero(waiting):
        if not waiting[part]:
            continue
        own_x, own_y = x[owner == part], y[owner == part]
        centred = own_x - own_x.mean()
        slope = centred @ own_y / max(centred @ centred, 1)
        near = np.abs(y - own_y.mean() - slope * (x - own_x.mean())) <= 0.75 * thick + 0.5
        covered = np.bincount(x[near], minlength=width) > 0
        end = width // 8 + 1
        if covered.mean() > 0.5 and covered[:end].mean() > 0.4 and covered[-end:].mean() > 0.4:
            lines[y[near], x[near]] = True
            waiting[owner[near]] = False
    return lines


def digit_in(ink: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the ink from 0 to 1, and the pixels of the largest shape with the parts that belong to it."""
    level, threshold = ink_level(ink)
    mask = ink > threshold
    parts = Parts(mask)
    # What is along a whole side is more likely a shadow or a table, and what touches a side may be one.
    along = (parts.bottom - parts.top > 0.95 * mask.shape[0]) | (parts.right - parts.left > 0.95 * mask.shape[1])
    along &= parts.touch_edge
    main = parts.largest(np.where(along, 0.02, np.where(parts.touch_edge, 0.3, 1)))
    if parts.side[main] < 5 or parts.area[main] < 8:
        raise NoDigitError("no digit to be seen: the picture shows nothing but specks")
    digit = np.arange(len(parts.area)) == main
    while True:
        top, bottom = parts.top[digit].min(), parts.bottom[digit].max()
        left, right = parts.left[digit].min(), parts.right[digit].max()
        side = max(bottom - top, right - left)
        gap = np.max([parts.top - bottom, top - parts.bottom, parts.left - right, left - parts.right], axis=0)
        more = ~digit & ~along & (gap < 0.2 * side) & (parts.side > 0.15 * side) & (parts.area > 0)
        if not more.any():
            return np.clip(ink / level, 0, 1), digit[parts.labels]
        digit |= more


# 6. As MNIST stores it.


def size_normalised(ink: np.ndarray, digit: np.ndarray) -> np.ndarray:
    """Return (28, 28) float32: the digit fitted into 20x20, its centre of mass in the middle."""
    rows, columns = np.flatnonzero(digit.any(1)), np.flatnonzero(digit.any(0))
    cut = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    digit, ink = digit[cut], ink[cut]
    soft_edge = np.asarray(Image.fromarray(np.uint8(digit) * 255).filter(ImageFilter.BoxBlur(1))) > 0
    ink = thick_enough(np.where(soft_edge, ink, 0), digit)
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


def thick_enough(ink: np.ndarray, digit: np.ndarray) -> np.ndarray:
    """Return the ink with strokes at least 1/11 as thick as the digit is large; MNIST's are 1/10 to 1/5."""
    padded = np.pad(digit, 1).astype(np.int8)
    border = np.pi / 4 * sum(int(np.abs(np.diff(padded, axis=axis)).sum()) for axis in (0, 1))
    thickness = 2 * digit.sum() / border  # A long stroke has two sides.
    missing = round((max(digit.shape) / 11 - thickness) / 2)
    if missing < 1:
        return ink
    ink, window = np.pad(ink, 2 * missing), 1
    while window <= 2 * missing:  # The maximum over a square, in steps that double.
        step = min(window, 2 * missing + 1 - window)
        ink = np.maximum(ink[:-step], ink[step:])
        ink = np.maximum(ink[:, :-step], ink[:, step:])
        window += step
    return ink


# Shapes.


class Parts:
    """The connected parts of a boolean array; label 0 is the background.

    labels: (height, width) int; area, top, bottom, left, right, side (the longer one), touch_edge: one of each a label.
    """

    def __init__(self, mask: np.ndarray, diagonal: bool = True):
        """Find the parts; `diagonal` joins pixels that touch at a corner only."""
        height, width = mask.shape
        start, end = runs(mask)
        stride = width + 2
        row, column, length = start // stride, start % stride, end - start
        # Runs of the next row that touch each run: the first that ends behind its start, up to the last that starts
        # before its end.
        first = np.searchsorted(end, start + stride, "left" if diagonal else "right")
        last = np.searchsorted(start, end + stride, "right" if diagonal else "left")
        touching = np.maximum(last - first, 0)
        upper = np.repeat(np.arange(len(start)), touching)
        lower = np.arange(touching.sum()) + np.repeat(first - np.cumsum(touching) + touching, touching)
        root, before = np.arange(len(start)), None
        while not np.array_equal(root, before):  # Every run takes the smallest number in reach, which spreads.
            before = root.copy()
            smallest = np.minimum(root[upper], root[lower])
            np.minimum.at(root, before[upper], smallest)
            np.minimum.at(root, before[lower], smallest)
            root = root[root]
        label = np.unique(root, return_inverse=True)[1] + 1
        count = int(label.max(initial=0)) + 1
        self.labels = spread(start, end, label, mask.shape)
        self.area = np.bincount(label, length, count)
        self.top, self.left = np.full(count, height), np.full(count, width)
        self.bottom, self.right = np.zeros(count, int), np.zeros(count, int)
        np.minimum.at(self.top, label, row)
        np.minimum.at(self.left, label, column)
        np.maximum.at(self.bottom, label, row + 1)
        np.maximum.at(self.right, label, column + length)
        self.side = np.maximum(self.bottom - self.top, self.right - self.left)
        self.touch_edge = (self.top == 0) | (self.left == 0) | (self.bottom == height) | (self.right == width)

    def largest(self, weight=1) -> int:
        """Return the label of the part with the largest weighted area."""
        return int((self.area * weight).argmax())


def runs(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where the runs of True along the rows start and end, as positions in rows of (width + 2)."""
    padded = np.zeros((mask.shape[0], mask.shape[1] + 2), np.int8)
    padded[:, 1:-1] = mask
    change = np.diff(padded.ravel())
    return np.flatnonzero(change == 1), np.flatnonzero(change == -1)


def spread(start: np.ndarray, end: np.ndarray, values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return an int array of that shape with each run's value at its pixels, 0 elsewhere."""
    change = np.zeros(shape[0] * (shape[1] + 2), np.int32)
    change[start] = values
    change[end] = -values
    return np.cumsum(change, dtype=np.int32).reshape(shape[0], shape[1] + 2)[:, :-2]


def run_lengths(mask: np.ndarray) -> np.ndarray:
    """Return for every pixel how long its run of True along the row is."""
    start, end = runs(mask)
    return spread(start, end, end - start, mask.shape)


def filled(mask: np.ndarray) -> np.ndarray:
    """Return the pixels that have pixels of the mask on both sides in their row, or in their column."""
    reached = np.logical_or.accumulate
    in_row = reached(mask, 1) & reached(mask[:, ::-1], 1)[:, ::-1]
    return in_row | reached(mask, 0) & reached(mask[::-1], 0)[::-1]


def as_image(pixels: np.ndarray) -> Image.Image:
    """Return (height, width, 1 or 3) uint8 as a picture."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
