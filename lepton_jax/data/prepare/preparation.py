"""A preparation: sources, steps, and what comes out, as data."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import polars as pl

from lepton_jax.data import readers
from lepton_jax.data.prepare.step import SPLIT, Fitted, Step
from lepton_jax.data.readers.reader import ROW, SOURCE, Column, Reader
from lepton_jax.errors import DataError, nearest

MIB = 2**20
GIB = 2**30
# Assumption: small enough that a few fit into memory at once, large enough that what a
# piece costs in files and calls is less than 1 % of the work on it.
PIECE_BYTES = 32 * MIB
MEMORY = 2 * GIB
# Names that Lepton keeps for its own columns; a source's columns of such a name, as in
# a quarantine file that is taken in again, are left out.
RESERVED = "lepton."
SOURCE_NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class Preparation:
    """Raw sources, the steps that prepare them, and the samples that come out.

    Attributes:
      sources: a name for each source: a path, a table in memory, or a `Reader` where a
        dialect must be given. Their rows are one table, in the order of the sources; a
        step such as a join may do otherwise with them.
      steps: applied in this order.
      inputs: columns of a sample; None: all but the target.
      target: the column to predict, or several; None: there is none.
      output: "parquet", or "arrayrecord" for samples that are read singly.
      piece_bytes: bytes of a source that are read at once.
      memory: bytes that the pieces under way may take, all workers together.
    """

    sources: Mapping[str, Any]
    steps: Sequence[Step] = ()
    inputs: Sequence[str] | None = None
    target: str | Sequence[str] | None = None
    output: Literal["parquet", "arrayrecord"] = "parquet"
    piece_bytes: int = PIECE_BYTES
    memory: int = MEMORY

    @property
    def targets(self) -> tuple[str, ...]:
        """The columns to predict."""
        return targets_of(self.target)


@dataclass(frozen=True)
class Checked:
    """A preparation of which all is known but the rows.

    Attributes:
      names: of the sources.
      readers: of the sources, in the same order.
      columns: what was inferred of each source's columns.
      schemas: columns before each step, and after the last one.
      outputs: columns that are written, in their order.
    """

    preparation: Preparation
    names: tuple[str, ...]
    readers: tuple[Reader, ...]
    columns: tuple[tuple[Column, ...], ...]
    schemas: tuple[pl.Schema, ...]
    outputs: tuple[str, ...]

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps."""
        return tuple(self.preparation.steps)

    @property
    def raw(self) -> pl.Schema:
        """Columns of all sources together, with SOURCE and ROW."""
        return self.schemas[0]

    @property
    def is_split(self) -> bool:
        """Whether a step splits the rows."""
        return SPLIT in self.schemas[-1]


