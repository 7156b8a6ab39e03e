"""Make the pictures that people upload: MNIST's test digits, and digits set in a font, as photos, scans and drawings.

    python tests/wild_digits.py --contact-sheet images/wild_digits.png

Every kind is a function from a random generator and an MNIST picture to the bytes of an upload. The same kind, index
and version of Pillow give the same upload. KINDS were used to develop mnist_preprocess.py and digit_finder.py; HELD_OUT
were not looked at until the first version of these was finished. Later versions are held to them, too: a change that
reads one of them worse is changed again, so that they say no longer what becomes of pictures that nobody thought of.
"""

import argparse
import io
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # Run as a script, Python looks for modules beside this file only.

from mnist_preprocess import open_image, preprocess  # noqa: E402

WHITE, BLACK = (255, 255, 255), (0, 0, 0)


class Sample(NamedTuple):
    """One upload: the bytes of the file and the digit that it shows."""

    upload: bytes
    digit: int


# Ink: how much of every pixel the pen covers, float32 from 0 to 1.


def traced(picture: np.ndarray, size: int) -> np.ndarray:
    """Return the ink of a (28, 28) MNIST picture, redrawn with sharp edges so that its longer side is `size` pixels."""
    rows, columns = np.nonzero(picture)
    digit = Image.fromarray(picture[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1])
    scale = size / max(digit.size)
    width, height = (max(2, round(side * scale)) for side in digit.size)
    padded = Image.new("L", (digit.width + 2, digit.height + 2))  # The stroke's outer edge needs a pixel to fade into.
    padded.paste(digit, (1, 1))
    box = (0.5, 0.5, digit.width + 1.5, digit.height + 1.5)
    smooth = np.asarray(padded.resize((width, height), Image.Resampling.BICUBIC, box), np.float32) / 255
    return np.clip((smooth - 0.5) * max(1.0, scale / 2) + 0.5, 0, 1)


# Fonts that train.py does not use: matplotlib brings them along, so that they are the same on every machine.
FONTS = Path(matplotlib.get_data_path(), "fonts", "ttf")


def set_in_font(name: str, digit: int, size: int, slant: float) -> np.ndarray:
    """Return the ink of a digit in one of FONTS, sheared by `slant`."""
    font = ImageFont.truetype(str(FONTS / f"{name}.ttf"), size * 1.4)
    canvas = Image.new("L", (3 * size, 3 * size))
    ImageDraw.Draw(canvas).text((1.5 * size, 1.5 * size), str(digit), 255, font, anchor="mm")
    canvas = canvas.transform(canvas.size, Image.Transform.AFFINE, (1, slant, -1.5 * slant * size, 0, 1, 0))
    return np.asarray(canvas.crop(canvas.getbbox()), np.float32) / 255


def without_foot(ink: np.ndarray) -> np.ndarray:
    """Return a printed 1 without the bar below, as Arial, Helvetica and Roboto have it: only a flag and a stem."""
    width = (ink > 0.5).sum(axis=1)
    stem = ink.shape[0] * 3 // 4  # A row that shows the stem alone.
    end = next(row for row in range(stem, ink.shape[0]) if width[row] > 1.3 * width[stem])
    return ink[:end, (ink[:end] > 0).any(axis=0)]


def dilated(ink: np.ndarray, pixels: int) -> np.ndarray:
    """Return the ink of a pen that is wider by `pixels` on every side, or narrower for a negative number."""
    padded = Image.fromarray(np.uint8(np.pad(ink, max(pixels, 0)) * 255))
    kernel = (ImageFilter.MaxFilter if pixels > 0 else ImageFilter.MinFilter)(2 * abs(pixels) + 1)
    return np.asarray(padded.filter(kernel), np.float32) / 255


def placed(rng, ink: np.ndarray, width: int, height: int, margin: int = 4) -> np.ndarray:
    """Return the ink on a page of that size, anywhere at least `margin` pixels from its edges."""
    page = np.zeros((height, width), np.float32)
    top = rng.integers(margin, height - ink.shape[0] - margin + 1)
    left = rng.integers(margin, width - ink.shape[1] - margin + 1)
    page[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
    return page


# Paper, light and camera: float32 arrays (height, width, 3) from 0 to 255.


def painted(ink: np.ndarray, paper=WHITE, pen=BLACK) -> np.ndarray:
    """Return paper where there is no ink and the pen's colour where there is; either may be a colour or an array."""
    paper, pen = np.asarray(paper, np.float32), np.asarray(pen, np.float32)
    return paper + (pen - paper) * ink[..., None]


def lit(rng, picture: np.ndarray, darkest: float = 0.5) -> np.ndarray:
    """Return the picture under a lamp: brightness falls off to one side and towards the corners."""
    height, width = picture.shape[:2]
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j].astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    slope = (np.cos(angle) * x + np.sin(angle) * y) / 1.5
    light = 1 - (1 - darkest) * (0.5 + 0.5 * slope) - 0.15 * (x * x + y * y) / 2
    return picture * np.clip(light, 0.05, 1)[..., None]


def shadowed(rng, picture: np.ndarray) -> np.ndarray:
    """Return the picture with the edge of a shadow across it, half as bright behind the edge."""
    height, width = picture.shape[:2]
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j].astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    distance = np.cos(angle) * x + np.sin(angle) * y - rng.uniform(-0.5, 0.5)
    depth, sharpness = rng.uniform(0.3, 0.55), rng.uniform(15, 60)
    return picture * (1 - depth / 2 * (1 + np.tanh(distance * sharpness / 2)))[..., None]


def noisy(rng, picture: np.ndarray, sigma: float) -> np.ndarray:
    """Return the picture as a sensor sees it, with normal noise of `sigma` gray levels."""
    return picture + rng.normal(0, sigma, picture.shape).astype(np.float32)


