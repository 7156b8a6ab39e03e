"""No upload costs a worker more than 2 seconds and 400 MB: what is cheap to send and dear to read is refused first.

Each upload is read in a process of its own, which says how much it used. The limits are of processor time and memory,
not of the clock.
"""

import json
import struct
import subprocess
import sys
import zlib

import numpy as np
import pillow_heif
import pytest
from PIL import Image
from wild_digits import encoded

from mnist_preprocess import ROOT
from picture_file import MAX_PIXELS, MAX_PIXELS_COSTLY, MAX_PIXELS_WEBP, png_chunk

pillow_heif.register_heif_opener()
UPLOAD = 20 * 2**20  # About what the server accepts.
SECONDS, MEGABYTES = 2, 400
READ = """
import io, json, sys, time
from pathlib import Path
from mnist_preprocess import ImageError, open_image, preprocess

def most_memory():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024

preprocess(open_image("images/wild_digits.png"))  # Loads what every worker has loaded.
Path("/proc/self/clear_refs").write_text("5")  # Forgets what the most memory was until now: see man proc.
before, start = most_memory(), time.process_time()
upload, said = sys.stdin.buffer.read(), "read"
try:
    preprocess(open_image(io.BytesIO(upload)))
except ImageError as error:
    said = str(error)
print(json.dumps([said, time.process_time() - start, most_memory() - before]))
"""
PIXELS = Image.fromarray(np.uint8(np.indices((90, 100)).sum(axis=0)))


