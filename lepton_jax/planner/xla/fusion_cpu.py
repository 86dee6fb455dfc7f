"""Fusion by XLA's CPU backend: products from memory, gradients summed at the end.

The rules were found by comparing with programs that jaxlib 0.10 and 0.12 compiled for
virtual CPU devices: the models of `lepton_jax.models` in several sizes
(`python -m tools.bench planner-memory` compares some of them again).

Two things changed in between. jaxlib 0.10 drops optimization barriers before it merges
common subexpressions, and computes products of 16-bit numbers in float32: it writes
both operands as float32 copies, computes a float32 result and rounds that.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lepton_jax.planner.program.graph import (
    Graph,
    Operation,
    Region,
    Value,
)
from lepton_jax.planner.program.layout import itemsize
from lepton_jax.planner.xla.buffers import (
    COMPUTED,
    COMPUTED_DOUBLE,
    GATHERED,
    GATHERED_DOUBLE,
    STORED,
    STORED_WORDS,
    TOKEN,
    BufferKind,
    Buffers,
    Group,
)
from lepton_jax.planner.xla.fusion import Fusion
from lepton_jax.planner.xla.operations import (
    DOTS,
    REDUCED,
    SCATTERS,
    is_one_of,
    sparse,
)

# Whether this is the XLA of jaxlib 0.10, and not that of jaxlib 0.12.
OLDER = jax.__version_info__ < (0, 11)


class CpuFusion(Fusion):
    """Buffers and groups as XLA's CPU backend makes them."""

    drops_barriers = OLDER

    def __init__(self, graph: Graph):
        # Copies of operands, by (value, transposed), for each region anew.
        self.copies: dict[tuple[int, bool], Buffers] = {}
        # The buffer of each gathered parameter, for each region anew.
        self.gathered: dict[int, int] = {}
        # Operands of outer products that are written at the result's size, by (value,
        # shape), for each region anew.
        self.broadcast: dict[tuple[int, Any], Value] = {}
        # Blocks around what is looked at.
        self.depth = 0
        # Sums that are scattered into zeros and then added to something: what they
        # read.
        self.added: dict[int, Buffers] = {}
        # Values that are transposes of others.
        self.transposed: set[int] = set()
        # Values that are computed number by number.
        self.loose: set[int] = set()
        # Values that exist only in float32, as operands of products.
        self.unwritten: set[int] = set()
        # Matrices that unfused operations give to one reader.
        self.matrices: set[int] = set()
        # Outer products of two values.
        self.outer: set[int] = set()
        # Gradients that no devices have to sum, since rows were exchanged.
        self.complete: set[int] = set()
        # 16-bit values that are written before they are rounded from float32.
        self.wide: set[int] = set()
        super().__init__(graph)

    # ---- the whole program ----

    def _region(self, region: Region) -> list[Group]:
        outer = (self.copies, self.gathered, self.broadcast)
        self.copies = {}
        self.gathered = {}
        self.broadcast = {}
        self.depth += 1
        groups = super()._region(region)
        self.depth -= 1
        self.copies, self.gathered, self.broadcast = outer
        return groups

    def _finish(self, region: Region) -> list[int]:
        """Sum all gradients over the devices at once, after everything else."""
        results = [value for value in region.results if isinstance(value, Value)]
        gradients = [value for value in results if value.stored is not None]
        others = [value for value in results if value.stored is None]
        parts = self._buffers_of(gradients)
        sums = [value for value in gradients if value.index not in self.complete]
        whole = [value for value in gradients if value.index in self.complete]
        totals = [self.new_buffer(value, None, COMPUTED) for value in sums]
        self.groups.append(Group(parts, totals))
        for total, value in zip(totals, sums, strict=True):
            self.conditions[total] = (value.index, "summed")
        totals += self._buffers_of(whole)
        held = self._copies_of_state(region, gradients)
        self.groups.append(Group(totals + held + self._buffers_of(others), ()))
        return totals

    def _copies_of_state(self, region: Region, gradients: list[Value]) -> list[int]:
        """Add copies of kernels that are still read when they may be updated.

        The update of a kernel needs its gradient, and not the other product of the
        backward pass that reads the kernel. XLA may run the update first, in place, so
        it copies the kernel, and the gradient takes the kernel's place (copy insertion
        of jaxlib 0.10). Where devices sum the gradients, all at once, each update comes
        after all products.
        """
        copies = []
        parts = {v.stored[0]: self.buffers[v.index] for v in gradients if v.stored}
        for value in region.inputs:
            products = [u for u in self.users_of(value) if is_one_of(u, DOTS)]
            if value.stored is None or len(products) < 2:
                continue
            copy = self.new_buffer(value, products[0])
            self.conditions[copy] = (value.index, "unsummed")
            self.groups.insert(0, Group((), (copy,)))
            copies.append(copy)
            for part in parts.get(value.stored[0], ()):
                self.conditions[part] = (value.index, "summed")
        return copies

    def _alias(
        self,
        source: Value,
        target: Value,
        alike: bool = True,
    ) -> None:
        super()._alias(source, target, alike)
        if source.index in self.loose:
            self.loose.add(target.index)

    def _hold(
        self,
        op: Operation,
        groups: list[Group],
    ) -> None:
        """Let all readers of a barrier's results read a token as well.

        Groups run when their operands are ready, so only the token keeps the readers
        back until the last operand exists.
        """
        if self.drops_barriers:
            return
        awaited = tuple(self._buffers_of(op.inputs))
        token = self.copy(
            op.outputs[0],
            op,
            awaited,
            groups,
            TOKEN,
        )
        for value in op.outputs:
            self.buffers[value.index] = (*self.buffers[value.index], token)
            self.sources[value.index] = (*self.sources[value.index], token)

    # ---- operations that fuse ----

    def absorbs(
        self,
        user: Operation,
        op: Operation,
        costly: bool,
    ) -> bool:
        """Whether a reader computes its operand in its own kernel.

        A product that is computed in float32 has its operands copied to float32, and
        the copy computes them. A reduction is a call of a library (YNNPACK in jaxlib
        0.10) that reads its operand from memory, or both factors of one.
        """
        if self._widens(user):
            return True
        if self._calls_library(user):
            return self._enters_sum(op)
        if self._enters_sum(user):
            return False
        return super().absorbs(user, op, costly)

    def _calls_library(self, op: Operation) -> bool:
        """Whether an operation is a reduction of floating-point numbers."""
        if op.name not in REDUCED or op.inputs[0] is None:
            return False
        return jnp.issubdtype(op.inputs[0].dtype, jnp.floating)

    def _enters_sum(self, op: Operation) -> bool:
        """Whether a multiplication is computed by the reduction that alone reads it."""
        if op.name != "mul":
            return False
        users = self.users_of(op.outputs[0])
        return (
            len(users) == 1 and users[0] is not None and self._calls_library(users[0])
        )

    def computed_once(
        self,
        op: Operation,
        target: Value,
        sources: Buffers,
        several_large: bool,
        costly: bool,
    ) -> bool:
        """Whether a value with several readers is written.

        jaxlib 0.10 computes products of 16-bit numbers in float32. A 16-bit operand
        that only products and reductions read exists only as the float32 copies.
        """
        if OLDER and itemsize(target) == 2:
            users = self.users[target.index]
            fusing = DOTS | REDUCED
            if len(target.shape) < 3 and all(is_one_of(user, fusing) for user in users):
                self.unwritten.add(target.index)
                return False
            # Arithmetic is in float32. What reads one large operand is written rounded;
            # what reads several before, and each reader rounds it.
            if several_large:
                self.wide.add(target.index)
            return True
        return super().computed_once(
            op,
            target,
            sources,
            several_large,
            costly,
        )

    def must_write(self, target: Value) -> bool:
        """Whether a value is an outer product with several readers."""
        return target.index in self.outer and len(self.users_of(target)) > 1

    def kind(self, value: Value) -> BufferKind:
        """Return the form in which a value is written."""
        return STORED_WORDS if value.index in self.wide else STORED

    def _add_fusible(
        self,
        op: Operation,
        inputs: list[Value],
        groups: list[Group],
    ) -> None:
        target = op.outputs[0]
        if op.name == "transpose" and inputs[0].index in self.matrices:
            # XLA has the product give its result transposed.
            self._alias(inputs[0], target, alike=False)
            return
        if self._enters_sum(op):
            factors = [self._broadcast(op, value, groups) for value in inputs]
            self._set(target, tuple(self._buffers_of(factors)))
            return
        added = next((value for value in inputs if value.index in self.added), None)
        if added is not None:
            self._add_in_place(op, inputs, added, groups)
            return

        if op.name == "mul" and not any(v.shape == target.shape for v in inputs):
            # An outer product, such as a norm's scale: XLA doesn't compute it twice.
            self.outer.add(target.index)
        self.loose.update(value.index for value in op.outputs)
        if op.name == "transpose" and len(target.shape) > 2:
            self.transposed.add(target.index)
        super()._add_fusible(op, inputs, groups)

    def _add_in_place(
        self,
        op: Operation,
        inputs: list[Value],
        added: Value,
        groups: list[Group],
    ) -> None:
        """Scatter into the other summand, not into zeros that are added to it."""
        others = [value for value in inputs if value is not added]
        rest = [b for value in others for b in self.sources[value.index]]
        total = self.materialize(op.outputs[0], op)
        groups.append(Group(rest, (total,)))
        scattered = self.added[added.index]
        groups.append(
            Group(
                scattered,
                (),
                updates=(total,),
            )
        )

    def _broadcast(
        self,
        op: Operation,
        value: Value,
        groups: list[Group],
    ) -> Value:
        """Return a factor that a reduction multiplies, written at the result's size."""
        target = op.outputs[0]
        if (
            len(value.shape) != len(target.shape)
            or value.shape == target.shape
            or not any(extent > 1 for extent in value.shape)
        ):
            return value

        key = (self._original(value), target.shape)
        if key not in self.broadcast:
            # A value that is not in the graph: it needs a number of its own.
            number = -1 - len(self.broadcast)
            wide = Value(
                number,
                target.shape,
                target.dtype,
                target.nodes,
            )
            source = self.sources[value.index]
            written = self.copy(target, op, source, groups)
            self._set(wide, (written,))
            self.broadcast[key] = wide
        return self.broadcast[key]

    # ---- operations that don't fuse ----

    def _add_unfused(
        self,
        op: Operation,
        inputs: list[Value],
        groups: list[Group],
    ) -> None:
        if op.name == "select_and_scatter_add":
            self._add_unpooling(op, inputs, groups)
            return
        reads = self._operands(op, inputs, groups)
        if op.name in SCATTERS and not self.buffers[inputs[0].index]:
            self._add_scatter(op, reads, groups)
        elif self._widens(op):
            self._add_widened_product(op, reads, groups)
        else:
            self._add_product(op, inputs, reads, groups)

    def _operands(
        self,
        op: Operation,
        inputs: list[Value],
        groups: list[Group],
    ) -> list[int]:
        """Return the buffers of an operation's operands, after copies where needed."""
        turns = (False,) * len(inputs)
        if op.name == "dot_general":
            turns = _transposes_operands(op)
        widens = self._widens(op)

        reads: list[int] = []
        for value, turned in zip(inputs, turns, strict=True):
            if widens:
                reads += self._widened(op, value, groups, turned)
            elif turned:
                reads += self._turned(op, value, groups)
            else:
                reads += self._reads(op, value, groups)
        return reads

    def _add_scatter(
        self,
        op: Operation,
        reads: list[int],
        groups: list[Group],
    ) -> None:
        """Add a sum that is scattered into zeros."""
        target = op.outputs[0]
        users = self.users_of(target)
        if len(users) == 1 and is_one_of(users[0], {"add_any"}):
            self.added[target.index] = tuple(reads)
            self._set(target, ())
            return
        # The zeros are ready when the program starts.
        kind = COMPUTED
        if sparse(op):
            kind = STORED
            self.complete.add(target.index)
        zeros = self.materialize(target, op, kind)
        groups.append(Group((), (zeros,)))
        groups.append(
            Group(
                reads,
                (),
                updates=(zeros,),
            )
        )

    def _add_widened_product(
        self,
        op: Operation,
        reads: list[int],
        groups: list[Group],
    ) -> None:
        """Add a product of 16-bit numbers whose result is float32 at first."""
        target = op.outputs[0]
        product = self.new_buffer(target, op, COMPUTED_DOUBLE)
        group = Group(reads, (product,))
        group.late = target.stored is not None
        groups.append(group)

        users = self.users_of(target)
        absorbed = all(
            user is not None and self.absorbs(user, op, True) for user in users
        )
        if absorbed and len(users) < 2:
            self._set(target, (product,))
        else:
            rounded = self.materialize(target, op, COMPUTED)
            groups.append(Group((product,), (rounded,)))

    def _add_product(
        self,
        op: Operation,
        inputs: list[Value],
        reads: list[int],
        groups: list[Group],
    ) -> None:
        writes = []
        for target in op.outputs:
            kind = COMPUTED if target.stored is not None else STORED
            writes.append(self.materialize(target, op, kind))
            if len(target.shape) == 2 and len(self.users_of(target)) == 1:
                self.matrices.add(target.index)
        group = Group(reads, writes)
        # The other reader of a fused operand asks for it first, since the operand is
        # computed again together with it. (A callback has no results.)
        group.late = (
            op.name in DOTS
            and op.outputs[0].stored is not None
            and inputs[0].index in self.loose
        )
        groups.append(group)

    def _add_unpooling(
        self,
        op: Operation,
        inputs: list[Value],
        groups: list[Group],
    ) -> None:
        """Add the gradient of pooling by maximum.

        It writes, as 4-byte indices for each dim, where each number lies, and where the
        greatest of each window lies.
        """
        source = inputs[0]
        operand = inputs[1]
        dims = range(len(operand.shape))
        indices = [self.new_buffer(operand, op, STORED_WORDS) for _ in dims]
        zeros = self.materialize(op.outputs[0], op)
        for buffer in (*indices, zeros):
            groups.append(Group((), (buffer,)))

        greatest = [self.new_buffer(source, op, STORED_WORDS) for _ in dims]
        maxima = self.new_buffer(source, op)
        reads = (*indices, *self.buffers[operand.index])
        groups.append(Group(reads, (*greatest, maxima)))
        reads = (*greatest, *self.buffers[source.index])
        groups.append(
            Group(
                reads,
                (),
                updates=(zeros,),
            )
        )

    def _reads(
        self,
        op: Operation,
        value: Value,
        groups: list[Group],
    ) -> Buffers:
        source = self.buffers[value.index]
        if op.name in REDUCED:
            if not self._calls_library(op):
                source = self.sources[value.index]
            if value.index in self.transposed:
                # A reduction along another dim reads a float32 copy.
                return (
                    self.copy(
                        value,
                        op,
                        source,
                        groups,
                        STORED_WORDS,
                    ),
                )
        if value.stored is None or len(value.shape) < 2:
            return source

        key = self._original(value)
        if key not in self.gathered:
            gathered = self.copy(value, op, source, groups, GATHERED)
            self.gathered[key] = gathered
            if self.depth == 1:
                self.hoisted.append(gathered)
        return (*source, self.gathered[key])

    def _widens(self, op: Operation) -> bool:
        """Whether an operation is a 16-bit product that is computed in float32."""
        return OLDER and op.name in DOTS and itemsize(op.outputs[0]) == 2

    def _turned(
        self,
        op: Operation,
        value: Value,
        groups: list[Group],
    ) -> Buffers:
        """Return a transposed copy of an operand, made once for all readers.

        Kernels are read as they are.
        """
        source = self._reads(op, value, groups)
        key = (self._original(value), True)
        if value.stored is None and key not in self.copies:
            self.copies[key] = (
                self.copy(
                    value,
                    op,
                    source,
                    groups,
                ),
            )
        return self.copies.get(key, source)

    def _widened(
        self,
        op: Operation,
        value: Value,
        groups: list[Group],
        turned: bool = False,
    ) -> Buffers:
        """Return a product's operand in float32, as it is or transposed."""
        key = (self._original(value), turned)
        if key in self.copies:
            return self.copies[key]

        kernel = value.stored is not None and len(value.shape) > 1
        source = self.sources[value.index]
        if kernel and turned:
            source = self._widened(op, value, groups)
        elif kernel:
            # It is gathered in float32 and rounded before it is widened again.
            for kind in (GATHERED_DOUBLE, COMPUTED):
                source = (
                    self.copy(
                        value,
                        op,
                        source,
                        groups,
                        kind,
                    ),
                )

        widened = (
            self.copy(
                value,
                op,
                source,
                groups,
                COMPUTED_DOUBLE,
            ),
        )
        self.copies[key] = widened
        if kernel and self.depth == 1:
            self.hoisted += widened
        if value.index in self.unwritten and not turned:
            self._set(value, widened)
        return widened

    # ---- loops ----

    def _slice_copies(
        self,
        op: Operation,
        values: list[Value],
    ) -> list[Group]:
        groups = []
        for value in values:
            if str(value.dtype) == "float32" and value.stored is None:
                source = self.buffers[value.index]
                groups.append(Group(source, (self.materialize(value, op),)))
        return groups

    def _loop_reads(
        self,
        value: Value,
        op: Operation,
        groups: list[Group],
    ) -> Buffers:
        """Return a 16-bit array as a float32 copy, made as a whole before the loop."""
        source = self.buffers[value.index]
        low = str(value.dtype) in ("bfloat16", "float16")
        if not OLDER or not low or value.stored is not None:
            return source
        return (
            self.copy(
                value,
                op,
                source,
                groups,
                COMPUTED_DOUBLE,
            ),
        )

    def _add_loop(
        self,
        groups: list[Group],
        loop: Group,
        stacks: list[int],
    ) -> None:
        """Add a loop that updates its stacks in place.

        They are zeros first, which are ready when the program starts.
        """
        for buffer in stacks:
            groups.append(Group((), (buffer,)))
        loop.updates = tuple(stacks)
        groups.append(loop)


def _transposes_operands(op: Operation) -> tuple[bool, bool]:
    """Whether each operand of a product is transposed first.

    The left one has to be summed over its last dims, the right one over its first ones
    after those that both share. Products of matrices are computed as they are.
    """
    (left, right), (_, shared) = op.params["dimension_numbers"]
    operand = op.inputs[0]
    rank = 0 if operand is None else len(operand.shape)
    if rank <= 2:
        return False, False
    last = range(rank - len(left), rank)
    first = range(len(shared), len(shared) + len(right))
    return sorted(left) != list(last), sorted(right) != list(first)
