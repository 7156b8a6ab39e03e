"""Read what people upload: which files and how many pixels, and any mode of Pillow as 8-bit gray or RGB.

What a decoder does not need, and what would make it slow or large, is taken out of a file before a decoder sees it.
"""

import io
import re
import struct
import warnings
import zlib

import numpy as np
from PIL import Image, ImageFilter

# What people upload. A decoder that nobody needs is only a way in for broken files.
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "HEIC", "AVIF")
# With these, a picture takes at most 2 seconds and 400 MB: WebP needs 16 bytes a pixel; HEIC, AVIF, progressive JPEG
# 8; others 4. Photos of 12 to 24 million pixels are usual; a picture of one row would be converted in one piece.
MAX_PIXELS = 52_000_000
MAX_PIXELS_COSTLY = 25_000_000
MAX_PIXELS_WEBP = 20_000_000
MAX_SIDE = 30_000
MAX_PARTS = 1000  # Segments, chunks or blocks before the pixels; photos have 10, a colour profile of 20 MB 320.
MAX_SCANS = 32  # Of a progressive JPEG; 10 are usual.
MAX_METADATA = 65536  # Bytes of EXIF or XMP; JPEG does not allow more.
MAX_NUMBERS = 100_000  # In a TIFF's directory: two for each strip, which is a row at least.
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


def decoded(data: bytes) -> Image.Image:
    """Return the picture in a file; of an animation, its first frame.

    Large JPEGs are decoded at a reduced scale, and as far as they go. Raises ImageError when it cannot be read, or has
    more pixels or parts than pictures have.
    """
    try:
        kind, data = for_decoder(data)
        if kind == "HEIF":
            import pillow_heif  # Here, because few uploads need it.

            pillow_heif.register_heif_opener(thumbnails=False)
        cut_off = kind == "JPEG" and not data.endswith(JPEG_END)
        image = Image.open(io.BytesIO(data + JPEG_END if cut_off else data), formats=[kind])
        costly = kind in ("HEIF", "AVIF") or "progressive" in image.info
        most = MAX_PIXELS_WEBP if kind == "WEBP" else MAX_PIXELS_COSTLY if costly else MAX_PIXELS
        if image.width * image.height > most:
            raise ImageError(f"the picture has more than {most // 1_000_000} million pixels")
        if max(image.size) > MAX_SIDE:
            raise ImageError(f"the picture has more than {MAX_SIDE} pixels along a side")
        scale = 0.625 * WORK_SIDE / max(image.size)  # draft() halves as often as both sides stay at least this large.
        image.draft(None, (int(image.width * scale), int(image.height * scale)))
        image.load()
        return decoded_part(image) if cut_off else image
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"the picture has more than {MAX_PIXELS // 1_000_000} million pixels") from error
    except BROKEN_FILE as error:
        raise ImageError("the picture is damaged: it cannot be decoded") from error


def for_decoder(data: bytes) -> tuple[str, bytes]:
    """Return Pillow's name of a file's format, and the file without what its decoder does not need.

    Raises ImageError when it is none of FORMATS, or has more in it than any picture has.
    """
    if not data:
        raise ImageError("the file is empty: send a picture")
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG", essential_png(data)
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG", essential_jpeg(data)
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF", essential_gif(data)
    if data.startswith((b"II*\0", b"MM\0*")):
        check_tiff(data)
        return "TIFF", data
    if data.startswith(b"BM"):
        if data[14:15] != b"\x0c" and data[30:31] in (b"\1", b"\2"):  # A header of 12 bytes has no compression.
            raise ImageError("a BMP of run lengths is not read: save it as PNG")
        return "BMP", data
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP", data
    if data[4:8] == b"ftyp":
        return "AVIF" if data[8:12] in (b"avif", b"avis") else "HEIF", data
    raise ImageError(f"the file is not a picture in one of the formats {', '.join(FORMATS)}")


def essential_png(data: bytes) -> bytes:
    """Return a PNG's pixels, palette, transparency and orientation; a wrong checksum counts in critical chunks only."""
    before, pixels, place = [data[:8]], [], 8
    for _ in range(20 * MAX_PARTS):
        length, kind = struct.unpack_from(">I4s", data, place)
        start, place = place, place + 12 + length
        if kind in (b"IHDR", b"PLTE"):
            before.append(data[start:place])
        elif kind == b"IDAT":
            pixels.append(data[start + 8 : place - 4])
        elif kind in (b"tRNS", b"eXIf") or data.startswith(ORIENTATION_TEXTS, start + 4):
            if length <= MAX_METADATA and len(before) < 8:
                before.append(png_chunk(kind, data[start + 8 : place - 4]))
        elif kind == b"IEND" or place > len(data):
            break
        if place > len(data) - 12:
            break
    else:
        raise ImageError(f"the picture has more than {20 * MAX_PARTS} chunks")
    return b"".join([*before, png_chunk(b"IDAT", b"".join(pixels)), png_chunk(b"IEND", b"")])


ORIENTATION_TEXTS = (b"iTXtXML:com.adobe.xmp\0\0", b"zTXtRaw profile type exif")


