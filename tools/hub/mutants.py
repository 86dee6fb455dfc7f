"""Models that are wrong in one way each: the comparison has to catch all of them.

A mutant is made of what was read, by changing its shape or its parameters as a faulty
reader would have. Its name says the fault.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lepton_jax.models import DecoderLM, DecoderShape, Rotary
from lepton_jax.trees import by_path

Params = dict[str, Any]
Change = Callable[[Params, DecoderShape], Params | None]


def mutants(module: DecoderLM) -> Iterator[tuple[str, DecoderLM]]:
    """Yield the name of each fault that a model can have, and the model with it."""
    shape = module.shape
    for name, faulty in _shapes(shape):
        yield name, _rebuilt(module, faulty, lambda params, _: params)
    for name, change in PARAMETERS.items():
        params = by_path(nnx.to_pure_dict(nnx.state(module)))
        if change(dict(params), shape) is not None:
            yield name, _rebuilt(module, shape, change)


# ---- faults of the shape ----


def _shapes(shape: DecoderShape) -> Iterator[tuple[str, DecoderShape]]:
    yield from _positions(shape)
    yield from _windows(shape)
    if shape.attention_cap is not None:
        yield "attention's cap dropped", _with(shape, attention_cap=None)
    if shape.logit_cap is not None:
        yield "logits' cap dropped", _with(shape, logit_cap=None)
    if shape.norm == "rms_one":
        yield "scale not added to one", _with(shape, norm="rms")
    if shape.embed_scale:
        yield "embeddings not scaled", _with(shape, embed_scale=False)
    if shape.scale is not None:
        yield "scale of the head's size", _with(shape, scale=None)
    if shape.scale_by_layer:
        yield "scale the same in all layers", _with(shape, scale_by_layer=False)
    other = {"gelu": "gelu_tanh", "gelu_tanh": "gelu"}.get(shape.activation, "gelu")
    yield "another activation", _with(shape, activation=other)
    yield "another epsilon", _with(shape, epsilon=shape.epsilon + 1e-3)


def _positions(shape: DecoderShape) -> Iterator[tuple[str, DecoderShape]]:
    rotary = shape.rotary
    if rotary is None:
        return
    other = dataclasses.replace(rotary, theta=2 * rotary.theta)
    yield "another theta", _with(shape, rotary=other)
    if rotary.kind != "default":
        yield "scaling dropped", _with(shape, rotary=Rotary(rotary.theta))
    if rotary.kind == "yarn":
        other = dataclasses.replace(rotary, amplitude=1.0)
        yield "amplitude dropped", _with(shape, rotary=other)
    if shape.local_rotary is not None:
        yield "local theta dropped", _with(shape, local_rotary=None)


def _windows(shape: DecoderShape) -> Iterator[tuple[str, DecoderShape]]:
    if any(shape.windows):
        yield "window one longer", _with(shape, windows=_moved(shape, 1))
        yield "window one shorter", _with(shape, windows=_moved(shape, -1))
        yield "window dropped", _with(shape, windows=())
    if len(set(shape.windows)) > 1:
        turned = shape.windows[1:] + shape.windows[:1]
        yield "windows of the next layer", _with(shape, windows=turned)


def _with(shape: DecoderShape, **changes: Any) -> DecoderShape:
    return dataclasses.replace(shape, **changes)


def _moved(shape: DecoderShape, by: int) -> tuple[int | None, ...]:
    return tuple(window and window + by for window in shape.windows)


# ---- faults of the parameters ----


def _interleaved(*modules: str) -> Change:
    """Read projections as if pairs were neighbours, as in Llama's own files."""

    def change(params: Params, shape: DecoderShape) -> Params | None:
        if shape.rotary is None:
            return None
        order = np.arange(shape.head_size).reshape(2, -1).T.ravel()
        return _reordered(params, shape, modules, order.tolist())

    return change


def _turned_back(params: Params, shape: DecoderShape) -> Params | None:
    """Swap the sides of each pair, which then turn the other way."""
    if shape.rotary is None:
        return None
    half = shape.head_size // 2
    order = [*range(half, 2 * half), *range(half)]
    return _reordered(params, shape, ("query", "key"), order)


