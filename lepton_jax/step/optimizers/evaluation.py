"""The weights to evaluate, predict and serve with, where they are not those that are
trained.
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
from lepton_jax.trees import by_path

WHERE = "Recipe.evaluate_params"
REMEDY = (
    "give a function (optimizer_state, params) -> params, e.g."
    " optax.contrib.schedule_free_eval_params"
)
FOUND = (
    optax.contrib.ScheduleFreeState,
    optax.contrib.SAMState,
    Lookahead,
)


def evaluated(
    given: Callable[[Any, Any], Any] | None,
    state: Any,
    params: Any,
) -> Any:
    """Weights to evaluate with, laid out as the parameters are.

    Args:
      given: `Recipe.evaluate_params`; None: found by the optimizer's state, which for
        schedule-free optimizers, `optax.lookahead` and `optax.contrib.sam` holds them.
      state: the optimizer's state.
      params: the parameters that are trained.

    Returns:
      Arrays like `params`; `params` themselves where the optimizer has no others.

    Raises:
      RecipeError: `given` fails, or returns something else.
    """
    if given is None and not any(isinstance(node, FOUND) for node in nodes(state)):
        return params
    function = _found if given is None else _checked(given)

    leaves = jax.tree.leaves((state, params))
    if not all(isinstance(leaf, jax.Array) for leaf in leaves):
        return jax.eval_shape(function, state, params)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return function(state, params)

    own, structure = jax.tree.flatten(params)
    return _compiled(function, structure, tuple(x.sharding for x in own))(state, params)


def check_evaluation(
    given: Callable[[Any, Any], Any],
    state: Any,
    params: Any,
) -> None:
    """Raise a RecipeError where the function of a recipe can't be used; nothing is
    computed.
    """
    jax.eval_shape(_checked(given), state, params)


@functools.lru_cache(maxsize=8)
def _compiled(
    function: Callable,
    structure: Any,
    shardings: tuple,
) -> Callable:
    devices = list(shardings[0].device_set)
    return jit_on(
        devices,
        function,
        out_shardings=jax.tree.unflatten(structure, shardings),
    )


@functools.lru_cache(maxsize=8)
def _checked(given: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """A person's function, whose result must be like the parameters."""

    def function(state: Any, params: Any) -> Any:
        with pointing_at_user(
            "evaluate_params",
            REMEDY,
            where=WHERE,
            kind=RecipeError,
        ):
            result = given(state, params)
        found = by_path(result)
        for path, own in by_path(params).items():
            shape = getattr(found.get(path), "shape", None)
            if shape != own.shape:
                raise RecipeError(
                    f"evaluate_params returned {'nothing' if shape is None else shape}"
                    f" for {path!r}, which is {own.shape} in the model",
                    where=WHERE,
                    remedy=REMEDY,
                )
        # by name, so that a flat dict or an nnx.State of the same names will do
        leaves = [
            jnp.asarray(found[path], own.dtype) for path, own in by_path(params).items()
        ]
        return jax.tree.unflatten(jax.tree.structure(params), leaves)

    return function


def _found(state: Any, params: Any) -> Any:
    """The weights that the optimizer's state holds or implies."""
    # `switchable`: those of the one at work
    if isinstance(state, dict) and set(state) == {"index", "each"}:
        each = [_found(one, params) for one in state["each"]]
        return jax.tree.map(lambda *x: jax.lax.select_n(state["index"], *x), *each)

    for node in nodes(state):
        if isinstance(node, Lookahead):
            params = node.slow
        elif isinstance(node, optax.contrib.ScheduleFreeState):
            params = _where_held(
                node.z, params, functools.partial(_schedule_free, node)
            )
        elif isinstance(node, optax.contrib.SAMState) and node.cache is not None:
            params = _where_held(
                node.cache, params, functools.partial(_unperturbed, node)
            )
    return params


def _where_held(
    held: Any,
    params: Any,
    function: Callable[[Any], Any],
) -> Any:
    """`function` of those parameters that an optimizer holds weights of; others as they
    are.

    Under `optax.masked` and `optax.partition` it has an `optax.MaskedNode` for others.
    """
    own = jax.tree.map(
        lambda h, p: h if _masked(h) else p,
        held,
        params,
        is_leaf=_masked,
    )
    result = function(own)
    return jax.tree.map(
        lambda r, p: p if _masked(r) else r.astype(p.dtype),
        result,
        params,
        is_leaf=_masked,
    )


def _masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _schedule_free(state: Any, params: Any) -> Any:
    return optax.contrib.schedule_free_eval_params(state, params)


def _unperturbed(state: Any, params: Any) -> Any:
    """The weights from which `optax.contrib.sam` looks for a worse place around."""
    return jax.tree.map(
        lambda kept, now: jnp.where(
            state.steps_since_sync == 0,
            now,
            kept,
        ),
        state.cache,
        params,
    )
