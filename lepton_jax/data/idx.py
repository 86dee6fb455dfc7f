"""The idx format of the MNIST family of data sets."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from lepton_jax.data.arrays import Arrays
from lepton_jax.errors import DataError

# The third byte of a header names the dtype (http://yann.lecun.com/exdb/mnist/).
_DTYPES = {
    0x08: "u1",
    0x09: "i1",
    0x0B: ">i2",
    0x0C: ">i4",
    0x0D: ">f4",
    0x0E: ">f8",
}
_GZIP = b"\x1f\x8b"  # the first two bytes of a gzip file (RFC 1952, section 2.3.1)
_AGAIN = "download the file again: it is damaged, or not what its name says"


def idx(folder: str | Path) -> tuple[Arrays, Arrays]:
    """Read the train and the test part of a data set such as MNIST or Fashion-MNIST.

    Args:
      folder: holds train-images-idx3-ubyte, train-labels-idx1-ubyte and the same two
        with t10k, each gzipped (.gz) or not; `train-images.idx3-ubyte` will do too. Of
        a file that is there both ways, the uncompressed one is read.

    Returns:
      (train, test): inputs uint8 of shape (n, height, width, 1), targets int32 of shape
      (n,).
    """
    train = _part(Path(folder), "train")
    test = _part(Path(folder), "t10k")
    if train.inputs.shape[1:] != test.inputs.shape[1:]:
        raise DataError(
            f"train images are {train.inputs.shape[1:]}, test images"
            f" {test.inputs.shape[1:]}",
            where=folder,
            remedy="put the four files of one data set into the folder",
        )
    return train, test


def _part(folder: Path, part: str) -> Arrays:
    image_file = _find(folder, f"{part}-images", 3)
    label_file = _find(folder, f"{part}-labels", 1)
    images = read_idx(image_file)
    labels = read_idx(label_file)
    _check_values(image_file, images, rank=3)
    _check_values(label_file, labels, rank=1)
    if len(images) != len(labels):
        raise DataError(
            f"{len(images)} images, but {len(labels)} labels",
            where=f"{image_file}, {label_file}",
            remedy="put the files of one data set into the folder",
        )
    if images.size == 0:
        raise DataError(
            f"the images have the shape {images.shape}: none are there",
            where=image_file,
            remedy=_AGAIN,
        )
    return Arrays(images[..., None], labels.astype(np.int32))


def _check_values(
    file: Path,
    array: np.ndarray,
    rank: int,
) -> None:
    if array.dtype != np.uint8 or array.ndim != rank:
        raise DataError(
            f"expected uint8 values of {rank} dims, found {array.dtype} of"
            f" {array.ndim}",
            where=file,
            remedy=_AGAIN,
        )


def _find(
    folder: Path,
    stem: str,
    rank: int,
) -> Path:
    names = [f"{stem}{dot}idx{rank}-ubyte{gz}" for gz in ("", ".gz") for dot in "-."]
    for name in names:
        if (folder / name).is_file():
            return folder / name

    has = "there is no such folder"
    if folder.is_dir():
        files = sorted(path.name for path in folder.iterdir())[:8]
        has = f"it has {', '.join(files) or 'no files'}"
    raise DataError(
        f"no file {names[0]} (or {names[-2]}): {has}",
        where=folder,
        remedy="give the folder that holds the four idx files",
    )


def read_idx(path: str | Path) -> np.ndarray:
    """Read the array in an idx file, in native byte order.

    Args:
      path: the file, gzipped or not; its array has any dtype and number of dims.

    Raises:
      DataError: the file is missing, is no idx file, or has fewer or more bytes than
        its header says.
    """
    data = read_bytes(path)
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in _DTYPES:
        raise DataError(
            "expected an idx header (00 00, type, rank), found the bytes"
            f" {data[:4].hex(' ') or 'none'}",
            where=path,
            remedy=_AGAIN,
        )

    dtype = np.dtype(_DTYPES[data[2]])
    rank = data[3]
    start = 4 + 4 * rank
    if len(data) < start:
        raise DataError(
            f"expected a header of {start} bytes, found {len(data)} bytes in all",
            where=path,
            remedy=_AGAIN,
        )
    sizes = np.frombuffer(data[4:start], ">u4")
    shape = tuple(sizes.tolist())

    expected = start + math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        fault = "cut short" if len(data) < expected else "followed by other bytes"
        raise DataError(
            f"the file is {fault}: expected {expected} bytes for {list(shape)}, found"
            f" {len(data)}",
            where=path,
            remedy=_AGAIN,
        )

    values = np.frombuffer(data, dtype, offset=start).reshape(shape)
    return values.astype(dtype.newbyteorder("="))


def read_bytes(path: str | Path) -> bytes:
    """Read a file's bytes, unpacked if they are gzip, whatever the file's name."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise DataError(
            "there is no such file",
            where=path,
            remedy="check the path",
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise DataError(
            f"the file can't be read: {getattr(error, 'strerror', None) or error}",
            where=path,
            remedy="check the path and its permissions",
        ) from error
    if data[:2] != _GZIP:
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"the gzip data are damaged: {error}; {len(data)} bytes are there",
            where=path,
            remedy="download or pack the file again",
        ) from error
