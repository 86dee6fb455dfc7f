"""Samples: where they come from and how they reach the devices."""

from lepton_jax.data.arrays import Arrays, from_any
from lepton_jax.data.idx import idx, read_idx
from lepton_jax.data.loader import Loader, blocks_between, described, epoch_samples, sample
from lepton_jax.data.pipeline import Dataset, Source, mix
from lepton_jax.data.sources import Documents
from lepton_jax.data.table import MISSING, Schema, Table, table, table_split

__all__ = [
    "MISSING", "Arrays", "Dataset", "Documents", "Loader", "Schema", "Source", "Table", "blocks_between", "described",
    "epoch_samples", "from_any", "idx", "mix", "read_idx", "sample", "table", "table_split",
]
