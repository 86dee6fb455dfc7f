"""A transformer trained on Shakespeare's plays, fine-tuned on sentences of reviews."""

import io
import zipfile
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import optax

from lepton_jax.data import Arrays
from lepton_jax.models import TransformerLM
from tools.bench import controller_tasks as tasks

CHARACTERS = 128  # ASCII
LENGTH = 32
PRETRAINED = 400  # steps, AdamW, cosine from 0.01

MODEL = partial(TransformerLM, CHARACTERS, dim=32, layers=1, heads=2, hidden=64)


def task(data: Path) -> tasks.Task:
    """Return the task."""
    samples = tasks.next_tokens(_reviews(data), LENGTH)
    train, validation, report = tasks.in_order(samples, 0.05, 0.05)
    parts = (
        tasks.first(train, 4000),
        tasks.first(validation, 150),
        tasks.first(report, 300),
    )
    model = tasks.restored(MODEL, _pretrained(data))
    return tasks.task_of(model, parts, 400, 16)


def _reviews(data: Path) -> np.ndarray:
    """Return the characters of the sentences, mixed."""
    packed = zipfile.ZipFile(
        io.BytesIO(tasks.bytes_of(data / "rt_polarity" / "sentence_polarity.zip"))
    )
    names = [name for name in packed.namelist() if "polarity." in name]
    lines = [line for name in names for line in packed.read(name).splitlines()]
    mixed = np.random.default_rng(7).permutation(len(lines))
    text = b"\n".join(lines[index] for index in mixed)
    return np.frombuffer(text, np.uint8).astype(np.int32) % CHARACTERS


@cache
def _pretrained(data: Path) -> Any:
    """Return the parameters after a training on the plays."""
    text = tasks.bytes_of(data / "tinyshakespeare" / "input.txt")
    tokens = np.frombuffer(text, np.uint8).astype(np.int32) % CHARACTERS
    samples = tasks.next_tokens(tokens, LENGTH)
    few = Arrays(samples.inputs[:64], samples.targets[:64])
    recipe = tasks.recipe_of(MODEL, samples, few, PRETRAINED, 32)
    schedule = optax.cosine_decay_schedule(0.01, PRETRAINED)
    return tasks.trained(recipe.with_(learning_rate=schedule))
