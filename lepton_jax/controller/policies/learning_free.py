"""A learning rate from distances: the recipe's own is not used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from lepton_jax.controller.policy import Policy, checked
from lepton_jax.controller.signals import MEMORY, norm
from lepton_jax.errors import RecipeError

if TYPE_CHECKING:
    from lepton_jax.recipe import Recipe
    from lepton_jax.step.optimizers import Optimizer

SMALLEST = 1e-3  # root mean square of parameters that all begin at zero or nearly so
BLIND = 1.02  # growth of the estimate in a step of a run that has no end
# an update that grows by less where the gradient grows a hundredfold is not
# proportional to it
LINEAR = 10.0


class Distance(NamedTuple):
    """The base of the rate and the first estimate (0 before the first step), the
    estimate d, the weighted sum of <g, x0 - x>, and the weight with which the present
    gradient entered; float32 ().
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
    """Learning rate d, an estimate of how far the solution is from the start, for
    optimizers whose updates have entries of about the learning rate's size: Adam,
    AdamW, Lion and their like.

    With weights w_k = (d_k / d_0)^2 and memory b = 0.9995,

        r_k = b r_{k-1} + w_k <g_k, x_0 - x_k>,   s_k = b s_{k-1} + w_k g_k,   d_{k+1} = max(d_k, c r_k / |s_k|_1).

    Source: Mishchenko and Defazio 2023, "Prodigy: An Expeditiously Adaptive
    Parameter-Free Learner", algorithm 4, without its rescaled moments. d_0 is relative
    to the parameters here.

    The recipe's rate cancels out. One that is set later, by a person or after a
    rollback, acts by its ratio to the recipe's: half of it is half of d. Memory: two
    copies of the parameters, x_0 and s.

    Args:
      start: d_0, as a share of the root mean square of the parameters at the start; too
        small rather than too large, since d never shrinks; its growth to the right size
        takes some dozen steps.
      coefficient: c.
      growth: by how much d may grow while the share `until` of the run is done, evenly
        in its logarithm: the warm-up. Where the budget is not known: 2 % a step.
      until: share of the run after which d stays; where the budget is not known it
        never does.

    Raises:
      RecipeError: one of them can't be.
    """
    checked("learning_free", 1e-9, 1, start=start)
    checked("learning_free", 1e-3, 1e3, coefficient=coefficient)
    checked("learning_free", 1.01, 1e9, growth=growth)
    checked("learning_free", 1e-3, 1, until=until)

    def init() -> Distance:
        zero = lambda: jnp.float32(0)
        return Distance(
            zero(),
            zero(),
            zero(),
            zero(),
            jnp.float32(1),
        )

    def update(
        signals: Mapping[str, Any], state: Distance
    ) -> tuple[dict[str, Any], Distance]:
        fresh = state.first == 0
        size, base = (
            jnp.nan_to_num(signals[name], posinf=0.0)
            for name in ("parameter_rms", "base_rate")
        )
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
        known = jnp.where(fresh, first, state.estimate)
        numerator = (
            MEMORY * state.numerator + state.weight * signals["gradient_dot_distance"]
        )
        found = (
            coefficient * numerator / jnp.maximum(signals["gradient_sum_norm"], 1e-30)
        )
        usable = jnp.isfinite(found) & jnp.isfinite(numerator)
        # of the warm-up that a step is
        part = signals["progress"] / ((signals["step"] + 1) * until)
        faster = jnp.where(
            jnp.isfinite(part),
            jnp.exp(jnp.minimum(part, 1.0) * math.log(growth)),
            BLIND,
        )
        # progress is NaN where no end is known
        growing = usable & ~(signals["progress"] > until)
        estimate = jnp.where(
            growing,
            jnp.clip(found, known, faster * known),
            known,
        )
        weight = (estimate / first) ** 2
        after = Distance(
            base,
            first,
            estimate,
            jnp.where(usable, numerator, state.numerator),
            weight,
        )
        return {"learning_rate": estimate / base, "gradient_weight": weight}, after

    watches = (
        "gradient_dot_distance",
        "gradient_sum_norm",
        "parameter_rms",
        "base_rate",
        "step",
        "progress",
    )
    return Policy(
        "learning_free",
        init,
        update,
        watches,
        ("learning_rate", "gradient_weight"),
        check=_check,
    )


def _check(recipe: Recipe, optimizer: Optimizer) -> None:
    """The optimizer must take the rate, and its updates must not grow with the
    gradient.
    """
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
        if not _steady(optimizer, params):
            raise RecipeError(
                "learning_free is for optimizers whose updates are about as large as"
                " the learning rate; this one's grow with the gradient",
                where="Recipe.optimizer",
                remedy=remedy,
            )

    optimizer.trials.append(trial)


def _steady(optimizer: Optimizer, params: Any) -> bool:
    """Whether an update hardly grows with the gradient, tried on small parameters with
    the model's own names.
    """
    with jax.ensure_compile_time_eval():
        knobs = {"learning_rate": jnp.float32(1)}
        sizes = []
        for scale in (1e-3, 1e-1):
            gradients = jax.tree.map(
                lambda x: scale * jnp.linspace(-1.0, 1.0, x.size).reshape(x.shape),  # noqa: B023
                params,
            )
            after, _ = optimizer.update(
                lambda: gradients,  # noqa: B023
                optimizer.init(params),
                params,
                knobs,
                jnp.float32(1),
            )
            sizes.append(float(norm(after)))
    return sizes[1] < LINEAR * sizes[0]
