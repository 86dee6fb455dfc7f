"""Tokens a second of `lepton.generate`, and of a decoding loop written by hand.

`tools.bench generate`. Both have the same weights (a `TransformerLM` as it is made) and
the same prompts, of one length, and take turns in one process:

  hand      one jitted function of weights and prompts to tokens, for one length of the
            prompt and one number of tokens: a prefill of the whole prompt, and a
            `fori_loop` whose cache is written at one position for all rows. Rotary
            angles are a table; no end token, no stop, no text
  lepton    `lepton.generate` of a trainer as it comes: prompts as lists of token ids,
            rows that could be of different lengths, tokens read back and checked

The greedy tokens of both are compared first. `timing.py` says how slices are sized and
timed.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import lepton_jax as lepton
from lepton_jax.models.transformer import EPSILON
from tools.bench import options as checks
from tools.bench.timing import spread, spread_of_ratios, steps_of_slice, time_in_rounds

SEED = 0


@dataclass(frozen=True)
class Case:
    """A model and how it is asked.

    Attributes:
      size: of `models.transformer_size`.
      rows: prompts at once.
      top_k: tokens that can be drawn, at a temperature of 1; None: greedy.
    """

    size: str
    rows: int
    top_k: int | None = None


CASES = {
    "1m-1": Case("1m", 1),
    "1m-8": Case("1m", 8),
    "1m-8-drawn": Case("1m", 8, 50),
    "10m-1": Case("10m", 1),
    "10m-8": Case("10m", 8),
    "10m-8-drawn": Case("10m", 8, 50),
}


def add(
    commands: Any,
    shared: argparse.ArgumentParser,
) -> None:
    """Add `generate` to the subcommands."""
    parser = checks.add_command(
        commands,
        shared,
        "generate",
        __doc__,
        "tokens a second of decoding, next to a loop by hand",
    )
    parser.add_argument(
        "cases",
        nargs="*",
        metavar="CASE",
        help=f"of {', '.join(CASES)} (default: all)",
    )
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens to generate")
    checks.add_timing(parser, rounds=9, seconds=1.5)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the cases; print and return the figures."""
    names = options.cases or list(CASES)
    checks.check_names(names, CASES, "CASE", "case")
    checks.check_at_least(options, prompt=1, tokens=1, rounds=1)
    checks.check_positive(options, "seconds")
    print(f"{'case':12} {'hand':>9} {'lepton':>9}  tokens a second; lepton/hand")
    return {name: _measured(name, CASES[name], options) for name in names}


def _measured(
    name: str,
    case: Case,
    options: argparse.Namespace,
) -> dict[str, Any]:
    shape = lepton.models.transformer_size(case.size)
    prompts = np.random.default_rng(SEED).integers(
        0, shape["vocab"], (case.rows, options.prompt), np.int32
    )
    trainer = lepton.Trainer(
        model=partial(lepton.models.TransformerLM, **shape),
        loss=lepton.losses.cross_entropy,
        optimizer=optax.identity(),
        train=(prompts, prompts),
        batch_size=case.rows,
        devices=1,
    )
    weights = nnx.to_pure_dict(nnx.state(trainer.module(), nnx.Param))
    hand = jax.jit(
        partial(
            by_hand,
            heads=shape["heads"],
            theta=shape["theta"],
            count=options.tokens,
            top_k=case.top_k,
        )
    )
    keys = jax.random.split(jax.random.key(SEED), case.rows)
    rows = prompts.tolist()
    draw = {} if case.top_k is None else {"temperature": 1.0, "top_k": case.top_k}

    def run_hand(calls: int) -> Any:
        for _ in range(calls):
            tokens = np.asarray(hand(weights, prompts, keys))
        return tokens

    def run_lepton(calls: int) -> Any:
        for _ in range(calls):
            tokens = lepton.generate(trainer, rows, tokens=options.tokens, **draw)
        return np.stack([row.tokens for row in tokens])

    same = None
    if case.top_k is None:
        same = bool((run_hand(1) == run_lepton(1)).all())
    runs = {"hand": run_hand, "lepton": run_lepton}
    calls = {k: steps_of_slice(each, options.seconds, 1) for k, each in runs.items()}
    ms = time_in_rounds(runs, calls, options.rounds)
    made = case.rows * options.tokens
    rates = {
        key: spread([made / each * 1e3 for each in times]) for key, times in ms.items()
    }
    ratio = spread_of_ratios(ms["hand"], ms["lepton"])
    medians = [rates[key]["median"] for key in ("hand", "lepton")]
    shown = f"{medians[0]:9,.0f} {medians[1]:9,.0f}  {ratio['median']:.3f}"
    print(f"{name:12} {shown}{'' if same is None else f'  same tokens: {same}'}")
    return {"tokens_per_second": rates, "ratio": ratio, "same_tokens": same}


