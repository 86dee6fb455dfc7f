"""Smaller models: quantized, pruned, distilled, and the cheapest that is good enough.

    small = shrink.quantize(trainer, "w8")           # a Trainer that predicts
    tuned = shrink.aware(trainer, "w4")              # trained as if it were quantized
    small = shrink.cut(trainer, 0.5)                 # half of the channels, to train on
    recipe = shrink.distilled(recipe, teacher)       # learns from a larger model
    frontier = shrink.search(trainer, "int8")        # what `lepton shrink` does

What comes out is a `Trainer` or a `Recipe` as any other: it evaluates, predicts, and
becomes an `Artifact`.
"""

from lepton_jax.ship.shrink.channels import Channels
from lepton_jax.ship.shrink.cutting import channels, cut, quicker
from lepton_jax.ship.shrink.distillation import distillation_loss, distilled
from lepton_jax.ship.shrink.masks import (
    channels_off,
    magnitude,
    n_of_m,
    pruning,
    rising,
    zeros,
)
from lepton_jax.ship.shrink.measuring import latencies_of, latency_of, size_of
from lepton_jax.ship.shrink.quantization import KINDS, aware, quantize
from lepton_jax.ship.shrink.search import Candidate, Frontier, search

__all__ = [
    "KINDS",
    "Candidate",
    "Channels",
    "Frontier",
    "aware",
    "channels",
    "channels_off",
    "cut",
    "distillation_loss",
    "distilled",
    "latencies_of",
    "latency_of",
    "magnitude",
    "n_of_m",
    "pruning",
    "quantize",
    "quicker",
    "rising",
    "search",
    "size_of",
    "zeros",
]
