"""From a recipe's optimizer to the one Optax transformation that the step applies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import optax

from lepton_jax.errors import RecipeError, pointing_at_user
from lepton_jax.state import shapes

if TYPE_CHECKING:
    from lepton_jax.recipe import Recipe


def build(recipe: Recipe) -> optax.GradientTransformationExtraArgs:
    """Clipping by global norm (if asked for) in front of the recipe's optimizer.

    Raises:
      RecipeError: the optimizer is neither an Optax transformation nor a function of the learning rate, or the
        schedule is no function of the step.
    """
    optimizer: Any = recipe.optimizer
    if callable(optimizer):
        if recipe.learning_rate is None:
            raise RecipeError("optimizer is a function of the learning rate, but no learning rate is given",
                              where="Recipe.learning_rate", remedy="set learning_rate to a number or an Optax schedule")
        _check_schedule(recipe.learning_rate)
        with pointing_at_user("making the optimizer", "let it take the learning rate alone, e.g. optax.adamw, or "
                              "lambda rate: optax.sgd(rate, momentum=0.9)", where="Recipe.optimizer", kind=RecipeError):
            optimizer = optimizer(recipe.learning_rate)
    elif recipe.learning_rate is not None and isinstance(optimizer, optax.GradientTransformation):
        raise RecipeError("learning_rate is given, but the optimizer already has its own", where="Recipe.learning_rate",
                          remedy="pass the optimizer as a function, e.g. optimizer=optax.adamw, or drop learning_rate")
    if not isinstance(optimizer, optax.GradientTransformation):
        raise RecipeError(f"optimizer is a {type(optimizer).__name__}, not an Optax transformation",
                          where="Recipe.optimizer", remedy="give e.g. optimizer=optax.adamw, learning_rate=1e-3")
    if recipe.clip_norm is not None:
        optimizer = optax.chain(optax.clip_by_global_norm(recipe.clip_norm), optimizer)
    return optax.with_extra_args_support(optimizer)


def _check_schedule(rate: Any) -> None:
    if not callable(rate):
        return
    with pointing_at_user("the learning rate's schedule", "give a function of the step, e.g. "
                          "optax.cosine_decay_schedule(...)", where="Recipe.learning_rate", kind=RecipeError):
        value = jax.eval_shape(rate, jax.ShapeDtypeStruct((), "int32"))
    if getattr(value, "shape", None) != ():
        raise RecipeError(f"the learning rate's schedule returned {shapes(value)}", where="Recipe.learning_rate",
                          remedy="return one number for a step")
