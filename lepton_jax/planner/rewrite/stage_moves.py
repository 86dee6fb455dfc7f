"""Operations that move activations between the stages of a pipeline.

Activations of all stages lie in one array, (stages, samples, ...), whose first dim is
divided over the devices. Five operations lead in, out and around:

  stage_roll       every stage hands what it holds to the next one
  stage_place      samples enter at one stage; the others get zeros
  stage_pick       samples leave at one stage
  stage_layers     parameters of layers, (layers, ...), as (rounds, stages, ...)
  stage_parts      samples, (samples, ...), as (micro-batches, samples of one, ...)

Each is linear, and another of them is its transpose, so the backward pass has no
others. They are operations of their own so that the planner knows what they send (a
collective permute, an all-gather, a reduction, nothing), and parameters stay
recognizable behind them.

    >>> import jax.numpy as jnp
    >>> held = jnp.array([[1.0], [2.0], [3.0]])
    >>> [float(x[0]) for x in roll(held, 1)]
    [0.0, 1.0, 2.0]
    >>> [float(x[0]) for x in place(jnp.array([7.0]), 0, 3)]
    [7.0, 0.0, 0.0]
    >>> float(pick(held, 2)[0])
    3.0

Four layers on two stages: a stage has two neighbouring ones, one in each round. Where
stages have two chunks, a stage has every other layer:

    >>> layers = jnp.arange(4.0)
    >>> by_stage(layers, 2).tolist(), by_stage(layers, 2, chunks=2).tolist()
    ([[0.0, 2.0], [1.0, 3.0]], [[0.0, 1.0], [2.0, 3.0]])
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir

# the operations
ROLL = "stage_roll"
PLACE = "stage_place"
PICK = "stage_pick"
LAYERS = "stage_layers"
LAYERS_BACK = "stage_layers_back"
PARTS = "stage_parts"
PARTS_BACK = "stage_parts_back"

MOVES = (ROLL, PLACE, PICK, LAYERS, LAYERS_BACK, PARTS, PARTS_BACK)


def roll(held: Any, by: int, wraps: bool = False) -> Any:
    """Return what each stage holds after every stage has handed it on.

    Args:
      held: (stages, ...).
      by: 1: to the next stage; -1: to the one before.
      wraps: whether the last stage hands it to the first one; else that gets zeros.
    """
    return roll_p.bind(held, by=by, wraps=wraps)


def place(samples: Any, stage: int, stages: int) -> Any:
    """Return (stages, ...) with samples at one stage, and zeros at the others."""
    return place_p.bind(samples, stage=stage, stages=stages)


def pick(held: Any, stage: int) -> Any:
    """Return what one stage holds, of (stages, ...)."""
    return pick_p.bind(held, stage=stage, stages=held.shape[0])


def by_stage(layers: Any, stages: int, chunks: int = 1) -> Any:
    """Return the parameters of layers as (rounds, stages, ...).

    Args:
      layers: (layers, ...).
      stages: their number; with `chunks`, it divides the layers.
      chunks: runs of neighbouring layers of a stage.
    """
    return layers_p.bind(layers, stages=stages, chunks=chunks)


def in_parts(samples: Any, parts: int, groups: int = 1) -> Any:
    """Return samples as (micro-batches, samples of one, ...).

    Micro-batches are strided, so that devices that have runs of samples have some of
    each micro-batch. With groups, there are first the micro-batches of the first run:

    >>> in_parts(jnp.arange(8), 4).tolist()
    [[0, 4], [1, 5], [2, 6], [3, 7]]
    >>> in_parts(jnp.arange(8), 4, groups=2).tolist()
    [[0, 2], [1, 3], [4, 6], [5, 7]]

    Args:
      samples: (samples, ...).
      parts: the number of micro-batches.
      groups: the number of runs that have micro-batches of their own.
    """
    return parts_p.bind(samples, parts=parts, groups=groups)


def as_parts(samples: Any, parts: int, groups: int = 1) -> Any:
    """Return the same as `in_parts`, of arrays that are not the model's."""
    return _parts(samples, parts=parts, groups=groups)


def whole(parted: Any, groups: int = 1) -> Any:
    """Return (samples, ...) of `in_parts`."""
    return parts_back_p.bind(parted, parts=parted.shape[0], groups=groups)


