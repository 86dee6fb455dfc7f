"""Training speed of Keras on JAX: see `_speed.py` and `python -m tools.bench peers`.

`model.fit` as it comes, on arrays, with the accuracy as a metric.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"

import jax
import keras
import numpy as np
from _speed import arrays, serve
from keras import layers, ops


def mlp(widths: list[int]) -> keras.Sequential:
    """Return dense layers with ReLU between them."""
    last = len(widths) - 1
    return keras.Sequential(
        layers.Dense(width, activation=None if i == last else "relu")
        for i, width in enumerate(widths)
    )


def of_digits(spec: dict[str, Any]) -> keras.Model:
    """Return the MLP 784-128-10."""
    return mlp([128, 10])


def cnn(spec: dict[str, Any]) -> keras.Model:
    """Return the zoo's CNN."""
    conv = [
        layers.Conv2D(width, 3, padding="same", activation="relu")
        for width in (32, 64, 64)
    ]
    return keras.Sequential(
        [
            conv[0],
            layers.MaxPooling2D(2),
            conv[1],
            layers.MaxPooling2D(2),
            conv[2],
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(10),
        ]
    )


def lstm(spec: dict[str, Any]) -> keras.Model:
    """Return embedding, LSTM, the mean over the words, and logits."""
    return keras.Sequential(
        [
            layers.Embedding(spec["vocab"], spec["dim"], mask_zero=True),
            layers.LSTM(spec["hidden"], return_sequences=True),
            layers.GlobalAveragePooling1D(),
            layers.Dense(2),
        ]
    )


def encoder(spec: dict[str, Any]) -> keras.Model:
    """Return a Transformer encoder with learned positions, and logits."""
    dim = spec["dim"]
    tokens = keras.Input((spec["length"],), dtype="int32")
    present = ops.not_equal(tokens, 0)
    places = ops.arange(spec["length"])[None]
    x = layers.Embedding(spec["vocab"], dim)(tokens)
    x = x + layers.Embedding(spec["length"], dim)(places)
    for _ in range(spec["layers"]):
        y = layers.LayerNormalization(epsilon=1e-5)(x)
        attention = layers.MultiHeadAttention(spec["heads"], dim // spec["heads"])
        x = x + attention(y, y, attention_mask=present[:, None, :])
        y = layers.LayerNormalization(epsilon=1e-5)(x)
        y = layers.Dense(4 * dim, activation=keras.activations.gelu)(y)
        x = x + layers.Dense(dim)(y)
    x = layers.LayerNormalization(epsilon=1e-5)(x)
    weight = ops.cast(present[..., None], "float32")
    mean = ops.sum(x * weight, 1) / ops.sum(weight, 1)
    return keras.Model(tokens, layers.Dense(2)(mean))


def two_tower(spec: dict[str, Any]) -> keras.Model:
    """Return the product of a user's and an item's vector."""
    inputs = []
    vectors = []
    for count in (spec["users"], spec["items"]):
        index = keras.Input((), dtype="int32")
        embedded = layers.Embedding(count, spec["dim"])(index)
        inputs.append(index)
        vectors.append(mlp([128, 64])(embedded))
    return keras.Model(inputs, ops.sum(vectors[0] * vectors[1], -1))


def table_mlp(spec: dict[str, Any]) -> keras.Model:
    """Return piecewise-linear codes, embeddings of categories, and an MLP."""
    edges = np.asarray(spec["edges"], np.float32)
    low = edges[:, :-1]
    width = np.diff(edges)
    bins = width.shape[1]
    least = np.zeros(bins, np.float32)
    least[0] = -np.inf
    most = np.ones(bins, np.float32)
    most[-1] = np.inf
    sizes = np.asarray(spec["sizes"], np.int32)
    starts = (np.cumsum(sizes) - sizes).astype(np.int32)

    numbers = keras.Input((len(edges),))
    categories = keras.Input((len(sizes),), dtype="int32")
    absent = ops.isnan(numbers)[..., None]
    codes = (numbers[..., None] - low) / width
    codes = ops.minimum(ops.maximum(codes, least), most)
    codes = ops.where(absent, 0.0, codes)
    codes = ops.concatenate([codes, ops.cast(absent, "float32")], -1)
    embed = layers.Embedding(int(sizes.sum()), spec["embedding"])
    embedded = embed(categories + starts)
    flat = [layers.Flatten()(codes), layers.Flatten()(embedded)]
    x = layers.Concatenate()(flat)
    return keras.Model([numbers, categories], mlp([256, 128, 2])(x))


MODELS = {
    "mlp": of_digits,
    "cnn": cnn,
    "lstm": lstm,
    "encoder": encoder,
    "two_tower": two_tower,
    "table_mlp": table_mlp,
}


def make(spec: dict[str, Any]) -> tuple[Callable[[int], float], dict[str, Any]]:
    """Return what trains a case, and what is said of it."""
    keras.utils.set_random_seed(0)
    inputs, targets = arrays(spec["file"])
    model = MODELS[spec["case"]](spec)
    is_real = np.issubdtype(targets.dtype, np.floating)
    loss = (
        keras.losses.MeanSquaredError()
        if is_real
        else keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    metrics = [] if is_real else ["accuracy"]
    model.compile(keras.optimizers.Adam(1e-3), loss, metrics=metrics)
    batch = spec["batch"]
    in_epoch = len(targets) // batch

    def fit(steps: int, epochs: int = 1) -> float:
        rows = steps * batch
        x = [value[:rows] for value in inputs]
        history = model.fit(
            x if len(x) > 1 else x[0],
            targets[:rows],
            batch_size=batch,
            epochs=epochs,
            verbose=0,
        )
        return history.history["loss"][-1]

    def run(steps: int) -> float:
        epochs, rest = divmod(steps, in_epoch)
        loss = fit(in_epoch, epochs) if epochs else 0.0
        return fit(rest) if rest else loss

    fit(1)  # a sequential model is built by its first batch
    about = {
        "version": f"{keras.__version__} on jax {jax.__version__}",
        "parameters": model.count_params(),
    }
    return run, about


if __name__ == "__main__":
    serve(make)
