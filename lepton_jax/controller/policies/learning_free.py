"""A learning rate from distances; the recipe's own is not used.

Prodigy's estimate on a small example: the parabola f(x) = x^2 / 2 from x_0 = 1, whose
solution is at a distance of D = 1. Its gradient at x is x. Gradients g_k at points x_k
say how far the solution is at least: f is convex, so <g_k, x_0 - x_k> grows as x_k
moves towards it, while |g_k| does not grow with it. After a step to x_1 = 0.9,

    d >= <g_1, x_0 - x_1> / |g_0 + g_1| = 0.9 * 0.1 / 1.9 = 0.047

and after steps of 0.1 down to x_5 = 0.5,

>>> x = 1 - 0.1 * jnp.arange(6)
>>> print(f"{(x * (1 - x)).sum() / x.sum():.2f}")
0.21

The bound is d; it is always below D, and it grows as the parameters move. As the rate
is d, the parameters then move faster, until their way is about as long as D.

It can't tell when d is too large. The same product can: where the parameters have gone
too far, the gradient points back to x_0 on average, and a shorter way, that is a lower
rate, would have been better. So once d stands, it follows the sign of the product.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from lepton_jax.controller.policies import admission
from lepton_jax.controller.policy import Notice, Policy, check_range
from lepton_jax.controller.signals import MEMORY

# greatest growth of the estimate in a step; and in a run that has no known end, where
# the growth can't be spread over a share of it; assumption
FASTEST = 2.0
BLIND = 1.1
# fewest steps of the warm-up, in which d can grow by 2^20; assumption
WARM = 20
# bounds of the first estimate, which a loss of 0 or infinity would otherwise give;
# assumption
LEAST = 1e-9
MOST = 1e6
# greatest d / d_0 in the weights, whose squares must not overflow float32
HIGHEST = 1e12
TINY = 1e-30
# share of the run over which the product of gradient and way is averaged, and the
# fewest steps; assumption
WINDOW = 0.02
FEWEST = 5.0
# the estimate is not to be trusted if it has grown so much after the warm-up;
# assumption
UNSETTLED = 30.0
NOTICE = Notice(
    "the learning rate grew all the time: the run was too short to find it",
    "train for more steps, or give controllers.learning_free a higher start",
)


class Distance(NamedTuple):
    """State of `learning_free`, float32 ().

    Attributes:
      base: the learning rate's base in the first step; 0 before it.
      first: d_0, the first estimate; 0 before the first usable step.
      estimate: d.
      numerator: r, the weighted sum of <g, x_0 - x>.
      weight: w, the weight of the present gradient in both sums.
      warm: d when the warm-up was over; 0 before it.
      along: moving mean of <g, x_0 - z>.
      squares: moving mean of its square.
    """

    base: Any
    first: Any
    estimate: Any
    numerator: Any
    weight: Any
    warm: Any
    along: Any
    squares: Any


def learning_free(
    start: float = 1e-3,
    coefficient: float = 2.0,
    *,
    growth: float = 1e4,
    until: float = 0.05,
    follow: float = 1.5,
) -> Policy:
    """Set the learning rate to an estimate of the distance to the solution.

    It is for optimizers whose updates have entries of about the learning rate's size:
    Adam, AdamW and their like. With gradients g_k at parameters x_k, losses l_k,
    weights w_k = (d_k / d_0)^2 and memory b = 0.9995:

        d_0 = start |l_0| / |g_0|_1
        r_k = b r_{k-1} + w_k <g_k, x_0 - x_k>
        s_k = b s_{k-1} + w_k g_k
        d_{k+1} = max(d_k, c r_k / |s_k|_1)

    until the warm-up is over. From then on d follows the mean m and the mean square q
    of <g_k, x_0 - z_k> over the last 2 % of the run, where z are the parameters that
    the optimizer moves:

        d_{k+1} = d_k exp(f m / (sqrt(q) (k + 1)))

    |l| / |g|_1 is the length of entries at which the first update would bring the loss
    to 0 if it were linear. So nothing depends on the scale of parameters, inputs or
    losses. The recipe's rate cancels out. A rate that is set later, by a person or
    after a rollback, acts by its ratio to the recipe's: half of it is half of d.
    Memory: two copies of the parameters, x_0 and s.

    References:
      Mishchenko and Defazio 2023, "Prodigy: An Expeditiously Adaptive Parameter-Free
      Learner", algorithm 4, without its rescaled moments.
      Polyak 1987, "Introduction to optimization", section 5.3: the step of d_0.

    Args:
      start: d_0, as a share of the length above. Choose it too small rather than too
        large, since d does not shrink before the warm-up is over; its growth to the
        right size takes some dozen steps.
      coefficient: c.
      growth: factor by which d may grow while the share `until` of the run is done,
        evenly in its logarithm, and at most twofold in a step. Where the budget is not
        known d may grow by 10 % a step.
      until: share of the run at which the warm-up is over, after 20 steps at least.
      follow: f; 0: d stays as it is after the warm-up.

    Raises:
      RecipeError: an argument is out of range. When the recipe is traced, also for an
        optimizer that it can't drive.

    Example:
      >>> import jax.numpy as jnp
      >>> from lepton_jax import controllers
      >>> policy = controllers.learning_free(start=0.01)
      >>> signals = {
      ...     "loss": jnp.float32(2),
      ...     "gradient_dot_distance": jnp.float32(0),
      ...     "gradient_dot_way": jnp.float32(0),
      ...     "gradient_sum_norm": jnp.float32(10),
      ...     "gradient_steps": jnp.float32(1),
      ...     "base_rate": jnp.float32(1),
      ...     "step": jnp.float32(0),
      ...     "progress": jnp.float32(0.1),
      ... }
      >>> moves, _ = policy.update(signals, policy.init())
      >>> print(f"{moves['learning_rate']:.4f}")  # 0.01 * 2 / 10
      0.0020
    """
    check_range("learning_free", 1e-9, 1, start=start)
    check_range("learning_free", 1e-3, 1e3, coefficient=coefficient)
    check_range("learning_free", 1.01, 1e9, growth=growth)
    check_range("learning_free", 1e-3, 0.99, until=until)
    check_range("learning_free", 0, 10, follow=follow)
    pace = math.log(growth) / until

    def init() -> Distance:
        zeros = {name: jnp.float32(0) for name in Distance._fields}
        return Distance(**zeros | {"weight": jnp.float32(1)})

    def update(
        signals: Mapping[str, Any], state: Distance
    ) -> tuple[dict[str, Any], Distance]:
        base, first, d = _begun(signals, state, start)
        product = signals["gradient_dot_distance"]
        # one step of so many is measured, and counts for them all
        steps = signals["gradient_steps"]
        r = MEMORY**steps * state.numerator + steps * state.weight * product
        s_norm = signals["gradient_sum_norm"]
        bound = coefficient * r / jnp.maximum(s_norm, TINY)
        usable = jnp.isfinite(bound) & jnp.isfinite(r)

        early = state.warm == 0
        fastest = _greatest_growth(signals, pace, steps)
        grown = jnp.clip(bound, d, fastest * d)
        along, squares = _way(signals, state, usable)
        followed = d * _pull(signals, along, squares) ** follow
        d = jnp.where(
            usable,
            jnp.where(early, grown, followed),
            d,
        )

        w = jnp.minimum(d / jnp.maximum(first, LEAST), HIGHEST) ** 2
        enough = signals["step"] + 1 >= WARM
        over = early & (signals["progress"] > until) & enough
        after = Distance(
            base,
            first,
            estimate=d,
            numerator=jnp.where(usable, r, state.numerator),
            weight=jnp.where(first > 0, w, 1.0),
            warm=jnp.where(over, d, state.warm),
            along=along,
            squares=squares,
        )
        # d is above 0 times anything where the warm-up has not ended
        unsettled = (signals["progress"] >= 1) & (d > UNSETTLED * after.warm)
        moves = {
            "learning_rate": d / base,
            "gradient_weight": after.weight,
            "notice": jnp.where(unsettled, 1.0, 0.0),
        }
        return moves, after

    return Policy(
        "learning_free",
        init,
        update,
        watches=(
            "gradient_dot_distance",
            "gradient_dot_way",
            "gradient_sum_norm",
            "gradient_steps",
            "loss",
            "base_rate",
            "step",
            "progress",
        ),
        moves=("learning_rate", "gradient_weight", "notice"),
        notices=(NOTICE,),
        check=admission.check,
    )


def _begun(
    signals: Mapping[str, Any],
    state: Distance,
    start: float,
) -> tuple[Any, Any, Any]:
    """Return the base, d_0 and d; the first usable step makes them of its signals."""
    fresh = state.first == 0
    base = jnp.nan_to_num(signals["base_rate"], posinf=0.0)
    base = jnp.where(
        state.base == 0,
        jnp.maximum(base, 1e-20),
        state.base,
    )
    # the sum of the absolute entries of the only gradient so far
    slope = signals["gradient_sum_norm"]
    length = start * jnp.abs(signals["loss"]) / slope
    usable = jnp.isfinite(length) & jnp.isfinite(slope) & (slope > 0)
    length = jnp.where(
        usable,
        jnp.clip(length, LEAST, MOST),
        0.0,
    )
    first = jnp.where(fresh, length, state.first)
    return base, first, jnp.where(fresh, first, state.estimate)


def _way(
    signals: Mapping[str, Any],
    state: Distance,
    usable: Any,
) -> tuple[Any, Any]:
    """Return the moving means of <g, x_0 - z> and of its square."""
    product = signals["gradient_dot_way"]
    usable &= jnp.isfinite(product**2)
    run = (signals["step"] + 1) / signals["progress"]
    # where the budget is not known, of the steps so far
    run = jnp.where(jnp.isfinite(run), run, signals["step"] + 1)
    window = jnp.maximum(WINDOW * run, FEWEST)
    keeps = (1 - 1 / window) ** signals["gradient_steps"]

    def mean(before: Any, now: Any) -> Any:
        return jnp.where(usable, keeps * before + (1 - keeps) * now, before)

    return mean(state.along, product), mean(state.squares, product**2)


def _pull(
    signals: Mapping[str, Any],
    along: Any,
    squares: Any,
) -> Any:
    """Return the factor of d in this step for `follow` = 1."""
    cosine = jnp.clip(along / jnp.sqrt(jnp.maximum(squares, TINY)), -1.0, 1.0)
    return jnp.exp(cosine * signals["gradient_steps"] / (signals["step"] + 1))


def _greatest_growth(
    signals: Mapping[str, Any],
    pace: Any,
    steps: Any,
) -> Any:
    """Return the factor by which d may grow in this step.

    Args:
      signals: of this step.
      pace: logarithm of the growth in a whole run.
      steps: the steps that this one counts for.
    """
    step = signals["progress"] / (signals["step"] + 1)
    known = jnp.isfinite(step) & (step > 0)
    even = jnp.exp(jnp.minimum(step, 1.0) * pace * steps)
    return jnp.where(
        known,
        jnp.clip(even, 1.0, FASTEST),
        jnp.minimum(BLIND**steps, FASTEST),
    )
