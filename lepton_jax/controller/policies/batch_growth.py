"""A batch that grows with the gradient's noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from lepton_jax.controller.policy import Policy, check_range


class Growth(NamedTuple):
    """State of `batch_growth`.

    Attributes:
      power: log2 of the batches per update, int32 ().
      asked: number of latest steps in a row that asked for more batches (above 0) or
        for fewer (below 0), int32 ().
    """

    power: Any
    asked: Any


def batch_growth(
    most: int = 16,
    share: float = 1.0,
    patience: int = 50,
    shrink: bool = True,
) -> Policy:
    """Accumulate more batches in an update as the gradient becomes noisier.

    An update takes k = 1, 2, 4, ... batches. At a batch as large as the gradient's
    noise scale B, half of the benefit of each sample is left; far below it, a step is
    mostly noise. With b samples in a batch,

        k <- 2 k    when share * B / b >= 2 k  for `patience` steps in a row
        k <- k / 2  when share * B / b <= k / 2 for `patience` steps in a row

    Between the two thresholds, a factor of 4, nothing moves.

    References:
      McCandlish et al. 2018, "An empirical model of large-batch training", section 2.
      Smith et al. 2018, "Don't decay the learning rate, increase the batch size".

    Args:
      most: the greatest number of batches per update.
      share: share of the noise scale that the samples of an update follow.
      patience: steps in a row that must agree before k changes.
      shrink: whether k also falls.

    Raises:
      RecipeError: an argument is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from lepton_jax import controllers
      >>> policy = controllers.batch_growth(patience=2)
      >>> state = policy.init()
      >>> signals = {"noise_scale": jnp.float32(500), "batch_size": jnp.float32(32)}
      >>> batches = []
      >>> for _ in range(6):
      ...     moves, state = policy.update(signals, state)
      ...     batches.append(int(moves["accumulate"]))
      >>> batches
      [1, 2, 2, 4, 4, 8]
    """
    check_range(
        "batch_growth",
        1,
        2**20,
        whole=True,
        most=most,
    )
    check_range("batch_growth", 1e-6, math.inf, share=share)
    check_range(
        "batch_growth",
        1,
        2**30,
        whole=True,
        patience=patience,
    )
    highest = int(math.log2(most))

    def init() -> Growth:
        return Growth(power=jnp.int32(0), asked=jnp.int32(0))

    def update(
        signals: Mapping[str, Any], state: Growth
    ) -> tuple[dict[str, Any], Growth]:
        wanted = share * signals["noise_scale"] / signals["batch_size"]
        now = jnp.exp2(state.power.astype(jnp.float32))
        more = jnp.isfinite(wanted) & (wanted >= 2 * now) & (state.power < highest)
        fewer = jnp.isfinite(wanted) & (wanted <= now / 2) & (state.power > 0) & shrink

        after = _after_asking(state, more, fewer, patience)
        batches = jnp.exp2(after.power.astype(jnp.float32))
        return {"accumulate": batches}, after

    return Policy(
        "batch_growth",
        init,
        update,
        watches=("noise_scale", "batch_size"),
        moves=("accumulate",),
    )


def _after_asking(
    state: Growth,
    more: Any,
    fewer: Any,
    patience: int,
) -> Growth:
    """Return the state after a step that asked for more batches, or for fewer."""
    rising = jnp.maximum(state.asked, 0) + 1
    falling = jnp.minimum(state.asked, 0) - 1
    asked = jnp.where(
        more,
        rising,
        jnp.where(fewer, falling, 0),
    )
    power = state.power + (asked >= patience) - (asked <= -patience)
    return Growth(
        power,
        jnp.where(
            jnp.abs(asked) >= patience,
            0,
            asked,
        ),
    )
