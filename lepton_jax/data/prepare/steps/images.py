"""Images: the bytes of files as pixels, or files, of one size and kind."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import polars as pl

from lepton_jax.data.extras import needs
from lepton_jax.data.prepare.step import Outcome, Step
from lepton_jax.data.prepare.steps.columns import (
    Kind,
    fault,
    require,
    require_choice,
    require_range,
)
from lepton_jax.data.prepare.steps.decoding import (
    RefusedError,
    decode,
    encoded,
    resized,
)
from lepton_jax.data.readers.reader import NOTES, ROW, SOURCE, no_notes
from lepton_jax.errors import DataError

CHANNELS = {"L": 1, "RGB": 3, "RGBA": 4}
FITS = ("crop", "pad", "stretch")
OUTPUTS = ("pixels", "jpeg", "png")
# Pillow's own limit: a quarter of a gigabyte as RGB.
MOST_PIXELS = 89_478_485
# Columns that say which file an image is, in the order in which they are looked for.
FILES = ("file", "path")
FILE = Kind(
    "binary (the content of a file) or text (its path)",
    lambda dtype: dtype in (pl.Binary, pl.String),
    "read the folder or the table of files with reader_of",
)
_DECODED = "lepton.decoded"


class BrokenImageError(DataError):
    """An image that can't be used.

    Polars makes a new error of the text of one that its functions raise; this class can
    be made so.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        remedy: str = "",
    ):
        if not remedy:
            what = what.partition("\n\nThis error occurred")[0]
            what, _, remedy = what.partition("\n  remedy: ")
            what, _, where = what.partition("\n  where:  ")
        super().__init__(
            what,
            where=where,
            remedy=remedy,
        )


