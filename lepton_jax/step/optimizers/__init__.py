"""The recipe's optimizer: from Optax's transformations to a train step's update."""

from lepton_jax.step.optimizers.core import build, updating
from lepton_jax.step.optimizers.evaluation import evaluated
from lepton_jax.step.optimizers.optimizer import SCHEDULED, Optimizer, unchanged
from lepton_jax.step.optimizers.orthogonal import (
    STEPS,
    divided_over,
    kernels_of,
    muon,
    stacks,
)
from lepton_jax.step.optimizers.parts import (
    by_part,
    check_parts,
    parts_of,
    without_frozen,
)
from lepton_jax.step.optimizers.rowwise import (
    marked,
    rowwise,
    rowwise_adagrad,
    sparse_adam,
)
from lepton_jax.step.optimizers.switching import Switchable, switchable

__all__ = [
    "SCHEDULED",
    "STEPS",
    "Optimizer",
    "Switchable",
    "build",
    "by_part",
    "check_parts",
    "divided_over",
    "evaluated",
    "kernels_of",
    "marked",
    "muon",
    "parts_of",
    "rowwise",
    "rowwise_adagrad",
    "sparse_adam",
    "stacks",
    "switchable",
    "unchanged",
    "updating",
    "without_frozen",
]
