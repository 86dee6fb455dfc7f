"""A model that looks at several views of its input when it is evaluated."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


def averaged_views(
    model: Callable[..., nnx.Module],
    views: Sequence[Callable[[Any], Any]],
    *,
    average: str = "outputs",
    rngs: nnx.Rngs,
) -> nnx.Module:
    """Make a model whose evaluations are means over views of the input.

    In training it is the model itself. In evaluation (`deterministic` is true) it is
    applied to each view of its first argument, and the outputs are averaged. Parameters
    keep their paths, so the weights of a plain model can be loaded into it:

        model=partial(averaged_views, partial(CNN, (28, 28, 1)), (unchanged, mirrored))

    An evaluation costs as many forward passes as there are views.

    Args:
      model: makes a module from `rngs`.
      views: functions of the first argument to an array of its shape.
      average: "outputs": the mean of what the model returns; "probabilities": outputs
        are logits, and the result is the logarithm of the mean of their softmax.
      rngs: the model's.

    Raises:
      ValueError: there are no views, or `average` is another word.
    """
    if not views or average not in MEANS:
        raise ValueError(
            f"{len(views)} views, average={average!r}: give some views, and average="
            '"outputs" or "probabilities"'
        )
    module = model(rngs=rngs)
    loose: Any = module
    if not hasattr(module, "deterministic"):
        loose.deterministic = False
    kind = _looking_at(type(module), tuple(views), average)
    # the module's own class, with another call
    object.__setattr__(module, "__class__", kind)
    return module


def unchanged(x: jax.Array) -> jax.Array:
    """Return the view that is the input itself."""
    return x


def mirrored(x: jax.Array) -> jax.Array:
    """Return pictures (batch, height, width, ...) with left and right exchanged."""
    return jnp.flip(x, axis=2)


@functools.lru_cache(maxsize=64)
def _looking_at(
    kind: type,
    views: tuple[Callable[[Any], Any], ...],
    average: str,
) -> type:
    """Return a subclass that averages over views; always the same one."""
    plain: Any = kind.__call__
    mean = MEANS[average]

    @functools.wraps(plain)
    def call(self: Any, x: Any, *others: Any, **named: Any) -> Any:
        if not self.deterministic:
            return plain(self, x, *others, **named)
        each = [plain(self, view(x), *others, **named) for view in views]
        return jax.tree.map(mean, *each)

    metaclass = type(kind)
    return metaclass(kind.__name__, (kind,), {"__call__": call})


def _mean_of_outputs(*outputs: Any) -> Any:
    return sum(outputs) / len(outputs)


def _log_of_mean_share(*logits: Any) -> Any:
    logs = [jax.nn.log_softmax(x) for x in logits]
    total = jax.nn.logsumexp(jnp.stack(logs), axis=0)
    return total - jnp.log(len(logits))


MEANS = {"outputs": _mean_of_outputs, "probabilities": _log_of_mean_share}
