"""The one place that knows where JAX versions differ (0.10 on Python 3.11, 0.12 on 3.12 and later)."""

from __future__ import annotations

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import AxisType, Mesh

__all__ = ["ClosedJaxpr", "Jaxpr", "make_mesh"]


def make_mesh(axes: dict[str, int], devices: list[jax.Device]) -> Mesh:
    """A mesh whose axes XLA's partitioner fills in; from 0.12 on JAX's default, Explicit, refuses un-annotated models."""
    shape = tuple(axes.values())
    return Mesh(np.asarray(devices).reshape(shape), tuple(axes), axis_types=(AxisType.Auto,) * len(shape))
