"""The format of a file, by its first bytes, its name, and how its lines look."""

from __future__ import annotations

from pathlib import Path

from lepton_jax.data.csv_file import OTHER_FORMATS
from lepton_jax.data.readers import arrow, idx, numpy_files
from lepton_jax.data.readers.dialect import CsvSettings, looks_delimited
from lepton_jax.data.readers.encoding import encoding_of
from lepton_jax.data.readers.files import Stored
from lepton_jax.errors import DataError

FIRST = 2**16  # bytes by which a format is recognised; assumption

ENDINGS = {
    "csv": (".csv", ".tsv", ".tab", ".psv"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet", ".pq"),
    "arrow": (".arrow", ".feather", ".ipc", ".arrows"),
    "images": (
        ".jpg",
        ".jpeg",
        ".png",
        ".gif",
        ".bmp",
        ".webp",
        ".tif",
        ".tiff",
        ".ppm",
    ),
    "numpy": (".npy", ".npz"),
    "text": (".md", ".rst"),
}
_BY_ENDING = {ending: name for name, all_ in ENDINGS.items() for ending in all_}

_IMAGES = (
    b"\xff\xd8\xff",  # JPEG
    b"\x89PNG",
    b"GIF8",
    b"II*\0",  # TIFF
    b"MM\0*",
)
_UNREAD = (
    *OTHER_FORMATS[2:],
    (b"\x89HDF", "an HDF5 file"),
    (b"\x80\x02", "a pickle, and opening one runs code"),
    (b"\x80\x03", "a pickle, and opening one runs code"),
    (b"\x80\x04", "a pickle, and opening one runs code"),
    (b"\x80\x05", "a pickle, and opening one runs code"),
    (b"%PDF", "a PDF document"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"Rar!", "a RAR archive"),
    (b"\x28\xb5\x2f\xfd", "packed by zstd"),
)


def format_of(file: Stored) -> str:
    """Return the name of a file's format.

    Raises:
      DataError: it is of no format that is read.
    """
    first = file.read(0, FIRST)
    if first.startswith(b"PAR1"):
        return "parquet"
    if first.startswith((arrow.MAGIC, arrow.STREAM)):
        return "arrow"
    if first.startswith(numpy_files.MAGIC):
        return "numpy"
    for mark, name in _UNREAD:
        if first.startswith(mark):
            raise DataError(
                f"the file is {name}",
                where=file,
                remedy="export the data as CSV, Parquet or JSON lines",
            )
    named = _BY_ENDING.get(Path(file.name).suffix.lower())
    if named is not None:
        return named
    if "idx" in file.name or idx.is_idx(first):
        return "idx"
    if first.startswith(_IMAGES) or first[8:12] == b"WEBP":
        return "images"
    return _of_text(file, first)


def _of_text(file: Stored, first: bytes) -> str:
    """Return the format of a file whose name does not tell."""
    if not first.strip():
        raise DataError(
            "the file is empty",
            where=file,
            remedy="give a file with rows",
        )
    encoding = encoding_of(first, None, file)
    if encoding.name == "utf-8" and b"\0" in first:
        raise DataError(
            f"the file is of no format that is read: it begins with"
            f" {first[:8].hex(' ')}",
            where=file,
            remedy="export the data as CSV, Parquet or JSON lines, or set `format`",
        )
    text, _ = encoding.to_utf8(first[encoding.mark :])
    if text.lstrip().startswith(b"{"):
        return "jsonl"
    return "csv" if looks_delimited(text, CsvSettings()) else "text"
