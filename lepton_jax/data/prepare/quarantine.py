"""The rows that were dropped, changed or flagged, each with its reason.

A file of the quarantine has a row for each note: the note's columns, which begin with
"lepton.", and the row as it was read. It can be corrected and given to the preparation
as one more source: the note's columns are left out when it is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from lepton_jax.data.prepare.preparation import RESERVED
from lepton_jax.data.prepare.store import checksum, replacing
from lepton_jax.data.readers.reader import ROW, SOURCE

FOLDER = "quarantine"


def write_quarantine(
    folder: Path,
    name: str,
    notes: pl.DataFrame,
    raw: pl.DataFrame,
) -> dict[str, Any]:
    """Write the notes of a piece next to the rows that they are about.

    Args:
      folder: of the preparation.
      name: of the piece.
      notes: as steps give them.
      raw: rows of the piece as they were read.

    Returns:
      The file's path, rows, bytes and checksum.
    """
    renamed = notes.rename(
        {
            column: f"{RESERVED}{column}"
            for column in notes.columns
            if not column.startswith(RESERVED)
        }
    )
    rows = raw.drop(SOURCE)
    table = renamed.join(rows, on=ROW, how="left", maintain_order="left")

    path = folder / FOLDER / f"{name}.parquet"
    with replacing(path) as draft:
        table.write_parquet(draft, compression="zstd")
        size = draft.stat().st_size
        digest = checksum(draft)
    return {
        "path": f"{FOLDER}/{path.name}",
        "rows": table.height,
        "bytes": size,
        "sha256": digest,
    }
