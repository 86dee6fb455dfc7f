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
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from lepton_jax.controller.policy import Policy, check_range
from lepton_jax.controller.signals import MEMORY, norm
from lepton_jax.errors import RecipeError

if TYPE_CHECKING:
    from lepton_jax.recipe import Recipe
    from lepton_jax.step.optimizers import Optimizer

# root mean square taken for parameters that all begin at zero or nearly so; assumption
SMALLEST = 1e-3
# growth of the estimate in a step of a run that has no end; assumption
BLIND = 1.02
# scales of the gradients on which an optimizer is tried
TRIAL_SCALES = (1e-3, 1e-1)
# an update that grows by less, where the gradient grows a hundredfold, is not
# proportional to it
LINEAR = 10.0


class Distance(NamedTuple):
    """State of `learning_free`, float32 ().

    Attributes:
      base: the learning rate's base in the first step; 0 before it.
      first: d_0, the first estimate; 0 before the first step.
      estimate: d.
      numerator: r, the weighted sum of <g, x_0 - x>.
      weight: w, the weight of the present gradient in both sums.
    """

    base: Any
    first: Any
    estimate: Any
    numerator: Any
    weight: Any


def learning_free(
    start: float = 1e-2,
    coefficient: float = 2.0,
    *,
    growth: float = 10.0,
    until: float = 0.1,
) -> Policy:
    """Set the learning rate to an estimate of the distance to the solution.

    It is for optimizers whose updates have entries of about the learning rate's size:
    Adam, AdamW, Lion and their like. With gradients g_k at parameters x_k, weights
    w_k = (d_k / d_0)^2 and memory b = 0.9995:

        r_k = b r_{k-1} + w_k <g_k, x_0 - x_k>
        s_k = b s_{k-1} + w_k g_k
        d_{k+1} = max(d_k, c r_k / |s_k|_1)

    The recipe's rate cancels out. A rate that is set later, by a person or after a
    rollback, acts by its ratio to the recipe's: half of it is half of d. Memory: two
    copies of the parameters, x_0 and s.

    References:
      Mishchenko and Defazio 2023, "Prodigy: An Expeditiously Adaptive Parameter-Free
      Learner", algorithm 4, without its rescaled moments. d_0 is relative to the
      parameters here.

    Args:
      start: d_0, as a share of the root mean square of the parameters at the start.
        Choose it too small rather than too large, since d never shrinks; its growth to
        the right size takes some dozen steps.
      coefficient: c.
      growth: factor by which d may grow while the share `until` of the run is done,
        evenly in its logarithm: the warm-up. Where the budget is not known d may grow
        by 2 % a step.
      until: share of the run after which d stays; where the budget is not known it
        never does.

    Raises:
      RecipeError: an argument is out of range. When the recipe is traced, also for an
        optimizer that it can't drive.

    Example:
      >>> import jax.numpy as jnp
      >>> from lepton_jax import controllers
      >>> policy = controllers.learning_free(start=0.01, growth=100.0)
      >>> signals = {
      ...     "gradient_dot_distance": jnp.float32(0.5),
      ...     "gradient_sum_norm": jnp.float32(10),
      ...     "parameter_rms": jnp.float32(1),
      ...     "base_rate": jnp.float32(1),
      ...     "step": jnp.float32(0),
      ...     "progress": jnp.float32(0.1),
      ... }
      >>> moves, _ = policy.update(signals, policy.init())
      >>> print(f"{moves['learning_rate']:.3f}")  # 2 * 0.5 / 10, where d_0 is 0.01
      0.100
    """
    check_range("learning_free", 1e-9, 1, start=start)
    check_range("learning_free", 1e-3, 1e3, coefficient=coefficient)
    check_range("learning_free", 1.01, 1e9, growth=growth)
    check_range("learning_free", 1e-3, 1, until=until)

    def init() -> Distance:
        zeros = {name: jnp.float32(0) for name in Distance._fields}
        return Distance(**zeros | {"weight": jnp.float32(1)})

    def update(
        signals: Mapping[str, Any], state: Distance
    ) -> tuple[dict[str, Any], Distance]:
        base, first, d = _begun(signals, state, start)
        product = signals["gradient_dot_distance"]
        r = MEMORY * state.numerator + state.weight * product
        s_norm = signals["gradient_sum_norm"]
        bound = coefficient * r / jnp.maximum(s_norm, 1e-30)
        usable = jnp.isfinite(bound) & jnp.isfinite(r)

        fastest = _greatest_growth(signals, growth, until)
        # progress is NaN where no end is known, and then d never stays
        done = signals["progress"] > until
        growing = usable & ~done
        d = jnp.where(
            growing,
            jnp.clip(bound, d, fastest * d),
            d,
        )

        # where d stays, nothing more need be measured
        w = jnp.where(done, 0.0, (d / first) ** 2)
        r = jnp.where(usable, r, state.numerator)
        after = Distance(
            base,
            first,
            estimate=d,
            numerator=r,
            weight=w,
        )
        return {"learning_rate": d / base, "gradient_weight": w}, after

    return Policy(
        "learning_free",
        init,
        update,
        watches=(
            "gradient_dot_distance",
            "gradient_sum_norm",
            "parameter_rms",
            "base_rate",
            "step",
            "progress",
        ),
        moves=("learning_rate", "gradient_weight"),
        check=_check,
    )


