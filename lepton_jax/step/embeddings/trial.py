"""Whether an optimizer can update an embedding by rows: it is tried on a small one.

No list of optimizers is needed, and chains, masks and parts of the model are judged as
they are. A table of `ROWS` rows gets an update by a gradient in all rows. Then a
gradient comes in three rows alone, and is applied twice: to the whole, and to these
three rows of parameters, gradients and moments.

- The three rows differ between both: the optimizer is not row-wise. LAMB measures a
  norm of the whole, Adafactor a mean over the rows.
- Else, if the whole has moved other rows, or their moments: it is row-wise, but lazy.
  Adam's moments decay everywhere.
- Else both are the same: SGD, Adagrad.

All of it is done once more with the optimizer's counts far from the start, because the
rate of a warmup is 0 there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import Enum
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lepton_jax.step.embeddings.rows import rowwise_arrays
from lepton_jax.step.embeddings.tables import followed
from lepton_jax.step.optimizers.optimizer import SCHEDULED, Optimizer
from lepton_jax.step.optimizers.schedule import nodes
from lepton_jax.step.optimizers.transformation import Lookahead
from lepton_jax.step.state import State
from lepton_jax.trees import by_path, with_leaves

ROWS = 7
TOUCHED = (1, 3, 4)
# entries of the other dims; assumption
TRIED = 3
# the learning rate and the loss of the trial; assumption
RATE = 0.1
LOSS = 1.0
# of a knob that is 0 in the recipe; assumption
MOVED = 0.1
# steps at which the trial is made once more, past any warmup; assumption
LATER = 100_000
# relative difference that is rounding, float32
ROUNDING = 1e-5
# the same of entries that are 0 but for rounding
LEAST = 1e-7

# states of optimizers with which a row that is touched no more would never get what is
# due to it, or whose weights are not those of the parameters
UNFIT = (
    optax.MultiStepsState,
    optax.LookaheadState,
    optax.contrib.ScheduleFreeState,
    optax.contrib.SAMState,
    Lookahead,
)


class Verdict(Enum):
    """Comparison of an optimizer's update by rows with that of the whole."""

    EXACT = "the same"
    LAZY = "other rows wait"
    UNFIT = "not row-wise"


def tried(
    optimizer: Optimizer,
    params: Any,
    state: Any,
    tables: Collection[str],
) -> dict[str, Verdict]:
    """Return how an optimizer updates some tables by rows.

    Args:
      optimizer: the optimizer.
      params: shapes of the parameters.
      state: shapes of its state.
      tables: paths of the tables.
    """
    sizes = {path: leaf.shape[0] for path, leaf in by_path(params).items()}
    whole = State((), params, (), state, (), ())
    unfit = any(isinstance(node, UNFIT) for node in nodes(state))
    verdicts = {
        path: Verdict.UNFIT
        for path in tables
        if unfit or not _state_has_rows(whole, path, sizes[path])
    }
    rest = [path for path in tables if path not in verdicts]
    if rest:
        trial = _Trial(optimizer, params, rest)
        verdicts |= {path: trial.verdict(path) for path in rest}
    return verdicts


# ---- internals ----


