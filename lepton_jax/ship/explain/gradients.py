"""Integrated gradients: shares that add up to the difference of two outputs.

The share of an entry is its difference from the baseline, times the mean of the
gradient on the straight line between the two (Sundararajan et al. 2017, "Axiomatic
Attribution for Deep Networks", equation 1). The shares of a row add up to its output
less the baseline's: completeness, proposition 1 there, which is checked for each row.

Ids have no gradient. Where an input's numbers look up rows of a table, the line goes
from zeros to what was looked up, and the share of an id is the sum over its row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_jax.errors import ModelError
from lepton_jax.ship.explain.attribution import Attribution, total_of
from lepton_jax.ship.explain.subject import Subject, chosen, subject_of, targets_of
from lepton_jax.ship.explain.watching import Step, is_lookup, seeing, watched

METHOD = "integrated_gradients"
# Points on the line, at first and at most. They are doubled until the shares add up.
STEPS = 32
MOST_STEPS = 512
# Gap between the sum of the shares and the difference of outputs that is let through,
# as a share of the largest of the two and 1 (Captum's documentation advises to check
# it, and names no bound; assumption).
TOLERANCE = 0.01


def integrated_gradients(
    model: Any,
    inputs: Any,
    *,
    target: Any = None,
    baseline: Mapping[str, Any] | None = None,
    steps: int = STEPS,
) -> Attribution:
    """Return the integrated gradients of rows.

    Args:
      model: a `Trainer`.
      inputs: rows: an array, a dict of arrays by name, or raw rows.
      target: number of the output to explain, for all rows or for each; None: the
        largest.
      baseline: rows of inputs, by name, from which the line begins; None: see
        `Subject.baseline`.
      steps: points on the line; more are taken where the shares do not add up.

    Raises:
      ModelError: the model is an artifact, whose program has no gradient.
      DataError: the rows are not the model's inputs, or there is no such output.
    """
    subject = subject_of(model)
    if not subject.is_open:
        raise ModelError(
            "the program of an artifact has no gradient",
            where=METHOD,
            remedy='explain it by "occlusion", or the trainer that it was made of',
        )
    rows = subject.inputs_of(inputs)
    wanted = targets_of(subject.outputs(rows), target)
    path = _Path(subject, rows, wanted, dict(baseline or {}))
    values, points = path.integrated(steps)
    return Attribution(
        METHOD,
        values,
        wanted,
        path.end,
        path.begin,
        {name: own for name, own in subject.names.items() if name in values},
        points,
    )


class _Path:
    """The straight line from a baseline to rows, in numbers and in looked-up rows.

    Attributes:
      begin: outputs at the baseline, (rows,).
      end: outputs at the rows, (rows,).
    """

    def __init__(
        self,
        subject: Subject,
        rows: dict[str, np.ndarray],
        target: np.ndarray,
        baseline: dict[str, Any],
    ):
        self._subject = subject
        self._target = jnp.asarray(target)
        self._ids: dict[str, jax.Array] = {}
        found = self._lookups(rows)
        looking = {name for name, _, _ in found}
        self._origins: dict[str, tuple[str, int]] = {}
        self._last: dict[str, jax.Array] = {}
        self._first: dict[str, jax.Array] = {}
        for name, array in rows.items():
            if name in looking:
                self._ids[name] = jnp.asarray(array)
            else:
                empty = baseline.get(name, subject.baseline(name))
                self._add_numbers(name, array, empty)
        for at, (name, dims, value) in enumerate(found):
            self._add_lookup(f"lookup {at}", name, dims, value)

        self._value = jax.jit(self._run)
        self._slope = jax.jit(jax.grad(lambda point: self._run(point).sum()))
        self.begin = np.asarray(self._value(self._first))
        self.end = np.asarray(self._value(self._last))

    def integrated(
        self,
        steps: int,
    ) -> tuple[dict[str, np.ndarray], int]:
        """Return the shares by input, and the points it took."""
        while True:
            values = self._by_input(self._means(steps))
            difference = self.end - self.begin
            apart = np.abs(total_of(values) - difference)
            scale = np.maximum(1, np.abs(difference))
            if (apart <= TOLERANCE * scale).all() or 2 * steps > MOST_STEPS:
                return values, steps
            steps *= 2

    # ---- internals ----

    def _add_numbers(
        self,
        name: str,
        array: np.ndarray,
        empty: Any,
    ) -> None:
        """Let the line go from an empty input to this one."""
        self._last[name] = jnp.asarray(array, jnp.float32)
        start = jnp.asarray(empty, jnp.float32)
        self._first[name] = jnp.broadcast_to(start, array.shape)

    def _add_lookup(
        self,
        key: str,
        name: str,
        dims: int,
        value: jax.Array,
    ) -> None:
        """Let the line go from zeros to the rows that an input looks up."""
        self._origins[key] = (name, dims)
        self._last[key] = value
        self._first[key] = jnp.zeros_like(value)

    def _lookups(
        self,
        rows: Mapping[str, np.ndarray],
    ) -> list[tuple[str, int, jax.Array]]:
        """Return (input, its count of dims, looked-up rows) of each look-up."""
        given = {name: jnp.asarray(array) for name, array in rows.items()}
        found = []
        for one in seeing(self._subject.run, is_lookup)(given):
            (name, *_) = sorted(one.origins[1])
            row_dims = len(one.eqn.params["dimension_numbers"].offset_dims)
            found.append((name, one.value.ndim - row_dims, one.value))
        return found

    def _run(
        self,
        point: Mapping[str, jax.Array],
    ) -> jax.Array:
        """Return the outputs at a point of the line, (rows,)."""
        numbers = {name: x for name, x in point.items() if name not in self._origins}
        count = 0

        def visit(step: Step) -> list[Any] | None:
            nonlocal count
            if not is_lookup(step):
                return None
            count += 1
            return [point[f"lookup {count - 1}"]]

        outputs = watched(self._subject.run, numbers | self._ids, visit)
        return chosen(outputs, self._target)

    def _means(
        self,
        steps: int,
    ) -> dict[str, jax.Array]:
        """Return the mean slope along the line, by the rule of Gauss and Legendre."""
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        total = jax.tree.map(jnp.zeros_like, self._last)
        for node, weight in zip(nodes, weights, strict=True):
            # from -1 to 1, and what is wanted is from 0 to 1
            slope = self._slope(self._between((node + 1) / 2))
            total = jax.tree.map(
                lambda a, b, w=weight / 2: a + w * b,
                total,
                slope,
            )
        return total

    def _between(
        self,
        share: float,
    ) -> dict[str, jax.Array]:
        def point(
            first: jax.Array,
            last: jax.Array,
        ) -> jax.Array:
            return first + share * (last - first)

        return jax.tree.map(point, self._first, self._last)

    def _by_input(
        self,
        slopes: Mapping[str, jax.Array],
    ) -> dict[str, np.ndarray]:
        values: dict[str, np.ndarray] = {}
        for key, slope in slopes.items():
            share = np.asarray((self._last[key] - self._first[key]) * slope)
            name = key
            if key in self._origins:
                name, dims = self._origins[key]
                share = share.sum(axis=tuple(range(dims, share.ndim)))
                share = share.reshape(self._ids[name].shape[: share.ndim])
            values[name] = values[name] + share if name in values else share
        return values
