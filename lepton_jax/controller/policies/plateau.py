"""Reduction of the learning rate on a plateau."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from lepton_jax.controller.policy import Policy, checked, falls


class Plateau(NamedTuple):
    """The factor, the best value, and what is summed of the present window, float32 ();
    three counts, int32 ().
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
    """Multiplies the learning rate by `factor` after `patience` looks at `on` that
    found it no better than the best one.

    A look is the mean of `every` steps, or, where `on` begins with "evaluation_", each
    new evaluation. Better is by `rtol` of the best value: lower for losses and errors,
    higher for other metrics. After a reduction, `cooldown` looks pass before the next
    ones count. Values that are not finite are not looked at.

    Source: `optax.contrib.reduce_on_plateau`, whose decisions on the same looks are
    these.

    Args:
      on: "loss", "evaluation_loss", or another signal.
      floor: the least that the factors may come to.
    """
    checked(
        "plateau",
        0,
        1,
        factor=factor,
        floor=floor,
        rtol=rtol,
    )
    checked(
        "plateau",
        1,
        math.inf,
        whole=True,
        patience=patience,
        every=every,
    )
    checked(
        "plateau",
        0,
        math.inf,
        whole=True,
        cooldown=cooldown,
    )
    sign = 1.0 if falls(on) else -1.0
    evaluated = on.startswith("evaluation_")

    def init() -> Plateau:
        return Plateau(
            jnp.float32(1),
            jnp.float32(math.inf),
            jnp.float32(0),
            jnp.int32(0),
            jnp.int32(0),
            jnp.int32(0),
        )

    def update(
        signals: Mapping[str, Any], state: Plateau
    ) -> tuple[dict[str, Any], Plateau]:
        value = sign * signals[on]
        if evaluated:  # `seen` is the number of evaluations so far
            count = jnp.nan_to_num(
                signals["evaluations"],
                nan=0.0,
                posinf=0.0,
                neginf=0.0,
            ).astype(jnp.int32)
            look = (count != state.seen) & jnp.isfinite(value)
            total = state.total
            seen = count
        else:
            usable = jnp.isfinite(value)
            total = jnp.where(
                usable,
                state.total + value,
                state.total,
            )
            seen = state.seen + usable
            look = seen >= every
            value = total / jnp.maximum(seen, 1)
            total = jnp.where(look, 0.0, total)
            seen = jnp.where(look, 0, seen)
        better = value < jnp.where(
            jnp.isfinite(state.best),
            state.best - rtol * jnp.abs(state.best),
            state.best,
        )
        waited = jnp.where(
            better | (state.cooling > 0),
            0,
            state.waited + 1,
        )
        reduce = look & (waited >= patience)
        held = jnp.where(
            reduce,
            jnp.maximum(state.factor * factor, jnp.minimum(floor, state.factor)),
            state.factor,
        )
        fresh = Plateau(
            held,
            jnp.where(better, value, state.best),
            total,
            seen,
            jnp.where(reduce, 0, waited),
            jnp.where(
                reduce,
                cooldown,
                jnp.maximum(state.cooling - 1, 0),
            ),
        )
        return {"learning_rate": held}, Plateau(
            held,
            *(
                jnp.where(look, n, o) if name not in ("total", "seen") else n
                for name, n, o in zip(fresh._fields, fresh, state, strict=True)
                if name != "factor"
            ),
        )

    return Policy(
        "plateau",
        init,
        update,
        watches=(on, "evaluations") if evaluated else (on,),
        moves=("learning_rate",),
    )
