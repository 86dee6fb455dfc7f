"""Modules derived from a module: with stored weights, or with weights that are rounded.

Both are ordinary NNX modules with the call of the one that they were made of, so that a
`Recipe` takes them and everything else goes on as before: training, evaluation,
artifacts.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx, traverse_util

from lepton_jax.ship.shrink.forms import Form

PLAIN = "plain_kind"  # attribute of a derived class: the class it was made of
SEPARATOR = "/"

Path = tuple[Any, ...]


class Numbers(nnx.Variable):
    """Whole numbers of a stored weight: no parameter, for they have no gradient."""


class Packed(nnx.Module):
    """A module for predictions whose weights are stored in another form.

    It is made by `packed`, which makes a class for each module.

    Attributes:
      weights: nested dicts of variables, along the paths of the module's own.
    """

    def __init__(self, weights: Mapping[str, Any]):
        self.weights = _as_data(weights)


def packed(
    module: nnx.Module,
    forms: Mapping[str, Form],
) -> Packed:
    """Return a module that stores weights in given forms.

    Whole numbers that the module holds as parameters, as those of qwix do, become
    variables without a gradient.

    Args:
      module: in evaluation.
      forms: by path of the weight, "layers/0/kernel".
    """
    graph, state = nnx.split(module)
    template = nnx.to_flat_state(state)
    stored = {}
    for path, variable in template:
        form = forms.get(name_of(path))
        stored[path] = _variables(variable, form)
    kinds = {path: type(variable) for path, variable in template}
    nested = traverse_util.unflatten_dict(stored)

    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        values = {}
        for path in kinds:
            node = _at(self.weights, path)
            values[path] = _value(node, forms.get(name_of(path)))
        whole = nnx.merge(graph, _filled(state, values), copy=True)
        whole.eval()
        return whole(*arguments, **named)

    call.__signature__ = _signature(module)  # type: ignore[attr-defined]
    name = f"Packed{plain_kind(module).__name__}"
    kind = type(name, (Packed,), {"__call__": call, PLAIN: plain_kind(module)})
    return kind(nested)


def rounding(
    module: nnx.Module,
    forms: Mapping[str, Form],
) -> nnx.Module:
    """Return a copy of a module that rounds weights in each call, to train with.

    Parameters keep their paths, and stay floats.

    Args:
      module: to copy.
      forms: by path of the weight.
    """
    copy = nnx.clone(module)
    own_kind = type(module)

    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        state = dict(nnx.to_flat_state(nnx.state(self)))
        rounded = {
            path: variable for path, variable in state.items() if name_of(path) in forms
        }
        before = {path: variable.get_value() for path, variable in rounded.items()}
        own = {path: _variable_at(self, path) for path in rounded}
        for path, variable in own.items():
            variable.set_value(forms[name_of(path)].rounded(before[path]))
        try:
            return own_kind.__call__(self, *arguments, **named)
        finally:
            for path, variable in own.items():
                variable.set_value(before[path])

    call.__signature__ = _signature(module)  # type: ignore[attr-defined]
    members = {"__call__": call, PLAIN: plain_kind(module)}
    copy.__class__ = type(own_kind.__name__, (own_kind,), members)
    return copy


def plain_kind(module: nnx.Module) -> type:
    """Return the class that a module's class was derived from; else its own."""
    kind = type(module)
    for attribute in (PLAIN, "_unquantized_type"):  # the second is qwix's
        kind = getattr(kind, attribute, kind)
    return kind


def plain(module: nnx.Module) -> nnx.Module:
    """Return a copy of a module of its plain class, without what qwix has put in it."""
    copy = nnx.clone(module)
    copy.__class__ = plain_kind(module)
    for _, node in list(nnx.iter_graph(copy)):
        if not isinstance(node, nnx.Module):
            continue
        for name in ("qwix_path", "qwix_rngs", "disable_quant_stats_update"):
            if hasattr(node, name):
                delattr(node, name)
    return copy


def is_packed(module: Any) -> bool:
    """Whether the weights of a module are stored in another form."""
    return isinstance(module, Packed)


def name_of(path: Path) -> str:
    """Return a path as Lepton writes it, "layers/0/kernel"."""
    return SEPARATOR.join(map(str, path))


# ---- internals ----


def _variables(
    variable: Any,
    form: Form | None,
) -> Any:
    value = variable.get_value()
    if form is not None:
        arrays = form.pack(value)
        return {
            "values": Numbers(arrays["values"]),
            "scale": nnx.Param(arrays["scale"]),
        }
    is_param = isinstance(variable, nnx.Param)
    has_gradient = jax.numpy.issubdtype(value.dtype, jax.numpy.inexact)
    if is_param and not has_gradient:
        return Numbers(value)
    return variable.copy()


def _as_data(tree: Any) -> Any:
    if isinstance(tree, nnx.Variable):
        return tree
    parts = {str(key): _as_data(part) for key, part in tree.items()}
    return nnx.Dict(parts)


def _at(
    node: Any,
    path: Path,
) -> Any:
    for key in path:
        node = node[str(key)]
    return node


def _value(
    node: Any,
    form: Form | None,
) -> Any:
    if form is None:
        return node.get_value()
    arrays = {name: node[name].get_value() for name in ("values", "scale")}
    return form.unpack(arrays)


def _filled(
    template: Any,
    values: Mapping[Path, Any],
) -> Any:
    state = jax.tree.map(lambda x: x, template)
    nnx.replace_by_pure_dict(state, traverse_util.unflatten_dict(dict(values)))
    return state


def _variable_at(
    module: Any,
    path: Path,
) -> Any:
    node = module
    for key in path:
        node = node[key] if isinstance(key, int) else getattr(node, str(key))
    return node


def _signature(module: nnx.Module) -> inspect.Signature:
    return inspect.signature(type(module).__call__)
