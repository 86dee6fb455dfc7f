"""NNX and Linen modules as the same two pure functions over nested dicts of arrays."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
from flax import linen, nnx, traverse_util

from lepton_jax.compat import noting_sow, whole_axes
from lepton_jax.errors import ModelError, nearest, pointing_at_user
from lepton_jax.step import precision
from lepton_jax.step.arguments import (
    Arguments,
    Effect,
    Mode,
    call_of,
    draws,
    read,
    settled,
)
from lepton_jax.step.dropout import scale_dropout
from lepton_jax.trees import by_path, shapes

# Outside of training each call draws the same random numbers: an evaluation can be
# repeated, and is the same on each host.
EVALUATION_SEED = 0
TEMPORARY = ("intermediates", "perturbations")  # collections that are never a state


class Functional(NamedTuple):
    """A module without its objects.

    Attributes:
      kind: "nnx" or "linen".
      name: the module's class.
      init: a random key to (params, variables), nested dicts of arrays.
      apply: (params, variables, inputs, key, train, dropout) to (outputs, variables
        after the call, sown). `key` feeds the random streams of Linen modules, and
        the arguments `rngs`, `rng`, `key` of either kind; NNX modules carry their
        own streams in `variables`. It is not used outside of training, where all
        draw from `EVALUATION_SEED`. `dropout` is a factor of the rate of each
        nnx.Dropout; None: 1. `sown` holds the values sown in training under each
        of the names that were asked for.
    """

    kind: str
    name: str
    init: Callable[[Any], tuple[Any, Any]]
    apply: Callable[[Any, Any, Any, Any, bool, Any], tuple[Any, Any, dict[str, Any]]]


def is_linen(model: Any) -> bool:
    """Whether a model is a Linen module or its class."""
    return isinstance(model, linen.Module) or (
        inspect.isclass(model) and issubclass(model, linen.Module)
    )


def functional(
    model: Any,
    inputs: Any,
    *,
    train_argument: str | None = None,
    sown: Sequence[str] = (),
    seed: int | None = None,
) -> Functional:
    """The pure functions of a module, an instance of it or its factory.

    Args:
      model: as in `Recipe.model`.
      inputs: shapes of a batch of inputs, as the model receives them; Linen modules
        are initialized with zeros of it. None: an NNX module's `init` is all that will
        be called.
      train_argument: as in `Recipe`.
      sown: collections, or types of NNX variables by name, whose sown values `apply`
        returns.
      seed: build an NNX module anew from this seed in each program, for one whose
        parts share an array that is no attribute (see `leaks`).

    Raises:
      ModelError: the factory fails, or returns something else than a Flax module; or
        the module can't be called with the inputs, or its mode can't be told.
    """
    given = _Given(inputs, train_argument, tuple(sown), seed)
    if isinstance(model, nnx.Module):
        return _nnx(lambda key: _without_sown(nnx.clone(model)), given)
    if isinstance(model, linen.Module):
        return _linen(model, given)

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
                return _linen(module, given)
            return _nnx(lambda key: model(), given)

        def build(key: Any) -> Any:
            return model(rngs=nnx.Rngs(key)) if takes_rngs else model(nnx.Rngs(key))

        return _nnx(build, given)


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
    """(outputs, variables after) of a batch: preprocessing, then the model in the
    recipe's precision."""
    return forward_sowing(
        recipe, module, params, variables, inputs, key, train, dropout
    )[:2]


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
    """As `forward`, and the values that the model sowed in training under the names of
    `Recipe.auxiliary`."""
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
        return module.apply(
            params,
            variables,
            inputs,
            key,
            train,
            dropout,
        )

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
    outputs = _checked_outputs(outputs, where)
    return precision.to_float32(outputs, recipe.precision), variables, sown


def _checked_outputs(outputs: Any, where: str) -> Any:
    """Outputs as arrays: at least one of them with a batch dim; scalars may be among
    them, such as a loss that the model adds to."""
    leaves = jax.tree.leaves(outputs)
    numbers = all(
        isinstance(x, jax.Array | float | int) or hasattr(x, "__array__")
        for x in leaves
    )
    if not numbers or all(jnp.ndim(x) == 0 for x in leaves):
        raise ModelError(
            f"the model returned {shapes(outputs)}",
            where=where,
            remedy="return the outputs: an array or a tree of them, batch dim first",
        )
    return jax.tree.map(jnp.asarray, outputs)


