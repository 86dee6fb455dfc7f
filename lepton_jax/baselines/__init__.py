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
from lepton_jax.baselines.majority import majority

__all__ = [
    "Baseline",
    "BaselineFunction",
    "Interval",
    "NotHere",
    "Samples",
    "majority",
]