def png_chunk(kind: bytes, body: bytes) -> bytes:
    """Return a chunk of a PNG with its length and checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(body, zlib.crc32(kind)))


def essential_jpeg(data: bytes) -> bytes:
    """Return a JPEG's first picture with its tables and orientation, up to its end if it has one."""
    kept, place, metadata, components = [b"\xff\xd8"], 2, set(), 0
    for _ in range(MAX_PARTS):
        marker = NO_FILL_BYTE.search(data, place)
        kind, place = (marker[0][0], marker.end()) if marker else (0xD9, place)
        if kind == 0xD9:
            raise ImageError("the picture is damaged: it cannot be decoded")
        if kind < 0xC0 or 0xD0 <= kind <= 0xD8:
            continue
        end = place + int.from_bytes(data[place : place + 2], "big")
        if kind in (0xC0, 0xC1):
            components = data[place + 7]
        if kind == 0xDA:
            # Where the first scan has all of the components, and is not progressive, libjpeg decodes no other. So it is
            # in photos, whose 2 MB are not read through for that: it takes a sixth of the time of decoding them.
            several = data[place + 2] != components
            if several and data.count(b"\xff\xda", place, data.find(JPEG_END, end)) >= MAX_SCANS:
                raise ImageError(f"the picture has more than {MAX_SCANS} scans")
            last = data.rfind(JPEG_END, end)
            return b"".join([*kept, b"\xff\xda", memoryview(data)[place : last + 2 if last >= 0 else len(data)]])
        about = data[place + 2 : place + 6] if 0xE0 <= kind <= 0xEF or kind == 0xFE else None
        if about is None or (about in (b"JFIF", b"Exif", b"Adob", b"http") and about not in metadata):
            metadata.add(about)
            kept.append(bytes((0xFF, kind)) + data[place:end])
        place = end
    raise ImageError(f"the picture has more than {MAX_PARTS} segments")


NO_FILL_BYTE = re.compile(rb"[^\xff]")
JPEG_END = b"\xff\xd9"


def decoded_part(image: Image.Image) -> Image.Image:
    """Return a JPEG that was cut off down to its last whole row of blocks; what is missing is decoded as gray."""
    last_column = np.asarray(image.convert("RGB").crop((image.width - 1, 0, *image.size)), np.int16)[:, 0]
    known = np.flatnonzero(np.abs(last_column - 128).max(axis=1) > 1)
    if not known.size or known[-1] == image.height - 1:
        return image
    return image.crop((0, 0, image.width, max(1, int(known[-1]))))  # The last row is mixed with gray where colours are.


def essential_gif(data: bytes) -> bytes:
    """Return a GIF without what stands before its first picture, but for the block that tells the transparency."""
    place = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    before, control, blocks = data[:place], b"", 0
    while data[place] == 0x21:
        if data[place + 1] == 0xF9:
            control = data[place : place + 8]
        place += 2
        while data[place] and blocks < 100 * MAX_PARTS:  # Blocks have at most 255 bytes.
            place, blocks = place + data[place] + 1, blocks + 1
        place, blocks = place + 1, blocks + 1
        if blocks >= 100 * MAX_PARTS:
            raise ImageError(f"the picture has more than {100 * MAX_PARTS} blocks before its pixels")
    return before + control + data[place:]


def check_tiff(data: bytes) -> None:
    """Refuse a TIFF whose first directory is larger than a picture needs, or that asks for an unusual decoder."""
    order = "<" if data.startswith(b"II") else ">"
    (place,) = struct.unpack_from(order + "I", data, 4)
    (count,) = struct.unpack_from(order + "H", data, place)
    numbers, tile = 0, 1
    for entry in range(place + 2, place + 2 + 12 * count, 12):
        tag, kind, length = struct.unpack_from(order + "HHI", data, entry)
        (value,) = struct.unpack_from(order + ("H2x" if kind == 3 else "I"), data, entry + 8)
        numbers += length if kind not in (1, 2, 7) else 0  # Bytes are read as they are.
        tile *= value if tag in (322, 323) else 1
        is_jpeg = value == 7 and data.count(b"\xff\xda") <= MAX_SCANS
        if tag == 259 and value not in TIFF_COMPRESSIONS and not is_jpeg:
            raise ImageError("a TIFF of this compression is not read: save it as PNG")
    if count > MAX_PARTS or numbers > MAX_NUMBERS or tile > MAX_TILE:
        raise ImageError("the picture has a larger directory, or larger tiles, than pictures have")


# None, the fax machine's, LZW, Deflate and PackBits.
TIFF_COMPRESSIONS = (1, 2, 3, 4, 5, 8, 32773, 32946)
MAX_TILE = 4096**2  # Pixels; 256 x 256 are usual.


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
    is_gray = all(np.array_equal(pixels[..., 0], pixels[..., channel]) for channel in range(1, pixels.shape[2]))
    return np.ascontiguousarray(pixels[..., :1]) if is_gray else pixels


# What undoes the orientation in EXIF tag 274, by its value; 1 is upright.
TURNED_BACK = dict(zip(range(2, 9), (Image.Transpose(method) for method in (0, 3, 1, 5, 4, 6, 2)), strict=True))


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 when there is none that can be read."""
    if not any(name in image.info for name in ("exif", "xmp", "Raw profile type exif", "XML:com.adobe.xmp")):
        return 1  # getexif() would take longer than everything else that a 28x28 picture needs.
    if len(image.info.get("exif") or b"") > MAX_METADATA:
        return 1
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
    # In strips, because what plain() makes of a large picture may be four times as large.
    lines = max(1, 4_000_000 // (image.width * factor))
    rows = factor * lines
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
        whole.paste(strip, (0, lines * index))
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