class _Given(NamedTuple):
    """The arguments of `functional`, for which a module is made pure."""

    inputs: Any
    train_argument: str | None
    sown: tuple[str, ...]
    seed: int | None

    def arguments(
        self,
        kind: type,
        trial: Callable[[Arguments, Mode], Effect],
    ) -> Any:
        """The arguments of the module's call.

        Args:
          kind: the module's class.
          trial: traces a call.
        """
        if self.inputs is None:
            return None
        where = f"{kind.__name__}.__call__"
        found = read(
            call_of(kind),
            where,
            self.inputs,
            self.train_argument,
        )
        tried: dict[Any, Effect | None] = {}

        def effect(mode: Mode) -> Effect | None:
            known = (
                mode.train,
                frozenset(mode.values.items()),
                mode.random,
            )
            if known not in tried:
                try:
                    tried[known] = trial(found, mode)
                except Exception:  # of the user's code: e.g. `decode=True` has no cache
                    tried[known] = None
            return tried[known]

        return settled(found, effect)


def _streams(key: Any, linen_module: bool) -> Callable[[str], Any]:
    """Random streams, or a key, for the argument of a name; each has other numbers."""
    handed: list[str] = []

    def make(name: str) -> Any:
        if name not in handed:
            handed.append(name)
        index = handed.index(name)
        own = jax.random.fold_in(key, index) if index else key
        if name != "rngs":
            return own
        return _linen_streams(own) if linen_module else nnx.Rngs(own)

    return make


def _effect(
    function: Callable,
    params: Any,
    variables: Any,
    inputs: Any,
) -> Effect:
    """Effects of a call, read from its traced program.

    Args:
      function: (params, variables, inputs, key) to the variables after.
    """
    program, after = jax.make_jaxpr(whole_axes(function), return_shape=True)(
        params, variables, inputs, _key_shape()
    )
    jaxpr = program.jaxpr
    first = len(jax.tree.leaves(params))
    paths = list(by_path(variables))
    kept = dict(
        zip(
            paths,
            jaxpr.invars[first : first + len(paths)],
            strict=True,
        )
    )
    written = {
        path
        for path, result in zip(by_path(after), jaxpr.outvars, strict=True)
        if kept.get(path) is not result
    }
    return Effect(draws(jaxpr), frozenset(written))


def _collected(
    found: Mapping[str, list[Any]],
    asked: Sequence[str],
    seen: set[str],
    where: str,
) -> dict[str, Any]:
    """The sown values that were asked for.

    Raises:
      ModelError: there are none under a name.
    """
    for name in asked:
        if not jax.tree.leaves(found.get(name, [])):
            known = ", ".join(sorted(seen)) or "nothing"
            raise ModelError(
                f"auxiliary names {name!r}, under which the model sows nothing in "
                f"training{nearest(name, seen)}",
                where=where,
                remedy=(
                    f"name what it sows under ({known}), or sow under it: "
                    f"self.sow({name!r}, 'name', value)"
                ),
            )
    return {name: found[name] for name in asked}


# ---- NNX ----


