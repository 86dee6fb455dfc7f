"""Llama and Mistral."""

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


def _read_llama(keys: Keys) -> DecoderShape:
    bias = keys.flag("attention_bias", False)
    parts.dropouts(keys, "attention_dropout")
    return DecoderShape(
        **parts.sizes(keys),
        head=parts.head(keys),
        activation=parts.activation(keys, "hidden_act", "silu"),
        attention_bias=bias,
        out_bias=bias,
        feed_forward_bias=keys.flag("mlp_bias", False),
        rotary=rotary_of(keys),
        tied=keys.flag("tie_word_embeddings", False),
    )


def _write_llama(shape: DecoderShape) -> dict[str, Any]:
    return {
        **parts.written_sizes(shape),
        **parts.written_positions(shape),
        "hidden_act": WRITTEN[shape.activation],
        "attention_bias": shape.attention_bias,
        "mlp_bias": shape.feed_forward_bias,
    }


def _read_mistral(keys: Keys) -> DecoderShape:
    sizes = parts.sizes(keys, default_groups=8)
    window = parts.window(keys, 4096)
    kind = FULL if window is None else SLIDING
    types = parts.layer_types(keys, [kind] * sizes["layers"])
    if set(types) != {kind}:
        raise keys.fault(
            f"layer_types has other kinds than {kind}, which mistral does not read",
            "remove layer_types, or set sliding_window to null",
        )
    parts.dropouts(keys, "attention_dropout")
    return DecoderShape(
        **sizes,
        head=parts.head(keys),
        activation=parts.activation(keys, "hidden_act", "silu"),
        rotary=rotary_of(keys),
        windows=parts.windows(keys, types, window),
        tied=keys.flag("tie_word_embeddings", False),
    )


def _write_mistral(shape: DecoderShape) -> dict[str, Any]:
    return {
        **parts.written_sizes(shape),
        **parts.written_positions(shape),
        "hidden_act": WRITTEN[shape.activation],
        "sliding_window": parts.one_window(shape),
    }


LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    "llama",
    _read_llama,
    _write_llama,
)
MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    "llama",
    _read_mistral,
    _write_mistral,
)
