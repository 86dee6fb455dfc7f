"""Numbers and categories as the click-through models take them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx


class Fields(nnx.Module):
    """Numbers with their gaps marked, and a vector for each category.

    All categories share one table, in which each has a range of rows, so that one
    gather looks up all of them. Row 0 of each range, for a missing or unseen value,
    starts at zero.

    Args:
      numbers: how many numbers a row has.
      sizes: how many indices each category has.
      dim: width of a category's vector.
      scale: standard deviation of the vectors' entries at the start.
      rngs: stream `params`.

    Raises:
      ValueError: there are neither numbers nor categories.
    """

    def __init__(
        self,
        numbers: int,
        sizes: Sequence[int],
        *,
        dim: int,
        scale: float = 0.1,
        rngs: nnx.Rngs,
    ):
        if not (numbers or sizes):
            raise ValueError("a row needs numbers or categories")
        self.numbers = numbers
        self.dim = dim
        self.scale = scale
        self.starts = tuple(itertools.accumulate(sizes, initial=0))[:-1]

        def embedding() -> nnx.Embed:
            init = self._init
            return nnx.Embed(sum(sizes), dim, embedding_init=init, rngs=rngs)

        self.embed = embedding() if sizes else None

    @property
    def width(self) -> int:
        """Width of the numbers with their marks: two for each."""
        return 2 * self.numbers

    def _init(
        self,
        key: jax.Array,
        shape: Sequence[int],
        dtype: jnp.dtype,
    ) -> jax.Array:
        table = self.scale * jax.random.normal(key, shape, dtype)
        return table.at[jnp.asarray(self.starts)].set(0)

    def __call__(
        self,
        numbers: jax.Array | None = None,
        categories: jax.Array | None = None,
    ) -> tuple[jax.Array | None, jax.Array | None]:
        """Return the numbers (batch, 2 * a) and the vectors (batch, c, dim).

        Args:
          numbers: float32 (batch, a), NaN where missing: 0 then, and marked by a 1.
          categories: int32 (batch, c).

        Raises:
          ValueError: the model was made for other blocks than these.
        """
        given = (numbers is not None, categories is not None)
        if given != (self.numbers > 0, self.embed is not None):
            raise ValueError(
                "the model and its inputs must have the same blocks of numbers and"
                " categories"
            )
        marked = None
        if numbers is not None:
            missing = jnp.isnan(numbers)
            values = jnp.where(missing, 0, numbers)
            marked = jnp.concatenate([values, missing.astype(values.dtype)], axis=-1)
        vectors = None
        if self.embed is not None and categories is not None:
            vectors = self.embed(categories + jnp.asarray(self.starts, jnp.int32))
        return marked, vectors
