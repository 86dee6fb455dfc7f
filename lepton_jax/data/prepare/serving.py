"""Raw rows prepared for a trained model, as its training rows were.

A `Serving` is a preparation's fitted steps, and how the columns after them become the
model's inputs:

    {"age": 39, "job": "clerk"}           a raw row
      -> Standardize, mean 38, std 10     age 0.1
      -> Vocabulary, clerk is 3           job 3
      -> {"numbers": [[0.1]], "categories": [[3]]}

It is kept next to the model as JSON and Arrow files; opening them runs no code, and
needs nothing of what the model was made with.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import polars as pl

from lepton_jax.data.arrays import Arrays
from lepton_jax.data.columns import Columns, Leaves, Ragged, leaf_of, nested
from lepton_jax.data.prepare.manifest import plain
from lepton_jax.data.prepare.prepared import Prepared, open_prepared
from lepton_jax.data.prepare.profile import Profile, profile
from lepton_jax.data.prepare.raw_rows import as_table
from lepton_jax.data.prepare.shards import read_shard
from lepton_jax.data.prepare.step import Step
from lepton_jax.data.prepare.store import read_json, write_bytes, write_json
from lepton_jax.errors import DataError

FILE = "serving.json"
PROFILE = "profile.json"
FORMAT = 1  # of the files; a later one may not be readable here
TRAIN = "train"
CLASSES = "Classes"  # the step that numbers the values of a target
LABELS = "Labels"  # the step that has a place for each of several labels
UNREADABLE = (OSError, ValueError, KeyError, TypeError, pl.exceptions.PolarsError)


@dataclass(frozen=True, eq=False)
class Serving:
    """The way from raw rows to a model's inputs.

    Attributes:
      prepared: the steps with their states; its shards need not be there.
      inputs: which columns after the steps are the model's inputs: one, several side by
        side in one array, or either by the model's argument.
      reading: settings of `reader_of` with which files of raw rows are read.
      profile: distributions of the training rows after the steps, for a server's drift
        gauges; None: they are taken of the shards when they are asked for.
    """

    prepared: Prepared
    inputs: Columns
    reading: Mapping[str, Any] = field(
        default_factory=dict,
    )
    profile: Profile | None = None
    _made: WeakKeyDictionary[Arrays, str] = field(
        default_factory=WeakKeyDictionary,
        init=False,
        repr=False,
    )

    # ---- prepared rows ----

    def split(self, name: str = TRAIN) -> Arrays:
        """Return the samples of a split, in memory.

        Raises:
          DataError: there is no such split or column, a cell is missing, or a column
            holds no numbers.
        """
        table = self.prepared.table(name)
        arrays = Arrays(
            *arrays_of(
                table,
                self.inputs,
                self.prepared.target,
            )
        )
        self._made[arrays] = name
        return arrays

    def raw_rows(
        self,
        arrays: Arrays,
        numbers: np.ndarray | None = None,
    ) -> pl.DataFrame | None:
        """Return the raw rows of samples that `split` has returned.

        Args:
          arrays: these samples.
          numbers: of the wanted ones; None: all.

        Returns:
          The rows, as they were read; None where they are not known.

        Raises:
          DataError: a source can't be read any more.
        """
        name = self._made.get(arrays)
        return None if name is None else self.prepared.raw_rows(name, numbers)

    # ---- raw rows ----

    def arrays(self, raw: Any) -> Any:
        """Return the model's inputs of raw rows: an array, or a dict of arrays.

        Args:
          raw: a row as a dict, a list of these, a table of pandas, Polars or Arrow, a
            dict of columns, or the path of a file. Columns that the inputs do not
            depend on may be missing; others than those of training are left out.

        Raises:
          DataError: a column that is needed is missing, a cell can't be what its column
            is, or a step would drop a row.
        """
        rows = as_table(raw, self.reading)
        rows = rows.drop(self.prepared.targets, strict=False)
        table = self.prepared.apply(rows)
        inputs, _ = arrays_of(table, self.inputs, None)
        return inputs

    def samples(self, raw: Any) -> Arrays:
        """Return inputs and targets of raw rows that have the target.

        Args:
          raw: see `arrays`.

        Raises:
          DataError: see `arrays`; or a target is missing, or is no class.
        """
        target = self.prepared.target
        if target is None:
            raise DataError(
                "the preparation has no target",
                where="raw rows",
                remedy="give inputs and targets as arrays",
            )
        rows = as_table(raw, self.reading)
        for name in self.prepared.targets:
            if name not in rows.columns:
                raise DataError(
                    f"the rows have no column {name!r}, which is the target",
                    where="raw rows",
                    remedy="give the target too, or predict in place of evaluating",
                )
        table = self.prepared.apply(rows)
        return Arrays(
            *arrays_of(
                table,
                self.inputs,
                target,
            )
        )

    def decode(
        self,
        predictions: Any,
    ) -> list[Any]:
        """Return predictions in the target's own words, or as plain numbers.

        Args:
          predictions: numbers of classes, (rows,), or quantities; of several targets,
            (rows, targets); of several labels a row 0 or 1 for each, (rows, labels), of
            which a list of words is made.

        Raises:
          DataError: a number stands for no class.
        """
        numbers = np.asarray(predictions)
        targets = self.prepared.targets
        if len(targets) < 2:
            return _named(numbers, self.words)
        if numbers.ndim != 2 or numbers.shape[1] != len(targets):
            raise DataError(
                f"predictions {list(numbers.shape)} are not of the {len(targets)}"
                " targets",
                where="Serving.decode",
                remedy="decode what Trainer.predict returns without decode=...",
            )
        columns = [
            _named(column, self._words_of(name))
            for name, column in zip(targets, numbers.T, strict=True)
        ]
        return [list(row) for row in zip(*columns, strict=True)]

    # ---- what is known ----

    @property
    def needed(self) -> tuple[str, ...]:
        """The raw columns that the inputs depend on."""
        return tuple(sorted(self.prepared.needed))

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The target's classes or labels by their numbers; () for a quantity."""
        targets = self.prepared.targets
        return self._words_of(targets[0]) if len(targets) == 1 else ()

    def _words_of(
        self,
        target: str,
    ) -> tuple[str, ...]:
        """Return a target's classes or labels by their numbers."""
        for entry, fitted in zip(
            self.prepared.manifest["steps"], self.prepared.steps, strict=True
        ):
            arguments = entry["arguments"]
            is_of_target = arguments.get("column") == target
            if arguments["step"] in (CLASSES, LABELS) and is_of_target:
                assert fitted.state is not None
                return tuple(fitted.state.sort("code")["value"])
        return ()

    def training_profile(self) -> Profile:
        """Return the distributions of the training rows after the steps."""
        return self.profile or profile(self._training_tables)

    # ---- files ----

    def save(self, folder: Path) -> None:
        """Write the steps and their states; the folder is made if it is missing.

        Raises:
          DataError: they can't be written.
        """
        try:
            self.prepared.copy_steps(folder)
        except OSError as error:
            raise DataError(
                f"the fitted steps can't be copied: {error}",
                where=folder,
                remedy="prepare the data again, if its folder is gone",
            ) from error
        write_bytes(
            folder / PROFILE,
            self.training_profile().to_json().encode(),
        )
        content = {
            "format": FORMAT,
            "inputs": self.inputs,
            "reading": plain(self.reading),
        }
        write_json(folder / FILE, content)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        classes: Sequence[type[Step]] = (),
    ) -> Serving:
        """Read what `save` has written.

        Args:
          folder: the folder.
          classes: of steps that are not part of Lepton.

        Raises:
          DataError: files are missing or damaged, or a step is not known here.
        """
        folder = Path(folder)
        try:
            content = read_json(folder / FILE)
            text = (folder / PROFILE).read_text(encoding="utf-8")
            inputs = content["inputs"]
            serving = cls(
                open_prepared(folder, classes=classes),
                inputs,
                content["reading"],
                Profile.from_json(text),
            )
            _ = serving.prepared.steps  # what is missing is missed now
        except UNREADABLE as error:
            raise DataError(
                f"the preparation of the model's inputs can't be read: {error}",
                where=folder,
                remedy="save the model again, or restore its folder",
            ) from error
        return serving

    # ---- internals ----

    def _training_tables(self) -> list[pl.DataFrame]:
        prepared = self.prepared
        return [
            read_shard(
                path,
                prepared.schema,
            ).select(prepared.outputs)
            for path in prepared.shards(TRAIN)
        ]


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
    leaves = Leaves.of(
        inputs,
        target,
        {},
        table.columns,
        where,
    )
    arrow = table.select(leaves.names).to_arrow(
        compat_level=pl.CompatLevel.oldest(),
    )
    columns = {
        name: leaf_of(
            arrow[name],
            name,
            where,
        )
        for name in leaves.names
    }
    made: dict[str, Any] = dict(
        leaves.make(
            columns,
            where,
        )
    )
    for path, leaf in made.items():
        if isinstance(leaf, Ragged):
            made[path] = _even(leaf, path)
    return nested(made)


