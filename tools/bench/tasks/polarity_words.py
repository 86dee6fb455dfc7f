"""Sentences of film reviews, good or bad: the mean of their words' vectors."""

import io
import re
import zipfile
from collections import Counter
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lepton_jax import losses
from lepton_jax.data import Arrays
from tools.bench import controller_tasks as tasks

VOCABULARY = 3000  # the most frequent words, from 1; 0 is padding
LENGTH = 24  # words of a sentence that count


class Bag(nnx.Module):
    """Vectors of words, their mean, and a logit."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.words = nnx.Embed(VOCABULARY + 1, dim, rngs=rngs)
        self.out = nnx.Linear(dim, 1, rngs=rngs)

    def __call__(self, words: jax.Array) -> jax.Array:
        """Map int32 (batch, 24) to logits (batch,)."""
        present = (words > 0)[..., None]
        total = (self.words(words) * present).sum(1)
        return self.out(total / jnp.maximum(present.sum(1), 1))[:, 0]


def task(data: Path) -> tasks.Task:
    """Return the task."""
    file = data / "rt_polarity" / "sentence_polarity.zip"
    packed = zipfile.ZipFile(io.BytesIO(tasks.bytes_of(file)))
    sentences = []
    labels = []
    for name, label in (("neg", 0.0), ("pos", 1.0)):
        text = packed.read(f"sentence_polarity/rt-polarity.{name}").decode("latin-1")
        lines = [re.findall(r"[a-z']+", line) for line in text.splitlines()]
        sentences += lines
        labels += [label] * len(lines)
    counts = Counter(word for words in sentences for word in words)
    common = [word for word, _ in counts.most_common(VOCABULARY)]
    number = {word: index for index, word in enumerate(common, 1)}
    rows = np.zeros((len(sentences), LENGTH), np.int32)
    for row, words in zip(rows, sentences, strict=True):
        known = [number[word] for word in words if word in number][:LENGTH]
        row[: len(known)] = known
    parts = tasks.three(Arrays(rows, np.asarray(labels, np.float32)), 0.1, 0.2)
    return tasks.task_of(
        partial(Bag, 16), parts, 480, 64, loss=losses.binary_cross_entropy
    )
