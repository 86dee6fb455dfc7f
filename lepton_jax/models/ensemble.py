"""Several copies of a model as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx


class Ensemble(nnx.Module):
    """Copies of a model that differ by their first parameters and by their dropout.

    Their errors differ, too, so the mean of their outputs has a smaller one
    (Lakshminarayanan et al. 2017, "Simple and Scalable Predictive Uncertainty
    Estimation using Deep Ensembles"). All see the same batch.

    In training it gives the outputs of each copy, and the loss is to be a mean of
    theirs (`lepton_jax.losses.of_members`). Outside of it it gives their mean.

    Args:
      make: a factory of the model, taking `rngs`.
      members: how many copies.
      deterministic: whether the outputs are the mean; False in training.
      rngs: the streams of the model.

    Raises:
      ValueError: `members` is below 1.
    """

    def __init__(
        self,
        make: Callable[..., nnx.Module],
        members: int = 8,
        *,
        deterministic: bool = False,
        rngs: nnx.Rngs,
    ):
        if members < 1:
            raise ValueError(f"members is {members}; it must be at least 1")
        self.deterministic = deterministic

        @nnx.split_rngs(splits=members)
        @nnx.vmap
        def copies(rngs: nnx.Rngs) -> nnx.Module:
            return make(rngs=rngs)

        # one module, whose parameters have a leading dim for the copies
        self.copies = copies(rngs)

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        """Map a batch to (batch, members, ...), or outside of training (batch, ...)."""

        def one(copy: Any, args: Any, kwargs: Any) -> jax.Array:
            return copy(*args, **kwargs)

        each: Any = nnx.vmap(one, in_axes=(0, None, None), out_axes=1)
        outputs = each(self.copies, args, kwargs)
        return outputs.mean(axis=1) if self.deterministic else outputs