def tilted(rng, picture: np.ndarray, amount: float = 0.06) -> np.ndarray:
    """Return the picture seen at an angle: its corners move inwards by up to `amount` of the sides (perspective)."""
    image = as_image(picture)
    width, height = image.size
    corners = np.array([(0, 0), (width, 0), (width, height), (0, height)], np.float64)
    seen = corners + rng.uniform(0, amount, (4, 2)) * (width, height) * [(1, 1), (-1, 1), (-1, -1), (1, -1)]
    rows, values = [], []
    for (x, y), (u, v) in zip(corners, seen, strict=True):  # Output corner (x, y) shows input point (u, v).
        rows += [(x, y, 1, 0, 0, 0, -u * x, -u * y), (0, 0, 0, x, y, 1, -v * x, -v * y)]
        values += [u, v]
    coefficients = np.linalg.solve(rows, values)
    turned = image.transform(image.size, Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BICUBIC)
    return np.asarray(turned, np.float32)


def blurred(picture: np.ndarray, radius: float) -> np.ndarray:
    """Return the picture out of focus."""
    return np.asarray(as_image(picture).filter(ImageFilter.GaussianBlur(radius)), np.float32)


def ruled(rng, width: int, height: int, paper, colour, spacing: int, squared: bool, thickness: int = 1) -> np.ndarray:
    """Return ruled or squared paper."""
    page = Image.new("RGB", (width, height), paper)
    draw = ImageDraw.Draw(page)
    for y in range(int(rng.integers(spacing)), height, spacing):
        draw.line([(0, y), (width, y)], colour, thickness)
    for x in range(int(rng.integers(spacing)), width if squared else 0, spacing):
        draw.line([(x, 0), (x, height)], colour, thickness)
    return np.asarray(page, np.float32)


def specks(rng, ink: np.ndarray, count: int, radius: float) -> np.ndarray:
    """Return ink with round specks of dirt anywhere that is not on or right beside the digit."""
    image = Image.fromarray(np.uint8(ink * 255))
    draw = ImageDraw.Draw(image)
    rows, columns = np.nonzero(ink > 0.5)
    for _ in range(count):
        x, y, r = rng.uniform(0, image.width), rng.uniform(0, image.height), rng.uniform(0.5, 1) * radius
        if np.hypot(columns - x, rows - y).min() > 4 * radius:
            draw.ellipse([x - r, y - r, x + r, y + r], 255)
    return np.asarray(image, np.float32) / 255


def gray_pen(rng, low: int = 0, high: int = 70) -> tuple:
    """Return a dark colour that is nearly gray."""
    return tuple(rng.integers(low, high + 1) + rng.integers(-8, 9, 3))


# Files.


def as_image(picture: np.ndarray) -> Image.Image:
    """Return an array of gray levels or colours as a picture of 8 bits."""
    return Image.fromarray(np.uint8(np.clip(picture + 0.5, 0, 255)))


def encoded(picture, kind: str = "PNG", **options) -> bytes:
    """Return the file that holds a picture or an array."""
    image = picture if isinstance(picture, Image.Image) else as_image(picture)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# Kinds: every one takes a random generator and a (28, 28) MNIST picture, and returns an upload.


def paint_program(rng, digit):
    """Black on a white square, as drawn with a mouse."""
    return encoded(placed(rng, traced(digit, int(rng.integers(120, 240))), 280, 280) * -255 + 255)


def white_on_black(rng, digit):
    """White on a black square, not centred."""
    return encoded(placed(rng, traced(digit, int(rng.integers(90, 240))), 280, 280) * 255)


def phone_photo(rng, digit):
    """A photo of pen on paper: uneven light, perspective, noise, JPEG."""
    ink = placed(rng, traced(digit, int(rng.integers(180, 420))), 800, 600, 40)
    paper = rng.integers(200, 245) + rng.integers(-12, 13, 3)
    photo = tilted(rng, lit(rng, painted(ink, paper, gray_pen(rng)), rng.uniform(0.35, 0.8)))
    return encoded(noisy(rng, photo, rng.uniform(2, 8)), "JPEG", quality=int(rng.integers(60, 95)))


def hard_shadow(rng, digit):
    """A photo with the shadow of a hand or of the phone across it."""
    ink = placed(rng, traced(digit, int(rng.integers(150, 320))), 640, 480, 20)
    photo = shadowed(rng, lit(rng, painted(ink, (235, 230, 220), gray_pen(rng, 0, 50)), 0.8))
    return encoded(noisy(rng, photo, 3), "JPEG", quality=85)


def faint_pencil(rng, digit):
    """Gray pencil on gray paper with noise: the ink is 35 to 60 gray levels darker."""
    paper = rng.integers(170, 230)
    ink = placed(rng, dilated(traced(digit, int(rng.integers(160, 300))), -2), 400, 400, 10)
    page = painted(ink, [paper] * 3, [paper - rng.integers(35, 60)] * 3)
    return encoded(noisy(rng, blurred(page, 1), 4), "JPEG", quality=80)


def ruled_paper(rng, digit):
    """Pen on paper ruled in light blue with a red margin, slightly turned."""
    page = ruled(rng, 560, 560, (250, 250, 245), (160, 185, 225), int(rng.integers(28, 60)), False, 2)
    page[:, 60:62] = (230, 130, 130)
    ink = placed(rng, traced(digit, int(rng.integers(140, 320))), 560, 560, 70)
    photo = tilted(rng, lit(rng, painted(ink, page, (25, 30, 90)), 0.75), 0.03)
    return encoded(noisy(rng, photo, 3), "JPEG", quality=85)


def squared_paper(rng, digit):
    """Pen on squared paper, the lines about half as dark as the ink."""
    gray = int(rng.integers(140, 190))
    page = ruled(rng, 480, 480, (245, 245, 245), (gray, gray, gray + 10), int(rng.integers(18, 40)), True)
    ink = placed(rng, traced(digit, int(rng.integers(140, 320))), 480, 480, 10)
    return encoded(noisy(rng, painted(ink, page, (30, 30, 40)), 2), "JPEG", quality=88)


def dark_rules(rng, digit):
    """Pen on paper ruled as dark as the ink: only the shape tells them apart."""
    page = ruled(rng, 400, 400, (250, 250, 250), (60, 60, 70), int(rng.integers(50, 90)), False, 2)
    ink = placed(rng, traced(digit, int(rng.integers(160, 300))), 400, 400, 10)
    return encoded(painted(ink, page, (20, 20, 30)))


