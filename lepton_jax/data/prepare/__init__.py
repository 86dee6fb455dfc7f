"""Preparation as data: a list of steps, from raw rows to samples."""

from lepton_jax.data.extras import needs

needs("polars", extra="data", purpose="preparing data")

from lepton_jax.data.prepare.conformance import conformance  # noqa: E402
from lepton_jax.data.prepare.drift import Drift, drift  # noqa: E402
from lepton_jax.data.prepare.facts import (  # noqa: E402
    leaks_in,
    read_profile,
    write_preparation_report,
)
from lepton_jax.data.prepare.leaks import Leak, Leaks, leaks_of  # noqa: E402
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
from lepton_jax.data.prepare.steps.categories import (  # noqa: E402
    Classes,
    HashCategories,
    OneHot,
    Vocabulary,
)
from lepton_jax.data.prepare.steps.characters import CharacterTokens  # noqa: E402
from lepton_jax.data.prepare.steps.dates import DateFeatures  # noqa: E402
from lepton_jax.data.prepare.steps.duplicates import Duplicates  # noqa: E402
from lepton_jax.data.prepare.steps.images import Images  # noqa: E402
from lepton_jax.data.prepare.steps.interpolation import Interpolate  # noqa: E402
from lepton_jax.data.prepare.steps.labels import Labels  # noqa: E402
from lepton_jax.data.prepare.steps.merging import Join, Mixture  # noqa: E402
from lepton_jax.data.prepare.steps.missing import (  # noqa: E402
    DropMissing,
    FillMissing,
    FillWith,
    MarkMissing,
)
from lepton_jax.data.prepare.steps.model_inputs import AsFloats, TrimEnd  # noqa: E402
from lepton_jax.data.prepare.steps.near_duplicates import NearDuplicates  # noqa: E402
from lepton_jax.data.prepare.steps.ngrams import NgramTokens  # noqa: E402
from lepton_jax.data.prepare.steps.outliers import (  # noqa: E402
    ClipOutliers,
    DropOutliers,
    FlagOutliers,
)
from lepton_jax.data.prepare.steps.sampling import (  # noqa: E402
    Oversample,
    Sample,
    Undersample,
    Weigh,
)
from lepton_jax.data.prepare.steps.scaling import (  # noqa: E402
    Bins,
    LogScale,
    MinMaxScale,
    QuantileScale,
    RobustScale,
    Standardize,
)
from lepton_jax.data.prepare.steps.schema import CheckSchema, Field  # noqa: E402
from lepton_jax.data.prepare.steps.selecting import (  # noqa: E402
    Derive,
    Drop,
    Filter,
    Rename,
    Select,
)
from lepton_jax.data.prepare.steps.splitting import (  # noqa: E402
    Split,
    SplitAt,
    SplitByGroup,
    SplitByHash,
    SplitBySource,
    SplitByTime,
)
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
    "AsFloats",
    "Bins",
    "ByteTokens",
    "CharacterTokens",
    "CheckSchema",
    "Classes",
    "CleanText",
    "ClipOutliers",
    "DateFeatures",
    "Derive",
    "Drift",
    "Drop",
    "DropMissing",
    "DropOutliers",
    "Duplicates",
    "Field",
    "FileTokens",
    "FillMissing",
    "FillWith",
    "Filter",
    "Fitted",
    "FittedStep",
    "FlagOutliers",
    "HashCategories",
    "Images",
    "Interpolate",
    "Join",
    "Labels",
    "Leak",
    "Leaks",
    "LogScale",
    "MarkMissing",
    "MinMaxScale",
    "Mixture",
    "NearDuplicates",
    "NgramTokens",
    "OneHot",
    "Outcome",
    "Oversample",
    "Preparation",
    "Prepared",
    "Profile",
    "Progress",
    "QuantileScale",
    "Rename",
    "RobustScale",
    "Sample",
    "Select",
    "Serving",
    "Split",
    "SplitAt",
    "SplitByGroup",
    "SplitByHash",
    "SplitBySource",
    "SplitByTime",
    "Standardize",
    "Step",
    "TextQuality",
    "TrimEnd",
    "Undersample",
    "Vocabulary",
    "Weigh",
    "WordTokens",
    "conformance",
    "drift",
    "leaks_in",
    "leaks_of",
    "open_prepared",
    "prepare",
    "profile",
    "read_profile",
    "write_preparation_report",
]
