"""GPT-2."""

from __future__ import annotations

from typing import Any

from lepton_jax.hub.families import parts
from lepton_jax.hub.families.family import Family
from lepton_jax.hub.families.parts import WRITTEN
from lepton_jax.hub.keys import Keys
from lepton_jax.models import DecoderShape


def _read_gpt2(keys: Keys) -> DecoderShape:
    dim = keys.count("n_embd")
    heads = keys.count("n_head")
    length = keys.count("n_positions")
    keys.must_be("n_ctx", length, None)
    keys.pass_over(["reorder_and_upcast_attn"])  # an order of summation
    keys.pass_over(name for name in keys.content if name.startswith("summary_"))
    parts.dropouts(keys, "resid_pdrop", "embd_pdrop", "attn_pdrop")
    is_scaled = keys.flag("scale_attn_weights", True)
    return DecoderShape(
        vocab=keys.count("vocab_size"),
        dim=dim,
        layers=keys.count("n_layer"),
        heads=heads,
        hidden=keys.count("n_inner", 4 * dim),
        activation=parts.activation(keys, "activation_function", "gelu_new"),
        gated=False,
        norm="layer",
        epsilon=keys.number("layer_norm_epsilon", 1e-5),
        attention_bias=True,
        out_bias=True,
        feed_forward_bias=True,
        rotary=None,
        positions=length,
        scale=None if is_scaled else 1.0,
        scale_by_layer=keys.flag("scale_attn_by_inverse_layer_idx", False),
        tied=keys.flag("tie_word_embeddings", True),
    )


def _write_gpt2(shape: DecoderShape) -> dict[str, Any]:
    activation = WRITTEN[shape.activation]
    if activation == "gelu_pytorch_tanh":
        activation = "gelu_new"  # the older name of the same
    return {
        "vocab_size": shape.vocab,
        "n_positions": shape.positions,
        "n_embd": shape.dim,
        "n_layer": shape.layers,
        "n_head": shape.heads,
        "n_inner": shape.hidden,
        "activation_function": activation,
        "layer_norm_epsilon": shape.epsilon,
        "scale_attn_weights": shape.scale != 1.0,
        "scale_attn_by_inverse_layer_idx": shape.scale_by_layer,
    }


GPT_2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    "gpt2",
    _read_gpt2,
    _write_gpt2,
    tied=True,
)
