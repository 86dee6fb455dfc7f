"""Compiled prefill and decoding: a loop of which each call runs some tokens.

A row holds its tokens but the last. A step gives the model that last token, draws the
next from the logits, and takes it for the last. So the prefill needs no logits, and XLA
leaves the head out of it.

    prompts      abc      de.     filled up at the end; "." is no token
    memory       ab       d.      filled = 2, 1
    token        c        e
    after a step abc      de      filled = 3, 2; the tokens drawn are the last ones
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lepton_jax.errors import ModelError, pointing_at_user
from lepton_jax.generation.filters import WHERE, Sampling, draw
from lepton_jax.generation.source import Source


class Carry(NamedTuple):
    """The state of a batch between two calls.

    Attributes:
      memory: of the rows: a cache of keys and values, or their tokens.
      token: the last token of each row, int32 (rows,).
      tokens: those that were drawn, int32 (rows, room).
      step: how many steps were made, int32.
      counts: tokens drawn until a row ended, its end token included, int32 (rows,).
      ended: whether the row drew an end token, bool (rows,).
      is_nan: whether a row's logits held a NaN, bool (rows,).
    """

    memory: Any
    token: jax.Array
    tokens: jax.Array
    step: jax.Array
    counts: jax.Array
    ended: jax.Array
    is_nan: jax.Array


class Draws(NamedTuple):
    """Settings of the draws of a batch.

    Attributes:
      seeds: of the random numbers of each row, uint32 (rows,).
      knobs: see `Sampling.knobs`.
      ends: tokens after which a row is done, int32 (any,).
    """

    seeds: np.ndarray
    knobs: dict[str, Any]
    ends: np.ndarray


class Engine:
    """The compiled functions of a model.

    `begin` and `decode` go in pieces; `whole` goes to the end in one call.

    Args:
      source: the model.
      sampling: which filters are at work; the knobs' values don't count.
      vocab: tokens that may be drawn are below it; None: all of the head's.
      cached: whether to keep keys and values; else each step computes the whole row.
    """

    def __init__(
        self,
        source: Source,
        sampling: Sampling,
        vocab: int | None,
        cached: bool,
    ):
        self.source = source
        self.sampling = sampling
        self.vocab = vocab
        self.memory: Any = Cached(source) if cached else Whole(source)
        options: dict[str, Any] = {}
        if source.replicated is not None:
            others = [source.replicated] * (len(Carry._fields) - 1)
            options = {"out_shardings": Carry._make([None, *others])}
        self._head: int | None = None
        self.begin = source.jit(
            self._begin,
            static_argnames=("slots", "room"),
            **options,
        )
        self.decode = source.jit(self._decode, donate_argnums=1, **options)
        self.whole = source.jit(
            self._whole,
            static_argnames=("slots", "room"),
            **options,
        )

    def head(
        self,
        weights: Any,
    ) -> int:
        """Return how many tokens the model has logits for.

        Raises:
          ModelError: it maps tokens to something else.
        """
        if self._head is None:
            params, variables = weights
            shape = (self.source.rows, 1)
            with pointing_at_user(
                "generating",
                "let the model map tokens (rows, length) to logits (rows, length,"
                " vocab)",
                where=WHERE,
            ):
                logits, _ = jax.eval_shape(
                    self.source.forward,
                    params,
                    variables,
                    jax.ShapeDtypeStruct(shape, jnp.int32),
                    None,
                )
            if logits.shape[:-1] != shape:
                raise ModelError(
                    f"the model maps tokens {shape} to {logits.shape}",
                    where=WHERE,
                    remedy="let it return logits (rows, length, vocab)",
                )
            self._head = logits.shape[-1]
        return self._head

    def _begin(
        self,
        weights: Any,
        tokens: jax.Array,
        lengths: jax.Array,
        *,
        slots: int,
        room: int,
    ) -> Carry:
        """Return the state before the first token.

        Args:
          weights: of the model.
          tokens: the prompts, int32 (rows, width), filled up at the end.
          lengths: of the prompts, int32 (rows,).
          slots: tokens that a row can hold.
          room: tokens that are drawn at most.
        """
        rows = tokens.shape[0]
        last = jnp.take_along_axis(tokens, lengths[:, None] - 1, axis=1)[:, 0]
        memory = self.memory.begin(weights, tokens[:, :-1], lengths - 1, slots)
        return Carry(
            memory,
            last,
            jnp.zeros((rows, room), jnp.int32),
            jnp.int32(0),
            jnp.zeros(rows, jnp.int32),
            jnp.zeros(rows, bool),
            jnp.zeros(rows, bool),
        )

    def _whole(
        self,
        weights: Any,
        tokens: jax.Array,
        lengths: jax.Array,
        draws: Draws,
        until: jax.Array,
        *,
        slots: int,
        room: int,
    ) -> Carry:
        """Do as `_begin` and `_decode` in one call, and return no memory."""
        carry = self._begin(weights, tokens, lengths, slots=slots, room=room)
        return self._decode(weights, carry, draws, until)._replace(memory=None)

    def _decode(
        self,
        weights: Any,
        carry: Carry,
        draws: Draws,
        until: jax.Array,
    ) -> Carry:
        """Draw tokens until a step is reached, or all rows have ended."""

        def goes_on(carry: Carry) -> jax.Array:
            return (carry.step < until) & ~carry.ended.all()

        return jax.lax.while_loop(
            goes_on,
            partial(self._step, weights, draws),
            carry,
        )

    def _step(
        self,
        weights: Any,
        draws: Draws,
        carry: Carry,
    ) -> Carry:
        logits, memory = self.memory.advance(weights, carry.memory, carry.token)
        is_nan = jnp.isnan(logits).any(-1)
        if self.vocab is not None and self.vocab < logits.shape[-1]:
            is_token = jnp.arange(logits.shape[-1]) < self.vocab
            logits = jnp.where(is_token, logits, -jnp.inf)

        keys = None
        if not self.sampling.is_greedy:
            keys = jax.vmap(partial(_key, step=carry.step))(draws.seeds)
        token = draw(keys, logits, self.sampling, draws.knobs)
        tokens = jax.lax.dynamic_update_slice_in_dim(
            carry.tokens, token[:, None], carry.step, axis=1
        )
        is_end = (token[:, None] == draws.ends).any(-1)
        return Carry(
            memory,
            token,
            tokens,
            carry.step + 1,
            carry.counts + ~carry.ended,
            carry.ended | is_end,
            carry.is_nan | (is_nan & ~carry.ended),
        )


def _key(
    seed: Any,
    step: jax.Array,
) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), step)


class Cached:
    """A memory of keys and values."""

    def __init__(self, source: Source):
        assert source.empty is not None
        self._forward = source.forward
        self._empty: Callable[..., Any] = source.empty

    def begin(
        self,
        weights: Any,
        tokens: jax.Array,
        lengths: jax.Array,
        slots: int,
    ) -> Any:
        """Return the memory of rows, int32 (rows, width), of some lengths."""
        rows, width = tokens.shape
        params, variables = weights
        cache = self._empty(params, variables, rows, slots)
        if not width:
            return cache
        _, cache = self._forward(params, variables, tokens, cache)
        # what fills a row up is behind `filled`, and is overwritten later on
        return tuple(layer | {"filled": lengths} for layer in cache)

    def advance(
        self,
        weights: Any,
        memory: Any,
        token: jax.Array,
    ) -> tuple[jax.Array, Any]:
        """Add a token to each row; return the logits (rows, vocab) after it."""
        params, variables = weights
        logits, memory = self._forward(params, variables, token[:, None], memory)
        return logits[:, 0], memory


class Whole:
    """A memory of the tokens alone; each step computes them all."""

    def __init__(self, source: Source):
        self._forward = source.forward

    def begin(
        self,
        weights: Any,
        tokens: jax.Array,
        lengths: jax.Array,
        slots: int,
    ) -> Any:
        """See `Cached.begin`."""
        missing = slots - tokens.shape[1]
        return {
            "tokens": jnp.pad(tokens, ((0, 0), (0, missing))),
            "filled": lengths,
        }

    def advance(
        self,
        weights: Any,
        memory: Any,
        token: jax.Array,
    ) -> tuple[jax.Array, Any]:
        """See `Cached.advance`."""
        filled = memory["filled"]
        rows = jnp.arange(len(filled))
        tokens = memory["tokens"].at[rows, filled].set(token)
        params, variables = weights
        logits, _ = self._forward(params, variables, tokens, None)
        return logits[rows, filled], {"tokens": tokens, "filled": filled + 1}
