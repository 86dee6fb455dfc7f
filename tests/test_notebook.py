"""The notebook example, as written, with an NNX and with a Linen module."""

import numpy as np
import optax
import pytest
from flax import linen, nnx

import lepton_jax

EXAMPLE = """
print(trainer.plan("v5p:4x4x4"))  # look before you run, on hardware you don't have
history = trainer.fit(train, epochs=10, batch_size=32)
loss, accuracy = trainer.evaluate(test)
labels = trainer.predict(images)
trainer.save("cat_dog_classifier")
"""
HEAD = """
import lepton_jax as lepton
from flax import nnx
"""


class Net(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(12, 3, rngs=rngs)

    def __call__(self, x):
        return self.layer(x)


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(3)(x)


PARTS = {
    "model": Net,
    "loss": lepton_jax.losses.cross_entropy,
    "optimizer": optax.adam(5e-2),
    "metrics": {"accuracy": lepton_jax.metrics.accuracy},
}


@pytest.mark.parametrize(
    ("making", "parts"),
    [
        ("trainer = lepton.Trainer(recipe)", {"train": True}),
        ("trainer = lepton.Trainer(model=Net, **parts)", {}),
        ("trainer = lepton.Trainer(recipe)", {"train": True, "model": LinenNet()}),
        ("trainer = lepton.Trainer(recipe)", {"train": True, "model": LinenNet}),
    ],
    ids=["recipe", "parts", "linen", "linen class"],
)
def test_runs_as_written(
    making,
    parts,
    blobs,
    tmp_path,
    monkeypatch,
    capsys,
):
    monkeypatch.chdir(tmp_path)
    train = (blobs[0][:480], blobs[1][:480])
    test = (blobs[0][480:], blobs[1][480:])
    fields = (
        PARTS
        | {k: v for k, v in parts.items() if k != "train"}
        | ({"train": train} if "train" in parts else {})
    )
    names = {
        "Net": Net,
        "parts": {k: v for k, v in PARTS.items() if k != "model"},
        "train": train,
        "test": test,
        "images": test[0],
        "recipe": lepton_jax.Recipe(**fields),
    }
    exec(HEAD + making + EXAMPLE, names)
    printed = capsys.readouterr().out
    assert "v5p:4x4x4" in printed and "data=64" in printed and "12x3" in printed
    assert names["history"].steps == 150 and names["accuracy"] > 0.9
    assert np.mean(names["labels"] == test[1]) == pytest.approx(names["accuracy"])
    fresh = lepton_jax.Trainer(names["recipe"].with_(train=None)).load(
        "cat_dog_classifier"
    )
    np.testing.assert_array_equal(fresh.predict(test[0]), names["labels"])
    assert fresh.evaluate(test) == (names["loss"], names["accuracy"])
