"""The idx format of the MNIST family, and pairs of images and labels in it."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence

import numpy as np

from lepton_jax.data.readers.array_files import ArrayFile, ArrayFilesReader
from lepton_jax.data.readers.files import Stored
from lepton_jax.errors import DataError

# The third byte of a header names the dtype (http://yann.lecun.com/exdb/mnist/).
DTYPES = {
    0x08: "u1",
    0x09: "i1",
    0x0B: ">i2",
    0x0C: ">i4",
    0x0D: ">f4",
    0x0E: ">f8",
}
MOST_DIMS = 8  # assumption: more is no array of samples
MOST_BYTES = 2**42  # assumption: more is a damaged header

_PART = re.compile(r"(.*?)[-_.]?(images|labels)[-_.]?idx[0-9]-ubyte")


def is_idx(first: bytes) -> bool:
    """Whether a file's first bytes are those of an idx file."""
    return (
        len(first) >= 8
        and first[:2] == b"\0\0"
        and first[2] in DTYPES
        and 0 < first[3] <= MOST_DIMS
    )


def idx_file(stored: Stored) -> ArrayFile:
    """Return the array in an idx file.

    Raises:
      DataError: it is no idx file.
    """
    first = stored.read(0, 4 + 4 * MOST_DIMS)
    remedy = "get the file again: it is damaged, or not what its name says"
    if not is_idx(first):
        raise DataError(
            "expected an idx header (00 00, type, rank), found the bytes"
            f" {first[:4].hex(' ') or 'none'}",
            where=stored,
            remedy=remedy,
        )
    dims = first[3]
    offset = 4 + 4 * dims
    if len(first) < offset:
        raise DataError(
            "the header is cut short",
            where=stored,
            remedy=remedy,
        )
    shape = tuple(np.frombuffer(first[4:offset], ">u4").tolist())
    dtype = np.dtype(DTYPES[first[2]])
    if math.prod(shape) * dtype.itemsize > MOST_BYTES:
        raise DataError(
            f"the header says that the array is {list(shape)}",
            where=stored,
            remedy=remedy,
        )
    return ArrayFile(stored, dtype, shape, offset)


def readers_of_idx(files: Sequence[Stored]) -> list[ArrayFilesReader]:
    """Return a reader of each part of a data set: its images with their labels.

    Parts are told by the files' names: train-images-idx3-ubyte and
    train-labels-idx1-ubyte are one.
    """
    parts: dict[str, dict[str, ArrayFile]] = {}
    for file in files:
        match = _PART.match(file.name)
        part = match[1] if match else file.name
        column = match[2][:-1] if match else "values"
        parts.setdefault(part, {})[column] = idx_file(file)
    readers = []
    for part, columns in parts.items():
        ordered = dict(sorted(columns.items()))
        named = part if len(parts) > 1 else None
        readers.append(ArrayFilesReader(part or files[0].name, ordered, named))
    return readers


def with_labels(file: Stored) -> list[Stored]:
    """Return a file of images with that of its labels, if it lies next to it."""
    match = _PART.match(file.name)
    if match is None or match[2] != "images" or file.entry:
        return [file]
    folder = os.path.dirname(file.path)
    for name in sorted(os.listdir(folder or ".")):
        other = Stored(os.path.join(folder, name))
        theirs = _PART.match(other.name)
        if theirs is not None and theirs[1] == match[1] and theirs[2] == "labels":
            return [file, other]
    return [file]
