"""A real model from its folder: logits, opening, export to the bit, more training.

The model is stories260K (Karpathy, llama2.c, MIT): 260,032 parameters, 512 tokens.
"""

from __future__ import annotations

import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optax
from flax import nnx
from safetensors.numpy import load_file

import lepton_jax as lepton
from tools.hub import reference

OPENING = "Once upon a time, there was a little girl named Lily"
WORDS = 200  # tokens of the text that is compared
CHARACTERS = 60_000  # of the text that is trained on; assumption
LENGTH = 128  # tokens of a sample
STEPS = 60
BEGIN = 1  # the token that begins a text


def look(folder: Path, text: Path) -> dict[str, Any]:
    """Return what the model does, before training and after.

    Args:
      folder: with `hf/` and `tok512.bin`.
      text: a file to train on.
    """
    opened = lepton.hub.open(folder / "hf")
    module = opened.module()
    pieces = pieces_of(folder / "tok512.bin")
    tokens = _greedy(module, WORDS)
    tensors = load_file(folder / "hf" / "model.safetensors")
    right = reference.logits(opened.config, tensors, tokens)
    ours = np.asarray(_run(module, tokens[None])[0], np.float64)
    said = b"".join(pieces[token] for token in tokens[1:]).decode(errors="replace")

    samples = _samples(encode(text.read_text()[:CHARACTERS], pieces))
    trainer = lepton.Trainer(
        model=opened.model,
        loss=lepton.losses.cross_entropy,
        optimizer=partial(optax.adamw, weight_decay=0.0),
        learning_rate=1e-3,
        train=(samples[:-8, :-1], samples[:-8, 1:]),
        test=(samples[-8:, :-1], samples[-8:, 1:]),
        batch_size=8,
    )
    opened.load_into(trainer)
    with tempfile.TemporaryDirectory() as place:
        out = lepton.hub.save(trainer, Path(place) / "out", like=opened)
        names = ("model.safetensors", "config.json")
        same = {name: _same(folder / "hf" / name, out / name) for name in names}
    before = trainer.evaluate().loss
    trainer.fit(steps=STEPS)
    after = trainer.evaluate().loss
    error = float(np.abs(ours - right).max())
    return {
        "tokens": len(tokens),
        "logit_most": error,
        "opening": said[: len(OPENING) + 1],
        "same": same,
        "loss_before": float(before),
        "loss_after": float(after),
        "passes": all(
            (
                error <= 1e-4,
                said.strip().startswith(OPENING),
                all(same.values()),
                after < before,
            )
        ),
    }


def pieces_of(path: Path) -> list[bytes]:
    """Return the pieces of a tokenizer file of llama2.c.

    Each is a score (float32), a length (int32) and the bytes, after an int32.
    """
    content = path.read_bytes()
    place = 4
    pieces = []
    while place < len(content):
        length = int.from_bytes(content[place + 4 : place + 8], "little")
        pieces.append(content[place + 8 : place + 8 + length])
        place += 8 + length
    return pieces


def encode(text: str, pieces: list[bytes]) -> np.ndarray:
    """Return tokens of a text, the longest piece first; unknown characters drop."""
    numbers = {piece: number for number, piece in enumerate(pieces) if number > 2}
    longest = max(map(len, numbers))
    content = text.encode()
    tokens = [BEGIN]
    place = 0
    while place < len(content):
        ends = range(min(place + longest, len(content)), place, -1)
        end = next((end for end in ends if content[place:end] in numbers), None)
        if end is not None:
            tokens.append(numbers[content[place:end]])
        place = place + 1 if end is None else end
    return np.asarray(tokens, np.int32)


# ---- internals ----


@nnx.jit
def _run(module: Any, tokens: Any, **more: Any) -> Any:
    return module(tokens, **more)


def _greedy(module: Any, count: int) -> np.ndarray:
    cache = module.empty_cache(1, count)
    tokens = [BEGIN]
    while len(tokens) < count:
        last = np.asarray([[tokens[-1]]], np.int32)
        logits, cache = _run(module, last, cache=cache)
        tokens.append(int(logits[0, -1].argmax()))
    return np.asarray(tokens, np.int32)


def _samples(tokens: np.ndarray) -> np.ndarray:
    rows = len(tokens) // (LENGTH + 1)
    return tokens[: rows * (LENGTH + 1)].reshape(rows, LENGTH + 1)


def _same(left: Path, right: Path) -> bool:
    if left.suffix == ".json":
        return json.loads(left.read_text()) == json.loads(right.read_text())
    return left.read_bytes() == right.read_bytes()
