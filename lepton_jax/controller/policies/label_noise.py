"""Labels that become wrong, for a while or for good.

The policy weighs each sample by how likely its label is right. A small example: a model
of K = 10 classes has a loss of 0.1 where it agrees with a label and of 5.3 where it
does not, and 2 of 8 labels of a batch are wrong.

>>> losses = jnp.array([0.1] * 6 + [5.3] * 2)

If a share r = 1/4 of labels is wrong, a label is as likely wrong as right at the loss
log(K) + log((1 - r) / r) = 3.4. The weight of a sample is the sigmoid of its distance
below this level:

>>> level = _level(jnp.log(10.0), 0.25)
>>> weights = jax.nn.sigmoid(level - losses)
>>> print(f"{level:.1f}: {weights[0]:.2f} if right, {weights[-1]:.2f} if wrong")
3.4: 0.96 if right, 0.13 if wrong

But r is not known. Expectation maximization finds it: under any r, one minus the mean
weight is a better estimate, and under the next estimate a still better one.

>>> r = 0.05
>>> for _ in range(3):
...     w = jax.nn.sigmoid(_level(jnp.log(10.0), r) - losses)
...     r = _maximized(r, w.mean(), (w**2).mean())
...     print(f"{r:.3f}")
0.133
0.206
0.239

In training each of these steps is made on the next batch. The policy sets `loss_mark`
to the level, and the next step measures the mean weight and the mean squared weight
there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lepton_jax.controller.policy import Notice, Policy, check_range

# The constants were chosen on digits, MNIST and tiny Shakespeare with faults:
# `python -m tools.bench faults`; see docs/controller.md.

# steps in the usual share before anything is unusual
LEAST = 20
# decay of the moving means
DECAY = 0.98
# share of wrong labels that is looked for while all is calm
PRIOR = 0.05
# least standard deviation of a batch's share of samples that look wrong
NARROW = 0.004
# deviations that each step leaves out of the cumulative sum, and the sum at which it
# gives the alarm
SLACK = 1.0
ALARM = 8.0
# deviations by which a batch moves the usual share at most
ENTERING = 3.0
# weight of a batch in the estimate, in the first steps after an alarm, and later
QUICK = 0.5
SLOW = 0.05
# the step of expectation maximization is at most this many times as long
FASTER = 4.0
# loss_blank may differ by this share from batch to batch, by rounding
ROUNDING = 1e-3
# share of the way from the usual loss up to that of zeros below which most labels can't
# be wrong, whatever the estimate is: a wrong label's loss is at least that of zeros
HEALTHY = 0.25
# share of wrong labels below which they are right again
OVER = 0.02
# the greatest share of wrong labels that is estimated
LARGEST = 0.95
# an update this much larger than usual (logarithm), and by as many deviations, explains
# a rise of the losses by itself
JUMP = math.log(5)
JUMPING = 4.0
# losses and norms of at least this size count as not finite
# steps since an alarm after which the labels are wrong for long; assumption
LONG = 100
LASTING = Notice(
    f"a share of the labels has looked wrong for {LONG} steps",
    "look at the labels of these steps",
)
GIVEN_UP = Notice(
    "more labels look wrong than can be learned from, and for too long to skip them",
    "look at the labels of these steps",
)
HUGE = 1e30
TINY = 1e-30


class Doubt(NamedTuple):
    """State of `label_noise`; float32 () but for the counts.

    Attributes:
      blank: loss of a model that knows nothing.
      constant: `loss_blank` of the first batch; NaN once another batch had another,
        which a likelihood of classes has not.
      level: moving mean of the loss while all is calm.
      usual: moving mean of the share of samples that look wrong while all is calm.
      variance: moving variance of this share.
      size: logarithm of the usual update's norm.
      spread: moving variance of this logarithm.
      count: steps in these four, int32; -1 before the first step.
      base: share of samples that look wrong while all is calm, by expectation
        maximization.
      share: the same since the alarm.
      alarm: cumulative sum of the share's deviations.
      since: steps since the alarm, int32; 0: all is calm.
      used: skipped steps in the bucket that is the budget.
    """

    blank: Any
    constant: Any
    level: Any
    usual: Any
    variance: Any
    size: Any
    spread: Any
    count: Any
    base: Any
    share: Any
    alarm: Any
    since: Any
    used: Any


def label_noise(
    most: float = 0.7,
    *,
    budget: int = 200,
    window: int = 1000,
) -> Policy:
    """Weigh samples by how likely their label is right, while wrong labels come in.

    If a share r of labels is replaced by any of K, the likelihood of a label that the
    model gives the probability p is (1 - r) p + r / K. The gradient of its logarithm is
    that of log p, times the probability that the label is right. With l = -log p:

        w = (1 - r) p / ((1 - r) p + r / K)
          = sigmoid(log(K) + log((1 - r) / r) - l)

    That is the knob `loss_limit`. Trained so, a model tends to where it would with
    right labels, unlike with samples cut off above a threshold. log(K) is the loss of
    outputs that are all zero, or the first loss if that is less. The loss must be a
    negative log-likelihood in nats, as cross-entropies are. Where log(K) differs from
    batch to batch it is none, as in a regression, and the policy does nothing.

    r is estimated from the mean weight of each batch by expectation maximization. The
    part of it that is there in calm times, from samples that are merely hard, is left
    out. Until the share of samples that look wrong stands out from its moving mean (a
    cumulative sum of its deviations, and a known mean of at least 20 steps) everything
    counts alike, to the bit. The update of the first outstanding batch is skipped. An
    update five times larger than usual explains a rise by itself: then the labels
    aren't blamed.

    The policy can't tell right from wrong where half of two classes' labels are wrong.
    It can't for long where labels are wrong in one and the same way (all "3" for "8"),
    which a model learns as it learns anything. And it can't tell wrong labels from data
    that is really new and hard: from such data it learns slowly, and less the more
    wrong it looks. Noise that is there from the beginning is usual for it.

    References:
      Patrini et al. 2017, "Making deep neural networks robust to label noise: a loss
      correction approach", section 4 (forward correction; here of uniform noise, with
      an r that is unknown and changes).
      Dempster, Laird & Rubin 1977, "Maximum likelihood from incomplete data via the EM
      algorithm", for the estimate.
      Page 1954, "Continuous inspection schemes", for cumulative sums.

    Args:
      most: where a larger share of labels looks wrong, nothing is learned: the steps
        are skipped.
      budget: steps that are skipped within `window` steps at most; after that, the
        present share of wrong labels is the new usual. It is a bucket that drains by
        budget / window in a step.
      window: see `budget`.

    Raises:
      RecipeError: an argument is out of range.

    Example:
      >>> from lepton_jax import controllers
      >>> controllers.label_noise().moves
      ('loss_limit', 'loss_mark', 'skip', 'notice')
    """
    check_range("label_noise", 0.1, LARGEST, most=most)
    check_range(
        "label_noise",
        1,
        math.inf,
        whole=True,
        budget=budget,
        window=window,
    )
    return Policy(
        "label_noise",
        _begin,
        partial(_update, most=most, budget=budget, window=window),
        watches=(
            "mark_weight",
            "loss",
            "update_norm",
            "mark_weight_square",
            "loss_blank",
            "loss_values",
            "batch_size",
        ),
        moves=("loss_limit", "loss_mark", "skip", "notice"),
        notices=(LASTING, GIVEN_UP),
    )


def _begin() -> Doubt:
    zeros = {name: jnp.float32(0) for name in Doubt._fields}
    return Doubt(**zeros | {"count": jnp.int32(-1), "since": jnp.int32(0)})


def _update(
    signals: Mapping[str, Any],
    state: Doubt,
    most: float,
    budget: int,
    window: int,
) -> tuple[dict[str, Any], Doubt]:
    usable = _are_usable(signals) & _is_likelihood(signals, state)
    verdict = _judged(signals, state, most, budget, window)
    fresh = jax.tree.map(
        lambda new, old: jnp.where(
            usable,
            jnp.asarray(new, old.dtype),
            old,
        ),
        _learned(state, verdict, signals["loss"]),
        state,
    )
    fresh = fresh._replace(constant=_constant(signals, state))
    doubted = fresh.since > 0
    limit = _level(fresh.blank, _extra(fresh.share, fresh.base))
    limit = jnp.where(doubted, limit, jnp.inf)

    nothing_yet = fresh.count < 0
    mark = _level(fresh.blank, _marked(fresh))
    mark = jnp.where(nothing_yet, jnp.nan, mark)
    given_up = verdict.given_up & usable
    lasting = usable & (fresh.since == LONG)
    moves = {
        "loss_limit": limit,
        "loss_mark": mark,
        "skip": verdict.skip & usable,
        "notice": jnp.where(given_up, 2.0, lasting),
    }
    return moves, fresh


def _is_likelihood(signals: Mapping[str, Any], state: Doubt) -> Any:
    """Whether the loss of zeros is that of the first batch, or is not known."""
    blank = signals["loss_blank"]
    away = jnp.abs(blank - state.constant)
    same = away <= ROUNDING * jnp.abs(state.constant)
    unknown = ~jnp.isfinite(blank) & ~jnp.isnan(state.constant)
    return (state.count < 0) | same | unknown


def _constant(signals: Mapping[str, Any], state: Doubt) -> Any:
    """Return the loss of zeros so far: infinite if not known, NaN if it differs."""
    blank = signals["loss_blank"]
    known = jnp.where(jnp.isfinite(blank), blank, jnp.inf)
    first = state.count < 0
    kept = jnp.where(_is_likelihood(signals, state), state.constant, jnp.nan)
    return jnp.where(first, known, kept)


def _are_usable(signals: Mapping[str, Any]) -> Any:
    """Whether the signals that enter the state are finite."""
    names = ("mark_weight", "mark_weight_square", "loss")
    usable = reduce(jnp.logical_and, [jnp.isfinite(signals[n]) for n in names])
    return usable & (jnp.abs(signals["loss"]) < HUGE)


class _Verdict(NamedTuple):
    """Judgement of one batch.

    Attributes:
      first: whether it is the first batch.
      known: whether the usual values are known.
      blank: loss of a model that knows nothing.
      norm: logarithm of the last update's norm.
      wrong: share of this batch's samples that look wrong.
      deviation: standard deviation of this share.
      found: share of wrong labels by one step of expectation maximization.
      share: moving mean of `found` since the alarm.
      alarm: cumulative sum of the share's deviations.
      on: whether labels are in doubt from this step on.
      calm: whether they were not, and are not.
      anew: whether the usual share must be learned anew.
      given_up: whether it must be so because too many steps were skipped.
      broken: whether the update was so large that it explains a rise of the losses.
      skip: whether the update is skipped.
      left: skipped steps in the bucket before this one.
    """

    first: Any
    known: Any
    blank: Any
    norm: Any
    wrong: Any
    deviation: Any
    found: Any
    share: Any
    alarm: Any
    on: Any
    calm: Any
    anew: Any
    given_up: Any
    broken: Any
    skip: Any
    left: Any


def _judged(
    signals: Mapping[str, Any],
    state: Doubt,
    most: float,
    budget: int,
    window: int,
) -> _Verdict:
    first = state.count < 0
    doubted = state.since > 0
    known = state.count >= LEAST
    blank = jnp.where(first, _blank_loss(signals), state.blank)
    norm = _log_norm(signals["update_norm"])
    broken = known & (norm > state.size + _jump(state))

    # Page's cumulative sum: it grows while batches look worse than usual
    wrong = 1 - signals["mark_weight"]
    deviation = _deviation(signals, state)
    away = (wrong - state.usual) / deviation
    watching = known & ~doubted & ~broken
    total = jnp.maximum(state.alarm + away - SLACK, 0)
    alarm = jnp.where(watching, total, 0.0)
    begins = alarm > ALARM

    # the share of wrong labels, and by how much it is more than usual
    found = _maximized(
        _marked(state), signals["mark_weight"], signals["mark_weight_square"]
    )
    weight = jnp.clip(
        1 / jnp.maximum(state.since, 1),
        SLOW,
        QUICK,
    )
    moved = state.share + weight * (found - state.share)
    share = jnp.where(
        doubted,
        moved,
        jnp.clip(wrong, PRIOR, LARGEST),
    )
    extra = _extra(share, state.base)

    left = jnp.maximum(state.used - budget / window, 0.0)
    healthy = signals["loss"] < state.level + HEALTHY * (state.blank - state.level)
    too_many = doubted & (extra > most)
    refused = too_many & ~healthy
    skip = (begins & (away > ENTERING) | refused) & (left + 1 <= budget)
    # the usual share no longer holds after a broken update, or when the budget is used
    given_up = refused & ~skip
    anew = doubted & broken | given_up
    on = (begins | doubted & (extra > OVER)) & ~anew & ~(too_many & healthy)
    calm = ~doubted & ~on & ~first
    return _Verdict(
        first=first,
        known=known,
        blank=blank,
        norm=norm,
        wrong=wrong,
        deviation=deviation,
        found=found,
        share=share,
        alarm=alarm,
        on=on,
        calm=calm,
        anew=anew,
        given_up=given_up,
        broken=broken,
        skip=skip,
        left=left,
    )


def _learned(
    state: Doubt,
    verdict: _Verdict,
    loss: Any,
) -> Doubt:
    """Return the state after a batch; its usual values move only while all is calm."""
    gain = jnp.maximum(1 / (state.count + 1.0), 1 - DECAY)
    gain = jnp.where(verdict.calm, gain, 0.0)
    entering = _entering(state, verdict)
    count = jnp.minimum(state.count + (verdict.calm | verdict.first), 2**30)
    count = jnp.where(verdict.anew, 0, count)

    usual = state.usual + gain * entering
    variance = (1 - gain) * (state.variance + gain * entering**2)
    bounded = jnp.minimum(verdict.norm - state.size, _jump(state))
    growth = jnp.where(
        verdict.known,
        bounded,
        verdict.norm - state.size,
    )
    return Doubt(
        blank=verdict.blank,
        constant=state.constant,
        level=state.level + gain * (loss - state.level),
        usual=usual,
        variance=variance,
        size=state.size + gain * growth,
        spread=_spread(state, verdict, gain, growth),
        count=count,
        base=state.base + gain * (jnp.minimum(verdict.found, 0.5) - state.base),
        share=verdict.share,
        alarm=jnp.where(verdict.on, 0.0, verdict.alarm),
        since=jnp.where(
            verdict.on,
            state.since + 1,
            0,
        ),
        used=verdict.left + verdict.skip,
    )


def _entering(state: Doubt, verdict: _Verdict) -> Any:
    """Return the distance of a batch from the usual share, cut off once it is known."""
    bound = jnp.where(
        verdict.known,
        ENTERING * verdict.deviation,
        1.0,
    )
    return jnp.clip(
        verdict.wrong - state.usual,
        -bound,
        bound,
    )


# ---- measures of a batch ----


def _spread(
    state: Doubt,
    verdict: _Verdict,
    gain: Any,
    growth: Any,
) -> Any:
    """Return the variance of the updates' logarithm after one more update.

    Updates that broke something do not enter: else a few make such a one the usual.
    """
    entering = (1 - gain) * (state.spread + gain * growth**2)
    return jnp.where(verdict.broken, state.spread, entering)


def _jump(state: Doubt) -> Any:
    """Return by how much an update's logarithm is above usual if it broke things."""
    return jnp.maximum(JUMP, JUMPING * jnp.sqrt(state.spread))


