"""A folder of prepared samples: what was made, and the steps that made it."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

import lepton_jax.data.prepare.steps  # noqa: F401  the registry is what it imports
from lepton_jax.data import readers
from lepton_jax.data.prepare import manifest as manifests
from lepton_jax.data.prepare.passes import columns_asked
from lepton_jax.data.prepare.pieces import collected, fit_columns
from lepton_jax.data.prepare.preparation import RESERVED, targets_of
from lepton_jax.data.prepare.shards import read_shard
from lepton_jax.data.prepare.step import Fitted, Step
from lepton_jax.data.prepare.store import checksum, read_arrow, read_json
from lepton_jax.data.readers.reader import ROW, SOURCE
from lepton_jax.errors import DataError, nearest

PACKAGE = "lepton_jax."
PIECE_BYTES = 2**26  # of a source that are read at once; assumption
WHOLE = 2**62  # bytes: more than a source has, so that it is one piece


class FittedStep(NamedTuple):
    """A step and what it has learned.

    Attributes:
      step: with its arguments.
      state: None: it learns nothing.
    """

    step: Step
    state: pl.DataFrame | None


def open_prepared(
    folder: str | Path,
    *,
    classes: Sequence[type[Step]] = (),
    sources: Sequence[readers.Reader] = (),
) -> Prepared:
    """Open a folder that `prepare` has written.

    Args:
      folder: the folder.
      classes: of a spec's own steps, which are not part of Lepton.
      sources: readers of the sources that it was made of, in their order.

    Raises:
      DataError: there is no manifest in it, or it is of a newer format.
    """
    path = Path(folder) / manifests.NAME
    if not path.is_file():
        raise DataError(
            f"there is no {manifests.NAME} in the folder",
            where=folder,
            remedy="make it: lepton prepare SPEC.py --out DIR",
        )
    try:
        manifest = read_json(path)
    except ValueError as error:
        raise DataError(
            f"{manifests.NAME} is damaged: {error}",
            where=path,
            remedy="prepare again: lepton prepare SPEC.py --out DIR",
        ) from error
    if manifest["format"] > manifests.FORMAT:
        raise DataError(
            f"the folder has format {manifest['format']}; this version of Lepton reads"
            f" up to {manifests.FORMAT}",
            where=path,
            remedy="install a newer lepton-jax",
        )
    return Prepared(Path(folder), manifest, classes, sources)


class Prepared:
    """Prepared samples, and the steps that prepare more of them.

    Attributes:
      folder: where they are.
      manifest: all that is known of them; see docs/data.md.
    """

    def __init__(
        self,
        folder: Path,
        manifest: dict[str, Any],
        classes: Sequence[type[Step]] = (),
        sources: Sequence[readers.Reader] = (),
    ):
        self.folder = folder
        self._sources = tuple(sources)
        self.manifest = manifest
        self._classes = {kind.__name__: kind for kind in classes}

    def __repr__(self) -> str:
        splits = self.manifest["splits"].items()
        rows = ", ".join(f"{name} {split['rows']:,}" for name, split in splits)
        return f"Prepared({str(self.folder)!r}: {rows} rows)"

    @property
    def splits(self) -> list[str]:
        """Names of the splits, training first."""
        return list(self.manifest["splits"])

    @property
    def inputs(self) -> list[str]:
        """Columns of a sample."""
        return list(self.manifest["inputs"])

    @property
    def target(self) -> str | list[str] | None:
        """The column to predict, or several; None: there is none."""
        return self.manifest["target"]

    @property
    def targets(self) -> tuple[str, ...]:
        """The columns to predict."""
        return targets_of(self.target)

    @property
    def outputs(self) -> list[str]:
        """Columns of the shards: the inputs, then the targets."""
        return [column["name"] for column in self.manifest["schema"]]

    def shards(self, split: str = "train") -> list[Path]:
        """Return the files of a split, in the order of its rows.

        Raises:
          DataError: there is no such split.
        """
        splits = self.manifest["splits"]
        if split not in splits:
            raise DataError(
                f"there is no split {split!r}{nearest(split, splits)}",
                where=self.folder,
                remedy=f"the splits are: {', '.join(splits)}",
            )
        return [
            self.folder / entry["path"]
            for entry in self.manifest["shards"]
            if entry["split"] == split
        ]

    def table(
        self,
        split: str = "train",
        *,
        traced: bool = False,
    ) -> pl.DataFrame:
        """Return the rows of a split.

        Args:
          split: its name.
          traced: whether the number of its source and of the row go with each row.

        Raises:
          DataError: there is no such split, or a shard is gone.
        """
        tables = [
            self._shard(
                path,
            )
            for path in self.shards(split)
        ]
        table = pl.concat(tables, rechunk=True)
        return table if traced else table.select(self.outputs)

    def raw_rows(
        self,
        split: str,
        numbers: np.ndarray | None = None,
    ) -> pl.DataFrame | None:
        """Return the rows of a split as they were read, before any step.

        Args:
          split: its name.
          numbers: of the wanted rows of the split; None: all.

        Returns:
          The rows in the order of the split; None where the sources are not known, as
          in a folder that was opened later.

        Raises:
          DataError: a source can't be read any more.
        """
        if not self._sources:
            return None
        wanted = self.table(split, traced=True).select(SOURCE, ROW)
        if numbers is not None:
            wanted = wanted[numbers]
        parts = [
            self._raw_part(number, wanted.filter(pl.col(SOURCE) == number).select(ROW))
            for number in wanted[SOURCE].unique().sort()
        ]
        found = pl.concat(parts, how="diagonal_relaxed")
        joined = wanted.join(
            found,
            on=[SOURCE, ROW],
            how="left",
            maintain_order="left",
        )
        return joined.drop(SOURCE, ROW)

    def _raw_part(self, number: int, wanted: pl.DataFrame) -> pl.DataFrame:
        """Read the wanted rows of one source, piece by piece."""
        reader = self._sources[number]
        unique = wanted.unique()
        parts = [
            reader.read(piece).table.join(unique, on=ROW, how="semi")
            for piece in reader.pieces(PIECE_BYTES)
        ]
        source = pl.lit(number, pl.UInt32).alias(SOURCE)
        return pl.concat(parts, how="diagonal_relaxed").with_columns(source)

    def _shard(self, path: Path) -> pl.DataFrame:
        if not path.exists():
            raise DataError(
                "a shard that the manifest names is gone",
                where=path,
                remedy="prepare again: what is missing is made anew",
            )
        return read_shard(path, self.schema)

    @cached_property
    def schema(self) -> pl.Schema:
        """Columns of a shard, with SOURCE and ROW."""
        return read_arrow(
            self.folder / self.manifest["columns"]["path"],
        ).schema

    def quarantine(self) -> pl.DataFrame:
        """Return the notes of all rows that were dropped, changed or flagged.

        The note's columns begin with "lepton."; `lepton.step` is the number of the
        step, -1 for the reader, `lepton.step_name` its class. The others are the row as
        it was read.
        """
        files = self.manifest["quarantine"]["files"]
        tables = [
            pl.read_parquet(
                self.folder / file["path"],
            )
            for file in files
        ]
        if not tables:
            return pl.DataFrame()
        steps = [entry["arguments"]["step"] for entry in self.manifest["steps"]]
        names = pl.DataFrame(
            {"lepton.step": range(-1, len(steps))},
        ).select(
            pl.col("lepton.step").cast(pl.Int32),
            pl.Series("lepton.step_name", ["reader", *steps]),
        )
        notes = pl.concat(tables, how="vertical")
        return notes.join(
            names,
            on="lepton.step",
            how="left",
            maintain_order="left",
        )

    def verify(self) -> None:
        """Check the checksums of all files.

        Raises:
          DataError: a file is gone, or is not as it was written.
        """
        for file in files_of(self.manifest):
            path = self.folder / file["path"]
            if path.exists() and checksum(path) == file["sha256"]:
                continue
            raise DataError(
                "a file that the manifest names is gone or has changed",
                where=path,
                remedy="remove it and prepare again: it is made anew",
            )

    # ---- the steps ----

    @cached_property
    def steps(self) -> list[FittedStep]:
        """The steps with their states.

        Raises:
          DataError: a step is a spec's own, and its class was not given.
        """
        steps = []
        for entry in self.manifest["steps"]:
            file = entry["state"]
            state = read_arrow(self.folder / file["path"]) if file else None
            steps.append(
                FittedStep(self._restored(entry["arguments"]), state),
            )
        return steps

    def _restored(self, arguments: Mapping[str, Any]) -> Step:
        name = arguments["step"]
        known = public_steps() | self._classes
        if name not in known:
            raise DataError(
                f"the step {name} is not one of Lepton's: it was defined by the spec"
                f"{nearest(name, known)}",
                where=self.folder / manifests.NAME,
                remedy=(
                    "give its class: open_prepared(folder, classes=[...]); to predict"
                    " without the spec's file, use Lepton's steps alone"
                ),
            )
        fields = {
            field.name
            for field in dataclasses.fields(
                known[name],
            )
        }
        given = {
            key: _tuples(
                value,
            )
            for key, value in arguments.items()
            if key in fields
        }
        return known[name](**given)

    def copy_steps(self, folder: str | Path) -> None:
        """Copy the manifest and the states, without samples, for `apply` elsewhere."""
        target = Path(folder)
        (target / manifests.STATES).mkdir(
            parents=True,
            exist_ok=True,
        )
        states = [entry["state"] for entry in self.manifest["steps"]]
        for file in (self.manifest["raw"], self.manifest["columns"], *states):
            if file is not None:
                shutil.copyfile(
                    self.folder / file["path"],
                    target / file["path"],
                )
        shutil.copyfile(
            self.folder / manifests.NAME,
            target / manifests.NAME,
        )

    # ---- raw rows ----

    @cached_property
    def _raw(self) -> pl.DataFrame:
        """Types of the raw columns; its one row, if any, has the target alone."""
        return read_arrow(self.folder / self.manifest["raw"]["path"])

    @cached_property
    def needed(self) -> frozenset[str]:
        """Raw columns that the inputs depend on, or by which a row may be dropped."""

        def query(table: pl.LazyFrame) -> pl.LazyFrame:
            for one in self.steps:
                if one.step.serves:
                    table = one.step.run(table, one.state).table
            return table.select(ROW, *self.inputs)

        asked = columns_asked(self._raw.schema, query)
        return frozenset(asked - {SOURCE, ROW})

    def apply(self, raw: Any) -> pl.DataFrame:
        """Prepare raw rows as those of the training split were.

        Args:
          raw: a row as a dict, a list of them, a table, a path, or a `Reader`. The
            target may be absent.

        Returns:
          The inputs, and the target if it is there, a row for each raw row.

        Raises:
          DataError: a column is missing or has a value of another type, or a step would
            drop a row.
        """
        given = _rows(raw)
        present = set(self.targets) & set(given.columns)
        has_target = bool(present) and present == set(self.targets)
        table = self._typed(given)
        absent = [] if has_target or not len(self._raw) else self.targets
        for name in absent:
            if name in self._raw.columns:
                # Steps that ask for a target get that of a row that was not dropped.
                value = self._raw[name].new_from_index(0, table.height)
                table = table.with_columns(value)
        for number, one in enumerate(self.steps):
            if one.step.serves:
                table = self._applied(number, one, table)
        return table.select(self.outputs if has_target else self.inputs)

    def _applied(
        self,
        number: int,
        one: FittedStep,
        table: pl.DataFrame,
    ) -> pl.DataFrame:
        """Apply a step; raise DataError if a row is lost."""
        after, notes = collected(
            one.step.run(table.lazy(), one.state),
        )
        if after.height == table.height:
            return after
        lost = table.join(after, on=ROW, how="anti")
        row: Any = lost[ROW].min()
        reason = ""
        if notes is not None:
            about = notes.filter(
                pl.col(ROW) == row,
                pl.col("action") == "dropped",
            )
            reason = f": {about['reason'][0]}" if about.height else ""
        raise DataError(
            f"{type(one.step).__name__} drops row {row}{reason}",
            where=f"row {row}, step {number}",
            remedy="correct the row, or leave it out: there is no prediction for it",
        )

    def _typed(self, given: pl.DataFrame) -> pl.DataFrame:
        """Return raw rows with the columns and types that the steps were fitted on."""
        for name in sorted(self.needed - set(self.targets)):
            if name not in given.columns:
                raise DataError(
                    f"the column {name!r} is missing{nearest(name, given.columns)}",
                    where="raw rows",
                    remedy=f"give all of: {', '.join(sorted(self.needed))}",
                )
        columns = [
            _cast(given[name], kind)
            for name, kind in self._raw.schema.items()
            if name in given.columns and not name.startswith(RESERVED)
        ]
        numbers = pl.Series(
            ROW,
            np.arange(given.height, dtype=np.uint64),
        )
        source = pl.lit(0, pl.UInt32).alias(SOURCE)
        table = pl.DataFrame(
            [numbers, *columns],
        ).with_columns(source)
        return fit_columns(table, self._raw.schema)


def files_of(
    manifest: dict[str, Any],
) -> list[dict[str, Any]]:
    """Return the entries of all files that a manifest names."""
    files = [manifest["raw"], manifest["columns"], *manifest["quarantine"]["files"]]
    files += [step["state"] for step in manifest["steps"] if step["state"]]
    return [*files, *manifest["shards"]]


def public_steps() -> dict[str, type[Step]]:
    """Return Lepton's own steps by name."""
    found: dict[str, type[Step]] = {}
    unseen: list[type] = [Step]
    while unseen:
        kind = unseen.pop()
        unseen += kind.__subclasses__()
        if kind.__module__.startswith(
            PACKAGE,
        ) and kind not in (Step, Fitted):
            found[kind.__name__] = kind
    return found


