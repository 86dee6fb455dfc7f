"""NNX and Linen modules as the same two pure functions over nested dicts of arrays."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
from flax import linen, nnx

from lepton_jax import precision
from lepton_jax.errors import ModelError, pointing_at_user
from lepton_jax.state import by_path, shapes

TRAIN_WORDS = {"train": True, "training": True, "is_training": True, "deterministic": False,
               "use_running_average": False}


class Functional(NamedTuple):
    """A module without its objects.

    Attributes:
      kind: "nnx" or "linen".
      name: the module's class.
      init: a random key to (params, variables), nested dicts of arrays.
      apply: (params, variables, inputs, key, train, dropout) to (outputs, variables after the call). `key` feeds the
        random streams of Linen modules; NNX modules carry theirs in `variables`. `dropout` is a factor of the rate of each
        nnx.Dropout; None: 1.
    """

    kind: str
    name: str
    init: Callable[[Any], tuple[Any, Any]]
    apply: Callable[[Any, Any, Any, Any, bool, Any], tuple[Any, Any]]


def is_linen(model: Any) -> bool:
    """Whether a model is a Linen module or its class."""
    return isinstance(model, linen.Module) or (inspect.isclass(model) and issubclass(model, linen.Module))


def functional(model: Any, inputs: Any) -> Functional:
    """The pure functions of a module, an instance of it or its factory.

    Args:
      model: as in `Recipe.model`.
      inputs: shapes of a batch of inputs, as the model receives them; Linen modules are initialized with zeros of it.

    Raises:
      ModelError: the factory fails, or returns something else than a Flax module.
    """
    if isinstance(model, nnx.Module):
        return _nnx(lambda key: nnx.clone(model))
    if isinstance(model, linen.Module):
        return _linen(model, inputs)
    takes_rngs = "rngs" in _parameters(model)
    with pointing_at_user("building the model", "let the factory take rngs, or nothing, and return a Flax module; give the "
                          "model sizes of at least 1", where="Recipe.model"):
        if not takes_rngs and not _required(model):
            module = model()
            if isinstance(module, linen.Module):
                return _linen(module, inputs)
            return _nnx(lambda key: model())
        build = (lambda key: model(rngs=nnx.Rngs(key))) if takes_rngs else (lambda key: model(nnx.Rngs(key)))
        return _nnx(build)


def forward(recipe: Any, module: Functional, params: Any, variables: Any, inputs: Any, key: Any, train: bool,
            dropout: Any = None) -> Any:
    """(outputs, variables after) of a batch: preprocessing, then the model in the recipe's precision."""
    inputs = recipe.preprocess(inputs) if recipe.preprocess else inputs
    params, inputs = precision.cast((params, inputs), recipe.precision)
    with pointing_at_user(f"calling the model on {shapes(inputs)}", "let the model take what the samples (and "
                          "preprocess) give: one array, or a dict's arrays by name", where=f"{module.name}.__call__"):
        outputs, variables = module.apply(params, variables, inputs, key, train, dropout)
    leaves = jax.tree.leaves(outputs)
    if not leaves or any(jnp.ndim(x) == 0 for x in leaves):
        raise ModelError(f"the model returned {shapes(outputs)}", where=f"{module.name}.__call__",
                         remedy="return the outputs: an array or a tree of them, batch dim first")
    return precision.to_float32(outputs, recipe.precision), variables


def _nnx(build: Callable[[Any], Any]) -> Functional:
    def make(key: Any) -> Any:
        module = build(key)
        if not isinstance(module, nnx.Module):
            raise ModelError(f"the model factory returned a {type(module).__name__}", where="Recipe.model",
                             remedy="return a flax.nnx.Module (built with the given rngs) or a flax.linen.Module")
        return module

    module = nnx.eval_shape(lambda: make(jax.random.key(0)))
    graph, params, rest = _split(module)
    known = set(by_path(nnx.to_pure_dict(rest)))

    def init(key: Any) -> tuple[Any, Any]:
        module = make(key)
        _, params, rest = _split(module)
        return _trainable(nnx.to_pure_dict(params), type(module).__name__), nnx.to_pure_dict(rest)

    def apply(params_: Any, variables: Any, inputs: Any, key: Any, train: bool, dropout: Any = None) -> tuple[Any, Any]:
        # copy=True: modules that count calls (Rngs, RNN) mutate their variables at this trace level
        module = nnx.merge(graph, _filled(params, params_), _filled(rest, variables), copy=True)
        _follow_precision(module)
        scaled = _scale_dropout(module, dropout) if dropout is not None else []
        module.train() if train else module.eval()
        outputs = _call(module, module.__call__, inputs, train)
        for node in scaled:  # it is no part of the module's state
            del node.factor
        after = nnx.to_pure_dict(nnx.state(module, nnx.All(nnx.Not(nnx.Param), nnx.Not(nnx.Intermediate))))
        surplus = set(by_path(after)) - known
        if surplus:
            raise ModelError(f"the module creates the variable {sorted(surplus)[0]!r} when it is called",
                             where=type(module).__name__, remedy="create it in __init__, so that the state has one shape")
        return outputs, after

    return Functional("nnx", type(module).__name__, init, apply)


