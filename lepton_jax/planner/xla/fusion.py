"""What of a graph XLA materializes: its fusion, imitated.

A *buffer* holds a value that is materialized. What is fused into its consumers has
none, and keeps alive what it is computed from instead. A *group* is what runs as one
kernel: it reads buffers and writes buffers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from lepton_jax.compat import scan_counts
from lepton_jax.planner.program.graph import BARRIER, Region, Graph, Operation, Value
from lepton_jax.planner.program.layout import itemsize
from lepton_jax.planner.program.rules import ELEMENTWISE

# the same bytes under another name
ALIASES = {
    "reshape",
    "squeeze",
    "expand_dims",
    BARRIER,
    "name",
    "copy",
    "copy_p",
    "stop_gradient",
    "sharding_constraint",
    "bitcast_convert_type",
    "random_wrap",
    "random_unwrap",
}
FREE = {"iota", "empty", "create_token", "axis_index"}
UNMERGED = ALIASES | FREE | {"random_bits"}
LOOPED = {
    *ELEMENTWISE,
    "broadcast_in_dim",
    "concatenate",
    "dynamic_slice",
    "pad",
    "rev",
    "slice",
    "split",
    "transpose",
} - ALIASES
REDUCED = {
    "reduce_sum",
    "reduce_max",
    "reduce_min",
    "reduce_prod",
    "reduce_and",
    "reduce_or",
    "argmax",
    "argmin",
}
FUSES = LOOPED | REDUCED | ALIASES
DOTS = {"dot_general", "conv_general_dilated"}
SCATTERS = {"scatter-add", "scatter_add"}
ROWWISE = {"gather", "scatter", *SCATTERS}
# XLA computes these once, however many need them, or where a broadcast would have them
# computed many times
COSTLY = {
    "acos",
    "asin",
    "atan",
    "atan2",
    "cbrt",
    "cos",
    "cosh",
    "digamma",
    "div",
    "erf",
    "erf_inv",
    "erfc",
    "exp",
    "exp2",
    "expm1",
    "lgamma",
    "log",
    "log1p",
    "logistic",
    "pow",
    "random_bits",
    "rem",
    "rsqrt",
    "sin",
    "sinh",
    "sqrt",
    "tan",
    "tanh",
    "threefry2x32",
}

LANES = 128  # numbers in a row of a TPU's vector registers
# A buffer's bytes: its value's as it lies; as it is used; the latter if that is
# another, else none (gathered); half as it lies; as it is used, with rows padded to the
# vector's width; twice as it is used; gathered and twice; 4 bytes for each number; as
# it lies, with rows padded; gathered and half; none.
(
    KEPT,
    USED,
    GATHERED,
    HALF,
    ROWS,
    DOUBLE,
    GATHERED_DOUBLE,
    WORDS,
    KEPT_ROWS,
    GATHERED_HALF,
    NOTHING,
) = range(11)


class Group:
    """What runs at once; of a loop, `body` holds what it repeats.

    Attributes:
      reads, writes, updates: buffers that are there before, that are new, that are
        changed in place.
      places: buffers that may be overwritten, if nothing else needs them.
      late: whether it comes last of what gets ready at once (CPU), or waits (see
        `TpuFusion`).
      product: the product that it computes, if any.
    """

    product: Operation | None
    __slots__ = ("body", "late", "places", "product", "reads", "updates", "writes")

    def __init__(
        self,
        reads: Iterable[int],
        writes: Iterable[int],
        body: list[Group] | None = None,
        places: tuple[int, ...] = (),
        updates: Iterable[int] = (),
    ):
        self.reads = tuple(dict.fromkeys(reads))
        self.writes = tuple(writes)
        self.body = body
        self.places = places
        self.updates = tuple(updates)
        self.late = False
        self.product = None


class Fusion:
    """Buffers and groups of a graph.

    Attributes:
      values, kinds, owners: of each buffer: its value's index; one of the kinds above;
        the operation that made it.
      groups: in the program's order.
      gradients: buffers of the parameters' gradients.
      conditions: buffers that are there if a value is "ungathered" or "unsplit".
      tables: parameters of which the state is copied to another layout: the buffer.
      lying: buffers that are in the HBM, whatever is beside it.
      fixed: buffers of what the parameters alone decide, which XLA computes before a
        loop around the program.
      weighing: of a TPU's products that give a kernel's gradient, both operands' values
        and the result's.
    """

    keeps_dots = True  # whether dots read their operands from memory only
    early = False  # whether barriers fall before what is computed twice is found

    def __init__(self, graph: Graph):
        self.graph = graph
        self.values: list[int] = []
        self.kinds: list[int] = []
        self.owners: list[Operation | None] = []
        # what an operation that can't fuse reads of a value
        self.near: dict[int, tuple[int, ...]] = {}
        self.far: dict[int, tuple[int, ...]] = {}  # what a fused operation reads of it
        self.users: dict[int, list[Operation | None]] = {}
        # results of a loop's body that are stacked: the stack
        self.stacks: dict[int, Value] = {}
        self.heavy: set[int] = set()  # values with something costly fused into them
        self.same: dict[Any, Operation] = {}
        # values to the first of those that are computed alike
        self.first: dict[int, int] = {}
        self.conditions: dict[int, tuple[int, str]] = {}
        self.tables: dict[int, int] = {}
        self.lying: list[int] = []
        self.fixed: list[int] = []
        self.weighing: list[tuple[int, ...]] = []
        block = graph.main
        self._count(block)
        for value in (*block.inputs, *block.constants):
            self.near[value.index] = self.far[value.index] = ()
        self.groups = self._block(block)
        self.gradients = self._finish(block)

    def _finish(self, block: Region) -> list[int]:
        """Hold the results until the end; returns the gradients' buffers."""
        results = [v for v in block.results if isinstance(v, Value)]
        self.groups.append(Group((b for v in results for b in self.near[v.index]), ()))
        return [b for v in results if v.stored is not None for b in self.near[v.index]]

    def _count(
        self,
        block: Region,
        stacked: range = range(0),
    ) -> None:
        for op in block.operations:
            for value in op.inputs:
                if value is not None:
                    self.users.setdefault(value.index, []).append(op)
            inside = range(0)
            if op.name == "scan":
                first = scan_counts(op.eqn)[1]
                results = op.regions[0].results
                inside = range(first, len(results))
                self.stacks.update(
                    (v.index, outer)
                    for v, outer in zip(
                        results[first:],
                        op.outputs[first:],
                        strict=True,
                    )
                    if isinstance(v, Value)
                )
            for inner in op.regions:
                self._count(inner, inside)
        for i, value in enumerate(block.results):
            if isinstance(value, Value) and i not in stacked:
                self.users.setdefault(value.index, []).append(None)

    def buffer(
        self,
        value: Value,
        op: Operation | None,
        kind: int = KEPT,
    ) -> int:
        self.values.append(value.index)
        self.kinds.append(kind)
        self.owners.append(op)
        return len(self.values) - 1

    def own(
        self,
        value: Value,
        op: Operation | None,
        kind: int = KEPT,
    ) -> int:
        b = self.buffer(value, op, kind)
        self.near[value.index] = self.far[value.index] = (b,)
        return b

    # ---- operations ----

    def _block(self, block: Region) -> list[Group]:
        groups: list[Group] = []
        outer = self.same
        self.same = {}
        for op in block.operations:
            inputs = [v for v in op.inputs if v is not None]
            merges = op.name not in UNMERGED and not op.eqn.effects
            if inputs and not op.regions and merges and self._again(op):
                continue
            if op.name == "scan":
                self._scan(op, groups)
            elif op.regions:
                self._branches(op, groups)
            elif op.name in ALIASES and len(inputs) == len(op.outputs):
                for source, target in zip(inputs, op.outputs, strict=True):
                    self._rename(
                        source,
                        target,
                        op.name != BARRIER or self.early,
                    )
                if op.name == BARRIER:
                    self._hold(op, groups)
            elif op.name in FREE or not inputs:
                for target in op.outputs:
                    self.near[target.index] = self.far[target.index] = ()
            elif op.name in LOOPED or self.spreads(op):
                self._fusible(op, inputs, groups)
            else:
                self._hard(op, inputs, groups)
            for value in op.outputs:
                # written straight into the stack of the loop's results
                if value.index in self.stacks:
                    groups.append(Group(self.far[value.index], ()))
        self.same = outer
        return groups

    def _hold(
        self,
        op: Operation,
        groups: list[Group],
    ) -> None:
        """Hold back what reads a barrier's results until all its operands are there,
        where the program's order doesn't.
        """

    def _again(self, op: Operation) -> bool:
        """Whether the same is computed before: XLA computes it once."""
        ins = tuple(
            (
                repr(getattr(e, "val", None))
                if v is None
                else self.first.get(v.index, v.index)
            )
            for v, e in zip(op.inputs, op.eqn.invars, strict=False)
        )
        key = (
            op.name,
            ins,
            tuple(v.shape for v in op.outputs),
            tuple(str(v.dtype) for v in op.outputs),
            (
                ""
                if op.name in ELEMENTWISE
                else str(sorted(op.params.items(), key=lambda p: p[0]))
            ),
        )
        before = self.same.setdefault(key, op)
        if before is op:
            return False
        for old, new in zip(before.outputs, op.outputs, strict=True):
            self._rename(old, new)
        return True

    def _rename(
        self,
        source: Value,
        target: Value,
        alike: bool = True,
    ) -> None:
        self.near[target.index] = self.near[source.index]
        self.far[target.index] = self.far[source.index]
        if alike:
            self.first[target.index] = self.first.get(source.index, source.index)
        if source.index in self.heavy:
            self.heavy.add(target.index)

    def spreads(self, op: Operation) -> bool:
        """Whether an operation moves single numbers, which XLA makes a comparison with
        an index of.
        """
        return False

    def _fusible(
        self,
        op: Operation,
        inputs: list[Value],
        groups: list[Group],
    ) -> None:
        sources = tuple(dict.fromkeys(b for v in inputs for b in self.far[v.index]))
        heavy = op.name in COSTLY or any(v.index in self.heavy for v in inputs)
        for target in op.outputs:
            users = self.users.get(target.index, ())
            stacked = target.index in self.stacks
            wide = len(large(inputs, target)) > 1
            fused = (bool(users) or stacked) and all(
                u is not None and self.takes(u, op, heavy) for u in users
            )
            once = self.waits(target) or (
                len(users) + stacked > 1
                and self.once(
                    op,
                    target,
                    sources,
                    wide,
                    heavy,
                )
            )
            if heavy:
                self.heavy.add(target.index)
            if self._joins(op, inputs, target, sources, fused and not once):
                continue
            if fused and not once:
                self.near[target.index] = self.far[target.index] = sources
                continue
            ends = self._ends_product(op, inputs, target, sources)
            if not ends:
                places = self._place(sources, target) if op.name != "transpose" else ()
                groups.append(
                    Group(
                        sources,
                        (
                            self.own(
                                target,
                                op,
                                self.kind(target),
                            ),
                        ),
                        places=places,
                    )
                )
            if wide or once or ends:
                self.heavy.discard(target.index)
            else:
                self.far[target.index] = sources

    def kind(self, value: Value) -> int:
        return KEPT

    def once(
        self,
        op: Operation,
        target: Value,
        sources: tuple[int, ...],
        wide: bool,
        heavy: bool,
    ) -> bool:
        """Whether an operation is not run again for each that needs its result.

        Args:
          op, target: the operation and its result, which several need.
          sources: buffers that it is computed from.
          wide, heavy: whether it has several large operands; whether something costly
            is fused into it.
        """
        return wide or op.name in COSTLY

    def waits(self, target: Value) -> bool:
        """Whether something that takes nothing in needs a value, and something else
        does too.
        """
        return False

    def takes(
        self,
        user: Operation,
        op: Operation,
        heavy: bool,
    ) -> bool:
        """Whether what uses a value computes it by itself."""
        if not user.outputs:  # such as a print, which reads it from memory
            return False
        if user.name == "broadcast_in_dim" or math.prod(
            user.outputs[0].shape
        ) > math.prod(op.outputs[0].shape):
            return op.name not in COSTLY
        if user.name in DOTS:
            return not self.keeps_dots
        return user.name in FUSES or self.spreads(user)

    def _joins(
        self,
        op: Operation,
        inputs: list[Value],
        target: Value,
        sources: tuple[int, ...],
        fused: bool,
    ) -> bool:
        """Whether a value is written by the group of the product before it, as one more
        result.
        """
        return False

    def _ends_product(
        self,
        op: Operation,
        inputs: list[Value],
        target: Value,
        sources: tuple[int, ...],
    ) -> bool:
        """Whether a value is what the product before it writes, in place of the product
        itself.
        """
        return False

    def _place(
        self,
        sources: tuple[int, ...],
        target: Value,
    ) -> tuple[int, ...]:
        """Buffers that a result may overwrite."""
        return tuple(
            b
            for b in sources
            if size(self.graph.values[self.values[b]]) == size(target)
        )

    def _reads(
        self,
        op: Operation,
        value: Value,
        groups: list[Group],
    ) -> tuple[int, ...]:
        """What an operation that isn't fused reads of a value."""
        fuses = (
            op.name in REDUCED
            or self.spreads(op)
            or (op.name in DOTS and not self.keeps_dots)
        )
        source = self.far[value.index] if fuses else self.near[value.index]
        if value.stored is not None and len(value.shape) > 1:
            whole = self.buffer(
                value,
                op,
                self.gathers(op, value),
            )
            groups.append(Group(source, (whole,)))
            return (*source, whole)
        return source

    def gathers(
        self,
        op: Operation,
        value: Value,
    ) -> int:
        return GATHERED

    def _hard(
        self,
        op: Operation,
        inputs: list[Value],
        groups: list[Group],
    ) -> None:
        reads = [b for value in inputs for b in self._reads(op, value, groups)]
        writes = [self.own(target, op, self.kind(target)) for target in op.outputs]
        # a gradient is summed over the devices before each keeps its part
        writes += [
            self.buffer(
                target,
                op,
                self.gathers(op, target),
            )
            for target in op.outputs
            if target.stored is not None
        ]
        groups.append(Group(reads, writes))
        groups[-1].product = op if op.name in DOTS else None

    # ---- loops and branches ----

    def _scan(
        self,
        op: Operation,
        groups: list[Group],
    ) -> None:
        consts, carried = scan_counts(op.eqn)
        body = op.regions[0]
        reads: list[int] = []
        writes: list[int] = []
        places: list[int] = []
        for i, (outer, inner) in enumerate(zip(op.inputs, body.inputs, strict=True)):
            sources = () if outer is None else self.near[outer.index]
            if consts <= i < consts + carried:
                target = op.outputs[i - consts]
                writes.append(self.own(target, op))
                places += sources
                sources = self.near[target.index]
            else:
                if i >= consts and outer is not None:
                    sources = self._enters(outer, op, groups)
                reads += sources
            self.near[inner.index] = self.far[inner.index] = sources
        for outer in op.outputs[carried:]:
            self.own(outer, op, self.kind(outer))
        for value in body.constants:
            self.near[value.index] = self.far[value.index] = ()
        inside = self._slices(op, body.inputs[consts + carried :])
        inside += self._block(body)
        stacks = self._merged(op.outputs[carried:], body.results[carried:])
        inside.append(
            Group(
                (
                    b
                    for v in body.results[:carried]
                    if isinstance(v, Value)
                    for b in self.near[v.index]
                ),
                (),
            )
        )
        self._loop(
            groups,
            reads,
            writes,
            stacks,
            inside,
            tuple(places),
        )

    def _merged(
        self,
        stacks: list[Value],
        results: list[Any],
    ) -> list[int]:
        """Buffers of a loop's stacks: one for those that hold the same."""
        firsts: dict[int, Value] = {}
        for stack, result in zip(stacks, results, strict=True):
            if isinstance(result, Value):
                first = firsts.setdefault(
                    self.first.get(result.index, result.index), stack
                )
                if first is not stack and first.dtype == stack.dtype:
                    self._rename(first, stack)
        return list(
            dict.fromkeys(b for stack in stacks for b in self.near[stack.index])
        )

    def _enters(
        self,
        value: Value,
        op: Operation,
        groups: list[Group],
    ) -> tuple[int, ...]:
        """What a loop reads of a stack."""
        return self.near[value.index]

    def _slices(
        self,
        op: Operation,
        values: list[Value],
    ) -> list[Group]:
        """What a loop's body copies of its stacks."""
        return []

    def _loop(
        self,
        groups: list[Group],
        reads: list[int],
        writes: list[int],
        stacks: list[int],
        inside: list[Group],
        places: tuple[int, ...],
    ) -> None:
        groups.append(
            Group(
                reads,
                [*writes, *stacks],
                inside,
                places,
            )
        )

    def _branches(
        self,
        op: Operation,
        groups: list[Group],
    ) -> None:
        reads = [b for v in op.inputs if v is not None for b in self.near[v.index]]
        inside: list[Group] = []
        for inner in op.regions:
            for value in (*inner.inputs, *inner.constants):
                self.near[value.index] = self.far[value.index] = ()
            inside += self._block(inner)
        groups.append(
            Group(
                reads,
                [self.own(v, op) for v in op.outputs],
                inside,
            )
        )


