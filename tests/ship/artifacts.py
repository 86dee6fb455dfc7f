"""Small trained models of three kinds, for tests of what is made of them.

Each function trains for some steps, in about a second with quick compilation; a test
file makes one artifact of it in a fixture for the whole module.
"""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path

import numpy as np
import optax
import polars as pl

import lepton_jax as lepton
from lepton_jax.data.prepare import Images, Preparation, Serving, prepare
from lepton_jax.data.prepare.steps.categories import Classes, Vocabulary
from lepton_jax.data.prepare.steps.missing import FillMissing
from lepton_jax.data.prepare.steps.model_inputs import AsFloats
from lepton_jax.data.prepare.steps.scaling import Standardize
from lepton_jax.data.prepare.steps.splitting import Split
from lepton_jax.data.readers import reader_of
from tests.data.preparing import Memory

ROWS = 300
STEPS = 20


def numbers() -> lepton.Trainer:
    """A model of arrays alone: 12 numbers to 3 classes."""
    draw = np.random.default_rng(0)
    inputs = draw.normal(size=(ROWS, 12)).astype(np.float32)
    labels = (inputs @ draw.normal(size=(12, 3))).argmax(1).astype(np.int32)
    return _fitted(
        name="numbers",
        model=partial(lepton.models.MLP, (12, 16, 3), dropout=0.1),
        train=(inputs[:200], labels[:200]),
        test=(inputs[200:], labels[200:]),
    )


def people(folder: Path) -> lepton.Trainer:
    """A model of raw rows: ages and hours, which may be missing, and jobs."""
    draw = np.random.default_rng(0)
    table = pl.DataFrame(
        {
            "age": draw.integers(17, 90, ROWS),
            "hours": [None if i % 11 == 0 else float(i % 50) for i in range(ROWS)],
            "job": draw.choice(["clerk", "smith", "cook"], ROWS),
        }
    )
    is_sick = (pl.col("age") > 40) & (pl.col("job") != "clerk")
    sick = pl.when(is_sick).then(pl.lit("yes")).otherwise(pl.lit("no"))
    preparation = Preparation(
        {"people": Memory(table.with_columns(sick.alias("sick")))},
        [
            Split(test=0.3),
            FillMissing("hours", by="median"),
            Standardize(["age", "hours"]),
            AsFloats(["age", "hours"]),
            Vocabulary("job"),
            Classes("sick"),
        ],
        inputs=["age", "hours", "job"],
        target="sick",
    )
    inputs = {"numbers": ["age", "hours"], "categories": ["job"]}
    serving = Serving(prepare(preparation, folder), inputs)
    model = partial(
        lepton.models.TabularMLP,
        2,
        edges=((-1.0, 0.0, 1.0),) * 2,
        sizes=(4,),
        hidden=(16,),
    )
    return _fitted(
        name="people",
        model=model,
        train=serving.split(),
        test=serving.split("test"),
        preparation=serving,
    )


def pictures(folder: Path) -> lepton.Trainer:
    """A model of picture files: bright or dark squares of 8 pixels."""
    draw = np.random.default_rng(0)
    for number, level in enumerate(draw.choice([40, 210], 60)):
        place = folder / "pictures" / ("bright" if level > 100 else "dark")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.png").write_bytes(_png(level, draw))
    preparation = Preparation(
        {"pictures": reader_of(folder / "pictures", format="images")},
        [
            Images("bytes", size=(8, 8), mode="L", broken="drop"),
            Split(test=0.4),
            Classes("label"),
        ],
        inputs=["bytes"],
        target="label",
    )
    serving = Serving(prepare(preparation, folder / "prepared"), "bytes")
    return _fitted(
        name="pictures",
        model=partial(lepton.models.MLP, (64, 8, 2)),
        preprocess=_flat,
        train=serving.split(),
        test=serving.split("test"),
        preparation=serving,
    )


def _fitted(**fields) -> lepton.Trainer:
    common = {
        "loss": lepton.losses.cross_entropy,
        "metrics": {"accuracy": lepton.metrics.accuracy},
        "optimizer": optax.adamw,
        "learning_rate": 1e-2,
        "steps": STEPS,
        "batch_size": 32,
    }
    trainer = lepton.Trainer(lepton.Recipe(**(common | fields)), devices=1)
    trainer.fit()
    return trainer


def _flat(pixels):
    return pixels.reshape(pixels.shape[0], -1) / 255.0


def _png(level: int, draw: np.random.Generator) -> bytes:
    from PIL import Image

    noise = draw.integers(-20, 20, (8, 8))
    buffer = io.BytesIO()
    Image.fromarray((level + noise).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()
