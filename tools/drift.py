"""Measure how often a server's drift gauges fire: on resamples, and on shifted copies.

    python -m tools.drift --data ../shared/data/adult [--json FILE]

Training's rows are those of UCI Adult's first file. A window is filled with rows drawn
from its second file, which nobody trained on, as they are (no alarm may be on) or with
one thing changed (the alarm of that column must be on). The same windows are judged by
the rule of thumb as well, an index above 0.1, which does not ask how many rows there
are.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from lepton_jax.cli.settings import Parser
from lepton_jax.errors import LeptonError
from lepton_jax.ship.watch.reference import Reference, of_table
from lepton_jax.ship.watch.tallies import Tallies
from lepton_jax.ship.watch.window import Moved, Window
from tools.bench.cli import surroundings
from tools.bench.tasks.adult import COLUMNS

DATA = Path("../shared/data/adult")
TARGET = "income"
NUMBERS = ("age", "weight", "years", "gain", "loss", "hours")
RESAMPLES = 100
WINDOWS = (100, 500, 1_000, 5_000)  # rows
CHUNK = 1_000  # rows of a request
SEED = 0
RULE_OF_THUMB = 0.1  # of the population stability index

Change = Callable[[pl.DataFrame, np.random.Generator], pl.DataFrame]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(words)
    try:
        results = campaign(options)
    except LeptonError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json is not None:
        command = f"python -m tools.drift {' '.join(words)}"
        record = {**surroundings([]), "command": command, "results": results}
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def _parser() -> Parser:
    parser = Parser(prog="python -m tools.drift", description=__doc__)
    add = parser.add_argument
    add("--data", type=Path, default=DATA, metavar="FOLDER")
    add("--windows", type=int, nargs="+", default=WINDOWS, metavar="ROWS")
    add("--resamples", type=int, default=RESAMPLES, metavar="N")
    add("--seed", type=int, default=SEED, metavar="N")
    add("--json", type=Path, metavar="FILE")
    return parser


def campaign(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Fill the windows; return a row for each size and each change."""
    reference = of_table(read(options.data / "adult.data.gz"))
    later = read(options.data / "adult.test.gz")
    chance = np.random.default_rng(options.seed)
    results = []
    for rows in options.windows:
        for name, (column, what, change) in CHANGES.items():
            windows = [
                moved(reference, change(_drawn(later, rows, chance), chance), rows)
                for _ in range(options.resamples)
            ]
            results.append(
                {"rows": rows, "change": name} | rates(windows, column, what)
            )
            print(json.dumps(results[-1]), flush=True)
    return results


def moved(
    reference: Reference,
    table: pl.DataFrame,
    rows: int,
) -> list[Moved]:
    """Return how far a window has moved that was filled by requests."""
    tallies = Tallies(reference, Window(reference, rows))
    for chunk in table.iter_slices(CHUNK):
        tallies.add_rows(chunk.to_dict(as_series=False))
        tallies.count()
    return tallies.moved()


def rates(
    windows: list[list[Moved]],
    column: str | None,
    what: str | None,
) -> dict[str, Any]:
    """Return the shares of windows in which alarms were on.

    Args:
      windows: how far each has moved.
      column: the one that was changed; None: none was.
      what: the alarm that belongs to the change.

    Returns:
      "fired": windows with the alarm of the change; "false": windows with any alarm of
      another column; "false_by_rule_of_thumb": the same, judged by the index alone.
    """
    fired = 0
    false = 0
    false_by_rule = 0
    for window in windows:
        others = [one for one in window if one.column != column]
        false += any(any(one.alarms.values()) for one in others)
        false_by_rule += any(one.psi > RULE_OF_THUMB for one in others)
        for one in window:
            fired += one.column == column and what is not None and one.alarms[what]
    count = len(windows)
    return {
        "column": column,
        "alarm": what,
        "windows": count,
        "fired": None if column is None else fired / count,
        "false": false / count,
        "false_by_rule_of_thumb": false_by_rule / count,
    }


def read(path: Path) -> pl.DataFrame:
    """Return a file of Adult without the target; "?" is a missing cell."""
    with gzip.open(path, "rt") as file:
        lines = csv.reader(file, skipinitialspace=True)
        rows = [line for line in lines if len(line) == len(COLUMNS)]
    columns = dict(zip(COLUMNS, zip(*rows, strict=True), strict=True))
    series = [
        pl.Series(name, [None if cell == "?" else cell for cell in cells], pl.String)
        for name, cells in columns.items()
        if name != TARGET
    ]
    return pl.DataFrame(series).with_columns(pl.col(NUMBERS).cast(pl.Float64))


# ---- what is changed ----


def _drawn(
    table: pl.DataFrame,
    rows: int,
    chance: np.random.Generator,
) -> pl.DataFrame:
    """Return rows drawn with replacement: as any day's are."""
    return table[chance.integers(0, table.height, rows)]


def _as_is(table: pl.DataFrame, chance: np.random.Generator) -> pl.DataFrame:
    return table


def _plus(column: str, value: float) -> Change:
    def change(table: pl.DataFrame, chance: np.random.Generator) -> pl.DataFrame:
        return table.with_columns(pl.col(column) + value)

    return change


def _times(column: str, value: float) -> Change:
    def change(table: pl.DataFrame, chance: np.random.Generator) -> pl.DataFrame:
        return table.with_columns(pl.col(column) * value)

    return change


def _some(column: str, share: float, value: str | None) -> Change:
    """Return the change that puts a value into a share of the cells."""

    def change(table: pl.DataFrame, chance: np.random.Generator) -> pl.DataFrame:
        chosen = pl.Series(chance.random(table.height) < share)
        return table.with_columns(
            pl.when(chosen).then(pl.lit(value)).otherwise(pl.col(column)).alias(column)
        )

    return change


# By name: (the column, the alarm that must be on, what is done to the rows).
CHANGES: dict[str, tuple[str | None, str | None, Change]] = {
    "none": (None, None, _as_is),
    "everybody is ten years older": ("age", "distribution", _plus("age", 10)),
    "hours are minutes": ("hours", "distribution", _times("hours", 60)),
    "the weight is in thousands": ("weight", "distribution", _times("weight", 1e-3)),
    "half of the women are missing": (
        "sex",
        "distribution",
        lambda table, chance: table.filter(
            (pl.col("sex") != "Female") | pl.Series(chance.random(table.height) < 0.5)
        ),
    ),
    "a third work as clerks": (
        "occupation",
        "distribution",
        _some("occupation", 1 / 3, "Adm-clerical"),
    ),
    "a tenth have a new job": ("occupation", "unseen", _some("occupation", 0.1, "Gig")),
    "a twentieth have a new word": ("work", "unseen", _some("work", 0.05, "private")),
    "a fifth lack the country": ("country", "missing", _some("country", 0.2, None)),
    "a tenth lack the age": ("age", "missing", _some("age", 0.1, None)),
}


if __name__ == "__main__":
    sys.exit(main())
