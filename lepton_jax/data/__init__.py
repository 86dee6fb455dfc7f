"""Samples: where they come from and how they reach the devices."""

from lepton_jax.data.arrays import Arrays, from_any
from lepton_jax.data.datasets import (
    blocks_between,
    described,
    epoch_samples,
    host_rows,
    one_pass,
    open_feed,
    sample,
    settled,
)
from lepton_jax.data.disk_cache import DiskCache
from lepton_jax.data.feed import Feed
from lepton_jax.data.idx import idx, read_idx
from lepton_jax.data.limits import Limit, check_limits
from lepton_jax.data.packing import instruction, masked
from lepton_jax.data.picture_files import Picture
from lepton_jax.data.pipeline import Dataset, Source, mix, pictures, shards
from lepton_jax.data.preprocess import divided, grey, standardized
from lepton_jax.data.shuffling import uniform
from lepton_jax.data.sources import Documents
from lepton_jax.data.table import MISSING, Schema, Table, table, table_split

__all__ = [
    "MISSING",
    "Arrays",
    "Dataset",
    "DiskCache",
    "Documents",
    "Feed",
    "Limit",
    "Picture",
    "Schema",
    "Source",
    "Table",
    "blocks_between",
    "check_limits",
    "described",
    "divided",
    "epoch_samples",
    "from_any",
    "grey",
    "host_rows",
    "idx",
    "instruction",
    "masked",
    "mix",
    "one_pass",
    "open_feed",
    "pictures",
    "read_idx",
    "sample",
    "settled",
    "shards",
    "standardized",
    "table",
    "table_split",
    "uniform",
]