def _tuples(value: Any) -> Any:
    """Return lists of JSON as the tuples that a frozen step holds."""
    return (
        tuple(
            map(_tuples, value),
        )
        if isinstance(value, list)
        else value
    )


def _rows(raw: Any) -> pl.DataFrame:
    """Return raw rows, as they were given, as a table."""
    if isinstance(raw, Mapping):
        raw = [raw]
    if isinstance(raw, pl.DataFrame):
        return raw
    if isinstance(raw, Sequence) and not isinstance(raw, str):
        rows = [dict(row) for row in raw]
        return pl.DataFrame(rows, infer_schema_length=None, strict=False)
    reader = raw
    if not isinstance(raw, readers.Reader):
        reader = readers.reader_of(raw)  # type: ignore[attr-defined, unused-ignore]
    tables = []
    for piece in reader.pieces(WHOLE):
        read = reader.read(piece)
        if read.refused.height:
            note: dict[str, Any] = read.refused.row(
                0,
                named=True,
            )
            raise DataError(
                f"row {note[ROW]} can't be read: {note['reason']}",
                where=f"{reader.name}, row {note[ROW]}",
                remedy="correct the row, or leave it out",
            )
        tables.append(read.table)
    return (
        pl.concat(
            tables,
        ).drop(ROW)
        if tables
        else pl.DataFrame()
    )


def _cast(
    values: pl.Series,
    kind: pl.DataType,
) -> pl.Series:
    """Return values as a type of training's.

    Raises:
      DataError: a value is of another type; it names the column and the row.
    """
    if values.dtype == kind:
        return values
    cast = _as_kind(values, kind)
    wrong = cast.is_null() & values.is_not_null()
    if values.dtype.is_float() and kind.is_integer():
        wrong = wrong | (values != cast.cast(values.dtype)).fill_null(
            False,
        )
    if not wrong.any():
        return cast
    row = int(wrong.arg_true()[0])
    raise DataError(
        f"{values[row]!r} in the column {values.name!r} is no {kind}",
        where=f"raw rows, row {row}",
        remedy=f"give a value of the type that training's rows have: {kind}",
    )


def _as_kind(values: pl.Series, kind: pl.DataType) -> pl.Series:
    """Return values as another type; what can't be one is null.

    Dates in text are ISO 8601, as JSON has them.
    """
    if values.dtype == pl.String and kind == pl.Date:
        return values.str.to_date("%Y-%m-%d", strict=False)
    if values.dtype == pl.String and kind == pl.Datetime:
        return values.str.to_datetime(strict=False).cast(kind)
    return values.cast(kind, strict=False)
