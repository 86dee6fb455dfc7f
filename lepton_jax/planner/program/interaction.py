"""Whether samples of a batch can meet in a program, found without running it.

The program's dims are joined into classes (`graph`), and the class of the batch is
followed through every operation. Samples stay apart as long as the batch is one dim of
each array that holds them, and nothing takes that dim apart:

    x: (batch, 4) -- dot w: (4, 3) --> (batch, 3) -- sum over dim 1 --> (batch,)

Here the sum is over another dim. A mean over dim 0, x @ x.T (the batch twice in one
array), a sort or a slice along the batch, a loop over it, and each operation that is
not known let samples meet. The answer errs on one side only: samples that are said to
stay apart do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lepton_jax import losses
from lepton_jax.compat import ClosedJaxpr, Literal, scan_counts, source_line
from lepton_jax.planner.program.graph import Graph, Operation, Value
from lepton_jax.planner.program.trace import Trace
from lepton_jax.step.module import forward

LOOPS = ("scan", "while", "cond")  # their bodies say what they do
UNARY = {"copy", "copy_p", "convert_element_type", "reshape", "squeeze", "name", "neg"}
LINEAR = UNARY | {"add", "add_any", "sub", "mul", "div"}
LONGEST_MEAN = 32  # operations from a sum over the batch to the mean; assumption


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

    loop = _looped(graph, batch)
    if loop is not None:
        return _described(loop)

    final = {id(op) for op in _final_sums(graph, batch)} if means else set()
    for op in graph.operations():
        if id(op) not in final and _meets(graph, op, batch, size):
            return _described(op)
    return None


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
    return where_they_meet(
        step,
        fixed,
        (trace.inputs, trace.targets),
        means=True,
    )


def where_they_meet(
    function: Callable,
    fixed: tuple,
    batch: tuple,
    means: bool = False,
) -> str | None:
    """`where_samples_meet` of a function of pytrees of shapes.

    Args:
      function: takes the arguments of `fixed`, then those of `batch`.
      fixed: arguments that are the same for all samples, such as parameters.
      batch: arguments whose leaves all have the batch first.
      means: as of `where_samples_meet`.
    """
    program = jax.make_jaxpr(function)(*fixed, *batch)
    first = len(jax.tree.leaves(fixed))
    count = len(jax.tree.leaves(batch))
    return where_samples_meet(
        program,
        range(first, first + count),
        means,
    )


def is_mean_of_samples(function: Callable, batches: Sequence[tuple]) -> bool:
    """Whether a scalar of a batch is the mean of one value for each sample.

    So it is if its program ends in sums over the batch of values in which samples do
    not meet, times constants that halve where the batch is twice as large.

    Args:
      function: of batches to a scalar.
      batches: its arguments as shapes, for a batch and for one of twice its size. Each
        leaf that has twice the extent in some dim has its batch there.
    """
    few = _sums_of_a_mean(function, batches[0], batches)
    many = _sums_of_a_mean(function, batches[1], batches)
    if few is None or many is None:
        return False

    (constant, factors), (same, halves) = few, many
    if constant != same or len(factors) != len(halves):
        return False
    pairs = zip(factors, halves, strict=True)
    return all(abs(a - 2 * b) <= 1e-6 * abs(a) for a, b in pairs)


# ---- internals ----


def _meets(
    graph: Graph,
    op: Operation,
    batch: set[int],
    size: int,
) -> bool:
    """Whether an operation brings samples together, or may do so."""
    if op.name in LOOPS or not op.outputs:
        return False

    def places(value: Value | None) -> list[int]:
        if value is None:
            return []
        return [d for d, node in enumerate(value.nodes) if graph.find(node) in batch]

    held = [places(value) for value in op.inputs]
    if not any(held):
        return False
    if any(d in held[i] for i, d in [*op.reduced, *op.whole]):
        return True

    made = [places(value) for value in op.outputs]
    if any(len(dims) > 1 for dims in [*held, *made]):
        return True
    if not all(made):  # what comes out of samples must say which sample it is of
        return True
    return _hides_a_meeting(op, held, made, size)


def _hides_a_meeting(
    op: Operation,
    held: list[list[int]],
    made: list[list[int]],
    size: int,
) -> bool:
    """Whether an operation mixes samples though its dims alone do not show it."""
    if op.name == "reshape":
        # The batch must stay the major factor of its dim: (8, 6) to (6, 8) mixes rows.
        extent = op.outputs[0].shape[made[0][0]]
        return op.params.get("dimensions") is not None or extent % size != 0
    if op.name == "pad":
        return any(op.params["padding_config"][d] != (0, 0, 0) for d in held[0])
    if op.name == "gather" and op.inputs[1] is not None:
        return len(op.inputs[1].shape) - 1 in held[1]
    if op.name == "conv_general_dilated":
        groups = op.params["feature_group_count"]
        numbers = op.params["dimension_numbers"]
        channels = numbers.lhs_spec[1] in held[0]
        return op.params["batch_group_count"] > 1 or (channels and groups % size != 0)
    return False


def _described(op: Operation) -> str:
    return f"{op.name} at {source_line(op.eqn, op.callers)}"


def _sums_of_a_mean(
    function: Callable, batch: tuple, batches: Sequence[tuple]
) -> tuple[Any, list[float]] | None:
    """The constant and the factors of the sums that make a scalar, if nothing else
    does.
    """
    dims = _batch_dims(batches)
    leaves = jax.tree.leaves(batch)
    size = next(x.shape[d] for x, d in zip(leaves, dims, strict=True) if d is not None)

    graph = Graph(jax.make_jaxpr(function)(*batch))
    places = zip(
        graph.main.inputs,
        dims,
        strict=True,
    )
    classes = {graph.find(v.nodes[d]) for v, d in places if d is not None}
    made = _affine(
        graph,
        classes,
        graph.main.results[0],
    )
    if made is None or _looped(graph, classes):
        return None

    constant, sums = made
    final = {id(op) for op, _ in sums}
    for op in graph.operations():
        if id(op) not in final and _meets(graph, op, classes, size):
            return None
    return constant, [factor for _, factor in sums]


def _looped(graph: Graph, batch: set[int]) -> Operation | None:
    """A loop from sample to sample, which may carry something along."""
    for op in graph.operations():
        if op.name != "scan":
            continue
        consts, carried = scan_counts(op.eqn)
        stacked = [*op.inputs[consts + carried :], *op.outputs[carried:]]
        if any(v is not None and graph.find(v.nodes[0]) in batch for v in stacked):
            return op
    return None


def _final_sums(graph: Graph, batch: set[int]) -> list[Operation]:
    """List the sums over the batch that a scalar result is a mean of."""
    found = []
    for result in graph.main.results:
        if isinstance(result, Value) and not result.shape:
            sums = _affine(graph, batch, result)
            found += [op for op, _ in sums[1]] if sums is not None else []
    return found


Affine = tuple[Any, list[tuple[Operation, float]]]


def _affine(
    graph: Graph,
    batch: set[int],
    value: Any,
    steps: int = 0,
) -> Affine | None:
    """Take a value apart into a constant and sums over the batch times constants.

    Returns:
      (constant, [(the sum, its factor)]), or None if it is not made so.
    """
    if isinstance(value, Literal):
        return value.val, []
    block = graph.main
    for known, const in zip(block.constants, block.consts, strict=True):
        if known is value:
            return (const, []) if jnp.ndim(const) == 0 else None

    op = next((op for op in block.operations if value in op.outputs), None)
    if op is None or steps > LONGEST_MEAN:
        return None
    if op.name == "reduce_sum":
        summand = op.inputs[0]
        assert summand is not None  # a literal has no dims to sum over
        summed = {graph.find(summand.nodes[d]) for d in op.params["axes"]}
        if summed & batch:
            return 0.0, [(op, 1.0)]
    elif op.name not in LINEAR:
        return None

    parts = []
    for operand, written in zip(op.inputs, op.eqn.invars, strict=True):
        source = written if operand is None else operand
        part = _affine(graph, batch, source, steps + 1)
        if part is None:
            return None
        parts.append(part)
    return _combined(op.name, parts)


def _combined(name: str, parts: list[Any]) -> Affine | None:
    """Apply an operation to values of the form of `_affine`."""
    constant, sums = parts[0]
    if len(parts) == 1:
        return _scaled(parts[0], -1.0) if name == "neg" else parts[0]

    other, others = parts[1]
    if name in ("add", "add_any"):
        return constant + other, sums + others
    if name == "sub":
        other, others = _scaled(parts[1], -1.0)
        return constant + other, sums + others
    if name == "mul" and not others:
        return _scaled(parts[0], float(other))
    if name == "mul" and not sums:
        return _scaled(parts[1], float(constant))
    if name == "div" and not others and other != 0:
        return _scaled(parts[0], 1 / float(other))
    return None


def _scaled(part: Affine, factor: float) -> Affine:
    constant, sums = part
    return constant * factor, [(op, weight * factor) for op, weight in sums]


def _batch_dims(batches: Sequence[tuple]) -> list[int | None]:
    """The dim of each leaf whose extent differs between two batches."""
    found: list[int | None] = []
    few, many = (jax.tree.leaves(batch) for batch in batches)
    for small, large in zip(few, many, strict=True):
        pairs = enumerate(
            zip(
                small.shape,
                large.shape,
                strict=True,
            )
        )
        found.append(next((d for d, (a, b) in pairs if a != b), None))
    return found
