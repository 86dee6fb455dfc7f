"""Occlusion: by how much an output falls where a part of the inputs is hidden.

Zeiler and Fergus 2014, "Visualizing and Understanding Convolutional Networks", section
4.2, with the output itself in place of a class's probability. It asks the model alone,
so it explains artifacts, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lepton_jax.errors import SettingError
from lepton_jax.ship.explain.attribution import Attribution
from lepton_jax.ship.explain.subject import (
    PICTURE_DIMS,
    Subject,
    chosen,
    subject_of,
    targets_of,
)

METHOD = "occlusion"
# Parts of a picture's height and width that are hidden at once. Assumption: 7 x 7 parts
# are as fine as a person looks at.
PARTS = 7
BATCH = 128  # rows that the model is asked for at once; an artifact's largest size

Part = tuple[Any, ...]  # an index of the entries of a row


def occlusion(
    model: Any,
    inputs: Any,
    *,
    target: Any = None,
    patch: int | None = None,
) -> Attribution:
    """Return by how much the output of rows falls without each part of their inputs.

    Args:
      model: a `Trainer` or an `Artifact`.
      inputs: rows: an array, a dict of arrays by name, or raw rows.
      target: number of the output to explain, for all rows or for each; None: the
        largest.
      patch: pixels of the squares of a picture that are hidden; None: a seventh of its
        height. Of other inputs each entry is hidden by itself.

    Raises:
      SettingError: the patch has no pixels.
      DataError: the rows are not the model's inputs, or there is no such output.
    """
    if patch is not None and patch < 1:
        raise SettingError(
            f"patches of {patch!r} pixels are to be hidden",
            where="patch",
            remedy="give at least 1",
        )
    subject = subject_of(model)
    rows = subject.inputs_of(inputs)
    outputs = subject.outputs(rows)
    wanted = targets_of(outputs, target)
    whole = np.asarray(chosen(outputs, wanted))
    values: dict[str, np.ndarray] = {}
    steps = 0
    for name, array in rows.items():
        shares = np.zeros(array.shape, np.float32)
        parts = list(parts_of(array.shape[1:], patch))
        falls = whole - _without(subject, rows, name, parts, wanted)
        for part, fall in zip(parts, falls, strict=True):
            hidden = shares[0][part]
            shares[:, *part] = fall.reshape(-1, *[1] * hidden.ndim) / hidden.size
        steps += len(parts)
        values[name] = shares
    return Attribution(
        METHOD,
        values,
        wanted,
        whole,
        np.asarray(chosen(_nothing(subject, rows), wanted)),
        subject.names,
        steps,
    )


def parts_of(
    shape: tuple[int, ...],
    patch: int | None = None,
) -> Iterator[Part]:
    """Yield indices of the parts of a row that are hidden, one after the other.

    >>> len(list(parts_of((28, 28, 1)))), list(parts_of((2,)))
    (49, [(0,), (1,)])
    """
    if not shape:
        yield ()
        return
    if len(shape) + 1 < PICTURE_DIMS:
        yield from ((at,) for at in range(shape[0]))
        return
    height, width = shape[:2]
    size = patch or max(1, height // PARTS)
    for top in range(0, height, size):
        for left in range(0, width, size):
            yield slice(top, top + size), slice(left, left + size)


def _nothing(
    subject: Subject,
    rows: dict[str, np.ndarray],
) -> np.ndarray:
    empty = {
        name: np.broadcast_to(subject.baseline(name), array.shape)
        for name, array in rows.items()
    }
    return subject.outputs(empty)


def _without(
    subject: Subject,
    rows: dict[str, np.ndarray],
    name: str,
    parts: Sequence[Part],
    target: np.ndarray,
) -> np.ndarray:
    """Return the explained outputs without each part of an input, (parts, rows).

    Several parts are asked for in one batch.
    """
    count = len(target)
    empty = subject.baseline(name)
    at_once = max(1, BATCH // count)
    found = []
    for start in range(0, len(parts), at_once):
        own = parts[start : start + at_once]
        batch = {key: np.concatenate([x] * len(own)) for key, x in rows.items()}
        for number, part in enumerate(own):
            hidden = batch[name][number * count : (number + 1) * count]
            hidden[:, *part] = empty[part]
        outputs = chosen(subject.outputs(batch), np.tile(target, len(own)))
        found.append(np.asarray(outputs).reshape(len(own), count))
    return np.concatenate(found)