# ---- the loop by hand ----


def by_hand(
    weights: Any,
    prompts: jax.Array,
    keys: jax.Array,
    *,
    heads: int,
    theta: float,
    count: int,
    top_k: int | None,
) -> jax.Array:
    """Return tokens after prompts (rows, length), int32 (rows, count)."""
    rows, length = prompts.shape
    slots = length + count
    layers = [weights["blocks"][i] for i in range(len(weights["blocks"]))]
    head = weights["embed"]["embedding"].shape[1] // heads
    frequencies = theta ** (-jnp.arange(head // 2) / (head // 2))
    angles = jnp.arange(slots)[:, None] * frequencies
    tables = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    empty = jnp.zeros((rows, slots, heads, head))

    def forward(
        tokens: jax.Array,
        caches: Any,
        start: Any,
    ) -> Any:
        x = weights["embed"]["embedding"][tokens]
        size = tokens.shape[1]
        cos, sin = (
            jax.lax.dynamic_slice_in_dim(table, start, size) for table in tables
        )
        own = start + jnp.arange(size)
        mask = jnp.arange(slots) <= own[:, None]
        filled = []
        for layer, (keys_, values) in zip(layers, caches, strict=True):
            h = norm(x, layer["attention_norm"])
            parts = layer["attention"]
            query, key, value = (
                (h @ parts[name]["kernel"]).reshape(rows, size, heads, head)
                for name in ("query", "key", "value")
            )
            place = (0, start, 0, 0)
            keys_ = jax.lax.dynamic_update_slice(keys_, turn(key, cos, sin), place)
            values = jax.lax.dynamic_update_slice(values, value, place)
            filled.append((keys_, values))
            scores = jnp.einsum("bqhd,bshd->bhqs", turn(query, cos, sin), keys_)
            scores = jnp.where(mask, scores / head**0.5, -jnp.inf)
            mixed = jnp.einsum("bhqs,bshd->bqhd", jax.nn.softmax(scores), values)
            x = x + mixed.reshape(rows, size, -1) @ parts["out"]["kernel"]

            h = norm(x, layer["feed_forward_norm"])
            x = x + fed_forward(h, layer["feed_forward"])
        last = norm(x[:, -1], weights["norm"])
        return last @ weights["embed"]["embedding"].T, filled

    def step(
        i: Any,
        carry: Any,
    ) -> Any:
        tokens, token, caches = carry
        logits, caches = forward(token[:, None], caches, length + i - 1)
        token = drawn(logits, keys, i, top_k)
        return tokens.at[:, i].set(token), token, caches

    logits, caches = forward(prompts, [(empty, empty)] * len(layers), 0)
    token = drawn(logits, keys, 0, top_k)
    tokens = jnp.zeros((rows, count), jnp.int32).at[:, 0].set(token)
    return jax.lax.fori_loop(1, count, step, (tokens, token, caches))[0]


def fed_forward(x: jax.Array, parts: Any) -> jax.Array:
    """Return SwiGLU of x (rows, length, dim)."""
    gate = jax.nn.silu(x @ parts["gate"]["kernel"])
    hidden = gate * (x @ parts["up"]["kernel"])
    return hidden @ parts["down"]["kernel"]


def drawn(
    logits: jax.Array,
    keys: jax.Array,
    step: Any,
    top_k: int | None,
) -> jax.Array:
    """Return the next tokens, int32 (rows,): the best, or drawn of the best `top_k`."""
    if top_k is None:
        return logits.argmax(-1).astype(jnp.int32)
    own = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
    best, tokens = jax.lax.top_k(logits, top_k)
    chosen = jax.vmap(jax.random.categorical)(own, best)
    return jnp.take_along_axis(tokens, chosen[:, None], axis=1)[:, 0]


def norm(
    x: jax.Array,
    weights: Any,
) -> jax.Array:
    """Return RMSNorm."""
    mean = jnp.square(x).mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(mean + EPSILON) * weights["scale"]


def turn(
    x: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
) -> jax.Array:
    """Return rotary positions of x (rows, length, heads, head)."""
    left, right = jnp.split(x, 2, axis=-1)
    return jnp.concatenate(
        [left * cos - right * sin, right * cos + left * sin], axis=-1
    )
