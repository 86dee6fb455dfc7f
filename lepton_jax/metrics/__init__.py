"""Metrics: weighted sums on the device, and a function of their means on the host."""

from lepton_jax.metrics.classes import (
    accuracy,
    balanced_accuracy,
    binary_accuracy,
    f1,
    precision,
    recall,
    top_k_accuracy,
)
from lepton_jax.metrics.confusion import confusion_matrix
from lepton_jax.metrics.curves import auc, average_precision
from lepton_jax.metrics.ensembles import of_ensemble
from lepton_jax.metrics.metric import Metric, of_task, without_missing
from lepton_jax.metrics.probabilities import (
    brier,
    calibration_curve,
    calibration_error,
    log_loss,
)
from lepton_jax.metrics.quantities import absolute_error, perplexity, r2, rmse
from lepton_jax.metrics.ranking import (
    hit_rate,
    mean_average_precision,
    ndcg,
    reciprocal_rank,
)

__all__ = [
    "Metric",
    "absolute_error",
    "accuracy",
    "auc",
    "average_precision",
    "balanced_accuracy",
    "binary_accuracy",
    "brier",
    "calibration_curve",
    "calibration_error",
    "confusion_matrix",
    "f1",
    "hit_rate",
    "log_loss",
    "mean_average_precision",
    "ndcg",
    "of_ensemble",
    "of_task",
    "perplexity",
    "precision",
    "r2",
    "recall",
    "reciprocal_rank",
    "rmse",
    "top_k_accuracy",
    "without_missing",
]