def _named(
    numbers: np.ndarray,
    words: Sequence[str],
) -> list[Any]:
    """Return the words of classes or of labels; of a quantity, its numbers."""
    if not words:
        return list(numbers.tolist())
    is_whole = numbers.dtype.kind in "iub"
    if is_whole and numbers.ndim == 2 and numbers.shape[1] == len(words):
        rows = (numbers > 0).tolist()
        return [list(itertools.compress(words, row)) for row in rows]
    is_class = (numbers >= 0) & (numbers < len(words))
    if not is_whole or numbers.ndim != 1 or not is_class.all():
        raise DataError(
            f"predictions {numbers.dtype}{list(numbers.shape)} are no numbers of"
            f" the {len(words)} classes",
            where="Serving.decode",
            remedy="decode what Trainer.predict returns without decode=...",
        )
    return [words[int(number)] for number in numbers]


def _even(
    leaf: Ragged,
    path: str,
) -> np.ndarray:
    lengths = np.diff(leaf.ends)
    if len(set(lengths.tolist())) > 1:
        raise DataError(
            f"the rows of {path} have {lengths.min()} to {lengths.max()} values",
            where="prepared rows",
            remedy="cut and pad them to one length in a step, or pack them",
        )
    return leaf.values.reshape(
        len(leaf),
        -1,
    )
