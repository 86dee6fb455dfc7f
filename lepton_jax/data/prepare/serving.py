"""Raw rows prepared for a trained model, as its training rows were.

A `Serving` holds the steps that a raw row goes through at prediction, with the states
that training has fitted, and how the columns after them become the model's inputs:

    {"age": 39, "job": "clerk"}           a raw row
      -> Standardize, mean 38, std 10     age 0.1
      -> Vocabulary, clerk is 3           job 3
      -> {"numbers": [[0.1]], "categories": [[3]]}

It is kept next to the model as JSON and Arrow files; opening them runs no code, and
needs nothing of what the model was made with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from lepton_jax.data.arrays import Arrays
from lepton_jax.data.columns import Columns, Leaves, Ragged, leaf_of, nested
from lepton_jax.data.prepare.profile import Profile
from lepton_jax.data.prepare.raw_rows import as_table, conform
from lepton_jax.data.prepare.step import Outcome, Step
from lepton_jax.data.prepare.store import (
    read_arrow,
    read_json,
    write_arrow,
    write_bytes,
    write_json,
)
from lepton_jax.data.readers.reader import ROW, SOURCE
from lepton_jax.errors import DataError, nearest

FILE = "serving.json"
SCHEMA = "schema.arrow"
PROFILE = "profile.json"
FORMAT = 1  # of the files; a later one may not be readable here
SHOWN = 5  # rows that a message lists
UNREADABLE = (ValueError, KeyError, TypeError, pl.exceptions.PolarsError)


@dataclass(frozen=True, eq=False)
class Serving:
    """The way from raw rows to a model's inputs.

    Attributes:
      schema: the columns of raw rows, as training read them.
      steps: the steps that serve, each with its state or None.
      inputs: which columns after them are the model's inputs: one, several side by
        side, or either by the model's argument.
      target: the column that is predicted, after the steps; None: there is none.
      words: the target's values, by the number that the model predicts; () for a target
        that is a quantity.
      dialect: settings of `reader_of` for a file of raw rows.
      profile: distributions of the columns of the raw training rows, for a server's
        drift gauges; None: they were not measured.
    """

    schema: pl.Schema
    steps: tuple[tuple[Step, pl.DataFrame | None], ...]
    inputs: Columns
    target: str | None = None
    words: tuple[str, ...] = ()
    dialect: Mapping[str, Any] = field(default_factory=dict)
    profile: Profile | None = None

    # ---- raw rows ----

    def rows(self, raw: Any) -> pl.DataFrame:
        """Return raw rows after the steps, in their order.

        Args:
          raw: a row as a dict, a list of these, a table of pandas, Polars or Arrow, a
            dict of columns, or the path of a file. Columns that the inputs do not
            depend on may be missing; other columns are left out.

        Raises:
          DataError: a column that is needed is missing, a cell can't be what its column
            is, or a step would drop a row.
        """
        table = as_table(raw, self.dialect)
        needed = self.needed
        missing = [name for name in self.schema if name not in table.columns]
        for name in missing:
            if name in needed:
                raise DataError(
                    f"the rows have no column {name!r}{nearest(name, table.columns)}",
                    where="raw rows",
                    remedy=(
                        f"the model needs {', '.join(needed)}; a value that is not"
                        " known may be None"
                    ),
                )
        table = conform(table, self.schema)
        return self._stepped(table, frozenset(missing))

    def arrays(self, raw: Any) -> Any:
        """Return the model's inputs of raw rows: an array, or a dict of arrays.

        Args:
          raw: see `rows`.

        Raises:
          DataError: see `rows`; or a cell is still missing after the steps.
        """
        inputs, _ = arrays_of(self.rows(raw), self.inputs, None)
        return inputs

    def samples(self, raw: Any) -> Arrays:
        """Return inputs and targets of raw rows that have the target.

        Args:
          raw: see `rows`.

        Raises:
          DataError: see `arrays`; or there is no target.
        """
        if self.target is None:
            raise DataError(
                "the preparation has no target",
                where="Serving.samples",
                remedy="give inputs and targets as arrays",
            )
        return samples(self.rows(raw), self.inputs, self.target)

    @property
    def needed(self) -> tuple[str, ...]:
        """The raw columns that the inputs depend on."""
        used = self._asked()
        return tuple(name for name in self.schema if name in used)

    def decode(self, predictions: np.ndarray) -> list[Any]:
        """Return predictions in the target's own words, or as plain numbers.

        Args:
          predictions: numbers of classes, (rows,), or quantities.

        Raises:
          DataError: a number stands for no class.
        """
        numbers = np.asarray(predictions)
        if not self.words:
            return numbers.tolist()
        is_whole = numbers.dtype.kind in "iub"
        fits = (
            is_whole
            and numbers.size == ((numbers >= 0) & (numbers < len(self.words))).sum()
        )
        if not fits or numbers.ndim != 1:
            raise DataError(
                f"predictions {numbers.dtype}{list(numbers.shape)} are no numbers of"
                f" the {len(self.words)} classes",
                where="Serving.decode",
                remedy="decode what Trainer.predict returns without decode=...",
            )
        return [self.words[int(number)] for number in numbers]

    # ---- files ----

    def save(self, folder: Path) -> None:
        """Write the files; the folder is made if it is missing.

        Raises:
          DataError: they can't be written.
        """
        steps = []
        for number, (step, state) in enumerate(self.steps):
            name = None if state is None else f"state-{number:03}.arrow"
            if state is not None and name is not None:
                write_arrow(folder / name, state)
            steps.append({**step.to_json(), "state": name})
        write_arrow(folder / SCHEMA, pl.DataFrame(schema=self.schema))
        if self.profile is not None:
            write_bytes(folder / PROFILE, self.profile.to_json().encode())
        content = {
            "format": FORMAT,
            "steps": steps,
            "inputs": self.inputs,
            "target": self.target,
            "words": list(self.words),
            "dialect": dict(self.dialect),
            "needed": list(self.needed),
        }
        write_json(folder / FILE, content)

    @classmethod
    def load(cls, folder: str | Path) -> Serving:
        """Read the files.

        Raises:
          DataError: they are missing or damaged, or a step is not known here.
        """
        folder = Path(folder)
        try:
            content = read_json(folder / FILE)
            schema = read_arrow(folder / SCHEMA).schema
            steps = tuple(_loaded(folder, entry) for entry in content["steps"])
            profiled = (folder / PROFILE).is_file()
            text = (folder / PROFILE).read_text() if profiled else None
            return cls(
                schema=schema,
                steps=steps,
                inputs=content["inputs"],
                target=content["target"],
                words=tuple(content["words"]),
                dialect=content["dialect"],
                profile=None if text is None else Profile.from_json(text),
            )
        except DataError:
            raise
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            pl.exceptions.PolarsError,
        ) as error:
            raise DataError(
                f"the preparation of the model's inputs can't be read: {error}",
                where=folder,
                remedy="save the model again, or restore its folder",
            ) from error

    # ---- internals ----

    def _stepped(self, table: pl.DataFrame, absent: frozenset[str]) -> pl.DataFrame:
        """Return rows after the steps.

        Args:
          table: the raw rows, with SOURCE and ROW.
          absent: columns that the rows do not have, and the inputs do not need.
        """
        for step, state in self.steps:
            outcome = step.run(table.lazy(), state)
            after = outcome.table.collect(engine="in-memory")
            if after.height < table.height:
                after = _undropped(step, outcome, table, after, absent)
            table = after
        return table

    def _asked(self) -> set[str]:
        """Return the raw columns that Polars reads for the inputs."""
        from polars.io.plugins import register_io_source

        full = _with_places(self.schema)
        asked: set[str] = set()

        def empty(
            columns: list[str] | None,
            predicate: pl.Expr | None,
            rows: int | None,
            batch: int | None,
        ) -> Iterator[pl.DataFrame]:
            frame = pl.DataFrame(schema=full)
            frame = frame if columns is None else frame.select(columns)
            asked.update(frame.columns)
            yield frame

        table = register_io_source(empty, schema=full)
        for step, state in self.steps:
            table = step.run(table, state).table
        table.select(names_of(self.inputs)).collect(engine="in-memory")
        return asked


def arrays_of(
    table: pl.DataFrame,
    inputs: Columns,
    target: Columns | None,
) -> tuple[Any, Any]:
    """Return columns of prepared rows as the inputs and targets of a model.

    Args:
      table: prepared rows.
      inputs: a column, several side by side, or either by the model's argument.
      target: the same; None: there is none.

    Raises:
      DataError: a column is not there, has missing cells, or holds no numbers.
    """
    where = "prepared rows"
    leaves = Leaves.of(inputs, target, {}, table.columns, where)
    arrow = table.select(leaves.names).to_arrow(compat_level=pl.CompatLevel.oldest())
    columns = {name: leaf_of(arrow[name], name, where) for name in leaves.names}
    made = leaves.make(columns, where)
    for path, leaf in made.items():
        if isinstance(leaf, Ragged):
            made[path] = _even(leaf, path)
    return nested(made)


def samples(
    table: pl.DataFrame,
    inputs: Columns,
    target: Columns | None,
) -> Arrays:
    """Return prepared rows as samples in memory; see `arrays_of`."""
    return Arrays(*arrays_of(table, inputs, target))


def names_of(columns: Columns) -> list[str]:
    """Return the names of columns, however they are arranged."""
    if isinstance(columns, str):
        return [columns]
    if isinstance(columns, Mapping):
        nested_names = [names_of(part) for part in columns.values()]
        return list(dict.fromkeys(name for names in nested_names for name in names))
    return list(columns)


def _even(leaf: Ragged, path: str) -> np.ndarray:
    lengths = np.diff(leaf.ends)
    if len(set(lengths.tolist())) > 1:
        raise DataError(
            f"the rows of {path} have {lengths.min()} to {lengths.max()} values",
            where="prepared rows",
            remedy="cut and pad them to one length in a step, or pack them",
        )
    return leaf.values.reshape(len(leaf), -1)


def _with_places(schema: pl.Schema) -> pl.Schema:
    places = {SOURCE: pl.UInt32(), ROW: pl.UInt64()}
    return pl.Schema({**places, **schema})


def _undropped(
    step: Step,
    outcome: Outcome,
    before: pl.DataFrame,
    after: pl.DataFrame,
    absent: frozenset[str],
) -> pl.DataFrame:
    """Return the rows of a step that has dropped some.

    Where it has dropped them for a column that is not there, such as the target, the
    step is left out.

    Raises:
      DataError: it has dropped them for another reason.
    """
    lost = before.join(after, on=[SOURCE, ROW], how="anti", maintain_order="left")
    notes = pl.DataFrame()
    if outcome.notes is not None:
        notes = outcome.notes.filter(pl.col("action") == "dropped").collect()
        columns = set(notes["column"].drop_nulls().to_list())
        if columns and columns <= absent:
            return before
    numbers = lost[ROW].to_list()
    shown = ", ".join(map(str, numbers[:SHOWN]))
    more = f" and {len(numbers) - SHOWN} more" if len(numbers) > SHOWN else ""
    reason = notes["reason"][0] if notes.height else "it gives no reason"
    raise DataError(
        f"{type(step).__name__} would drop row {shown}{more}: {reason}",
        where="raw rows",
        remedy="leave such rows out: there is no prediction for them",
    )


def _loaded(
    folder: Path,
    entry: dict[str, Any],
) -> tuple[Step, pl.DataFrame | None]:
    arguments = dict(entry)
    name = arguments.pop("step")
    state = arguments.pop("state")
    known = {kind.__name__: kind for kind in _kinds(Step)}
    if name not in known:
        raise DataError(
            f"the step {name} is not known here{nearest(name, known)}",
            where=folder,
            remedy=f"import the module that defines {name} before opening the model",
        )
    step = known[name](**arguments)
    return step, None if state is None else read_arrow(folder / state)


def _kinds(kind: Any) -> Iterator[type[Step]]:
    """Yield all kinds of step that are defined in this process."""
    for below in kind.__subclasses__():
        yield below
        yield from _kinds(below)
