"""What a model is trained as, while its file stays as it is: adapters, and widths."""

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
from lepton_jax.adapt.widths import by_width

__all__ = [
    "PATTERN",
    "DoRALinear",
    "LoRALinear",
    "adapted",
    "by_width",
    "dora",
    "lora",
    "merge",
    "only",
    "plain_model",
    "trained_by",
]