def coloured_ink(rng, digit):
    """Ink and paper of different colours and nearly the same luminance."""
    pairs = [((40, 150, 60), (215, 60, 50)), ((200, 120, 120), (60, 150, 190)), ((150, 150, 20), (150, 110, 230))]
    paper, pen = pairs[rng.integers(len(pairs))][:: int(rng.choice([-1, 1]))]
    ink = placed(rng, traced(digit, int(rng.integers(120, 240))), 320, 300)
    return encoded(noisy(rng, painted(ink, paper, pen), 5), "JPEG", quality=85)


def transparent(rng, digit, low, high):
    ink = placed(rng, traced(digit, int(rng.integers(100, 200))), 256, 256)
    pixels = np.empty((*ink.shape, 4), np.float32)
    pixels[..., :3] = rng.integers(low, high, 3)
    pixels[..., 3] = ink * 255
    pixels[..., :3][ink == 0] = rng.choice([0, 255])  # What is invisible may have any colour.
    return encoded(pixels)


def transparent_dark(rng, digit):
    """Dark ink on nothing: RGBA."""
    return transparent(rng, digit, 0, 80)


def transparent_light(rng, digit):
    """Light ink on nothing: RGBA."""
    return transparent(rng, digit, 200, 256)


def small_with_dirt(rng, digit):
    """A small digit somewhere on a page that has several specks of dirt."""
    ink = placed(rng, traced(digit, int(rng.integers(60, 110))), 512, 400, 8)
    return encoded(painted(specks(rng, ink, 9, 5), (240, 238, 230), gray_pen(rng)), "JPEG", quality=85)


def thin_pen(rng, digit):
    """A large digit drawn with a line of about two pixels."""
    size = int(rng.integers(220, 360))
    centre = np.asarray(Image.fromarray(np.uint8(traced(digit, size) > 0.5) * 255).filter(ImageFilter.GaussianBlur(3)))
    strokes = Image.fromarray(np.uint8(centre > 127) * 255)
    line = np.float32(thinned(np.asarray(strokes) > 0))
    return encoded(255 - 255 * dilated(placed(rng, line, 400, 400, 10), 1))


def thinned(shape: np.ndarray) -> np.ndarray:
    """Return the skeleton of a boolean shape, one pixel wide (Zhang and Suen, Communications of the ACM 27, 1984)."""
    shape = np.pad(shape, 1)
    changed = True
    while changed:
        changed = False
        for first in (True, False):
            ring = [
                np.roll(shape, shift, (0, 1))
                for shift in ((1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1))
            ]  # Clockwise from north.
            count = np.sum(ring, axis=0)
            turns = np.sum([~ring[i] & ring[(i + 1) % 8] for i in range(8)], axis=0)
            north, east, south, west = ring[0], ring[2], ring[4], ring[6]
            if first:
                free = ~(north & east & south) & ~(east & south & west)
            else:
                free = ~(north & east & west) & ~(north & south & west)
            removed = shape & (count >= 2) & (count <= 6) & (turns == 1) & free
            changed |= bool(removed.any())
            shape = shape & ~removed
    return shape[1:-1, 1:-1]


def thick_marker(rng, digit):
    """A broad marker: strokes half as wide again as MNIST's."""
    ink = placed(rng, dilated(traced(digit, int(rng.integers(160, 230))), 4), 300, 300)
    return encoded(painted(ink, (250, 250, 250), rng.integers(0, 120, 3)))


def framed(rng, digit):
    """A frame drawn around the page."""
    ink = placed(rng, traced(digit, int(rng.integers(120, 200))), 300, 300, 30)
    inset, width = int(rng.integers(0, 12)), int(rng.integers(1, 10))
    picture = as_image(painted(ink, WHITE, gray_pen(rng)))
    ImageDraw.Draw(picture).rectangle([inset, inset, 299 - inset, 299 - inset], outline=(30, 30, 30), width=width)
    return encoded(picture)


def window(rng, digit):
    """A screenshot of a paint program: title bar, tool bar and border around the canvas."""
    canvas = as_image(painted(placed(rng, traced(digit, int(rng.integers(140, 260))), 420, 320), WHITE, BLACK))
    picture = Image.new("RGB", (460, 420), (200, 203, 210))
    draw = ImageDraw.Draw(picture)
    draw.rectangle([0, 0, 460, 26], (60, 90, 160))
    for x in range(20, 300, 34):
        draw.rectangle([x, 36, x + 24, 58], tuple(rng.integers(0, 256, 3)), (90, 90, 90))
    picture.paste(canvas, (20, 80))
    return encoded(picture)


def sixteen_bit(rng, digit):
    """A 16-bit gray scan that uses only a part of the range."""
    ink = placed(rng, traced(digit, int(rng.integers(120, 240))), 300, 300)
    return encoded(Image.fromarray(np.uint16(rng.integers(20000, 50000) - 15000 * ink)))


def tiny(rng, digit):
    """Dark on light in 20 to 40 pixels, with gray edges."""
    side = int(rng.integers(20, 41))
    size = int(rng.integers(15, side - 1))
    large = placed(rng, traced(digit, 8 * size), 8 * side, 8 * side)
    return encoded(as_image(255 - 235 * large).reduce(8))


def shifted_mnist(rng, digit):
    """An MNIST picture moved to a corner of its 28 pixels, with noise."""
    rows, columns = np.nonzero(digit)
    ink = digit[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] / np.float32(255)
    return encoded(noisy(rng, placed(rng, ink, 28, 28, 0)[..., None] * 255, 6)[..., 0])


def cmyk_jpeg(rng, digit):
    """A JPEG for print."""
    ink = placed(rng, traced(digit, int(rng.integers(120, 240))), 320, 320)
    picture = as_image(painted(ink, (250, 245, 225), rng.integers(0, 130, 3)))
    return encoded(picture.convert("CMYK"), "JPEG", quality=80)


def palette_gif(rng, digit):
    """A GIF of few colours, some with a transparent background."""
    ink = placed(rng, traced(digit, int(rng.integers(80, 170))), 200, 200)
    picture = as_image(painted(ink, (255, 250, 200), rng.integers(0, 130, 3))).quantize(8)
    options = {"transparency": picture.getpixel((0, 0))} if rng.random() < 0.5 else {}
    return encoded(picture, "GIF", **options)


