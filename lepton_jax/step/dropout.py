"""The knob `dropout`: a factor of the rate of each nnx.Dropout, moved by a policy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lepton_jax.errors import ModelError


class _ScaledDropout(nnx.Dropout):
    """An nnx.Dropout whose rate is times a traced factor.

    With a factor of 1 it has the same bits.
    """

    factor: Any

    def __call__(
        self,
        inputs: Any,
        *,
        deterministic: bool | None = None,
        rngs: Any = None,
    ) -> Any:
        if self.deterministic if deterministic is None else deterministic:
            return inputs
        source = rngs or self.rngs
        stream: Any = (
            source[self.rng_collection] if isinstance(source, nnx.Rngs) else source
        )
        drawn = stream.count[...]
        plain = super().__call__(
            inputs,
            deterministic=False,
            rngs=rngs,
        )
        after = stream.count[...]

        # the same key again, so that the same inputs are dropped
        stream.count[...] = drawn
        kept = 1 - jnp.minimum(self.rate * self.factor, 0.99)
        mask = jax.random.bernoulli(
            stream(),
            kept,
            plain.shape,
        )
        stream.count[...] = after
        scaled = jnp.where(
            mask,
            inputs / kept.astype(inputs.dtype),
            0,
        )
        return jnp.where(self.factor == 1, plain, scaled)


def scale_dropout(module: nnx.Module, factor: Any) -> list[Any]:
    """Let a traced factor scale the rate of each nnx.Dropout of a module.

    Args:
      module: changed in place.
      factor: float32 scalar.

    Returns:
      The layers, each of which now has an attribute `factor` for the caller to delete.

    Raises:
      ModelError: there are none.
    """
    found = [
        node
        for _, node in nnx.iter_graph(module)
        if isinstance(node, nnx.Dropout) and 0 < node.rate < 1
    ]
    if not found:
        raise ModelError(
            "a policy moves dropout, but the model has no nnx.Dropout with a rate "
            "above 0",
            where=type(module).__name__,
            remedy="give the model one, or leave that policy out",
        )
    for node in found:
        node.__class__ = _ScaledDropout
        node.factor = nnx.data(factor)  # type: ignore[attr-defined]
    return found
