"""The recipe's optimizer: from Optax's transformations to what the train step
applies.
"""

from lepton_jax.step.optimizers.core import (
    SCHEDULED,
    Optimizer,
    Switchable,
    build,
    switchable,
    updating,
)
from lepton_jax.step.optimizers.evaluation import evaluated

__all__ = [
    "SCHEDULED",
    "Optimizer",
    "Switchable",
    "build",
    "evaluated",
    "switchable",
    "updating",
]
