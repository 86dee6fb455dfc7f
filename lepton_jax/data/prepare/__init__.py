"""Preparation as data: a list of steps, from raw rows to samples."""

from lepton_jax.data.extras import needs

needs("polars", extra="data", purpose="preparing data")

from lepton_jax.data.prepare.leaks import Leak, Leaks, leaks_of  # noqa: E402
from lepton_jax.data.prepare.step import Fitted, Outcome, Step  # noqa: E402
from lepton_jax.data.prepare.steps.duplicates import Duplicates  # noqa: E402
from lepton_jax.data.prepare.steps.images import Images  # noqa: E402
from lepton_jax.data.prepare.steps.merging import Join, Mixture  # noqa: E402
from lepton_jax.data.prepare.steps.near_duplicates import (  # noqa: E402
    NearDuplicates,
)
from lepton_jax.data.prepare.steps.text import CleanText  # noqa: E402
from lepton_jax.data.prepare.steps.text_quality import (  # noqa: E402
    GOPHER,
    TextQuality,
)
from lepton_jax.data.prepare.steps.tokens import (  # noqa: E402
    ByteTokens,
    FileTokens,
    WordTokens,
)

__all__ = [
    "GOPHER",
    "ByteTokens",
    "CleanText",
    "Duplicates",
    "FileTokens",
    "Fitted",
    "Images",
    "Join",
    "Leak",
    "Leaks",
    "Mixture",
    "NearDuplicates",
    "Outcome",
    "Step",
    "TextQuality",
    "WordTokens",
    "leaks_of",
]
