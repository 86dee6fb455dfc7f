"""Raw rows of a request, as an artifact prepares them.

In JSON a picture is its file in base64, with or without "data:image/png;base64,"
before it; in a binary tensor it is the file itself.
"""

from __future__ import annotations

import base64
import binascii
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lepton_jax.errors import LeptonError
from lepton_jax.ship.serve.protocol import Request
from lepton_jax.ship.serve.refusal import Refusal, bad, broken

IMAGE = "image"  # kind of a column

log = logging.getLogger("lepton.serve")


def columns_to_rows(
    request: Request,
    artifact: Any,
) -> list[dict[str, Any]]:
    """Return the rows of a request whose tensors are columns.

    Raises:
      Refusal: a picture in JSON is no base64, or a text is no UTF-8.
    """
    kinds = {column.name: column.kind for column in artifact.columns}
    cells = {
        name: [_cell(cell, name, kinds[name], request.is_binary) for cell in column]
        for name, column in _flat(request.inputs).items()
    }
    return [
        {name: column[number] for name, column in cells.items()}
        for number in range(request.rows)
    ]


def checked_rows(
    rows: Any,
    artifact: Any,
    most_rows: int,
) -> list[dict[str, Any]]:
    """Return the rows of a JSON request, with pictures as bytes.

    Raises:
      Refusal: they are no rows.
    """
    if isinstance(rows, Mapping):
        rows = [rows]
    is_list = type(rows) is list and all(type(row) is dict for row in rows)
    if not is_list:
        raise bad("'rows' is no list of objects, one for each row")
    if not 1 <= len(rows) <= most_rows:
        raise bad(f"{len(rows)} rows are sent; send 1 to {most_rows} in a request")
    pictures = [column.name for column in artifact.columns if column.kind == IMAGE]
    if not pictures:
        return rows
    return [_with_pictures(row, pictures) for row in rows]


def prepare(
    artifact: Any,
    rows: Sequence[Mapping[str, Any]],
) -> dict[str, np.ndarray]:
    """Return the program's inputs of raw rows.

    Raises:
      Refusal: 400, they can't be prepared.
    """
    try:
        inputs = artifact.prepare(list(rows))
    except LeptonError as error:
        place = f" ({error.where})" if error.where else ""
        raise bad(f"{error.what}{place}; {error.remedy}") from error
    except Exception as error:
        # a fault of the preparation, which must not end the server
        log.exception("the preparation of raw rows failed")
        raise broken(f"the rows can't be prepared: {type(error).__name__}") from error
    counts = {len(array) for array in inputs.values()}
    if counts != {len(rows)}:
        raise bad(f"{len(rows)} rows are sent, but {max(counts)} can be used")
    return inputs


# ---- internals ----


def _flat(columns: Mapping[str, np.ndarray]) -> dict[str, list]:
    """Return each column as a list, also if it came as (rows, 1)."""
    return {name: column.reshape(-1).tolist() for name, column in columns.items()}


def _cell(
    cell: Any,
    name: str,
    kind: str,
    is_binary: bool,
) -> Any:
    """Return a cell as the preparation reads it."""
    if isinstance(cell, float) and math.isnan(cell):
        return None
    if not isinstance(cell, bytes):
        return cell
    if kind == IMAGE:
        return cell if is_binary else _picture(cell.decode(), name)
    try:
        return cell.decode()
    except UnicodeDecodeError as error:
        raise bad(f"column {name!r} holds bytes that are no UTF-8") from error


def _with_pictures(
    row: Mapping[str, Any],
    names: Sequence[str],
) -> dict[str, Any]:
    pictures = {
        name: _picture(row[name], name)
        for name in names
        if isinstance(row.get(name), str)
    }
    return {**row, **pictures}


def _picture(text: str, name: str) -> bytes:
    """Return the bytes of a picture's file.

    Raises:
      Refusal: the text is no base64.
    """
    _, _, content = text.rpartition(",")
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise bad(f"column {name!r} is no picture in base64: {error}") from error


def refusal_of(error: LeptonError) -> Refusal:
    """Return the refusal of inputs that the model can't take."""
    return bad(f"{error.what}; {error.remedy}")
