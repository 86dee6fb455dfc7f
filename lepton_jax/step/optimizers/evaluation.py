"""The weights to evaluate, predict and serve with.

For most optimizers these are the weights that are trained. Schedule-free optimizers,
`optax.lookahead` and `optax.contrib.sam` have others, which their states hold or imply.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lepton_jax.compat import jit_on
from lepton_jax.errors import RecipeError, pointing_at_user
from lepton_jax.step.optimizers.schedule import nodes
from lepton_jax.step.optimizers.transformation import Lookahead
from lepton_jax.trees import by_path, with_leaves

WHERE = "Recipe.evaluate_params"
REMEDY = (
    "give a function (optimizer_state, params) -> params, e.g."
    " optax.contrib.schedule_free_eval_params"
)
# states that hold or imply other weights
HOLDING = (
    optax.contrib.ScheduleFreeState,
    optax.contrib.SAMState,
    Lookahead,
)


def evaluated(
    given: Callable[[Any, Any], Any] | None,
    state: Any,
    params: Any,
) -> Any:
    """Return the weights to evaluate with, laid out as the parameters are.

    Args:
      given: `Recipe.evaluate_params`; None: the optimizer's state says which they are.
      state: the optimizer's state.
      params: the parameters that are trained.

    Returns:
      Arrays like `params`; `params` themselves where the optimizer has no others.

    Raises:
      RecipeError: `given` fails, or returns something else.
    """
    if given is None and not any(isinstance(node, HOLDING) for node in nodes(state)):
        return params
    function = _by_state if given is None else _checked(given)

    leaves = jax.tree.leaves((state, params))
    if not all(isinstance(leaf, jax.Array) for leaf in leaves):
        return jax.eval_shape(function, state, params)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return function(state, params)

    own, structure = jax.tree.flatten(params)
    shardings = tuple(x.sharding for x in own)
    return _compiled(function, structure, shardings)(state, params)


def check_evaluation(
    given: Callable[[Any, Any], Any],
    state: Any,
    params: Any,
) -> None:
    """Check that the function of a recipe can be used; nothing is computed.

    Raises:
      RecipeError: it fails, or returns something else than parameters.
    """
    jax.eval_shape(_checked(given), state, params)


@functools.lru_cache(maxsize=8)
def _compiled(
    function: Callable,
    structure: Any,
    shardings: tuple,
) -> Callable:
    devices = list(shardings[0].device_set)
    out_shardings = jax.tree.unflatten(structure, shardings)
    return jit_on(devices, function, out_shardings=out_shardings)


@functools.lru_cache(maxsize=8)
def _checked(given: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Return a person's function that checks its result against the parameters."""

    def function(state: Any, params: Any) -> Any:
        with pointing_at_user("evaluate_params", REMEDY, where=WHERE, kind=RecipeError):
            result = given(state, params)
        weights = by_path(result)
        own = by_path(params)
        for path, x in own.items():
            shape = getattr(weights.get(path), "shape", None)
            if shape != x.shape:
                returned = "nothing" if shape is None else shape
                raise RecipeError(
                    f"evaluate_params returned {returned} for {path!r}, which is"
                    f" {x.shape} in the model",
                    where=WHERE,
                    remedy=REMEDY,
                )
        # by name, so that a flat dict or an nnx.State of the same names will do
        leaves = [jnp.asarray(weights[path], x.dtype) for path, x in own.items()]
        return with_leaves(params, leaves)

    return function


def _by_state(state: Any, params: Any) -> Any:
    """Return the weights that the optimizer's state holds or implies."""
    # `switchable`: those of the one at work
    if isinstance(state, dict) and set(state) == {"index", "each"}:
        index = state["index"]
        each = [_by_state(own, params) for own in state["each"]]
        return jax.tree.map(lambda *x: jax.lax.select_n(index, *x), *each)

    for node in nodes(state):
        if isinstance(node, Lookahead):
            params = node.slow
        elif isinstance(node, optax.contrib.ScheduleFreeState):
            average = functools.partial(_schedule_free, node)
            params = _where_held(node.z, params, average)
        elif isinstance(node, optax.contrib.SAMState) and node.cache is not None:
            unperturbed = functools.partial(_unperturbed, node)
            params = _where_held(node.cache, params, unperturbed)
    return params


def _where_held(
    held: Any,
    params: Any,
    function: Callable[[Any], Any],
) -> Any:
    """Apply a function to the parameters of which an optimizer holds weights.

    Others stay as they are. Under `optax.masked` and `optax.partition` the optimizer
    has an `optax.MaskedNode` in their place.
    """
    own = jax.tree.map(
        lambda h, p: h if _is_masked(h) else p,
        held,
        params,
        is_leaf=_is_masked,
    )
    result = function(own)
    return jax.tree.map(
        lambda r, p: p if _is_masked(r) else r.astype(p.dtype),
        result,
        params,
        is_leaf=_is_masked,
    )


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _schedule_free(state: Any, params: Any) -> Any:
    return optax.contrib.schedule_free_eval_params(state, params)


def _unperturbed(state: Any, params: Any) -> Any:
    """Return the weights around which `optax.contrib.sam` looks for a worse place."""

    def select(cached: Any, now: Any) -> Any:
        return jnp.where(state.steps_since_sync == 0, now, cached)

    return jax.tree.map(select, state.cache, params)
