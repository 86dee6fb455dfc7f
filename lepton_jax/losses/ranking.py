"""Losses of recommenders: which item was used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lepton_jax.losses.stock import cross_entropy


def ranking_softmax(outputs: Any, targets: jax.Array) -> jax.Array:
    """Cross entropy of the item that was used among the negatives, (batch,).

    See Yi et al. 2019, "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item
    Recommendations", equation 4; `lepton_jax.models.Retrieval` corrects the scores.

    Args:
      outputs: {"own": (batch,) scores of the item that was used, "others": (batch,
        negatives)}, or scores (batch, items) of all items.
      targets: the item that was used, (batch,); it counts for scores of all items.
    """
    if not isinstance(outputs, Mapping):
        return cross_entropy(outputs, targets)
    own = outputs["own"]
    scores = jnp.concatenate([own[:, None], outputs["others"]], axis=1)
    return jax.nn.logsumexp(scores, axis=1) - own


# Of a cosine that is left alone, and of the negatives' mean: Mao et al. 2021 search 0
# to 1 and 1 to 1000, and find 0.4 to 0.9 and 150 to 1500 on three data sets.
CONTRASTIVE_MARGIN = 0.4
CONTRASTIVE_WEIGHT = 150.0


def cosine_contrastive(
    outputs: Any,
    targets: jax.Array,
    *,
    margin: float = CONTRASTIVE_MARGIN,
    weight: float = CONTRASTIVE_WEIGHT,
) -> jax.Array:
    """Distance to the item that was used, and nearness to the negatives, (batch,).

    1 - own + weight * mean(max(0, other - margin)): Mao et al. 2021, "SimpleX: A Simple
    and Strong Baseline for Collaborative Filtering", equation 1. Negatives below the
    margin have no gradient, which leaves the hard ones.

    Args:
      outputs: cosines, as those of `ranking_softmax`.
      targets: the item that was used, (batch,).
      margin: cosine up to which a negative is let alone.
      weight: of the negatives.
    """
    if isinstance(outputs, Mapping):
        own = outputs["own"]
        others = outputs["others"]
    else:
        own = jnp.take_along_axis(outputs, targets[:, None], axis=1)[:, 0]
        is_own = targets[:, None] == jnp.arange(outputs.shape[1])
        others = jnp.where(is_own, -1.0, outputs)
    near = jnp.maximum(others - margin, 0).mean(axis=1)
    return 1 - own + weight * near
