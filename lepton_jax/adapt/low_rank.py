"""Low-rank adapters on the linear layers of a model, whose own file stays as it is.

A layer y = x W gets y = x W + s (x A) B, where A is (in, rank), B is (rank, out) and
zero at first, and s is alpha / rank (LoRA: Hu et al. 2021, equation 3). The kernel W
keeps its name, so a saved model's weights are found again:

    blocks/0/attention/query/kernel    as before, frozen
    blocks/0/attention/query/lora_a    new
    blocks/0/attention/query/lora_b    new

DoRA (Liu et al. 2024, equation 5) also learns how long each column of the kernel is.
With V = W + s A B and ||.|| the length of a column, it is y = x V g ||W|| / ||V||,
where g is 1 at first. The paper learns m = g ||W|| itself; by g a model whose weights
are loaded later begins with its own lengths.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lepton_jax.errors import ModelError, nearest
from lepton_jax.trees import matches

# Parameters of adapters, for `Trainer.load(folder, fresh=...)` and optimizers.
PATTERN = "*lora_*"
# alpha / rank where nobody says; as most published fine-tunings have it: assumption
USUAL_SCALE = 2.0
# names in a message; assumption
LISTED = 6


class LoRALinear(nnx.Linear):
    """An `nnx.Linear` with a low-rank adapter; made by `lora`."""

    lora_a: nnx.Param
    lora_b: nnx.Param
    lora_scale: float

    def __call__(
        self,
        inputs: jax.Array,
        *args: Any,
        **kwargs: Any,
    ) -> jax.Array:
        """Map (..., in) to (..., out)."""
        y = super().__call__(inputs, *args, **kwargs)
        return y + self.delta(inputs).astype(y.dtype)

    def delta(
        self,
        x: jax.Array,
    ) -> jax.Array:
        """Return what the adapter adds."""
        return (x @ self.lora_a[...]) @ self.lora_b[...] * self.lora_scale

    def merged_kernel(self) -> jax.Array:
        """Return the kernel of a plain layer that does the same, in float32."""
        return _float32(self.kernel) + self.product()

    def product(self) -> jax.Array:
        """Return what the adapter adds to the kernel, in float32."""
        return _float32(self.lora_a) @ _float32(self.lora_b) * self.lora_scale


class DoRALinear(LoRALinear):
    """An `nnx.Linear` with a low-rank adapter and lengths; made by `dora`."""

    lora_gain: nnx.Param

    def __call__(
        self,
        inputs: jax.Array,
        *args: Any,
        **kwargs: Any,
    ) -> jax.Array:
        """Map (..., in) to (..., out)."""
        x, kernel = self.promote_dtype((inputs, self.kernel[...]), dtype=self.dtype)
        y = self.dot_general(
            x,
            kernel,
            (((x.ndim - 1,), (0,)), ((), ())),
            precision=self.precision,
        )
        y = (y + self.delta(x).astype(y.dtype)) * self._factor().astype(y.dtype)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)

    def merged_kernel(self) -> jax.Array:
        """Return the kernel of a plain layer that does the same, in float32."""
        return super().merged_kernel() * self._factor()[..., None, :]

    def _factor(self) -> jax.Array:
        """Return g ||W|| / ||V|| of each column, in float32.

        The length of V is a constant for the gradient, which saves memory and changes
        little (section 4.3 of the paper).
        """
        kernel = _float32(self.kernel)
        product = jax.lax.stop_gradient(self.product())
        before = jnp.linalg.norm(kernel, axis=-2)
        after = jnp.linalg.norm(kernel + product, axis=-2)
        # a column of zeros stays one
        ratio = jnp.where(after > 0, before / jnp.where(after > 0, after, 1), 1)
        return _float32(self.lora_gain) * ratio


KINDS: dict[str, type[LoRALinear]] = {"lora": LoRALinear, "dora": DoRALinear}


def lora(
    model: Any,
    *,
    rank: int = 8,
    targets: str | Sequence[str] = "*",
    alpha: float | None = None,
) -> Callable[..., nnx.Module]:
    """Return a model's factory with low-rank adapters on its linear layers.

    Args:
      model: an NNX factory as in `Recipe.model`, or a module, which is not changed.
      rank: of the adapters.
      targets: patterns of the layers' paths, such as "blocks/*/attention/*", or their
        last names, such as "query". "*" stands for every `nnx.Linear`.
      alpha: rank times the factor of what an adapter adds. None: 2 * rank.

    Returns:
      A factory for `Recipe.model`. It raises a ModelError where a pattern matches no
      `nnx.Linear`, or a rank is as large as a layer.

    Example:
      >>> import lepton_jax as lepton
      >>> import optax
      >>> small = partial(lepton.models.MLP, (4, 16, 2))
      >>> net = lora(small, rank=2)(nnx.Rngs(0))
      >>> net(jnp.zeros((8, 4))).shape
      (8, 2)
    """
    return _factory(model, "lora", rank, targets, alpha)


def dora(
    model: Any,
    *,
    rank: int = 8,
    targets: str | Sequence[str] = "*",
    alpha: float | None = None,
) -> Callable[..., nnx.Module]:
    """Return a model's factory with adapters that also learn the columns' lengths.

    Arguments and errors are those of `lora`.
    """
    return _factory(model, "dora", rank, targets, alpha)


def adapted(
    model: Any,
    *,
    kind: str,
    rank: int,
    targets: Sequence[str],
    alpha: float,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """Return a model with adapters.

    Args:
      model: as in `lora`; also rank, targets and alpha.
      kind: "lora" or "dora".
      rank: of the adapters.
      targets: patterns.
      alpha: rank times the factor.
      rngs: first for the model, so that its weights are those that it has without
        adapters; then for the adapters.

    Raises:
      ModelError: as `lora` says.
    """
    module = made(model, rngs)
    linears = _linears(module)
    chosen = {
        path: linear
        for path, linear in linears.items()
        if any(_is_target(path, pattern) for pattern in targets)
    }
    for pattern in targets:
        if not any(_is_target(path, pattern) for path in linears):
            alike = nearest(pattern, _names(linears))
            raise ModelError(
                f"no nnx.Linear is called {pattern!r}{alike}",
                where=f"adapt.{kind}, targets",
                remedy=f"the linear layers are {_listed(linears)}",
            )
    for path, linear in chosen.items():
        _adapt(linear, path, kind, rank, alpha / rank, rngs)
    return module


def merge(module: nnx.Module) -> Any:
    """Return the plain module with the adapters added to its kernels.

    Args:
      module: from a factory of `lora` or `dora`; it is not changed.

    Returns:
      A module of the plain model's structure. One without adapters comes back as a
      copy.
    """
    plain = nnx.clone(module)
    adapted_ones = [x for x in _linears(plain).values() if isinstance(x, LoRALinear)]
    linear: Any
    for linear in adapted_ones:
        kernel = linear.merged_kernel().astype(linear.kernel.dtype)
        linear.kernel[...] = kernel
        for name in [name for name in vars(linear) if name.startswith("lora_")]:
            delattr(linear, name)
        linear.__class__ = nnx.Linear
    return plain


def plain_model(model: Any) -> Any:
    """Return the model that `lora` or `dora` was given; None: it is of neither."""
    if isinstance(model, partial) and model.func is adapted:
        return model.args[0]
    return None


# ---- internals ----


def _factory(
    model: Any,
    kind: str,
    rank: int,
    targets: str | Sequence[str],
    alpha: float | None,
) -> Callable[..., nnx.Module]:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ModelError(
            f"rank is {rank!r}; it must be a whole number of at least 1",
            where=f"adapt.{kind}",
            remedy="give e.g. rank=8",
        )
    patterns = (targets,) if isinstance(targets, str) else tuple(targets)
    if not patterns:
        raise ModelError(
            "there are no targets",
            where=f"adapt.{kind}",
            remedy='give patterns of layers, or "*" for all',
        )
    return partial(
        adapted,
        model,
        kind=kind,
        rank=rank,
        targets=patterns,
        alpha=USUAL_SCALE * rank if alpha is None else alpha,
    )


def made(
    model: Any,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """Return the module of a factory, or a copy of a module."""
    if isinstance(model, nnx.Module):
        return nnx.clone(model)
    target = model.func if isinstance(model, partial) else model
    make = target.__init__ if inspect.isclass(target) else target
    parameters = inspect.signature(make).parameters
    module = model(rngs=rngs) if "rngs" in parameters else model(rngs)
    if not isinstance(module, nnx.Module):
        raise ModelError(
            f"the model is a {type(module).__name__}",
            where="adapt",
            remedy="give a flax.nnx.Module, or its factory",
        )
    return module


def _linears(module: nnx.Module) -> dict[str, Any]:
    """Return the linear layers of a module by path."""
    nodes = nnx.iter_graph(module)
    found = {
        "/".join(map(str, path)): node
        for path, node in nodes
        if isinstance(node, nnx.Linear)
    }
    return dict(sorted(found.items()))


def _adapt(
    linear: Any,
    path: str,
    kind: str,
    rank: int,
    scale: float,
    rngs: nnx.Rngs,
) -> None:
    """Make an adapted layer of a linear one, in its place.

    The kernel of layers that are stacked for a scan has more dims in front.
    """
    kernel = linear.kernel
    *stack, fan_in, fan_out = kernel.shape
    if rank >= min(fan_in, fan_out):
        raise ModelError(
            f"an adapter of rank {rank} is as large as the layer {path!r}, which is"
            f" {fan_in} by {fan_out}",
            where=f"adapt.{kind}",
            remedy=f"give a rank below {min(fan_in, fan_out)}, or leave the layer out",
        )
    # uniform in +-1 / sqrt(fan_in), as in the authors' code
    bound = 1 / math.sqrt(fan_in)
    first = jax.random.uniform(
        rngs.params(),
        (*stack, fan_in, rank),
        kernel.dtype,
        -bound,
        bound,
    )
    linear.__class__ = KINDS[kind]
    linear.lora_a = nnx.Param(first)
    linear.lora_b = nnx.Param(jnp.zeros((*stack, rank, fan_out), kernel.dtype))
    linear.lora_scale = scale
    if kind == "dora":
        linear.lora_gain = nnx.Param(jnp.ones((*stack, fan_out), kernel.dtype))


def _is_target(
    path: str,
    pattern: str,
) -> bool:
    return matches(path, pattern) or matches(path, f"**/{pattern}")


def _names(paths: Any) -> list[str]:
    """Return the paths, and their last names."""
    return [*paths, *dict.fromkeys(path.rpartition("/")[2] for path in paths)]


def _listed(paths: Any) -> str:
    names = list(paths)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return (", ".join(names[:LISTED]) + more) or "none"


def _float32(variable: Any) -> jax.Array:
    return variable[...].astype(jnp.float32)
