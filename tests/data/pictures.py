"""Images as files, good ones and bad ones, that several tests read."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image

from lepton_jax.data.prepare.steps.decoding import TURNS

SIZE = (8, 12)  # height and width of the results below
RED, GREEN, BLUE, WHITE = (200, 0, 0), (0, 200, 0), (0, 0, 200), (255, 255, 255)


def quarters(mode: str = "RGB", scale: int = 4) -> Image.Image:
    """Return an image of four colours: red, green / blue, white."""
    height, width = scale * SIZE[0], scale * SIZE[1]
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = RED
    pixels[: height // 2, width // 2 :] = GREEN
    pixels[height // 2 :, : width // 2] = BLUE
    pixels[height // 2 :, width // 2 :] = WHITE
    return Image.fromarray(pixels).convert(mode)


def saved(image: Image.Image, kind: str, **settings) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def turned(orientation: int) -> bytes:
    """Return a JPEG that is upright only when its EXIF orientation is heeded."""
    back = {5: 5, 6: 8, 7: 7, 8: 6}.get(orientation, orientation)
    image = quarters()
    if back in TURNS:
        image = image.transpose(getattr(Image.Transpose, TURNS[back]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(image, "JPEG", exif=exif, quality=95, subsampling=0)


def chunk(kind: bytes, data: bytes) -> bytes:
    check = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)


def png_of(width: int, height: int, bits: int = 8, color: int = 2) -> bytes:
    """Return a PNG that says to have some size, with a few bytes of pixels."""
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


def grey_16() -> bytes:
    values = np.full((8, 12), 0x8012, np.uint16)
    return saved(Image.fromarray(values), "PNG")


def animation(kind: str) -> bytes:
    frames = [quarters(), Image.new("RGB", quarters().size, BLUE)]
    return saved(
        frames[0], kind, save_all=True, append_images=frames[1:], duration=50, loop=0
    )


def palette_with_transparency() -> bytes:
    image = quarters().convert("P", palette=Image.Palette.ADAPTIVE, colors=4)
    index = image.getpixel((0, 0))
    return saved(image, "PNG", transparency=index)


def half_transparent() -> bytes:
    image = quarters("RGBA")
    image.putalpha(Image.new("L", image.size, 0))
    return saved(image, "PNG")


JPEG = saved(quarters(), "JPEG", quality=95, subsampling=0)
PNG = saved(quarters(), "PNG")
ANY_QUARTERS = (RED, GREEN, BLUE, WHITE)
GREY = tuple((value,) * 3 for value in (60, 117, 23, 255))

# Images that give the right pixels: the colours of the four quarters, and the remark.
RIGHT = {
    "a JPEG": (JPEG, ANY_QUARTERS, None),
    "a progressive JPEG": (
        saved(quarters(), "JPEG", progressive=True, quality=95, subsampling=0),
        ANY_QUARTERS,
        None,
    ),
    "a PNG": (PNG, ANY_QUARTERS, None),
    "a PNG of a palette": (
        saved(quarters().convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
        ANY_QUARTERS,
        None,
    ),
    "a WebP": (saved(quarters(), "WEBP", lossless=True), ANY_QUARTERS, None),
    "a BMP": (saved(quarters(), "BMP"), ANY_QUARTERS, None),
    "a GIF": (saved(quarters(), "GIF"), ANY_QUARTERS, None),
    "a TIFF": (saved(quarters(), "TIFF"), ANY_QUARTERS, None),
    "a grey JPEG": (saved(quarters("L"), "JPEG", quality=95), GREY, None),
    "a CMYK JPEG": (
        saved(quarters("CMYK"), "JPEG", quality=95, subsampling=0),
        ANY_QUARTERS,
        "CMYK to RGB",
    ),
    "a bilevel PNG": (
        saved(Image.new("1", (3, 3), 1), "PNG"),
        (WHITE,) * 4,
        None,
    ),
    "a grey PNG of 16 bits": (grey_16(), ((0x80,) * 3,) * 4, "16 bits to 8"),
    "a palette with a transparent colour": (
        palette_with_transparency(),
        (WHITE, GREEN, BLUE, WHITE),
        "transparency on a background",
    ),
    "a transparent PNG": (
        half_transparent(),
        (WHITE,) * 4,
        "transparency on a background",
    ),
    "an opaque PNG with an alpha channel": (
        saved(quarters("RGBA"), "PNG"),
        ANY_QUARTERS,
        None,
    ),
    "an animated GIF": (animation("GIF"), ANY_QUARTERS, "first of several frames"),
    "an animated WebP": (
        animation("WEBP"),
        ANY_QUARTERS,
        "first of several frames",
    ),
    "an animated PNG": (animation("PNG"), ANY_QUARTERS, "first of several frames"),
    "a single pixel": (
        saved(Image.new("RGB", (1, 1), GREEN), "PNG"),
        (GREEN,) * 4,
        None,
    ),
    "a line of 1 x 5000 pixels": (
        saved(Image.new("RGB", (1, 5000), BLUE), "PNG"),
        (BLUE,) * 4,
        None,
    ),
    "a line of 5000 x 1 pixels": (
        saved(Image.new("RGB", (5000, 1), BLUE), "PNG"),
        (BLUE,) * 4,
        None,
    ),
    "a damaged colour profile": (
        saved(quarters(), "JPEG", icc_profile=b"no profile", quality=95, subsampling=0),
        ANY_QUARTERS,
        None,
    ),
    "damaged EXIF": (
        saved(quarters(), "JPEG", exif=b"Exif\0\0garbage", quality=95, subsampling=0),
        ANY_QUARTERS,
        None,
    ),
    "bytes after the end": (JPEG + b"trailing bytes" * 100, ANY_QUARTERS, None),
} | {
    f"EXIF orientation {number}": (
        turned(number),
        ANY_QUARTERS,
        "turned upright" if number > 1 else None,
    )
    for number in range(1, 9)
}

# Files that are refused, with words of the reason.
WRONG = {
    "no bytes": (b"", "the file is empty"),
    "a JPEG cut off in the middle": (JPEG[: len(JPEG) // 2], "cut off"),
    "a JPEG cut off in its header": (JPEG[:30], "cut off"),
    "a PNG cut off in the middle": (PNG[: len(PNG) // 2], "cut off"),
    "a GIF cut off": (saved(quarters(), "GIF")[:60], "cut off"),
    "a WebP cut off": (saved(quarters(), "WEBP")[:60], "damaged"),
    "a BMP cut off": (saved(quarters(), "BMP")[:200], "cut off"),
    "a PNG with a wrong checksum": (
        PNG.replace(PNG[37:45], b"\0" * 8, 1),
        "damaged",
    ),
    "text": (b"<html>404 not found</html>", "text, not an image"),
    "bytes that are no image": (bytes(range(256)) * 4, "not an image"),
    "zeros": (b"\0" * 1000, "not an image"),
    "a PNG of four billion pixels": (png_of(65_000, 65_000), "more than"),
    "a PNG without width": (png_of(0, 10), "damaged"),
    "EPS": (saved(quarters(), "EPS"), "not an image"),
    "floats": (saved(Image.new("F", (4, 4), 0.5), "TIFF"), "kind 'F'"),
    "whole numbers of 32 bits": (
        saved(Image.new("I", (4, 4), 2**20), "TIFF"),
        "32 bits",
    ),
    "Lab": (saved(Image.new("LAB", (4, 4)), "TIFF"), "kind 'LAB'"),
}
