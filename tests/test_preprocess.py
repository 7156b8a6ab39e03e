"""Every mode, orientation and file format gives the same digit; MNIST's own pictures are not touched."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pillow_heif
import pytest
from PIL import Image, PngImagePlugin
from wild_digits import (
    KINDS,
    encoded,
    lit,
    noisy,
    painted,
    placed,
    ruled,
    samples,
    test_digits,
    tight_crop,
    traced,
)

import mnist_preprocess
import picture_file
from mnist_preprocess import IMAGE_SHAPE, ImageError, NoDigitError, open_image, preprocess
from picture_file import png_chunk

pillow_heif.register_heif_opener()

PICTURES, DIGITS = test_digits()
INK = placed(np.random.default_rng(0), traced(PICTURES[0], 140), 200, 180)
GRAY = Image.fromarray(np.uint8(240 - 220 * INK))
COLOUR = Image.fromarray(np.uint8(painted(INK, (240, 236, 220), (30, 30, 120))))
SEEN = preprocess(GRAY)


def alike(image) -> bool:
    """Tell whether the model sees nearly what it sees in gray; without soft edges, strokes are a little wider."""
    return np.corrcoef(preprocess(image).ravel(), SEEN.ravel())[0, 1] > 0.97


def with_alpha(pen, hidden=0, mode="RGBA") -> Image.Image:
    pixels = np.full((*INK.shape, 4), hidden, np.uint8)
    pixels[INK > 0, :3] = pen
    pixels[..., 3] = np.uint8(INK * 255)
    return Image.fromarray(pixels).convert(mode)


def numbers(dtype, low, high) -> Image.Image:
    return Image.fromarray((high - (float(high) - low) * INK.astype(np.float64)).astype(dtype))


def with_bad_values() -> Image.Image:
    values = 1.0 - INK
    values[:3, :3], values[5, 5], values[6, 6] = np.nan, np.inf, -np.inf
    return Image.fromarray(values)


def with_dead_pixels() -> Image.Image:
    values = np.float32(1.0 - INK)
    values[5, 5], values[60, 9] = 1e6, -1e6
    return Image.fromarray(values)


def transparent_palette() -> Image.Image:
    image = COLOUR.quantize(8)
    image.info["transparency"] = image.getpixel((0, 0))
    return image


MODES = {
    "1": lambda: GRAY.convert("1", dither=Image.Dither.NONE),
    "L": lambda: GRAY,
    "L, light on dark": lambda: Image.fromarray(255 - np.asarray(GRAY)),
    "LA, opaque": lambda: GRAY.convert("LA"),
    "LA, dark ink": lambda: with_alpha((20, 20, 20), mode="LA"),
    "LA, light ink": lambda: with_alpha((250, 250, 250), 255, mode="LA"),
    "La": lambda: with_alpha((20, 20, 20), mode="LA").convert("La"),
    "P": lambda: COLOUR.quantize(16),
    "P, transparent": transparent_palette,
    "PA": lambda: COLOUR.quantize(16).convert("PA"),
    "RGB": lambda: COLOUR,
    "RGBA, opaque": lambda: COLOUR.convert("RGBA"),
    "RGBA, dark ink": lambda: with_alpha((30, 10, 10)),
    "RGBA, faint ink": lambda: Image.merge(
        "RGBA", [Image.new("L", GRAY.size)] * 3 + [Image.fromarray(np.uint8(INK * 90))]
    ),
    "RGBA, light ink": lambda: with_alpha((255, 250, 200), 255),
    "RGBA, black ink on invisible black": lambda: with_alpha((0, 0, 0)),
    "RGBA, white ink on invisible white": lambda: with_alpha((255, 255, 255), 255),
    "RGBa": lambda: with_alpha((30, 10, 10)).convert("RGBa"),
    "RGBX": lambda: COLOUR.convert("RGBX"),
    "CMYK": lambda: COLOUR.convert("CMYK"),
    "YCbCr": lambda: COLOUR.convert("YCbCr"),
    "HSV": lambda: COLOUR.convert("HSV"),
    "I;16": lambda: numbers(np.uint16, 12000, 40000),
    "I": lambda: numbers(np.int32, -5_000_000, 70_000_000),
    "F": lambda: numbers(np.float32, -1e-3, 2e-3),
    "F, dead pixels": with_dead_pixels,
    "F, huge": lambda: numbers(np.float32, -3e38, 3e38),
    "F, not numbers": with_bad_values,
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_shows_the_same_digit(mode):
    image = MODES[mode]()
    assert image.mode == mode.split(",")[0]
    assert alike(image)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA, dark ink", "LA, light ink", "CMYK", "I;16", "I", "F"])
def test_large_pictures_of_every_mode(mode):
    image = MODES[mode]()
    assert alike(image.resize((image.width * 4, image.height * 4), Image.Resampling.NEAREST))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_exif_orientation(orientation, kind):
    exif = Image.Exif()
    exif[274] = orientation
    stored = np.asarray(GRAY)
    if orientation >= 5:
        stored = stored.T
    stored = stored[:: -1 if orientation in (3, 4, 7, 8) else 1, :: -1 if orientation in (2, 3, 6, 7) else 1]
    if orientation in (6, 8):  # Stored turned by 90 degrees: see the table of EXIF 2.32, tag 274.
        stored = np.rot90(np.asarray(GRAY), 1 if orientation == 6 else -1)
    upload = encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif)
    assert alike(open_image(io.BytesIO(upload)))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "HEIF", "AVIF"])
def test_formats(kind):
    assert alike(open_image(io.BytesIO(encoded(COLOUR, kind))))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_the_first_frame_of_an_animation_counts(kind):
    other = Image.fromarray(255 - 200 * (np.indices((180, 200)).sum(axis=0) // 40 % 2).astype(np.uint8))
    file = io.BytesIO()
    GRAY.save(file, kind, save_all=True, append_images=[other])
    assert alike(open_image(file))


def test_scipy_is_loaded_for_a_picture_that_needs_it_alone():
    script = """
