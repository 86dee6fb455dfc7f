"""Preparation as data: a list of steps, from raw rows to samples."""

from lepton_jax.data.extras import needs

needs("polars", extra="data", purpose="preparing data")

from lepton_jax.data.prepare.preparation import Preparation  # noqa: E402
from lepton_jax.data.prepare.prepared import (  # noqa: E402
    FittedStep,
    Prepared,
    open_prepared,
)
from lepton_jax.data.prepare.run import Progress, prepare  # noqa: E402
from lepton_jax.data.prepare.step import SPLIT, Fitted, Outcome, Step  # noqa: E402

__all__ = [
    "SPLIT",
    "Fitted",
    "FittedStep",
    "Outcome",
    "Preparation",
    "Prepared",
    "Progress",
    "Step",
    "open_prepared",
    "prepare",
]