def _nnx(build: Callable[[Any], Any], given: _Given) -> Functional:
    def make(key: Any) -> Any:
        module = build(key)
        if not isinstance(module, nnx.Module):
            raise ModelError(
                f"the model factory returned a {type(module).__name__}",
                where="Recipe.model",
                remedy=(
                    "return a flax.nnx.Module (built with the given rngs) or a "
                    "flax.linen.Module"
                ),
            )
        return _with_arrays_as_data(module)

    kind, graph, params, rest = _abstract(make)
    name = kind.__name__
    known = set(by_path(nnx.to_pure_dict(rest)))
    noted: set[tuple[str, str]] = set()  # label and name of what was ever sown

    def init(key: Any) -> tuple[Any, Any]:
        module = make(key)
        _, params, rest = _split(module)
        return _trainable(nnx.to_pure_dict(params), name), nnx.to_pure_dict(rest)

    def merged(params_: Any, variables: Any) -> Any:
        own = graph
        if given.seed is not None:
            own = _split(make(jax.random.key(given.seed)))[0]
        # copy=True: modules that count calls (Rngs, RNN) mutate their variables at this
        # trace level
        return nnx.merge(
            own,
            _filled(params, params_),
            _filled(rest, variables),
            copy=True,
        )

    def note(
        module: Any,
        kind: Any,
        label: str,
    ) -> None:
        kinds = (kind,) if isinstance(kind, str) else _labels(kind)
        noted.update((k, label) for k in kinds)

    def after(module: Any) -> tuple[Any, dict[str, list[Any]]]:
        """The variables after a call, and what was sown in it, by its label."""
        kept = {}
        found: dict[str, list[Any]] = {}
        for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Not(nnx.Param))):
            own = "/".join(map(str, path)) in known
            labels = (
                _labels(type(variable)) if isinstance(variable, nnx.Variable) else ()
            )
            if any((label, path[-1]) in noted for label in labels):
                for label in labels:
                    found.setdefault(label, []).append(variable.get_value())
            elif not own and isinstance(variable, nnx.Intermediate):
                continue
            else:
                own = True
            if own:
                kept[path] = variable.get_value() if labels else variable
        return traverse_util.unflatten_dict(kept), found

    def call(
        arguments: Arguments,
        module: Any,
        inputs: Any,
        key: Any,
        mode: Mode,
    ) -> Any:
        """Outputs of a module that is set to a mode, which mutates it."""
        module.train() if mode.train else module.eval()
        with noting_sow(nnx.Module, note):
            return arguments.call(
                module, inputs, mode, _streams(key, linen_module=False)
            )

    def checked_after(module: Any) -> tuple[Any, dict[str, list[Any]]]:
        variables, found = after(module)
        surplus = set(by_path(variables)) - known
        if surplus:
            raise ModelError(
                f"the module creates the variable {sorted(surplus)[0]!r} when it is "
                "called",
                where=name,
                remedy=(
                    "create it in __init__, so that the state has one shape; a value"
                    " for the loss is sown: self.sow(nnx.Intermediate, name, value) and"
                    ' Recipe(auxiliary={"Intermediate": 1.0})'
                ),
            )
        return variables, found

    def trial(arguments: Arguments, mode: Mode) -> Effect:
        def run(
            params_: Any,
            variables: Any,
            inputs: Any,
            key: Any,
        ) -> Any:
            module = merged(params_, variables)
            call(arguments, module, inputs, key, mode)
            return checked_after(module)[0]

        params, variables = jax.eval_shape(init, _key_shape())
        return _effect(run, params, variables, given.inputs)

    arguments = given.arguments(kind, trial)

    def apply(
        params_: Any,
        variables: Any,
        inputs: Any,
        key: Any,
        train: bool,
        dropout: Any = None,
    ) -> Any:
        module = merged(params_, variables)
        _follow_precision(module)
        scaled = scale_dropout(module, dropout) if dropout is not None else []
        if not train:
            key = jax.random.key(EVALUATION_SEED)
        outputs = call(
            arguments,
            module,
            inputs,
            key,
            arguments.mode(train),
        )
        for node in scaled:  # it is no part of the module's state
            del node.factor
        variables, found = checked_after(module)
        asked = given.sown if train else ()
        return (
            outputs,
            variables,
            _collected(
                found,
                asked,
                {k for k, _ in noted},
                name,
            ),
        )

    return Functional("nnx", name, init, apply)


def _key_shape() -> Any:
    """A random key as a shape: a key itself would start JAX's devices."""
    return jax.eval_shape(lambda: jax.random.key(0))


def _abstract(make: Callable[[Any], Any]) -> tuple[type, Any, Any, Any]:
    """A module's class, its graph, and its state as shapes; no array is allocated.

    `nnx.eval_shape` would lose the arrays in an attribute that is a list or a dict.
    """
    parts: list[Any] = []

    def build(key: Any) -> tuple[Any, Any]:
        module = make(key)
        graph, params, rest = _split(module)
        parts.extend((type(module), graph))
        return params, rest

    params, rest = jax.eval_shape(build, _key_shape())
    kind, graph = parts
    return kind, graph, params, rest


def _with_arrays_as_data(module: nnx.Module) -> nnx.Module:
    """A module whose bare arrays are part of its state.

    NNX takes a `jnp` array that is assigned to an attribute as data, but not where it
    is traced, as it is here: then the tracer would stay in the graph's constants.
    """
    for _, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Pytree):
            for name, value in list(vars(node).items()):
                if isinstance(value, jax.Array):
                    setattr(node, name, nnx.data(value))
    return module