import io, sys
import numpy as np
from PIL import Image, PngImagePlugin
from mnist_preprocess import open_image, preprocess
with np.load("images/mnist.npz") as mnist:
    picture = Image.fromarray(mnist["x_test"][0])
for mode in ("L", "RGB", "RGBA", "P", "LA"):
    file = io.BytesIO()
    picture.convert(mode).save(file, "PNG")
    preprocess(open_image(file))
assert not any(name.split(".")[0] == "scipy" for name in sys.modules), "loaded too early"
preprocess(open_image("images/wild_digits.png"))
assert "scipy.ndimage" in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], cwd=mnist_preprocess.ROOT, check=True)


def test_mnist_passes_unchanged():
    with np.load(mnist_preprocess.ROOT / "images" / "mnist.npz") as mnist:
        every = np.concatenate([mnist["x_train"], mnist["x_test"]])
    assert all(np.array_equal(preprocess(Image.fromarray(picture))[..., 0], picture) for picture in every)


def test_mnist_sent_as_png_passes_unchanged():
    for picture in PICTURES:
        pixels = preprocess(open_image(io.BytesIO(encoded(Image.fromarray(picture), compress_level=1))))
        assert pixels.shape == IMAGE_SHAPE and pixels.dtype == np.float32
        assert np.array_equal(pixels[..., 0], picture)


@pytest.mark.parametrize("change", [lambda p: 255 - p, lambda p: np.dstack([p] * 3)], ids=["dark on light", "RGB"])
def test_mnist_in_other_dress_is_still_mnist(change):
    for picture in PICTURES[:500]:
        assert np.array_equal(preprocess(Image.fromarray(change(picture)))[..., 0], picture)


