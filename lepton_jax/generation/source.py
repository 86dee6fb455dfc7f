"""A model to generate with: its weights, and a function from tokens to logits.

A trainer's model lies on the trainer's mesh, and the function is laid out by its plan:
the cache is split over the batch's axes and over the heads as its keys are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from lepton_jax.compat import jit_on
from lepton_jax.controller import select_weights
from lepton_jax.errors import ModelError
from lepton_jax.planner import laid_out
from lepton_jax.step import precision
from lepton_jax.step.from_nnx import follow_precision
from lepton_jax.trainer import Trainer
from lepton_jax.trees import is_real

# graphs of modules whose compiled programs are kept; assumption
KEPT = 8
ARGUMENTS = ("params", "variables", "inputs", "cache")


@dataclass(frozen=True, eq=False)
class Source:
    """A model as pure functions of its weights, a pair (params, variables).

    Attributes:
      forward: (params, variables, tokens int32 (rows, length), cache) to logits float32
        (rows, length, vocab) and the cache; a cache of None stays None.
      empty: (params, variables, rows, slots) to an empty cache; None: the model has no
        cache.
      jit: `jax.jit` for the devices of the weights.
      rows: the number of rows must be a multiple of it.
      longest: tokens that a row can have, by learned positions; None: any number.
      replicated: where the tokens come out; None: where the model is.
    """

    forward: Callable[[Any, Any, Any, Any], tuple[Any, Any]]
    empty: Callable[[Any, Any, int, int], Any] | None
    jit: Callable[..., Any] = jax.jit
    rows: int = 1
    longest: int | None = None
    replicated: NamedSharding | None = None


def source_of(model: Any) -> tuple[Source, Any]:
    """Return the functions and the weights of a trainer or an NNX module.

    Raises:
      ModelError: it is neither; or its recipe prepares the inputs of the model, which
        then takes no tokens.
    """
    if isinstance(model, Trainer):
        return _of_trainer(model)
    if isinstance(model, nnx.Module):
        graph, *weights = nnx.split(model, nnx.Param, ...)
        return _of_graph(graph, *_abilities(model)), tuple(weights)
    raise ModelError(
        f"a {type(model).__name__} is given where a language model is expected",
        where="generate",
        remedy="give a Trainer, or a flax.nnx.Module that maps tokens to logits",
    )


# ---- internals ----


@lru_cache(maxsize=KEPT)
def _of_graph(
    graph: Any,
    has_cache: bool,
    longest: int | None,
) -> Source:
    def module(
        params: Any,
        rest: Any,
    ) -> Any:
        whole: Any = nnx.merge(graph, params, rest, copy=True)
        whole.eval()
        return whole

    def forward(
        params: Any,
        rest: Any,
        tokens: Any,
        cache: Any,
    ) -> Any:
        return _called(module(params, rest), tokens, cache)

    def empty(
        params: Any,
        rest: Any,
        rows: int,
        slots: int,
    ) -> Any:
        dtype = _floats(params)
        return module(params, rest).empty_cache(rows, slots, dtype)

    return Source(forward, empty if has_cache else None, longest=longest)


_SOURCES: weakref.WeakKeyDictionary[Any, Source] = weakref.WeakKeyDictionary()


def _of_trainer(trainer: Trainer) -> tuple[Source, tuple[Any, Any]]:
    if trainer.program is None or trainer.state is None:
        trainer.module()  # plans, and makes the first weights
    program = trainer.program
    state = trainer.state
    assert program is not None and state is not None
    if trainer.recipe.preprocess is not None:
        raise ModelError(
            "the recipe has a preprocess, so its model does not take tokens",
            where="Recipe.preprocess",
            remedy="generate with trainer.module(), if that takes tokens",
        )
    if program not in _SOURCES:
        _SOURCES[program] = _of_program(program, *_abilities(trainer.module()))
    weights = select_weights(state, trainer.recipe)
    cast = _cast(trainer.recipe.precision)
    return _SOURCES[program], cast(weights)


@lru_cache
def _cast(name: str) -> Callable[[Any], Any]:
    """Return a function that casts weights as each call of the model would."""
    if name == "float32":
        return lambda weights: weights

    @jax.jit
    def cast(params: Any) -> Any:
        return precision.cast(params, name)

    return lambda weights: (cast(weights[0]), weights[1])


def _of_program(
    program: Any,
    has_cache: bool,
    longest: int | None,
) -> Source:
    traced = program.trace
    kept = traced.functional
    plan = program.plan
    by_name = isinstance(traced.inputs, dict)
    dtype = precision.dtype_of(program.recipe.precision)

    def module(
        params: Any,
        variables: Any,
    ) -> Any:
        whole = kept.whole(params, variables)
        if isinstance(whole, nnx.Module):
            follow_precision(whole)
        return whole

    def called(
        params: Any,
        variables: Any,
        inputs: Any,
        cache: Any,
    ) -> Any:
        tokens = inputs["tokens"] if by_name else inputs
        return _called(module(params, variables), tokens, cache)

    laid = laid_out(called, plan.layout, program.mesh, ARGUMENTS)

    def forward(
        params: Any,
        variables: Any,
        tokens: Any,
        cache: Any,
    ) -> Any:
        inputs = {"tokens": tokens} if by_name else tokens
        return laid(params, variables, inputs, cache)

    def empty(
        params: Any,
        variables: Any,
        rows: int,
        slots: int,
    ) -> Any:
        return module(params, variables).empty_cache(rows, slots, dtype)

    rows = 1
    for axis in plan.batch_axes:
        rows *= program.mesh.shape[axis]
    return Source(
        forward,
        empty if has_cache else None,
        partial(jit_on, program.mesh.devices.flat),
        rows,
        longest,
        program.replicated if program.mesh.size > 1 else None,
    )


def _abilities(module: Any) -> tuple[bool, int | None]:
    """Return whether a model has a cache, and how many tokens a row can have."""
    positions = getattr(getattr(module, "shape", None), "positions", None)
    return hasattr(module, "empty_cache"), positions or None


def _called(
    module: Any,
    tokens: Any,
    cache: Any,
) -> tuple[Any, Any]:
    if cache is None:
        return module(tokens).astype(jnp.float32), None
    logits, cache = module(tokens, cache=cache)
    return logits.astype(jnp.float32), cache


def _floats(params: Any) -> Any:
    """Return the dtype of the largest array of floating-point numbers."""
    leaves = jax.tree.leaves(params)
    floats = [x for x in leaves if is_real(x)]
    return max(floats, key=lambda x: x.size).dtype
