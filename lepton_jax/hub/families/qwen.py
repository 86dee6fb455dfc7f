"""Qwen 2 and 3."""

from __future__ import annotations

from typing import Any

from lepton_jax.hub.families import parts
from lepton_jax.hub.families.family import Family
from lepton_jax.hub.families.parts import WRITTEN
from lepton_jax.hub.keys import Keys
from lepton_jax.hub.positions import (
    FULL,
    SLIDING,
    rotary_of,
)
from lepton_jax.models import DecoderShape


def _read_qwen2(keys: Keys) -> DecoderShape:
    parts.dropouts(keys, "attention_dropout")
    sizes = parts.sizes(keys, default_groups=32)
    return DecoderShape(
        **sizes,
        head=parts.head(keys),
        activation=parts.activation(keys, "hidden_act", "silu"),
        attention_bias=True,
        rotary=rotary_of(keys),
        windows=_qwen_windows(keys, sizes["layers"]),
        tied=keys.flag("tie_word_embeddings", False),
    )


def _read_qwen3(keys: Keys) -> DecoderShape:
    bias = keys.flag("attention_bias", False)
    parts.dropouts(keys, "attention_dropout")
    sizes = parts.sizes(keys, default_groups=32)
    return DecoderShape(
        **sizes,
        head=parts.head(keys, 128),
        activation=parts.activation(keys, "hidden_act", "silu"),
        query_key_norm=True,
        attention_bias=bias,
        out_bias=bias,
        rotary=rotary_of(keys),
        windows=_qwen_windows(keys, sizes["layers"]),
        tied=keys.flag("tie_word_embeddings", False),
    )


def _qwen_windows(keys: Keys, layers: int) -> tuple[int | None, ...]:
    """Return the windows, which layers from `max_window_layers` on have by default."""
    is_used = keys.flag("use_sliding_window", False)
    said = parts.window(keys, 4096)
    first = keys.take("max_window_layers", 28)
    window = said if is_used else None
    is_sliding = [window is not None and layer >= first for layer in range(layers)]
    default = [SLIDING if slides else FULL for slides in is_sliding]
    return parts.windows(keys, parts.layer_types(keys, default), window)


def _write_qwen2(shape: DecoderShape) -> dict[str, Any]:
    window = parts.one_window(shape)
    return {
        **parts.written_sizes(shape),
        **parts.written_positions(shape),
        "hidden_act": WRITTEN[shape.activation],
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": shape.layers,
        "layer_types": parts.written_types(shape),
    }


def _write_qwen3(shape: DecoderShape) -> dict[str, Any]:
    return {**_write_qwen2(shape), "attention_bias": shape.attention_bias}


QWEN_2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    "llama",
    _read_qwen2,
    _write_qwen2,
)
QWEN_3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    "llama",
    _read_qwen3,
    _write_qwen3,
)