def test_size_normalised_and_centred_like_mnist():
    for kind in KINDS:
        for sample in samples(kind, PICTURES, DIGITS, 3):
            pixels = preprocess(open_image(io.BytesIO(sample.upload)))
            assert pixels.shape == IMAGE_SHAPE and pixels.dtype == np.float32
            assert pixels.min() == 0 and pixels.max() == pytest.approx(255)
            rows, columns = np.nonzero(pixels[..., 0] > 20)
            assert 15 <= max(np.ptp(rows), np.ptp(columns)) + 1 <= 20, kind.__name__
            y, x = (np.average(axis, weights=pixels[..., 0]) for axis in np.indices((28, 28)))
            assert abs(y - 14) < 4.6 and abs(x - 14) < 4.6  # The whole 20x20 stays inside.


NOISE = np.random.default_rng(0).normal(230, 4, (300, 300))
BLANK = {
    "white": lambda: Image.new("L", (200, 200), 255),
    "black 28x28": lambda: Image.new("L", (28, 28)),
    "one pixel": lambda: Image.new("RGB", (1, 1)),
    "one row": lambda: Image.new("L", (500, 1), 9),
    "transparent": lambda: Image.new("RGBA", (100, 100)),
    "noise": lambda: Image.fromarray(np.uint8(NOISE)),
    "slope": lambda: Image.fromarray(np.uint8(np.mgrid[0:255:300j, 0:1:300j][0])),
    "specks": lambda: Image.fromarray(
        np.where(np.random.default_rng(1).random((300, 300)) < 0.01, 0, 255).astype("u1")
    ),
    "no number": lambda: Image.fromarray(np.full((50, 50), np.nan, np.float32)),
}


@pytest.mark.parametrize("page", BLANK)
def test_a_blank_page_shows_no_digit(page):
    with pytest.raises(NoDigitError, match=r"^(no digit|the picture) [a-z ,:]+$"):
        preprocess(BLANK[page]())


def bomb() -> bytes:
    """Return a PNG of 60 bytes or so whose header promises 3600 million pixels."""
    upload = bytearray(encoded(Image.new("1", (8, 8))))
    upload[16:24] = struct.pack(">II", 60000, 60000)
    upload[29:33] = struct.pack(">I", zlib.crc32(upload[12:29]))
    return bytes(upload)


UNREADABLE = {
    "nothing": lambda: b"",
    "text": lambda: b"hello, world",
    "cut off": lambda: encoded(COLOUR)[:500],
    "cut off JPEG": lambda: encoded(COLOUR, "JPEG")[:600],
    "bomb": bomb,
    "PNG, wrong checksum of the header": lambda: with_wrong_checksum(b"IHDR"),
    "PDF": lambda: b"%PDF-1.7\n",
    "SVG": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "EPS, which would start a program": lambda: encoded(COLOUR, "EPS"),
}


@pytest.mark.parametrize("upload", UNREADABLE)
def test_an_unreadable_file_is_refused_with_a_sentence(upload):
    with pytest.raises(ImageError, match=r"^the (file|picture) ") as refused:
        open_image(io.BytesIO(UNREADABLE[upload]()))
    assert not isinstance(refused.value, NoDigitError)


def test_a_bomb_is_refused_before_it_is_decoded():
    with pytest.raises(ImageError, match="more than 52 million pixels"):
        open_image(io.BytesIO(bomb()))


def test_a_webp_is_held_to_fewer_pixels(monkeypatch):
    monkeypatch.setattr(picture_file, "MAX_PIXELS_WEBP", COLOUR.width * COLOUR.height - 1)
    with pytest.raises(ImageError, match="more than 0 million pixels"):
        open_image(io.BytesIO(encoded(COLOUR, "WEBP")))
    assert alike(open_image(io.BytesIO(encoded(COLOUR, "PNG"))))