class _Trial:
    """The trial of an optimizer.

    Args:
      optimizer: the optimizer.
      params: shapes of the parameters.
      tables: paths of the tables.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        params: Any,
        tables: Collection[str],
    ):
        self._optimizer = optimizer
        self._tables = dict.fromkeys(tables, ROWS)
        self._generator = np.random.default_rng(0)
        small = self._random(params)
        first = self._random(params)
        last = self._with_rows(self._random(params), self._only_touched)
        run = jax.jit(self._compared)
        self._outcomes = [
            jax.tree.map(np.asarray, run(small, first, last, later))
            for later in (0, LATER)
        ]

    def verdict(
        self,
        path: str,
    ) -> Verdict:
        """Return the verdict on one table."""
        moved = False
        exact = True
        for outcome in self._outcomes:
            before, whole, parts = (
                self._arrays_of(path, outcome[name])
                for name in ("before", "whole", "parts")
            )
            for own, after in whole.items():
                if not _alike(after[list(TOUCHED)], parts[own]):
                    return Verdict.UNFIT
                untouched = np.delete(np.arange(ROWS), TOUCHED)
                exact &= np.array_equal(after[untouched], before[own][untouched])
            own = f"params/{path}"
            moved |= not np.array_equal(whole[own], before[own])
        return Verdict.EXACT if exact and moved else Verdict.LAZY

    def _compared(
        self,
        params: Any,
        first: Any,
        last: Any,
        later: Any,
    ) -> Any:
        """Return parameters and state before the last gradient, and after it."""
        state = self._optimizer.init(params)
        params, state = self._updated(first, state, params)

        def late(x: Any) -> Any:
            counts = x.ndim == 0 and jnp.issubdtype(x.dtype, jnp.integer)
            return x + jnp.asarray(later, x.dtype) if counts else x

        before = State(
            (),
            params,
            (),
            jax.tree.map(late, state),
            (),
            (),
        )
        part = self._with_rows(before, lambda x: x[np.array(TOUCHED)])
        gradient = self._with_rows(last, lambda x: x[np.array(TOUCHED)])
        return {
            "before": _of_numbers(before),
            "whole": self._stepped(last, before),
            "parts": self._stepped(gradient, part),
        }

    def _stepped(
        self,
        gradient: Any,
        before: State,
    ) -> dict[str, Any]:
        params, state = self._updated(
            gradient,
            before.optimizer,
            before.params,
        )
        return _of_numbers(State((), params, (), state, (), ()))

    def _updated(
        self,
        gradient: Any,
        state: Any,
        params: Any,
    ) -> Any:
        # a knob at 0, such as a weight decay, may be moved in a run
        base = self._optimizer.base.items()
        knobs = {name: jnp.float32(x if x else MOVED) for name, x in base}
        if "learning_rate" in knobs:
            # as if a person had set it: then no schedule makes it 0
            knobs["learning_rate"] = jnp.float32(RATE)
            knobs[SCHEDULED] = jnp.float32(jnp.nan)
        loss = jnp.float32(LOSS)
        return self._optimizer.update(
            lambda: gradient,
            state,
            params,
            knobs,
            loss,
        )

    # ---- trees ----

    def _random(
        self,
        params: Any,
    ) -> Any:
        """Return normal numbers like the parameters, but small."""
        leaves = []
        for path, x in by_path(params).items():
            shape = [min(extent, TRIED) for extent in x.shape]
            if path in self._tables:
                shape[0] = ROWS
            numbers = self._generator.normal(size=shape)
            leaves.append(jnp.asarray(numbers, x.dtype))
        return with_leaves(params, leaves)

    def _with_rows(
        self,
        tree: Any,
        function: Any,
    ) -> Any:
        """Apply a function to the arrays that have the rows of a table."""
        is_state = isinstance(tree, State)
        state = tree if is_state else State((), tree, (), (), (), ())
        own = rowwise_arrays(self._tables, state)
        leaves = [
            function(x) if path in own else x for path, x in by_path(state).items()
        ]
        mapped = with_leaves(state, leaves)
        return mapped if is_state else mapped.params

    def _only_touched(
        self,
        gradient: Any,
    ) -> Any:
        mask = np.isin(np.arange(ROWS), TOUCHED)
        return gradient * mask.reshape((ROWS,) + (1,) * (gradient.ndim - 1))

    def _arrays_of(
        self,
        path: str,
        leaves: Mapping[str, np.ndarray],
    ) -> dict[str, np.ndarray]:
        params = {p.removeprefix("params/") for p in leaves if p.startswith("params/")}
        return {
            own: x
            for own, x in leaves.items()
            if x.ndim and followed(own, params) == path
        }


def _state_has_rows(
    state: State,
    table: str,
    size: int,
) -> bool:
    """Whether all arrays that belong to a table have its rows.

    Adafactor's have not: one of them holds a mean over the rows for each column.
    """
    leaves = by_path(state)
    params = {p.removeprefix("params/") for p in leaves if p.startswith("params/")}
    return all(
        not leaf.ndim or leaf.shape[0] == size
        for path, leaf in leaves.items()
        if followed(path, params) == table
    )


def _of_numbers(state: State) -> dict[str, Any]:
    """Return the arrays of a state by path, random keys left out."""
    return {
        path: x
        for path, x in by_path(state).items()
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    }


def _alike(
    left: np.ndarray,
    right: np.ndarray,
) -> bool:
    return left.shape == right.shape and np.allclose(
        left,
        right,
        rtol=ROUNDING,
        atol=LEAST,
        equal_nan=True,
    )