def _blank_loss(signals: Mapping[str, Any]) -> Any:
    """Loss of a model that knows nothing, by the first batch."""
    blank = signals["loss_blank"]
    blank = jnp.where(
        jnp.isfinite(blank),
        blank,
        jnp.inf,
    )
    return jnp.minimum(signals["loss"], blank)


def _log_norm(norm: Any) -> Any:
    return jnp.log(
        jnp.clip(
            jnp.nan_to_num(norm, posinf=HUGE),
            TINY,
            HUGE,
        )
    )


def _deviation(
    signals: Mapping[str, Any],
    state: Doubt,
) -> Any:
    """Standard deviation of the share of a batch's samples that look wrong.

    It is the greater one of the measured deviation and that of as many independent
    samples, each of which looks wrong with the usual probability.
    """
    values = signals["batch_size"] * signals["loss_values"]
    values = jnp.clip(
        jnp.nan_to_num(values, nan=1.0),
        1.0,
        HUGE,
    )
    variance = jnp.maximum(state.variance, state.usual / values)
    return jnp.maximum(jnp.sqrt(variance), NARROW)


# ---- shares of wrong labels ----


def _level(blank: Any, share: Any) -> Any:
    """Return the loss at which a label is as likely wrong as right."""
    share = jnp.clip(share, OVER / 2, LARGEST)
    return blank + jnp.log((1 - share) / share)


def _marked(state: Doubt) -> Any:
    """Return the share of wrong labels under which the next batch is weighed."""
    share = jnp.where(
        state.since > 0,
        state.share,
        state.base,
    )
    return jnp.clip(share, PRIOR, LARGEST)


def _extra(share: Any, base: Any) -> Any:
    """Return the share that came on top of the usual one."""
    return 1 - (1 - share) / (1 - base)


def _maximized(
    share: Any,
    mean: Any,
    square: Any,
) -> Any:
    """Return a share of wrong labels under which the batch is more likely.

    It is a step of expectation maximization, r <- 1 - mean(w). Where weights are
    neither 0 nor 1 such steps are short, so it is made up to `FASTER` times as long,
    as a step of Newton's method would be.

    Args:
      share: r, under which the batch was weighed.
      mean: mean of the weights w.
      square: mean of w ** 2.
    """
    right = 1 - share
    curvature = jnp.maximum(right**2 - 2 * right * mean + square, 1e-9)
    length = jnp.clip(share * right / curvature, 1.0, FASTER)
    return jnp.clip(
        share + length * (right - mean),
        0.0,
        LARGEST,
    )
