"""Rotary positions as configurations write them, in either schema, both ways.

    until 2025   "rope_theta": 500000.0,
                 "rope_scaling": {"type": "linear", "factor": 2.0}
    since        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "linear",
                                     "factor": 2.0}
    by layer     "rope_parameters": {"full_attention": {...},
                                     "sliding_attention": {...}}

Formulas: `models.Rotary`. Defaults: transformers 5.24, `modeling_rope_utils.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lepton_jax.errors import nearest
from lepton_jax.hub.keys import Keys
from lepton_jax.models import Rotary

FULL = "full_attention"
SLIDING = "sliding_attention"
KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
# Share of YaRN's amplitude that grows with the logarithm of the factor (Peng et al.
# 2023, equation 22).
AMPLITUDE_SLOPE = 0.1
DEFAULT_FAST = 32.0
DEFAULT_SLOW = 1.0


def rotary_of(
    keys: Keys,
    default_theta: float = 10_000.0,
) -> Rotary:
    """Return the one set of frequencies of a configuration.

    Raises:
      ModelError: of an unknown type; with keys that its type doesn't have; or said
        twice, in different ways.
    """
    keys.must_be("partial_rotary_factor", 1.0, None)
    described = _one_schema(keys)
    if FULL in described or SLIDING in described:
        raise keys.fault(
            "rope_parameters differ by the kind of layer",
            "only gemma3_text has that; remove the kinds",
        )
    return _read(keys, described, default_theta)


def rotary_by_layer(
    keys: Keys,
    default_theta: float,
    default_local: float,
) -> tuple[Rotary, Rotary]:
    """Return the frequencies of layers over all tokens, and of those with a window.

    In the older schema, only the first are scaled, and `rope_local_base_freq` is the
    theta of the others.
    """
    keys.must_be("partial_rotary_factor", 1.0, None)
    local = keys.number("rope_local_base_freq", default_local)
    described = _one_schema(keys)
    kinds = (FULL, SLIDING)
    if not any(kind in described for kind in kinds):
        return _read(keys, described, default_theta), Rotary(local)
    if unknown := [name for name in described if name not in kinds]:
        raise keys.fault(
            f"rope_parameters has {unknown[0]!r}{nearest(unknown[0], kinds)}",
            f"this reads {FULL} and {SLIDING}",
        )
    full = _read(keys, described.get(FULL) or {}, default_theta)
    sliding = _read(keys, described.get(SLIDING) or {}, local, takes_theta=False)
    return full, sliding


def described(rotary: Rotary) -> dict[str, Any]:
    """Return `rope_parameters` of one set of frequencies."""
    content: dict[str, Any] = {
        "rope_theta": rotary.theta,
        "rope_type": rotary.kind,
    }
    if rotary.kind != "default":
        content["factor"] = rotary.factor
    if rotary.kind in ("llama3", "yarn"):
        content["original_max_position_embeddings"] = rotary.original
    if rotary.kind == "llama3":
        content["low_freq_factor"] = rotary.low
        content["high_freq_factor"] = rotary.high
    if rotary.kind == "yarn":
        content["beta_fast"] = rotary.fast
        content["beta_slow"] = rotary.slow
        content["truncate"] = rotary.truncate
        content["attention_factor"] = rotary.amplitude
    return content


# ---- internals ----


def _one_schema(keys: Keys) -> Mapping[str, Any]:
    """Return the dict that describes the positions; {}: there is none."""
    older = keys.take("rope_scaling", None)
    newer = keys.take("rope_parameters", None)
    for name, value in (("rope_scaling", older), ("rope_parameters", newer)):
        if value is not None and not isinstance(value, Mapping):
            raise keys.fault(f"{name} is {value!r}", "a dict is needed, or null")
    if older and newer and _scaling(older) != _scaling(newer):
        raise keys.fault(
            "rope_scaling and rope_parameters are both there and differ",
            "keep the one that the model was trained with",
        )
    return newer or older or {}


def _scaling(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a dict as the newer schema has it, without theta."""
    kind = content.get("rope_type", content.get("type"))
    rest = {
        name: value
        for name, value in content.items()
        if name not in ("type", "rope_type", "rope_theta")
    }
    return {"rope_type": kind, **rest}


