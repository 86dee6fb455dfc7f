"""Protection against spikes of the loss and of the gradient, and against a wrong rate.

A spike is skipped or clipped. If that does not help, the policy asks for a rollback. A
learning rate that is set many times as high as any before is not followed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from lepton_jax.controller.policy import Notice, Policy, check_range
from lepton_jax.errors import RecipeError

# times the highest learning rate so far above which one that is set is a slip;
# assumption
SLIP = 30.0
# values in a band before anything is outside of it; assumption
LEAST = 20
# deviations above the mean that a value counts for at most: a lasting change widens the
# band by 5 % a step; assumption
CUT = 2.5
# a gradient norm is no spike below three times the usual one; assumption
THREEFOLD = math.log(3)
# nor below ten times, while the loss is below its mean: what is learned quickly makes
# the gradient grow, too; assumption
TENFOLD = math.log(10)
# decay of the mean with a short memory; assumption
NEAR = 0.9
# losses and norms of at least this size count as not finite, and their squares
# overflow float32
HUGE = 1e30
TINY = 1e-30
SPIKES = Notice(
    "there were more spikes than the guard keeps out, so it let some pass",
    "lower the learning rate, set clip_norm, or look at the data of these steps",
)
JUMP = Notice(
    "a learning rate was set so much higher that the guard holds it back",
    "set it again in smaller steps, or give guard(jump=math.inf) to follow any",
)


class Band(NamedTuple):
    """The usual range of a value.

    Attributes:
      mean: moving mean, float32 ().
      near: the same with a short memory, which keeps up with a trend, float32 ().
      variance: moving variance around `near`, float32 ().
      count: values in both, int32 ().
    """

    mean: Any
    near: Any
    variance: Any
    count: Any


class Guard(NamedTuple):
    """State of `guard`.

    Attributes:
      loss: band of the loss.
      norm: band of log(gradient norm).
      first: moving mean of the loss after the first steps, float32 ().
      best: the lowest moving mean of the loss, float32 ().
      used: spikes in the bucket that is the budget, float32 ().
      lost: steps in a row in which the run was lost, int32 ().
      rate: the highest base of the learning rate that was followed, float32 ().
      last: the last base that was followed, float32 ().
      held: whether a higher one is held back, bool ().
    """

    loss: Band
    norm: Band
    first: Any
    best: Any
    used: Any
    lost: Any
    rate: Any
    last: Any
    held: Any


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
    jump: float = SLIP,
) -> Policy:
    """Keep updates with a spike out, and ask for a rollback when the run is lost.

    With moving means m, means n of the last ten steps or so, and deviations s from n,
    of the loss l and of log(gradient norm) x:

        gain = max(first m_l - best m_l, |first m_l| / 2)
        spike = l or x not finite
            or l > n_l + max(deviations * s_l, margin * gain)
            or x > n_x + max(deviations * s_x, log(3), if l < m_l log(10))

    Finite spikes enter the means, cut down to 2.5 deviations: one of any size changes
    little, but a lasting change widens the band, by about 5 % a step, until it is the
    new normal.

        lost = l or x not finite
            or l > best m_l + max(far * gain, deviations * s_l)

    After `patience` lost steps in a row, whether they were skipped or not, the policy
    asks for a rollback.

    A learning rate that somebody sets, by hand or in the recipe of a run that goes on,
    to more than `jump` times the highest one so far is a slip that a short run can't
    make good. It is held back: the schedule, or the last rate before, stays in effect
    until one is set that is not as high. The step in which it was set is skipped. What
    a schedule does is not judged.

    Norm and loss are those of the global arrays, so all hosts decide alike. Where
    samples are discounted (`label_noise`), the loss is the discounted one.

    References:
      Chowdhery et al. 2022, PaLM, section 5.1 (skip the batches of a spike and restart
      before it).
      Kumar et al. 2025, "ZClip: adaptive spike mitigation for LLM pre-training" (moving
      mean and variance of the norm, which its outliers enter clipped).

    Args:
      mode: "skip"; or "clip", which applies a finite spike with the usual norm of the
        gradient.
      deviations: standard deviations above the mean at which a spike begins.
      budget: spikes that are kept out within `window` steps; further ones pass if they
        are finite. It is a bucket that drains by budget / window in a step.
      window: see `budget`.
      decay: decay of the moving means and variances.
      margin: share of the gain by which a spike of the loss is above the mean.
      far: share of the gain that the loss takes back where the run is lost.
      patience: lost steps in a row before a rollback is asked for.
      rollbacks: the greatest number of rollbacks; the host ends the run after them.
      rate: factor of the learning rate for each rollback.
      jump: factor above which a learning rate that is set is held back; math.inf: none
        is.

    Raises:
      RecipeError: an argument is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from lepton_jax import controllers
      >>> policy = controllers.guard()
      >>> state = policy.init()
      >>> for loss in [1.0] * 20 + [9.0, 1.0]:
      ...     signals = {
      ...         "loss_kept": jnp.float32(loss),
      ...         "gradient_norm": jnp.float32(1),
      ...         "base_rate": jnp.float32(0.1),
      ...         "scheduled_rate": jnp.float32(0),
      ...     }
      ...     moves, state = policy.update(signals, state)
      ...     if moves["skip"]:
      ...         print("skipped a loss of", loss)
      skipped a loss of 9.0
    """
    if mode not in ("skip", "clip"):
        raise RecipeError(
            f"mode is {mode!r}", where="controllers.guard", remedy="give skip or clip"
        )
    check_range("guard", 0.1, math.inf, deviations=deviations)
    counts = {"budget": budget, "window": window, "patience": patience}
    check_range("guard", 1, math.inf, whole=True, **counts)
    check_range(
        "guard",
        0,
        math.inf,
        whole=True,
        rollbacks=rollbacks,
    )
    check_range("guard", 0.5, 0.9999, decay=decay)
    check_range(
        "guard",
        0,
        math.inf,
        margin=margin,
        far=far,
    )
    check_range("guard", 0, 1, rate=rate)
    check_range("guard", 1, math.inf, jump=jump)

    def update(
        signals: Mapping[str, Any], state: Guard
    ) -> tuple[dict[str, Any], Guard]:
        loss = signals["loss_kept"]
        norm = signals["gradient_norm"]
        log = jnp.log(jnp.clip(norm, TINY, HUGE))
        finite = jnp.isfinite(loss) & jnp.isfinite(norm) & (jnp.abs(loss) < HUGE)

        gain = jnp.maximum(state.first - state.best, jnp.abs(state.first) / 2)
        known = state.loss.count >= LEAST
        learns = loss < state.loss.mean
        fold = jnp.where(learns, TENFOLD, THREEFOLD)
        above = _is_above(state.loss, loss, deviations, margin * gain)
        above |= _is_above(state.norm, log, deviations, fold)
        spike = ~finite | (known & above)
        left = jnp.maximum(state.used - budget / window, 0.0)
        act = spike & (left + 1 <= budget)

        taken_back = far * gain
        deviation = deviations * jnp.sqrt(state.loss.variance)
        level = state.best + jnp.maximum(taken_back, deviation)
        gone = ~finite | (known & (loss > level))
        lost = jnp.where(gone, state.lost + 1, 0)
        rollback = lost >= patience

        bands = state._replace(
            loss=_entered(
                state.loss,
                loss,
                finite,
                decay,
                margin * gain,
                spike,
            ),
            norm=_entered(state.norm, log, finite, decay, THREEFOLD, spike),
        )
        first, best = _levels(state, bands.loss.mean, known)

        # a spike passes since too many were kept out before it
        passes = spike & finite & ~act
        judged = _judged(signals, state, jump)
        begins = judged.held & ~state.held
        skip = ~finite | act if mode == "skip" else ~finite
        moves = {"skip": skip | begins}
        moves["rollback"] = rollback
        moves["notice"] = jnp.where(begins, 2.0, passes)
        moves["learning_rate"] = judged.factor
        if mode == "clip":
            clip = act & finite
            usual = jnp.exp(state.norm.mean)
            moves["clip_norm"] = jnp.where(clip, usual, jnp.inf)
        return moves, bands._replace(
            first=first,
            best=best,
            used=left + act,
            lost=jnp.where(rollback, 0, lost),
            rate=judged.highest,
            last=judged.last,
            held=judged.held,
        )

    moves = ("skip", "rollback", "notice", "learning_rate")
    return Policy(
        "guard",
        _begin,
        update,
        watches=("loss_kept", "gradient_norm", "base_rate", "scheduled_rate"),
        moves=moves if mode == "skip" else (*moves, "clip_norm"),
        notices=(SPIKES, JUMP),
        limits={"rollbacks": rollbacks, "rate": rate, "patience": patience},
    )


def _begin() -> Guard:
    def band() -> Band:
        return Band(
            jnp.float32(0),
            jnp.float32(0),
            jnp.float32(0),
            jnp.int32(0),
        )

    return Guard(
        loss=band(),
        norm=band(),
        first=jnp.float32(0),
        best=jnp.float32(0),
        used=jnp.float32(0),
        lost=jnp.int32(0),
        rate=jnp.float32(0),
        last=jnp.float32(0),
        held=jnp.bool_(False),
    )


class _Rate(NamedTuple):
    """Judgement of the learning rate's base.

    Attributes:
      held: whether it is held back.
      factor: that of the learning rate.
      highest: the highest base that was followed.
      last: the last one that was.
    """

    held: Any
    factor: Any
    highest: Any
    last: Any


def _judged(
    signals: Mapping[str, Any],
    state: Guard,
    jump: float,
) -> _Rate:
    """Judge the base of the learning rate: is it too far above the others?"""
    base = signals["base_rate"]
    scheduled = signals["scheduled_rate"]
    usable = jnp.isfinite(base) & (base > 0)
    # a ratio, as jump times the highest one might overflow
    ratio = base / jnp.maximum(state.rate, TINY)
    held = usable & (base != scheduled) & (state.rate > 0) & (ratio > jump)

    is_scheduled = jnp.isfinite(scheduled) & (scheduled > 0)
    instead = jnp.where(is_scheduled, scheduled, state.last)
    factor = jnp.where(held, instead / jnp.where(held, base, 1.0), 1.0)
    follows = usable & ~held
    return _Rate(
        held,
        jnp.clip(factor, 0.0, 1.0),
        highest=jnp.where(follows, jnp.maximum(state.rate, base), state.rate),
        last=jnp.where(follows, base, state.last),
    )


def _levels(
    state: Guard,
    mean: Any,
    known: Any,
) -> tuple[Any, Any]:
    """Return the first and the best mean loss; both follow it until it is known."""
    first = jnp.where(known, state.first, mean)
    best = jnp.where(
        known,
        jnp.minimum(state.best, mean),
        mean,
    )
    return first, best


def _is_above(
    band: Band,
    value: Any,
    deviations: float,
    margin: Any,
) -> Any:
    deviation = deviations * jnp.sqrt(band.variance)
    return value > band.near + jnp.maximum(deviation, margin)


def _entered(
    band: Band,
    value: Any,
    usable: Any,
    decay: float,
    margin: Any,
    spike: Any,
) -> Band:
    """Return the band with one more value, which is cut off at `CUT` deviations.

    The first values count alike, so that the start needs no correction; they are not
    cut off. Spikes move both means as slowly.
    """
    each = 1 / (band.count + 1.0)
    gain = jnp.maximum(each, 1 - decay)
    quick = jnp.where(spike, gain, jnp.maximum(each, 1 - NEAR))
    young = band.count < LEAST
    cut = CUT * jnp.maximum(jnp.sqrt(band.variance), margin / 100)
    most = jnp.where(young, jnp.inf, cut)
    away = jnp.where(
        usable,
        jnp.minimum(value - band.near, most),
        0.0,
    )
    variance = (1 - gain) * (band.variance + gain * away**2)
    return Band(
        mean=band.mean + gain * jnp.where(usable, band.near + away - band.mean, 0.0),
        near=band.near + quick * away,
        variance=jnp.where(usable, variance, band.variance),
        count=jnp.minimum(band.count + usable, 2**30),
    )