def targets_of(target: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of the columns to predict: none, one or several."""
    if target is None:
        return ()
    return (target,) if isinstance(target, str) else tuple(target)


def check(preparation: Preparation) -> Checked:
    """Check a preparation as far as it can be without reading rows.

    Raises:
      DataError: a source can't be opened, a step does not fit the columns before it, a
        statistic would be fitted before the rows are split, or the inputs or the target
        name no column.
    """
    _check_settings(preparation)
    opened = [
        _opened(
            source,
        )
        for source in preparation.sources.values()
    ]
    columns = tuple(tuple(reader.columns()) for reader in opened)
    names = tuple(preparation.sources)
    schemas = [raw_schema(names, columns)]
    for number, step in enumerate(preparation.steps):
        schemas.append(_after(step, number, schemas[-1]))
    _check_fits(preparation.steps, schemas)
    return Checked(
        preparation=preparation,
        names=names,
        readers=tuple(opened),
        columns=columns,
        schemas=tuple(schemas),
        outputs=_outputs(preparation, schemas[-1]),
    )


def _check_settings(preparation: Preparation) -> None:
    if not preparation.sources:
        raise DataError(
            "the preparation has no source",
            where="Preparation.sources",
            remedy='name one: sources={"people": "people.csv"}',
        )
    for name in preparation.sources:
        if not SOURCE_NAME.fullmatch(name):
            raise DataError(
                f"{name!r} can't be the name of a source",
                where="Preparation.sources",
                remedy="use letters, digits, '.', '_' and '-'",
            )
    for number, step in enumerate(preparation.steps):
        if not isinstance(step, Step):
            raise DataError(
                f"{step!r} is no step",
                where=f"Preparation.steps[{number}]",
                remedy="list steps of lepton_jax.data.prepare, or a Step of your own",
            )
    if preparation.output not in ("parquet", "arrayrecord"):
        known = ("parquet", "arrayrecord")
        raise DataError(
            f"{preparation.output!r} is no output{nearest(preparation.output, known)}",
            where="Preparation.output",
            remedy="take 'parquet' or 'arrayrecord'",
        )
    for field in ("piece_bytes", "memory"):
        if getattr(preparation, field) < 1:
            raise DataError(
                f"{field} is {getattr(preparation, field)}",
                where=f"Preparation.{field}",
                remedy="give a number of bytes above 0",
            )


def _opened(source: Any) -> Reader:
    if isinstance(source, Reader):
        return source
    return readers.reader_of(source)  # type: ignore[attr-defined, unused-ignore]


def raw_schema(
    names: Sequence[str],
    columns: Sequence[Sequence[Column]],
) -> pl.Schema:
    """Return the columns of all sources together.

    Raises:
      DataError: two sources disagree on the type of a column.
    """
    schema: dict[str, Any] = {SOURCE: pl.UInt32(), ROW: pl.UInt64()}
    first: dict[str, str] = {}
    for source, of_source in zip(names, columns, strict=True):
        for column in of_source:
            if column.name.startswith(RESERVED):
                continue
            known = schema.get(column.name, column.type)
            common = _common(known, column.type)
            if common is None:
                raise DataError(
                    f"the column {column.name!r} is {known} in"
                    f" {first[column.name]!r} and {column.type} in {source!r}",
                    where=source,
                    remedy=(
                        "read both with the same type: reader_of(...) takes the"
                        " dialect and the types of a source"
                    ),
                )
            schema[column.name] = common
            first.setdefault(column.name, source)
    return pl.Schema(schema)


def _common(
    one: pl.DataType,
    other: pl.DataType,
) -> pl.DataType | None:
    """Return a type that holds the values of both; None: only text would."""
    if one == other:
        return one
    if one == pl.Null:
        return other
    if other == pl.Null:
        return one
    if one.is_numeric() and other.is_numeric():
        both = [
            pl.DataFrame(
                schema={"value": kind},
            )
            for kind in (one, other)
        ]
        return pl.concat(both, how="vertical_relaxed").schema["value"]
    return None


def _after(
    step: Step,
    number: int,
    schema: pl.Schema,
) -> pl.Schema:
    """Return the columns after a step.

    Raises:
      DataError: the step does not fit; the message says which step it is.
    """
    place = f"Preparation.steps[{number}], {type(step).__name__}"
    try:
        after = step.check(schema)
    except DataError as error:
        where = f"{place}: {error.where}" if error.where else place
        raise DataError(
            error.what,
            where=where,
            remedy=error.remedy,
        ) from error
    except pl.exceptions.PolarsError as error:
        message = str(error).partition("\n")[0]
        raise DataError(
            f"the step does not fit the columns before it: {message}",
            where=place,
            remedy=f"the columns there are: {', '.join(_given(schema))}",
        ) from error
    for name in (SOURCE, ROW):
        assert name in after, f"{place} loses {name}, which must go with each row"
    return after


def _given(schema: pl.Schema) -> list[str]:
    """Return the columns that are not Lepton's own."""
    return [name for name in schema if not name.startswith(RESERVED)]


def _check_fits(
    steps: Sequence[Step],
    schemas: Sequence[pl.Schema],
) -> None:
    """Raise DataError if a statistic would see rows of the test split."""
    split_at = [
        number
        for number, schema in enumerate(
            schemas,
        )
        if SPLIT in schema
    ]
    if not split_at:
        return
    for number, step in enumerate(steps[: split_at[0]]):
        if isinstance(step, Fitted) and step.fits_on == "train":
            raise DataError(
                f"{type(step).__name__} learns from the rows, and stands before"
                f" {type(steps[split_at[0] - 1]).__name__}: it would learn from the"
                " rows of all splits",
                where=f"Preparation.steps[{number}]",
                remedy="put the step that splits the rows before it",
            )


def _outputs(
    preparation: Preparation,
    schema: pl.Schema,
) -> tuple[str, ...]:
    known = _given(schema)
    target = preparation.targets
    inputs = preparation.inputs
    if inputs is None:
        inputs = [name for name in known if name not in target]
    for field, names in (("inputs", inputs), ("target", target)):
        for name in names:
            if name in known:
                continue
            raise DataError(
                f"there is no column {name!r} after the steps{nearest(name, known)}",
                where=f"Preparation.{field}",
                remedy=f"the columns there are: {', '.join(known)}",
            )
    return tuple(dict.fromkeys([*inputs, *target]))
