"""Muon for kernels that are split over devices: each matrix is orthogonalized once.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) replaces the momentum M of
a kernel by the nearest orthogonal matrix, which five steps of an iteration find:

    X = M / |M|;    A = X X';    X = a X + (b A + c A A) X

The iteration needs whole matrices. Where a plan keeps each kernel in parts, XLA would
compute every one of them on all devices, and sum over the devices in each product. Here
matrices of one shape, of all layers and kernels, are stacked, and the stack is divided:

    32 layers, gate and up (4096, 14336), on 64 devices:  one matrix each

Two exchanges of the momentum and of the update remain, for any number of steps.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lepton_jax.trees import by_path, matches

# Coefficients of the iteration, of `optax.contrib.muon`: they are Jordan's.
COEFFICIENTS = (3.4445, -4.775, 2.0315)
STEPS = 5

_mesh: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar(
    "mesh", default=None
)


class Stack(NamedTuple):
    """Matrices of one shape, that are orthogonalized together.

    Attributes:
      matrices: their number.
      rows: of each; the fewer of its two dims.
      columns: of each.
    """

    matrices: int
    rows: int
    columns: int


def muon(
    learning_rate: Any,
    beta: float = 0.95,
    weight_decay: float = 0.0,
    *,
    nesterov: bool = True,
    consistent_rms: float | None = None,
) -> optax.GradientTransformation:
    """Return Muon for kernels, of which the last two dims are a matrix.

    Its updates are those of `optax.contrib.muon`. Give parameters that are no kernels
    to another optimizer, with `by_part`.

    Args:
      learning_rate: a number or a schedule.
      beta: decay of the momentum.
      weight_decay: as of AdamW.
      nesterov: whether the momentum looks ahead.
      consistent_rms: size of an update's numbers. None: an update is scaled by the
        square root of its columns over its rows, if that is above 1.
    """
    return optax.chain(
        optax.contrib.scale_by_muon(
            beta=beta,
            ns_steps=0,  # it only divides by the norm
            nesterov=nesterov,
            weight_dimension_numbers=_dims,
        ),
        _stateless(orthogonalized),
        _stateless(lambda updates: _sized(updates, consistent_rms)),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


@contextlib.contextmanager
def divided_over(mesh: Mesh | None) -> Iterator[None]:
    """Divide the work of orthogonalization over a mesh, in what is traced meanwhile."""
    token = _mesh.set(mesh)
    try:
        yield
    finally:
        _mesh.reset(token)


def stacks(kernels: Any) -> list[Stack]:
    """List the stacks of some kernels.

    >>> shapes = [(32, 64, 256), (32, 256, 64), (64, 64)]
    >>> stacks([jax.ShapeDtypeStruct(shape, "float32") for shape in shapes])
    [Stack(matrices=64, rows=64, columns=256), Stack(matrices=1, rows=64, columns=64)]
    """
    counts: dict[tuple[int, int], int] = defaultdict(int)
    for kernel in jax.tree.leaves(kernels):
        *layers, first, second = kernel.shape
        shape = min(first, second), max(first, second)
        counts[shape] += math.prod(layers)
    return [Stack(count, *shape) for shape, count in counts.items()]


def kernels_of(optimizer: Any, params: Any) -> dict[str, Any]:
    """Return the parameters whose updates `muon` makes, by path.

    Args:
      optimizer: as in `Recipe.optimizer`.
      params: arrays or shapes.
    """
    leaves = by_path(params)
    parts = getattr(optimizer, "parts", None)
    if parts is None:
        return leaves if _is_muon(optimizer) else {}
    own = {}
    for path, leaf in leaves.items():
        fitting = (x for x in parts if x.pattern is None or matches(path, x.pattern))
        part = next(fitting, None)
        if part is not None and _is_muon(part.given):
            own[path] = leaf
    return own


def orthogonalized(updates: Any) -> Any:
    """Return matrices of norm 1, orthogonalized."""
    leaves, structure = jax.tree.flatten(updates)
    by_shape: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number, leaf in enumerate(leaves):
        rows, columns = sorted(leaf.shape[-2:])
        by_shape[rows, columns].append(number)
    for shape, numbers in by_shape.items():
        parts = [_as_stack(leaves[number], shape) for number in numbers]
        whole = _orthogonalized(jnp.concatenate(parts))
        start = 0
        for number, part in zip(numbers, parts, strict=True):
            own = whole[start : start + len(part)]
            start += len(part)
            leaves[number] = _from_stack(own, leaves[number].shape)
    return jax.tree.unflatten(structure, leaves)


# ---- internals ----


def _is_muon(optimizer: Any) -> bool:
    """Whether an optimizer is `muon`, perhaps with settings, or wrapped."""
    while optimizer is not muon:
        inner = getattr(optimizer, "func", None) or getattr(
            optimizer, "__wrapped__", None
        )
        if inner is None:
            return False
        optimizer = inner
    return True


def _stateless(change: Any) -> optax.GradientTransformation:
    return optax.stateless(lambda updates, params: change(updates))


def _dims(kernels: Any) -> Any:
    def of(kernel: Any) -> Any:
        own = (kernel.ndim - 2, kernel.ndim - 1)
        return optax.contrib.MuonDimensionNumbers(*own)

    return jax.tree.map(of, kernels)


def _sized(updates: Any, consistent_rms: float | None) -> Any:
    """Return updates scaled by their shapes, as Optax's `scale_by_shape` does."""

    def sized(update: Any) -> Any:
        rows, columns = update.shape[-2:]
        if consistent_rms is None:
            return update * math.sqrt(max(1.0, columns / rows))
        return update * (consistent_rms * math.sqrt(max(rows, columns)))

    return jax.tree.map(sized, updates)


def _as_stack(kernel: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Return (matrices, rows, columns), the fewer first."""
    if kernel.shape[-2:] != shape:
        kernel = jnp.swapaxes(kernel, -1, -2)
    return kernel.reshape(-1, *shape)


def _from_stack(stack: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Undo `_as_stack`."""
    *layers, rows, columns = shape
    if stack.shape[-2:] == (rows, columns):
        return stack.reshape(shape)
    return jnp.swapaxes(stack.reshape(*layers, columns, rows), -1, -2)


def _orthogonalized(stack: jax.Array) -> jax.Array:
    count = len(stack)
    mesh = _mesh.get()
    if mesh is not None and mesh.size > 1:
        missing = -count % mesh.size
        stack = jnp.pad(stack, ((0, missing), (0, 0), (0, 0)))
        spec = PartitionSpec(tuple(mesh.axis_names))
        stack = jax.lax.with_sharding_constraint(stack, NamedSharding(mesh, spec))
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        square = stack @ jnp.swapaxes(stack, -1, -2)
        stack = a * stack + (b * square + c * square @ square) @ stack
    if mesh is not None and mesh.size > 1:
        stack = jax.lax.with_sharding_constraint(stack, NamedSharding(mesh, spec))
    return stack[:count]