def scans(progressive: bool) -> bytes:
    """A JPEG whose last scan comes up to 10 000 times."""
    jpeg = encoded(Image.new("L", (5000, 3900), 200), "JPEG", progressive=progressive)
    last = jpeg.rindex(b"\xff\xda")
    return jpeg[:-2] + jpeg[last:-2] * min(10_000, UPLOAD // (len(jpeg) - last)) + jpeg[-2:]


def separate_colours(size, times: int) -> bytes:
    """A JPEG with a scan for each colour, as often as that, which libjpeg decodes in memory before it shows any."""
    gray = encoded(Image.new("L", size, 200), "JPEG")
    frame, scan = gray.index(b"\xff\xc0"), gray.index(b"\xff\xda")
    colours = b"".join(bytes((colour, 0x11, 0)) for colour in (1, 2, 3))
    head = gray[:frame] + struct.pack(">HHBHHB", 0xFFC0, 17, 8, *size[::-1], 3) + colours + gray[frame + 13 : scan]
    every = [gray[scan : scan + 5] + bytes((colour,)) + gray[scan + 6 : -2] for colour in (1, 2, 3)]
    return head + b"".join(every * times) + gray[-2:]


def fill_bytes() -> bytes:
    jpeg = encoded(PIXELS, "JPEG")
    return jpeg[:2] + b"\xff" * UPLOAD + jpeg[2:]


def segments(segment: bytes) -> bytes:
    jpeg = encoded(PIXELS, "JPEG")
    return jpeg[:2] + segment * (UPLOAD // len(segment)) + jpeg[2:]


def exif_array() -> bytes:
    """EXIF whose orientation is an array of as many numbers as there are bytes."""
    return b"Exif\0\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 274, 6, UPLOAD, 26) + b"\0\0\0\0" + bytes(UPLOAD)


def png(*chunks: bytes, pixels: Image.Image = PIXELS) -> bytes:
    whole = encoded(pixels)
    return whole[:33] + b"".join(chunks) + whole[33:]


def profiles() -> bytes:
    profile = png_chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(2**20 - 1)))
    return png(profile * (UPLOAD // len(profile)))


def empty_chunks() -> bytes:
    return png(png_chunk(b"IDAT", b"") * (UPLOAD // 12))


def tiff(*entries, size=UPLOAD) -> bytes:
    """A little TIFF whose directory has those entries (tag, type, count, value) as well."""
    common = [(256, 4, 1, 7000), (257, 4, 1, 7000), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1)]
    every = {entry[0]: entry for entry in [*common, *entries]}
    packed = b"".join(struct.pack("<HHII", *every[tag]) for tag in sorted(every))
    return (b"II*\0\x08\0\0\0" + struct.pack("<H", len(every)) + packed).ljust(size, b"\0")


def strips() -> bytes:
    count = UPLOAD // 8 - 100
    return tiff((273, 4, count, 400), (278, 4, 1, 1), (279, 4, count, 400 + 4 * count))


def one_tile() -> bytes:
    return tiff((256, 4, 1, 64), (257, 4, 1, 64), (259, 3, 1, 8), (322, 4, 1, 46336), (323, 4, 1, 46336),
                (324, 4, 1, 400), (325, 4, 1, 2**20), size=2**21)  # fmt: skip


def gif_comments(block: bytes) -> bytes:
    gif = encoded(PIXELS, "GIF")
    place = gif.index(b",", 13 + 3 * 256)
    return gif[:place] + block * (UPLOAD // len(block)) + gif[place:]


def run_lengths() -> bytes:
    bmp = bytearray(encoded(PIXELS.quantize(4), "BMP"))
    struct.pack_into("<ii", bmp, 18, 7000, 7000)
    struct.pack_into("<I", bmp, 30, 2)
    return bytes(bmp) + b"\0\1" * 2**20


def comments_ppm() -> bytes:
    return b"P6\n" + b"#\n" * (UPLOAD // 2) + b"1 1\n100\n\0\0\0"


def webp_exif() -> bytes:
    return encoded(PIXELS, "WEBP", exif=exif_array()[: UPLOAD - 1000])


def blank(mode: str, width: int, height: int, kind: str, **options):
    return lambda: encoded(Image.new(mode, (width, height), 255 if len(mode) == 1 else None), kind, **options)


ROW = MAX_PIXELS
SQUARE, COSTLY, WEBP = (int(pixels**0.5) for pixels in (MAX_PIXELS, MAX_PIXELS_COSTLY, MAX_PIXELS_WEBP))
UPLOADS = {
    "JPEG of scans": lambda: scans(progressive=False),
    "JPEG of progressive scans": lambda: scans(progressive=True),
    "JPEG of a scan a colour": lambda: separate_colours((SQUARE, SQUARE), times=10),
    "JPEG of many scans a colour": lambda: separate_colours((5000, 3900), times=40),
    "JPEG of fill bytes": fill_bytes,
    "JPEG of markers": lambda: segments(b"\xff\xe2\0\2"),
    "JPEG of profiles": lambda: segments(b"\xff\xe2\xff\xff" + b"ICC_PROFILE\0\1\1".ljust(65533)),
    "JPEG of EXIF": lambda: segments(b"\xff\xe1\xff\xff" + exif_array()[:65533]),
    "PNG of profiles": profiles,
    "PNG of empty chunks": empty_chunks,
    "PNG of EXIF": lambda: png(png_chunk(b"eXIf", exif_array()[6:])),
    "PNG of one row": blank("RGBA", ROW, 1, "PNG"),
    "PNG of a column": blank("RGBA", 1, ROW, "PNG"),
    "PNG of 30 000 columns": blank("RGBA", 30_000, ROW // 30_000, "PNG"),
    "PNG, large": blank("RGBA", SQUARE, SQUARE, "PNG"),
    "TIFF of strips": strips,
    "TIFF of one tile": one_tile,
    "TIFF of floats": blank("F", SQUARE, SQUARE, "TIFF", compression="tiff_deflate"),
    "GIF of comments": lambda: gif_comments(b"!\xfe" + (b"\xff" + b"c" * 255) * 1000 + b"\0"),
    "GIF of empty comments": lambda: gif_comments(b"!\xfe\0"),
    "BMP of run lengths": run_lengths,
    "PPM of comments": comments_ppm,
    "WebP of EXIF": webp_exif,
    "WebP, large": blank("RGBA", WEBP, WEBP, "WEBP", lossless=True, method=0),
    "AVIF, large": blank("RGB", COSTLY, COSTLY, "AVIF", speed=10),
    "HEIC, large": blank("RGB", COSTLY, COSTLY, "HEIF"),
    "JPEG, large and progressive": blank("RGB", COSTLY, COSTLY, "JPEG", progressive=True, subsampling=0),
    "JPEG, large": blank("RGB", SQUARE, SQUARE, "JPEG", subsampling=0),
}  # fmt: skip


@pytest.mark.parametrize("kind", UPLOADS)
def test_an_upload_costs_little(kind):
    upload = UPLOADS[kind]()
    child = subprocess.run([sys.executable, "-c", READ], input=upload, capture_output=True, cwd=ROOT, check=True)
    said, seconds, megabytes = json.loads(child.stdout)
    assert seconds < SECONDS and megabytes < MEGABYTES, f"{said}: {seconds:.1f} s, {megabytes:.0f} MB"
    assert said == "read" or said.startswith(("the ", "a ", "no digit "))
    print(f"{kind}: {len(upload) / 2**20:.1f} MiB, {seconds:.2f} s, {megabytes:.0f} MB: {said}")