def with_wrong_checksum(name: bytes) -> bytes:
    """Return a PNG with a comment whose checksum, or that of its header, is wrong."""
    png = encoded(COLOUR)
    png = bytearray(png[:33] + png_chunk(b"tEXt", b"Comment\0a digit") + png[33:])
    png[png.index(name) + 4 + (13 if name == b"IHDR" else 15)] ^= 1
    return bytes(png)


COMPRESSED_TEXT = PngImagePlugin.PngInfo()
COMPRESSED_TEXT.add_text("Comment", "digits " * 500_000, zip=True)
READABLE = {
    "PNG, large text": lambda: encoded(COLOUR, pnginfo=COMPRESSED_TEXT),
    "PNG, large colour profile": lambda: encoded(COLOUR, icc_profile=bytes(3_000_000)),
    "PNG, wrong checksum of a comment": lambda: with_wrong_checksum(b"tEXt"),
    "JPEG without its last 2 bytes": lambda: encoded(COLOUR, "JPEG")[:-2],
    "JPEG without its last 20 bytes": lambda: encoded(COLOUR, "JPEG")[:-20],
    "JPEG, progressive, without its last fifth": lambda: cut_off(encoded(COLOUR, "JPEG", progressive=True), 0.8),
    "JPEG before another picture": lambda: encoded(COLOUR, "JPEG") + encoded(Image.new("L", (9, 9)), "JPEG"),
    "JPEG before a film": lambda: encoded(COLOUR, "JPEG") + b"film" * 50_000,
    "TIFF of JPEG": lambda: encoded(COLOUR, "TIFF", compression="jpeg"),
}


def cut_off(upload: bytes, share: float) -> bytes:
    return upload[: int(len(upload) * share)]


@pytest.mark.parametrize("upload", READABLE)
def test_what_every_viewer_opens_is_read(upload):
    assert alike(open_image(io.BytesIO(READABLE[upload]())))


def test_a_jpeg_is_read_as_far_as_it_goes():
    whole = np.asarray(open_image(io.BytesIO(encoded(GRAY, "JPEG"))))
    part = np.asarray(open_image(io.BytesIO(cut_off(encoded(GRAY, "JPEG"), 0.8))))
    assert 90 < part.shape[0] < 180 and np.array_equal(part, whole[: part.shape[0]])


@pytest.mark.parametrize("share", [12, 7, 4, 2])
def test_a_digit_of_any_size_on_squared_paper(share):
    """In the half size in which a large picture is looked at first, a small digit is nothing beside the squares."""
    rng = np.random.default_rng(1)
    width, height = 1600, 1200
    page = ruled(rng, width, height, (245, 245, 240), (170, 190, 225), 72, squared=True, thickness=4)
    ink = placed(rng, traced(PICTURES[0], width // share), width, height, 40)
    photo = noisy(rng, lit(rng, painted(ink, page, (30, 30, 90)), 0.6), 5)
    seen = preprocess(open_image(io.BytesIO(encoded(photo, "JPEG"))))
    assert np.corrcoef(seen.ravel(), PICTURES[0].ravel())[0, 1] > 0.9


def test_a_tight_crop_shows_a_digit():
    uploads = [sample.upload for sample in samples(tight_crop, PICTURES, DIGITS, 100)]
    assert all(preprocess(open_image(io.BytesIO(upload))).any() for upload in uploads)


def test_a_small_tight_crop_shows_a_digit():
    """In so few pixels, most steps of brightness are edges: a thirtieth may be refused, as noise."""
    refused = 0
    for index, picture in enumerate(PICTURES[:300]):
        crop = painted(np.pad(traced(picture, 18 + index % 12), index % 4), (250,) * 3, (30,) * 3)
        try:
            preprocess(open_image(io.BytesIO(encoded(255 - crop if index % 2 else crop))))
        except NoDigitError:
            refused += 1
    assert refused <= 10


def test_a_missing_file_is_not_a_broken_picture(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_image(tmp_path / "none.png")