def turned_by_exif(rng, digit):
    """A photo that the camera stored on its side, with the EXIF orientation to undo it."""
    orientation = int(rng.integers(2, 9))
    undone = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose: what orientation n needs, inverted.
    ink = placed(rng, traced(digit, int(rng.integers(140, 300))), 400, 360, 20)
    photo = as_image(lit(rng, painted(ink, (230, 228, 220), gray_pen(rng)), 0.7))
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(photo.transpose(Image.Transpose(undone[orientation])), "JPEG", quality=85, exif=exif)


def broken_strokes(rng, digit):
    """Strokes with two gaps where the pen failed."""
    size = int(rng.integers(160, 240))
    ink = Image.fromarray(np.uint8(traced(digit, size) * 255))
    draw = ImageDraw.Draw(ink)
    for _ in range(2):
        angle, offset = rng.uniform(0, np.pi), rng.uniform(-0.3, 0.3) * size
        x, y = ink.width / 2 + offset * np.cos(angle), ink.height / 2 + offset * np.sin(angle)
        dx, dy = -np.sin(angle) * 2 * size, np.cos(angle) * 2 * size
        draw.line([x - dx, y - dy, x + dx, y + dy], 0, max(2, size // 45))
    return encoded(255 - placed(rng, np.float32(ink), 280, 280))


def jpeg_blocks(rng, digit):
    """JPEG quality 8 to 15: blocks and ringing."""
    ink = placed(rng, traced(digit, int(rng.integers(100, 200))), 240, 240)
    return encoded(painted(ink, (225, 220, 215), gray_pen(rng)), "JPEG", quality=int(rng.integers(8, 16)))


def salt_and_pepper(rng, digit):
    """Every twentieth pixel is black or white."""
    page = painted(placed(rng, traced(digit, int(rng.integers(120, 220))), 260, 260), (220,) * 3, (40,) * 3)[..., 0]
    hit = rng.random(page.shape)
    page[hit < 0.025], page[hit > 0.975] = 0, 255
    return encoded(page)


def on_a_table(rng, digit):
    """A sheet of paper photographed on a darker table."""
    ink = placed(rng, traced(digit, int(rng.integers(110, 220))), 400, 340, 25)
    sheet = as_image(painted(ink, (240, 238, 232), gray_pen(rng))).convert("RGBA")
    sheet = sheet.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC, expand=True)
    table = Image.new("RGB", (640, 520), tuple(rng.integers(30, 110, 3)))
    table.paste(sheet, tuple(int(rng.integers(20, 100)) for _ in range(2)), sheet)
    return encoded(noisy(rng, lit(rng, np.asarray(table, np.float32), 0.75), 4), "JPEG", quality=85)


def at_the_edge(rng, digit):
    """The digit touches an edge of the picture, or two."""
    ink = traced(digit, int(rng.integers(120, 200)))
    page = placed(rng, ink, 240, 240, 0)
    axis = int(rng.integers(2))
    first = np.flatnonzero(page.max(axis=1 - axis))[0]
    return encoded(255 - 255 * np.roll(page, -first, axis))


def printed(rng, digit, label):
    """The digit set in a font, the 1 with and without a foot."""
    family = rng.choice(["DejaVuSans", "DejaVuSansMono", "DejaVuSerif"])
    ink = set_in_font(family + rng.choice(["", "-Bold"]), label, int(rng.integers(90, 180)), rng.uniform(-0.1, 0.3))
    if label == 1 and rng.random() < 0.5:
        ink = without_foot(ink)
    return encoded(painted(placed(rng, ink, 320, 320), (250, 250, 250), gray_pen(rng)))


def scan_with_shadow(rng, digit):
    """A gray scan with the black shadow of the scanner's lid along one or two sides."""
    ink = placed(rng, traced(digit, int(rng.integers(150, 260))), 500, 420, 40)
    page = painted(ink, (205,) * 3, gray_pen(rng, 20, 80))
    page[:, : int(rng.integers(5, 25))] = 15
    if rng.random() < 0.5:
        page[-int(rng.integers(5, 25)) :] = 15
    return encoded(noisy(rng, blurred(page, 1.5), 3)[..., 0])


def large_photo(rng, digit):
    """A large photo of a small digit, turned by EXIF, under two lamps."""
    ink = placed(rng, traced(digit, int(rng.integers(260, 500))), 1600, 1200, 80)
    photo = shadowed(rng, lit(rng, painted(ink, (225, 215, 200), gray_pen(rng)), 0.6))
    exif = Image.Exif()
    exif[0x0112] = 6
    side = as_image(noisy(rng, photo, 6)).transpose(Image.Transpose.ROTATE_90)
    return encoded(side, "JPEG", quality=75, exif=exif)


# Something beside the digit, faint ink and tight crops: what people's bug reports show.


def straight(shape: tuple[int, int], lines, thickness: float) -> np.ndarray:
    """Return the ink of straight lines (x, y, x, y) with soft edges, on a page of (height, width)."""
    large = Image.new("L", (4 * shape[1], 4 * shape[0]))
    draw, width = ImageDraw.Draw(large), max(1, round(4 * thickness))
    for line in lines:
        draw.line([4 * place for place in line], 255, width)
        for x, y in (line[:2], line[2:]):  # Square ends, so that corners are whole.
            x, y = (round(4 * place - width / 2) for place in (x, y))
            draw.rectangle([x, y, x + width - 1, y + width - 1], 255)
    return np.asarray(large.reduce(4), np.float32) / 255


def sides_of(left: float, top: float, right: float, bottom: float) -> list:
    """Return the four lines (x, y, x, y) of a box."""
    corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
    return [(*start, *end) for start, end in zip(corners, corners[1:] + corners[:1], strict=True)]


def in_cell(rng, picture, shape, cell, gap: float) -> np.ndarray:
    """Return the ink of the digit on a page of (height, width), anywhere in a cell (left, top, right, bottom)."""
    left, top, right, bottom = (round(side + sign * gap) for side, sign in zip(cell, (1, 1, -1, -1), strict=True))
    ink = traced(picture, int(min(right - left, bottom - top) * rng.uniform(0.45, 0.95)))
    page = np.zeros(shape, np.float32)
    page[top:bottom, left:right] = placed(rng, ink, right - left, bottom - top, 0)
    return page


def filled_in(rng, ink: np.ndarray, lines: np.ndarray) -> bytes:
    """Return a form: printed lines and a pen, clean or a photo, straight or a little turned, either polarity."""
    pen = rng.integers(0, 100, 3)
    paper, print_colour = rng.integers(225, 256, 3), pen if rng.random() < 0.5 else rng.integers(0, 140, 3)
    form = painted(ink, painted(lines, paper, print_colour), pen)
    if rng.random() < 0.5:
        turned = as_image(form).rotate(rng.uniform(-4, 4), Image.Resampling.BICUBIC, fillcolor=tuple(paper.tolist()))
        form = np.asarray(turned, np.float32)
    if rng.random() < 0.2:
        form = 255 - form
    if rng.random() < 0.5:
        return encoded(form)
    photo = noisy(rng, lit(rng, form, rng.uniform(0.6, 0.9)), rng.uniform(2, 6))
    return encoded(photo, "JPEG", quality=int(rng.integers(70, 95)))


def comb_cell(rng, digit):
    """One to four cells of a comb, open at the top, the digit in one of them."""
    height, count = int(rng.integers(120, 400)), int(rng.integers(1, 5))
    width, thickness = height * rng.uniform(0.7, 1.1), rng.uniform(1.2, max(2, height / 35))
    left, top = rng.uniform(10, 60, 2)
    bottom, right = top + height, left + count * width
    shape = int(bottom + rng.uniform(10, 60)), int(right + rng.uniform(10, 60))
    tooth = bottom - height * rng.choice([1, rng.uniform(0.3, 1)])
    lines = [(left, bottom, right, bottom)] + [(x, tooth, x, bottom) for x in left + width * np.arange(count + 1)]
    cell = int(rng.integers(count))
    ink = in_cell(rng, digit, shape, (left + cell * width, top, left + (cell + 1) * width, bottom), 3 + thickness)
    return filled_in(rng, ink, straight(shape, lines, thickness))


def box(rng, digit):
    """A box around the digit, anywhere on the page."""
    width, height = rng.uniform(100, 340, 2)
    left, top = rng.uniform(8, 160, 2)
    right, bottom, thickness = left + width, top + height, rng.uniform(1.2, 7)
    shape = int(bottom + rng.uniform(8, 160)), int(right + rng.uniform(8, 160))
    ink = in_cell(rng, digit, shape, (left, top, right, bottom), 3 + thickness)
    return filled_in(rng, ink, straight(shape, sides_of(left, top, right, bottom), thickness))


def form_cells(rng, digit):
    """Rows of cells as in a form or a table, the digit in one of them, the lines ending on the page or beyond it."""
    rows, columns = (int(count) for count in rng.integers(1, 5, 2))
    width, height, thickness = *rng.uniform(70, 170, 2), rng.uniform(1.2, 4)
    left, top = (rng.uniform(8, 50) if rng.random() < 0.6 else -rng.uniform(0, 0.4) * side for side in (width, height))
    right, bottom = left + columns * width, top + rows * height
    shape = tuple(int(end + rng.uniform(8, 50)) for end in (bottom, right))
    lines = [(left, y, right, y) for y in top + height * np.arange(rows + 1)]
    lines += [(x, top, x, bottom) for x in left + width * np.arange(columns + 1)]
    row, column = int(rng.integers(top < 0 and rows > 1, rows)), int(rng.integers(left < 0 and columns > 1, columns))
    left, top = left + column * width, top + row * height
    ink = in_cell(rng, digit, shape, (max(left, 0), max(top, 0), left + width, top + height), 3 + thickness)
    return filled_in(rng, ink, straight(shape, lines, thickness))


def dark_border(rng, digit):
    """A thick dark border, or a light one around a dark page, that reaches the picture's edges."""
    width, height = (int(side) for side in rng.integers(240, 600, 2))
    border = (min(width, height) * rng.uniform(0.02, 0.14) * rng.choice([np.ones(4), rng.uniform(0.6, 1.4, 4)])).round()
    left, top, right, bottom = (int(side) for side in np.maximum(border, 2) * (1, 1, -1, -1) + (0, 0, width, height))
    ink = in_cell(rng, digit, (height, width), (left, top, right, bottom), 0.08 * min(right - left, bottom - top))
    paper, pen, frame = int(rng.integers(200, 256)), gray_pen(rng), rng.integers(0, 90, 3)
    picture = np.broadcast_to(np.float32(frame), (height, width, 3)).copy()
    picture[top:bottom, left:right] = painted(ink, (paper,) * 3, pen)[top:bottom, left:right]
    if rng.random() < 0.2:
        picture = 255 - picture
    if rng.random() < 0.5:
        return encoded(picture)
    picture = noisy(rng, lit(rng, blurred(picture, rng.uniform(0, 1.5)), rng.uniform(0.7, 1)), rng.uniform(0, 5))
    return encoded(picture, "JPEG", quality=int(rng.integers(60, 95)))


def underlined(rng, digit):
    """A short line below the digit, or two, as for a signature or a price."""
    width, height = (int(side) for side in rng.integers(180, 500, 2))
    ink = traced(digit, int(min(width, height) * rng.uniform(0.25, 0.6)))
    side = max(ink.shape)
    thickness = rng.uniform(1.2, max(3, side / 14))
    below = thickness / 2 + max(4, side * rng.uniform(0.04, 0.3))
    top = int(rng.uniform(4, height - ink.shape[0] - below - 2 * thickness - 6))
    length = min(side * rng.uniform(1.05, 2.5), width - 8)
    line_left = rng.uniform(4, width - length - 4)
    left = line_left + (length - ink.shape[1]) * rng.uniform(0.1, 0.9)
    left = int(np.clip(left, 0, width - ink.shape[1]))
    page = np.zeros((height, width), np.float32)
    page[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
    y = top + ink.shape[0] + below
    lines = [(line_left, y, line_left + length, y)]
    if rng.random() < 0.2:
        lines.append((line_left, y + 2.5 * thickness, line_left + length, y + 2.5 * thickness))
    return filled_in(rng, page, straight(page.shape, lines, thickness))


def circled(rng, digit):
    """A circle or a box with round corners around the digit."""
    width, height = rng.uniform(140, 300, 2)
    left, top = rng.uniform(8, 100, 2)
    right, bottom, thickness = left + width, top + height, rng.uniform(1.5, 9)
    shape = int(bottom + rng.uniform(8, 100)), int(right + rng.uniform(8, 100))
    large = Image.new("L", (4 * shape[1], 4 * shape[0]))
    draw, place, pen = ImageDraw.Draw(large), [4 * side for side in (left, top, right, bottom)], round(4 * thickness)
    if rng.random() < 0.5:
        draw.ellipse(place, outline=255, width=pen)
    else:
        draw.rounded_rectangle(place, 4 * min(width, height) * rng.uniform(0.1, 0.5), outline=255, width=pen)
    ink = in_cell(rng, digit, shape, (left, top, right, bottom), 0.17 * min(width, height) + thickness)
    return filled_in(rng, ink, np.asarray(large.reduce(4), np.float32) / 255)


def dashed(rng, digit):
    """A box of dashes or dots around the digit, or only its lower side, as a line below."""
    width, height = rng.uniform(90, 240, 2)
    left, top = rng.uniform(8, 100, 2)
    right, bottom, thickness = left + width, top + height, rng.uniform(1.3, 5)
    shape = int(bottom + rng.uniform(8, 100)), int(right + rng.uniform(8, 100))
    dash, lines = rng.choice([0.1, rng.uniform(4, 16)]), []
    step = dash + thickness + rng.uniform(3, 10)
    for x, y, end_x, end_y in sides_of(left, top, right, bottom)[slice(2, 3) if rng.random() < 0.3 else slice(4)]:
        length = abs(end_x - x) + abs(end_y - y)
        for start in np.arange(0, length, step) / length:
            end = min(1, start + dash / length)
            lines.append([a + share * (b - a) for share in (start, end) for a, b in ((x, end_x), (y, end_y))])
    ink = in_cell(rng, digit, shape, (left, top, right, bottom), 4 + thickness)
    return filled_in(rng, ink, straight(shape, lines, thickness))


def row_of_boxes(rng, digit):
    """Boxes side by side, one of them filled in."""
    count, width, gap = int(rng.integers(3, 9)), rng.uniform(50, 120), rng.uniform(4, 20)
    height, thickness = width * rng.uniform(1, 1.5), rng.uniform(1, 3.5)
    left, top = rng.uniform(8, 40, 2)
    starts = left + (width + gap) * np.arange(count)
    shape = int(top + height + rng.uniform(8, 60)), int(starts[-1] + width + rng.uniform(8, 40))
    lines = [line for start in starts for line in sides_of(start, top, start + width, top + height)]
    start = rng.choice(starts)
    ink = in_cell(rng, digit, shape, (start, top, start + width, top + height), 3 + thickness)
    return filled_in(rng, ink, straight(shape, lines, thickness))


def small_page(rng, digit):
    """A note far away on a desk, the display of a device, or a digit that was marked with a highlighter."""
    paper = [(240, 238, 230), (250, 230, 90), (250, 150, 190), (150, 220, 160), (30, 40, 70)][rng.integers(5)]
    pen = (230, 235, 240) if sum(paper) < 300 else gray_pen(rng)
    width, height = (int(side) for side in rng.integers(130, 200, 2))
    ink = placed(rng, traced(digit, int(min(width, height) * rng.uniform(0.4, 0.75))), width, height, 14)
    sheet = as_image(painted(ink, paper, pen)).convert("RGBA")
    if rng.random() < 0.5:
        sheet = sheet.rotate(rng.uniform(-15, 15), Image.Resampling.BICUBIC, expand=True)
    desk = Image.new("RGB", (800, 600), tuple(rng.integers(30, 150, 3)) if sum(paper) > 300 else (225, 225, 228))
    desk.paste(sheet, tuple(int(rng.integers(20, most)) for most in (540, 340)), sheet)
    return encoded(noisy(rng, lit(rng, np.asarray(desk, np.float32), 0.7), 4), "JPEG", quality=82)


def faint_in_a_lamp(rng, digit):
    """Ink 8 to 15 % darker than its paper, on which a lamp shines from above: it is darker all around."""
    width, height = (int(side) for side in rng.integers(280, 600, 2))
    ink = placed(rng, traced(digit, int(min(width, height) * rng.uniform(0.35, 0.7))), width, height, 10)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j].astype(np.float32)
    distance = np.hypot(x - rng.uniform(0.2, 0.8), y - rng.uniform(0.2, 0.8))
    light = 1 - rng.uniform(0.1, 0.45) * (distance / distance.max()) ** 2
    page = noisy(rng, rng.uniform(170, 245) * light * (1 - rng.uniform(0.08, 0.15) * ink), rng.uniform(1, 4))
    return encoded(page) if rng.random() < 0.5 else encoded(page, "JPEG", quality=int(rng.integers(80, 96)))


def faint_on_uneven_light(rng, digit):
    """Ink 12 % darker than its paper, whose brightness falls by a third across the picture, with a sensor's noise."""
    width, height = (int(side) for side in rng.integers(280, 520, 2))
    ink = placed(rng, traced(digit, int(min(width, height) * rng.uniform(0.4, 0.75))), width, height, 10)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j].astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    slope = np.cos(angle) * x + np.sin(angle) * y
    light = 1 - (slope - slope.min()) / np.ptp(slope) * rng.uniform(0.25, 0.38)
    page = rng.uniform(160, 240) * light * (1 - rng.uniform(0.1, 0.14) * ink)
    page = noisy(rng, page, rng.uniform(1, 5))
    return encoded(page) if rng.random() < 0.5 else encoded(page, "JPEG", quality=int(rng.integers(80, 96)))


