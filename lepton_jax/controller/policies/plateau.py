"""Reduction of the learning rate on a plateau."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from lepton_jax.controller.policy import Policy, check_range, is_better_lower


class Plateau(NamedTuple):
    """State of `plateau`.

    Attributes:
      factor: factor of the learning rate, float32 ().
      best: the best look so far, float32 (); its sign is such that lower is better.
      total: sum of the values since the last look, float32 ().
      seen: values in that sum; of evaluations their number so far, int32 ().
      waited: looks since the best one, int32 ().
      cooling: looks until the next ones count again, int32 ().
    """

    factor: Any
    best: Any
    total: Any
    seen: Any
    waited: Any
    cooling: Any


def plateau(
    on: str = "loss",
    factor: float = 0.5,
    patience: int = 10,
    *,
    every: int = 50,
    rtol: float = 1e-3,
    cooldown: int = 0,
    floor: float = 0.01,
) -> Policy:
    """Reduce the learning rate when a signal has stopped improving.

    The policy looks at the signal `on` once in `every` steps, at its mean over these
    steps; where `on` begins with "evaluation_", it looks at each new evaluation. A look
    is better than the best one b by

        value < b - rtol * |b|

    for losses and errors; of other metrics higher values are better. After `patience`
    looks in a row that are no better,

        rate_factor <- max(rate_factor * factor, floor)

    and `cooldown` looks pass before the next ones count. Values that are not finite are
    not looked at.

    References:
      `optax.contrib.reduce_on_plateau`, which decides the same on the same looks.

    Args:
      on: "loss", "evaluation_loss", or another signal.
      factor: factor of the learning rate at each reduction.
      patience: looks without improvement before a reduction.
      every: steps in a look.
      rtol: share of the best value by which a better one must differ.
      cooldown: looks that do not count after a reduction.
      floor: the least product of the factors.

    Raises:
      RecipeError: an argument is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from lepton_jax import controllers
      >>> policy = controllers.plateau(every=1, patience=2)
      >>> state = policy.init()
      >>> for loss in (1.0, 0.8, 0.8, 0.8):
      ...     moves, state = policy.update({"loss": jnp.float32(loss)}, state)
      ...     print(float(moves["learning_rate"]))
      1.0
      1.0
      1.0
      0.5
    """
    check_range(
        "plateau",
        0,
        1,
        factor=factor,
        floor=floor,
        rtol=rtol,
    )
    check_range(
        "plateau",
        1,
        math.inf,
        whole=True,
        patience=patience,
        every=every,
    )
    check_range(
        "plateau",
        0,
        math.inf,
        whole=True,
        cooldown=cooldown,
    )
    sign = 1.0 if is_better_lower(on) else -1.0
    evaluated = on.startswith("evaluation_")

    def init() -> Plateau:
        return Plateau(
            factor=jnp.float32(1),
            best=jnp.float32(math.inf),
            total=jnp.float32(0),
            seen=jnp.int32(0),
            waited=jnp.int32(0),
            cooling=jnp.int32(0),
        )

    def judged(
        state: Plateau,
        look: Any,
        value: Any,
    ) -> Plateau:
        """Return the state after a value, which only counts if it is a look."""
        compared = jnp.isfinite(state.best)
        bar = state.best - rtol * jnp.abs(state.best)
        better = value < jnp.where(compared, bar, state.best)
        fresh = better | (state.cooling > 0)
        waited = jnp.where(fresh, 0, state.waited + 1)

        reduce = look & (waited >= patience)
        reduced = jnp.maximum(state.factor * factor, jnp.minimum(floor, state.factor))
        held = jnp.where(reduce, reduced, state.factor)

        best = jnp.where(better, value, state.best)
        waited = jnp.where(reduce, 0, waited)
        cooling = jnp.maximum(state.cooling - 1, 0)
        cooling = jnp.where(reduce, cooldown, cooling)
        return state._replace(
            factor=held,
            best=jnp.where(look, best, state.best),
            waited=jnp.where(look, waited, state.waited),
            cooling=jnp.where(look, cooling, state.cooling),
        )

    def update(
        signals: Mapping[str, Any], state: Plateau
    ) -> tuple[dict[str, Any], Plateau]:
        value = sign * signals[on]
        if evaluated:
            look, seen = _new_evaluation(signals["evaluations"], state.seen, value)
            total = state.total
        else:
            look, value, total, seen = _mean_of_window(state, value, every)
        state = judged(state, look, value)._replace(total=total, seen=seen)
        return {"learning_rate": state.factor}, state

    return Policy(
        "plateau",
        init,
        update,
        watches=(on, "evaluations") if evaluated else (on,),
        moves=("learning_rate",),
    )


def _new_evaluation(
    evaluations: Any,
    seen: Any,
    value: Any,
) -> tuple[Any, Any]:
    """Whether there is a new evaluation, and the number of evaluations so far."""
    count = jnp.nan_to_num(
        evaluations,
        nan=0.0,
        posinf=0.0,
        neginf=0.0,
    )
    count = count.astype(jnp.int32)
    return (count != seen) & jnp.isfinite(value), count


def _mean_of_window(
    state: Plateau,
    value: Any,
    every: int,
) -> tuple[Any, ...]:
    """Add a value to the window.

    Returns:
      Whether the window is full, its mean, and its sum and count, 0 after a full one.
    """
    usable = jnp.isfinite(value)
    total = jnp.where(
        usable,
        state.total + value,
        state.total,
    )
    seen = state.seen + usable
    full = seen >= every
    mean = total / jnp.maximum(seen, 1)
    return full, mean, jnp.where(full, 0.0, total), jnp.where(full, 0, seen)
