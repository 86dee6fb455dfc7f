"""A stack of equal layers as a pipeline of stages.

A model that runs its layers in a `scan` has their parameters stacked: (layers, ...).
Here the scan over layers becomes a scan over *turns*. The layers are divided into
stages; all stages work at the same time, each on another micro-batch, and hand it on
after each turn. With four layers on two stages (A: layers 0 and 1, B: layers 2 and 3)
and three micro-batches, four turns are needed, 3 + 2 - 1:

    turn       0    1    2    3
    stage A    0    1    2    -
    stage B    -    0    1    2

In the places marked "-" a stage computes something that nobody reads: the *bubble*,
(stages - 1) / (micro-batches + stages - 1) of the work.

The activations of all stages are one array, (stages, samples, ...), and a layer is
mapped over its first dim. The planner finds that dim as a named axis, like the batch or
the heads, and may divide it over the devices; parameters of the stack follow. So it is
the form of GPipe (Huang et al. 2019, arXiv 1811.06965) as Xu et al. vectorize it (2021,
"GSPMD", arXiv 2105.04663, section 3.3), and its backward pass is its derivative, which
runs the turns back. So activations of all micro-batches in flight are kept: the inputs
of layers alone, where layers are rematerialized. 1F1B (Narayanan et al. 2019) keeps
those of at most as many micro-batches as there are stages, for the same bubble. But
there a stage runs forward while another runs back, and in one program for all devices
each would have to do both at each turn.

*Chunks* make the bubble smaller (Narayanan et al. 2021, arXiv 2104.04473, section 2.2).
A stage has several runs of layers, and a micro-batch goes around the ring as often.
With two chunks, stage A has layers 0 and 2, stage B 1 and 3. Two micro-batches, a turn
of one layer:

    turn       0    1    2    3    4
    stage A    0.0  1.0  0.2  1.2  -        micro-batch.layer
    stage B    -    0.1  1.1  0.3  1.3

Micro-batches are strided, not runs: of six samples in three, micro-batch 0 has the
samples 0 and 3. So each device takes its samples from those that it has.

What a layer computes is known for a whole batch. For a micro-batch the loss is traced
once more, for fewer samples, and both programs are read side by side: what differs in
its leading dim carries samples. Random numbers of a layer are drawn for the whole batch
and each micro-batch takes its own, so that the numbers are those of the plain model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lepton_jax.compat import ClosedJaxpr, scan_counts
from lepton_jax.planner.rewrite.pipeline import Pipeline, Stack, Stages, draws
from lepton_jax.planner.rewrite.program import opened, run


def in_stages(
    function: Callable,
    stages: Stages,
    batched: tuple[int, ...],
) -> Callable:
    """Return a function whose stack of layers is a pipeline.

    Where there is no such stack, the function stays as it is. Where the samples do not
    divide into `stages.parts` micro-batches, there are as many as do.

    Args:
      function: of arrays in pytrees.
      stages: the pipeline.
      batched: numbers of the arguments whose arrays hold samples, in their first dim.
    """
    if stages.count == 1:
        return function

    def piped(*args: Any) -> Any:
        program, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        whole = opened(program)
        own, part = _of_a_part(function, stages, batched, args, whole)
        stack = largest(stacks(whole, part, own.parts), own)
        rule = None if stack is None else Pipeline(stack, own).rule
        results = run(whole, jax.tree.leaves(args), rule)
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return piped


def traced_for(
    function: Callable,
    parts_: int,
    batched: tuple[int, ...],
    args: tuple,
) -> ClosedJaxpr:
    """Return a function's program for one of several micro-batches."""
    smaller = []
    for number, arg in enumerate(args):
        divisor = parts_ if number in batched else 1
        smaller.append(jax.tree.map(partial(_smaller, divisor=divisor), arg))
    return opened(jax.make_jaxpr(function)(*smaller))


def stacks(
    whole: ClosedJaxpr,
    part: ClosedJaxpr,
    count: int,
) -> Iterator[Stack]:
    """Iterate over the scans of a program that run a stack of layers.

    What such a scan carries holds samples, all of it; the arrays of which it takes
    slices hold none, and are numbers of which gradients can be taken.

    Args:
      whole: the program for a whole batch, its calls opened.
      part: for a micro-batch.
      count: the number of micro-batches in a batch.
    """
    pairs = list(zip(whole.jaxpr.eqns, part.jaxpr.eqns, strict=False))
    alike = len(whole.jaxpr.eqns) == len(part.jaxpr.eqns)
    if not alike or any(a.primitive is not b.primitive for a, b in pairs):
        return
    for eqn, small in pairs:
        stack = _stack(eqn, small, count)
        if stack is not None:
            yield stack


def largest(found: Iterator[Stack], stages: Stages | None = None) -> Stack | None:
    """Return the stack with the most parameters; None: there is none.

    Args:
      found: stacks.
      stages: a pipeline that must divide its layers; None: any.
    """
    able = [s for s in found if stages is None or divides(s.layers, stages)]
    return max(able, key=_bytes_of_layers, default=None)


