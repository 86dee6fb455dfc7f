"""Cheap methods that a network has to beat, fitted on the same rows.

Each is a function `(train, test) -> Baseline` for `Recipe.baseline`; see
`lepton_jax.baselines.baseline`.
"""

from lepton_jax.baselines.baseline import (
    Baseline,
    BaselineFunction,
    Interval,
    NotHere,
    Samples,
)
from lepton_jax.baselines.biases import biases
from lepton_jax.baselines.ials import ials
from lepton_jax.baselines.item_knn import item_knn
from lepton_jax.baselines.majority import majority
from lepton_jax.baselines.popularity import popularity

__all__ = [
    "Baseline",
    "BaselineFunction",
    "Interval",
    "NotHere",
    "Samples",
    "biases",
    "ials",
    "item_knn",
    "majority",
    "popularity",
]
