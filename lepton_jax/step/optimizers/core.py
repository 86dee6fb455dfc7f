"""From a recipe's optimizer to the one Optax transformation that the step applies.

Its hyperparameters are knobs. The recipe gives it in one of four forms:

- a function of the learning rate, such as `optax.adamw`: see maker.py;
- several such functions, `switchable(...)`: see switching.py;
- one for each part of the parameters, `by_part(...)`: see parts.py; it is a function of
  the rate if one of its parts is;
- a finished transformation, such as `optax.adam(0.1)`: the knob `learning_rate` is a
  factor of its updates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from lepton_jax.errors import RecipeError, pointing_at_user
from lepton_jax.step.optimizers.evaluation import check_evaluation
from lepton_jax.step.optimizers.maker import Maker
from lepton_jax.step.optimizers.optimizer import Optimizer, unchanged
from lepton_jax.step.optimizers.parts import Parts, holding
from lepton_jax.step.optimizers.switching import Switchable, Switching
from lepton_jax.step.optimizers.transformation import Transformation, is_transformation
from lepton_jax.trees import shapes

if TYPE_CHECKING:
    from lepton_jax.recipe import Recipe

# entries in each dim of the parameters on which a policy tries the optimizer;
# assumption
TRIED = 3


def build(recipe: Recipe) -> Optimizer:
    """Return the recipe's optimizer.

    Raises:
      RecipeError: the optimizer is neither an Optax transformation nor a function of
        the learning rate, or the schedule is no function of the step.
    """
    given: Any = recipe.optimizer
    rate = recipe.learning_rate
    if isinstance(given, Parts) and not given.follows_rate:
        made = _finished(given(None), rate)
    elif isinstance(given, Switchable):
        _check_rate(rate)
        each = [Maker(make, rate).optimizer() for make in given.makers]
        made = Switching(each, given.carry).optimizer()
    elif callable(given) and not isinstance(given, optax.MultiSteps):
        _check_rate(rate)
        made = Maker(given, rate).optimizer()
    else:
        made = _finished(given, rate)
    made = holding(made, given)
    return made._replace(init=_trying(made, recipe.evaluate_params))


def updating() -> pointing_at_user:
    """Context in which a fault of an optimizer's update is reported as the recipe's."""
    return pointing_at_user(
        "the optimizer's update",
        "give an Optax transformation that needs gradients, parameters and the "
        "loss's value alone",
        where="Recipe.optimizer",
        kind=RecipeError,
    )


# ---- internals ----


def _finished(given: Any, rate: Any) -> Optimizer:
    """Return an optimizer that is a transformation already."""
    if rate is not None and is_transformation(given):
        raise RecipeError(
            "learning_rate is given, but the optimizer already has its own",
            where="Recipe.learning_rate",
            remedy=(
                "pass the optimizer as a function, e.g. optimizer=optax.adamw, or drop"
                " learning_rate"
            ),
        )
    transformation = Transformation(given)

    def update(
        gradients: Callable[[], Any],
        state: Any,
        params: Any,
        knobs: Mapping[str, Any],
        value: Any,
        finish: Callable[[Any, Any], Any] = unchanged,
    ) -> Any:
        factor = knobs.get("learning_rate")
        made = transformation.update(gradients, state, params, value, factor)
        return finish(params, made[0]), made[1]

    def scheduled(
        state: Any,
        params: Any,
        updates: Any,
    ) -> Any:
        return jnp.float32(1)

    base = {"learning_rate": 1.0}
    return Optimizer(base, transformation.init, update, scheduled, [])


def _trying(
    optimizer: Optimizer, evaluate_params: Callable | None
) -> Callable[[Any], Any]:
    """Return the optimizer's `init`, which first tries all that must fit it."""
    tried: list[Any] = []

    def init(params: Any) -> Any:
        # a restart calls it again, in the step
        for trial in optimizer.trials:
            if trial not in tried:
                trial(optimizer, _small(params))
                tried.append(trial)
        state = optimizer.init(params)
        if evaluate_params is not None:
            check_evaluation(evaluate_params, state, params)
        return state

    return init


def _small(params: Any) -> Any:
    """Return zeros like the parameters, with at most `TRIED` entries in each dim."""

    def zeros(x: Any) -> jax.Array:
        return jnp.zeros([min(size, TRIED) for size in x.shape], x.dtype)

    with jax.ensure_compile_time_eval():
        return jax.tree.map(zeros, params)


def _check_rate(rate: Any) -> None:
    """Check a learning rate: a number, or a function of the step to one."""
    if rate is None:
        raise RecipeError(
            "optimizer is a function of the learning rate, but no learning rate is"
            " given",
            where="Recipe.learning_rate",
            remedy="set learning_rate to a number or an Optax schedule",
        )
    if not callable(rate):
        return
    with pointing_at_user(
        "the learning rate's schedule",
        "give a function of the step, e.g. optax.cosine_decay_schedule(...)",
        where="Recipe.learning_rate",
        kind=RecipeError,
    ):
        value = jax.eval_shape(rate, jax.ShapeDtypeStruct((), "int32"))
    if getattr(value, "shape", None) != ():
        raise RecipeError(
            f"the learning rate's schedule returned {shapes(value)}",
            where="Recipe.learning_rate",
            remedy="return one number for a step",
        )
