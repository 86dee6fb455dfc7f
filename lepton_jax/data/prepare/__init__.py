"""Preparation as data: a list of steps, from raw rows to samples."""

from lepton_jax.data.extras import needs

needs("polars", extra="data", purpose="preparing data")

from lepton_jax.data.prepare.drift import Drift, drift  # noqa: E402
from lepton_jax.data.prepare.facts import (  # noqa: E402
    read_profile,
    write_preparation_report,
)
from lepton_jax.data.prepare.preparation import Preparation  # noqa: E402
from lepton_jax.data.prepare.prepared import (  # noqa: E402
    FittedStep,
    Prepared,
    open_prepared,
)
from lepton_jax.data.prepare.profile import Profile, profile  # noqa: E402
from lepton_jax.data.prepare.run import Progress, prepare  # noqa: E402
from lepton_jax.data.prepare.serving import Serving  # noqa: E402
from lepton_jax.data.prepare.step import SPLIT, Fitted, Outcome, Step  # noqa: E402
from lepton_jax.data.prepare.steps.duplicates import Duplicates  # noqa: E402
from lepton_jax.data.prepare.steps.images import Images  # noqa: E402
from lepton_jax.data.prepare.steps.near_duplicates import NearDuplicates  # noqa: E402
from lepton_jax.data.prepare.steps.text import CleanText  # noqa: E402
from lepton_jax.data.prepare.steps.text_quality import GOPHER, TextQuality  # noqa: E402
from lepton_jax.data.prepare.steps.tokens import (  # noqa: E402
    ByteTokens,
    FileTokens,
    WordTokens,
)

__all__ = [
    "GOPHER",
    "SPLIT",
    "ByteTokens",
    "CleanText",
    "Drift",
    "Duplicates",
    "FileTokens",
    "Fitted",
    "FittedStep",
    "Images",
    "NearDuplicates",
    "Outcome",
    "Preparation",
    "Prepared",
    "Profile",
    "Progress",
    "Serving",
    "Step",
    "TextQuality",
    "WordTokens",
    "drift",
    "open_prepared",
    "prepare",
    "profile",
    "read_profile",
    "write_preparation_report",
]
