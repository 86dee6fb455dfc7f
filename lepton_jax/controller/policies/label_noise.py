"""Labels that become wrong, for a while or for good: samples count by how likely theirs
is right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lepton_jax.controller.policy import Policy, checked

LEAST = 20  # steps that the usual share is made of before anything is unusual
DECAY = 0.98  # of the moving means
PRIOR = 0.05  # share of wrong labels that is looked for while all is calm
NARROW = 0.004  # least standard deviation of the share of a batch
# cumulative sum of deviations: what is left out of each, and where it gives the alarm
SLACK = 1.0
ALARM = 8.0
ENTERING = 3.0  # deviations by which a batch moves the usual share at most
# weight of a batch in the estimate, in the first steps after an alarm, and later
QUICK = 0.5
SLOW = 0.05
FASTER = 4.0  # times the step of expectation maximization, at most
OVER = 0.02  # share of wrong labels below which they are right again
LARGEST = 0.95
# an update this much larger than usual explains a rise of the losses by itself
JUMP = math.log(5)


class Doubt(NamedTuple):
    """What is known of the labels; float32 () but for the counts.

    Attributes:
      blank: loss of a model that knows nothing.
      usual, variance: of the share of samples that look wrong while all is calm.
      size: logarithm of the usual update's norm.
      count: steps in these three, int32; -1 before the first step.
      base, share: of samples that look wrong, by expectation maximization: while all is
        calm, and since the alarm.
      alarm: cumulative sum of the share's deviations.
      since: steps since the alarm, int32; 0: all is calm.
      used: of the budget of steps that are skipped.
    """

    blank: Any
    usual: Any
    variance: Any
    size: Any
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
    """Weighs samples by how likely their label is right, from when wrong labels set in
    until they are over, if ever.

    With a share r of labels replaced by any of K, the likelihood of a label that the
    model gives the probability p is (1 - r) p + r / K. The gradient of its logarithm is
    that of log p, times the probability that the label is right:

        w = (1 - r) p / ((1 - r) p + r / K) = sigmoid(log(K) + log((1 - r) / r) - l),   l = -log p.

    That is the knob `loss_limit`. Trained so, a model tends to where it would with
    right labels, unlike with samples cut off above a threshold. log(K) is the loss of
    outputs that are all zero, or the first loss if that is less. The loss must be a
    negative log-likelihood in nats, as cross-entropies are.

    r is estimated from the mean weight of each batch by expectation maximization; what
    it is in calm times, from samples that are merely hard, is left out. Until the share
    of samples that look wrong stands out from its moving mean (a cumulative sum of its
    deviations, and a known mean of at least 20 steps) everything counts alike, to the
    bit. The update of the first outstanding batch is skipped. An update five times
    larger than usual explains a rise by itself: the labels aren't blamed.

    It can't tell right from wrong where half of two classes' labels are wrong; nor
    labels that are wrong in one and the same way (all "3" for "8") for long, which a
    model learns as it learns anything; nor wrong labels from data that is really new
    and hard: of that it learns slowly, and less the more wrong it looks. Noise that is
    there from the beginning is the usual for it.

    Sources: Patrini et al. 2017, "Making deep neural networks robust to label noise: a
    loss correction approach", section 4 (forward correction; here of uniform noise, r
    unknown and changing); Dempster, Laird & Rubin 1977 for the estimate; Page 1954 for
    cumulative sums.

    Args:
      most: where a larger share of labels looks wrong, nothing is learned: the steps
        are skipped.
      budget: steps that are skipped within `window` steps at most; then what is there
        is the new usual. (It is a bucket that drains by budget / window in a step.)

    Raises:
      RecipeError: an argument is out of range.
    """
    checked("label_noise", 0.1, LARGEST, most=most)
    checked(
        "label_noise",
        1,
        math.inf,
        whole=True,
        budget=budget,
        window=window,
    )

    watches = (
        "mark_weight",
        "loss",
        "update_norm",
        "mark_weight_square",
        "loss_blank",
        "loss_values",
        "batch_size",
    )
    return Policy(
        "label_noise",
        _begun,
        partial(
            _followed,
            most=most,
            budget=budget,
            window=window,
        ),
        watches,
        ("loss_limit", "loss_mark", "skip"),
    )


def _begun() -> Doubt:
    zero = lambda: jnp.float32(0)
    return Doubt(
        zero(),
        zero(),
        zero(),
        zero(),
        jnp.int32(-1),
        zero(),
        zero(),
        zero(),
        jnp.int32(0),
        zero(),
    )


def _followed(
    signals: Mapping[str, Any],
    state: Doubt,
    most: float,
    budget: int,
    window: int,
) -> tuple[dict[str, Any], Doubt]:
    """One step of the policy."""
    usable = jnp.stack(
        [
            jnp.isfinite(signals[n])
            for n in ("mark_weight", "mark_weight_square", "loss")
        ]
    ).all()
    usable &= jnp.abs(signals["loss"]) < 1e30
    first = state.count < 0
    was = state.since > 0
    known = state.count >= LEAST
    nothing = jnp.where(
        jnp.isfinite(signals["loss_blank"]),
        signals["loss_blank"],
        jnp.inf,
    )
    blank = jnp.where(
        first,
        jnp.minimum(signals["loss"], nothing),
        state.blank,
    )
    norm = jnp.log(
        jnp.clip(
            jnp.nan_to_num(signals["update_norm"], posinf=1e30),
            1e-30,
            1e30,
        )
    )
    moved = known & (norm > state.size + JUMP)

    wrong = 1 - signals["mark_weight"]
    values = jnp.clip(
        jnp.nan_to_num(signals["batch_size"] * signals["loss_values"], nan=1.0),
        1.0,
        1e30,
    )
    deviation = jnp.maximum(
        jnp.sqrt(jnp.maximum(state.variance, state.usual / values)), NARROW
    )
    away = (wrong - state.usual) / deviation
    alarm = jnp.where(
        known & ~was & ~moved,
        jnp.maximum(state.alarm + away - SLACK, 0),
        0.0,
    )
    begins = alarm > ALARM

    found = _maximized(
        _marked(state), signals["mark_weight"], signals["mark_weight_square"]
    )
    weight = jnp.clip(
        1 / jnp.maximum(state.since, 1),
        SLOW,
        QUICK,
    )
    share = jnp.where(
        was,
        state.share + weight * (found - state.share),
        jnp.clip(wrong, PRIOR, LARGEST),
    )
    more = _more(share, state.base)
    left = jnp.maximum(state.used - budget / window, 0.0)
    refused = was & (more > most)
    act = (begins & (away > ENTERING) | refused) & (left + 1 <= budget)
    gone = was & moved | refused & ~act  # what was usual is no more: it is learned anew
    on = (begins | was & (more > OVER)) & ~gone
    calm = ~was & ~on & ~first

    gain = jnp.where(
        calm,
        jnp.maximum(1 / (state.count + 1.0), 1 - DECAY),
        0.0,
    )
    bound = jnp.where(known, ENTERING * deviation, 1.0)
    entering = jnp.clip(
        wrong - state.usual,
        -bound,
        bound,
    )
    count = jnp.where(
        gone,
        0,
        jnp.minimum(state.count + (calm | first), 2**30),
    )
    fresh = Doubt(
        blank,
        state.usual + gain * entering,
        (1 - gain) * (state.variance + gain * entering**2),
        state.size
        + gain
        * jnp.where(known, jnp.minimum(norm - state.size, JUMP), norm - state.size),
        count,
        state.base + gain * (jnp.minimum(found, 0.5) - state.base),
        share,
        jnp.where(on, 0.0, alarm),
        jnp.where(on, state.since + 1, 0),
        left + act,
    )
    fresh = jax.tree.map(
        lambda new, old: jnp.where(
            usable,
            jnp.asarray(new, old.dtype),
            old,
        ),
        fresh,
        state,
    )
    limit = jnp.where(
        fresh.since > 0,
        _level(fresh.blank, _more(fresh.share, fresh.base)),
        jnp.inf,
    )
    mark = jnp.where(
        fresh.count < 0,
        jnp.nan,
        _level(fresh.blank, _marked(fresh)),
    )
    return {"loss_limit": limit, "loss_mark": mark, "skip": act & usable}, fresh


def _level(blank: Any, share: Any) -> Any:
    """The loss at which a label is as likely wrong as right."""
    share = jnp.clip(share, OVER / 2, LARGEST)
    return blank + jnp.log((1 - share) / share)


def _marked(state: Doubt) -> Any:
    """The share of wrong labels under which the next batch's are weighed."""
    return jnp.clip(
        jnp.where(
            state.since > 0,
            state.share,
            state.base,
        ),
        PRIOR,
        LARGEST,
    )


def _more(share: Any, base: Any) -> Any:
    """The share that came on top of the usual one."""
    return 1 - (1 - share) / (1 - base)


def _maximized(
    share: Any,
    mean: Any,
    square: Any,
) -> Any:
    """The share of wrong labels that makes a batch more likely: a step of expectation
    maximization, up to `FASTER` times as long where weights are neither 0 nor 1 (a step
    of Newton's method then).
    """
    right = 1 - share
    curvature = jnp.maximum(right**2 - 2 * right * mean + square, 1e-9)
    return jnp.clip(
        share + jnp.clip(share * right / curvature, 1.0, FASTER) * (right - mean),
        0.0,
        LARGEST,
    )
