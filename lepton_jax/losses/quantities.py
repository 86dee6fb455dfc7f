"""Losses of quantities: counts, quantiles and directions."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from jax.scipy.special import gammaln

from lepton_jax.errors import RecipeError

# added to squared lengths, so that a vector of zeros has a gradient; assumption
SHORTEST = 1e-12


def poisson(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Negative log likelihood of counts under Poisson's distribution.

    With the output o, which is the logarithm of the expected count, and the count t:

        exp(o) - t * o + log(t!)

    Args:
      outputs: (batch, ...).
      targets: counts of at least 0, whole or not, of the same shape.
    """
    _check_same(outputs, targets, "poisson")
    targets = targets.astype(outputs.dtype)
    return jnp.exp(outputs) - targets * outputs + gammaln(targets + 1)


def pinball(
    outputs: jax.Array,
    targets: jax.Array,
    *,
    levels: float | Sequence[float] = 0.5,
) -> jax.Array:
    """Quantile loss: at its least, a share `levels` of the targets lies below.

    With the error e = target - output and the level q: max(q * e, (q - 1) * e).
    Give the levels by `functools.partial(losses.pinball, levels=(0.1, 0.5, 0.9))`.

    References:
      Koenker and Bassett 1978, "Regression quantiles".

    Args:
      outputs: (batch, ...) for one level, (batch, ..., levels) for several.
      targets: (batch, ...).
      levels: between 0 and 1: one, or one for each of the last dim of the outputs.

    Returns:
      Values of the outputs' shape.

    Raises:
      RecipeError: a level is out of range.
    """
    several = isinstance(levels, Sequence)
    each = tuple(levels) if isinstance(levels, Sequence) else (levels,)
    if not each or not all(0 < level < 1 for level in each):
        raise RecipeError(
            f"levels is {levels!r}",
            where="losses.pinball",
            remedy="give levels between 0 and 1, e.g. (0.1, 0.5, 0.9)",
        )
    if several:
        targets = targets[..., None]
        wanted = (*targets.shape[:-1], len(each))
        if outputs.shape != wanted:
            raise ValueError(
                f"pinball: outputs have shape {outputs.shape}, but {len(each)} levels"
                f" of these targets need {wanted}"
            )
    else:
        _check_same(outputs, targets, "pinball")
    level = jnp.asarray(levels, outputs.dtype)
    error = targets - outputs
    return jnp.maximum(level * error, (level - 1) * error)


def scaled_squared_error(
    outputs: jax.Array,
    targets: jax.Array,
    *,
    spread: float | Sequence[float],
) -> jax.Array:
    """Return squared errors in units of each target's spread.

    Args:
      outputs: quantities in their own unit, (batch, targets) or (batch,).
      targets: the same.
      spread: standard deviation of each target, or of the one.
    """
    return jnp.square((outputs - targets) / jnp.asarray(spread, outputs.dtype))


def cosine(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """One minus the cosine between outputs and targets, from 0 to 2.

    Args:
      outputs: vectors, (batch, ..., size).
      targets: vectors of the same shape.

    Returns:
      (batch, ...); 1 where a vector is zero.
    """
    _check_same(outputs, targets, "cosine")
    return optax.cosine_distance(outputs, targets, epsilon=SHORTEST)


def expected_count(outputs: jax.Array) -> jax.Array:
    """Return the counts that outputs of `poisson` stand for."""
    return jnp.exp(outputs)


def _check_same(outputs: jax.Array, targets: jax.Array, name: str) -> None:
    # broadcasting would turn (batch, 1) against (batch,) into a wrong (batch, batch)
    if outputs.shape != targets.shape:
        raise ValueError(
            f"{name}: outputs have shape {outputs.shape}, targets {targets.shape}"
        )
