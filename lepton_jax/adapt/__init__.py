"""Adapters: fine-tuning of a few parameters next to a model that stays as it is."""

from lepton_jax.adapt.low_rank import (
    PATTERN,
    DoRALinear,
    LoRALinear,
    adapted,
    dora,
    lora,
    merge,
    plain_model,
)
from lepton_jax.adapt.training import only, trained_by

__all__ = [
    "PATTERN",
    "DoRALinear",
    "LoRALinear",
    "adapted",
    "dora",
    "lora",
    "merge",
    "only",
    "plain_model",
    "trained_by",
]
