"""Pictures: their bytes as pixels of one size, and folders of them as samples."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lepton_jax.data.arrays import aligned_empty
from lepton_jax.data.extras import needs
from lepton_jax.data.indexed import Indexed
from lepton_jax.data.memory import HeldGroups
from lepton_jax.data.rows import Rows
from lepton_jax.errors import DataError

# Ends of the names of files that are taken for pictures.
ENDS = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp")

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's name of the pixels, by channels


@dataclass(frozen=True)
class Picture:
    """The pixels of a picture's bytes: uint8 (height, width, channels).

    A JPEG is decoded at the smallest of the scales 1/8, 1/4, 1/2 and 1 that is at least
    as large as the picture is to be: five times as fast for 450 x 375 to 64 x 64 pixels
    (`python -m tools.bench data`).

    Attributes:
      height: of the result, pixels.
      width: of the result, pixels.
      channels: 1 (grey), 3 or 4 (with opacity).
      fit: "stretch" to the size, or "crop" to its aspect ratio around the middle first.

    Raises:
      DataError: Pillow is not installed; when called, the bytes are no picture.
    """

    height: int
    width: int
    channels: Literal[1, 3, 4] = 3
    fit: Literal["stretch", "crop"] = "stretch"

    def __post_init__(self):
        needs("PIL", extra="image", purpose="decoding pictures")
        if self.channels not in MODES:
            raise DataError(
                f"channels is {self.channels!r}",
                where="Picture",
                remedy="give 1, 3 or 4",
            )
        if self.fit not in ("stretch", "crop"):
            raise DataError(
                f"fit is {self.fit!r}",
                where="Picture",
                remedy='give "stretch" or "crop"',
            )

    def __call__(self, content: bytes) -> np.ndarray:
        """Decode a picture."""
        images = needs("PIL.Image", extra="image", purpose="decoding pictures")
        oriented = needs("PIL.ImageOps", extra="image", purpose="decoding pictures")
        mode = MODES[self.channels]
        with images.open(io.BytesIO(content)) as picture:
            # JPEG alone; afterwards each side is at least as long as asked for
            longest = max(self.width, self.height)
            picture.draft("L" if mode == "L" else "RGB", (longest, longest))
            upright = oriented.exif_transpose(picture)
            pixels = upright.convert(mode).resize(
                (self.width, self.height),
                images.Resampling.BILINEAR,
                box=self._box(*upright.size),
            )
        out = np.asarray(pixels)
        return out.reshape(self.height, self.width, self.channels)

    def _box(
        self,
        width: int,
        height: int,
    ) -> tuple[float, float, float, float]:
        """Return the part of a picture that is kept: left, top, right, bottom."""
        if self.fit == "stretch":
            return 0, 0, width, height
        scale = min(width / self.width, height / self.height)
        left = (width - scale * self.width) / 2
        top = (height - scale * self.height) / 2
        return left, top, width - left, height - top


class PictureFiles(Indexed):
    """Files of pictures with their labels.

    Decoded pictures are held in memory as far as the feed's budget allows.

    Attributes:
      is_held: whether they are.

    Args:
      files: of the pictures.
      labels: of each, int32 (files,).
      decode: bytes to pixels.
      name: in messages.
    """

    def __init__(
        self,
        files: Sequence[Path],
        labels: np.ndarray,
        decode: Callable[[bytes], np.ndarray],
        name: str,
    ):
        self.files = list(files)
        self.labels = np.asarray(labels, np.int32)
        self.decode = decode
        self.name = name
        self.is_held = True
        self.sizes = np.array([file.stat().st_size for file in self.files])
        listing = [
            f"{file} {size}" for file, size in zip(files, self.sizes, strict=True)
        ]
        self.digest = hashlib.sha256("\n".join(listing).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.files)

    def __repr__(self) -> str:
        return self.name

    def read(
        self,
        indices: np.ndarray,
        held: HeldGroups,
    ) -> Rows:
        pixels: Any = None
        for row, index in enumerate(indices.tolist()):
            picture = self._picture(index, held)
            if pixels is None:
                pixels = aligned_empty((len(indices), *picture.shape), picture.dtype)
            pixels[row] = picture
        return pixels, self.labels[indices]

    def _picture(
        self,
        index: int,
        held: HeldGroups,
    ) -> np.ndarray:
        if not self.is_held:
            return self._load(index)[0]
        key = (self.digest, self.decode, index)
        return held.get(key, partial(self._load, index))

    def _load(self, index: int) -> tuple[np.ndarray, int]:
        file = self.files[index]
        try:
            picture = self.decode(file.read_bytes())
        # Pillow's decoders raise almost anything for damaged bytes
        except Exception as error:
            raise DataError(
                f"the picture can't be read: {error}",
                where=file,
                remedy="remove the file, or prepare the folder first, which lists such",
            ) from error
        return picture, picture.nbytes


def files_of_classes(
    folder: Path,
    classes: Sequence[str] | None,
) -> tuple[list[Path], np.ndarray, list[str]]:
    """Find the pictures in a folder that has one folder for each class.

    Args:
      folder: of the classes' folders.
      classes: their names, in the order of their labels; None: all, sorted.

    Returns:
      (files, labels, classes)

    Raises:
      DataError: there are none.
    """
    if not folder.is_dir():
        raise DataError(
            "there is no such folder",
            where=folder,
            remedy="name the folder in which each class has a folder of pictures",
        )
    names = list(
        classes or sorted(path.name for path in folder.iterdir() if path.is_dir())
    )
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        inside = sorted((folder / name).rglob("*"))
        pictures = [file for file in inside if file.suffix.lower() in ENDS]
        if not pictures:
            raise DataError(
                f"the class {name!r} has no picture",
                where=folder / name,
                remedy=f"give each class's folder pictures: {', '.join(ENDS)}",
            )
        files += pictures
        labels += [label] * len(pictures)
    if not names:
        raise DataError(
            "there is no folder of a class",
            where=folder,
            remedy="put the pictures of each class into a folder of its name",
        )
    return files, np.array(labels, np.int32), names
