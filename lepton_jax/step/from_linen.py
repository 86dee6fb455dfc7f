"""A Linen module as pure functions.

Linen's `init` and `apply` are pure already. What remains is to keep the values that a
module sows apart from the variables that are its state, to give its streams keys, and
to start from the variables to which a module was bound.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
from flax import linen, traverse_util

from lepton_jax.compat import noting_sow, whole_axes
from lepton_jax.errors import ModelError
from lepton_jax.step.arguments import Mode
from lepton_jax.step.pure import (
    EVALUATION_SEED,
    Functional,
    PureModule,
    Request,
    check_trainable,
)

# collections that are never a state
TEMPORARY = ("intermediates", "perturbations")


def linen_functional(
    module: linen.Module,
    request: Request,
) -> Functional:
    """Return the pure functions of a Linen module.

    Raises:
      ModelError: the module can't be called as requested.
    """
    pure = LinenModule(module, request)
    return Functional("linen", pure.name, pure.init, pure.apply, pure.whole)


class LinenModule(PureModule):
    """A Linen module that is made pure.

    Args:
      module: the module; one that is bound starts from its variables.
      request: the arguments of `module.functional`.
    """

    def __init__(
        self,
        module: linen.Module,
        request: Request,
    ):
        self._bound: dict[str, Any] = {}
        if module.scope is not None:  # `model.bind(variables)`
            module, variables = module.unbind()
            self._bound = flax.core.unfreeze(dict(variables))
        self._module = module
        self._sown: set[tuple[str, ...]] = set()  # paths of all sown values
        super().__init__(type(module), request)

    # ---- the two functions ----

    def init(self, key: Any) -> tuple[Any, Any]:
        """See `Functional.init`."""
        return whole_axes(self._init)(key)

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
        if dropout is not None:
            raise ModelError(
                "a policy moves dropout, which only nnx.Dropout takes from outside",
                where=self.name,
                remedy="write the model as an NNX module, or leave that policy out",
            )
        mode = self.arguments.mode(train)
        if not train:
            outputs, after = self._evaluate(mode, params, variables, inputs)
            return outputs, after, {}

        streams = self.random_streams(key)
        outputs, after, sown = self._run(
            mode,
            params,
            variables,
            inputs,
            key,
            streams,
        )
        collections = {path[0] for path in self._sown}
        asked = self.request.sown
        return outputs, after, self.collected(sown, collections, asked)

    def whole(self, params: Any, variables: Any) -> linen.Module:
        """See `Functional.whole`."""
        return self._module.bind({"params": params, **variables})

    def variables_after(
        self,
        mode: Mode,
        params: Any,
        variables: Any,
        inputs: Any,
        key: Any,
    ) -> Any:
        """See `PureModule.variables_after`."""
        streams = self.random_streams(key) if mode.train else None
        return self._run(mode, params, variables, inputs, key, streams)[1]

    def random_streams(self, key: Any) -> dict[str, Any]:
        """See `PureModule.random_streams`."""
        # `make_rng` of a stream that isn't given falls back to "params", so that every
        # name has randomness
        return {"params": key, "dropout": jax.random.fold_in(key, 1)}

    # ---- making and calling it ----

    def _init(self, key: Any) -> tuple[Any, Any]:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.request.inputs)
        method = self._method(
            zeros,
            self.arguments.mode(False),
            key,
        )
        with noting_sow(linen.Module, self._note):
            made = self._module.init(key, method=method)
        variables, _ = _without_paths(flax.core.unfreeze(made), self._sown)
        variables = {n: x for n, x in variables.items() if n not in TEMPORARY}
        variables = _starting_from(self._bound, variables, self.name)
        params = variables.pop("params", {})
        check_trainable(params, self.name)
        return params, variables

    def _run(
        self,
        mode: Mode,
        params: Any,
        variables: Any,
        inputs: Any,
        key: Any,
        rngs: Any,
    ) -> tuple[Any, Any, dict[str, Any]]:
        """Call the module.

        Returns:
          Outputs, variables after the call, and the sown values by collection.
        """
        mutable: list[str] = []
        if mode.train:
            mutable = list(dict.fromkeys([*variables, *self.request.sown]))
        with noting_sow(linen.Module, self._note):
            outputs, changed = self._module.apply(
                {"params": params, **variables},
                rngs=rngs,
                mutable=mutable,
                method=self._method(inputs, mode, key),
            )
        changed, sown = _without_paths(flax.core.unfreeze(changed), self._sown)
        return outputs, {**variables, **changed}, sown

    def _evaluate(
        self,
        mode: Mode,
        params: Any,
        variables: Any,
        inputs: Any,
    ) -> tuple[Any, Any]:
        key = jax.random.key(EVALUATION_SEED)
        try:
            outputs, after, _ = self._run(
                mode,
                params,
                variables,
                inputs,
                key,
                None,
            )
        except flax.errors.InvalidRngError:
            # It draws random numbers outside training, too. Others get no streams: some
            # modules decide by `has_rng` whether to drop or to add noise.
            streams = self.random_streams(key)
            outputs, after, _ = self._run(
                mode,
                params,
                variables,
                inputs,
                key,
                streams,
            )
        return outputs, after

    def _method(
        self,
        inputs: Any,
        mode: Mode,
        key: Any,
    ) -> Callable[[Any], Any]:
        # not keywords of `apply`: the module's arguments may have the names of those
        streams = self.streams(key)
        return lambda module: self.arguments.call(
            module,
            inputs,
            mode,
            streams,
        )

    def _note(
        self,
        module: Any,
        collection: str,
        name: str,
    ) -> None:
        path = () if module.scope is None else tuple(module.scope.path)
        self._sown.add((collection, *path, name))


# ---- internals ----


def _without_paths(
    variables: dict[str, Any],
    paths: set[tuple[str, ...]],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split collections into the variables that are not at some paths, and the others.

    Returns:
      The collections without them, and lists of them by collection.
    """
    kept = {}
    taken: dict[str, Any] = {}
    for collection, tree in variables.items():
        flat = traverse_util.flatten_dict(tree) if isinstance(tree, dict) else {}
        own = {path: x for path, x in flat.items() if (collection, *path) in paths}
        if not own:
            kept[collection] = tree
            continue
        taken[collection] = list(own.values())
        rest = {path: x for path, x in flat.items() if path not in own}
        if rest:
            kept[collection] = traverse_util.unflatten_dict(rest)
    return kept, taken


def _starting_from(
    bound: dict[str, Any],
    fresh: dict[str, Any],
    where: str,
) -> dict[str, Any]:
    """Return fresh variables with the values of those to which the module was bound.

    Raises:
      ModelError: one of them has another shape than the module has for these inputs.
    """
    state = {n: x for n, x in bound.items() if n not in TEMPORARY}
    flat = traverse_util.flatten_dict(fresh)
    for path, leaf in traverse_util.flatten_dict(state).items():
        value = jax.tree.map(jnp.asarray, leaf)
        if path in flat and not _have_one_shape(value, flat[path]):
            raise ModelError(
                f"the module is bound to {'/'.join(path)!r} of shape"
                f" {jnp.shape(value)}, but for these inputs it has shape"
                f" {jnp.shape(flat[path])}",
                where=where,
                remedy="bind variables that were made for samples of this shape",
            )
        flat[path] = value
    return traverse_util.unflatten_dict(flat)


def _have_one_shape(left: Any, right: Any) -> bool:
    return jax.tree.map(jnp.shape, left) == jax.tree.map(jnp.shape, right)
