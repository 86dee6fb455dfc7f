"""Collectives that XLA takes out of loops, and numbers that it rounds before it sends.

A recurrent layer uses the same kernel at each step of its loop. If the kernel is stored
in parts, its gather is written inside the loop, and gives the same at each step:

    loop, 64 steps:
        gathered = all-gather(kernel)      # the same each time
        state = tanh(state @ gathered + inputs[step])

XLA moves such a collective in front of the loop, by rules that depend on the backend.
Those below were found in programs that jaxlib and libtpu of jax 0.10 compiled: LSTM,
GRU and MLP in micro-batches, float32 and bfloat16, for cpu:4, v5e:2x2 and v5e:4x4, and
a transformer of 8B parameters for v5p:4x4x4.

- The CPU backend takes out whatever a loop does not change.
- The TPU backend takes out what does not grow, such as an all-to-all. An all-gather
  grows. It leaves the loop only where its operand is computed in the loop, by a cast
  or a transpose: that leaves first, whole, and is split and gathered there.
- The TPU backend sums a gradient over the loop's steps first and reduces the sum once,
  but for a reduce-scatter. The CPU backend reduces at each step.
- The GPU backend was not seen: nothing moves (assumption).

Kernels of scanned layers are stacked, and a loop takes another slice of them at each
step, so their gathers stay. A loop over micro-batches is the outermost one, and none
of the graph's. All that is computed from parameters alone is constant in it.

A TPU multiplies float32 numbers as bfloat16 unless a product asks for more. What only
such products read is rounded before it is gathered, and half the bytes are sent.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lepton_jax.compat import scan_counts
from lepton_jax.planner.program.graph import (
    BARRIER,
    KEEPING,
    Graph,
    Operation,
    Region,
    Value,
)
from lepton_jax.planner.program.layout import Contraction, Move
from lepton_jax.planner.xla.operations import DOTS, rounds_operands

# Collectives whose result is larger than their operand.
GROWING = {"all-gather"}

# Collectives that add up: what they send is not rounded before.
SUMMING = {"all-reduce", "reduce-scatter"}

# The operations through which a TPU moves the rounding of what a product reads.
ROUNDED_EARLIER = {
    "transpose",
    "reshape",
    "squeeze",
    "expand_dims",
    "broadcast_in_dim",
    "gather",
    "copy",
    "layout_constraint",
    "name",
}

# The operations between the reduction of a gradient and the sum that a loop carries.
PASSED_ON = {
    *KEEPING,
    "add_any",
    "reshape",
    "squeeze",
    "expand_dims",
    "broadcast_in_dim",
}


class Motion:
    """Count the runs of each collective in a step, and the bytes that it sends.

    Args:
      graph: the program of one micro-batch.
      platform: JAX's name of the backend: "cpu", "tpu" or "cuda".
    """

    def __init__(
        self,
        graph: Graph,
        platform: str,
    ):
        """Follow the graph's values through its loops."""
        self.graph = graph
        self.platform = platform
        # For each value the number of times that a step computes it anew.
        self._runs: dict[int, int] = {}
        # Values that an operation makes; the others enter a region.
        self._made: dict[int, int] = {}
        # Terms of the sums that a loop carries to the number of runs of the loop.
        self._summed: dict[int, int] = {}
        # Terms of what the loop over micro-batches sums up.
        self._results: set[int] = set()
        self._results.update(_terms(graph.main.results, graph.main))
        self._follow(graph.main, [1] * len(graph.main.inputs), 1)
        self._rounded: set[int] = set()
        if platform == "tpu":
            self._rounded = _rounded_values(graph)

    def runs(
        self,
        op: Operation,
        value: Value,
        kind: str,
        parts: int,
    ) -> int:
        """Return how often a step of `parts` micro-batches runs a collective.

        Args:
          op: the operation that needs it.
          value: what is moved: an input of the operation or its result.
          kind: such as "all-gather", as XLA compiles it.
          parts: the number of micro-batches.
        """
        if any(value is output for output in op.outputs):
            return self._runs_of_sum(op, value, kind, parts)
        if not self._leaves(op, value, kind):
            return op.times * parts
        outside = self._runs[value.index]
        constant = value.stored is not None and outside == 1
        if constant and self._may_leave(value, kind):
            return 1
        return outside * parts

    def sent_share(
        self,
        op: Operation,
        value: Value,
        kind: str,
    ) -> float:
        """Return the share of a value's bytes that a collective of it sends.

        Args:
          op: the operation that needs it.
          value: what is moved: an input of the operation or its result.
          kind: such as "all-gather".
        """
        if self.platform != "tpu":
            return 1.0
        rounds = value.index in self._rounded
        if any(value is out for out in op.outputs):
            return 0.5 if rounds and kind not in SUMMING else 1.0
        if value.stored is None and str(value.dtype) == "float32":
            # The copy that is moved is for this operation alone.
            rounds = rounds or rounds_operands(op)
        return 0.5 if rounds else 1.0

    def is_summed(self, value: Value) -> bool:
        """Whether a loop, or a step over its micro-batches, sums up a value."""
        return value.index in self._summed or value.index in self._results

    def look(
        self,
        op: Operation,
        value: Value,
    ) -> tuple:
        """Return what makes a value's collectives like those of another."""
        return (
            self._runs[value.index],
            self._made.get(value.index) == op.times,
            self._summed.get(value.index),
            value.index in self._results,
            value.index in self._rounded,
        )

    # ---- internals ----

    def _leaves(
        self,
        op: Operation,
        value: Value,
        kind: str,
    ) -> bool:
        """Whether a collective of an operand leaves the loops that don't change it."""
        if op.times == 1:
            return True
        if self.platform == "tpu" and kind in GROWING:
            return self._made.get(value.index) == op.times
        return self.platform in ("cpu", "tpu")

    def _may_leave(
        self,
        value: Value,
        kind: str,
    ) -> bool:
        """Whether a collective of parameters leaves the loop over micro-batches."""
        if self.platform == "tpu" and kind in GROWING:
            return value.index in self._made
        return self.platform in ("cpu", "tpu")

    def _runs_of_sum(
        self,
        op: Operation,
        value: Value,
        kind: str,
        parts: int,
    ) -> int:
        """Return the runs of a collective that reduces an operation's result."""
        if self.platform != "tpu" or kind != "all-reduce":
            return op.times * parts
        runs = self._summed.get(value.index, op.times)
        is_late = runs == 1 and value.index in self._results
        return 1 if is_late else runs * parts

    def _follow(
        self,
        region: Region,
        runs: list[int],
        times: int,
    ) -> None:
        """Note how often each value of a region is computed anew.

        Args:
          region: the region.
          runs: for each of its inputs, how often it changes.
          times: how often the region runs.
        """
        pairs = zip(region.inputs, runs, strict=True)
        self._runs.update((value.index, count) for value, count in pairs)
        self._runs.update((value.index, 1) for value in region.constants)
        for op in region.operations:
            given = [1 if v is None else self._runs[v.index] for v in op.inputs]
            count = times if op.eqn.effects or op.regions else max(given, default=1)
            for value in op.outputs:
                self._runs[value.index] = count
                self._made[value.index] = op.times
            for inner in op.regions:
                self._enter(op, inner, given)

    def _enter(
        self,
        op: Operation,
        inner: Region,
        given: list[int],
    ) -> None:
        """Follow the values into a loop's body or a conditional's branch."""
        if op.name != "scan":
            # Nothing is known to leave a branch, or a loop without a fixed length.
            runs = [op.times] * len(inner.inputs)
            self._follow(inner, runs, op.times)
            return
        consts, carried = scan_counts(op.eqn)
        times = op.times * op.params["length"]
        rest = len(inner.inputs) - consts
        self._follow(inner, [*given[:consts], *[times] * rest], times)

        for number, result in enumerate(inner.results[:carried]):
            carry = inner.inputs[consts + number]
            terms = _terms([result], inner)
            if carry.index not in terms:
                continue
            self._summed.update(dict.fromkeys(terms, op.times))
            if op.outputs[number].index in self._results:
                self._results.update(terms)


