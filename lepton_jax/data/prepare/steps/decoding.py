"""Decoding of images by Pillow, with what is unusual about each said or refused."""

from __future__ import annotations

import io
import threading
from typing import Any, NamedTuple

import numpy as np

from lepton_jax.data.extras import needs

# Raster formats that Pillow decodes itself. Others would call programs (EPS calls
# Ghostscript), or are not made for images that are looked at.
FORMATS = (
    "AVIF",
    "BMP",
    "GIF",
    "ICO",
    "JPEG",
    "JPEG2000",
    "PNG",
    "PPM",
    "TGA",
    "TIFF",
    "WEBP",
)
ANIMATED = ("AVIF", "GIF", "PNG", "TIFF", "WEBP")
ORIENTATION = 0x0112  # EXIF's tag
# How to turn an image upright, by its EXIF orientation (EXIF 2.32, section 4.6.4 A).
TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
# Modes of Pillow without opacity that it makes RGB or grey without loss that matters.
PLAIN = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV")
WITH_OPACITY = ("LA", "La", "PA", "RGBA", "RGBa")
SIXTEEN = ("I;16", "I;16B", "I;16L", "I;16N")
REPLACE = "replace or delete the file"
# Pillow's own limit is a variable of its module, which it reads when it opens a file.
_LIMIT = threading.Lock()


class Upright(NamedTuple):
    """An image as it is looked at.

    Attributes:
      image: of Pillow, of the wanted mode.
      remarks: what was changed that is unusual, in words that many images share.
    """

    image: Any
    remarks: list[str]


class RefusedError(Exception):
    """An image that is not used.

    Args:
      fault: what is wrong with it, in words.
      remedy: what to do about it.
    """

    def __init__(
        self,
        fault: str,
        remedy: str = REPLACE,
    ):
        self.fault = fault
        self.remedy = remedy
        super().__init__(fault)


def decode(
    content: bytes,
    mode: str,
    background: int,
    most_pixels: int,
    is_animation_refused: bool,
) -> Upright:
    """Decode an image: upright, in one mode, the first of its frames.

    Args:
      content: of the file.
      mode: "L", "RGB" or "RGBA".
      background: shade behind what is transparent, 0 to 255.
      most_pixels: width times height; larger images are not decoded.
      is_animation_refused: whether more than one frame is a fault.

    Raises:
      RefusedError: it is damaged, too large, or not an image.
    """
    if not content:
        raise RefusedError("the file is empty")
    try:
        with _opened(content) as image:
            _check_pixels(image, most_pixels)
            remarks = _frames(image, is_animation_refused)
            image.load()
            image, turn = _turned(image)
            image, kind = _in_mode(image, mode, background)
            return Upright(
                image,
                [*remarks, *turn, *kind],
            )
    except (RefusedError, MemoryError):
        raise
    # Pillow's decoders raise almost anything for damaged bytes.
    except Exception as error:
        raise RefusedError(_words(error, content)) from error


def resized(
    image: Any,
    height: int,
    width: int,
    fit: str,
    background: int,
) -> Any:
    """Return an image of one size.

    Args:
      image: of Pillow.
      height: of the result.
      width: of the result.
      fit: "crop", "pad" or "stretch".
      background: shade of what is added, 0 to 255.
    """
    images = _images()
    if image.size == (width, height):
        return image
    if fit == "pad":
        return _padded(image, height, width, background)
    box = (0.0, 0.0, float(image.width), float(image.height))
    if fit == "crop":
        scale = min(
            image.width / width,
            image.height / height,
        )
        left = (image.width - scale * width) / 2
        top = (image.height - scale * height) / 2
        box = (left, top, image.width - left, image.height - top)
    return image.resize(
        (width, height),
        images.Resampling.BILINEAR,
        box=box,
    )


def encoded(
    image: Any,
    kind: str,
    quality: int,
) -> bytes:
    """Return an image as the bytes of a "jpeg" or "png" file, without metadata."""
    file = io.BytesIO()
    settings = {"quality": quality} if kind == "jpeg" else {}
    image.info.clear()
    image.save(
        file,
        kind.upper(),
        **settings,
    )
    return file.getvalue()


# ---- internals ----


def _images() -> Any:
    return needs("PIL.Image", extra="image", purpose="decoding images")


