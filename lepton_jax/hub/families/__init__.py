"""The families of published models: configurations to shapes and back.

A family says how its configurations are read (`shape_of`), how one is written
(`config_of`), and by which scheme its tensors are named. A family can hold a shape
if writing and reading gives the same shape again; that is how `family_for` chooses.

Defaults are those of transformers 5.24, `models/*/configuration_*.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lepton_jax.errors import ModelError, nearest
from lepton_jax.hub.families.family import Family, canonical, difference
from lepton_jax.hub.families.gemma import GEMMA, GEMMA_2, GEMMA_3
from lepton_jax.hub.families.gpt2 import GPT_2
from lepton_jax.hub.families.llama import LLAMA, MISTRAL
from lepton_jax.hub.families.qwen import QWEN_2, QWEN_3
from lepton_jax.models import DecoderShape

__all__ = ["FAMILIES", "Family", "canonical", "difference", "family_for", "family_of"]

# In the order in which `family_for` tries them.
ALL = (LLAMA, MISTRAL, QWEN_2, QWEN_3, GEMMA, GEMMA_2, GEMMA_3, GPT_2)
FAMILIES = {family.name: family for family in ALL}


def family_of(
    config: Mapping[str, Any],
    where: object,
) -> Family:
    """Return the family of a configuration.

    Raises:
      ModelError: there is none that is read.
    """
    name = str(config.get("model_type"))
    if name not in FAMILIES:
        raise ModelError(
            f"model_type {name!r} is none that is read{nearest(name, FAMILIES)}",
            where=where,
            remedy=f"this reads {', '.join(FAMILIES)}",
        )
    return FAMILIES[name]


def family_for(shape: DecoderShape) -> Family:
    """Return the first family that can hold a shape.

    Raises:
      ModelError: none can.
    """
    for family in FAMILIES.values():
        if family.holds(shape):
            return family
    raise ModelError(
        "no family of published models has this shape",
        where=str(shape),
        remedy=f"change it to one of {', '.join(FAMILIES)}; windows, biases and norms"
        " have to go together as there",
    )
