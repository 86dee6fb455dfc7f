"""The sentences of rt-polarity, and the folds in which the recipe has them.

This is no script itself: a name that begins with an underscore says so.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

# Words are runs of letters and digits, and single marks, as in the recipe.
WORD = r"\w+|[^\w\s]"
FOLDS = 10
CLASSES = ("neg", "pos")


def sentences(archive: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the texts, one a line, and their classes 0 and 1, in the files' order."""
    texts: list[str] = []
    labels: list[int] = []
    with zipfile.ZipFile(archive) as opened:
        for number, name in enumerate(CLASSES):
            content = opened.read(f"sentence_polarity/rt-polarity.{name}")
            lines = content.decode("utf-8").removesuffix("\n").split("\n")
            texts += [line.strip() for line in lines]
            labels += [number] * len(lines)
    return np.array(texts, object), np.array(labels)


def folds_of(labels: np.ndarray, seed: int, folds: int = FOLDS) -> np.ndarray:
    """Return the fold of each text, as `lepton_jax`'s step `Split` divides them.

    Texts of a class lie in the order of a hash of (seed, row), and are dealt out as
    equal runs; the next class goes on where the last one ended.
    """
    rows = np.arange(len(labels), dtype=np.uint64)
    with np.errstate(over="ignore"):
        start = _mixed(np.array([seed], np.uint64))
        hashes = _mixed(_mixed(start) + rows)
    fold_of = np.zeros(len(labels), int)
    dealt = 0
    for number in np.unique(labels):
        members = np.flatnonzero(labels == number)
        members = members[np.argsort(hashes[members])]
        numbers = np.arange(dealt, dealt + len(members)) % folds
        fold_of[members] = np.sort(numbers)
        dealt += len(members)
    return fold_of


def _mixed(value: np.ndarray) -> np.ndarray:
    """Return the finalizer of SplitMix64 (Steele, Lea, Flood 2014) of each value."""
    z = value + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