def size(value: Value) -> int:
    return math.prod(value.shape) * itemsize(value)


def sparse(op: Operation) -> bool:
    """Whether fewer rows are looked up, or added to, than there are: then they are
    moved, and not the table.
    """
    if op.name in SCATTERS and op.inputs[2] is not None:
        return math.prod(op.inputs[2].shape) < math.prod(op.outputs[0].shape)
    return (
        op.name == "gather"
        and op.inputs[0] is not None
        and (math.prod(op.outputs[0].shape) < math.prod(op.inputs[0].shape))
    )


def large(inputs: list[Value], target: Value) -> list[Value]:
    """The inputs of an operation that are not small beside its result, as XLA's fusion
    guesses: by their rank.
    """
    rank = sum(n > 1 for n in target.shape)
    return [v for v in inputs if sum(n > 1 for n in v.shape) >= rank]


def convolves(op: Operation) -> bool:
    """Whether a product's kernel has several free dims: it is a convolution along one
    of them, and its operand is written for that.
    """
    if op.name != "dot_general" or op.inputs[1] is None or op.inputs[1].stored is None:
        return False
    (_, summed), (_, shared) = op.params["dimension_numbers"]
    return len(op.inputs[1].shape) - len(summed) - len(shared) > 1


def rounds(op: Operation | None) -> bool:
    """Whether an operation is a product that rounds its operands to bfloat16."""
    return op is not None and op.name in DOTS and op.params.get("precision") is None


def narrow(op: Operation, value: Value) -> bool:
    """Whether rows of a parameter, or of its gradient, are moved that are no multiple
    of the vector's width.
    """
    return (
        op.name in ROWWISE
        and value.stored is not None
        and len(value.shape) > 1
        and value.shape[-1] % LANES > 0
    )
