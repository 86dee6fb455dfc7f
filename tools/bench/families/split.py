"""Which families tune and which judge."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable

from tools.bench.families.case import Case
from tools.bench.families.draw import Draw

# All families. A name that is added or taken away moves the split, after which figures
# of the judging half say nothing of rules that were found before.
NAMES = (
    "bert",
    "clip",
    "convnext",
    "dcn",
    "densenet",
    "diffusion",
    "dlrm",
    "equilibrium",
    "fttransformer",
    "gan",
    "gemma",
    "gpt2",
    "graph",
    "gru_seq2seq",
    "hypernet",
    "llama",
    "lstm",
    "mamba",
    "mixer",
    "mixture",
    "perceiver",
    "pointnet",
    "resnet",
    "rwkv",
    "t5",
    "tcn",
    "two_tower",
    "unet",
    "vae",
    "vit",
    "wavenet",
    "wide_mlp",
)
# Chosen before any family was measured.
SPLIT_SEED = 20261129
HALVES = ("tuning", "judging")


def half(name: str) -> tuple[str, ...]:
    """Return the families of a half, sorted.

    Args:
      name: "tuning" or "judging".

    >>> set(half("tuning")) | set(half("judging")) == set(NAMES)
    True
    """
    shuffled = sorted(NAMES)
    random.Random(SPLIT_SEED).shuffle(shuffled)
    middle = len(shuffled) // 2
    parts = (shuffled[:middle], shuffled[middle:])
    return tuple(sorted(parts[HALVES.index(name)]))


def load(family: str) -> Callable[[Draw], Case]:
    """Import a family alone; return its function from a draw to a case."""
    return importlib.import_module(f"tools.bench.families.{family}").case
