"""NumPy's files: an array (.npy), and several as columns (.npz)."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np

from lepton_jax.data.readers.array_files import ArrayFile, ArrayFilesReader
from lepton_jax.data.readers.files import Stored
from lepton_jax.data.readers.memory import MemoryReader, table_of
from lepton_jax.errors import DataError

MAGIC = b"\x93NUMPY"
HEADER = 2**16  # bytes of a header at most, by the format's first version
LARGEST = 2**32  # bytes of an array that is read at once; assumption


def numpy_file(stored: Stored) -> ArrayFile:
    """Return the array in a .npy file.

    Raises:
      DataError: it is damaged, or holds Python objects.
    """
    head = io.BytesIO(stored.read(0, HEADER))
    try:
        version = np.lib.format.read_magic(head)
        if version == (1, 0):
            header = np.lib.format.read_array_header_1_0(head)
        else:
            header = np.lib.format.read_array_header_2_0(head)
        shape, is_fortran, dtype = header
    except (ValueError, EOFError, SyntaxError) as error:
        raise DataError(
            f"the header can't be read: {error}",
            where=stored,
            remedy="get the file again: it is cut short or damaged",
        ) from error
    if dtype.hasobject:
        raise DataError(
            "the array holds Python objects, and reading them runs code",
            where=stored,
            remedy="save an array of numbers, or write a table as Parquet",
        )
    if not shape or any(size < 0 for size in shape):
        raise DataError(
            f"the array has the shape {list(shape)}: there are no rows",
            where=stored,
            remedy="save an array with the rows along its first dim",
        )
    if is_fortran and len(shape) > 1:
        raise DataError(
            "the array is stored column by column",
            where=stored,
            remedy="save it anew with numpy.ascontiguousarray",
        )
    return ArrayFile(stored, dtype, shape, head.tell())


def reader_of_npy(stored: Stored) -> ArrayFilesReader | MemoryReader:
    """Return the reader of one array: 2 dims are columns, as in memory.

    Raises:
      DataError: as `numpy_file`.
    """
    file = numpy_file(stored)
    if len(file.shape) != 2 and file.dtype.names is None:
        key = "column_1" if len(file.shape) == 1 else "values"
        return ArrayFilesReader(stored.name, {key: file})
    if file.shape[0] * file.row_bytes > LARGEST:
        raise file.error(f"the array has more than {LARGEST:,} bytes")
    file.check_end()
    content = np.frombuffer(file.content(0, file.shape[0]), file.dtype)
    table = table_of(content.reshape(file.shape), str(stored))
    return MemoryReader(table, stored.name, "the file's own type")


def reader_of_npz(entries: Sequence[Stored]) -> ArrayFilesReader:
    """Return the reader of several arrays, one a column."""
    files = {entry.entry.removesuffix(".npy"): numpy_file(entry) for entry in entries}
    return ArrayFilesReader(entries[0].path, files)