def _without_sown(module: nnx.Module) -> nnx.Module:
    """A module without what its earlier calls sowed: it would grow with each call."""
    for _, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Module):
            for name, value in list(vars(node).items()):
                if isinstance(value, nnx.Intermediate) and isinstance(
                    value.get_value(), tuple
                ):
                    delattr(node, name)
    return module


def _labels(kind: type) -> tuple[str, ...]:
    """The names of a type of variables: its class's, and the one registered in NNX."""
    try:
        registered = nnx.variable_name_from_type(kind)
    except ValueError:
        return (kind.__name__,)
    return tuple({kind.__name__, registered})


def leaks(jaxpr: Any) -> bool:
    """Whether a traced program uses an array from when its module was built.

    Such an array is no part of the module's state: it is held by a function that the
    module keeps, e.g. `self.scale = lambda x: x * table`.
    """
    return any(isinstance(const, jax.core.Tracer) for const in jaxpr.consts)


def _follow_precision(module: nnx.Module) -> None:
    """Set the dtype of each nnx.Embed to that of its table.

    It alone fixes its dtype when it is built: it would turn a bfloat16 table, and all
    after it, to float32.
    """
    for _, node in nnx.iter_graph(module):
        if (
            isinstance(node, nnx.Embed)
            and jnp.dtype(node.dtype).itemsize > node.embedding.dtype.itemsize
        ):
            node.dtype = node.embedding.dtype


def _split(module: nnx.Module) -> tuple[Any, Any, Any]:
    graph, params, *rest = nnx.split(module, nnx.Param, ...)
    return graph, params, rest[0]


def _trainable(params: Any, name: str) -> Any:
    for path, leaf in by_path(params).items():
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise ModelError(
                f"the parameter {path!r} is {leaf.dtype}, which has no gradient",
                where=name,
                remedy=(
                    "make it floating-point or complex, or no nnx.Param but another "
                    "nnx.Variable"
                ),
            )
        if leaf.size == 0:
            raise ModelError(
                f"the parameter {path!r} has shape {leaf.shape}: it is empty",
                where=name,
                remedy="give the model sizes of at least 1",
            )
    return params


def _filled(template: nnx.State, values: Any) -> nnx.State:
    state = jax.tree.map(lambda x: x, template)
    nnx.replace_by_pure_dict(state, values)
    return state


# ---- Linen ----


def _linen(module: linen.Module, given: _Given) -> Functional:
    name = type(module).__name__
    bound: dict[str, Any] = {}
    if module.scope is not None:  # `model.bind(variables)`
        module, variables = module.unbind()
        bound = flax.core.unfreeze(dict(variables))
    noted: set[tuple[str, ...]] = set()  # paths of what was ever sown

    def note(
        module: Any,
        collection: str,
        label: str,
    ) -> None:
        path = () if module.scope is None else tuple(module.scope.path)
        noted.add((collection, *path, label))

    def calling(
        arguments: Arguments,
        inputs: Any,
        mode: Mode,
        key: Any,
    ) -> Callable:
        # a function of its own: the module's arguments may be named as those of `apply`
        streams = _streams(key, linen_module=True)
        return lambda module: arguments.call(
            module,
            inputs,
            mode,
            streams,
        )

    def begun(
        arguments: Arguments,
        mode: Mode,
        key: Any,
    ) -> tuple[Any, Any]:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), given.inputs)
        with noting_sow(linen.Module, note):
            made = module.init(
                key,
                method=calling(arguments, zeros, mode, key),
            )
        variables, _ = _without_paths(flax.core.unfreeze(made), noted)
        variables = {n: x for n, x in variables.items() if n not in TEMPORARY}
        variables = _starting_from(bound, variables, name)
        params = variables.pop("params", {})
        return _trainable(params, name), variables

    def run(
        arguments: Arguments,
        mode: Mode,
        params: Any,
        variables: Any,
        inputs: Any,
        key: Any,
        rngs: Any,
    ) -> Any:
        collections = dict.fromkeys([*variables, *given.sown]) if mode.train else ()
        with noting_sow(linen.Module, note):
            outputs, after = module.apply(
                {"params": params, **variables},
                rngs=rngs,
                mutable=list(collections),
                method=calling(arguments, inputs, mode, key),
            )
        after, sown = _without_paths(flax.core.unfreeze(after), noted)
        return outputs, {**variables, **after}, sown

    def trial(arguments: Arguments, mode: Mode) -> Effect:
        def traced(
            params: Any,
            variables: Any,
            inputs: Any,
            key: Any,
        ) -> Any:
            streams = _linen_streams(key) if mode.train else None
            return run(arguments, mode, params, variables, inputs, key, streams)[1]

        start = partial(begun, arguments, arguments.mode(False))
        params, variables = jax.eval_shape(whole_axes(start), _key_shape())
        return _effect(traced, params, variables, given.inputs)

    arguments = given.arguments(type(module), trial)

    def init(key: Any) -> tuple[Any, Any]:
        return whole_axes(partial(begun, arguments, arguments.mode(False)))(key)

    def apply(
        params: Any,
        variables: Any,
        inputs: Any,
        key: Any,
        train: bool,
        dropout: Any = None,
    ) -> Any:
        if dropout is not None:
            raise ModelError(
                "a policy moves dropout, which only nnx.Dropout takes from outside",
                where=name,
                remedy="write the model as an NNX module, or leave that policy out",
            )
        mode = arguments.mode(train)
        if train:
            streams = _linen_streams(key)
            outputs, after, sown = run(
                arguments, mode, params, variables, inputs, key, streams
            )
            seen = {path[0] for path in noted}
            return (
                outputs,
                after,
                _collected(
                    sown,
                    given.sown,
                    seen,
                    name,
                ),
            )

        key = jax.random.key(EVALUATION_SEED)
        try:
            outputs, after, _ = run(
                arguments, mode, params, variables, inputs, key, None
            )
        except flax.errors.InvalidRngError:
            # It draws random numbers outside of training, too. Others get no streams:
            # some modules decide by `has_rng` whether to drop or to add noise.
            streams = _linen_streams(key)
            outputs, after, _ = run(
                arguments, mode, params, variables, inputs, key, streams
            )
        return outputs, after, {}

    return Functional("linen", name, init, apply)


