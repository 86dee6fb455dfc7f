"""Random numbers of each sample of a batch.

Each row of a batch has a key of its own, made of the step's key and of the row's number
in the whole batch. So a row is changed in the same way whether the batch passes in one
part or in several, on one device or on many.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lepton_jax.errors import RecipeError


def row_keys(
    key: Any,
    rows: int,
    part: Any = 0,
    parts: int = 1,
) -> jax.Array:
    """Return a key for each row of a micro-batch.

    Args:
      key: of the step.
      rows: how many rows the micro-batch has.
      part: number of the micro-batch, which has the rows part, part + parts, ... of the
        batch.
      parts: how many micro-batches there are.

    Returns:
      Random keys (rows,).
    """
    numbers = jnp.arange(rows, dtype=jnp.uint32) * parts
    numbers = numbers + jnp.asarray(part, jnp.uint32)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)


def folded(
    keys: jax.Array,
    number: int,
) -> jax.Array:
    """Return other keys, one for each row, for another use."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)


def uniform(
    keys: jax.Array,
    count: int,
    low: float = 0.0,
    high: float = 1.0,
) -> list[jax.Array]:
    """Draw numbers for each row, evenly from `low` to below `high`.

    Returns:
      `count` arrays float32 (rows,).
    """

    def draw(key: Any) -> jax.Array:
        return jax.random.uniform(key, (count,), jnp.float32, low, high)

    drawn = jax.vmap(draw)(keys)
    return [drawn[:, number] for number in range(count)]


def by_row(
    values: jax.Array,
    ndim: int,
) -> jax.Array:
    """Return values (rows,) in a shape that broadcasts against (rows, ...)."""
    return values.reshape(values.shape + (1,) * (ndim - 1))


def check_share(
    name: str,
    **shares: float,
) -> None:
    """Check that settings lie between 0 and 1.

    Raises:
      RecipeError: one does not.
    """
    for setting, value in shares.items():
        if not 0 <= value <= 1:
            raise RecipeError(
                f"{setting} is {value!r}",
                where=f"augment.{name}",
                remedy=f"set {setting} to a number from 0 to 1",
            )


def check_least(
    name: str,
    least: float,
    **values: float,
) -> None:
    """Check that settings are not below a bound.

    Raises:
      RecipeError: one is.
    """
    for setting, value in values.items():
        if not value >= least:
            raise RecipeError(
                f"{setting} is {value!r}",
                where=f"augment.{name}",
                remedy=f"set {setting} to {least} or more",
            )


def check_range(
    name: str,
    least: float,
    **ranges: Any,
) -> None:
    """Check that settings are pairs (low, high) with least <= low <= high.

    Raises:
      RecipeError: one is not.
    """
    for setting, pair in ranges.items():
        is_pair = len(pair) == 2 and least <= pair[0] <= pair[1]
        if not is_pair:
            raise RecipeError(
                f"{setting} is {pair!r}",
                where=f"augment.{name}",
                remedy=f"give a pair (low, high), from {least} upwards",
            )


def check_images(
    name: str,
    images: Any,
) -> None:
    """Check that a batch is one of images.

    Raises:
      RecipeError: it is not float (batch, height, width, channels).
    """
    shape = jnp.shape(images)
    is_float = jnp.issubdtype(jnp.result_type(images), jnp.floating)
    if len(shape) != 4 or not is_float:
        raise RecipeError(
            f"the batch is {jnp.result_type(images)}{list(shape)}",
            where=f"augment.{name}",
            remedy=(
                "give images as floating-point numbers (batch, height, width,"
                " channels): let the preprocess of Augmented divide pixels by 255"
            ),
        )
