"""Keys that families have in common, read and written.

Defaults are those of transformers 5.24, `models/*/configuration_*.py`.
"""

from __future__ import annotations

from typing import Any

from lepton_jax.errors import nearest
from lepton_jax.hub.keys import Keys
from lepton_jax.hub.positions import FULL, SLIDING, described
from lepton_jax.models import DecoderShape, Rotary

KINDS = (FULL, SLIDING)

# Names of activations, by those of the configurations.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
WRITTEN = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
}


def sizes(keys: Keys, default_groups: int | None = None) -> dict[str, Any]:
    """Return the sizes that all but GPT-2 name alike."""
    heads = keys.count("num_attention_heads")
    return {
        "vocab": keys.count("vocab_size"),
        "dim": keys.count("hidden_size"),
        "layers": keys.count("num_hidden_layers"),
        "heads": heads,
        "hidden": keys.count("intermediate_size"),
        "kv_heads": keys.count("num_key_value_heads", default_groups or heads),
        "epsilon": keys.number("rms_norm_eps", 1e-6),
    }


def head(keys: Keys, default: int | None = None) -> int:
    """Return the size of a head, which need not be hidden_size / heads."""
    if default is None:
        dim = keys.count("hidden_size")
        heads = keys.count("num_attention_heads")
        if keys.content.get("head_dim") is None and dim % heads:
            raise keys.fault(
                f"hidden_size {dim} is no multiple of {heads} num_attention_heads",
                "say head_dim",
            )
        default = dim // heads
    return keys.count("head_dim", default)


def activation(
    keys: Keys,
    name: str,
    default: str,
) -> str:
    """Return an activation by its name in `DecoderShape`."""
    return ACTIVATIONS[keys.word(name, default, ACTIVATIONS)]


def layer_types(
    keys: Keys,
    default: list[str],
) -> list[str]:
    """Return the kind of each layer.

    Raises:
      ModelError: a kind is unknown, or their number isn't that of the layers.
    """
    types = keys.take("layer_types", None)
    if types is None:
        return default
    unknown = [kind for kind in types if kind not in KINDS]
    if unknown:
        raise keys.fault(
            f"layer_types has {unknown[0]!r}{nearest(str(unknown[0]), KINDS)}",
            f"this reads {FULL} and {SLIDING}",
        )
    if len(types) != len(default):
        raise keys.fault(
            f"layer_types names {len(types)} layers of {len(default)}",
            "name each layer",
        )
    return list(types)


def windows(
    keys: Keys,
    types: list[str],
    window: int | None,
) -> tuple[int | None, ...]:
    """Return each layer's window.

    transformers masks by distance < sliding_window: the window counts the token itself.
    """
    if SLIDING not in types:
        return ()
    if window is None:
        raise keys.fault(
            "layer_types names layers with a window, but there is none",
            "say sliding_window (and use_sliding_window, where the family has it)",
        )
    return tuple(window if kind == SLIDING else None for kind in types)


def window(keys: Keys, default: int | None) -> int | None:
    """Return the size of the windows; None: the configuration says null."""
    if keys.take("sliding_window", default) is None:
        return None
    return keys.count("sliding_window", default)


def dropouts(keys: Keys, *names: str) -> None:
    """Take rates of dropout: they say how a model was trained."""
    keys.pass_over(names)


def written_sizes(shape: DecoderShape) -> dict[str, Any]:
    """Return the keys of `_sizes` and `_head`."""
    return {
        "vocab_size": shape.vocab,
        "hidden_size": shape.dim,
        "intermediate_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.groups,
        "head_dim": shape.head_size,
        "rms_norm_eps": shape.epsilon,
    }


def written_positions(shape: DecoderShape) -> dict[str, Any]:
    """Return the keys of `rotary_of`, in both schemas.

    Programs from before 2025 read the older one.
    """
    rotary = shape.rotary or Rotary()
    parameters = described(rotary)
    scaling = {
        name: value for name, value in parameters.items() if name != "rope_theta"
    }
    is_plain = rotary.kind == "default"
    return {
        "rope_theta": rotary.theta,
        "rope_scaling": None if is_plain else scaling,
        "rope_parameters": parameters,
    }


def written_types(shape: DecoderShape) -> list[str]:
    """Return `layer_types`."""
    windows = shape.windows or (None,) * shape.layers
    return [FULL if window is None else SLIDING for window in windows]


def one_window(shape: DecoderShape) -> int | None:
    """Return the window of the layers that have one; a second size is lost."""
    return next((window for window in shape.windows if window is not None), None)