def _read(
    keys: Keys,
    content: Mapping[str, Any],
    default_theta: float,
    takes_theta: bool = True,
) -> Rotary:
    """Read one set of frequencies.

    Args:
      keys: of the whole configuration.
      content: the dict that describes them.
      default_theta: where none is said.
      takes_theta: whether `rope_theta` of the configuration is theirs.
    """
    inner = Keys(content, f"{keys.where}, rotary positions")
    kind = _kind(inner)
    theta = default_theta
    if takes_theta:
        theta = keys.number("rope_theta", default_theta)
        _check_said_once(keys, inner)
    theta = inner.number("rope_theta", theta)
    inner.must_be("partial_rotary_factor", 1.0, None)

    rotary = Rotary(theta)
    if kind != "default":
        rotary = _scaled(keys, inner, kind, theta)
    if left := inner.left():
        raise inner.fault(
            f"{left[0]!r} is no key of rope type {kind!r}",
            "remove it if the model does not use it; else this can't read the model",
        )
    return rotary


def _check_said_once(keys: Keys, inner: Keys) -> None:
    outer_theta = keys.content.get("rope_theta")
    inner_theta = inner.content.get("rope_theta")
    if None not in (outer_theta, inner_theta) and outer_theta != inner_theta:
        raise inner.fault(
            f"rope_theta is {outer_theta} outside and {inner_theta} inside",
            "keep the one that the model was trained with",
        )


def _kind(inner: Keys) -> str:
    older = inner.take("type", None)
    newer = inner.take("rope_type", None)
    if None not in (older, newer) and older != newer:
        raise inner.fault(
            f"type is {older!r} and rope_type is {newer!r}",
            "keep the one that the model was trained with",
        )
    kind = newer or older
    if kind is None and set(inner.content) - {"rope_theta", "partial_rotary_factor"}:
        raise inner.fault(
            "the scaling has no type",
            f"add rope_type, one of {', '.join(KINDS)}",
        )
    kind = kind or "default"
    if kind not in KINDS:
        raise inner.fault(
            f"rope type {kind!r} is unknown{nearest(str(kind), KINDS)}",
            f"this reads {', '.join(KINDS)}",
        )
    return kind


def _scaled(keys: Keys, inner: Keys, kind: Any, theta: float) -> Rotary:
    longest = keys.content.get("max_position_embeddings")
    if kind == "linear":
        return Rotary(theta, kind, inner.number("factor"))
    if kind == "dynamic":
        inner.must_be("original_max_position_embeddings", longest)
        length = keys.count("max_position_embeddings")
        return Rotary(theta, kind, inner.number("factor"), length)

    # Phi's place of this number goes before the usual one, as in transformers.
    original = keys.content.get("original_max_position_embeddings")
    keys.pass_over(["original_max_position_embeddings"])
    inside = inner.take("original_max_position_embeddings", None)
    outer = Keys({"original_max_position_embeddings": original or inside}, inner.where)
    length = outer.count("original_max_position_embeddings", longest)
    if kind == "llama3":
        return Rotary(
            theta,
            kind,
            inner.number("factor"),
            length,
            low=inner.number("low_freq_factor"),
            high=inner.number("high_freq_factor"),
        )
    factor = inner.number("factor", (longest or length) / length)
    return Rotary(
        theta,
        kind,
        factor,
        length,
        fast=inner.number("beta_fast", DEFAULT_FAST),
        slow=inner.number("beta_slow", DEFAULT_SLOW),
        truncate=inner.flag("truncate", True),
        amplitude=_amplitude(inner, factor),
    )


def _amplitude(inner: Keys, factor: float) -> float:
    """Return YaRN's factor of queries and keys."""
    of_model = inner.optional("mscale", None)
    of_all = inner.optional("mscale_all_dim", None)
    said = inner.optional("attention_factor", None)
    if said is not None:
        return said
    if of_model and of_all:
        return _growth(factor, of_model) / _growth(factor, of_all)
    return _growth(factor, 1.0)


def _growth(factor: float, share: float) -> float:
    if factor <= 1:
        return 1.0
    return AMPLITUDE_SLOPE * share * math.log(factor) + 1.0
