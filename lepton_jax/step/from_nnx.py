"""An NNX module as pure functions.

An NNX module is an object that its calls change. Here it is split into its graph, which
is static, and its state: the parameters, and all other variables. A call merges them
into an object again, calls it, and takes the state out of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

from lepton_jax.compat import noting_sow
from lepton_jax.errors import ModelError
from lepton_jax.step.arguments import Mode
from lepton_jax.step.dropout import scale_dropout
from lepton_jax.step.pure import (
    EVALUATION_SEED,
    Functional,
    PureModule,
    Request,
    check_trainable,
    key_shape,
)
from lepton_jax.trees import by_path

GENERATE = "samples"  # the method (key, count) of a model that generates


def nnx_functional(
    build: Callable[[Any], Any],
    request: Request,
) -> Functional:
    """Return the pure functions of an NNX module.

    Args:
      build: a random key to the module.
      request: the arguments of `module.functional`.

    Raises:
      ModelError: `build` returns something else; or the module can't be called as
        requested.
    """
    module = NnxModule(build, request)
    return Functional(
        "nnx",
        module.name,
        module.init,
        module.apply,
        module.whole,
        module.samples if module.generates else None,
    )


def without_sown(module: nnx.Module) -> nnx.Module:
    """Remove the values that earlier calls sowed: they would grow with each call."""
    for _, node in nnx.iter_graph(module):
        if not isinstance(node, nnx.Module):
            continue
        for name, value in list(vars(node).items()):
            sown = isinstance(value, nnx.Intermediate)
            if sown and isinstance(value.get_value(), tuple):
                delattr(node, name)
    return module


def follow_precision(module: nnx.Module) -> None:
    """Set the dtype of each nnx.Embed to that of its table.

    An Embed fixes its dtype when it is built: it would turn a bfloat16 table, and all
    after it, to float32.
    """
    for _, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Embed):
            table = node.embedding.dtype
            if jnp.dtype(node.dtype).itemsize > table.itemsize:
                node.dtype = table


class NnxModule(PureModule):
    """An NNX module that is made pure.

    Args:
      build: a random key to the module.
      request: the arguments of `module.functional`.

    Attributes:
      generates: whether the module has a method `samples(key, count)`.
    """

    def __init__(
        self,
        build: Callable[[Any], Any],
        request: Request,
    ):
        self._build = build
        kind, self._graph, self._params, self._rest = self._abstract()
        self.generates = callable(getattr(kind, GENERATE, None))
        self._known = set(by_path(nnx.to_pure_dict(self._rest)))
        self._sown: set[tuple[str, str]] = set()  # label and name of each sown value
        super().__init__(kind, request)

    # ---- the two functions ----

    def init(self, key: Any) -> tuple[Any, Any]:
        """See `Functional.init`."""
        _, params, rest = _split(self._make(key))
        pure = nnx.to_pure_dict(params)
        check_trainable(pure, self.name)
        return pure, nnx.to_pure_dict(rest)

    def apply(
        self,
        params: Any,
        variables: Any,
        inputs: Any,
        key: Any,
        train: bool,
        dropout: Any = None,
    ) -> Any:
        """See `Functional.apply`."""
        module = self._merged(params, variables)
        follow_precision(module)
        scaled = [] if dropout is None else scale_dropout(module, dropout)
        if not train:
            key = jax.random.key(EVALUATION_SEED)
        outputs = self._call(
            module,
            inputs,
            key,
            self.arguments.mode(train),
        )
        for node in scaled:  # it is no part of the module's state
            del node.factor

        variables, sown = self._state_after(module)
        labels = {label for label, _ in self._sown}
        asked = self.request.sown if train else ()
        return outputs, variables, self.collected(sown, labels, asked)

    def whole(self, params: Any, variables: Any) -> nnx.Module:
        """See `Functional.whole`."""
        module = self._merged(params, variables)
        module.eval()
        return module

    def samples(
        self,
        params: Any,
        variables: Any,
        key: Any,
        count: int,
    ) -> Any:
        """See `Functional.samples`."""
        module: Any = self.whole(params, variables)
        follow_precision(module)
        return module.samples(key, count)

    def variables_after(
        self,
        mode: Mode,
        params: Any,
        variables: Any,
        inputs: Any,
        key: Any,
    ) -> Any:
        """See `PureModule.variables_after`."""
        module = self._merged(params, variables)
        self._call(module, inputs, key, mode)
        return self._state_after(module)[0]

    def random_streams(self, key: Any) -> Any:
        """See `PureModule.random_streams`."""
        return nnx.Rngs(key)

    # ---- making it ----

    def _make(self, key: Any) -> nnx.Module:
        module = self._build(key)
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

    def _abstract(self) -> tuple[type, Any, Any, Any]:
        """Return the module's class, its graph, and its state as shapes.

        No array is allocated. `nnx.eval_shape` would lose the arrays in an attribute
        that is a list or a dict.
        """
        static: list[Any] = []

        def build(key: Any) -> tuple[Any, Any]:
            module = self._make(key)
            graph, params, rest = _split(module)
            static.extend((type(module), graph))
            return params, rest

        params, rest = jax.eval_shape(build, key_shape())
        kind, graph = static
        return kind, graph, params, rest

    def _merged(
        self,
        params: Any,
        variables: Any,
    ) -> nnx.Module:
        graph = self._graph
        if self.request.seed is not None:
            module = self._make(jax.random.key(self.request.seed))
            graph = _split(module)[0]
        # copy=True: modules that count calls (Rngs, RNN) mutate their variables at this
        # trace level
        return nnx.merge(
            graph,
            _filled(self._params, params),
            _filled(self._rest, variables),
            copy=True,
        )

    # ---- calling it ----

    def _call(
        self,
        module: Any,
        inputs: Any,
        key: Any,
        mode: Mode,
    ) -> Any:
        """Set a module to a mode and call it, which mutates it; return its outputs."""
        if mode.train:
            module.train()
        else:
            module.eval()
        with noting_sow(nnx.Module, self._note):
            return self.arguments.call(
                module,
                inputs,
                mode,
                self.streams(key),
            )

    def _note(
        self,
        module: Any,
        kind: Any,
        name: str,
    ) -> None:
        labels = (kind,) if isinstance(kind, str) else _labels(kind)
        self._sown.update((label, name) for label in labels)

    def _state_after(self, module: Any) -> tuple[Any, dict[str, list[Any]]]:
        """Return the variables after a call, and the values sown in it, by label.

        Raises:
          ModelError: the call created a variable.
        """
        flat = {}
        sown: dict[str, list[Any]] = {}
        state = nnx.state(module, nnx.Not(nnx.Param))
        for path, variable in nnx.to_flat_state(state):
            is_variable = isinstance(variable, nnx.Variable)
            labels = _labels(type(variable)) if is_variable else ()
            was_sown = any((label, path[-1]) in self._sown for label in labels)
            if was_sown:
                for label in labels:
                    sown.setdefault(label, []).append(variable.get_value())

            temporary = was_sown or isinstance(variable, nnx.Intermediate)
            if "/".join(map(str, path)) in self._known or not temporary:
                flat[path] = variable.get_value() if labels else variable

        variables = traverse_util.unflatten_dict(flat)
        self._check_known(variables)
        return variables, sown

    def _check_known(self, variables: Any) -> None:
        surplus = set(by_path(variables)) - self._known
        if surplus:
            raise ModelError(
                f"the module creates the variable {sorted(surplus)[0]!r} when it is "
                "called",
                where=self.name,
                remedy=(
                    "create it in __init__, so that the state has one shape; a value"
                    " for the loss is sown: self.sow(nnx.Intermediate, name, value) and"
                    ' Recipe(auxiliary={"Intermediate": 1.0})'
                ),
            )


# ---- internals ----


def _split(module: nnx.Module) -> tuple[Any, Any, Any]:
    graph, params, *rest = nnx.split(module, nnx.Param, ...)
    return graph, params, rest[0]


def _filled(
    template: nnx.State,
    values: Any,
) -> nnx.State:
    state = jax.tree.map(lambda x: x, template)
    nnx.replace_by_pure_dict(state, values)
    return state


def _with_arrays_as_data(module: nnx.Module) -> nnx.Module:
    """Make the bare arrays of a module a part of its state.

    NNX takes a `jnp` array that is assigned to an attribute as data, but not where it
    is traced, as it is here: then the tracer would stay in the graph's constants.
    """
    for _, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Pytree):
            for name, value in list(vars(node).items()):
                if isinstance(value, jax.Array):
                    setattr(node, name, nnx.data(value))
    return module


def _labels(kind: type) -> tuple[str, ...]:
    """Return the names of a type of variables: its class's, and NNX's own for it."""
    try:
        registered = nnx.variable_name_from_type(kind)
    except ValueError:
        return (kind.__name__,)
    return tuple({kind.__name__, registered})