def _follow_precision(module: nnx.Module) -> None:
    """nnx.Embed alone fixes its dtype when it is built; it would turn a bfloat16 table, and all after it, to float32."""
    for _, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Embed) and jnp.dtype(node.dtype).itemsize > node.embedding.dtype.itemsize:
            node.dtype = node.embedding.dtype


class _ScaledDropout(nnx.Dropout):
    """An nnx.Dropout whose rate is times a traced factor; with a factor of 1 it has the same bits."""

    factor: Any

    def __call__(self, inputs: Any, *, deterministic: bool | None = None, rngs: Any = None) -> Any:
        if self.deterministic if deterministic is None else deterministic:
            return inputs
        source = rngs or self.rngs
        stream: Any = source[self.rng_collection] if isinstance(source, nnx.Rngs) else source
        drawn = stream.count[...]
        plain = super().__call__(inputs, deterministic=False, rngs=rngs)
        after, stream.count[...] = stream.count[...], drawn  # the same key again, so that the same inputs are dropped
        kept = 1 - jnp.minimum(self.rate * self.factor, 0.99)
        mask = jax.random.bernoulli(stream(), kept, plain.shape)
        stream.count[...] = after
        scaled = jnp.where(mask, inputs / kept.astype(inputs.dtype), 0)
        return jnp.where(self.factor == 1, plain, scaled)


def _scale_dropout(module: nnx.Module, factor: Any) -> list[Any]:
    found = [node for _, node in nnx.iter_graph(module) if isinstance(node, nnx.Dropout) and 0 < node.rate < 1]
    if not found:
        raise ModelError("a policy moves dropout, but the model has no nnx.Dropout with a rate above 0",
                         where=type(module).__name__, remedy="give the model one, or leave that policy out")
    for node in found:
        node.__class__ = _ScaledDropout
        node.factor = nnx.data(factor)  # type: ignore[attr-defined]
    return found


def _split(module: nnx.Module) -> tuple[Any, Any, Any]:
    graph, params, *rest = nnx.split(module, nnx.Param, ...)
    return graph, params, rest[0]


def _trainable(params: Any, name: str) -> Any:
    for path, leaf in by_path(params).items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ModelError(f"the parameter {path!r} is {leaf.dtype}, which has no gradient", where=name,
                             remedy="make it floating-point, or no nnx.Param but another nnx.Variable")
        if leaf.size == 0:
            raise ModelError(f"the parameter {path!r} has shape {leaf.shape}: it is empty", where=name,
                             remedy="give the model sizes of at least 1")
    return params


def _filled(template: nnx.State, values: Any) -> nnx.State:
    state = jax.tree.map(lambda x: x, template)
    nnx.replace_by_pure_dict(state, values)
    return state


def _linen(module: linen.Module, inputs: Any) -> Functional:
    def init(key: Any) -> tuple[Any, Any]:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), inputs)
        variables = dict(flax.core.unfreeze(_call(module, module.init, zeros, False, key)))
        params = variables.pop("params", {})
        variables.pop("intermediates", None)
        return _trainable(params, type(module).__name__), variables

    def apply(params: Any, variables: Any, inputs: Any, key: Any, train: bool, dropout: Any = None) -> tuple[Any, Any]:
        # make_rng of a stream that isn't given falls back to "params", so that every name has randomness
        if dropout is not None:
            raise ModelError("a policy moves dropout, which only nnx.Dropout takes from outside", where=type(module).__name__,
                             remedy="write the model as an NNX module, or leave that policy out")
        rngs = {"params": key, "dropout": jax.random.fold_in(key, 1)} if train else None
        mutable = list(variables) if train else []
        outputs = _call(module, module.apply, inputs, train, {"params": params, **variables}, rngs=rngs, mutable=mutable)
        return (outputs[0], {**variables, **flax.core.unfreeze(outputs[1])})

    return Functional("linen", type(module).__name__, init, apply)


def _call(module: Any, function: Callable, inputs: Any, train: bool, *leading: Any, **options: Any) -> Any:
    """`function` with the batch's inputs, and the mode under the name that the module's __call__ has for it."""
    words = _parameters(type(module).__call__)
    options |= {word: train == sense for word, sense in TRAIN_WORDS.items() if word in words}
    if isinstance(inputs, dict):
        return function(*leading, **inputs, **options)
    return function(*leading, inputs, **options)


def _parameters(function: Any) -> dict[str, inspect.Parameter]:
    if isinstance(function, functools.partial) and inspect.isclass(function.func):
        function = functools.partial(function.func.__init__, None, *function.args, **function.keywords)
    try:
        if inspect.isclass(function):  # what inspect finds for an NNX class is its metaclass's __call__
            return dict(list(inspect.signature(function.__init__).parameters.items())[1:])
        return dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return {}


def _required(function: Any) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [n for n, p in _parameters(function).items() if p.default is p.empty and p.kind in kinds]