def layers_of(
    function: Callable,
    count: int,
    batched: tuple[int, ...],
    args: tuple,
) -> int:
    """Return the layers of a function's largest stack; 0: it has none.

    Args:
      function: as in `in_stages`.
      count: the number of micro-batches in a batch, above 1.
      batched: as in `in_stages`.
      args: shapes of its arguments.
    """
    whole = opened(jax.make_jaxpr(function)(*args))
    part = traced_for(function, count, batched, args)
    stack = largest(stacks(whole, part, count))
    return 0 if stack is None else stack.layers


def divides(layers: int, stages: Stages) -> bool:
    """Whether a number of layers is the same on each stage, in each chunk."""
    return layers % (stages.count * stages.chunks) == 0


# ---- internals: finding the stack ----


def _of_a_part(
    function: Callable,
    stages: Stages,
    batched: tuple[int, ...],
    args: tuple,
    whole: ClosedJaxpr,
) -> tuple[Stages, ClosedJaxpr]:
    """Return the pipeline for the samples that are there, and a micro-batch's program.

    With chunks, micro-batches go around in groups of as many as there are stages.
    """
    samples = jax.tree.leaves([args[number] for number in batched])
    count = math.gcd(stages.parts, samples[0].shape[0])
    chunks = stages.chunks
    if chunks > 1 and count % stages.count:
        count, chunks = 1, 1
    groups = math.gcd(stages.groups, count)
    own = Stages(stages.count, count, chunks, groups)
    if count == 1:
        return own, whole
    return own, traced_for(function, count, batched, args)


def _smaller(leaf: Any, divisor: int) -> jax.ShapeDtypeStruct:
    shape = leaf.shape
    if divisor > 1 and shape:
        shape = (shape[0] // divisor, *shape[1:])
    weak = getattr(leaf, "weak_type", False)
    return jax.ShapeDtypeStruct(shape, leaf.dtype, weak_type=weak)


def _stack(eqn: Any, small: Any, count: int) -> Stack | None:
    """Return the stack that a scan runs; None: it runs none."""
    if not _may_be_a_stack(eqn):
        return None
    consts, carried = scan_counts(eqn)
    sliced = consts + carried
    given = zip(eqn.invars, small.invars, strict=True)
    holds = [_holds(a, b, count) for a, b in given]
    made = list(zip(eqn.outvars[carried:], small.outvars[carried:], strict=True))
    of_results = [_holds(a, b, count, dim=1) for a, b in made]
    if None in holds or None in of_results:
        return None

    # What is carried holds samples, and what is stacked does not.
    if any(holds[sliced:]) or not (count == 1 or all(holds[consts:sliced])):
        return None
    # Of results without samples the mean over micro-batches is taken.
    pairs = zip(eqn.outvars[carried:], of_results, strict=True)
    if count > 1 and not all(own or _is_real(v) for v, own in pairs):
        return None
    if not draws(eqn, small).can_be_taken_apart or not _can_be_mapped(small):
        return None
    return Stack(
        whole=eqn,
        part=small,
        consts=tuple(map(bool, holds[:consts])),
        results=tuple(map(bool, of_results)),
    )


def _may_be_a_stack(eqn: Any) -> bool:
    """Whether an equation is a loop that carries numbers and takes slices of some."""
    if eqn.primitive.name != "scan" or eqn.params["length"] < 2:
        return False
    if eqn.params["reverse"] or eqn.params["jaxpr"].effects:
        return False
    consts, carried = scan_counts(eqn)
    state = eqn.invars[consts : consts + carried]
    layers = eqn.invars[consts + carried :]
    return bool(state) and all(map(_is_real, state)) and any(map(_is_real, layers))


def _can_be_mapped(eqn: Any) -> bool:
    """Whether JAX knows how to map all operations of a loop's body."""
    body = eqn.params["jaxpr"]
    shapes = [
        jax.ShapeDtypeStruct((2, *variable.aval.shape), variable.aval.dtype)
        for variable in body.jaxpr.invars
    ]
    try:
        jax.eval_shape(jax.vmap(lambda *values: run(body, values)), *shapes)
    except NotImplementedError:
        return False
    return True


def _holds(whole: Any, part: Any, count: int, dim: int = 0) -> bool | None:
    """Whether a variable holds samples in a dim; None: it does in another way."""
    if whole.aval.shape == part.aval.shape:
        return False
    smaller = list(part.aval.shape)
    if len(smaller) <= dim:
        return None
    smaller[dim] *= count
    return True if tuple(smaller) == whole.aval.shape else None


def _is_real(variable: Any) -> bool:
    return jnp.issubdtype(variable.aval.dtype, jnp.floating)


def _bytes_of_layers(stack: Stack) -> int:
    consts, carried = scan_counts(stack.whole)
    layers = stack.whole.invars[consts + carried :]
    return sum(v.aval.size * v.aval.dtype.itemsize for v in layers if _is_real(v))
