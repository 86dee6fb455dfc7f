"""Dropout that a model has only where a share is asked for."""

from __future__ import annotations

from flax import nnx


def dropout_layer(share: float, rngs: nnx.Rngs) -> nnx.Dropout | None:
    """Return a dropout of a share of the units; None for a share of 0."""
    if not share:
        return None
    return nnx.Dropout(share, rngs=rngs)