def _reordered(
    params: Params,
    shape: DecoderShape,
    modules: tuple[str, ...],
    order: list[int],
) -> Params:
    """Change the order of a head's places in some projections, and their norms."""
    changed = dict(params)
    for path, leaf in params.items():
        parts = path.split("/")
        place = jnp.asarray(order)
        if parts[-1] in ("kernel", "bias") and parts[-2] in modules:
            heads = leaf.reshape(*leaf.shape[:-1], -1, shape.head_size)
            changed[path] = heads[..., place].reshape(leaf.shape)
        elif parts[-2] in [f"{name}_norm" for name in modules]:
            changed[path] = leaf[place]
    return changed


def _swapped(left: str, right: str) -> Change:
    def change(params: Params, shape: DecoderShape) -> Params | None:
        changed = dict(params)
        for path, leaf in params.items():
            if f"/{left}/" in path:
                other = path.replace(f"/{left}/", f"/{right}/")
                if other not in params or params[other].shape != leaf.shape:
                    return None
                changed[path] = params[other]
                changed[other] = leaf
        return changed if any(f"/{left}/" in path for path in params) else None

    return change


def _biases_dropped(params: Params, shape: DecoderShape) -> Params | None:
    names = [path for path in params if path.endswith("/bias")]
    if not names:
        return None
    return params | {name: jnp.zeros_like(params[name]) for name in names}


def _norms_dropped(params: Params, shape: DecoderShape) -> Params | None:
    """Forget the weights of the norms of queries and keys."""
    names = [path for path in params if "y_norm/" in path]
    if not names:
        return None
    plain = jnp.zeros_like if shape.norm == "rms_one" else jnp.ones_like
    return params | {name: plain(params[name]) for name in names}


def _groups_tiled(params: Params, shape: DecoderShape) -> Params | None:
    """Give query head h the key head h % groups in place of h // share."""
    if shape.groups in (1, shape.heads):
        return None
    order = np.arange(shape.heads).reshape(-1, shape.groups).T.ravel()
    changed = dict(params)
    for path, leaf in params.items():
        if "/query/" in path:
            heads = leaf.reshape(*leaf.shape[:-1], shape.heads, shape.head_size)
            moved = heads[..., jnp.asarray(order), :]
            changed[path] = moved.reshape(leaf.shape)
    return changed


def _head_tied(params: Params, shape: DecoderShape) -> Params | None:
    if "head/kernel" not in params:
        return None
    return params | {"head/kernel": params["embed/embedding"].T}


def _positions_moved(params: Params, shape: DecoderShape) -> Params | None:
    name = "positions/embedding"
    if name not in params:
        return None
    return params | {name: jnp.roll(params[name], 1, axis=0)}


PARAMETERS: dict[str, Any] = {
    "pairs of neighbours": _interleaved("query", "key"),
    "pairs of neighbours in queries alone": _interleaved("query"),
    "turned the other way": _turned_back,
    "query and key swapped": _swapped("query", "key"),
    "key and value swapped": _swapped("key", "value"),
    "gate and up swapped": _swapped("gate", "up"),
    "norms swapped": _swapped("attention_norm", "feed_forward_norm"),
    "biases dropped": _biases_dropped,
    "norms of query and key dropped": _norms_dropped,
    "groups in the other order": _groups_tiled,
    "head tied though it is not": _head_tied,
    "positions from one": _positions_moved,
}


def _rebuilt(module: DecoderLM, shape: DecoderShape, change: Any) -> DecoderLM:
    graph, state = nnx.split(nnx.eval_shape(lambda: DecoderLM(shape, rngs=nnx.Rngs(0))))
    pure = nnx.to_pure_dict(nnx.state(module))
    params = change(by_path(pure), shape)
    template = nnx.to_pure_dict(state)
    leaves = [params[path] for path in by_path(template)]

    filled = jax.tree.unflatten(jax.tree.structure(template), leaves)
    nnx.replace_by_pure_dict(state, filled)
    return nnx.merge(graph, state)