def _linen_streams(key: Any) -> dict[str, Any]:
    """Random streams of a Linen module; `make_rng` of a stream that isn't given falls
    back to "params", so that every name has randomness."""
    return {"params": key, "dropout": jax.random.fold_in(key, 1)}


def _without_paths(
    variables: dict[str, Any], paths: set[tuple[str, ...]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Collections without the variables at some paths, and these by collection."""
    taken: dict[str, Any] = {}
    kept = {}
    for collection, tree in variables.items():
        flat = traverse_util.flatten_dict(tree) if isinstance(tree, dict) else {}
        out = {path: x for path, x in flat.items() if (collection, *path) in paths}
        if not out:
            kept[collection] = tree
            continue
        taken[collection] = list(out.values())
        rest = {path: x for path, x in flat.items() if path not in out}
        if rest:
            kept[collection] = traverse_util.unflatten_dict(rest)
    return kept, taken


def _starting_from(
    bound: dict[str, Any],
    fresh: dict[str, Any],
    name: str,
) -> dict[str, Any]:
    """Fresh variables, with the values of those to which the module was bound.

    Raises:
      ModelError: one of them has another shape than the module has for these inputs.
    """
    given = traverse_util.flatten_dict(
        {n: x for n, x in bound.items() if n not in TEMPORARY}
    )
    flat = traverse_util.flatten_dict(fresh)
    for path, value in given.items():
        value = jax.tree.map(jnp.asarray, value)
        if path in flat and jax.tree.map(jnp.shape, value) != jax.tree.map(
            jnp.shape, flat[path]
        ):
            raise ModelError(
                f"the module is bound to {'/'.join(path)!r} of shape"
                f" {jnp.shape(value)}, but for these inputs it has shape"
                f" {jnp.shape(flat[path])}",
                where=name,
                remedy="bind variables that were made for samples of this shape",
            )
        flat[path] = value
    return traverse_util.unflatten_dict(flat)


# ---- factories ----


def _parameters(function: Any) -> dict[str, inspect.Parameter]:
    if isinstance(function, partial) and inspect.isclass(function.func):
        function = partial(
            function.func.__init__,
            None,
            *function.args,
            **function.keywords,
        )
    try:
        if inspect.isclass(
            function
        ):  # what inspect finds for an NNX class is its metaclass's __call__
            return dict(
                list(inspect.signature(function.__init__).parameters.items())[1:]
            )
        return dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return {}


def _required(function: Any) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [
        n
        for n, p in _parameters(function).items()
        if p.default is p.empty and p.kind in kinds
    ]
