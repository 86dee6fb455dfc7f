"""Several optimizers, one of which is at work.

The knob "optimizer" says which one. The states of all are kept. The one that takes over
begins anew, but may carry the first moment of the one before: AdamW's `mu`, for
example, becomes SGD's momentum `trace`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lepton_jax.errors import RecipeError
from lepton_jax.step.optimizers.optimizer import (
    FORMING,
    SCHEDULED,
    Optimizer,
    unchanged,
)

# names that Optax's states have for first moments
MOMENTS = ("mu", "trace")


class Switchable(NamedTuple):
    """Several optimizers, of which the knob "optimizer" says which one is at work.

    Attributes:
      makers: functions of the learning rate to Optax transformations.
      carry: whether the one that takes over begins with the first moment of the one
        before, where both have one. All else of its state begins anew.
    """

    makers: tuple[Callable[[Any], optax.GradientTransformation], ...]
    carry: bool = True


def switchable(
    *makers: Callable[[Any], optax.GradientTransformation],
    carry: bool = True,
) -> Switchable:
    """Return several optimizers for `Recipe.optimizer`.

    All their states are kept, so memory is their sum.

    Args:
      *makers: functions of the learning rate, e.g. optax.adamw, lambda rate:
        optax.sgd(10 * rate, momentum=0.9).
      carry: see `Switchable`.

    Raises:
      RecipeError: there are fewer than two, or one is no function.
    """
    if len(makers) < 2 or not all(callable(make) for make in makers):
        raise RecipeError(
            f"switchable has {len(makers)} optimizers",
            where="switchable",
            remedy=(
                "give two or more functions of the learning rate, e.g. optax.adamw,"
                " optax.lion"
            ),
        )
    return Switchable(makers, carry)


class Switching:
    """Several optimizers as one.

    Args:
      each: the optimizers.
      carry: see `Switchable`.
    """

    def __init__(
        self,
        each: list[Optimizer],
        carry: bool,
    ):
        self._each = each
        self._carry = carry
        self._base: dict[str, float] = {}
        for optimizer in reversed(each):
            self._base |= optimizer.base

    def optimizer(self) -> Optimizer:
        """Return them in the form in which a train step applies them."""
        base = {**self._base, "optimizer": 0.0}
        return Optimizer(
            base,
            self.init,
            self.update,
            self.scheduled,
            [],
        )

    def init(self, params: Any) -> Any:
        """Return the states before the first update."""
        states = tuple(optimizer.init(params) for optimizer in self._each)
        return {"index": jnp.int32(0), "each": states}

    def update(
        self,
        gradients: Callable[[], Any],
        state: Any,
        params: Any,
        knobs: Mapping[str, Any],
        value: Any,
        finish: Callable[[Any, Any], Any] = unchanged,
    ) -> Any:
        """Make one update by the optimizer at work; see `Optimizer.update`."""
        before = state["index"]
        index = jnp.int32(knobs["optimizer"]) if "optimizer" in knobs else before

        def branch(number: int) -> Callable[[], Any]:
            def run() -> Any:
                start = self._start(number, state, params)
                own = self._own_knobs(number, knobs)
                moved, after = self._each[number].update(
                    gradients, start, params, own, value, finish
                )
                states = list(state["each"])
                states[number] = after
                return moved, tuple(states)

            return run

        branches = [branch(number) for number in range(len(self._each))]
        moved, states = jax.lax.switch(index, branches)
        return moved, {"index": index, "each": states}

    def scheduled(
        self,
        state: Any,
        params: Any,
        updates: Any,
    ) -> Any:
        """Return the schedule's rate; see `Optimizer.scheduled`."""
        pairs = zip(self._each, state["each"], strict=True)
        rates = [o.scheduled(own, params, updates) for o, own in pairs]
        return jnp.stack(rates)[state["index"]]

    def _start(
        self,
        number: int,
        state: Any,
        params: Any,
    ) -> Any:
        """Return the state from which an optimizer goes on, or begins if it is new."""
        before = state["index"]
        fresh = self._each[number].init(params)
        if self._carry:
            moments = [_moment(own) for own in state["each"]]
            fresh = _with_moment(fresh, moments, before)
        return jax.tree.map(
            lambda new, old: jnp.where(
                before != number,
                new,
                old,
            ),
            fresh,
            state["each"][number],
        )

    def _own_knobs(
        self,
        number: int,
        knobs: Mapping[str, Any],
    ) -> dict[str, Any]:
        base = self._each[number].base
        own = {
            name: _own_knob(
                name,
                knob,
                self._base[name],
                base[name],
            )
            for name, knob in knobs.items()
            if name in base
        }
        if SCHEDULED in knobs:
            own[SCHEDULED] = knobs[SCHEDULED]
        return own


def _own_knob(
    name: str,
    knob: Any,
    base: float,
    own: float,
) -> Any:
    """Return a knob of one optimizer.

    Its own value may be another than the base, which is that of the first optimizer.
    """
    if own == base or name == "learning_rate":
        return knob
    if name in FORMING or not base:
        return jnp.where(
            knob == jnp.float32(base),
            own,
            knob,
        )
    return own * (knob / base)


def _moment(state: Any) -> Any:
    """Return the first moment in an Optax state; None if it has none, or several.

    It is a tree of the parameters' structure.
    """
    for name in MOMENTS:
        moments = optax.tree_utils.tree_get_all_with_path(state, name)
        if len(moments) == 1:
            _, moment = moments[0]
            if jax.tree.leaves(moment):
                return moment
    return None


def _with_moment(
    fresh: Any,
    moments: list[Any],
    before: Any,
) -> Any:
    """Return a fresh state with the first moment of the optimizer before.

    Args:
      fresh: the state of the optimizer that takes over.
      moments: the first moment of each optimizer, or None.
      before: the number of the one before; its moment is only taken if there is one.
    """
    mine = _moment(fresh)
    if mine is None or all(moment is None for moment in moments):
        return fresh
    form: Any = jax.tree.structure(mine)

    def fitting(moment: Any) -> Any:
        fits = moment is not None and jax.tree.structure(moment) == form
        return moment if fits else mine

    def select(*leaves: Any) -> Any:
        dtype = leaves[0].dtype
        return jax.lax.select_n(before, *(x.astype(dtype) for x in leaves))

    chosen = jax.tree.map(select, *(fitting(moment) for moment in moments))
    name = next(n for n in MOMENTS if optax.tree_utils.tree_get_all_with_path(fresh, n))
    return optax.tree_utils.tree_set(fresh, **{name: chosen})
