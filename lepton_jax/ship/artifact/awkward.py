"""Raw rows that are not as they should be, made of rows that are.

A served model meets missing values, categories that training never saw, and files that
are no pictures. Whether it treats them as the trainer does can only be known from rows
of that kind, and held-out rows may have none:

    {"age": 39, "job": "clerk"}
      -> {"age": None, "job": "clerk"}
      -> {"age": 39, "job": None}
      -> {"age": 39, "job": "(unseen)"}
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

UNSEEN = "(unseen)"
BEGINNING = 0.5  # share of a file that is left of a broken one; assumption
FAR = 1e6  # a number that training is unlikely to have seen; assumption


def awkward_rows(rows: Any, most: int) -> Any:
    """Return some rows with one cell each that is missing, unseen or broken.

    Args:
      rows: a Polars table.
      most: rows to return.

    Returns:
      A table with the same columns and `most` rows; each thing that can be wrong comes
      up about as often.
    """
    cells = list(_cells(rows))
    if len(cells) > most:  # of a wide table, from all over it
        cells = cells[
            :: -(
                -len(cells)
                // max(
                    1,
                    most,
                )
            )
        ]
    made = []
    for number, (column, value) in zip(
        range(most),
        itertools.cycle(cells),
    ):
        row = rows.row(
            number % rows.height,
            named=True,
        )
        made.append({**row, column: value})
    return type(rows)(
        made,
        schema=rows.schema,
        orient="row",
    )


# ---- internals ----


def _cells(rows: Any) -> Iterator[tuple[str, Any]]:
    """Yield a column and a value for it, for each thing that can be wrong with it."""
    import polars as pl  # an extra: a model of arrays alone does not need it

    for name, dtype in rows.schema.items():
        yield name, None
        if dtype == pl.String:
            yield name, UNSEEN
            yield name, ""
        elif dtype == pl.Binary:
            first = rows[name].drop_nulls().to_list()[:1]
            yield name, b""
            for content in first:
                yield name, content[: int(len(content) * BEGINNING)]
        elif dtype.is_float():
            yield name, FAR
