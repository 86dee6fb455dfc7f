"""Which part of which tensor a parameter is.

    parameter                              scheme llama
    embed/embedding                        model.embed_tokens.weight
    blocks/3/attention/query/kernel        model.layers.3.self_attn.q_proj.weight, T
    blocks/3/feed_forward/down/kernel      model.layers.3.mlp.down_proj.weight, T

PyTorch keeps a layer's weight as (out, in), so it is transposed ("T"). GPT-2 keeps it
as (in, out), and has query, key and value side by side in one tensor.

A stacked parameter `blocks/1/norm/scale` of a scan over pairs of layers is made of
the tensors of layers 1, 3, 5, ...
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lepton_jax.models import DecoderShape

BLOCK = re.compile(r"blocks/(?:(\d+)/)?(.+)")
EMBEDDING = "embed/embedding"
HEAD = "head/kernel"

_ATTENTION = {
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/out": "self_attn.o_proj",
    "attention/query_norm": "self_attn.q_norm",
    "attention/key_norm": "self_attn.k_norm",
    "feed_forward/gate": "mlp.gate_proj",
    "feed_forward/up": "mlp.up_proj",
    "feed_forward/down": "mlp.down_proj",
    "attention_norm": "input_layernorm",
}
_LLAMA = {
    **_ATTENTION,
    "feed_forward_norm": "post_attention_layernorm",
}
_GEMMA = {
    **_ATTENTION,
    "attention_post_norm": "post_attention_layernorm",
    "feed_forward_norm": "pre_feedforward_layernorm",
    "feed_forward_post_norm": "post_feedforward_layernorm",
}
_GPT_2 = {
    "attention/query": "attn.c_attn",
    "attention/key": "attn.c_attn",
    "attention/value": "attn.c_attn",
    "attention/out": "attn.c_proj",
    "feed_forward/up": "mlp.c_fc",
    "feed_forward/down": "mlp.c_proj",
    "attention_norm": "ln_1",
    "feed_forward_norm": "ln_2",
}
# Parameters of GPT-2 that are thirds of one tensor, in their order.
THIRDS = ("attention/query", "attention/key", "attention/value")


@dataclasses.dataclass(frozen=True)
class Scheme:
    """Names of a family's tensors.

    Attributes:
      base: what stands before all names but the head's; files of a model without its
        head lack it.
      layers: what stands before a layer's number.
      layer: names in a layer, by those of the parameters.
      outside: names outside of the layers.
      transposes: whether weights are (out, in).
      buffers: pattern of tensors that are no weights: masks, and frequencies.
    """

    base: str
    layers: str
    layer: Mapping[str, str]
    outside: Mapping[str, str]
    transposes: bool
    buffers: re.Pattern[str]


_OUTSIDE = {"embed": "embed_tokens", "norm": "norm"}
_FREQUENCIES = re.compile(r"(.*\.)?rotary_emb\.inv_freq")
SCHEMES = {
    "llama": Scheme(
        "model.",
        "layers",
        _LLAMA,
        _OUTSIDE,
        True,
        _FREQUENCIES,
    ),
    "gemma": Scheme(
        "model.",
        "layers",
        _GEMMA,
        _OUTSIDE,
        True,
        _FREQUENCIES,
    ),
    "gpt2": Scheme(
        "transformer.",
        "h",
        _GPT_2,
        {"embed": "wte", "positions": "wpe", "norm": "ln_f"},
        False,
        re.compile(r"(.*\.)?h\.\d+\.attn\.(bias|masked_bias)"),
    ),
}
LM_HEAD = "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class Piece:
    """A tensor, or a third of its last dim.

    Attributes:
      tensor: its name.
      transposed: whether the parameter is its transpose.
      third: 0, 1 or 2; None: it is the whole tensor.
    """

    tensor: str
    transposed: bool = False
    third: int | None = None


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a parameter comes from, and goes to.

    Attributes:
      pieces: one; or one a layer, of a parameter that is stacked.
      stacked: whether it has a leading dim of layers.
    """

    pieces: tuple[Piece, ...]
    stacked: bool = False


def sources(
    params: Mapping[str, Any],
    shape: DecoderShape,
    scheme: Scheme,
    base: str | None = None,
) -> dict[str, Source]:
    """Return where each parameter comes from.

    Args:
      params: arrays, or shapes, by path.
      shape: of the model.
      scheme: names of the tensors.
      base: what stands before the names; None: the scheme's own.
    """
    base = scheme.base if base is None else base
    return {
        path: _source(path, np.ndim(leaf), shape, scheme, base)
        for path, leaf in params.items()
    }


def _source(
    path: str,
    dims: int,
    shape: DecoderShape,
    scheme: Scheme,
    base: str,
) -> Source:
    if path == HEAD:
        return Source((Piece(LM_HEAD, transposed=True),))
    match = BLOCK.fullmatch(path)
    if match is None:
        module, _, leaf = path.rpartition("/")
        name = f"{base}{scheme.outside[module]}.{_leaf(leaf)}"
        return Source((Piece(name),))

    module, _, leaf = match[2].rpartition("/")
    is_stacked = dims > (2 if leaf == "kernel" else 1)
    layers = _layers(match[1], is_stacked, shape)
    third = THIRDS.index(module) if _is_third(module, scheme) else None
    transposed = leaf == "kernel" and scheme.transposes
    prefix = f"{base}{scheme.layers}"
    inner = f"{scheme.layer[module]}.{_leaf(leaf)}"
    pieces = [Piece(f"{prefix}.{layer}.{inner}", transposed, third) for layer in layers]
    return Source(tuple(pieces), is_stacked)


def _layers(
    number: str | None,
    is_stacked: bool,
    shape: DecoderShape,
) -> Sequence[int]:
    """Return the layers that a parameter `blocks/NUMBER/...` belongs to."""
    if number is None:
        return range(shape.layers)
    if not is_stacked:
        return [int(number)]
    return range(int(number), shape.layers, shape.period)


def _leaf(name: str) -> str:
    return "bias" if name == "bias" else "weight"


def _is_third(module: str, scheme: Scheme) -> bool:
    return scheme is SCHEMES["gpt2"] and module in THIRDS


def tensor_shapes(
    params: Mapping[str, Any],
    found: Mapping[str, Source],
) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor that parameters are pieces of, by name."""
    shapes = {}
    for path, source in found.items():
        size = params[path].shape[1:] if source.stacked else params[path].shape
        for piece in source.pieces:
            shapes[piece.tensor] = _tensor_shape(piece, tuple(size))
    return shapes


def _tensor_shape(piece: Piece, size: tuple[int, ...]) -> tuple[int, ...]:
    if piece.third is not None:
        return (*size[:-1], 3 * size[-1])
    return size[::-1] if piece.transposed else size
