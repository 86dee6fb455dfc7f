"""Preparation as data: a list of steps, from raw rows to samples."""

from lepton_jax.data.extras import needs

needs("polars", extra="data", purpose="preparing data")

from lepton_jax.data.prepare.conformance import (conformance)  # noqa: E402
from lepton_jax.data.prepare.leaks import (Leak, Leaks, leaks_of)  # noqa: E402
from lepton_jax.data.prepare.preparation import (Preparation)  # noqa: E402
from lepton_jax.data.prepare.prepared import (FittedStep, Prepared, open_prepared)  # noqa: E402
from lepton_jax.data.prepare.run import (Progress, prepare)  # noqa: E402
from lepton_jax.data.prepare.step import (Fitted, Outcome, SPLIT, Step)  # noqa: E402
from lepton_jax.data.prepare.steps.categories import (Classes, HashCategories, OneHot, Vocabulary)  # noqa: E402
from lepton_jax.data.prepare.steps.dates import (DateFeatures)  # noqa: E402
from lepton_jax.data.prepare.steps.duplicates import (Duplicates)  # noqa: E402
from lepton_jax.data.prepare.steps.images import (Images)  # noqa: E402
from lepton_jax.data.prepare.steps.interpolation import (Interpolate)  # noqa: E402
from lepton_jax.data.prepare.steps.merging import (Join, Mixture)  # noqa: E402
from lepton_jax.data.prepare.steps.missing import (DropMissing, FillMissing, FillWith, MarkMissing)  # noqa: E402
from lepton_jax.data.prepare.steps.near_duplicates import (NearDuplicates)  # noqa: E402
from lepton_jax.data.prepare.steps.outliers import (ClipOutliers, DropOutliers, FlagOutliers)  # noqa: E402
from lepton_jax.data.prepare.steps.sampling import (Oversample, Sample, Undersample, Weigh)  # noqa: E402
from lepton_jax.data.prepare.steps.scaling import (Bins, LogScale, MinMaxScale, QuantileScale, RobustScale, Standardize)  # noqa: E402
from lepton_jax.data.prepare.steps.schema import (CheckSchema, Field)  # noqa: E402
from lepton_jax.data.prepare.steps.selecting import (Derive, Drop, Filter, Rename, Select)  # noqa: E402
from lepton_jax.data.prepare.steps.splitting import (Split, SplitAt, SplitByGroup, SplitByHash, SplitBySource, SplitByTime)  # noqa: E402
from lepton_jax.data.prepare.steps.text import (CleanText)  # noqa: E402
from lepton_jax.data.prepare.steps.text_quality import (GOPHER, TextQuality)  # noqa: E402
from lepton_jax.data.prepare.steps.tokens import (ByteTokens, FileTokens, WordTokens)  # noqa: E402

__all__ = ['Bins', 'ByteTokens', 'CheckSchema', 'Classes', 'CleanText', 'ClipOutliers', 'DateFeatures', 'Derive', 'Drop', 'DropMissing', 'DropOutliers', 'Duplicates', 'Field', 'FileTokens', 'FillMissing', 'FillWith', 'Filter', 'Fitted', 'FittedStep', 'FlagOutliers', 'GOPHER', 'HashCategories', 'Images', 'Interpolate', 'Join', 'Leak', 'Leaks', 'LogScale', 'MarkMissing', 'MinMaxScale', 'Mixture', 'NearDuplicates', 'OneHot', 'Outcome', 'Oversample', 'Preparation', 'Prepared', 'Progress', 'QuantileScale', 'Rename', 'RobustScale', 'SPLIT', 'Sample', 'Select', 'Split', 'SplitAt', 'SplitByGroup', 'SplitByHash', 'SplitBySource', 'SplitByTime', 'Standardize', 'Step', 'TextQuality', 'Undersample', 'Vocabulary', 'Weigh', 'WordTokens', 'conformance', 'leaks_of', 'open_prepared', 'prepare']
