"""The decoder that published language models have in common.

`DecoderShape` says in plain numbers in what Llama, Mistral, Qwen, Gemma and GPT-2
differ; `DecoderLM` is the module. Names of its parameters are those of
`TransformerLM`: `embed`, `blocks/0/attention/query`, ..., `norm`, `head`.

Example: two layers of Llama's kind, the second of which looks back over four tokens,
its own among them.

>>> shape = DecoderShape(16, dim=8, layers=2, heads=2, hidden=12, windows=(None, 4))
>>> model = DecoderLM(shape, rngs=nnx.Rngs(0))
>>> model(jnp.zeros((1, 6), jnp.int32)).shape
(1, 6, 16)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lepton_jax.models.transformer import Cache, Layer, appended, same_segment

Activation = Callable[[jax.Array], jax.Array]
ACTIVATIONS: dict[str, Activation] = {
    "silu": nnx.silu,
    "gelu": partial(nnx.gelu, approximate=False),
    "gelu_tanh": partial(nnx.gelu, approximate=True),
    "relu": nnx.relu,
}
# Angle of a whole turn, in radians.
TURN = 2 * math.pi
# Width that keeps YaRN's ramp from dividing by zero (Peng et al. 2023, published code).
LEAST_RAMP = 0.001


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Frequencies of rotary positions (Su et al. 2021), and their scaling.

    Attributes:
      theta: base of the frequencies: pair i of a head of size d turns by
        theta^(-2i/d) radians a position.
      kind: "default": no scaling; "linear": all are divided by `factor` (Chen et al.
        2023); "dynamic": theta grows with a text that is longer than `original`;
        "llama3": slow ones are divided by `factor` (Dubey et al. 2024, section 3.4.1);
        "yarn": the same by another ramp (Peng et al. 2023, "YaRN").
      factor: how many times longer the texts may be.
      original: tokens of the longest text before the scaling.
      low: of "llama3": turns in `original` below which a frequency is slow.
      high: of "llama3": turns in `original` above which it stays as it is.
      fast: of "yarn": turns in `original` above which a frequency stays as it is.
      slow: of "yarn": turns below which it is divided.
      truncate: of "yarn": whether the ramp begins and ends at whole pairs.
      amplitude: of "yarn": factor of queries and keys.
    """

    theta: float = 10_000.0
    kind: Literal["default", "linear", "dynamic", "llama3", "yarn"] = "default"
    factor: float = 1.0
    original: int = 0
    low: float = 1.0
    high: float = 4.0
    fast: float = 32.0
    slow: float = 1.0
    truncate: bool = True
    amplitude: float = 1.0

    def frequencies(self, size: int) -> np.ndarray:
        """Return radians a position, float64 (size / 2,), for a head of a size."""
        exponents = np.arange(0, size, 2) / size
        plain = self.theta**-exponents
        if self.kind == "linear":
            return plain / self.factor
        if self.kind == "llama3":
            return self._llama3(plain)
        if self.kind == "yarn":
            return self._yarn(plain, size)
        return plain

    def _llama3(self, plain: np.ndarray) -> np.ndarray:
        turns = self.original * plain / TURN
        share = (turns - self.low) / (self.high - self.low)
        kept = np.clip(share, 0, 1)
        return kept * plain + (1 - kept) * plain / self.factor

    def _yarn(
        self,
        plain: np.ndarray,
        size: int,
    ) -> np.ndarray:
        first = self._pair_that_turns(self.fast, size)
        last = self._pair_that_turns(self.slow, size)
        if self.truncate:
            first = math.floor(first)
            last = math.ceil(last)
        first = max(first, 0)
        last = min(last, size - 1)
        width = last - first if last != first else LEAST_RAMP

        pairs = np.arange(size // 2)
        divided = np.clip((pairs - first) / width, 0, 1)
        return (1 - divided) * plain + divided * plain / self.factor

    def _pair_that_turns(self, times: float, size: int) -> float:
        """Return which pair turns so many times over `original` positions."""
        radians = self.original / (times * TURN)
        share = math.log(radians) / math.log(self.theta)
        return size * share / 2


@dataclasses.dataclass(frozen=True)
class DecoderShape:
    """All that decides what a `DecoderLM` computes, but for its weights.

    Attributes:
      vocab: rows of the token embedding, those that pad it among them.
      dim: width of the residual stream.
      layers: number of blocks.
      heads: query heads.
      hidden: width of the feed-forward layers.
      kv_heads: key and value heads, a divisor of `heads`. None: `heads`.
      head: size of a head. None: dim / heads.
      activation: "silu", "gelu" (exact), "gelu_tanh" or "relu".
      gated: whether the activation is of a gate, which is multiplied with `up`.
      norm: "rms"; "rms_one": its scale is added to one (Gemma); "layer".
      epsilon: of the norms.
      post_norms: whether attention and feed-forward layer are normalized once more
        before they are added (Gemma 2).
      query_key_norm: whether each head's query and key are normalized (Qwen 3).
      attention_bias: whether query, key and value have biases.
      out_bias: whether the output of the attention has one.
      feed_forward_bias: whether the feed-forward layer has biases.
      rotary: None: there are no rotary positions.
      local_rotary: for layers with a window. None: `rotary`.
      positions: rows of a table of learned positions; 0: there is none.
      windows: for each layer, how many tokens it looks back over, its own among them;
        None: over all. An empty tuple: all layers over all.
      scale: factor of the attention's logits. None: 1 / sqrt(head).
      scale_by_layer: whether layer i's is also divided by i + 1 (a form of GPT-2).
      attention_cap: c in c * tanh(x / c) for the attention's logits. None: no cap.
      logit_cap: the same for the model's own logits.
      embed_scale: whether embeddings are multiplied with sqrt(dim) (Gemma).
      tied: whether the token embedding is the head.
      loop: over the layers: "unrolled", or "scan", in which the parameters of layers
        of one kind are stacked; it compiles in a time that doesn't grow with them.

    Raises:
      ValueError: they do not go together.
    """

    vocab: int
    dim: int
    layers: int
    heads: int
    hidden: int
    kv_heads: int | None = None
    head: int | None = None
    activation: str = "silu"
    gated: bool = True
    norm: Literal["rms", "rms_one", "layer"] = "rms"
    epsilon: float = 1e-5
    post_norms: bool = False
    query_key_norm: bool = False
    attention_bias: bool = False
    out_bias: bool = False
    feed_forward_bias: bool = False
    rotary: Rotary | None = Rotary()
    local_rotary: Rotary | None = None
    positions: int = 0
    windows: tuple[int | None, ...] = ()
    scale: float | None = None
    scale_by_layer: bool = False
    attention_cap: float | None = None
    logit_cap: float | None = None
    embed_scale: bool = False
    tied: bool = False
    loop: Literal["unrolled", "scan"] = "unrolled"

    def __post_init__(self):
        for name in ("vocab", "dim", "layers", "heads", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; at least 1")
        is_derived = self.head is None
        if self.heads % self.groups or (is_derived and self.dim % self.heads):
            raise ValueError(
                f"{self.heads} heads must be a multiple of {self.groups} kv_heads, and"
                f" divide dim {self.dim} where head is not given"
            )
        if self.rotary is not None and self.head_size % 2:
            raise ValueError(f"head is {self.head_size}; rotary positions take pairs")
        if self.windows and len(self.windows) != self.layers:
            raise ValueError(f"{len(self.windows)} windows for {self.layers} layers")
        if any(window is not None and window < 1 for window in self.windows):
            raise ValueError(f"windows are {self.windows}; at least 1")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation is none of {', '.join(ACTIVATIONS)}")
        if self.loop == "scan" and self.scale_by_layer:
            raise ValueError("layers that differ in scale can't be one scan")

    @property
    def groups(self) -> int:
        """The number of key and value heads."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_size(self) -> int:
        """The size of a head."""
        return self.dim // self.heads if self.head is None else self.head

    def window(self, layer: int) -> int | None:
        """Return how many tokens a layer looks back over; None: all."""
        return self.windows[layer] if self.windows else None

    def rotary_of(self, layer: int) -> Rotary | None:
        """Return a layer's frequencies."""
        has_window = self.window(layer) is not None
        if has_window and self.local_rotary is not None:
            return self.local_rotary
        return self.rotary

    def scale_of(self, layer: int) -> float:
        """Return the factor of a layer's attention logits."""
        scale = self.head_size**-0.5 if self.scale is None else self.scale
        return scale / (layer + 1) if self.scale_by_layer else scale

    @property
    def period(self) -> int:
        """The least number of layers after which their kinds repeat.

        It divides the number of layers.
        """
        for period in range(1, self.layers):
            repeats = self.windows[period:] == self.windows[:-period]
            if self.layers % period == 0 and (not self.windows or repeats):
                return period
        return self.layers


class RMSNorm(nnx.Module):
    """Division by the root mean square (Zhang and Sennrich 2019), in float32.

    Args:
      size: of the last dim.
      epsilon: added to the mean square.
      from_one: whether the scale is added to one, and multiplied in float32 (Gemma).
    """

    def __init__(
        self,
        size: int,
        epsilon: float,
        from_one: bool,
    ):
        self.epsilon = epsilon
        self.from_one = from_one
        first = jnp.zeros if from_one else jnp.ones
        self.scale = nnx.Param(first((size,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (..., size) to the same shape and dtype."""
        wide = x.astype(jnp.float32)
        square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(square + self.epsilon)
        scale = self.scale[...]
        if self.from_one:
            wide = wide * (1 + scale.astype(jnp.float32))
            return wide.astype(x.dtype)
        return wide.astype(x.dtype) * scale.astype(x.dtype)


class DecoderAttention(nnx.Module):
    """Causal self-attention of one layer; see `DecoderShape`."""

    def __init__(
        self,
        shape: DecoderShape,
        layer: int,
        *,
        rngs: nnx.Rngs,
    ):
        self.groups = shape.groups
        self.head = shape.head_size
        self.rotary = shape.rotary_of(layer)
        self.window = shape.window(layer)
        self.scale = shape.scale_of(layer)
        self.cap = shape.attention_cap
        wide = shape.heads * self.head
        narrow = self.groups * self.head

        linear = partial(nnx.Linear, use_bias=shape.attention_bias, rngs=rngs)
        self.query = linear(shape.dim, wide)
        self.key = linear(shape.dim, narrow)
        self.value = linear(shape.dim, narrow)
        self.out = nnx.Linear(
            wide,
            shape.dim,
            use_bias=shape.out_bias,
            rngs=rngs,
        )
        normed = shape.query_key_norm
        self.query_norm = _norm(shape, self.head, rngs) if normed else None
        self.key_norm = _norm(shape, self.head, rngs) if normed else None

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array | None,
        segments: jax.Array | None,
        cache: Layer | None,
    ) -> tuple[jax.Array, Layer | None]:
        """Map (batch, length, dim) to the same shape, and the cache to the next."""
        batch, length, _ = x.shape
        if cache is not None and positions is None:
            positions = cache["filled"][:, None] + jnp.arange(length)
        query, key, value = self._projected(x, positions)

        if cache is None:
            mask = None if segments is None else same_segment(segments)
            mixed = self._mixed(query, key, value, mask)
        else:
            mask = self._visible(cache, length)
            cache = appended(cache, key, value)
            mixed = self._mixed(
                query,
                cache["key"].astype(query.dtype),
                cache["value"].astype(query.dtype),
                mask,
                is_causal=False,
            )
        return self.out(mixed.reshape(batch, length, -1)), cache

    def _projected(
        self,
        x: jax.Array,
        positions: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return queries, keys and values: (batch, length, heads, head)."""
        heads = (*x.shape[:2], -1, self.head)
        query = self.query(x).reshape(heads)
        key = self.key(x).reshape(heads)
        value = self.value(x).reshape(heads)
        if self.query_norm is not None and self.key_norm is not None:
            query = self.query_norm(query)
            key = self.key_norm(key)
        if self.rotary is not None:
            query = rotated(query, positions, self.rotary)
            key = rotated(key, positions, self.rotary)
        return query, key, value

    def _mixed(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        mask: jax.Array | None,
        is_causal: bool = True,
    ) -> jax.Array:
        """Return the values (batch, length, heads, head), mixed by attention."""
        window = self.window if is_causal else None
        if self.cap is None:
            return jax.nn.dot_product_attention(
                query,
                key,
                value,
                mask=mask,
                scale=self.scale,
                is_causal=is_causal,
                local_window_size=None if window is None else (window - 1, 0),
            )
        if is_causal:
            past = _past(query.shape[1], window)
            mask = past if mask is None else mask & past
        return _capped_attention(
            query,
            key,
            value,
            mask,
            self.scale,
            self.cap,
        )

    def _visible(
        self,
        cache: Layer,
        length: int,
    ) -> jax.Array:
        """Return which slots new tokens look at: (batch, 1, length, slots)."""
        own = cache["filled"][:, None] + jnp.arange(length)
        slots = jnp.arange(cache["key"].shape[1])
        seen = _looks_back(own[:, :, None] - slots, self.window)
        return seen[:, None]


class FeedForward(nnx.Module):
    """Feed-forward layer, gated (Shazeer 2020, "GLU Variants") or not."""

    def __init__(
        self,
        shape: DecoderShape,
        *,
        rngs: nnx.Rngs,
    ):
        self.activation = shape.activation
        linear = partial(nnx.Linear, use_bias=shape.feed_forward_bias, rngs=rngs)
        self.gate = linear(shape.dim, shape.hidden) if shape.gated else None
        self.up = linear(shape.dim, shape.hidden)
        self.down = linear(shape.hidden, shape.dim)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, length, dim) to the same shape."""
        active = ACTIVATIONS[self.activation]
        if self.gate is None:
            return self.down(active(self.up(x)))
        gate = active(self.gate(x))
        return self.down(gate * self.up(x))


class DecoderBlock(nnx.Module):
    """Attention and a feed-forward layer, each on normalized inputs and added."""

    def __init__(
        self,
        shape: DecoderShape,
        layer: int,
        *,
        rngs: nnx.Rngs,
    ):
        norm = partial(_norm, shape, shape.dim, rngs)
        self.attention_norm = norm()
        self.attention = DecoderAttention(shape, layer, rngs=rngs)
        self.attention_post_norm = norm() if shape.post_norms else None
        self.feed_forward_norm = norm()
        self.feed_forward = FeedForward(shape, rngs=rngs)
        self.feed_forward_post_norm = norm() if shape.post_norms else None

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        cache: Layer | None = None,
    ) -> tuple[jax.Array, Layer | None]:
        """Map (batch, length, dim) to the same shape, and the cache to the next."""
        mixed, cache = self.attention(
            self.attention_norm(x),
            positions,
            segments,
            cache,
        )
        if self.attention_post_norm is not None:
            mixed = self.attention_post_norm(mixed)
        x = x + mixed
        fed = self.feed_forward(self.feed_forward_norm(x))
        if self.feed_forward_post_norm is not None:
            fed = self.feed_forward_post_norm(fed)
        return x + fed, cache


class DecoderLM(nnx.Module):
    """A decoder-only language model; `DecoderShape` says which.

    Args:
      shape: of the model.
      rngs: stream `params`.
    """

    def __init__(
        self,
        shape: DecoderShape,
        *,
        rngs: nnx.Rngs,
    ):
        self.shape = shape
        self.embed = nnx.Embed(shape.vocab, shape.dim, rngs=rngs)
        self.positions = _table(shape.positions, shape.dim, rngs)
        self.blocks = nnx.List(_blocks(shape, rngs))
        self.norm = _norm(shape, shape.dim, rngs)
        head = partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.head = None if shape.tied else head(shape.dim, shape.vocab)

    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> Any:
        """Map tokens int32 (batch, length) to logits (batch, length, vocab).

        Args:
          tokens: of each row, one after the other.
          positions: int32 (batch, length). None: 0, 1, 2, ...; with a cache, those
            that follow the tokens in it.
          segments: int32 (batch, length): a token looks at those of its own segment.
          cache: of the tokens before, see `empty_cache`.

        Returns:
          Logits; with a cache, a pair of logits and the cache after these tokens.

        Raises:
          ValueError: segments are given next to a cache.
        """
        if cache is not None and segments is not None:
            raise ValueError("a cache holds one document a row; give no segments")
        x = self.embed(tokens)
        if self.shape.embed_scale:
            x = x * jnp.asarray(self.shape.dim**0.5, x.dtype)
        if self.positions is not None:
            x = x + self.positions(_own_positions(tokens, positions, cache))

        if cache is None and self.shape.loop == "scan":
            x = self._scanned(x, positions, segments)
        else:
            x, cache = self._unrolled(x, positions, segments, cache)
        x = self.norm(x)
        head = self.embed.attend if self.head is None else self.head
        logits = head(x)
        if self.shape.logit_cap is not None:
            logits = _capped(logits, self.shape.logit_cap)
        return logits if cache is None else (logits, cache)

    def empty_cache(
        self,
        batch: int,
        slots: int,
        dtype: Any = jnp.float32,
    ) -> Cache:
        """Return a cache for up to `slots` tokens a row, with none in it.

        Returns:
          For each layer "key" and "value": (batch, slots, kv_heads, head), and
          "filled": int32 (batch,), the slots in use.
        """
        size = (
            batch,
            slots,
            self.shape.groups,
            self.shape.head_size,
        )
        return tuple(
            {
                "key": jnp.zeros(size, dtype),
                "value": jnp.zeros(size, dtype),
                "filled": jnp.zeros((batch,), jnp.int32),
            }
            for _ in range(self.shape.layers)
        )

    def layer(self, index: int) -> DecoderBlock:
        """Return one of the blocks, taken out of its stack if there is one."""
        if self.shape.loop == "unrolled":
            return self.blocks[index]
        group, member = divmod(index, self.shape.period)
        graph, stacked = nnx.split(self.blocks[member])
        own = jax.tree.map(lambda leaf: leaf[group], stacked)
        return nnx.merge(graph, own)

    def _unrolled(
        self,
        x: jax.Array,
        positions: jax.Array | None,
        segments: jax.Array | None,
        cache: Cache | None,
    ) -> tuple[jax.Array, Cache | None]:
        after = []
        for index in range(self.shape.layers):
            before = None if cache is None else cache[index]
            block = self.layer(index)
            x, entry = block(x, positions, segments, before)
            if entry is not None:
                after.append(entry)
        return x, None if cache is None else tuple(after)

    def _scanned(
        self,
        x: jax.Array,
        positions: jax.Array | None,
        segments: jax.Array | None,
    ) -> jax.Array:
        """Run groups of layers in a loop, each of `period` of them."""
        # not nnx.scan: it would carry the graph's state through the loop; here the
        # body sees a layer's arrays only
        split = [nnx.split(block) for block in self.blocks]
        graphs = [graph for graph, _ in split]

        def apply(x: jax.Array, group: Any) -> tuple[jax.Array, None]:
            for graph, arrays in zip(graphs, group, strict=True):
                x, _ = nnx.merge(graph, arrays)(x, positions, segments)
            return x, None

        stacks = tuple(arrays for _, arrays in split)
        x, _ = jax.lax.scan(apply, x, stacks)
        return x


def rotated(
    x: jax.Array,
    positions: jax.Array | None,
    rotary: Rotary,
) -> jax.Array:
    """Turn the pairs (x[i], x[i + d/2]) of each head by its position's angles.

    Where frequencies grow with the text ("dynamic"), its length is the row's last
    position and one. Keys in a cache stay as they were turned then, as transformers
    has it.

    Args:
      x: (batch, length, heads, d), d even.
      positions: int32 (batch, length). None: 0, 1, 2, ...
      rotary: the frequencies.
    """
    length: Any = x.shape[1]
    if positions is None:
        positions = jnp.arange(length)[None]
    else:
        length = positions.max(axis=1)[:, None, None] + 1
    size = x.shape[-1]
    frequencies: Any = rotary.frequencies(size).astype(np.float32)
    if rotary.kind == "dynamic":
        frequencies = frequencies * _stretched(rotary, size, length)
    # The angles are float32 whatever x is: in bfloat16, positions above 256 would fall
    # together.
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    angles = angles[:, :, None]
    cos = jnp.cos(angles) * rotary.amplitude
    sin = jnp.sin(angles) * rotary.amplitude
    cos = cos.astype(x.dtype)
    sin = sin.astype(x.dtype)
    left, right = jnp.split(x, 2, axis=-1)
    turned_left = left * cos - right * sin
    turned_right = right * cos + left * sin
    return jnp.concatenate([turned_left, turned_right], axis=-1)


# ---- internals ----


def _blocks(
    shape: DecoderShape,
    rngs: nnx.Rngs,
) -> list[DecoderBlock]:
    """Return a block for each layer, or for each of a period one that is stacked."""
    if shape.loop == "unrolled":
        return [DecoderBlock(shape, i, rngs=rngs) for i in range(shape.layers)]
    return [_stack(shape, member, rngs) for member in range(shape.period)]


def _stack(
    shape: DecoderShape,
    member: int,
    rngs: nnx.Rngs,
) -> DecoderBlock:
    """Return the blocks of one kind as one, whose parameters are stacked."""

    def block(key: jax.Array) -> DecoderBlock:
        return DecoderBlock(shape, member, rngs=nnx.Rngs(key))

    keys = jax.random.split(rngs.params(), shape.layers // shape.period)
    return nnx.vmap(block)(keys)


def _table(
    rows: int,
    size: int,
    rngs: nnx.Rngs,
) -> nnx.Embed | None:
    return nnx.Embed(rows, size, rngs=rngs) if rows else None


def _norm(
    shape: DecoderShape,
    size: int,
    rngs: nnx.Rngs,
) -> Any:
    if shape.norm == "layer":
        return nnx.LayerNorm(
            size,
            epsilon=shape.epsilon,
            use_fast_variance=False,
            rngs=rngs,
        )
    return RMSNorm(size, shape.epsilon, shape.norm == "rms_one")


def _own_positions(
    tokens: jax.Array,
    positions: jax.Array | None,
    cache: Cache | None,
) -> jax.Array:
    if positions is not None:
        return positions
    own = jnp.arange(tokens.shape[1])[None]
    return own if cache is None else cache[0]["filled"][:, None] + own


def _stretched(
    rotary: Rotary,
    size: int,
    length: Any,
) -> Any:
    """Return what a theta that grows with a text makes of the frequencies.

    theta' = theta * r^(d / (d - 2)), with r = factor * length / original - (factor - 1)
    or at least 1, so frequency i is multiplied with r^(-2i / (d - 2)).
    """
    exponents = np.arange(0, size, 2) / max(size - 2, 1)
    xp: Any = np if isinstance(length, int) else jnp
    longer = length / rotary.original
    ratio = rotary.factor * longer - (rotary.factor - 1)
    growth = xp.log(xp.maximum(ratio, 1.0))
    factors = xp.exp(-exponents * growth)
    return factors.astype(np.float32)


def _past(
    length: int,
    window: int | None,
) -> jax.Array:
    """Return which tokens each looks at: (1, 1, length, length)."""
    own = jnp.arange(length)
    seen = _looks_back(own[:, None] - own, window)
    return seen[None, None]


def _looks_back(
    distance: jax.Array,
    window: int | None,
) -> jax.Array:
    """Whether a token looks at the one that is so far back; its own is 0 back."""
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def _capped(x: jax.Array, cap: float) -> jax.Array:
    return cap * jnp.tanh(x / cap)


def _capped_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    scale: float,
    cap: float,
) -> jax.Array:
    """Return attention whose logits are capped; softmax and cap are float32."""
    batch, length, heads, size = query.shape
    groups = key.shape[2]
    grouped = query.reshape(
        batch,
        length,
        groups,
        heads // groups,
        size,
    )
    logits = jnp.einsum(
        "btkgh,bskh->bkgts",
        grouped,
        key,
        preferred_element_type=jnp.float32,
    )
    logits = _capped(logits * scale, cap)
    if mask is not None:
        lowest = jnp.finfo(jnp.float32).min
        logits = jnp.where(mask[:, :, None], logits, lowest)
    shares = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    mixed = jnp.einsum("bkgts,bskh->btkgh", shares, value)
    return mixed.reshape(batch, length, heads, size)