def _terms(
    results: Iterable[Any],
    region: Region,
) -> set[int]:
    """Return the indices of the values of a region that some results are sums of."""
    producers = {v.index: op for op in region.operations for v in op.outputs}
    terms: set[int] = set()
    pending = [result for result in results if isinstance(result, Value)]
    while pending:
        value = pending.pop()
        if value.index in terms:
            continue
        terms.add(value.index)
        producer = producers.get(value.index)
        if producer is not None and producer.name in PASSED_ON:
            pending += [given for given in producer.inputs if given is not None]
    return terms


def moved_value(
    op: Operation,
    product: Contraction | None,
    move: Move,
) -> Value:
    """Return the operand or the result of an operation that a move is of.

    Args:
      op: the operation.
      product: the same as a contraction, if it is one.
      move: one of the moves of its `Decision`.
    """
    if move.where == "out":
        return op.outputs[0]
    side, _, place = move.where.partition(" ")
    if side == "result":
        return op.outputs[int(place)]
    if side in ("input", "operand"):
        number = int(place)
    else:
        assert product is not None, move
        own = product.left if move.where == "left" else product.right
        assert own is not None, move
        number = own
    value = op.inputs[number]
    assert value is not None
    return value


def _rounded_values(graph: Graph) -> set[int]:
    """Return the float32 values that only products read that round their operands."""
    readers: dict[int, list[tuple[Operation, int]]] = {}
    kept: set[int] = set()
    _collect_readers(graph.main, readers, kept)
    rounded: set[int] = set()
    for value in reversed(graph.values):
        if str(value.dtype) != "float32" or value.index in kept:
            continue
        users = readers.get(value.index, ())
        if users and all(_rounds(op, number, rounded) for op, number in users):
            rounded.add(value.index)
    return rounded


def _collect_readers(
    region: Region,
    readers: dict[int, list[tuple[Operation, int]]],
    kept: set[int],
) -> None:
    """Collect who reads each value, and which values a region gives as results."""
    kept.update(v.index for v in region.results if isinstance(v, Value))
    for op in region.operations:
        for number, value in enumerate(op.inputs):
            if value is not None:
                readers.setdefault(value.index, []).append((op, number))
        for inner in op.regions:
            _collect_readers(inner, readers, kept)


def _rounds(
    op: Operation,
    number: int,
    rounded: set[int],
) -> bool:
    """Whether an operation reads no more than the bfloat16 part of an input."""
    if op.name in DOTS:
        return rounds_operands(op)
    if op.name == "scan":
        consts, _ = scan_counts(op.eqn)
        return number < consts and op.regions[0].inputs[number].index in rounded
    if op.name == BARRIER:
        return op.outputs[number].index in rounded
    passes = op.name in ROUNDED_EARLIER and number == 0
    return passes and op.outputs[0].index in rounded
