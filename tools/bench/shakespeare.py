"""Validation loss of a small model on tiny Shakespeare, character by character.

`tools.bench shakespeare --text input.txt --folder DIR`. The split is nanoGPT's: the
first nine tenths are learned, the last is for validation, here in rows one after the
other.
The model has 3 million parameters: blocks of the Llama shape with dropout, since the
million characters are seen many times. The optimizer is Muon for kernels of the blocks,
Adam for the rest.

The run is kept in DIR, and the same command goes on with it, wherever it was stopped;
`--minutes` stops it by itself.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

import lepton_jax as lepton
from lepton_jax.models.transformer import EPSILON, Block, SwiGLU
from lepton_jax.step import optimizers
from tools.bench import options as checks

SEED = 0
THETA = 10_000.0
TEST_SHARE = 0.1
SAVE_EVERY = 50  # steps


class DropoutLM(nnx.Module):
    """`TransformerLM` with dropout after the embedding and each block's two parts.

    Args:
      vocab: number of tokens.
      dim: width; also heads, layers and hidden as in `TransformerLM`.
      layers: blocks.
      heads: of the attention.
      hidden: width of the feed-forward layers.
      dropout: share of the entries that are left out in training.
      rngs: streams `params` and `dropout`.
    """

    def __init__(
        self,
        vocab: int,
        *,
        dim: int,
        layers: int,
        heads: int,
        hidden: int,
        dropout: float,
        rngs: nnx.Rngs,
    ):
        def feed_forward(rngs: nnx.Rngs) -> SwiGLU:
            return SwiGLU(dim, hidden, rngs=rngs)

        def block() -> Block:
            return Block(dim, heads, heads, THETA, feed_forward, rngs=rngs)

        self.embed = nnx.Embed(vocab, dim, rngs=rngs)
        self.blocks = nnx.List([block() for _ in range(layers)])
        self.norm = nnx.RMSNorm(dim, epsilon=EPSILON, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(
        self,
        tokens: jax.Array,
    ) -> jax.Array:
        """Map tokens int32 (batch, length) to logits (batch, length, vocab)."""
        x = self.dropout(self.embed(tokens))
        for block in self.blocks:
            x = x + self.dropout(block.attention(block.attention_norm(x)))
            x = x + self.dropout(block.feed_forward(block.feed_forward_norm(x)))
        return self.embed.attend(self.norm(x))


def add(
    commands: Any,
    shared: argparse.ArgumentParser,
) -> None:
    """Add `shakespeare` to the subcommands."""
    parser = checks.add_command(
        commands,
        shared,
        "shakespeare",
        __doc__,
        "validation loss on tiny Shakespeare",
    )
    add = parser.add_argument
    add("--text", type=Path, required=True, metavar="FILE", help="tiny Shakespeare")
    add("--folder", type=Path, required=True, metavar="DIR", help="folder of the run")
    add("--tokens", type=float, default=20e6, help="to learn (default: 20e6)")
    add("--length", type=int, default=256, help="characters of a row")
    add("--batch", type=int, default=32, help="rows of a step")
    add("--dropout", type=float, default=0.1, help="share (default: %(default)s)")
    add("--rate", type=float, default=0.02, help="of Muon (default: %(default)s)")
    add("--adam", type=float, default=0.15, help="Adam's rate, as a share of Muon's")
    add("--minutes", type=float, help="after which no more steps are made")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train as far as the time goes; print and return the figures."""
    until = time.monotonic() + 60 * (options.minutes or np.inf)
    recipe = recipe_of(options)
    trainer = lepton.Trainer(recipe, run_dir=options.folder, devices=1)
    if list((options.folder / "checkpoints").glob("*")):
        trainer.resume()
    assert recipe.steps is not None
    while trainer.step < recipe.steps and time.monotonic() < until:
        began = time.monotonic()
        trainer.fit(steps=min(SAVE_EVERY, recipe.steps - trainer.step))
        each = (time.monotonic() - began) / SAVE_EVERY
        print(f"step {trainer.step} of {recipe.steps}, {each:.2f} s a step", flush=True)

    seen = trainer.step * options.batch * options.length
    entries = sum(leaf.size for leaf in jax.tree.leaves(trainer.state.params))
    results = {
        "parameters": entries,
        "tokens": seen,
        "steps": trainer.step,
        "finished": trainer.step == recipe.steps,
        "validation_loss": float(trainer.evaluate()[0]),
    }
    for name, value in results.items():
        print(f"{name:16} {value}")
    return results


def recipe_of(options: argparse.Namespace) -> lepton.Recipe:
    """Return the recipe of the options."""
    characters = options.text.read_text()
    alphabet, tokens = np.unique(list(characters), return_inverse=True)
    cut = round((1 - TEST_SHARE) * len(tokens))
    steps = round(options.tokens / (options.batch * options.length))
    rate = optax.warmup_cosine_decay_schedule(
        0.0, options.rate, max(1, steps // 20), steps, 0.02 * options.rate
    )

    def adam(rate: Any) -> optax.GradientTransformation:
        def own(count: Any) -> Any:
            return options.adam * rate(count)

        return optax.adamw(own, b2=0.95, weight_decay=0.0)

    return lepton.Recipe(
        name="shakespeare",
        model=partial(
            DropoutLM,
            len(alphabet),
            dim=256,
            layers=4,
            heads=4,
            hidden=640,
            dropout=options.dropout,
        ),
        loss=lepton.losses.cross_entropy,
        optimizer=optimizers.by_part(
            {"blocks/*/kernel": partial(optax.contrib.muon, weight_decay=0.05)},
            default=adam,
        ),
        learning_rate=rate,
        clip_norm=1.0,
        train=shifted(tokens[:cut], options.length),
        test=_rows(tokens[cut:], options.length),
        batch_size=options.batch,
        steps=steps,
        save_every=SAVE_EVERY,
        evaluate_every=10 * SAVE_EVERY,
        seed=SEED,
    )


def shifted(
    tokens: np.ndarray,
    length: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Return rows that begin at every half of a row, so that each cut is inside one."""
    first = _rows(tokens, length)
    second = _rows(tokens[length // 2 :], length)
    inputs, targets = (np.concatenate(pair) for pair in zip(first, second, strict=True))
    return inputs, targets


def _rows(
    tokens: np.ndarray,
    length: int,
) -> tuple[np.ndarray, np.ndarray]:
    count = (len(tokens) - 1) // length
    inputs = tokens[: count * length].reshape(count, length)
    targets = tokens[1 : count * length + 1].reshape(count, length)
    return inputs.astype(np.int32), targets.astype(np.int32)
