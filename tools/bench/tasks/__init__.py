"""The tasks of `tools.bench controller`, one a file, split into two halves.

Rules and constants of the controller are found on the tuning half. The judging half
decides whether its claims hold: whoever changes a rule opens neither the files of these
tasks nor their single results.

Five tasks are older than the split and have been looked at, so they belong to the
tuning half. The seed splits the others.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tools.bench.controller_tasks import Task

SPLIT_SEED = 0  # chosen before any of the new tasks had been run
SEEN = ("adult", "digits", "mnist", "movielens", "shakespeare")
# A name more would move the split: it is fixed.
UNSEEN = (
    "adafactor_shakespeare",
    "adding_lstm",
    "autoencoder_digits",
    "autoregressive_digits",
    "batch_norm_mnist",
    "bigram_zeros",
    "cancer_logistic",
    "cancer_unscaled",
    "contrastive_digits",
    "copy_gru",
    "criteo_tiny",
    "deep_small_init",
    "diabetes_linear",
    "diffusion_digits",
    "factors_large",
    "factors_small",
    "finetune_mnist",
    "finetune_text",
    "friedman_quantile",
    "gru_bytes",
    "label_smoothing",
    "lamb_mnist",
    "large_init",
    "lion_digits",
    "loss_thousandfold",
    "loss_thousandth",
    "mnist_pixels",
    "muon_mnist",
    "noisy_labels",
    "poisson_counts",
    "polarity_words",
    "ranking_movielens",
    "sgd_momentum",
    "sine_fit",
    "skipgram_words",
    "tiny_batches",
    "titanic_table",
    "vae_mnist",
    "vision_transformer",
    "wine_softmax",
)
JUDGING = tuple(
    sorted(random.Random(SPLIT_SEED).sample(sorted(UNSEEN), len(UNSEEN) // 2))
)
TUNING = tuple(sorted({*SEEN, *UNSEEN} - {*JUDGING}))
HALVES = {"tuning": TUNING, "judging": JUDGING}


def source(name: str) -> Path:
    """Return the file of a task."""
    return Path(__file__).with_name(f"{name}.py")


def _maker(name: str) -> Callable[[Path], Task]:
    """Return a function of the folder of data sets that imports and builds a task."""

    def make(data: Path) -> Task:
        return importlib.import_module(f"{__name__}.{name}").task(data)

    return make


TASKS = {name: _maker(name) for name in sorted((*SEEN, *UNSEEN))}
