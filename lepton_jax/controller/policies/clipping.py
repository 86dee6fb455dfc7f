"""Clipping of the gradient at its usual norm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from lepton_jax.controller.policy import Policy, check_range

# norms are cut to this range before their logarithm is taken: float32 holds both ends
SMALLEST = 1e-30
LARGEST = 1e30


class History(NamedTuple):
    """State of `clip_by_history`.

    Attributes:
      quantile: q, the running quantile of log(norm), float32 ().
      spread: s, the moving mean distance of log(norm) from q, float32 ().
      count: norms that went in, int32 ().
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
    """Clip the gradient's norm at a running quantile of the norms before it.

    The quantile q of x = log(norm) is followed by stochastic approximation, which keeps
    none of the norms. With n norms so far:

        g = max(1 / (n + 1), 2 / window)
        s <- s + g * (|x - q| - s)
        q <- q + 2 * g * s * (quantile - [x <= q])
        clip_norm = factor * exp(q)

    The clip norm is that of the q before the present norm went in. A gradient that is
    not finite does not count, and clipping does not repair it: `guard` skips it.

    References:
      Seetharaman et al. 2020, "AutoClip: adaptive gradient clipping for source
      separation networks" (the quantile over the whole history).
      Kumar et al. 2025, "ZClip" (moving statistics).
      Tierney 1983, "A space-efficient recursive procedure for estimating a quantile of
      an unknown distribution".

    Args:
      quantile: the share of norms that are not clipped; AutoClip's own is 0.1.
      window: steps in which the past is forgotten.
      least: norms to see before any is clipped.
      factor: factor of the quantile.

    Raises:
      RecipeError: an argument is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from lepton_jax import controllers
      >>> policy = controllers.clip_by_history(least=1)
      >>> state = policy.init()
      >>> for norm in (2.0, 2.0, 50.0):
      ...     signals = {"gradient_norm": jnp.float32(norm)}
      ...     moves, state = policy.update(signals, state)
      ...     print(f"{moves['clip_norm']:.2f}")
      inf
      2.00
      1.90
    """
    check_range("clip_by_history", 0.01, 0.999, quantile=quantile)
    check_range(
        "clip_by_history",
        2,
        math.inf,
        whole=True,
        window=window,
    )
    check_range(
        "clip_by_history",
        1,
        math.inf,
        whole=True,
        least=least,
    )
    check_range("clip_by_history", 1e-6, math.inf, factor=factor)

    def init() -> History:
        return History(
            quantile=jnp.float32(0),
            spread=jnp.float32(0),
            count=jnp.int32(0),
        )

    def update(
        signals: Mapping[str, Any], state: History
    ) -> tuple[dict[str, Any], History]:
        norm = signals["gradient_norm"]
        usable = jnp.isfinite(norm) & (norm > 0)
        fresh = _followed(
            state,
            jnp.log(
                jnp.clip(
                    norm,
                    SMALLEST,
                    LARGEST,
                )
            ),
        )
        enough = state.count >= least
        limit = factor * jnp.exp(state.quantile)
        limit = jnp.where(enough, limit, jnp.inf)

        pairs = zip(fresh, state, strict=True)
        kept = (jnp.where(usable, new, old) for new, old in pairs)
        return {"clip_norm": limit}, History(*kept)

    def _followed(state: History, x: Any) -> History:
        q = state.quantile
        gain = jnp.maximum(1 / (state.count + 1.0), 2 / window)
        spread = state.spread + gain * (jnp.abs(x - q) - state.spread)
        moved = q + 2 * gain * spread * (quantile - (x <= q))
        first = state.count == 0
        return History(
            quantile=jnp.where(first, x, moved),
            spread=jnp.where(first, 1.0, spread),
            count=jnp.minimum(state.count + 1, 2**30),
        )

    return Policy(
        "clip_by_history",
        init,
        update,
        watches=("gradient_norm",),
        moves=("clip_norm",),
    )
