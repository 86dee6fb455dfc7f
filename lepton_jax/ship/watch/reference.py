"""The rows of training, as a server's rows are compared with them.

Two kinds of models, two kinds of rows:

    raw rows     {"age": 39, "job": "clerk"}       a column each: its histogram, its
                                                   missing cells, its words
    arrays       {"image": float32[28, 28]}        what stands for a row: "image.mean"
    and pictures                                   and "image.std", a column each

Training's are profiled once, when the artifact is made, and lie in it. Steps that fill
in missing cells or number the words hide what a server wants to see, so raw rows are
profiled as they are read, before any step.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl

from lepton_jax.data.prepare.profile import Profile, profile
from lepton_jax.data.prepare.serving import TRAIN, Serving
from lepton_jax.errors import CheckpointError
from lepton_jax.ship.artifact.signature import named_inputs
from lepton_jax.train.judged import samples_of

# An array with at most this many numbers a row has a column for each of them; a larger
# one is a picture or a sequence, of which one number says nothing. Assumption.
MOST_NUMBERS = 64

# Categories of a column that are all remembered. Assumption: of a column with more,
# new ones are no news.
MOST_WORDS = 10_000
# Raw rows of training that are looked at, evenly spaced. Assumption: a million rows
# hold what there is of categories.
MOST_ROWS = 1_000_000
# Samples of training that are looked at, of a model of arrays. Assumption: they place
# an edge to within a hundredth of the rows.
SAMPLES = 10_000

# Numbers beyond are taken for this one: their squares would be too large to add up,
# and whoever can send a row could stop the counting.
LARGEST = 1e100

MEAN = "mean"
SPREAD = "std"


@dataclass(frozen=True)
class Reference:
    """What the rows of training looked like.

    Attributes:
      profile: of their columns.
      words: of a column of categories all the values that training saw; a column that
        is not here may have had others.
      arrays: whether its columns are summaries of arrays.
    """

    profile: Profile
    words: Mapping[str, frozenset[str]] = field(default_factory=dict)
    arrays: bool = False

    def to_json(self) -> str:
        """Return the reference as text for `from_json`."""
        content = {
            "arrays": self.arrays,
            "words": {name: sorted(words) for name, words in self.words.items()},
            "profile": json.loads(self.profile.to_json()),
        }
        return json.dumps(content, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Reference:
        """Return the reference that `to_json` wrote.

        Raises:
          CheckpointError: the text is none.
        """
        try:
            content = json.loads(text)
            words = {
                name: frozenset(values) for name, values in content["words"].items()
            }
            known = Profile.from_json(json.dumps(content["profile"]))
            return cls(known, words, bool(content["arrays"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"the training histograms can't be read: {error}",
                where="artifact",
                remedy="copy the artifact again, or export it again",
            ) from error


def training_rows(trainer: Any) -> Reference | None:
    """Return what the rows looked like that a model was trained on.

    Args:
      trainer: a `Trainer` that has a model.

    Returns:
      The reference, of raw rows if there are any and their sources are still there;
      None: not even the arrays are at hand.

    Raises:
      DataError: a source can't be read any more.
    """
    serving = trainer.preparation
    if serving is not None and not _has_pictures(serving):
        known = of_raw_rows(serving)
        if known is not None:
            return known
    if trainer.recipe.train is None:
        return None
    samples = samples_of(trainer.program, trainer.recipe.train, SAMPLES)
    arrays = {
        name: np.asarray(leaf) for name, leaf in named_inputs(samples.inputs).items()
    }
    return of_arrays(arrays)


def of_raw_rows(serving: Serving) -> Reference | None:
    """Return the reference of raw rows: the columns that the inputs depend on.

    Args:
      serving: of a preparation whose sources are still there.

    Returns:
      The reference; None: the sources are not known, as in a folder opened later.

    Raises:
      DataError: a source can't be read any more.
    """
    prepared = serving.prepared
    count = prepared.manifest["splits"][TRAIN]["rows"]
    numbers = np.arange(0, count, max(1, count // MOST_ROWS))
    rows = prepared.raw_rows(TRAIN, numbers)
    if rows is None:
        return None
    names = [name for name in rows.columns if name in serving.needed]
    return of_table(rows.select(name for name in names if name not in prepared.targets))


def of_table(table: pl.DataFrame) -> Reference:
    """Return the reference of a table of raw rows."""
    known = profile(lambda: [table])
    words = {}
    for name, column in known.columns.items():
        if column.kind != "category":
            continue
        values = table[name].drop_nulls().cast(pl.String).unique()
        if len(values) <= MOST_WORDS:
            words[name] = frozenset(values)
    return Reference(known, words)


def of_arrays(inputs: Mapping[str, np.ndarray]) -> Reference:
    """Return the reference of a model's input arrays.

    Args:
      inputs: the arrays of training rows, each [rows, ...], by name.
    """
    table = summaries(inputs)
    return Reference(profile(lambda: [table]), arrays=True)


def summaries(inputs: Mapping[str, np.ndarray]) -> pl.DataFrame:
    """Return the columns that stand for rows of arrays.

    Args:
      inputs: arrays [rows, ...] by name; those that hold no numbers are left out.

    Returns:
      For each array: a column "name" or "name[i]" for each of a few numbers, or
      "name.mean" and "name.std" over those of a picture or a sequence.
    """
    columns: dict[str, np.ndarray] = {}
    for name, array in inputs.items():
        array = np.asarray(array)
        if array.dtype.kind in "biuf" and array.ndim:
            columns.update(_summary(name, array))
    return pl.DataFrame(columns)


def _has_pictures(serving: Serving) -> bool:
    """Whether a raw column holds files: their pixels say more than their bytes."""
    schema = serving.prepared._raw.schema
    return any(
        dtype == pl.Binary or dtype.is_nested()
        for name, dtype in schema.items()
        if name in serving.needed
    )


def _summary(
    name: str,
    array: np.ndarray,
) -> Iterator[tuple[str, np.ndarray]]:
    flat = array.reshape(len(array), -1).astype(np.float64)
    flat = flat.clip(-LARGEST, LARGEST)
    count = flat.shape[1]
    if array.ndim == 1 or count == 1:
        yield name, flat[:, 0]
    elif array.ndim == 2 and count <= MOST_NUMBERS:
        for number in range(count):
            yield f"{name}[{number}]", flat[:, number]
    elif count:
        yield f"{name}.{MEAN}", flat.mean(axis=1)
        yield f"{name}.{SPREAD}", flat.std(axis=1)
