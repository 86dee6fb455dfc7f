"""Readers: files, folders and tables in memory, as pieces of traceable rows."""

from lepton_jax.data.extras import needs

needs("polars", extra="data", purpose="reading raw data")

from lepton_jax.data.readers.opening import reader_of  # noqa: E402
from lepton_jax.data.readers.reader import (  # noqa: E402
    NOTES,
    ROW,
    SOURCE,
    Column,
    Piece,
    Reader,
    Rows,
    no_notes,
)

__all__ = [
    "NOTES",
    "ROW",
    "SOURCE",
    "Column",
    "Piece",
    "Reader",
    "Rows",
    "no_notes",
    "reader_of",
]
