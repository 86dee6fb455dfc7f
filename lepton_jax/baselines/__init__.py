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
from lepton_jax.baselines.comparison import (
    VERDICTS,
    Compared,
    Comparison,
    Network,
    shown,
    verdict_of,
)
from lepton_jax.baselines.ials import ials
from lepton_jax.baselines.intervals import Alone, mean_interval, wilson
from lepton_jax.baselines.item_knn import item_knn
from lepton_jax.baselines.logistic import logistic
from lepton_jax.baselines.majority import majority
from lepton_jax.baselines.measuring import all_measured
from lepton_jax.baselines.naive_bayes import log_count_ratios, naive_bayes, nb_svm
from lepton_jax.baselines.nearest import nearest
from lepton_jax.baselines.normal import normal_direction, principal_components
from lepton_jax.baselines.popularity import popularity
from lepton_jax.baselines.suspects import without_suspects

__all__ = [
    "VERDICTS",
    "Alone",
    "Baseline",
    "BaselineFunction",
    "Compared",
    "Comparison",
    "Interval",
    "Network",
    "NotHere",
    "Samples",
    "Task",
    "all_measured",
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
    "normal_direction",
    "popularity",
    "principal_components",
    "shown",
    "verdict_of",
    "wilson",
    "without_suspects",
]
