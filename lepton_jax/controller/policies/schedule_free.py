"""Averages in place of a schedule, with the gradient taken next to the average.

A rate that is high gets far, but its parameters are noisy; their average is not. So a
run that ends with the average needs no rate that falls to 0. Schedule-free training
also takes its gradients near the average: with fast parameters z, their average a and
an interpolation of b,

    y = b a + (1 - b) z          the gradient g is taken here
    z <- z - rate * direction(g)
    a <- d a + (1 - d) z         this is evaluated and served

so that the noise of z hardly enters the gradient. This takes the place of the first
moment of Adam, which is left out (b1 = 0).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from lepton_jax.controller.policy import Policy, check_range
from lepton_jax.errors import RecipeError

if TYPE_CHECKING:
    from lepton_jax.recipe import Recipe
    from lepton_jax.step.optimizers import Optimizer

# size of the parameters on which an optimizer is tried, and the share by which its
# first update may differ from the rate: by weight decay; assumption
SIZE = 0.1
CLOSE = 0.2


def schedule_free(
    interpolation: float = 0.9,
    share: float = 0.3,
    *,
    otherwise: tuple[Policy, ...] = (),
) -> Policy:
    """Take gradients near an average of the parameters, and serve the average.

    Its mean age is `share` of the n updates so far: d = (n / (n + 1))^(1 / share - 1).
    It is for Adam and optimizers like it, whose first moment is left out by b1 = 0.

    References:
      Defazio et al. 2024, "The Road Less Scheduled". The average there is `share`=0.5,
      weighed by the square of the rate.

    Args:
      interpolation: b, 0 to 0.99.
      share: mean age of the average as a share of the updates, above 0 to 0.5.
      otherwise: the policies in its place for other optimizers. Under Lion and LAMB it
        ended at 1.5 times the reference's loss (lion_digits and lamb_mnist of
        `tools.bench controller`), and Muon has no b1.

    Raises:
      RecipeError: an argument is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from lepton_jax import controllers
      >>> policy = controllers.schedule_free(share=0.5)
      >>> for updates in range(4):
      ...     signals = {"updates": jnp.float32(updates)}
      ...     moves, _ = policy.update(signals, policy.init())
      ...     print(f"{moves['averaging_decay']:.3f}")
      0.000
      0.500
      0.667
      0.750
    """
    check_range("schedule_free", 0, 0.99, interpolation=interpolation)
    check_range("schedule_free", 1e-6, 0.5, share=share)

    def update(
        signals: Mapping[str, Any],
        state: Any,
    ) -> tuple[dict[str, Any], Any]:
        n = jnp.maximum(signals["updates"], 0.0)
        n = jnp.where(jnp.isfinite(n), n, 0.0)
        moves = {
            "interpolation": jnp.float32(interpolation),
            "averaging_decay": (n / (n + 1)) ** (1 / share - 1),
            "b1": jnp.float32(0),
        }
        return moves, state

    return Policy(
        "schedule_free",
        lambda: (),
        update,
        watches=("updates",),
        moves=("interpolation", "averaging_decay", "b1"),
        fitted=if_like_adam(otherwise) if otherwise else _as_it_is,
    )


def if_like_adam(otherwise: Any) -> Callable[[Recipe, Optimizer, Policy], Any]:
    """Return a `Policy.fitted` that puts others in its place for other optimizers."""

    def fitted(recipe: Recipe, optimizer: Optimizer, policy: Policy) -> Any:
        return policy if _is_like_adam(optimizer) else otherwise

    return fitted


def _as_it_is(recipe: Recipe, optimizer: Optimizer, policy: Policy) -> Policy:
    return policy


def _is_like_adam(optimizer: Optimizer) -> bool:
    """Whether updates without the first moment are gradients over their usual size.

    Two updates are tried, the second one by a tenth of the gradient. Entries of the
    first have the rate's size under Adam, and not under LAMB, which scales by the
    parameters. Those of the second are a seventh of it, and not smaller at all under
    Lion, which takes signs; there, nothing but the first moment weighs steps.
    """
    if not {"b1", "learning_rate"} <= optimizer.base.keys():
        return False
    params = {"w": jnp.full((4, 3), SIZE)}
    knobs = {"learning_rate": jnp.float32(1), "b1": jnp.float32(0)}
    gradient = jnp.linspace(0.5, 1.5, 12).reshape(4, 3)
    sizes = []
    with jax.ensure_compile_time_eval():
        try:
            state = optimizer.init(params)
            for scale in (1.0, 0.1):
                after, state = optimizer.update(
                    partial(dict, w=scale * gradient),
                    state,
                    params,
                    knobs,
                    jnp.float32(1),
                )
                sizes.append(float(jnp.abs(after["w"] - params["w"]).mean()))
        except (KeyError, RecipeError, TypeError, ValueError):
            # it knows the parameters by name
            return False
    first, second = sizes
    return abs(first - 1) < CLOSE and second < first / 2
