"""Broken uploads get a digit or a sentence, from preprocessing and from the Flask server.

By default some hundreds; BROKEN_COUNT=100000 is the full run.
"""

import io
import os
import resource
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from PIL import Image
from server import create_app
from wild_digits import KINDS, encoded, painted, placed, samples, test_digits, traced

from mnist_preprocess import IMAGE_SHAPE, ImageError, open_image, preprocess

pillow_heif.register_heif_opener()
COUNT = int(os.environ.get("BROKEN_COUNT", "1500"))
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "HEIF", "AVIF", "PPM", "ICO")


def whole_uploads() -> list[bytes]:
    """Return one upload of every kind, and one page in every format, animated where the format can be."""
    pictures, digits = test_digits()
    uploads = [samples(kind, pictures, digits, 1)[0].upload for kind in KINDS]
    page = Image.fromarray(np.uint8(painted(placed(np.random.default_rng(0), traced(pictures[0], 60), 100, 90))))
    uploads += [encoded(page, kind) for kind in FORMATS]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        uploads.append(encoded(page, kind, save_all=True, append_images=[page.rotate(90), page.rotate(180)]))
    uploads += [encoded(page, "TIFF", compression=name) for name in ("tiff_lzw", "tiff_deflate", "packbits")]
    uploads += [encoded(page.convert("CMYK"), "TIFF"), encoded(page.quantize(4), "BMP"), encoded(page.convert("1"))]
    return uploads


def truncated(rng, upload, _other):
    return upload[: rng.integers(len(upload) + 1)]


def flipped(rng, upload, _other):
    """Some bits are wrong; half of the time near the start, where the headers are."""
    broken = bytearray(upload)
    end = len(broken) if rng.random() < 0.5 else min(len(broken), 120)
    for place in rng.integers(end, size=rng.integers(1, 12)):
        broken[place] ^= 1 << rng.integers(8)
    return bytes(broken)


def spliced(rng, upload, other):
    return upload[: rng.integers(len(upload) + 1)] + other[rng.integers(len(other) + 1) :]


def repeated(rng, upload, _other):
    start, end = sorted(rng.integers(len(upload) + 1, size=2))
    return upload[:end] + upload[start:]


def prefixed(rng, upload, _other):
    return rng.bytes(rng.integers(1, 64)) + upload


def huge(rng, upload, _other):
    """A PNG whose header promises other dimensions, its checksum right."""
    broken = bytearray(encoded(Image.new("L", (8, 8))))
    sides = [int(2 ** rng.uniform(0, 31)) if rng.random() < 0.9 else 0 for _ in range(2)]
    if 20_000_000 < sides[0] * sides[1] < 52_000_000:  # Allowed, and slow.
        sides = [65535, 65535]
    broken[16:24] = struct.pack(">II", *sides)
    broken[29:33] = struct.pack(">I", zlib.crc32(broken[12:29]))
    return bytes(broken)


def random_bytes(rng, _upload, _other):
    return rng.bytes(rng.integers(0, 400))


MUTATIONS = (truncated, flipped, flipped, flipped, spliced, repeated, prefixed, huge, random_bytes)


def mutated(seed: int, count: int):
    """Yield `count` broken uploads, always the same ones for a seed."""
    rng = np.random.default_rng(seed)
    uploads = whole_uploads()
    for _ in range(count):
        upload, other = (uploads[index] for index in rng.integers(len(uploads), size=2))
        yield MUTATIONS[rng.integers(len(MUTATIONS))](rng, upload, other)


@pytest.fixture(autouse=True)
def pillow_may_warn():
    """Pillow's remarks on broken files are for its log; only its warning of bombs is an error, as in the project."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def resident() -> int:
    """Return how much memory this process holds now, in bytes; 0 where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else 0


def test_broken_pictures_give_a_digit_or_a_sentence():
    answered = refused = halfway = 0
    for number, upload in enumerate(mutated(0, COUNT)):
        try:
            pixels = preprocess(open_image(io.BytesIO(upload)))
        except ImageError as error:
            refused += 1
            assert str(error).startswith(("the file ", "the picture ", "no digit ", "a picture ", "a BMP ", "a TIFF "))
        else:
            answered += 1
            assert (
                pixels.shape == IMAGE_SHAPE and np.isfinite(pixels).all() and 0 <= pixels.min() <= pixels.max() <= 256
            )
        if number == COUNT // 2:
            halfway = resident()
    assert answered > COUNT / 20 and refused > COUNT / 20
    assert resident() - halfway < 64 * 2**20


class Sevens:
    """An engine that sees a 7 in everything."""

    def begin(self):
        pass

    def predict(self, batch):
        return np.tile(np.eye(10, dtype=np.float32)[7], (len(batch), 1)), "1"


def test_the_server_answers_every_broken_upload():
    client = create_app(Sevens()).test_client()
    seen = set()
    names = ("digit.png", "digit.jpg", "digit", "../../etc/passwd", "digit.svg", "")
    for number, upload in enumerate(mutated(1, COUNT // 3)):
        form = {"image": (io.BytesIO(upload), names[number % len(names)])}
        answer = client.post("/mnist_infer", data=form, content_type="multipart/form-data")
        seen.add(answer.status_code)
        if answer.status_code == 200:
            assert answer.json == {"Prediction": "7"}
        else:
            assert (
                answer.status_code in (400, 422) and list(answer.json) == ["Error"] and len(answer.json["Error"]) > 10
            )
    assert {200, 400} <= seen