def tight_crop(rng, digit):
    """The digit cut out along its own ink, with 0 to 3 pixels around it, dark on light or light on dark."""
    size = int(rng.integers(60, 260))
    if rng.random() < 0.5:
        ink = traced(digit, size)
    else:  # Enlarged smoothly, with the faint pixels of its edges.
        rows, columns = np.nonzero(digit > 40)
        small = Image.fromarray(digit[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1])
        large = small.resize([max(2, size * side // max(small.size)) for side in small.size], Image.Resampling.BICUBIC)
        ink = np.clip(np.asarray(large, np.float32) / 127 - 0.3, 0, 1)
        ink = ink[(ink > 0.1).any(axis=1)][:, (ink > 0.1).any(axis=0)]
    ink = np.pad(ink, int(rng.integers(4)))
    if rng.random() < 0.3:
        ink = dilated(np.pad(ink, 1), 1)
    picture = painted(ink, rng.integers(215, 256, 3), rng.integers(0, 60, 3))
    picture = noisy(rng, 255 - picture if rng.random() < 0.5 else picture, rng.choice([0, 3]))
    return encoded(picture) if rng.random() < 0.5 else encoded(picture, "JPEG", quality=int(rng.integers(75, 96)))


def pencil_on_squares(rng, digit):
    """Gray pencil on squared paper, drawn with a thin line, under uneven light, turned a little."""
    gray, spacing = int(rng.integers(165, 215)), int(rng.integers(18, 40))
    page = ruled(rng, 800, 600, (232, 234, 230), (gray, gray + 4, gray), spacing, True)
    line = traced(digit, int(rng.integers(200, 400))) > 0.5
    line = dilated(np.float32(thinned(line)), int(rng.integers(2, 5)))
    photo = painted(placed(rng, line, 800, 600, 30), page, [int(rng.integers(70, 125))] * 3)
    photo = noisy(rng, lit(rng, tilted(rng, photo, 0.03), 0.7), rng.uniform(2, 5))
    return encoded(photo, "JPEG", quality=int(rng.integers(75, 95)))


KINDS = (
    paint_program, white_on_black, phone_photo, hard_shadow, faint_pencil, ruled_paper, squared_paper, dark_rules,
    coloured_ink, transparent_dark, transparent_light, small_with_dirt, thin_pen, thick_marker, framed, window,
    sixteen_bit, tiny, shifted_mnist, cmyk_jpeg, palette_gif, turned_by_exif, broken_strokes, jpeg_blocks,
    salt_and_pepper, on_a_table, at_the_edge, printed,
    scan_with_shadow, large_photo,
    comb_cell, box, form_cells, dark_border, underlined, faint_on_uneven_light, tight_crop, pencil_on_squares,
    circled, dashed, row_of_boxes, small_page, faint_in_a_lamp,
)  # fmt: skip


# Kinds that were held out.


def whiteboard(rng, digit):
    """A whiteboard with a lamp's reflection on it."""
    ink = placed(rng, traced(digit, int(rng.integers(160, 320))), 640, 480, 30)
    board = painted(ink, (205, 210, 215), [(20, 20, 30), (20, 50, 170), (190, 30, 40), (10, 110, 60)][rng.integers(4)])
    y, x = np.mgrid[:480, :640].astype(np.float32)
    glare = np.exp(-((x - rng.uniform(0, 640)) ** 2 + (y - rng.uniform(0, 480)) ** 2) / 2 / rng.uniform(40, 90) ** 2)
    return encoded(noisy(rng, lit(rng, board, 0.7) + 60 * glare[..., None], 4), "JPEG", quality=80)


def chalk(rng, digit):
    """Chalk on a blackboard: rough strokes, a cloudy board."""
    ink = placed(rng, traced(digit, int(rng.integers(160, 320))), 480, 400, 20)
    grain = rng.random(ink.shape).astype(np.float32) > 0.3
    clouds = np.asarray(as_image(rng.integers(0, 50, (5, 6))).resize((480, 400), Image.Resampling.BICUBIC), np.float32)
    return encoded(blurred(painted(ink * grain, (clouds + 40)[..., None] * (0.8, 1, 0.9), (225, 225, 215)), 1), "JPEG")


def neon(rng, digit):
    """A bright line with a coloured glow on a dark wall."""
    ink = placed(rng, dilated(traced(digit, int(rng.integers(150, 230))), -3), 320, 320, 30)
    glow = np.asarray(as_image(ink * 255).filter(ImageFilter.GaussianBlur(12)), np.float32)[..., None] / 255
    colour = np.array([(255, 40, 160), (40, 200, 255), (90, 255, 80)][rng.integers(3)], np.float32)
    return encoded(painted(ink, (20, 18, 30) + glow * colour, (255, 250, 255)), "JPEG", quality=85)


def sticky_note(rng, digit):
    """Coloured pen on a coloured note, a part of it lifted into shadow."""
    paper = [(250, 230, 90), (250, 150, 190), (150, 220, 160), (140, 200, 250)][rng.integers(4)]
    pen = [(30, 40, 150), (160, 20, 40), (20, 90, 40), (30, 30, 30)][rng.integers(4)]
    ink = placed(rng, traced(digit, int(rng.integers(120, 260))), 360, 360, 20)
    return encoded(noisy(rng, lit(rng, painted(ink, paper, pen), 0.5), 5), "JPEG", quality=80)


def coffee_stain(rng, digit):
    """A brown ring and pale blots on the page, near the digit or through it."""
    page = Image.new("RGB", (480, 400), (245, 243, 238))
    draw = ImageDraw.Draw(page)
    for _ in range(2):
        x, y, r = rng.uniform(0, 480), rng.uniform(0, 400), rng.uniform(50, 110)
        draw.ellipse([x - r, y - r, x + r, y + r], (238, 228, 208), (205, 180, 145), 6)
    page = blurred(np.asarray(page, np.float32), 2)
    ink = placed(rng, traced(digit, int(rng.integers(130, 280))), 480, 400, 15)
    return encoded(noisy(rng, painted(ink, page, gray_pen(rng, 0, 50)), 3), "JPEG", quality=85)


def motion_blur(rng, digit):
    """The hand shook: blurred along one direction."""
    page = painted(placed(rng, traced(digit, int(rng.integers(160, 260))), 360, 360, 30), (230, 230, 230), (40, 40, 40))
    angle, length = rng.uniform(0, np.pi), int(rng.integers(6, 16))
    shifts = [(round(np.sin(angle) * i), round(np.cos(angle) * i)) for i in range(length)]
    return encoded(noisy(rng, np.mean([np.roll(page, shift, (0, 1)) for shift in shifts], axis=0), 3), "JPEG")


def gradient(rng, digit):
    """Flat ink on a computed gradient between two colours, the ink clearly darker or lighter than both."""
    y = np.linspace(0, 1, 300, dtype=np.float32)[:, None, None] * np.ones((1, 300, 1), np.float32)
    dark = rng.random() < 0.5
    first, last = rng.integers(110, 256, (2, 3)) if dark else rng.integers(0, 130, (2, 3))
    ink = placed(rng, traced(digit, int(rng.integers(120, 220))), 300, 300)
    paper = first + (last - first) * (y if rng.random() < 0.5 else y.transpose(1, 0, 2))
    return encoded(painted(ink, paper, BLACK if dark else WHITE))


def one_bit(rng, digit):
    """A fax: one bit a pixel, gray dithered."""
    ink = placed(rng, traced(digit, int(rng.integers(120, 240))), 300, 300)
    return encoded(as_image(235 - 215 * ink).convert("1"))


def float_tiff(rng, digit):
    """A TIFF of floats, from a program for science, some of its values not numbers."""
    page = placed(rng, traced(digit, int(rng.integers(120, 240))), 300, 300) * rng.uniform(1e-3, 1e3)
    page[rng.random(page.shape) < 0.001] = np.nan
    return encoded(Image.fromarray(page), "TIFF")


def gray_alpha(rng, digit):
    """Gray with a soft alpha channel, on a page with round corners."""
    ink = placed(rng, traced(digit, int(rng.integers(100, 180))), 260, 260, 30)
    corners = Image.new("L", (260, 260))
    ImageDraw.Draw(corners).rounded_rectangle([0, 0, 259, 259], 40, 255)
    return encoded(Image.merge("LA", (as_image(240 - 200 * ink), corners)))


HELD_OUT = (
    whiteboard, chalk, neon, sticky_note, coffee_stain, motion_blur, gradient, one_bit, float_tiff,
    gray_alpha,
)  # fmt: skip


def samples(kind, pictures: np.ndarray, digits: np.ndarray, count: int) -> list[Sample]:
    """Return `count` uploads of one kind made from random pictures of (n, 28, 28) uint8, always the same ones."""
    made = []
    for index in range(count):
        rng = np.random.default_rng([zlib.crc32(kind.__name__.encode()), index])
        choice = int(rng.integers(len(digits)))
        digit = int(digits[choice])
        made.append(Sample(kind(rng, pictures[choice], *([digit] if kind is printed else [])), digit))
    return made


def test_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return MNIST's test pictures (10000, 28, 28) uint8 and their digits (10000,)."""
    with np.load(ROOT / "images" / "mnist.npz") as mnist:
        return mnist["x_test"], mnist["y_test"]


test_digits.__test__ = False  # pytest: this is no test.


def contact_sheet(examples: int = 2, columns: int = 5) -> Image.Image:
    """Return a picture of every kind's first uploads, each beside what the model sees of it."""
    pictures, digits = test_digits()
    cell_width, cell_height, tile = 268, 30 + examples * 132, 116
    font, heading = ImageFont.load_default(15), ImageFont.load_default(20)
    groups = (
        ("Kinds used in development: upload, what the model sees", KINDS),
        ("Kinds held out of the first version", HELD_OUT),
    )
    height = sum(44 + -(-len(kinds) // columns) * cell_height for _, kinds in groups) + 8
    sheet = Image.new("RGB", (columns * cell_width + 12, height), (244, 244, 244))
    draw = ImageDraw.Draw(sheet)
    top = 0
    for title, kinds in groups:
        draw.text((12, top + 12), title, BLACK, heading)
        for index, kind in enumerate(kinds):
            left = 12 + index % columns * cell_width
            y = top + 44 + index // columns * cell_height
            draw.text((left, y), kind.__name__.replace("_", " "), (60, 60, 60), font)
            for row, sample in enumerate(samples(kind, pictures, digits, examples)):
                upload = open_image(io.BytesIO(sample.upload))
                seen = Image.fromarray(np.uint8(preprocess(upload)[..., 0])).resize(
                    (112, 112), Image.Resampling.NEAREST
                )
                shown = displayed(upload, tile)
                corner = y + 22 + row * 132
                sheet.paste(shown, (left + (tile - shown.width) // 2, corner + (tile - shown.height) // 2))
                sheet.paste(seen, (left + tile + 8, corner + (tile - 112) // 2))
        top += 44 + -(-len(kinds) // columns) * cell_height
    return sheet


def displayed(upload: Image.Image, side: int) -> Image.Image:
    """Return an upload as a page would show it: numbers scaled to gray, what is transparent as gray squares."""
    if upload.mode.startswith(("I", "F")):
        values = np.nan_to_num(np.asarray(upload, np.float32))
        upload = as_image((values - values.min()) * (255 / max(np.ptp(values), 1e-6)))
    upload = upload.convert("RGBA")
    upload.thumbnail((side, side))
    if max(upload.size) < side // 2:
        upload = upload.resize([side * size // max(upload.size) for size in upload.size], Image.Resampling.NEAREST)
    rows, columns = np.indices((upload.height, upload.width)) // 8
    squares = as_image(np.repeat((150 + 50 * ((rows + columns) % 2))[..., None], 3, axis=2)).convert("RGBA")
    return Image.alpha_composite(squares, upload).convert("RGB")


def main(argv=None) -> int:
    """Write the contact sheet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contact-sheet", metavar="FILE", required=True, help="the picture to write")
    arguments = parser.parse_args(argv)
    try:
        contact_sheet().save(arguments.contact_sheet, optimize=True)
    except OSError as error:
        print(f"cannot write {arguments.contact_sheet}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
