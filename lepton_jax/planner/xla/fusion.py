"""XLA's fusion, imitated: which values of a graph are written to memory.

A *buffer* holds a value that is written to memory. A value that is fused into its
readers has no buffer; it keeps those alive from which it is computed. A *group* runs as
one kernel: it reads buffers and writes buffers.

A program of five operations becomes three groups. The parameter is gathered (if the
plan splits it), the product is written, and the sum computes `tanh`, `mul` and `add` in
its own kernel, so that these have no buffers:

    >>> import jax, jax.numpy as jnp
    >>> from lepton_jax.planner.program.graph import Graph
    >>> def loss(w, x):
    ...     h = x @ w
    ...     return (jnp.tanh(h) * 2.0 + 1.0).sum()
    >>> w, x = jnp.ones((4, 8)), jnp.ones((16, 4))
    >>> graph = Graph(jax.make_jaxpr(loss)(w, x), parameters=1)
    >>> [op.name for op in graph.operations()]
    ['dot_general', 'tanh', 'mul', 'add', 'reduce_sum']
    >>> print(Fusion(graph))
    reads nothing; writes 0: float32[4, 8] for dot_general
    reads 0; writes 1: float32[16, 8] for dot_general
    reads 1; writes 2: float32[] for reduce_sum
    reads 2; writes nothing

The last group stands for the caller, who takes the results.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from lepton_jax.compat import scan_counts
from lepton_jax.planner.program.graph import (
    BARRIER,
    Graph,
    Operation,
    Region,
    Value,
)
from lepton_jax.planner.program.rules import ELEMENTWISE
from lepton_jax.planner.xla.buffers import (
    GATHERED,
    STORED,
    BufferKind,
    Buffers,
    Group,
)
from lepton_jax.planner.xla.operations import (
    ALIASES,
    COSTLY,
    DOTS,
    FREE,
    FUSES,
    LOOPED,
    REDUCED,
    UNMERGED,
    large_inputs,
    operands,
    size,
)


class Fusion:
    """Buffers and groups of a graph, by the rules that XLA's backends share (GPU).

    A backend overrides the hooks below. For each operation, in the program's order,
    they are called in this order:

    1. `_repeats`: skip an operation that was computed before. Else one of these adds
       it: `_add_scan`, `_add_branches`, `_add_alias` (and `_hold` for a barrier),
       `_add_fusible`, `_add_unfused`.
    2. `_add_fusible` asks for each result of an operation that may fuse:
       `absorbs`: would every reader compute the result in its own kernel?
       `must_write`, `computed_once`: is it written all the same?
       `_joins_product`: does the product before it write it as one more result?
       `_ends_product`: does the product before it write it in place of its own result?
       `kind`: in which form is it written by a group of its own?
    3. `_add_unfused` asks for each operand of a product, lookup, reduction, ...:
       `_reads`: which buffers does it read, and does it need copies or a gather first?
    4. `_add_scan` asks `_loop_reads` and `_slice_copies` what a loop copies of the
       arrays that it slices, `are_the_same` which of its stacks are one, and
       `_add_loop` how they are written.

    At the end `_finish` holds the results, and gives the buffers of the gradients.

    Attributes:
      values: for each buffer, the index of its value.
      kinds: for each buffer, its kind.
      owners: for each buffer, the operation that it was made for.
      groups: in the program's order.
      gradients: buffers of the parameters' gradients.
      conditions: buffers that exist only if a value is "ungathered" or "unsplit", or if
        gradients are "summed" or "unsummed" over devices, as (index of the value,
        condition).
      tables: the buffer that holds a copy of a parameter's state in another layout, by
        the parameter's index.
      in_hbm: buffers that lie in the HBM even if the memory next to it has room.
      hoisted: buffers that follow from the parameters alone, which XLA therefore
        computes before a loop around the program.
      kernel_products: for each product on TPU that gives a kernel's gradient, the
        indices of both operands and of the result.
    """

    # Whether products read their operands from memory only.
    keeps_dots = True
    # Whether barriers are dropped before common subexpressions are merged.
    drops_barriers = False

    def __init__(self, graph: Graph):
        self.graph = graph
        self.values: list[int] = []
        self.kinds: list[BufferKind] = []
        self.owners: list[Operation | None] = []

        # By a value's index: the buffers that a reader outside of its kernel reads, and
        # those from which a fused reader computes it again.
        self.buffers: dict[int, Buffers] = {}
        self.sources: dict[int, Buffers] = {}

        self.users: dict[int, list[Operation | None]] = {}
        # Results of a loop's body that are stacked, and their stack.
        self.stacks: dict[int, Value] = {}
        # Values with something costly fused into them.
        self.costly: set[int] = set()
        # Operations of the region by what they compute.
        self.computed: dict[Any, Operation] = {}
        # Values that are computed alike: the first of them.
        self.originals: dict[int, int] = {}

        self.conditions: dict[int, tuple[int, str]] = {}
        self.tables: dict[int, int] = {}
        self.in_hbm: list[int] = []
        self.hoisted: list[int] = []
        self.kernel_products: list[Buffers] = []

        region = graph.main
        self._find_users(region)
        self._merge_readers(region)
        self.originals = {}
        for value in (*region.inputs, *region.constants):
            self._set(value, ())
        self.groups = self._region(region)
        self.gradients = self._finish(region)

    def __str__(self) -> str:
        lines = []
        for group in self.groups:
            reads = ", ".join(map(str, group.reads)) or "nothing"
            writes = ", ".join(map(self._described, group.writes)) or "nothing"
            lines.append(f"reads {reads}; writes {writes}")
        return "\n".join(lines)

    def _described(self, buffer: int) -> str:
        value = self.graph.values[self.values[buffer]]
        op = self.owners[buffer]
        maker = "" if op is None else f" for {op.name}"
        return f"{buffer}: {value.dtype}{list(value.shape)}{maker}"

    # ---- buffers ----

    def new_buffer(
        self,
        value: Value,
        op: Operation | None,
        kind: BufferKind = STORED,
    ) -> int:
        """Add a buffer for a value, made for `op`; return its number."""
        self.values.append(value.index)
        self.kinds.append(kind)
        self.owners.append(op)
        return len(self.values) - 1

    def materialize(
        self,
        value: Value,
        op: Operation | None,
        kind: BufferKind = STORED,
    ) -> int:
        """Add the buffer from which all readers of a value read it."""
        buffer = self.new_buffer(value, op, kind)
        self._set(value, (buffer,))
        return buffer

    def copy(
        self,
        value: Value,
        op: Operation,
        source: Buffers,
        groups: list[Group],
        kind: BufferKind = STORED,
    ) -> int:
        """Add a group that writes a value to a buffer of its own; return the buffer.

        Args:
          value: the value.
          op: the operation that needs the copy.
          source: the buffers that the group reads.
          groups: the groups so far.
          kind: the form of the copy.
        """
        buffer = self.new_buffer(value, op, kind)
        groups.append(Group(source, (buffer,)))
        return buffer

    def users_of(self, value: Value) -> Sequence[Operation | None]:
        """Return the operations that read a value; None stands for the caller."""
        return self.users.get(value.index, ())

    def _set(
        self,
        value: Value,
        buffers: Buffers,
    ) -> None:
        self.buffers[value.index] = buffers
        self.sources[value.index] = buffers

    def _buffers_of(self, values: Iterable[Any]) -> list[int]:
        """Return the buffers of those that are values, and no literals."""
        return [
            buffer
            for value in values
            if isinstance(value, Value)
            for buffer in self.buffers[value.index]
        ]

    def _sources_of(self, values: Iterable[Value]) -> Buffers:
        buffers = [b for value in values for b in self.sources[value.index]]
        return tuple(dict.fromkeys(buffers))

    def _original(self, value: Value) -> int:
        return self.originals.get(value.index, value.index)

    def _alias(
        self,
        source: Value,
        target: Value,
        alike: bool = True,
    ) -> None:
        """Let a value share the buffers of another.

        With `alike`, operations on one merge with the same operations on the other.
        """
        self.buffers[target.index] = self.buffers[source.index]
        self.sources[target.index] = self.sources[source.index]
        if alike:
            self.originals[target.index] = self._original(source)
        if source.index in self.costly:
            self.costly.add(target.index)

    # ---- the whole program ----

    def _find_users(
        self,
        region: Region,
        stacked: range = range(0),
    ) -> None:
        """Note which operations read each value; None for the caller of the region.

        A loop doesn't read the `stacked` results of its body: they are its stacks.
        """
        for op in region.operations:
            for value in op.inputs:
                if value is not None:
                    self.users.setdefault(value.index, []).append(op)
            inside = self._find_stacks(op) if op.name == "scan" else range(0)
            for inner in op.regions:
                self._find_users(inner, inside)

        for i, value in enumerate(region.results):
            if isinstance(value, Value) and i not in stacked:
                self.users.setdefault(value.index, []).append(None)

    def _merge_readers(self, region: Region) -> None:
        """Give the readers of what is computed again to what is computed first.

        Whether a value is written depends on all of its readers, also on those that
        come after the same operation has been found a second time.
        """
        computed: dict[Any, Operation] = {}
        for op in region.operations:
            for inner in op.regions:
                self._merge_readers(inner)
            inputs = operands(op)
            if op.name in ALIASES and len(inputs) == len(op.outputs):
                self._note_aliases(op, inputs)
            elif self._merges(op, inputs):
                earlier = computed.setdefault(self._key(op), op)
                if earlier is not op:
                    self._hand_over(op, earlier)

    def _note_aliases(self, op: Operation, inputs: list[Value]) -> None:
        if op.name == BARRIER and not self.drops_barriers:
            return
        for source, target in zip(inputs, op.outputs, strict=True):
            self.originals[target.index] = self._original(source)

    def _hand_over(self, op: Operation, earlier: Operation) -> None:
        """Let an earlier operation have the readers of a later one that is the same."""
        for value in operands(op):
            readers = self.users[value.index]
            self.users[value.index] = [user for user in readers if user is not op]
        for old, new in zip(earlier.outputs, op.outputs, strict=True):
            self.originals[new.index] = self._original(old)
            later = self.users.get(new.index, [])
            self.users.setdefault(old.index, []).extend(later)

    def _merges(self, op: Operation, inputs: list[Value]) -> bool:
        """Whether XLA merges an operation with an equal one."""
        free = op.name not in UNMERGED and not op.eqn.effects
        return bool(inputs) and free and not op.regions

    def _find_stacks(self, op: Operation) -> range:
        """Note the stacks of a loop; return the numbers of the body's results in it."""
        _, carried = scan_counts(op.eqn)
        results = op.regions[0].results
        stacks = op.outputs[carried:]
        for value, stack in zip(results[carried:], stacks, strict=True):
            if isinstance(value, Value):
                self.stacks[value.index] = stack
        return range(carried, len(results))

    def _finish(self, region: Region) -> list[int]:
        """Hold the results until the end; return the gradients' buffers."""
        results = self._buffers_of(region.results)
        self.groups.append(Group(results, ()))
        gradients = [
            value
            for value in region.results
            if isinstance(value, Value) and value.stored is not None
        ]
        return self._buffers_of(gradients)

    def _region(self, region: Region) -> list[Group]:
        groups: list[Group] = []
        outer = self.computed
        self.computed = {}
        for op in region.operations:
            self._add(op, groups)
        self.computed = outer
        return groups

    # ---- one operation ----

    def _add(
        self,
        op: Operation,
        groups: list[Group],
    ) -> None:
        inputs = operands(op)
        if self._merges(op, inputs) and self._repeats(op):
            return

        if op.name == "scan":
            self._add_scan(op, groups)
        elif op.regions:
            self._add_branches(op, groups)
        elif op.name in ALIASES and len(inputs) == len(op.outputs):
            self._add_alias(op, inputs, groups)
        elif op.name in FREE or not inputs:
            for target in op.outputs:
                self._set(target, ())
        elif op.name in LOOPED or self.scatters_numbers(op):
            self._add_fusible(op, inputs, groups)
        else:
            self._add_unfused(op, inputs, groups)

        for value in op.outputs:
            # It is written straight into the stack of the loop's results.
            if value.index in self.stacks:
                groups.append(Group(self.sources[value.index], ()))

    def _repeats(self, op: Operation) -> bool:
        """Whether the same was computed before; XLA then computes it once.

        If so, the results share the buffers of the earlier ones.
        """
        earlier = self.computed.setdefault(self._key(op), op)
        if earlier is op:
            return False
        for old, new in zip(earlier.outputs, op.outputs, strict=True):
            self._alias(old, new)
        return True

    def _key(self, op: Operation) -> Any:
        """Return what an operation computes: equal for equal results."""
        literals = op.eqn.invars
        operands = tuple(
            repr(getattr(literal, "val", None))
            if value is None
            else self._original(value)
            for value, literal in zip(op.inputs, literals, strict=False)
        )
        options = ""
        if op.name not in ELEMENTWISE:
            params = sorted(
                op.params.items(),
                key=lambda item: item[0],
            )
            options = str(params)
        shapes = tuple(value.shape for value in op.outputs)
        dtypes = tuple(str(value.dtype) for value in op.outputs)

        return op.name, operands, shapes, dtypes, options

    def _add_alias(
        self,
        op: Operation,
        inputs: list[Value],
        groups: list[Group],
    ) -> None:
        alike = op.name != BARRIER or self.drops_barriers
        for source, target in zip(inputs, op.outputs, strict=True):
            self._alias(source, target, alike)
        if op.name == BARRIER:
            self._hold(op, groups)

    def _hold(
        self,
        op: Operation,
        groups: list[Group],
    ) -> None:
        """Hook: hold back the readers of a barrier until all its operands exist.

        There is nothing to do where groups run in the program's order.
        """

    def scatters_numbers(self, op: Operation) -> bool:
        """Hook: whether a scatter moves single numbers and so fuses like arithmetic.

        XLA may compile such a scatter as a comparison with an index.
        """
        return False

    # ---- operations that fuse ----

    def _add_fusible(
        self,
        op: Operation,
        inputs: list[Value],
        groups: list[Group],
    ) -> None:
        sources = self._sources_of(inputs)
        costly = op.name in COSTLY or any(v.index in self.costly for v in inputs)
        for target in op.outputs:
            self._add_result(op, inputs, target, sources, costly, groups)

    def _add_result(
        self,
        op: Operation,
        inputs: list[Value],
        target: Value,
        sources: Buffers,
        costly: bool,
        groups: list[Group],
    ) -> None:
        """Fuse a result into its readers or into the product before it, or write it."""
        several_large = len(large_inputs(inputs, target)) > 1
        once = self._is_written_once(op, target, sources, several_large, costly)
        fused = not once and self._is_absorbed(op, target, costly)
        if costly:
            self.costly.add(target.index)

        if self._joins_product(op, inputs, target, sources, fused):
            return
        if fused:
            self._set(target, sources)
            return

        ends = self._ends_product(op, inputs, target, sources)
        if not ends:
            self._write(op, target, sources, groups)

        if several_large or once or ends:
            self.costly.discard(target.index)
        else:
            # It is cheap enough for fused readers to compute it again.
            self.sources[target.index] = sources

    def _is_written_once(
        self,
        op: Operation,
        target: Value,
        sources: Buffers,
        several_large: bool,
        costly: bool,
    ) -> bool:
        if self.must_write(target):
            return True
        users = self.users_of(target)
        readers = len(users) + (target.index in self.stacks)
        return readers > 1 and self.computed_once(
            op, target, sources, several_large, costly
        )

    def _is_absorbed(
        self,
        op: Operation,
        target: Value,
        costly: bool,
    ) -> bool:
        """Whether all readers of a value compute it in their own kernels."""
        users = self.users_of(target)
        if not users and target.index not in self.stacks:
            return False
        return all(
            user is not None and self.absorbs(user, op, costly) for user in users
        )

    def _write(
        self,
        op: Operation,
        target: Value,
        sources: Buffers,
        groups: list[Group],
    ) -> None:
        """Add a group that computes a value from its sources."""
        reuses: Buffers = ()
        if op.name != "transpose":
            reuses = self._reusable(sources, target)
        written = self.materialize(target, op, self.kind(target))
        groups.append(
            Group(
                sources,
                (written,),
                reuses=reuses,
            )
        )

    def _reusable(
        self,
        sources: Buffers,
        target: Value,
    ) -> Buffers:
        """Return the buffers that a result may overwrite: those of its size."""
        bytes_ = size(target)
        values = self.graph.values
        return tuple(b for b in sources if size(values[self.values[b]]) == bytes_)

    def absorbs(
        self,
        user: Operation,
        op: Operation,
        costly: bool,
    ) -> bool:
        """Hook: whether `user` computes the result of `op` in its own kernel.

        Args:
          user: the operation that reads the result.
          op: the operation that gives the result.
          costly: whether the result has something costly fused into it.
        """
        if not user.outputs:
            # For example a print, which reads its operand from memory.
            return False
        before = math.prod(op.outputs[0].shape)
        after = math.prod(user.outputs[0].shape)
        if after > before or user.name == "broadcast_in_dim":
            return op.name not in COSTLY
        if user.name in DOTS:
            return not self.keeps_dots
        return user.name in FUSES or self.scatters_numbers(user)

    def must_write(self, target: Value) -> bool:
        """Hook: whether a value is written because of who reads it."""
        return False

    def computed_once(
        self,
        op: Operation,
        target: Value,
        sources: Buffers,
        several_large: bool,
        costly: bool,
    ) -> bool:
        """Hook: whether a value with several readers is written, not computed by each.

        Args:
          op: the operation.
          target: its result.
          sources: buffers from which the result is computed.
          several_large: whether the operation has several large operands.
          costly: whether something costly is fused into the result.
        """
        return several_large or op.name in COSTLY

    def kind(self, value: Value) -> BufferKind:
        """Hook: the form in which a value is written."""
        return STORED

    def _joins_product(
        self,
        op: Operation,
        inputs: list[Value],
        target: Value,
        sources: Buffers,
        fused: bool,
    ) -> bool:
        """Hook: whether the product before a value writes it as one more result."""
        return False

    def _ends_product(
        self,
        op: Operation,
        inputs: list[Value],
        target: Value,
        sources: Buffers,
    ) -> bool:
        """Hook: whether the product before a value writes it and not its own result."""
        return False

    # ---- operations that don't fuse ----

    def _add_unfused(
        self,
        op: Operation,
        inputs: list[Value],
        groups: list[Group],
    ) -> None:
        reads = [b for value in inputs for b in self._reads(op, value, groups)]
        writes = [self.materialize(v, op, self.kind(v)) for v in op.outputs]
        # A gradient is summed over the devices before each keeps its part.
        for target in op.outputs:
            if target.stored is not None:
                writes.append(self.new_buffer(target, op, GATHERED))
        group = Group(reads, writes)
        group.product = op if op.name in DOTS else None
        groups.append(group)

    def _reads(
        self,
        op: Operation,
        value: Value,
        groups: list[Group],
    ) -> Buffers:
        """Hook: return the buffers that an unfused operation reads of an operand."""
        fuses = (
            op.name in REDUCED
            or self.scatters_numbers(op)
            or (op.name in DOTS and not self.keeps_dots)
        )
        buffers = self.sources if fuses else self.buffers
        source = buffers[value.index]
        if value.stored is None or len(value.shape) < 2:
            return source
        gathered = self.copy(value, op, source, groups, GATHERED)
        return (*source, gathered)

    # ---- loops and branches ----

    def _add_scan(
        self,
        op: Operation,
        groups: list[Group],
    ) -> None:
        consts, carried = scan_counts(op.eqn)
        sliced = consts + carried
        body = op.regions[0]
        pairs = list(
            zip(
                op.inputs,
                body.inputs,
                strict=True,
            )
        )
        reads: list[int] = []
        writes: list[int] = []
        reuses: list[int] = []

        for outer, inner in pairs[:consts]:
            buffers = () if outer is None else self.buffers[outer.index]
            reads += buffers
            self._set(inner, buffers)

        carry = zip(
            pairs[consts:sliced],
            op.outputs[:carried],
            strict=True,
        )
        for (outer, inner), target in carry:
            if outer is not None:
                reuses += self.buffers[outer.index]
            written = self.materialize(target, op)
            writes.append(written)
            self._set(inner, (written,))

        for outer, inner in pairs[sliced:]:
            buffers = () if outer is None else self._loop_reads(outer, op, groups)
            reads += buffers
            self._set(inner, buffers)

        inside = self._add_body(op, sliced, carried)
        stacks = self._merged_stacks(op.outputs[carried:], body.results[carried:])
        next_carry = self._buffers_of(body.results[:carried])
        inside.append(Group(next_carry, ()))
        loop = Group(reads, writes, inside, reuses)
        self._add_loop(groups, loop, stacks)

    def _add_body(
        self,
        op: Operation,
        sliced: int,
        carried: int,
    ) -> list[Group]:
        """Add buffers for a loop's stacks, then return the groups of its body."""
        body = op.regions[0]
        for stack in op.outputs[carried:]:
            self.materialize(stack, op, self.kind(stack))
        for value in body.constants:
            self._set(value, ())
        inside = self._slice_copies(op, body.inputs[sliced:])
        return [*inside, *self._region(body)]

    def _merged_stacks(
        self,
        stacks: list[Value],
        results: list[Any],
    ) -> list[int]:
        """Return the buffers of a loop's stacks, one for those that hold the same."""
        firsts: dict[int, Value] = {}
        for stack, result in zip(stacks, results, strict=True):
            if not isinstance(result, Value):
                continue
            first = firsts.setdefault(self._original(result), stack)
            if first is not stack and self.are_the_same(first, stack):
                self._alias(first, stack)
        return list(dict.fromkeys(self._buffers_of(stacks)))

    def are_the_same(self, first: Value, second: Value) -> bool:
        """Hook: whether two stacks of the same numbers are one array."""
        return first.dtype == second.dtype

    def _loop_reads(
        self,
        value: Value,
        op: Operation,
        groups: list[Group],
    ) -> Buffers:
        """Hook: return the buffers that a loop reads of an array that it slices."""
        return self.buffers[value.index]

    def _slice_copies(
        self,
        op: Operation,
        values: list[Value],
    ) -> list[Group]:
        """Hook: return groups that copy slices at the start of a loop's body."""
        return []

    def _add_loop(
        self,
        groups: list[Group],
        loop: Group,
        stacks: list[int],
    ) -> None:
        """Hook: add a loop, which writes its stacks."""
        loop.writes = (*loop.writes, *stacks)
        groups.append(loop)

    def _add_branches(
        self,
        op: Operation,
        groups: list[Group],
    ) -> None:
        reads = self._buffers_of(op.inputs)
        inside: list[Group] = []
        for inner in op.regions:
            for value in (*inner.inputs, *inner.constants):
                self._set(value, ())
            inside += self._region(inner)
        writes = [self.materialize(value, op) for value in op.outputs]
        groups.append(Group(reads, writes, inside))
