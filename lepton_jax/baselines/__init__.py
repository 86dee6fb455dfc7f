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
    Task,
)
from lepton_jax.baselines.boosting import boosting
from lepton_jax.baselines.comparison import Comparison, Network
from lepton_jax.baselines.intervals import mean_interval, wilson
from lepton_jax.baselines.logistic import logistic
from lepton_jax.baselines.majority import majority
from lepton_jax.baselines.naive_bayes import log_count_ratios, naive_bayes, nb_svm
from lepton_jax.baselines.nearest import nearest
from lepton_jax.baselines.suspects import without_suspects

__all__ = [
    "Baseline",
    "BaselineFunction",
    "Comparison",
    "Interval",
    "Network",
    "NotHere",
    "Samples",
    "Task",
    "boosting",
    "log_count_ratios",
    "logistic",
    "majority",
    "mean_interval",
    "naive_bayes",
    "nb_svm",
    "nearest",
    "wilson",
    "without_suspects",
]