@dataclass(frozen=True)
class Images(Step):
    """Decode images, turn them upright, bring them to one mode, size and format.

    Upright is what their EXIF orientation says. Palettes, CMYK, 16 bits and
    transparency become the wanted mode; colour profiles are not applied, as usual in
    training. The content decides what a file is, not its name. Formats: AVIF, BMP, GIF,
    ICO, JPEG, JPEG 2000, PNG, PPM, TGA, TIFF and WebP. What is unusual about an image
    is noted as "changed".

    Attributes:
      column: of the files' content (binary) or paths (text).
      size: height and width of the result, pixels; None: as each is, for files only.
      mode: "RGB", "L" (grey) or "RGBA".
      fit: "crop" cuts the middle out of the longer side, "pad" adds a background at the
        shorter one, "stretch" changes the aspect. All scale by area and bilinearly.
      output: "pixels": an array uint8 [height, width, channels]; "jpeg" or "png": the
        bytes of such a file, without metadata.
      broken: "error", or "drop": a row whose image can't be used, with a note.
      animated: "first" takes the first frame; "broken" treats more than one as such.
      background: shade behind transparency and at padded sides, 0 to 255.
      most_pixels: width times height of an image before it is scaled; a larger one is
        refused before it is decoded: a small file may say that it has billions.
      quality: of JPEG, 1 to 95.
    """

    column: str
    size: Sequence[int] | None = (224, 224)
    mode: Literal["L", "RGB", "RGBA"] = "RGB"
    fit: Literal["crop", "pad", "stretch"] = "crop"
    output: Literal["pixels", "jpeg", "png"] = "pixels"
    broken: Literal["error", "drop"] = "error"
    animated: Literal["first", "broken"] = "first"
    background: int = 255
    most_pixels: int = MOST_PIXELS
    quality: int = 90

    order_independent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.size is not None:
            object.__setattr__(
                self,
                "size",
                tuple(self.size),
            )

    def check(
        self,
        schema: pl.Schema,
    ) -> pl.Schema:
        needs("PIL", extra="image", purpose="decoding images")
        require(
            self,
            schema,
            [self.column],
            FILE,
        )
        require_choice(self, "mode", list(CHANNELS))
        require_choice(self, "fit", FITS)
        require_choice(self, "output", OUTPUTS)
        require_choice(self, "broken", ("error", "drop"))
        require_choice(self, "animated", ("first", "broken"))
        require_range(self, "background", 0, 255)
        require_range(self, "quality", 1, 95)
        self._check_size()
        return super().check(schema)

    def run(
        self,
        table: pl.LazyFrame,
        state: pl.DataFrame | None,
    ) -> Outcome:
        names = table.collect_schema().names()
        files = [name for name in FILES if name in names and name != self.column]
        numbers = [name for name in (SOURCE, ROW) if name in names]
        struct = pl.struct(
            self.column,
            *files[:1],
            *numbers,
        )
        result = pl.Struct(self._result())
        decoded = table.with_columns(
            struct.map_batches(
                self._decoded,
                result,
                is_elementwise=True,
            ).alias(_DECODED)
        )
        fields = pl.col(_DECODED).struct
        is_good = fields.field("fault").is_null()
        image = fields.field("image").alias(self.column)
        good = decoded.filter(is_good).with_columns(image).drop(_DECODED)
        if len(numbers) < 2:
            return Outcome(good, no_notes())
        return Outcome(good, self._notes(decoded))

    def _check_size(self) -> None:
        if self.size is None and self.output == "pixels":
            raise DataError(
                "pixels of different sizes make no array",
                where="Images.size",
                remedy="give size=(height, width), or output='jpeg' or 'png'",
            )
        sides = self.size or (1, 1)
        if len(sides) != 2 or not all(0 < side < 2**16 for side in sides):
            raise DataError(
                f"size is {self.size!r}",
                where="Images.size",
                remedy="give (height, width) in pixels, each from 1 to 65535",
            )
        if self.output == "jpeg" and self.mode == "RGBA":
            raise DataError(
                "JPEG has no opacity",
                where="Images.output",
                remedy="take mode='RGB', or output='png'",
            )

    def _result(self) -> dict[str, pl.DataType]:
        image: pl.DataType = pl.Binary()
        if self.output == "pixels":
            assert self.size is not None
            image = pl.Array(
                pl.UInt8(),
                (*self.size, CHANNELS[self.mode]),
            )
        return {"image": image, "fault": pl.String(), "remark": pl.String()}

    def _notes(
        self,
        decoded: pl.LazyFrame,
    ) -> pl.LazyFrame:
        fields = pl.col(_DECODED).struct
        wrong = fault(
            self.column,
            fields.field("fault").is_not_null(),
            "",
        )
        is_noted = wrong.where | fields.field("remark").is_not_null()
        action = pl.when(wrong.where).then(pl.lit("dropped"))
        reason = pl.coalesce(
            fields.field("fault"),
            fields.field("remark"),
        )
        return (
            decoded.filter(is_noted)
            .select(
                SOURCE,
                ROW,
                action.otherwise(pl.lit("changed")).alias("action"),
                reason.alias("reason"),
                pl.lit(self.column).alias("column"),
                pl.lit(None).alias("before"),
                pl.lit(None).alias("after"),
                pl.lit(None).alias("partner_source"),
                pl.lit(None).alias("partner_row"),
            )
            .cast(NOTES)
        )

    def _decoded(
        self,
        rows: pl.Series,
    ) -> pl.Series:
        """Return a struct of `_result` for each row."""
        table = rows.struct.unnest()
        contents = table[self.column].to_list()
        images: list[Any] = [None] * len(contents)
        faults: list[str | None] = [None] * len(contents)
        remarks: list[str | None] = [None] * len(contents)
        # Pillow decodes and scales without Python's lock.
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            for row, done in enumerate(
                threads.map(
                    self._one,
                    contents,
                )
            ):
                if isinstance(done, RefusedError):
                    self._refuse(table, row, done)
                    faults[row] = done.fault
                else:
                    images[row] = done[0]
                    remarks[row] = "; ".join(done[1]) or None
        result = self._result()
        columns = {
            "image": self._column(images),
            "fault": pl.Series(
                faults,
                dtype=pl.String,
            ),
            "remark": pl.Series(
                remarks,
                dtype=pl.String,
            ),
        }
        return pl.DataFrame(
            columns,
            schema=result,
        ).to_struct(rows.name)

    def _one(
        self,
        file: bytes | str | None,
    ) -> Any:
        """Return the result of one image and remarks, or why it is refused."""
        try:
            upright = decode(
                _content(file),
                self.mode,
                self.background,
                self.most_pixels,
                self.animated == "broken",
            )
        except RefusedError as error:
            return error
        image = upright.image
        if self.size is not None:
            height, width = self.size
            image = resized(
                image,
                height,
                width,
                self.fit,
                self.background,
            )
        if self.output != "pixels":
            return encoded(
                image,
                self.output,
                self.quality,
            ), upright.remarks
        pixels = np.asarray(image).reshape(
            *image.size[::-1],
            CHANNELS[self.mode],
        )
        return pixels, upright.remarks

    def _column(
        self,
        images: Sequence[Any],
    ) -> pl.Series:
        kind = self._result()["image"]
        if self.output != "pixels":
            return pl.Series(images, dtype=kind)
        assert isinstance(kind, pl.Array)
        # A refused image is a row of zeros, and dropped.
        pixels = np.zeros(
            (len(images), *kind.shape),
            np.uint8,
        )
        for row, image in enumerate(images):
            if image is not None:
                pixels[row] = image
        flat = pl.Series(pixels.reshape(-1))
        return flat.reshape((len(images), *kind.shape))

    def _refuse(
        self,
        table: pl.DataFrame,
        row: int,
        error: RefusedError,
    ) -> None:
        """Raise, if a broken image is an error."""
        if self.broken == "drop":
            return
        raise BrokenImageError(
            f"an image can't be used: {error.fault}",
            where=_place(table, row, self.column),
            remedy=f"{error.remedy}, or set broken='drop' to leave such rows out",
        )


# ---- internals ----


def _content(file: bytes | str | None) -> bytes:
    if file is None:
        raise RefusedError("missing")
    if isinstance(file, bytes):
        return file
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise RefusedError(
            f"the file can't be opened: {error.strerror}",
            "correct the path, or have the file put there",
        ) from error


def _place(
    table: pl.DataFrame,
    row: int,
    column: str,
) -> str:
    """Return where an image is from: its file if that is known, and its row."""
    cells = table.row(row, named=True)
    parts = [
        cells[name]
        for name in (*FILES, column)
        if isinstance(
            cells.get(name),
            str,
        )
    ]
    if SOURCE in cells and ROW in cells:
        parts.append(f"row {cells[SOURCE]}:{cells[ROW]}")
    return ", ".join(parts) or f"image {row} of {table.height}"
