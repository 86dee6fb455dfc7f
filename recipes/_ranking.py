"""Metrics of rankings that hold in training, too, where there are negatives alone.

This is not a recipe itself: a name that begins with an underscore says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp


def among_negatives(metric: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Return a metric of scores and an index that takes a training batch's, too.

    In training `lepton_jax.models.Retrieval` gives the score of the item that was used
    and those of the negatives; the item is ranked among these then.
    """

    def value(outputs: Any, targets: Any) -> Any:
        if isinstance(outputs, Mapping):
            own = outputs["own"][:, None]
            outputs = jnp.concatenate([own, outputs["others"]], axis=1)
            targets = jnp.zeros_like(targets)
        return metric(outputs, targets)

    return value
