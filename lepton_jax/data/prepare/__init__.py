"""Preparation as data: a list of steps, from raw rows to samples."""

from lepton_jax.data.extras import needs

needs("polars", extra="data", purpose="preparing data")

from lepton_jax.data.prepare.step import Fitted, Outcome, Step  # noqa: E402
from lepton_jax.data.prepare.steps.duplicates import Duplicates  # noqa: E402
from lepton_jax.data.prepare.steps.near_duplicates import (  # noqa: E402
    NearDuplicates,
)
from lepton_jax.data.prepare.steps.text import CleanText  # noqa: E402
from lepton_jax.data.prepare.steps.text_quality import (  # noqa: E402
    GOPHER,
    TextQuality,
)

__all__ = [
    "GOPHER",
    "CleanText",
    "Duplicates",
    "Fitted",
    "NearDuplicates",
    "Outcome",
    "Step",
    "TextQuality",
]
