"""The passes over the rows that a list of steps needs.

A step whose state is fitted must have seen all rows before it can be applied. Each
fitting would thus be a pass of its own; two share one if the later does not depend on
what the earlier one will do to the rows:

    FillMissing("age")     pass 1 fits the median of age ...
    Standardize(["age"])   ... which this one must wait for: pass 2
    Vocabulary("job")      ... but this one need not: pass 1
                           pass 3 applies all three, and writes

What a fitting depends on is observed, not declared: Polars asks a source only for the
columns that a query needs. What a fitted step does to the rows is declared by its
method `writes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import polars as pl
from polars.io.plugins import register_io_source

from lepton_jax.data.prepare.step import SPLIT, Fitted, Step
from lepton_jax.errors import LeptonError


class Pass(NamedTuple):
    """A pass over all pieces.

    Attributes:
      settled: number of leading steps whose states are all known: they are applied.
      fits: numbers of the steps whose partial states are taken; none in the last pass.
      applied: numbers of the steps after `settled` that are applied before a partial
        state is taken.
    """

    settled: int
    fits: tuple[int, ...] = ()
    applied: tuple[int, ...] = ()


def plan_passes(
    steps: Sequence[Step],
    schemas: Sequence[pl.Schema],
) -> list[Pass]:
    """Return as few passes as the steps allow; the last one writes.

    Args:
      steps: in their order.
      schemas: columns before each step.
    """
    passes: list[Pass] = []
    known: set[int] = set()
    while True:
        unknown = [
            number
            for number, step in enumerate(steps)
            if isinstance(step, Fitted) and number not in known
        ]
        if not unknown:
            return [*passes, Pass(settled=len(steps))]
        planned = _next_pass(steps, schemas, known, unknown[0])
        passes.append(planned)
        known.update(planned.fits)


def _next_pass(
    steps: Sequence[Step],
    schemas: Sequence[pl.Schema],
    known: set[int],
    first: int,
) -> Pass:
    """Return the pass that fits the step number `first`, and all that it can besides.

    Args:
      steps: in their order.
      schemas: columns before each step.
      known: numbers of the steps whose states are known.
      first: number of the first step whose state is not.
    """
    fits: list[int] = []
    applied: list[int] = []
    unsure: set[str] = set()
    for number in range(first, len(steps)):
        step = steps[number]
        if number in known or not isinstance(step, Fitted):
            # A known state is not at hand here, so that what such a step does to the
            # rows can't be observed.
            if isinstance(step, Fitted):
                break
            applied.append(number)
            continue

        if number != first:
            chain = [steps[other] for other in applied]
            is_split = SPLIT in schemas[number]
            needed = _needed(step, chain, schemas[first], is_split)
            if needed is None or needed & unsure:
                break
        fits.append(number)
        written = step.writes()
        if written is None:
            break
        unsure.update(written)

    used = [number for number in applied if fits and number < fits[-1]]
    return Pass(settled=first, fits=tuple(fits), applied=tuple(used))


def _needed(
    step: Fitted,
    chain: Sequence[Step],
    schema: pl.Schema,
    is_split: bool,
) -> set[str] | None:
    """Return the columns that fitting a step after others asks for.

    Returns:
      None if it needs a column that is not there yet.
    """

    def query(table: pl.LazyFrame) -> pl.LazyFrame:
        for other in chain:
            table = other.run(table, None).table
        return step.partial(fitting_rows(step, table, is_split))

    try:
        return columns_asked(schema, query)
    except (LeptonError, pl.exceptions.PolarsError):
        return None


def columns_asked(
    schema: pl.Schema,
    query: Callable[[pl.LazyFrame], pl.LazyFrame],
) -> set[str]:
    """Return the columns of a table without rows that a query asks for."""
    asked: set[str] = set()

    def empty(
        columns: list[str] | None,
        predicate: pl.Expr | None,
        rows: int | None,
        batch: int | None,
    ) -> Iterator[pl.DataFrame]:
        frame = pl.DataFrame(schema=schema)
        if columns is not None:
            frame = frame.select(columns)
        asked.update(frame.columns)
        if predicate is not None:
            frame = frame.filter(predicate)
        yield frame

    query(register_io_source(empty, schema=schema)).collect(engine="in-memory")
    return asked


def fitting_rows(step: Fitted, table: pl.LazyFrame, is_split: bool) -> pl.LazyFrame:
    """Return the rows that a step may learn from.

    Args:
      step: the step.
      table: rows of a piece.
      is_split: whether a step before it splits the rows.
    """
    if is_split and step.fits_on == "train":
        return table.filter(pl.col(SPLIT) == "train")
    return table


def describe(steps: Sequence[Step], passes: Sequence[Pass]) -> list[dict[str, Any]]:
    """Return the passes as plain data."""
    names = [type(step).__name__ for step in steps]
    return [
        {
            "applies": names[: one.settled],
            "fits": [names[number] for number in one.fits],
        }
        for one in passes
    ]
