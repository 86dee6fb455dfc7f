"""A batch that grows with the gradient's noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from lepton_jax.controller.policy import Policy, checked


class Growth(NamedTuple):
    """log2 of the batches per update, and steps on end that asked for more (above 0) or
    fewer (below), int32 ().
    """

    power: Any
    asked: Any


def batch_growth(
    most: int = 16,
    share: float = 1.0,
    patience: int = 50,
    shrink: bool = True,
) -> Policy:
    """Accumulates 1, 2, 4, ... batches in an update, so that its samples follow `share`
    of the gradient's noise scale.

    At a batch of the noise scale's size, half of the benefit of each sample is left;
    far below it, a step is mostly noise. The number doubles when, for `patience` steps
    on end, twice as many samples would still be no more than `share` of the noise
    scale; it is halved when half as many would be no fewer. Between the two, a factor
    of 4, nothing moves.

    Sources: McCandlish et al. 2018, "An empirical model of large-batch training",
    section 2; Smith et al. 2018, "Don't decay the learning rate, increase the batch
    size".

    Args:
      most: batches per update at most: 1, 2, 4, ...
      shrink: whether the number also falls.
    """
    checked(
        "batch_growth",
        1,
        2**20,
        whole=True,
        most=most,
    )
    checked("batch_growth", 1e-6, math.inf, share=share)
    checked(
        "batch_growth",
        1,
        2**30,
        whole=True,
        patience=patience,
    )
    highest = int(math.log2(most))

    def init() -> Growth:
        return Growth(jnp.int32(0), jnp.int32(0))

    def update(
        signals: Mapping[str, Any], state: Growth
    ) -> tuple[dict[str, Any], Growth]:
        wanted = share * signals["noise_scale"] / signals["batch_size"]
        now = jnp.exp2(state.power.astype(jnp.float32))
        more = jnp.isfinite(wanted) & (wanted >= 2 * now) & (state.power < highest)
        fewer = jnp.isfinite(wanted) & (wanted <= now / 2) & (state.power > 0) & shrink
        asked = jnp.where(
            more,
            jnp.maximum(state.asked, 0) + 1,
            jnp.where(
                fewer,
                jnp.minimum(state.asked, 0) - 1,
                0,
            ),
        )
        power = state.power + (asked >= patience) - (asked <= -patience)
        asked = jnp.where(
            jnp.abs(asked) >= patience,
            0,
            asked,
        )
        return {"accumulate": jnp.exp2(power.astype(jnp.float32))}, Growth(power, asked)

    return Policy(
        "batch_growth",
        init,
        update,
        watches=("noise_scale", "batch_size"),
        moves=("accumulate",),
    )
