"""Nearest training examples: the rows that the model's last layer takes for alike.

Two rows are as near as the features that the last product is taken of: the cosine of
their angle (as Caruana et al. 1999, "Case-Based Explanation of Non-Case-Based Learning
Methods", do it with hidden units).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_jax.data import Arrays
from lepton_jax.errors import DataError
from lepton_jax.ship.explain.subject import Subject, subject_of
from lepton_jax.ship.explain.watching import Step, watched

METHOD = "nearest_examples"
COUNT = 5  # examples a row; assumption: as many as a person compares
MOST = 50_000  # training rows that are looked at; assumption: a minute of a core
BATCH = 256  # rows at once
TINY = 1e-12


@dataclass(frozen=True)
class Neighbours:
    """Training rows that are nearest to rows.

    Attributes:
      numbers: of them in the training data, the nearest first, (rows, count).
      likeness: cosine of the angle of the features, from -1 to 1, (rows, count).
      targets: of them, (rows, count, ...); None: the targets are no array.
    """

    numbers: np.ndarray
    likeness: np.ndarray
    targets: np.ndarray | None

    def to_fields(self) -> dict[str, Any]:
        """Return it as plain data."""
        targets = None if self.targets is None else self.targets.tolist()
        return {
            "method": METHOD,
            "numbers": self.numbers.tolist(),
            "likeness": self.likeness.tolist(),
            "targets": targets,
        }


def nearest_examples(
    trainer: Any,
    inputs: Any,
    *,
    count: int = COUNT,
    train: Any = None,
) -> Neighbours:
    """Return the training rows that are nearest to rows, as the model sees them.

    Args:
      trainer: a `Trainer`; of an `Artifact`, whose last layer can't be seen, it is its
        outputs that are compared, with those of its stored rows.
      inputs: rows: an array, a dict of arrays by name, or raw rows.
      count: of examples a row.
      train: `Arrays` to look among; None: the recipe's training rows.

    Raises:
      DataError: the training rows are not in memory.
    """
    subject = subject_of(trainer)
    rows = subject.inputs_of(inputs)
    data = train
    if data is None and subject.is_open:
        data = trainer.recipe.train
    if data is None and subject.known:
        data = Arrays(dict(subject.known))
    if not isinstance(data, Arrays):
        raise DataError(
            "there are no training rows in memory to look among",
            where=METHOD,
            remedy="give train=Arrays(inputs, targets)",
        )
    if len(data) > MOST:
        data = Arrays(*data.take(np.arange(MOST)))
    known = subject.inputs_of(data)
    asked = _unit(features(subject, rows))
    likeness = asked @ _unit(features(subject, known)).T
    count = min(count, len(data))
    order = np.argsort(-likeness, axis=1, kind="stable")[:, :count]
    targets = data.targets
    return Neighbours(
        order,
        np.take_along_axis(likeness, order, axis=1),
        targets[order] if isinstance(targets, np.ndarray) else None,
    )


def features(
    subject: Subject,
    inputs: dict[str, np.ndarray],
) -> np.ndarray:
    """Return what the last product of a model is taken of, (rows, features).

    Where there is none to be seen, it is the outputs.
    """

    def run(given: dict[str, jax.Array]) -> jax.Array:
        last: list[jax.Array] = []

        def visit(step: Step) -> None:
            is_product = step.name == "dot_general" and bool(step.origins[0])
            if is_product and not step.origins[1]:
                last.append(step.inputs[0])

        outputs = watched(subject.run, given, visit)
        is_row = last and last[-1].shape[:1] == outputs.shape[:1]
        return last[-1] if is_row else outputs

    whole = subject.run if not subject.is_open else run
    compiled = jax.jit(whole)
    total = len(next(iter(inputs.values())))
    parts = []
    for start in range(0, total, BATCH):
        part = {
            name: jnp.asarray(_filled(array[start : start + BATCH]))
            for name, array in inputs.items()
        }
        made = np.asarray(compiled(part), np.float32)
        count = min(BATCH, total - start)
        parts.append(made[:count].reshape(count, -1))
    return np.concatenate(parts)


def _filled(rows: np.ndarray) -> np.ndarray:
    """Return a batch of full size: one program is compiled for all."""
    missing = BATCH - len(rows)
    return np.concatenate([rows, np.repeat(rows[-1:], missing, axis=0)])


def _unit(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.maximum(norms, TINY)
