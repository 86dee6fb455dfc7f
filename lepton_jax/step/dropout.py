"""The knob `dropout`: a factor of the rate of each nnx.Dropout, moved by a policy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lepton_jax.errors import ModelError

# the greatest rate, times its factor: some inputs must stay; assumption
HIGHEST = 0.99


class _ScaledDropout(nnx.Dropout):
    """An nnx.Dropout with a traced factor of its rate.

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
        stream: Any = source
        if isinstance(source, nnx.Rngs):
            stream = source[self.rng_collection]
        drawn = stream.count[...]
        plain = super().__call__(
            inputs,
            deterministic=False,
            rngs=rngs,
        )
        after = stream.count[...]

        # the same key again, so that the same inputs are dropped
        stream.count[...] = drawn
        keep = 1 - jnp.minimum(self.rate * self.factor, HIGHEST)
        mask = jax.random.bernoulli(
            stream(),
            keep,
            plain.shape,
        )
        stream.count[...] = after
        scaled = jnp.where(
            mask,
            inputs / keep.astype(inputs.dtype),
            0,
        )
        return jnp.where(self.factor == 1, plain, scaled)


def scale_dropout(
    module: nnx.Module,
    factor: Any,
) -> list[Any]:
    """Let a traced factor scale the rate of each nnx.Dropout of a module.

    Args:
      module: changed in place.
      factor: float32 scalar.

    Returns:
      The layers, each of which now has an attribute `factor` for the caller to delete.

    Raises:
      ModelError: there are none.
    """
    layers = [
        node
        for _, node in nnx.iter_graph(module)
        if isinstance(node, nnx.Dropout) and 0 < node.rate < 1
    ]
    if not layers:
        raise ModelError(
            "a policy moves dropout, but the model has no nnx.Dropout with a rate "
            "above 0",
            where=type(module).__name__,
            remedy="give the model one, or leave that policy out",
        )
    for layer in layers:
        layer.__class__ = _ScaledDropout
        layer.factor = nnx.data(factor)  # type: ignore[attr-defined]
    return layers
