"""Whether samples of a batch can meet in a program, found without running it.

The program's dims are joined into named axes (see `graph`), and that of the batch is
followed through every operation. Samples stay apart as long as the batch is one dim of
each array that holds them, and nothing takes that dim apart:

    >>> import jax, jax.numpy as jnp
    >>> def norms(x):
    ...     return jnp.tanh(x).sum(axis=1)
    >>> x = jax.ShapeDtypeStruct((8, 4), jnp.float32)  # 8 samples
    >>> where_samples_meet(jax.make_jaxpr(norms)(x), [0]) is None
    True

Here the sum is over another dim. A sum over dim 0 lets samples meet, as do x @ x.T,
which has the batch twice in one array, a sort or a slice along the batch, a loop over
it, and each operation that is not known.

    >>> def centred(x):
    ...     return x - x.sum(axis=0)
    >>> where = where_samples_meet(jax.make_jaxpr(centred)(x), [0])
    >>> where.split()[0]
    'reduce_sum'

The answer errs on one side only: samples that are said to stay apart do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lepton_jax import losses
from lepton_jax.compat import ClosedJaxpr, Literal, scan_counts, source_line
from lepton_jax.planner.program.graph import Graph, Operation, Value
from lepton_jax.planner.program.ragged import RAGGED
from lepton_jax.planner.program.trace import Trace
from lepton_jax.planner.rewrite import experts
from lepton_jax.step.module import forward

LOOPS = ("scan", "while", "cond")  # the operations in their bodies count instead
UNARY = {"copy", "copy_p", "convert_element_type", "reshape", "squeeze", "name", "neg"}
LINEAR = UNARY | {"add", "add_any", "sub", "mul", "div"}

# Operations from a sum over the batch to the mean that it makes. Assumption: a loss
# divides, adds a few terms, weighs them and casts.
LONGEST_MEAN = 32

# Two factors are equal up to this share of the larger one: they are quotients of
# float32 numbers. Assumption.
ROUNDING = 1e-6


def where_samples_meet(
    program: ClosedJaxpr,
    batched: Iterable[int],
    means: bool = False,
) -> str | None:
    """Find the first operation at which samples of a batch can meet.

    Args:
      program: of any arrays.
      batched: indices of the inputs whose leading dim is the batch.
      means: whether scalar results may be means over samples; the sums that make them
        do not count as meetings then.

    Returns:
      "mean at file.py:12 (function)", or None where the samples stay apart.
    """
    graph = Graph(program)
    inputs = [graph.main.inputs[index] for index in batched]
    batch = {graph.find(value.nodes[0]) for value in inputs}
    size = inputs[0].shape[0]

    loop = _loop_over_samples(graph, batch)
    if loop is not None:
        return _described(loop)

    sums = _sums_of_means(graph, batch) if means else []
    meeting = _first_meeting(graph, batch, size, sums)
    return None if meeting is None else _described(meeting)


def where_samples_of_a_step_meet(trace: Trace) -> str | None:
    """Find where samples of a train step meet other than in the mean of their losses.

    Batch norm and losses over pairs of samples do, for instance: what they compute
    depends on how many samples pass through the model at once.

    Returns:
      "mean at file.py:12 (function)", or None where the samples stay apart.
    """

    def step(
        params: Any,
        variables: Any,
        key: Any,
        inputs: Any,
        targets: Any,
    ) -> Any:
        outputs, after = forward(
            trace.recipe,
            trace.functional,
            params,
            variables,
            inputs,
            key,
            True,
        )
        return losses.values(trace.recipe.loss, outputs, targets), after

    state = trace.state
    fixed = (state.params, state.variables, state.key)
    batch = (trace.inputs, trace.targets)
    if RAGGED in trace.operations:
        step = experts.ruled(step)
    return where_they_meet(step, fixed, batch, means=True)


def where_they_meet(
    function: Callable,
    fixed: tuple,
    batch: tuple,
    means: bool = False,
) -> str | None:
    """Find where samples meet in a function of pytrees (see `where_samples_meet`).

    Args:
      function: takes the arguments of `fixed`, then those of `batch`.
      fixed: arguments that are the same for all samples, such as parameters; shapes.
      batch: arguments whose leaves all have the batch first; shapes.
      means: as in `where_samples_meet`.
    """
    program = jax.make_jaxpr(function)(*fixed, *batch)
    first = len(jax.tree.leaves(fixed))
    count = len(jax.tree.leaves(batch))
    return where_samples_meet(program, range(first, first + count), means)


def is_mean_of_samples(
    function: Callable,
    batches: Sequence[tuple],
) -> bool:
    """Whether a scalar of a batch is the mean of one value for each sample.

    It is if its program ends in sums over the batch of values in which samples do not
    meet, times constants that halve where the batch is twice as large.

    Args:
      function: of batches to a scalar.
      batches: its arguments as shapes, for a batch and for one of twice its size. Each
        leaf that has twice the extent in some dim has its batch there.
    """
    few = _as_sums(function, batches[0], batches)
    many = _as_sums(function, batches[1], batches)
    if few is None or many is None or few.constant != many.constant:
        return False
    if len(few.sums) != len(many.sums):
        return False
    pairs = zip(few.sums, many.sums, strict=True)
    for one, other in pairs:
        difference = abs(one.factor - 2 * other.factor)
        if not difference <= ROUNDING * abs(one.factor):
            return False
    return True


# ---- meetings ----


def _first_meeting(
    graph: Graph,
    batch: set[int],
    size: int,
    sums: list[_Sum],
) -> Operation | None:
    """Return the first operation, but for some sums, that brings samples together."""
    excepted = {id(part.operation) for part in sums}
    for op in graph.operations():
        if id(op) not in excepted and _meets(graph, op, batch, size):
            return op
    return None


def _meets(
    graph: Graph,
    op: Operation,
    batch: set[int],
    size: int,
) -> bool:
    """Whether an operation brings samples together, or may do so.

    Args:
      graph: the program.
      op: one of its operations.
      batch: roots of the batch's named axis.
      size: the number of samples.
    """
    if op.name in LOOPS or not op.outputs:
        return False

    inputs = [_dims_in(graph, batch, value) for value in op.inputs]
    if not any(inputs):
        return False
    for number, dim in (*op.reduced, *op.whole):
        if dim in inputs[number]:
            return True

    outputs = [_dims_in(graph, batch, value) for value in op.outputs]
    if any(len(dims) > 1 for dims in (*inputs, *outputs)):
        return True
    if not all(outputs):  # what comes out of samples must say which sample it is of
        return True
    return _hides_a_meeting(op, inputs, outputs, size)


def _dims_in(
    graph: Graph,
    batch: set[int],
    value: Value | None,
) -> list[int]:
    """List the dims of a value that are the batch."""
    if value is None:
        return []
    dims = []
    for dim, node in enumerate(value.nodes):
        if graph.find(node) in batch:
            dims.append(dim)
    return dims


def _hides_a_meeting(
    op: Operation,
    inputs: list[list[int]],
    outputs: list[list[int]],
    size: int,
) -> bool:
    """Whether an operation mixes samples though its dims alone do not show it.

    Args:
      op: the operation.
      inputs: the dims of each input that are the batch.
      outputs: the same of each output.
      size: the number of samples.
    """
    if op.name == "reshape":
        # The batch must stay the major factor of its dim: (8, 6) to (6, 8) mixes rows.
        dim = outputs[0][0]
        extent = op.outputs[0].shape[dim]
        return op.params.get("dimensions") is not None or extent % size != 0
    if op.name == "pad":
        config = op.params["padding_config"]
        padding = [config[dim] for dim in inputs[0]]
        return any(amounts != (0, 0, 0) for amounts in padding)
    if op.name == "gather" and op.inputs[1] is not None:
        index_vector = len(op.inputs[1].shape) - 1
        return index_vector in inputs[1]
    if op.name == "conv_general_dilated":
        if op.params["batch_group_count"] > 1:
            return True
        channels = op.params["dimension_numbers"].lhs_spec[1]
        groups = op.params["feature_group_count"]
        return channels in inputs[0] and groups % size != 0
    return False


def _loop_over_samples(
    graph: Graph,
    batch: set[int],
) -> Operation | None:
    """Return a loop from sample to sample, which may carry something along."""
    for op in graph.operations():
        if op.name != "scan":
            continue
        consts, carried = scan_counts(op.eqn)
        sliced = op.inputs[consts + carried :]
        stacked = op.outputs[carried:]
        for value in (*sliced, *stacked):
            if value is not None and graph.find(value.nodes[0]) in batch:
                return op
    return None


def _described(op: Operation) -> str:
    return f"{op.name} at {source_line(op.eqn, op.callers)}"


# ---- means ----


@dataclass(frozen=True)
class _Sum:
    """A sum over the batch times a constant."""

    operation: Operation
    factor: float


@dataclass(frozen=True)
class _Affine:
    """A scalar as a constant and sums over the batch times constants."""

    constant: Any
    sums: list[_Sum]

    def scaled(self, factor: float) -> _Affine:
        sums = []
        for part in self.sums:
            sums.append(_Sum(part.operation, part.factor * factor))
        return _Affine(self.constant * factor, sums)

    def plus(self, other: _Affine) -> _Affine:
        constant = self.constant + other.constant
        return _Affine(constant, self.sums + other.sums)


def _as_sums(
    function: Callable,
    batch: tuple,
    batches: Sequence[tuple],
) -> _Affine | None:
    """Return a scalar function as sums over the batch, if nothing else makes it.

    Args:
      function: of batches to a scalar.
      batch: one of the batches.
      batches: two of different sizes, which tell where the batch dims are.
    """
    dims = _batch_dims(batches)
    graph = Graph(jax.make_jaxpr(function)(*batch))
    size = 0
    roots = set()
    places = zip(graph.main.inputs, dims, strict=True)
    for value, dim in places:
        if dim is not None:
            size = size or value.shape[dim]
            roots.add(graph.find(value.nodes[dim]))
    assert size, "no leaf has a batch dim"

    scalar = _affine(graph, roots, graph.main.results[0])
    if scalar is None or _loop_over_samples(graph, roots) is not None:
        return None
    if _first_meeting(graph, roots, size, scalar.sums) is not None:
        return None
    return scalar


def _sums_of_means(
    graph: Graph,
    batch: set[int],
) -> list[_Sum]:
    """List the sums over the batch that scalar results are means of."""
    sums = []
    for result in graph.main.results:
        if isinstance(result, Value) and not result.shape:
            scalar = _affine(graph, batch, result)
            if scalar is not None:
                sums += scalar.sums
    return sums


def _affine(
    graph: Graph,
    batch: set[int],
    value: Any,
    steps: int = 0,
) -> _Affine | None:
    """Take a scalar apart into a constant and sums over the batch.

    Args:
      graph: the program.
      batch: roots of the batch's named axis.
      value: the scalar, a value or a literal.
      steps: the number of operations between it and the result.

    Returns:
      The parts, or None if it is not made so.
    """
    if isinstance(value, Literal):
        return _Affine(value.val, [])
    main = graph.main
    pairs = zip(main.constants, main.consts, strict=True)
    for known, const in pairs:
        if known is value:
            return None if jnp.ndim(const) else _Affine(const, [])

    op = next((op for op in main.operations if value in op.outputs), None)
    if op is None or steps > LONGEST_MEAN:
        return None
    if op.name == "reduce_sum":
        if _sums_over(graph, batch, op):
            return _Affine(0.0, [_Sum(op, 1.0)])
    elif op.name not in LINEAR:
        return None

    parts = []
    operands = zip(
        op.inputs,
        op.eqn.invars,
        strict=True,
    )
    for operand, written in operands:
        source = written if operand is None else operand
        part = _affine(graph, batch, source, steps + 1)
        if part is None:
            return None
        parts.append(part)
    return _combined(op.name, parts)


def _sums_over(
    graph: Graph,
    batch: set[int],
    op: Operation,
) -> bool:
    summand = op.inputs[0]
    assert summand is not None  # a literal has no dims to sum over
    nodes = [summand.nodes[dim] for dim in op.params["axes"]]
    return any(graph.find(node) in batch for node in nodes)


def _combined(
    name: str,
    parts: list[_Affine],
) -> _Affine | None:
    """Apply an operation to scalars that have been taken apart."""
    left = parts[0]
    if len(parts) == 1:
        return left.scaled(-1.0) if name == "neg" else left

    right = parts[1]
    if name in ("add", "add_any"):
        return left.plus(right)
    if name == "sub":
        return left.plus(right.scaled(-1.0))
    if name == "mul" and not right.sums:
        return left.scaled(float(right.constant))
    if name == "mul" and not left.sums:
        return right.scaled(float(left.constant))
    if name == "div" and not right.sums and right.constant != 0:
        return left.scaled(1 / float(right.constant))
    return None


def _batch_dims(
    batches: Sequence[tuple],
) -> list[int | None]:
    """Return the dim of each leaf whose extent differs between two batches."""
    dims: list[int | None] = []
    few, many = (jax.tree.leaves(batch) for batch in batches)
    for small, large in zip(few, many, strict=True):
        extents = list(
            zip(
                small.shape,
                large.shape,
                strict=True,
            )
        )
        differing = [dim for dim, (a, b) in enumerate(extents) if a != b]
        dims.append(differing[0] if differing else None)
    return dims