def in_rounds(layers: Any, stages: int, chunks: int = 1) -> Any:
    """Return the same as `by_stage`, of arrays that are no parameters."""
    return _layers(layers, stages=stages, chunks=chunks)


def by_layer(rounds: Any, chunks: int = 1) -> Any:
    """Return (layers, ...) of (rounds, stages, ...): undo `by_stage`."""
    return layers_back_p.bind(rounds, stages=rounds.shape[1], chunks=chunks)


def rolled_over(
    held: Any,
    by: int,
    wraps: bool,
    axes: tuple[str, ...],
    devices: int,
) -> Any:
    """Return a device's part of what each stage holds after `roll`.

    Args:
      held: its part, (stages on it, ...).
      by: as in `roll`.
      wraps: likewise.
      axes: mesh axes over which stages are divided.
      devices: the number of devices along them.
    """
    pairs = [(device, device + by) for device in range(devices)]
    if wraps:
        pairs = [(device, to % devices) for device, to in pairs]
    else:
        pairs = [(device, to) for device, to in pairs if 0 <= to < devices]
    edge = held[-1:] if by > 0 else held[:1]
    handed = jax.lax.ppermute(edge, axes, pairs)
    parts = [handed, held[:-1]] if by > 0 else [held[1:], handed]
    return jnp.concatenate(parts)


