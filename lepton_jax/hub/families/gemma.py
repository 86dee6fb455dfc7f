"""Gemma 1, 2 and 3."""

from __future__ import annotations

from typing import Any

from lepton_jax.hub.families import parts
from lepton_jax.hub.families.family import Family
from lepton_jax.hub.families.parts import ACTIVATIONS, WRITTEN
from lepton_jax.hub.keys import Keys
from lepton_jax.hub.positions import (
    FULL,
    SLIDING,
    described,
    rotary_by_layer,
    rotary_of,
)
from lepton_jax.models import DecoderShape, Rotary

GELU = "gelu_pytorch_tanh"
# Layers of Gemma 3, of which the last looks back over all tokens.
GEMMA_PATTERN = 6


def _read_gemma(keys: Keys) -> DecoderShape:
    bias = keys.flag("attention_bias", False)
    parts.dropouts(keys, "attention_dropout")
    return DecoderShape(
        **parts.sizes(keys, default_groups=16),
        head=parts.head(keys, 256),
        activation=_activation(keys),
        norm="rms_one",
        attention_bias=bias,
        out_bias=bias,
        rotary=rotary_of(keys),
        embed_scale=True,
        tied=keys.flag("tie_word_embeddings", True),
    )


def _activation(keys: Keys) -> str:
    """Return Gemma 1's activation, which has two keys.

    "gelu" in the first files meant the approximation (transformers#29402).
    """
    older = keys.word("hidden_act", GELU, ACTIVATIONS)
    older = GELU if older == "gelu" else older
    newer = keys.word("hidden_activation", older, ACTIVATIONS)
    if newer != older:
        raise keys.fault(
            f"hidden_act is {older!r}, and hidden_activation {newer!r}",
            "keep the one that the model was trained with",
        )
    return ACTIVATIONS[newer]


def _write_gemma(shape: DecoderShape) -> dict[str, Any]:
    return {
        **parts.written_sizes(shape),
        **parts.written_positions(shape),
        "hidden_act": WRITTEN[shape.activation],
        "hidden_activation": WRITTEN[shape.activation],
        "attention_bias": shape.attention_bias,
    }


def _read_gemma2(keys: Keys) -> DecoderShape:
    sizes = parts.sizes(keys, default_groups=4)
    pattern = [FULL if layer % 2 else SLIDING for layer in range(sizes["layers"])]
    types = parts.layer_types(keys, pattern)
    return DecoderShape(
        **sizes,
        **_gemma_parts(keys),
        rotary=rotary_of(keys),
        windows=parts.windows(keys, types, parts.window(keys, 4096)),
        attention_cap=keys.optional("attn_logit_softcapping", 50.0),
        logit_cap=keys.optional("final_logit_softcapping", 30.0),
    )


def _gemma_parts(keys: Keys) -> dict[str, Any]:
    """Return what Gemma 2 and 3 have in common."""
    bias = keys.flag("attention_bias", False)
    parts.dropouts(keys, "attention_dropout")
    activation = parts.activation(keys, "hidden_activation", GELU)
    # The same in older files, which transformers does not read.
    _check_same_activation(keys, activation)
    return {
        "head": parts.head(keys, 256),
        "activation": activation,
        "norm": "rms_one",
        "post_norms": True,
        "attention_bias": bias,
        "out_bias": bias,
        "scale": keys.number("query_pre_attn_scalar", 256) ** -0.5,
        "embed_scale": True,
        "tied": keys.flag("tie_word_embeddings", True),
    }


def _check_same_activation(keys: Keys, activation: str) -> None:
    other = keys.take("hidden_act", None)
    if other is not None and ACTIVATIONS.get(other) != activation:
        raise keys.fault(
            f"hidden_act is {other!r}, and hidden_activation another",
            "keep hidden_activation alone",
        )


def _write_gemma2(shape: DecoderShape) -> dict[str, Any]:
    return {
        **parts.written_sizes(shape),
        **parts.written_positions(shape),
        **_written_gemma_parts(shape),
        "attn_logit_softcapping": shape.attention_cap,
        "final_logit_softcapping": shape.logit_cap,
    }


def _written_gemma_parts(shape: DecoderShape) -> dict[str, Any]:
    scalar = shape.scale_of(0) ** -2
    # 1 / sqrt(256) and back is 256, as a whole number
    whole = round(scalar)
    return {
        "hidden_activation": WRITTEN[shape.activation],
        "attention_bias": shape.attention_bias,
        "query_pre_attn_scalar": whole if whole**-0.5 == shape.scale_of(0) else scalar,
        "sliding_window": parts.one_window(shape),
        "layer_types": parts.written_types(shape),
    }


def _read_gemma3(keys: Keys) -> DecoderShape:
    sizes = parts.sizes(keys, default_groups=4)
    keys.must_be("attn_logit_softcapping", None)  # transformers reads and ignores it
    pattern = keys.count("sliding_window_pattern", GEMMA_PATTERN)
    pattern = keys.count("_sliding_window_pattern", pattern)
    layers = range(1, sizes["layers"] + 1)
    default = [SLIDING if layer % pattern else FULL for layer in layers]
    full, sliding = rotary_by_layer(keys, 1_000_000.0, 10_000.0)
    return DecoderShape(
        **sizes,
        **_gemma_parts(keys),
        query_key_norm=True,
        rotary=full,
        local_rotary=sliding,
        windows=parts.windows(
            keys, parts.layer_types(keys, default), parts.window(keys, 4096)
        ),
        logit_cap=keys.optional("final_logit_softcapping", None),
    )


def _write_gemma3(shape: DecoderShape) -> dict[str, Any]:
    full = shape.rotary or Rotary()
    return {
        **parts.written_sizes(shape),
        **_written_gemma_parts(shape),
        "rope_parameters": {
            FULL: described(full),
            SLIDING: described(shape.local_rotary or full),
        },
        "final_logit_softcapping": shape.logit_cap,
    }


GEMMA = Family(
    "gemma",
    "GemmaForCausalLM",
    "llama",
    _read_gemma,
    _write_gemma,
    tied=True,
)
GEMMA_2 = Family(
    "gemma2",
    "Gemma2ForCausalLM",
    "gemma",
    _read_gemma2,
    _write_gemma2,
    tied=True,
)
GEMMA_3 = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    "gemma",
    _read_gemma3,
    _write_gemma3,
    tied=True,
)
