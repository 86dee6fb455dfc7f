"""NNX and Linen modules as the same two pure functions over nested dicts of arrays.

A small example: a model that doubles its input, as NNX and as Linen.

>>> class Nnx(nnx.Module):
...     def __init__(self, rngs):
...         self.factor = nnx.Param(jnp.float32(2))
...     def __call__(self, x):
...         return self.factor * x
>>> class Linen(linen.Module):
...     @linen.compact
...     def __call__(self, x):
...         return self.param("factor", lambda key: jnp.float32(2)) * x
>>> inputs = jnp.array([1.0, 3.0])
>>> key = jax.random.key(0)
>>> for model in (Nnx, Linen()):
...     module = functional(model, inputs)
...     params, variables = module.init(key)
...     outputs, _, _ = module.apply(params, variables, inputs, key, True, None)
...     print(module.kind, list(params), outputs)
nnx ['factor'] [2. 6.]
linen ['factor'] [2. 6.]
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from lepton_jax.compat import whole_axes
from lepton_jax.errors import ModelError, pointing_at_user
from lepton_jax.step import precision
from lepton_jax.step.from_linen import linen_functional
from lepton_jax.step.from_nnx import nnx_functional, without_sown
from lepton_jax.step.pure import Functional, Request
from lepton_jax.trees import shapes

__all__ = [
    "Functional",
    "forward",
    "forward_sowing",
    "functional",
    "is_linen",
    "leaks",
]


def is_linen(model: Any) -> bool:
    """Whether a model is a Linen module or its class."""
    if inspect.isclass(model):
        return issubclass(model, linen.Module)
    return isinstance(model, linen.Module)


def functional(
    model: Any,
    inputs: Any,
    *,
    train_argument: str | None = None,
    sown: Sequence[str] = (),
    seed: int | None = None,
) -> Functional:
    """Return the pure functions of a module, an instance of it or its factory.

    Args:
      model: as in `Recipe.model`.
      inputs: shapes of a batch of inputs, as the model receives them; Linen modules
        are initialized with zeros of them. None: only an NNX module's `init` will be
        called.
      train_argument: as in `Recipe`.
      sown: collections, or types of NNX variables by name, whose sown values `apply`
        returns.
      seed: build an NNX module anew from this seed in each program, for one whose
        parts share an array that is no attribute (see `leaks`).

    Raises:
      ModelError: the factory fails, or returns something else than a Flax module; or
        the module can't be called with the inputs, or its mode can't be told.
    """
    request = Request(inputs, train_argument, tuple(sown), seed)
    if isinstance(model, nnx.Module):
        return nnx_functional(lambda key: without_sown(nnx.clone(model)), request)
    if isinstance(model, linen.Module):
        return linen_functional(model, request)

    takes_rngs = "rngs" in _parameters(model)
    with pointing_at_user(
        "building the model",
        "let the factory take rngs, or nothing, and return a Flax module; give the "
        "model sizes of at least 1",
        where="Recipe.model",
    ):
        if not takes_rngs and not _required(model):
            module = model()
            if isinstance(module, linen.Module):
                return linen_functional(module, request)
            return nnx_functional(lambda key: model(), request)

        def build(key: Any) -> Any:
            rngs = nnx.Rngs(key)
            return model(rngs=rngs) if takes_rngs else model(rngs)

        return nnx_functional(build, request)


def forward(
    recipe: Any,
    module: Functional,
    params: Any,
    variables: Any,
    inputs: Any,
    key: Any,
    train: bool,
    dropout: Any = None,
) -> Any:
    """Preprocess a batch, and call the model on it in the recipe's precision.

    Returns:
      Outputs, and variables after the call.
    """
    outputs, after, _ = forward_sowing(
        recipe, module, params, variables, inputs, key, train, dropout
    )
    return outputs, after


def forward_sowing(
    recipe: Any,
    module: Functional,
    params: Any,
    variables: Any,
    inputs: Any,
    key: Any,
    train: bool,
    dropout: Any = None,
) -> Any:
    """Do as `forward`, and return the sown values, too.

    Returns:
      Outputs, variables after the call, and the values that the model sowed in training
      under the names of `Recipe.auxiliary`.
    """
    if recipe.preprocess:
        inputs = whole_axes(recipe.preprocess)(inputs)
    params, inputs = precision.cast((params, inputs), recipe.precision)

    def apply(
        params: Any,
        variables: Any,
        inputs: Any,
        key: Any,
        dropout: Any,
    ) -> Any:
        return module.apply(params, variables, inputs, key, train, dropout)

    where = f"{module.name}.__call__"
    with pointing_at_user(
        f"calling the model on {shapes(inputs)}",
        "let the model take what the samples (and preprocess) give: one array, or a "
        "dict's arrays by name",
        where=where,
    ):
        outputs, variables, sown = whole_axes(apply)(
            params, variables, inputs, key, dropout
        )
    outputs = _as_outputs(outputs, where)
    return precision.to_float32(outputs, recipe.precision), variables, sown


def leaks(jaxpr: Any) -> bool:
    """Whether a traced program uses an array from when its module was built.

    Such an array is no part of the module's state: a function that the module keeps
    holds it, e.g. `self.scale = lambda x: x * table`.
    """
    return any(isinstance(const, jax.core.Tracer) for const in jaxpr.consts)


# ---- internals ----


def _as_outputs(outputs: Any, where: str) -> Any:
    """Return outputs as arrays.

    Scalars may be among them, such as a loss that the model adds.

    Raises:
      ModelError: none of them has a batch dim, or one is no number.
    """
    leaves = jax.tree.leaves(outputs)
    if not all(map(_is_number, leaves)) or all(jnp.ndim(x) == 0 for x in leaves):
        raise ModelError(
            f"the model returned {shapes(outputs)}",
            where=where,
            remedy="return the outputs: an array or a tree of them, batch dim first",
        )
    return jax.tree.map(jnp.asarray, outputs)


def _is_number(x: Any) -> bool:
    return isinstance(x, jax.Array | float | int) or hasattr(x, "__array__")


# ---- factories ----


def _parameters(function: Any) -> dict[str, inspect.Parameter]:
    if isinstance(function, partial) and inspect.isclass(function.func):
        make = function.func.__init__
        function = partial(
            make,
            None,
            *function.args,
            **function.keywords,
        )
    try:
        if inspect.isclass(function):
            # for an NNX class itself, inspect finds its metaclass's __call__
            signature = inspect.signature(function.__init__)
            return dict(list(signature.parameters.items())[1:])
        return dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return {}


def _required(function: Any) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [
        name
        for name, parameter in _parameters(function).items()
        if parameter.default is parameter.empty and parameter.kind in kinds
    ]