def _begun(
    signals: Mapping[str, Any],
    state: Distance,
    start: float,
) -> tuple[Any, Any, Any]:
    """Return the base, d_0 and d; the first step makes them of its signals."""
    fresh = state.first == 0
    size = jnp.nan_to_num(signals["parameter_rms"], posinf=0.0)
    base = jnp.nan_to_num(signals["base_rate"], posinf=0.0)
    base = jnp.where(
        fresh,
        jnp.maximum(base, 1e-20),
        state.base,
    )
    first = jnp.where(
        fresh,
        start * jnp.maximum(size, SMALLEST),
        state.first,
    )
    return base, first, jnp.where(fresh, first, state.estimate)


def _greatest_growth(
    signals: Mapping[str, Any],
    growth: float,
    until: float,
) -> Any:
    """Return the factor by which d may grow in this step."""
    # the part of the warm-up that one step is
    part = signals["progress"] / ((signals["step"] + 1) * until)
    known = jnp.isfinite(part)
    even = jnp.exp(jnp.minimum(part, 1.0) * math.log(growth))
    return jnp.where(known, even, BLIND)


# ---- which optimizers it can drive ----


def _check(recipe: Recipe, optimizer: Optimizer) -> None:
    """Check that the optimizer takes a rate, and updates that do not grow with g."""
    remedy = (
        "give an optimizer such as optax.adamw, with learning_rate, or leave"
        " learning_free (or adaptive) out"
    )
    if "learning_rate" not in optimizer.base or recipe.learning_rate is None:
        raise RecipeError(
            "learning_free sets the learning rate, but the optimizer has its own",
            where="Recipe.optimizer",
            remedy=remedy,
        )
    if callable(recipe.learning_rate):
        raise RecipeError(
            "learning_free takes the place of a schedule",
            where="Recipe.learning_rate",
            remedy="give a number, any one, or leave learning_free (or adaptive) out",
        )

    def trial(optimizer: Optimizer, params: Any) -> None:
        if not _is_steady(optimizer, params):
            raise RecipeError(
                "learning_free is for optimizers whose updates are about as large as"
                " the learning rate; this one's grow with the gradient",
                where="Recipe.optimizer",
                remedy=remedy,
            )

    optimizer.trials.append(trial)


def _is_steady(optimizer: Optimizer, params: Any) -> bool:
    """Whether an update hardly grows with the gradient.

    It is tried on small parameters with the model's own names.
    """
    with jax.ensure_compile_time_eval():
        small, large = (
            _update_norm(optimizer, params, scale) for scale in TRIAL_SCALES
        )
    return large < LINEAR * small


def _update_norm(
    optimizer: Optimizer,
    params: Any,
    scale: float,
) -> float:
    """Return the norm of zero parameters after an update by gradients of a scale."""

    def ramp(x: jax.Array) -> jax.Array:
        return scale * jnp.linspace(-1.0, 1.0, x.size).reshape(x.shape)

    gradients = jax.tree.map(ramp, params)
    after, _ = optimizer.update(
        lambda: gradients,
        optimizer.init(params),
        params,
        {"learning_rate": jnp.float32(1)},
        jnp.float32(1),
    )
    return float(norm(after))
