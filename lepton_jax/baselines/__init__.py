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
from lepton_jax.baselines.biases import biases
from lepton_jax.baselines.boosting import boosting
from lepton_jax.baselines.clicks import factorization_machine, linear_clicks
from lepton_jax.baselines.comparison import Comparison, Network
from lepton_jax.baselines.ials import ials
from lepton_jax.baselines.intervals import mean_interval, wilson
from lepton_jax.baselines.item_knn import item_knn
from lepton_jax.baselines.logistic import logistic
from lepton_jax.baselines.majority import majority
from lepton_jax.baselines.naive_bayes import log_count_ratios, naive_bayes, nb_svm
from lepton_jax.baselines.nearest import nearest
from lepton_jax.baselines.popularity import popularity

__all__ = [
    "Baseline",
    "BaselineFunction",
    "Comparison",
    "Interval",
    "Network",
    "NotHere",
    "Samples",
    "Task",
    "biases",
    "boosting",
    "factorization_machine",
    "ials",
    "item_knn",
    "linear_clicks",
    "log_count_ratios",
    "logistic",
    "majority",
    "mean_interval",
    "naive_bayes",
    "nb_svm",
    "nearest",
    "popularity",
    "wilson",
]