def chunks_exchanged(
    layers: Any,
    chunks: int,
    axis: tuple[str, ...],
    stages: int,
    back: bool,
) -> Any:
    """Return a device's layers after those of each chunk went to their stage.

    The state keeps neighbouring layers on a device, and stages have every so-manieth
    run of them. With two stages of two chunks, device 0 keeps the runs 0 and 1 and
    computes 0 and 2. So in round r each device sends to the device r places on the run
    that it keeps for it, if there is one.

    Args:
      layers: those of a device, (layers, ...); a stage on each device.
      chunks: runs of layers of a stage.
      axis: mesh axes over which stages are divided.
      stages: their number.
      back: whether they go back to where they are kept.
    """
    runs = layers.reshape(chunks, -1, *layers.shape[1:])
    own = jax.lax.axis_index(axis)
    result = jnp.zeros_like(runs)
    for shift in range(stages):
        for again in range(-(-chunks // stages)):
            number = (np.arange(stages) * (1 - chunks) + shift) % stages
            number += again * stages
            pairs, taken, put = _round(number, shift, chunks, stages)
            if back:
                pairs = [(to, sender) for sender, to in pairs]
                taken, put = put, taken
            run = jax.lax.dynamic_index_in_dim(runs, jnp.array(taken)[own], 0)
            run = jax.lax.ppermute(run, axis, pairs)
            place_ = jnp.array(put)[own]
            whole = jax.lax.dynamic_update_index_in_dim(result, run, place_, 0)
            receives = jnp.isin(own, np.array([to for _, to in pairs], np.int32))
            result = jnp.where(receives, whole, result)
    return result.reshape(layers.shape)


def _round(
    number: np.ndarray,
    shift: int,
    chunks: int,
    stages: int,
) -> tuple[list[tuple[int, int]], list[int], list[int]]:
    """Return who sends to whom, the run that each takes, and where it is put.

    Args:
      number: the run that each device would send; none if it is beyond its chunks.
      shift: how many places on the receiver is.
      chunks: runs that a device keeps.
      stages: the number of devices.
    """
    pairs = []
    taken = [0] * stages
    put = [0] * stages
    for sender in range(stages):
        if number[sender] >= chunks:
            continue
        to = (sender + shift) % stages
        pairs.append((sender, to))
        taken[sender] = int(number[sender])
        put[to] = int(sender * chunks + number[sender]) // stages
    return pairs, taken, put


# ---- internals: what each computes where nothing is divided ----


def _roll(held: Any, *, by: int, wraps: bool) -> Any:
    if wraps:
        return jnp.roll(held, by, 0)
    zero = jnp.zeros_like(held[:1])
    return jnp.concatenate([zero, held[:-1]] if by > 0 else [held[1:], zero])


def _at(stage: int, shape: tuple[int, ...]) -> Any:
    """Return whether each element of (stages, ...) is of a stage."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, 0) == stage


def _place(samples: Any, *, stage: int, stages: int) -> Any:
    shape = (stages, *samples.shape)
    whole = jnp.broadcast_to(samples, shape)
    return jnp.where(_at(stage, shape), whole, jnp.zeros_like(whole))


def _pick(held: Any, *, stage: int, stages: int) -> Any:
    own = jnp.where(_at(stage, held.shape), held, jnp.zeros_like(held))
    return own.sum(0, dtype=held.dtype)


def _layers(layers: Any, *, stages: int, chunks: int) -> Any:
    count, *rest = layers.shape
    parts = layers.reshape(chunks, stages, count // stages // chunks, *rest)
    return parts.swapaxes(1, 2).reshape(count // stages, stages, *rest)


def _layers_back(rounds: Any, *, stages: int, chunks: int) -> Any:
    count, _, *rest = rounds.shape
    parts = rounds.reshape(chunks, count // chunks, stages, *rest)
    return parts.swapaxes(1, 2).reshape(count * stages, *rest)


def _parts(samples: Any, *, parts: int, groups: int) -> Any:
    count, *rest = samples.shape
    split = samples.reshape(groups, count // parts, parts // groups, *rest)
    return split.swapaxes(1, 2).reshape(parts, count // parts, *rest)


def _parts_back(parted: Any, *, parts: int, groups: int) -> Any:
    _, count, *rest = parted.shape
    split = parted.reshape(groups, parts // groups, count, *rest)
    return split.swapaxes(1, 2).reshape(parts * count, *rest)


# ---- internals: their shapes ----


def _same_shape(shape: tuple[int, ...], **_: Any) -> tuple[int, ...]:
    return shape


def _with_stages(shape: tuple[int, ...], *, stages: int, **_: Any) -> tuple[int, ...]:
    return (stages, *shape)


def _without_stages(shape: tuple[int, ...], **_: Any) -> tuple[int, ...]:
    return shape[1:]


def _in_rounds(shape: tuple[int, ...], *, stages: int, **_: Any) -> tuple[int, ...]:
    return (shape[0] // stages, stages, *shape[1:])


def _in_order(shape: tuple[int, ...], *, stages: int, **_: Any) -> tuple[int, ...]:
    return (shape[0] * stages, *shape[2:])


def _parted(shape: tuple[int, ...], *, parts: int, **_: Any) -> tuple[int, ...]:
    return (parts, shape[0] // parts, *shape[1:])


def _unparted(shape: tuple[int, ...], **_: Any) -> tuple[int, ...]:
    return (shape[0] * shape[1], *shape[2:])


# ---- internals: the operations ----


def _operation(name: str, run: Callable, shape: Callable) -> Primitive:
    """Return an operation that is compiled as a function says."""
    primitive = Primitive(name)

    def abstract(x: Any, **params: Any) -> Any:
        return jax.core.ShapedArray(shape(x.shape, **params), x.dtype)

    def run_now(x: Any, **params: Any) -> Any:
        return jax.jit(partial(primitive.bind, **params))(x)

    primitive.def_abstract_eval(abstract)
    primitive.def_impl(run_now)
    mlir.register_lowering(primitive, mlir.lower_fun(run, multiple_results=False))
    return primitive


roll_p = _operation(ROLL, _roll, _same_shape)
place_p = _operation(PLACE, _place, _with_stages)
pick_p = _operation(PICK, _pick, _without_stages)
layers_p = _operation(LAYERS, _layers, _in_rounds)
layers_back_p = _operation(LAYERS_BACK, _layers_back, _in_order)
parts_p = _operation(PARTS, _parts, _parted)
parts_back_p = _operation(PARTS_BACK, _parts_back, _unparted)


def _roll_back(cotangent: Any, held: Any, *, by: int, wraps: bool) -> list[Any]:
    return [roll_p.bind(cotangent, by=-by, wraps=wraps)]


def _transposed(primitive: Primitive) -> Callable:
    def transpose(cotangent: Any, operand: Any, **params: Any) -> list[Any]:
        return [primitive.bind(cotangent, **params)]

    return transpose


ad.deflinear2(roll_p, _roll_back)
ad.deflinear2(place_p, _transposed(pick_p))
ad.deflinear2(pick_p, _transposed(place_p))
ad.deflinear2(layers_p, _transposed(layers_back_p))
ad.deflinear2(layers_back_p, _transposed(layers_p))
ad.deflinear2(parts_p, _transposed(parts_back_p))
ad.deflinear2(parts_back_p, _transposed(parts_p))
