"""Losses, and the weighted sums that are made of them.

A loss is a function (outputs, targets); what it may return is said in sums.py. Those
with settings get them by `functools.partial`, so that a saved model can name them:

    loss=partial(lepton.losses.weighted_cross_entropy, smoothing=0.1)
"""

from lepton_jax.losses.classes import (
    balanced,
    weighted_binary_cross_entropy,
    weighted_cross_entropy,
)
from lepton_jax.losses.decoding import decoder
from lepton_jax.losses.ensembles import of_members
from lepton_jax.losses.joint import joint_cross_entropy, joint_labels
from lepton_jax.losses.missing import known, known_values, without_missing
from lepton_jax.losses.quantities import (
    cosine,
    expected_count,
    pinball,
    poisson,
    scaled_squared_error,
)
from lepton_jax.losses.ranking import cosine_contrastive, ranking_softmax
from lepton_jax.losses.stock import (
    binary_cross_entropy,
    cross_entropy,
    huber,
    padded_cross_entropy,
    squared_error,
)
from lepton_jax.losses.sums import (
    Several,
    discounted,
    finish,
    mean,
    measure,
    sums_of,
    values,
    weighted_sum,
    with_auxiliary,
)
from lepton_jax.losses.tasks import (
    implied_metrics,
    is_implied,
    sum_of,
    summed_tasks,
    task_known,
    task_parts,
    task_values,
)

__all__ = [
    "Several",
    "balanced",
    "binary_cross_entropy",
    "cosine",
    "cosine_contrastive",
    "cross_entropy",
    "decoder",
    "discounted",
    "expected_count",
    "finish",
    "huber",
    "implied_metrics",
    "is_implied",
    "joint_cross_entropy",
    "joint_labels",
    "known",
    "known_values",
    "mean",
    "measure",
    "of_members",
    "padded_cross_entropy",
    "pinball",
    "poisson",
    "ranking_softmax",
    "scaled_squared_error",
    "squared_error",
    "sum_of",
    "summed_tasks",
    "sums_of",
    "task_known",
    "task_parts",
    "task_values",
    "values",
    "weighted_binary_cross_entropy",
    "weighted_cross_entropy",
    "weighted_sum",
    "with_auxiliary",
    "without_missing",
]
