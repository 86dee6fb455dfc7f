from __future__ import annotations

import io
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image
from stepping import applied, row_numbers, rows

from lepton_jax.data.prepare import Images
from lepton_jax.data.prepare.steps.decoding import TURNS
from lepton_jax.errors import DataError

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
CATS_DOGS = SHARED / "cats_dogs_subset" / "cats_dogs_600.tar"

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


def centres(pixels: np.ndarray) -> np.ndarray:
    """Return the colours in the middles of the four quarters."""
    height, width = pixels.shape[:2]
    down = [height // 4, height // 4, 3 * height // 4, 3 * height // 4]
    right = [width // 4, 3 * width // 4, width // 4, 3 * width // 4]
    return pixels[down, right].astype(int)


@pytest.mark.parametrize("name", RIGHT)
def test_an_unusual_image_gives_the_right_pixels(name):
    content, colours, remark = RIGHT[name]
    kept, notes = applied(Images("image", SIZE), rows({"image": [content]}))
    pixels = kept["image"].to_numpy()[0]
    assert pixels.shape == (*SIZE, 3) and pixels.dtype == np.uint8
    assert np.abs(centres(pixels) - np.array(colours)).max() <= 12
    assert notes.select("action", "reason").rows() == (
        [("changed", remark)] if remark else []
    )


@pytest.mark.parametrize("name", WRONG)
def test_a_damaged_file_is_a_counted_drop_or_an_error_with_file_and_remedy(name):
    content, words = WRONG[name]
    table = rows({"file": ["good.jpg", "bad.jpg"], "image": [JPEG, content]}, source=2)
    kept, notes = applied(Images("image", SIZE, broken="drop"), table)
    assert row_numbers(kept) == [0]
    assert row_numbers(notes) == [1]
    assert notes["action"][0] == "dropped"
    assert words in notes["reason"][0]
    with pytest.raises(DataError) as caught:
        applied(Images("image", SIZE), table)
    assert words in caught.value.what
    assert caught.value.where == "bad.jpg, row 2:1"
    assert "broken='drop'" in caught.value.remedy


def test_an_animation_can_be_refused():
    table = rows({"image": [animation("GIF"), JPEG]})
    step = Images("image", SIZE, animated="broken", broken="drop")
    kept, notes = applied(step, table)
    assert row_numbers(kept) == [1]
    assert notes["reason"].to_list() == ["animated: 2 frames"]


def test_missing_images_and_paths_that_lead_nowhere_are_refused(tmp_path):
    right = tmp_path / "a.png"
    right.write_bytes(JPEG)  # the content counts, not the name
    paths = [str(right), str(tmp_path / "none.jpg"), None]
    step = Images("image", SIZE, broken="drop")
    kept, notes = applied(step, rows({"image": paths}))
    assert row_numbers(kept) == [0]
    assert notes["reason"][0].startswith("the file can't be opened")
    assert notes["reason"][1] == "missing"
    with pytest.raises(DataError, match=r"none\.jpg, row 0:1"):
        applied(Images("image", SIZE), rows({"image": paths}))


@pytest.mark.parametrize(
    ("fit", "left", "middle"),
    [("crop", RED, GREEN), ("pad", WHITE, GREEN), ("stretch", RED, GREEN)],
)
def test_an_image_is_fitted_as_asked(fit, left, middle):
    # red, green, blue stripes of 10 columns each; 30 high for "pad"
    high = fit == "pad"
    pixels = np.zeros((60 if high else 20, 30, 3), np.uint8)
    pixels[:, :10] = RED
    pixels[:, 10:20] = GREEN
    pixels[:, 20:] = BLUE
    content = saved(Image.fromarray(pixels), "PNG")
    table = rows({"image": [content]})
    result = applied(Images("image", (12, 12), fit=fit), table)[0]["image"].to_numpy()[
        0
    ]
    assert np.abs(result[6, 0].astype(int) - left).max() < 90
    assert np.abs(result[6, 6].astype(int) - middle).max() < 30


def test_a_crop_takes_the_middle_and_padding_keeps_all():
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = GREEN
    table = rows({"image": [saved(Image.fromarray(pixels), "PNG")]})
    cropped = applied(Images("image", (10, 10), fit="crop"), table)[0]
    assert (cropped["image"].to_numpy()[0] == GREEN).all()
    padded = applied(Images("image", (30, 30), fit="pad", background=7), table)[0]
    result = padded["image"].to_numpy()[0]
    assert (result[:10] == 7).all() and (result[20:] == 7).all()
    assert (result[10:20] == pixels).all()


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_each_mode_has_its_channels(mode):
    table = rows({"image": [JPEG, half_transparent(), grey_16()]})
    result = applied(Images("image", SIZE, mode=mode), table)[0]["image"].to_numpy()
    assert result.shape == (3, *SIZE, {"L": 1, "RGB": 3, "RGBA": 4}[mode])
    if mode == "RGBA":
        assert (result[1, ..., 3] == 0).all() and (result[0, ..., 3] == 255).all()


@pytest.mark.parametrize("output", ["jpeg", "png"])
def test_files_can_be_written_again_without_metadata(output):
    table = rows({"image": [turned(6)]})
    step = Images("image", None, output=output)
    kept, _ = applied(step, table)
    with Image.open(io.BytesIO(kept["image"][0])) as image:
        assert image.format == output.upper()
        assert image.size == quarters().size
        assert not image.getexif()
    again, notes = applied(Images("image", SIZE), kept)
    colours = centres(again["image"].to_numpy()[0])
    assert np.abs(colours - np.array(ANY_QUARTERS)).max() <= 12
    assert notes.is_empty()


def test_raw_rows_without_numbers_are_decoded_too():
    outcome = Images("image", SIZE).run(pl.LazyFrame({"image": [JPEG]}), None)
    assert outcome.table.collect()["image"].dtype == pl.Array(pl.UInt8, (*SIZE, 3))


def test_pillows_own_limit_is_as_it_was():
    limit = Image.MAX_IMAGE_PIXELS
    applied(
        Images("image", SIZE, most_pixels=10, broken="drop"), rows({"image": [PNG]})
    )
    assert limit == Image.MAX_IMAGE_PIXELS


def test_wrong_arguments_are_errors():
    schema = pl.Schema({"image": pl.Binary(), "n": pl.Int64()})
    for step in (
        Images("n"),
        Images("image", None),
        Images("image", (0, 5)),
        Images("image", (5, 5, 3)),
        Images("image", output="jpeg", mode="RGBA"),
        Images("image", fit="fill"),
        Images("image", quality=0),
    ):
        with pytest.raises(DataError):
            step.check(schema)


@pytest.mark.skipif(not CATS_DOGS.is_file(), reason="needs ../shared/data")
def test_cats_and_dogs_are_decoded_and_a_damaged_one_is_named():
    with tarfile.open(CATS_DOGS) as archive:
        members = [member for member in archive if member.isfile()][:60]
        files = [member.name for member in members]
        contents = [archive.extractfile(member).read() for member in members]
    table = rows({"file": files, "image": contents})
    kept, _ = applied(Images("image", (64, 64)), table)
    assert kept["image"].to_numpy().shape == (60, 64, 64, 3)
    assert 60 < kept["image"].to_numpy().mean() < 180
    contents[7] = contents[7][:2000]
    table = rows({"file": files, "image": contents})
    with pytest.raises(DataError) as caught:
        applied(Images("image", (64, 64)), table)
    assert caught.value.where == f"{files[7]}, row 0:7"
