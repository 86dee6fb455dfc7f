"""A trained model with weights that are large enough to quantize."""

from functools import partial

import numpy as np
import optax

import lepton_jax as lepton

FEATURES = (12, 64, 32, 3)


def trained(steps=30, features=FEATURES, **changes) -> lepton.Trainer:
    """12 numbers to 3 classes, which a linear model can tell apart."""
    draw = np.random.default_rng(0)
    inputs = draw.normal(size=(800, 12)).astype(np.float32)
    labels = (inputs @ draw.normal(size=(12, 3))).argmax(1).astype(np.int32)
    common = {
        "name": "halves",
        "model": partial(lepton.models.MLP, features),
        "loss": lepton.losses.cross_entropy,
        "metrics": {"accuracy": lepton.metrics.accuracy},
        "optimizer": optax.adamw,
        "learning_rate": 1e-2,
        "train": (inputs[:400], labels[:400]),
        "test": (inputs[400:], labels[400:]),
        "steps": steps,
        "batch_size": 32,
    }
    trainer = lepton.Trainer(lepton.Recipe(**(common | changes)), devices=1)
    trainer.fit()
    return trainer
