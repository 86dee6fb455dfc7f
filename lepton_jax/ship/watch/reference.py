"""The rows of training, as a server's rows are compared with them.

Two kinds of models, two kinds of rows:

    raw rows     {"age": 39, "job": "clerk"}       a column each: its histogram, its
                                                   missing cells, its words
    arrays       {"image": float32[28, 28]}        what stands for a row: "image.mean"
                                                   and "image.std", a column each

Training's are profiled once, when the artifact is made, and lie in it. Steps that fill
in missing cells or number the words hide what a server wants to see, so raw rows are
profiled as they are read, before any step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl

from lepton_jax.data.prepare.profile import Profile, profile
from lepton_jax.data.prepare.serving import TRAIN, Serving

# An array with at most this many numbers a row has a column for each of them; a larger
# one is a picture or a sequence, of which one number says nothing. Assumption.
MOST_NUMBERS = 64

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

    @classmethod
    def of(
        cls,
        known: Profile,
        words: Mapping[str, frozenset[str]] | None = None,
        arrays: bool = False,
    ) -> Reference:
        """Return a reference; a short list of words in the profile is a whole one.

        Args:
          known: profile of the rows of training.
          words: all values of columns, where they are known.
          arrays: whether its columns are summaries of arrays.
        """
        whole = {
            name: frozenset(column.words)
            for name, column in known.columns.items()
            if column.kind == "category" and not column.other_words
        }
        return cls(known, whole | dict(words or {}), arrays)


def reference_of(artifact: Any) -> Reference | None:
    """Return the rows of training that an artifact knows; None: it knows none.

    Args:
      artifact: an `Artifact`.
    """
    if artifact.profile is None:
        return None
    return Reference.of(artifact.profile, arrays=not artifact.columns)


def raw_profile(serving: Serving) -> Profile | None:
    """Profile the raw rows of training: the columns that the inputs depend on.

    Args:
      serving: of a preparation whose sources are still there.

    Returns:
      The profile; None: the sources are not known, as in a folder opened later.

    Raises:
      DataError: a source can't be read any more.
    """
    rows = serving.prepared.raw_rows(TRAIN)
    if rows is None:
        return None
    names = [name for name in rows.columns if name in serving.needed]
    table = rows.select(names)
    return profile(lambda: [table])


def array_profile(inputs: Mapping[str, np.ndarray]) -> Profile:
    """Profile what stands for the rows of a model's input arrays.

    Args:
      inputs: the arrays of training rows, each [rows, ...], by name.
    """
    table = summaries(inputs)
    return profile(lambda: [table])


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


def _summary(
    name: str,
    array: np.ndarray,
) -> Iterator[tuple[str, np.ndarray]]:
    flat = array.reshape(len(array), -1).astype(np.float64)
    count = flat.shape[1]
    if array.ndim == 1 or count == 1:
        yield name, flat[:, 0]
    elif count <= MOST_NUMBERS:
        for number in range(count):
            yield f"{name}[{number}]", flat[:, number]
    elif count:
        yield f"{name}.{MEAN}", flat.mean(axis=1)
        yield f"{name}.{SPREAD}", flat.std(axis=1)