def _opened(content: bytes) -> Any:
    """Open an image without Pillow's own limit, in place of which is `most_pixels`."""
    images = _images()
    images.init()
    formats = [name for name in FORMATS if name in images.OPEN]
    with _LIMIT:
        limit = images.MAX_IMAGE_PIXELS
        images.MAX_IMAGE_PIXELS = None
        try:
            return images.open(
                io.BytesIO(content),
                formats=formats,
            )
        finally:
            images.MAX_IMAGE_PIXELS = limit


def _check_pixels(
    image: Any,
    most_pixels: int,
) -> None:
    pixels = image.width * image.height
    if pixels > most_pixels:
        raise RefusedError(
            f"more than {most_pixels} pixels: {image.width} x {image.height}",
            "make it smaller, or raise `most_pixels` if the file is what it says",
        )


def _frames(
    image: Any,
    is_refused: bool,
) -> list[str]:
    """Return a remark if there is more than one frame."""
    if (
        image.format not in ANIMATED
        or getattr(
            image,
            "n_frames",
            1,
        )
        == 1
    ):
        return []
    if is_refused:
        raise RefusedError(
            f"animated: {image.n_frames} frames",
            "export the frame that counts, or set animated='first'",
        )
    return ["first of several frames"]


def _turned(image: Any) -> tuple[Any, list[str]]:
    """Return an image upright, as its EXIF orientation says."""
    try:
        orientation = image.getexif().get(
            ORIENTATION,
            1,
        )
    # Damaged metadata is no reason to lose the pixels.
    except Exception:
        return image, ["unreadable EXIF"]
    if orientation not in TURNS:
        return image, []
    turn = getattr(
        _images().Transpose,
        TURNS[orientation],
    )
    return image.transpose(turn), ["turned upright"]


def _in_mode(
    image: Any,
    mode: str,
    background: int,
) -> tuple[Any, list[str]]:
    """Return an image in a mode, with remarks."""
    if image.mode in SIXTEEN or image.mode == "I":
        return _in_8_bits(image).convert(mode), ["16 bits to 8"]
    if image.mode in WITH_OPACITY or "transparency" in image.info:
        return _opaque(
            image.convert("RGBA"),
            mode,
            background,
        )
    if image.mode not in PLAIN:
        raise RefusedError(
            f"pixels of the kind {image.mode!r}, which have no one way to RGB",
            "convert it to RGB with 8 bits a channel",
        )
    remarks = ["CMYK to RGB"] if image.mode == "CMYK" else []
    if image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    return image.convert(mode), remarks


def _in_8_bits(image: Any) -> Any:
    """Return a grey image of 16 bits as one of 8: the upper half of each value."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise RefusedError(
            "whole numbers of 32 bits as pixels, whose range is not known",
            "convert it to 8 bits a channel",
        )
    return _images().fromarray(
        (values >> 8).astype(np.uint8),
        "L",
    )


def _opaque(
    image: Any,
    mode: str,
    background: int,
) -> tuple[Any, list[str]]:
    """Put an RGBA image on a background, unless the mode has opacity, too."""
    least = image.getchannel("A").getextrema()[0]
    if mode == "RGBA" or least == 255:
        return image.convert(mode), []
    ground = _images().new(
        "RGBA",
        image.size,
        (background,) * 3 + (255,),
    )
    ground.alpha_composite(image)
    return ground.convert(mode), ["transparency on a background"]


def _padded(
    image: Any,
    height: int,
    width: int,
    background: int,
) -> Any:
    images = _images()
    scale = min(
        width / image.width,
        height / image.height,
    )
    # Of a very long image the short side would vanish.
    inner_width = max(
        1,
        round(image.width * scale),
    )
    inner_height = max(
        1,
        round(image.height * scale),
    )
    inner = image.resize(
        (inner_width, inner_height),
        images.Resampling.BILINEAR,
    )
    shades = (background,) * len(image.getbands())
    ground = images.new(
        image.mode,
        (width, height),
        shades,
    )
    corner = ((width - inner_width) // 2, (height - inner_height) // 2)
    ground.paste(inner, corner)
    return ground


def _words(
    error: Exception,
    content: bytes,
) -> str:
    """Return what is wrong with a file, in words that such files share."""
    unknown = needs(
        "PIL",
        extra="image",
        purpose="decoding images",
    )
    if isinstance(error, unknown.UnidentifiedImageError):
        if content[:256].isascii() and b"\0" not in content[:256]:
            return "text, not an image"
        return "not an image, or its first bytes are damaged"
    message = str(error).partition("\n")[0]
    if "truncated" in message.lower():
        return "cut off before its end"
    return f"damaged: {message}"
