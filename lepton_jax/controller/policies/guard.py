"""Protection against spikes: the update is skipped or clipped, and if that does not
help the run goes back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from lepton_jax.controller.policy import Policy, checked
from lepton_jax.errors import RecipeError

LEAST = 20  # values that a band is made of before anything is outside of it
# deviations above the mean that a value counts for at most: a lasting change widens the
# band by 5 % a step
CUT = 2.5


class Band(NamedTuple):
    """Moving mean and variance, float32 (), and how many values are in them."""

    mean: Any
    variance: Any
    count: Any


class Guard(NamedTuple):
    """Bands of the loss and of log(gradient norm); the loss at first and at best; what
    of the budget is used, float32 (); and steps on end in which the run was lost, int32
    ().
    """

    loss: Band
    norm: Band
    first: Any
    best: Any
    used: Any
    lost: Any


def guard(
    mode: str = "skip",
    deviations: float = 4.0,
    *,
    budget: int = 30,
    window: int = 1000,
    decay: float = 0.98,
    margin: float = 0.1,
    far: float = 0.75,
    patience: int = 30,
    rollbacks: int = 2,
    rate: float = 0.5,
) -> Policy:
    """Keeps updates out whose loss or gradient norm is a spike, and asks for a rollback
    when the run is lost.

    A spike is a gradient or loss that is not finite; a loss above mean + `deviations`
    standard deviations of those before, and by more than `margin` of what the run has
    gained so far; or a gradient norm as far above, and three times the usual, both by
    its logarithm. Mean and variance are moving ones (`decay`). Finite spikes enter
    them, cut down to 2.5 deviations: one of any size changes little, but a lasting
    change widens the band, by about 5 % a step, until it is the new normal.

    The gain is first minus best (moving mean) loss, and at least half of the first. The
    run is lost in a step whose loss or gradient is not finite, or whose loss takes back
    more than `far` of the gain; after `patience` such steps on end, whether they were
    skipped or not, it asks for a rollback.

    Norm and loss are those of the global arrays: all hosts decide alike. Where samples
    are discounted (`label_noise`), the loss is of what is kept.

    Sources: Chowdhery et al. 2022, PaLM, section 5.1 (skip the batches of a spike and
    restart before it); Kumar et al. 2025, "ZClip: adaptive spike mitigation for LLM
    pre-training" (moving mean and variance of the norm, its outliers entering as
    clipped).

    Args:
      mode: "skip"; or "clip": a spike that is finite is applied with the usual norm of
        the gradient.
      budget: spikes that are kept out within `window` steps; further ones pass, if they
        are finite. (It is a bucket that drains by budget / window in a step.)
      rollbacks: the host goes back at most so often, and ends the run after that.
      rate: factor of the learning rate for each time that it went back.

    Raises:
      RecipeError: an argument is out of range.
    """
    if mode not in ("skip", "clip"):
        raise RecipeError(
            f"mode is {mode!r}", where="controllers.guard", remedy="give skip or clip"
        )
    checked("guard", 0.1, math.inf, deviations=deviations)
    checked(
        "guard",
        1,
        math.inf,
        whole=True,
        budget=budget,
        window=window,
        patience=patience,
    )
    checked(
        "guard",
        0,
        math.inf,
        whole=True,
        rollbacks=rollbacks,
    )
    checked("guard", 0.5, 0.9999, decay=decay)
    checked(
        "guard",
        0,
        math.inf,
        margin=margin,
        far=far,
    )
    checked("guard", 0, 1, rate=rate)

    def init() -> Guard:
        band = lambda: Band(
            jnp.float32(0),
            jnp.float32(0),
            jnp.int32(0),
        )
        return Guard(
            band(),
            band(),
            jnp.float32(0),
            jnp.float32(0),
            jnp.float32(0),
            jnp.int32(0),
        )

    def update(
        signals: Mapping[str, Any], state: Guard
    ) -> tuple[dict[str, Any], Guard]:
        loss = signals["loss_kept"]
        log = jnp.log(
            jnp.clip(
                signals["gradient_norm"],
                1e-30,
                1e30,
            )
        )
        finite = (
            jnp.isfinite(loss)
            & jnp.isfinite(signals["gradient_norm"])
            & (jnp.abs(loss) < 1e30)
        )
        gain = jnp.maximum(state.first - state.best, jnp.abs(state.first) / 2)
        known = state.loss.count >= LEAST
        above = _above(state.loss, loss, deviations, margin * gain) | _above(
            state.norm, log, deviations, math.log(3)
        )
        spike = ~finite | (known & above)
        left = jnp.maximum(state.used - budget / window, 0.0)
        act = spike & (left + 1 <= budget)

        level = state.best + jnp.maximum(
            far * gain, deviations * jnp.sqrt(state.loss.variance)
        )
        gone = ~finite | (known & (loss > level))
        lost = jnp.where(
            gone,
            state.lost + 1,
            0,
        )
        rollback = lost >= patience
        bands = Guard(
            _entered(
                state.loss,
                loss,
                finite,
                decay,
                margin * gain,
            ),
            _entered(
                state.norm,
                log,
                finite,
                decay,
                math.log(3),
            ),
            *state[2:],
        )
        after = bands.loss.mean
        first = jnp.where(known, state.first, after)
        best = jnp.where(
            known,
            jnp.minimum(state.best, after),
            after,
        )
        moves = {
            "skip": ~finite | act if mode == "skip" else ~finite,
            "rollback": rollback,
        }
        if mode == "clip":
            moves["clip_norm"] = jnp.where(
                act & finite,
                jnp.exp(state.norm.mean),
                jnp.inf,
            )
        return moves, bands._replace(
            first=first,
            best=best,
            used=left + act,
            lost=jnp.where(rollback, 0, lost),
        )

    moves = (
        ("skip", "rollback") if mode == "skip" else ("skip", "rollback", "clip_norm")
    )
    return Policy(
        "guard",
        init,
        update,
        watches=("loss_kept", "gradient_norm"),
        moves=moves,
        limits={
            "rollbacks": rollbacks,
            "rate": rate,
            "patience": patience,
        },
    )


def _above(
    band: Band,
    value: Any,
    deviations: float,
    margin: Any,
) -> Any:
    return value > band.mean + jnp.maximum(deviations * jnp.sqrt(band.variance), margin)


def _entered(
    band: Band,
    value: Any,
    usable: Any,
    decay: float,
    margin: Any,
) -> Band:
    """The band with one more value, cut off at `CUT` deviations; the first ones count
    alike, so that the start needs no correction, and are cut off nowhere.
    """
    gain = jnp.maximum(1 / (band.count + 1.0), 1 - decay)
    most = jnp.where(
        band.count < LEAST,
        jnp.inf,
        CUT * jnp.maximum(jnp.sqrt(band.variance), margin / 100),
    )
    away = jnp.where(
        usable,
        jnp.minimum(value - band.mean, most),
        0.0,
    )
    variance = (1 - gain) * (band.variance + gain * away**2)
    return Band(
        band.mean + gain * away,
        jnp.where(usable, variance, band.variance),
        jnp.minimum(band.count + usable, 2**30),
    )
