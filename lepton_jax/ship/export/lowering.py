"""A model as StableHLO of one batch size, with its weights as constants."""

from __future__ import annotations

from typing import Any

import jax

from lepton_jax.compat import static_text
from lepton_jax.ship.export.target import Source


def lowered_text(source: Source, batch: int) -> str:
    """Return a model's program as MLIR text; its function is `main`.

    Args:
      source: the model.
      batch: rows of a batch.
    """
    shapes: dict[str, Any] = source.shapes(batch)
    lowered = jax.jit(source.closed()).lower(*shapes.values())
    return static_text(lowered)
