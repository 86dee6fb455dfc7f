"""Arrays as PNG pictures, with nothing but the standard library.

PNG, W3C Recommendation (2003): a signature, then chunks of length, type, content and
checksum. Each line of pixels begins with the number of its filter, here 0: none.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib

import numpy as np

SIGNATURE = b"\x89PNG\r\n\x1a\n"
COLOUR_TYPES = {1: 0, 3: 2}  # by channels: grey, and red, green and blue
BYTE = 255  # largest value of a pixel
GAP = 2  # pixels between the pictures of a grid


def encode(pixels: np.ndarray) -> bytes:
    """Return a picture as the bytes of a PNG file.

    Args:
      pixels: uint8 (height, width) or (height, width, 1 or 3).
    """
    height, width = pixels.shape[:2]
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    lines = np.zeros(
        (height, 1 + width * channels),
        np.uint8,
    )
    lines[:, 1:] = pixels.reshape(
        height,
        -1,
    )
    header = struct.pack(
        ">IIBBBBB",
        width,
        height,
        8,
        COLOUR_TYPES[channels],
        0,
        0,
        0,
    )
    chunks = [
        (b"IHDR", header),
        (b"IDAT", zlib.compress(lines.tobytes())),
        (b"IEND", b""),
    ]
    return SIGNATURE + b"".join(_chunk(*chunk) for chunk in chunks)


def address(png: bytes, kind: str = "png") -> str:
    """Return a picture as an address that holds it, for a page of one file."""
    return f"data:image/{kind};base64,{base64.b64encode(png).decode()}"


def as_pixels(
    values: np.ndarray, scale: tuple[float, float] | None = None
) -> np.ndarray:
    """Return numbers as pixels, uint8.

    Args:
      values: uint8, which stay as they are; or other numbers.
      scale: what is black and what is white; None: the least and the largest one.
    """
    if values.dtype == np.uint8 and scale is None:
        return values
    numbers = np.nan_to_num(
        np.asarray(
            values,
            np.float64,
        )
    )
    low, high = (numbers.min(), numbers.max()) if scale is None else scale
    share = (numbers - low) / (high - low if high > low else 1)
    return (
        (
            np.clip(
                share,
                0,
                1,
            )
            * BYTE
        )
        .round()
        .astype(np.uint8)
    )


def are_pictures(values: np.ndarray) -> bool:
    """Whether an array is of pictures: (rows, height, width[, 1 or 3])."""
    if values.dtype.kind not in "uif" or values.ndim not in (3, 4):
        return False
    return values.ndim == 3 or values.shape[3] in COLOUR_TYPES


def smaller(pixels: np.ndarray, most: int) -> np.ndarray:
    """Return a picture of at most so many pixels in height and width."""
    step = math.ceil(max(pixels.shape[:2]) / most)
    return pixels[::step, ::step]


def grid(pictures: np.ndarray) -> np.ndarray:
    """Return pictures as one: uint8 (height, width[, channels]).

    Args:
      pictures: uint8 (count, height, width[, channels]).
    """
    count, height, width = pictures.shape[:3]
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    whole = (rows * (height + GAP) - GAP, columns * (width + GAP) - GAP)
    page = np.full(
        (*whole, *pictures.shape[3:]),
        BYTE,
        np.uint8,
    )
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        top = row * (height + GAP)
        left = column * (width + GAP)
        page[top : top + height, left : left + width] = picture
    return page


def _chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return (
        struct.pack(
            ">I",
            len(content),
        )
        + kind
        + content
        + struct.pack(">I", checksum)
    )
