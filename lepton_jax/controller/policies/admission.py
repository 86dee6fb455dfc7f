"""Which optimizers a policy that sets the learning rate by itself can drive.

Such a policy needs updates whose size follows the rate and nothing else that it does
not know. Each optimizer is tried on small parameters with the model's own names:
`STEPS` updates by the same gradients, whose size and rate differ from trial to trial.
Its worth is the root mean square of an update's entries per unit of the rate:

    optimizer                         worth of small | large gradients   admitted
    Adam, AdamW, Lion, Adafactor      1              | 1                 yes
    LAMB, Muon (relative, orthogonal) 0.1            | 0.1               yes
    SGD                               0.001          | 0.1               no: grows
    Adadelta                          0.001          | 0.003             no: grows

(The figures are of parameters of size 0.1 and gradients of sizes 0.001 and 0.1.) What
the worth is in the run itself, the signal `update_worth` says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from lepton_jax.compat import eagerly
from lepton_jax.controller.signals import norm
from lepton_jax.errors import RecipeError
from lepton_jax.trees import by_path

if TYPE_CHECKING:
    from lepton_jax.recipe import Recipe
    from lepton_jax.step.optimizers import Optimizer

# updates of a trial: rectified Adam is SGD in its first five
STEPS = 6
# root mean squares of the trials' parameters and gradients, and their rates; assumption
SIZE = 0.1
SMALL = 1e-3
LARGE = 1e-1
LOW = 0.1
HIGH = 1.0
# The worth may differ by this factor at gradients that differ a hundredfold. Measured
# on the optimizers of Optax 0.2: at most 1.01 for those that divide by the gradient's
# size, 3.1 for Adadelta, 12 for Yogi, 44 for Adagrad, 100 for SGD.
MOST = 2.0
# The worth may differ by this factor at rates that differ tenfold; it is 1 but for
# decoupled weight decay, and 10 where the rate does nothing.
MOST_BY_RATE = 2.0


def check(
    recipe: Recipe,
    optimizer: Optimizer,
    policy: str = "learning_free",
) -> None:
    """Check that a policy can set an optimizer's rate by itself.

    Args:
      recipe: the recipe.
      optimizer: its optimizer; the trial is added to its `trials`.
      policy: the name of the policy, for the errors.

    Raises:
      RecipeError: the optimizer has its own rate, or the rate is a schedule. When the
        recipe is traced, also if the updates grow with the gradient, or do not follow
        the rate.
    """
    remedy = (
        "give an optimizer such as optax.adamw, with learning_rate, or leave"
        f" {policy} (or adaptive) out"
    )
    if "learning_rate" not in optimizer.base or recipe.learning_rate is None:
        raise RecipeError(
            f"{policy} sets the learning rate, but the optimizer has its own",
            where="Recipe.optimizer",
            remedy=remedy,
        )
    if callable(recipe.learning_rate):
        raise RecipeError(
            f"{policy} takes the place of a schedule",
            where="Recipe.learning_rate",
            remedy=f"give a number, any one, or leave {policy} (or adaptive) out",
        )

    def trial(optimizer: Optimizer, params: Any) -> None:
        fault = _fault(optimizer, params)
        if fault is not None:
            raise RecipeError(
                f"{policy} is for optimizers whose updates are about as large as the"
                f" learning rate says; this one's {fault}",
                where="Recipe.optimizer",
                remedy=remedy,
            )

    optimizer.trials.append(trial)


def _fault(optimizer: Optimizer, params: Any) -> str | None:
    """Say what is wrong with an optimizer's updates; None: nothing."""
    try:
        usual, small, slow = eagerly(lambda: _tried(optimizer, _different(params)))
    except (KeyError, RecipeError, TypeError, ValueError):
        # an optimizer that knows all the parameters by name
        usual, small, slow = eagerly(lambda: _tried(optimizer, params))
    if not usual > 0:
        # it may be for parameters of other layers alone: see `optimizers.by_part`
        usual, small, slow = eagerly(lambda: _tried(optimizer, params))
    if not usual > 0:
        return "are zero, or not finite"
    if not _are_alike(usual, small, MOST):
        return "grow with the gradient"
    if not _are_alike(usual, slow, MOST_BY_RATE):
        return "do not follow the learning rate"
    return None


def _tried(
    optimizer: Optimizer,
    params: Any,
) -> tuple[float, float, float]:
    """Return the worths of usual updates, by small gradients, and at a low rate."""
    trial = _Trial(optimizer, params)
    usual = trial.worth(LARGE, HIGH)
    small = trial.worth(SMALL, HIGH)
    return usual, small, trial.worth(LARGE, LOW)


def _are_alike(left: float, right: float, most: float) -> bool:
    return left < most * right and right < most * left


class _Trial:
    """An optimizer's update on small parameters, compiled once.

    Args:
      optimizer: the recipe's.
      params: small parameters with the model's own names; their values do not matter.
    """

    def __init__(self, optimizer: Optimizer, params: Any):
        self._optimizer = optimizer
        self._params = jax.tree.map(lambda x: _waves(x, SIZE), params)
        self._step = jax.jit(self._updated)

    def worth(self, scale: float, rate: float) -> float:
        """Return the root mean square of an update's entries, per unit of the rate.

        It is the last update that is not zero, as all but one in four may be under
        `optax.MultiSteps`.

        Args:
          scale: root mean square of the gradients.
          rate: the learning rate.
        """
        gradients = jax.tree.map(lambda x: _waves(x, scale, 1.0), self._params)
        state = self._optimizer.init(self._params)
        entries = sum(x.size for x in jax.tree.leaves(self._params))
        last = 0.0
        for _ in range(STEPS):
            size, state = self._step(state, gradients, jnp.float32(rate))
            last = float(size) or last
        return last / (rate * entries**0.5)

    def _updated(self, state: Any, gradients: Any, rate: Any) -> tuple[Any, Any]:
        """Return the norm of an update and the optimizer's state after it."""
        after, state = self._optimizer.update(
            lambda: gradients,
            state,
            self._params,
            {"learning_rate": rate},
            jnp.float32(1),
        )
        return norm(jax.tree.map(jnp.subtract, after, self._params)), state


def _different(params: Any) -> Any:
    """Return one leaf of each last name and shape, under its own path.

    The layers of a model are alike, and to compile an update of all takes long.
    """
    kept: dict[str, Any] = {}
    seen = set()
    for path, x in by_path(params).items():
        kind = (path.rpartition("/")[2], x.shape)
        if kind not in seen:
            kept[path] = x
            seen.add(kind)
    nested: dict[str, Any] = {}
    for path, x in kept.items():
        *folders, name = path.split("/")
        place = nested
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = x
    return nested


def _waves(
    x: Any,
    size: float,
    phase: float = 0.0,
) -> Any:
    """Return an array like `x` of a given root mean square, none of it alike."""
    waves = jnp.sin(2 * jnp.arange(x.size, dtype=jnp.float32) + 0.5 + phase)
    scale = size / jnp.sqrt(jnp.mean(jnp.square(waves)))
    return (scale * waves).reshape(x.shape).astype(x.dtype)
