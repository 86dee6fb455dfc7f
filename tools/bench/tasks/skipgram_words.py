"""Words of Shakespeare's plays: skip-gram with negative samples.

Mikolov et al. 2013, "Distributed Representations of Words and Phrases and their
Compositionality". Each step touches few rows of the tables: gradients are sparse.
"""

import re
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

VOCABULARY = 1500  # the most frequent words
NEGATIVES = 4  # of a sample
SAMPLES = 60000
WINDOW = 3  # words to either side


class SkipGram(nnx.Module):
    """A table of words and one of their neighbours, which begins at 0."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        zeros = nnx.initializers.zeros
        self.words = nnx.Embed(VOCABULARY, dim, rngs=rngs)
        self.neighbours = nnx.Embed(VOCABULARY, dim, embedding_init=zeros, rngs=rngs)

    def __call__(self, word: jax.Array, others: jax.Array) -> jax.Array:
        """Map (batch,) and (batch, others) to logits (batch, others)."""
        return jnp.einsum("bd,bod->bo", self.words(word), self.neighbours(others))


def task(data: Path) -> tasks.Task:
    """Return the task."""
    text = tasks.text_of(data / "tinyshakespeare" / "input.txt").lower()
    words = re.findall(r"[a-z']+", text)
    frequent = [word for word, _ in Counter(words).most_common(VOCABULARY)]
    number = {word: index for index, word in enumerate(frequent)}
    tokens = np.asarray([number[word] for word in words if word in number], np.int32)

    random = np.random.default_rng(6)
    centers = random.integers(WINDOW, len(tokens) - WINDOW, SAMPLES)
    away = random.integers(1, WINDOW + 1, SAMPLES) * random.choice([-1, 1], SAMPLES)
    negatives = tokens[random.integers(0, len(tokens), (SAMPLES, NEGATIVES))]
    others = np.concatenate([tokens[centers + away][:, None], negatives], 1)
    wanted = np.zeros(others.shape, np.float32)
    wanted[:, 0] = 1
    samples = Arrays({"word": tokens[centers], "others": others}, wanted)
    return tasks.task_of(
        partial(SkipGram, 16),
        tasks.three(samples, 0.05, 0.1),
        600,
        128,
        loss=losses.binary_cross_entropy,
    )
