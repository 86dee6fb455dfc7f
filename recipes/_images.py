"""Images and their classes, read and prepared for the recipes.

This is not a recipe itself: a name that begins with an underscore says so.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

import lepton_jax as lepton
from lepton_jax.errors import DataError

TEST_SHARE = 0.2  # of the images, where no file says which are for testing

# The embedded images: a circle, a square or a diamond, bright on a dark ground.
SHAPES = ("circle", "diamond", "square")
IMAGES = 200  # of each shape
PIXELS = 32  # height and width

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".pq")
MOST_NAMED = 3  # files that a message names; assumption


@dataclass(frozen=True)
class Asked:
    """What a person asks of images.

    Attributes:
      data: as in the recipe; None: the embedded images.
      size: height and width that images of files get.
      labels: table of labels; None: folders are the classes.
      file_column: of that table; None: found out.
      label: name of its column of classes.
      fit: as in `prepare.Images`.
      broken: likewise; also what is done about folders without an image, and about
        files that are no image.
      folds: parts, of which one is for testing; None: a share is held out.
      fold: which of them.
      split_seed: of the parts.
      folder: for what is prepared; None: it is removed at the end.
    """

    data: Path | None
    size: int
    labels: Path | None = None
    file_column: str | None = None
    label: str = "label"
    fit: Literal["crop", "pad", "stretch"] = "stretch"
    broken: Literal["error", "drop"] = "drop"
    folds: int | None = None
    fold: int = 0
    split_seed: int = 0
    folder: Path | None = None


@dataclass(frozen=True)
class Images:
    """Prepared images.

    Attributes:
      train: uint8 (n, height, width) or (n, height, width, channels), and classes.
      test: likewise.
      serving: the way from raw rows to these.
      classes: names of the classes.
    """

    train: lepton.data.Arrays
    test: lepton.data.Arrays
    serving: Any
    classes: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        height, width, *channels = self.train.inputs.shape[1:]
        return height, width, (channels or [1])[0]

    def balanced(self) -> tuple[float, ...]:
        """Return a weight for each class, by which all classes weigh alike.

        Raises:
          DataError: no image of a class is for training.
        """
        counts = np.bincount(self.train.targets, minlength=len(self.classes))
        if not counts.all():
            missing = self.classes[int(np.argmin(counts))]
            raise DataError(
                f"no image of the class {missing!r} is for training",
                where="class_weights",
                remedy="give more images of it, or leave class_weights out",
            )
        weights = counts.sum() / (len(counts) * counts)
        return tuple(weights.tolist())


def load(asked: Asked) -> Images:
    """Read and prepare images, and say on the terminal what was done.

    Raises:
      DataError: there are no images, or no two classes; or a file can't be used.
    """
    with tempfile.TemporaryDirectory() as made:
        if asked.data is None:
            return _from_files(asked, _drawn(Path(made)), None)
        if _is_idx(asked.data):
            return _from_idx(asked)
        if asked.data.suffix.lower() in TABLES:
            return _from_files(asked, asked.data.parent, asked.data)
        return _from_files(asked, asked.data, asked.labels)


# ---- images in files ----


def _from_files(
    asked: Asked,
    data: Path,
    labels: Path | None,
) -> Images:
    # only here: what is not used need not be installed
    from lepton_jax.data import prepare
    from lepton_jax.data.readers import reader_of

    reading: dict[str, Any] = {"format": "images"}
    label = "label"
    if labels is not None:
        reading |= {"labels": labels, "file_column": asked.file_column}
        label = asked.label
    source = reader_of(data, **reading)
    columns = [column.name for column in source.columns()]
    if label not in columns:
        raise _without_classes(data, labels, label, columns)
    _report_left_out(data, source, asked.broken)

    images = prepare.Images(
        "bytes",
        size=(asked.size, asked.size),
        fit=asked.fit,
        broken=asked.broken,
    )
    # Labels of a table may be missing; those of folders are never.
    missing = [] if labels is None else [prepare.DropMissing(label)]
    steps = [*missing, images, _split(asked, label), prepare.Classes(label)]
    return _prepared(asked, source, steps, "bytes", label, but=["path"])


def _without_classes(
    data: Path,
    labels: Path | None,
    label: str,
    columns: Sequence[str],
) -> DataError:
    if labels is not None:
        return DataError(
            f"the table of labels has no column {label!r}",
            where=labels,
            remedy=f"set --label to one of {', '.join(columns)}",
        )
    return DataError(
        "there are no two classes: all images are in one folder",
        where=data,
        remedy=(
            "put the images of each class into a folder of its own, or give a table of"
            " files and labels with --labels"
        ),
    )


def _report_left_out(
    data: Path,
    source: Any,
    broken: str,
) -> None:
    """Say which files and folders of a folder give no image.

    Raises:
      DataError: there are some, and they are errors.
    """
    if not data.is_dir():
        return
    read = {entry.path for entry in source.entries}
    files = []
    empty = []
    for place, folders, names in os.walk(data):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = [os.path.relpath(os.path.join(place, name), data) for name in names]
        files += [name for name in below if name.replace(os.sep, "/") not in read]
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        files += [os.path.relpath(os.path.join(place, name), data) for name in links]
        if not names and not folders:
            empty.append(os.path.relpath(place, data))
    parts = [("files or links are no images", files), ("folders are empty", empty)]
    for what, names in parts:
        if not names:
            continue
        shown = ", ".join(sorted(names)[:MOST_NAMED])
        more = ", ..." if len(names) > MOST_NAMED else ""
        message = f"{len(names)} {what}, or have no label: {shown}{more}"
        if broken == "error":
            raise DataError(
                message,
                where=data,
                remedy="take them out, or set --broken drop to leave them out",
            )
        print(f"left out: {message}", file=sys.stderr)


# ---- images in idx files ----


def _is_idx(data: Path) -> bool:
    if not data.is_dir():
        return "idx" in data.name
    return any("idx" in file.name for file in data.iterdir())


def _from_idx(asked: Asked) -> Images:
    from lepton_jax.data import prepare
    from lepton_jax.data.readers import reader_of

    assert asked.data is not None
    source = reader_of(asked.data)
    columns = [column.name for column in source.columns()]
    if not {"image", "label"} <= set(columns):
        raise DataError(
            f"the idx files hold {', '.join(columns)}",
            where=asked.data,
            remedy="give files ...-images-idx3-ubyte and ...-labels-idx1-ubyte",
        )
    split = _split(asked, "label")
    if "part" in columns and asked.folds is None:
        split = prepare.Derive(prepare.SPLIT, '"train" if part == "train" else "test"')
    steps = [split, prepare.Classes("label")]
    return _prepared(asked, source, steps, "image", "label", but=[])


# ---- both ----


def _split(
    asked: Asked,
    label: str,
) -> Any:
    from lepton_jax.data import prepare

    more: dict[str, Any] = {"test": TEST_SHARE}
    if asked.folds is not None:
        more = {"folds": asked.folds, "fold": asked.fold}
    return prepare.Split(stratify=label, seed=asked.split_seed, **more)


def _prepared(
    asked: Asked,
    source: Any,
    steps: Sequence[Any],
    column: str,
    label: str,
    but: Sequence[str],
) -> Images:
    from lepton_jax.data import prepare
    from recipes import _tables

    preparation = prepare.Preparation(
        {"images": source},
        steps,
        inputs=[column],
        target=label,
    )
    serving = _tables.prepared(preparation, column, asked.folder, {})
    print(_tables.twice({"images": source}, but=but), file=sys.stderr)
    classes = tuple(map(str, serving.words))
    if len(classes) < 2:
        raise DataError(
            f"there is one class only: {', '.join(classes) or 'none'}",
            where=asked.data,
            remedy="give images of two classes or more",
        )
    return Images(
        serving.split("train"),
        serving.split("test"),
        serving,
        classes,
    )


# ---- the embedded images ----


def _drawn(folder: Path) -> Path:
    """Write the embedded images as files, a folder for each shape."""
    from PIL import Image

    generator = np.random.default_rng(0)
    for shape in SHAPES:
        (folder / shape).mkdir()
        for number in range(IMAGES):
            buffer = io.BytesIO()
            Image.fromarray(_image(shape, generator)).save(
                buffer,
                "PNG",
            )
            (folder / shape / f"{number:03}.png").write_bytes(buffer.getvalue())
    return folder


def _image(
    shape: str,
    generator: np.random.Generator,
) -> np.ndarray:
    """Return a shape on a noisy ground, uint8 (PIXELS, PIXELS, 3)."""
    radius = generator.uniform(6, 12)
    middle = generator.uniform(
        radius,
        PIXELS - radius,
        size=2,
    )
    places = np.indices((PIXELS, PIXELS)).transpose(
        1,
        2,
        0,
    )
    away = np.abs(places - middle)
    distance = {
        "circle": np.sqrt((away**2).sum(-1)),
        "diamond": away.sum(-1),
        "square": away.max(-1),
    }[shape]
    ground = generator.uniform(0, 80, size=3)
    colour = generator.uniform(150, 255, size=3)
    image = np.where(
        (distance <= radius)[..., None],
        colour,
        ground,
    )
    noise = generator.normal(0, 12, image.shape)
    return np.clip(
        image + noise,
        0,
        255,
    ).astype(np.uint8)
