"""Figures that docstrings of steps quote.

python tests/data/prepare/figures_of_steps.py hash
python tests/data/prepare/figures_of_steps.py near
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
from datasketch import MinHash, MinHashLSH
from stepping import fitted, rows
from test_near_duplicates import edited_texts, shingle_set

from lepton_jax.data.prepare import NearDuplicates
from lepton_jax.data.prepare.steps.content import content_hash
from lepton_jax.data.readers import ROW

ROWS = 1_000_000


def hash_figures() -> None:
    """Print the time of hashing texts of 16 words, scaled to 10 million."""
    random = np.random.default_rng(0)
    letters = random.integers(97, 123, (5000, 9)).astype(np.uint8)
    lengths = random.integers(2, 10, 5000)
    words = np.array(
        [bytes(w[:size]).decode() for w, size in zip(letters, lengths, strict=True)]
    )
    columns = pl.DataFrame(words[random.integers(0, 5000, (ROWS, 16))])
    table = columns.select(pl.concat_str(pl.all(), separator=" ").alias("text"))
    size = table["text"].str.len_bytes().mean()
    _, wall, cpu = timed(content_hash, table)
    scale = 1e7 / ROWS
    print(
        f"{size:.0f} bytes a text: {wall * scale:.1f} s, {cpu * scale:.1f} s of cores"
    )


def near_figures() -> None:
    """Print recall and precision on edited texts, and those of datasketch."""
    texts = edited_texts(seed=7, count=2000)
    table = rows({"text": texts})
    sets = [shingle_set(text, 5, "characters") for text in texts]
    for threshold in (0.5, 0.7, 0.8, 0.9):
        true = {
            2 * at + 1
            for at in range(2000)
            if index(sets[2 * at], sets[2 * at + 1]) >= threshold
        }
        step = NearDuplicates("text", threshold=threshold)
        state, wall, _ = timed(fitted, step, [table])
        show("NearDuplicates", threshold, true, set(state[ROW]), wall)
        found, wall, _ = timed(by_datasketch, sets, threshold)
        show("datasketch", threshold, true, found, wall)


def index(one: set, other: set) -> float:
    return len(one & other) / len(one | other)


def by_datasketch(sets: list[set], threshold: float) -> set[int]:
    """Return rows that MinHashLSH finds alike to an earlier row, not verified."""
    lsh = MinHashLSH(threshold=threshold, num_perm=128)
    found = set()
    for row, members in enumerate(sets):
        signature = MinHash(num_perm=128)
        signature.update_batch("".join(each).encode() for each in members)
        if lsh.query(signature):
            found.add(row)
        else:
            lsh.insert(row, signature)
    return found


def show(name: str, threshold: float, true: set, found: set, seconds: float) -> None:
    right = len(true & found)
    recall = right / len(true)
    precision = right / max(len(found), 1)
    print(
        f"{name:14}  threshold {threshold}: {len(true)} pairs, recall {recall:.4f},"
        f" precision {precision:.4f}, {seconds:.1f} s"
    )


def timed(function: Callable, *arguments: Any) -> tuple[Any, float, float]:
    """Return the result, the seconds, and the seconds of all cores."""
    wall = time.perf_counter()
    cpu = time.process_time()
    result = function(*arguments)
    return result, time.perf_counter() - wall, time.process_time() - cpu


if __name__ == "__main__":
    {"hash": hash_figures, "near": near_figures}[sys.argv[1]]()
