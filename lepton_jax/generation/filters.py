"""Which token comes next: greedy, or drawn from what filters leave.

The filters work in this order, as in transformers: temperature, top-k, top-p, min-p.
With the probabilities 0.5, 0.3, 0.15 and 0.05, `top_p=0.7` leaves the first two, which
together reach 0.7, and `min_p=0.2` the first three, which have at least 0.2 times the
greatest.

>>> import numpy as np
>>> logits = jnp.log(jnp.array([[0.15, 0.5, 0.05, 0.3]]))
>>> def left(**settings):
...     sampling = Sampling(temperature=1.0, **settings)
...     scores, tokens = candidates(logits, sampling, sampling.knobs())
...     tokens = np.arange(4)[None] if tokens is None else tokens
...     return sorted(int(t) for t in tokens[jnp.isfinite(scores)])
>>> left(top_k=1), left(top_p=0.7), left(min_p=0.2)
([1], [1, 3], [0, 1, 3])
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_jax.errors import SettingError

WHERE = "generate"


@dataclass(frozen=True)
class Sampling:
    """Settings of the draw of a token.

    Attributes:
      temperature: the logits are divided by it; 0: the most probable token, the lowest
        of several.
      top_k: how many of the most probable tokens are left; None: all.
      top_p: the fewest of the most probable tokens whose probabilities reach this sum
        are left (Holtzman et al. 2020, section 3.1); None: all.
      min_p: tokens are left that have at least this share of the greatest probability
        (Nguyen et al. 2024, "Min-p sampling"); None: all.

    Raises:
      SettingError: a setting is out of its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise _out_of_range("temperature", self.temperature, "a number from 0 on")
        if self.top_k is not None and (
            isinstance(self.top_k, bool)
            or not isinstance(self.top_k, int)
            or self.top_k < 1
        ):
            raise _out_of_range("top_k", self.top_k, "a whole number of at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise _out_of_range("top_p", self.top_p, "a share above 0 and up to 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise _out_of_range("min_p", self.min_p, "a share from 0 to 1")

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is taken."""
        return self.temperature == 0

    def knobs(self) -> dict[str, Any]:
        """Return the numbers that a compiled draw takes as arguments, by name."""
        if self.is_greedy:
            return {}
        knobs = {"temperature": np.float32(self.temperature)}
        if self.top_p is not None and self.top_p < 1:
            knobs["top_p"] = np.float32(self.top_p)
        if self.min_p:
            knobs["min_p"] = np.float32(self.min_p)
        return knobs


def draw(
    keys: Any,
    logits: jax.Array,
    sampling: Sampling,
    knobs: dict[str, Any],
) -> jax.Array:
    """Return a token for each row, int32 (rows,).

    Args:
      keys: a random key for each row; None will do for greedy.
      logits: float32 (rows, vocab); -inf for what must not be drawn.
      sampling: which filters are at work.
      knobs: from `sampling.knobs`; their values may be traced.
    """
    if sampling.is_greedy:
        return logits.argmax(-1).astype(jnp.int32)
    scores, tokens = candidates(logits, sampling, knobs)
    chosen = jax.vmap(jax.random.categorical)(keys, scores)
    if tokens is None:
        return chosen.astype(jnp.int32)
    return jnp.take_along_axis(tokens, chosen[:, None], axis=-1)[:, 0]


def candidates(
    logits: jax.Array,
    sampling: Sampling,
    knobs: dict[str, Any],
) -> tuple[jax.Array, jax.Array | None]:
    """Return what the filters leave.

    Of equal logits the lower token counts as the more probable one.

    Returns:
      The logits over the temperature, up to a constant a row, -inf for what is filtered
      out; and the token of each column, int32, or None where it is the column's number.
    """
    # without the greatest first a small temperature would divide to infinity
    best = logits.max(-1, keepdims=True)
    scores = (logits - best) / knobs["temperature"]

    tokens = None
    count = scores.shape[-1]
    if sampling.top_k is not None or "top_p" in knobs:
        scores, tokens = jax.lax.top_k(scores, min(sampling.top_k or count, count))
    if "top_p" in knobs:
        probabilities = jax.nn.softmax(scores)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        before = before.at[..., 0].set(0.0)  # the first is left whatever rounding says
        scores = jnp.where(before < knobs["top_p"], scores, -jnp.inf)
    if "min_p" in knobs:
        scores = jnp.where(scores >= jnp.log(knobs["min_p"]), scores, -jnp.inf)
    return scores, tokens


# ---- internals ----


def _out_of_range(
    name: str,
    value: Any,
    range_: str,
) -> SettingError:
    return SettingError(
        f"{name} is {value!r}; it must be {range_}",
        where=WHERE,
        remedy=f"correct {name}, or leave it out",
    )
