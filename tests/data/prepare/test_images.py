from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image
from stepping import applied, row_numbers, rows

from lepton_jax.data.prepare import Images
from lepton_jax.errors import DataError
from tests.data.pictures import (
    ANY_QUARTERS,
    BLUE,
    GREEN,
    JPEG,
    PNG,
    RED,
    RIGHT,
    SIZE,
    WHITE,
    WRONG,
    animation,
    grey_16,
    half_transparent,
    quarters,
    saved,
    turned,
)

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
CATS_DOGS = SHARED / "cats_dogs_subset" / "cats_dogs_600.tar"


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
