"""Clipping of the gradient at what its norm usually is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from lepton_jax.controller.policy import Policy, checked


class History(NamedTuple):
    """The quantile of log(norm), the mean distance from it, float32 (), and how many
    norms went in.
    """

    quantile: Any
    spread: Any
    count: Any


def clip_by_history(
    quantile: float = 0.9,
    window: int = 200,
    least: int = 20,
    factor: float = 1.0,
) -> Policy:
    """Clips the gradient's norm at `factor` times the running quantile of the norms
    before.

    The quantile q of x = log(norm) is followed without keeping the norms, by stochastic
    approximation: q += g * s * (quantile - [x <= q]), with s the moving mean of |x - q|
    and gain g = max(1 / n, 2 / window).

    Sources: Seetharaman et al. 2020, "AutoClip: adaptive gradient clipping for source
    separation networks" (the quantile over the whole history); Kumar et al. 2025,
    "ZClip" (moving statistics); Tierney 1983 for the approximation.

    Args:
      quantile: of the norms; AutoClip's own is 0.1.
      window: steps in which the past is forgotten.
      least: norms to see before any is clipped.

    A gradient that is not finite counts for nothing, and is not mended by clipping:
    `guard` skips it.
    """
    checked("clip_by_history", 0.01, 0.999, quantile=quantile)
    checked(
        "clip_by_history",
        2,
        math.inf,
        whole=True,
        window=window,
    )
    checked(
        "clip_by_history",
        1,
        math.inf,
        whole=True,
        least=least,
    )
    checked("clip_by_history", 1e-6, math.inf, factor=factor)

    def init() -> History:
        return History(
            jnp.float32(0),
            jnp.float32(0),
            jnp.int32(0),
        )

    def update(
        signals: Mapping[str, Any], state: History
    ) -> tuple[dict[str, Any], History]:
        norm = signals["gradient_norm"]
        usable = jnp.isfinite(norm) & (norm > 0)
        log = jnp.log(jnp.clip(norm, 1e-30, 1e30))
        gain = jnp.maximum(1 / (state.count + 1.0), 2 / window)
        spread = state.spread + gain * (jnp.abs(log - state.quantile) - state.spread)
        moved = state.quantile + 2 * gain * spread * (
            quantile - (log <= state.quantile)
        )
        first = state.count == 0
        fresh = History(
            jnp.where(first, log, moved),
            jnp.where(first, 1.0, spread),
            jnp.minimum(state.count + 1, 2**30),
        )
        limit = jnp.where(
            state.count >= least,
            factor * jnp.exp(state.quantile),
            jnp.inf,
        )
        return {"clip_norm": limit}, History(
            *(jnp.where(usable, n, o) for n, o in zip(fresh, state, strict=True))
        )

    return Policy(
        "clip_by_history",
        init,
        update,
        watches=("gradient_norm",),
        moves=("clip_norm",),
    )
