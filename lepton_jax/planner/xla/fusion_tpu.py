"""Fusion by libtpu: products absorb operands and write several forms of a result.

The rules were found by comparing with programs that libtpu of jax 0.10 and 0.12
compiled for v5e, v5p and v6e: the models of `lepton_jax.models` in several sizes
(`python -m tools.bench planner-memory` compares some of them again).

An example, the backward pass of a two-layer MLP. The gradient before the relu is a
matmul that ends in a `select_n`. `Fusion` would write both results. libtpu computes the
`select_n` where the product's result leaves the registers, so that the product writes
the masked gradient in place of its own result (`_ends_product`).
"""

from __future__ import annotations

from lepton_jax.planner.program.graph import (
    Graph,
    Operation,
    Region,
    Value,
)
from lepton_jax.planner.program.layout import itemsize
from lepton_jax.planner.xla.buffers import (
    COMPUTED_ROWS,
    GATHERED,
    GATHERED_HALF,
    STORED,
    STORED_HALF,
    STORED_ROWS,
    BufferKind,
    Buffers,
    Group,
)
from lepton_jax.planner.xla.figures import COMBINED, LANES
from lepton_jax.planner.xla.fusion import Fusion
from lepton_jax.planner.xla.operations import (
    ALIASES,
    COSTLY,
    DOTS,
    REDUCED,
    ROWWISE,
    SCATTERS,
    convolves,
    has_narrow_rows,
    is_one_of,
    large_inputs,
    operands,
    rounds_operands,
    size,
    sparse,
    strides,
)

# Operations through which a reader still reads the same numbers.
PASSING = ALIASES | {"transpose", "scan"}


class TpuFusion(Fusion):
    """Buffers and groups as libtpu makes them.

    Args:
      graph: the program.
      windowed: whether gradients of kernels are summed over the devices while they are
        computed, piece by piece in a loop (see `memory.windowed`).
      eager: whether the head's gradient doesn't wait for the others, and copies of the
        optimizer's state are made at the start.
      alone: whether each device has one sample. Then what the loss looks up in the
        logits waits for the end, and so does the head's gradient: of f32[1,8192,24576]
        libtpu 0.0.42 (v5p, v6e) keeps all through the backward pass, of two samples
        nothing (`planner-memory --half tuning --dropless`, program 58; `--long`,
        program 94).
    """

    keeps_dots = False

    def __init__(
        self,
        graph: Graph,
        windowed: bool = False,
        eager: bool = False,
        alone: bool = False,
    ):
        self.windowed = windowed
        self.eager = eager
        self.alone = alone
        # Groups that wait for the end.
        self.waiting: list[Group] = []
        # The group of the product that a value stems from.
        self.products: dict[int, Group] = {}
        # The product, and its buffer, that only this value needs.
        self.only: dict[int, tuple[Group, int]] = {}
        # For a buffer that a product writes in place of its own result: the place in
        # the program's order of the result.
        self.ranks: dict[int, int] = {}
        # The buffer of a gathered parameter, by its number; for each region anew.
        self.gathered: dict[int, int] = {}
        # Where the last product stands among its region's groups.
        self.last = 0
        # Blocks around what is looked at.
        self.depth = 0
        # Values that a product writes in several forms.
        self.given: set[int] = set()
        # Transposed copies of the optimizer's state.
        self.turned: list[int] = []
        # Gradients that the optimizer takes at once.
        self.taken: list[int] = []
        super().__init__(graph)

    # ---- the whole program ----

    def _region(self, region: Region) -> list[Group]:
        outer = (self.gathered, self.last)
        self.gathered = {}
        self.last = 0
        self.depth += 1
        groups = super()._region(region)
        self.depth -= 1
        self.gathered, self.last = outer
        return groups

    def _finish(self, region: Region) -> list[int]:
        self.groups += self.waiting
        self.in_hbm += self.tables.values()
        tables = self.tables.values()
        if self.eager:
            self.groups.insert(0, Group((), self.turned))
            self.groups.append(Group(tables, ()))
        else:
            others = [buffer for buffer in tables if buffer not in self.turned]
            self.groups.insert(0, Group((), ()))
            self.groups.append(Group(others, ()))
            # The copies exist one after the other, each while its kernel is updated.
            for buffer in self.turned:
                self.groups.append(Group((), (buffer,)))
                self.groups.append(Group((buffer,), ()))
        return super()._finish(region) + self.taken

    def _alias(
        self,
        source: Value,
        target: Value,
        alike: bool = True,
    ) -> None:
        super()._alias(source, target, alike)
        if source.index in self.products:
            self.products[target.index] = self.products[source.index]
        users = self.users_of(source)
        if source.index in self.only and len(users) == 1:
            self.only[target.index] = self.only[source.index]

    def are_the_same(self, first: Value, second: Value) -> bool:
        """Whether two stacks of the same numbers lie in the same tiles.

        What comes out of attention is kept twice, as heads and as one row a token: of
        bf16[8,425,512,2,128] and bf16[8,425,512,256] libtpu 0.0.42 keeps both
        (`planner-memory --half tuning --dropless`, program 8).
        """
        same = super().are_the_same(first, second)
        return same and _lanes(first) == _lanes(second)

    # ---- operations that fuse ----

    def scatters_numbers(self, op: Operation) -> bool:
        """Whether a scatter has no window: each update is a single number."""
        return (
            op.name in SCATTERS
            and not op.params["dimension_numbers"].update_window_dims
        )

    def absorbs(
        self,
        user: Operation,
        op: Operation,
        costly: bool,
    ) -> bool:
        """Whether a reader computes its operand in its own kernel.

        What `strides` is a kernel of its own (an associative scan, v5e).
        """
        if strides(user) or strides(op):
            return False
        return super().absorbs(user, op, costly)

    def _add_fusible(
        self,
        op: Operation,
        inputs: list[Value],
        groups: list[Group],
    ) -> None:
        if not strides(op):
            super()._add_fusible(op, inputs, groups)
            return
        reads = self._buffers_of(inputs)
        writes = [self.materialize(v, op, self.kind(v)) for v in op.outputs]
        groups.append(Group(reads, writes))

    def must_write(self, target: Value) -> bool:
        """Whether a product that gives a kernel's gradient is one of several readers.

        Such a product runs in a loop and absorbs nothing.
        """
        if not self.windowed:
            return False
        readers = self._readers(target)
        return len(readers) > 1 and any(
            is_one_of(user, DOTS) and user.outputs[0].stored for user in readers
        )

    def computed_once(
        self,
        op: Operation,
        target: Value,
        sources: Buffers,
        several_large: bool,
        costly: bool,
    ) -> bool:
        """Whether writing a value pays.

        It does where a product writes it at its end, where all readers together would
        read more than is written and read otherwise, or where several products would
        compute something costly again. Products of attention do that all the same if
        they read no more for it (`_attends`).
        """
        users = self.users_of(target)
        stacked = target.index in self.stacks
        after = size(target) * self.kind(target).scale

        if not several_large:
            products = [user for user in users if is_one_of(user, DOTS)]
            largest = max(map(self._bytes, sources), default=0.0)
            if largest <= after and _attends(products):
                return False
            writes = stacked or self.eager or not self.windowed
            return costly and writes and len(products) + stacked > 1

        fusing = DOTS | REDUCED
        if all(is_one_of(user, fusing) for user in users):
            inputs = operands(op)
            return self._product_before(inputs, target, sources) is not None

        readers = len(users) + stacked
        before = sum(self._bytes(b) for b in sources)
        return readers * before >= before + after + readers * after

    def _bytes(self, buffer: int) -> float:
        value = self.graph.values[self.values[buffer]]
        half = self.kinds[buffer] == STORED_HALF
        return size(value) / 2 if half else size(value)

    def kind(
        self,
        value: Value,
        sums: bool = False,
    ) -> BufferKind:
        """Return the form in which a value is written.

        Products round float32 operands to bfloat16 by default, so what only they read
        is written as bfloat16.

        Args:
          value: the value.
          sums: whether sums of it may be taken where it is made, and don't count.
        """
        if str(value.dtype) != "float32" or value.stored is not None:
            return STORED
        users = self._readers(value)
        if sums:
            users = [u for u in users if u is None or u.name not in REDUCED]
        rounded = users and all(map(rounds_operands, users))
        return STORED_HALF if rounded else STORED

    def _readers(self, value: Value) -> list[Operation | None]:
        """Return what reads a value, also as an alias or slice by slice in a loop."""
        readers: list[Operation | None] = []
        for user in self.users_of(value):
            if user is None or user.name not in PASSING:
                readers.append(user)
                continue
            for i, source in enumerate(user.inputs):
                if source is value:
                    inside = user.regions[0].inputs if user.regions else user.outputs
                    readers += self._readers(inside[min(i, len(inside) - 1)])
        if value.index in self.stacks:
            readers += self._readers(self.stacks[value.index])
        return readers

    def _joins_product(
        self,
        op: Operation,
        inputs: list[Value],
        target: Value,
        sources: Buffers,
        fused: bool,
    ) -> bool:
        if fused:
            before = self._product_before(inputs, target, sources)
            if before is not None:
                self.only[target.index] = before

        product = self.products.get(inputs[0].index)
        if product is None or len(large_inputs(inputs, target)) > 1:
            return False
        # What is read from memory in a wider dtype than the product's is there in both.
        widens = (
            op.name == "convert_element_type"
            and itemsize(target) > itemsize(inputs[0])
            and not fused
        )
        if widens or (fused and self._feeds_several_products(target)):
            kind = STORED if widens else self.kind(target)
            written = self.materialize(target, op, kind)
            product.writes = (*product.writes, written)
            self.sources[target.index] = sources
            self.given.add(target.index)
            return True

        if fused and op.name not in COSTLY:
            self.products[target.index] = product
        return False

    def _feeds_several_products(self, target: Value) -> bool:
        """Whether several products read a value, which is then computed once.

        A windowed gradient of a kernel absorbs nothing, so it counts too.
        """
        users = self.users_of(target)
        dots = [user for user in users if is_one_of(user, DOTS)]
        if len(dots) < 2:
            return False
        operands = [value for user in dots for value in user.inputs]
        return self.windowed or not any(v and v.stored for v in operands)

    def _product_before(
        self,
        inputs: list[Value],
        target: Value,
        sources: Buffers,
    ) -> tuple[Group, int] | None:
        """Return the last product, and its buffer, that only this value needs."""
        candidates = [
            self.only[value.index]
            for value in inputs
            if value.index in self.only
            and len(self.users_of(value)) == 1
            and value.index not in self.stacks
            and size(value) >= size(target) // 2
        ]
        if not candidates:
            return None
        last = max(candidates, key=lambda candidate: self._rank(candidate[1]))
        rank = self._rank(last[1])
        return last if all(self._rank(b) <= rank for b in sources) else None

    def _rank(self, buffer: int) -> int:
        return self.ranks.get(buffer, buffer)

    def _ends_product(
        self,
        op: Operation,
        inputs: list[Value],
        target: Value,
        sources: Buffers,
    ) -> bool:
        before = self._product_before(inputs, target, sources)
        if before is None:
            return False
        users = self.users_of(target)
        looped = any(is_one_of(user, {"scan"}) for user in users)
        if looped and op.name == "transpose":
            # A loop reads slices in its own order, so the transpose is a copy.
            return False

        product, raw = before
        kind = self.kind(target, sums=True)
        written = self.materialize(target, op, kind)
        self.ranks[written] = self._rank(raw)
        others = (b for b in sources if b != raw)
        product.writes = tuple(written if b == raw else b for b in product.writes)
        product.reads = tuple(dict.fromkeys((*product.reads, *others)))
        self.only[target.index] = (product, written)
        self.products[target.index] = product
        return True

    # ---- operations that don't fuse ----

    def _add_unfused(
        self,
        op: Operation,
        inputs: list[Value],
        groups: list[Group],
    ) -> None:
        if op.name in SCATTERS and has_narrow_rows(op, op.outputs[0]):
            updates = inputs[1:]
            reads = [b for value in updates for b in self._reads(op, value, groups)]
            self._scatter_rows(op, reads, groups)
            return
        super()._add_unfused(op, inputs, groups)
        if op.name in DOTS:
            self._note_product(op, inputs, groups)
        if self.alone and self.depth == 1:
            self._wait(op, inputs, groups)

    def _wait(self, op: Operation, inputs: list[Value], groups: list[Group]) -> None:
        """Let a lookup in logits wait, and the gradient of the head that made them."""
        is_lookup = _looks_up_numbers(op) and inputs[0].stored is None
        is_head = len(self.waiting) == 1 and _is_kernels_gradient(op)
        if is_lookup or is_head:
            self.waiting.append(groups.pop())
            self.last = min(self.last, len(groups))

    def _note_product(
        self,
        op: Operation,
        inputs: list[Value],
        groups: list[Group],
    ) -> None:
        """Note a product that was just added, and order it if it is windowed."""
        target = op.outputs[0]
        if target.stored is not None and len(target.shape) > 1 and len(inputs) == 2:
            if self.windowed:
                self._window(op, inputs, groups)
            operands = (value.index for value in inputs)
            self.kernel_products.append((*operands, target.index))
        self._turn_state(op)
        self.products[target.index] = groups[-1]
        if target.stored is None:
            result, *_ = self.buffers[target.index]
            self.only[target.index] = (groups[-1], result)
        self.last = len(groups) - 1

    def _window(
        self,
        op: Operation,
        inputs: list[Value],
        groups: list[Group],
    ) -> None:
        """Make the last group a loop over pieces that waits for the chain of layers."""
        # The head's gradient frees most of what it needs, so it doesn't wait.
        head = not self.kernel_products and size(inputs[0]) > size(inputs[1])
        group = groups[-1]
        group.writes = group.writes[:1]
        group.late = not (head and self.eager)
        self._turn_operand(op, inputs[0], groups)

    def _turn_operand(
        self,
        op: Operation,
        value: Value,
        groups: list[Group],
    ) -> None:
        """Copy a windowed product's operand to lie transposed.

        The operand itself need not wait for the product then.
        """
        source = self.buffers[value.index]
        product = groups[-1]
        if len(source) != 1 or source[0] not in product.reads:
            return
        held = self.graph.values[self.values[source[0]]]
        copy = self.new_buffer(
            held,
            op,
            self.kinds[source[0]],
        )
        groups.insert(len(groups) - 1, Group(source, (copy,)))
        product.reads = tuple(copy if b == source[0] else b for b in product.reads)

    def _turn_state(self, op: Operation) -> None:
        """Copy the optimizer's state of a kernel whose gradient comes out transposed.

        libtpu copies the whole state, and not the gradient. It doesn't where tiles
        decide which dim is minor, or where the state lies in parts.
        """
        target = op.outputs[0]
        if target.stored is None:
            return
        parameter, dims = target.stored
        if dims != (1, 0) or any(extent % LANES for extent in target.shape):
            return
        if parameter not in self.tables:
            copy = self.new_buffer(target, op)
            self.tables[parameter] = copy
            self.conditions[copy] = (target.index, "ungathered")
            self.turned.append(copy)

    def _reads(
        self,
        op: Operation,
        value: Value,
        groups: list[Group],
    ) -> Buffers:
        if value.index in self.given:
            return self.buffers[value.index]
        if has_narrow_rows(op, value):
            return self._table(op, value, groups)
        if value.stored is None and convolves(op):
            return (
                self.copy(
                    value,
                    op,
                    self.sources[value.index],
                    groups,
                ),
            )
        if value.stored is None or len(value.shape) < 2 or op.name in ROWWISE:
            reads = super()._reads(op, value, groups)
            if value.stored is not None and self.depth == 1:
                self.hoisted += reads[-1:]
            return reads
        return (*self.sources[value.index], self._gather(op, value, groups))

    def _gather(
        self,
        op: Operation,
        value: Value,
        groups: list[Group],
    ) -> int:
        """Return the buffer of a gathered parameter; gather it if that wasn't done.

        libtpu gathers a parameter once a region, while the product before runs. It
        gathers one that products round to bfloat16 once for each pass.
        """
        assert value.stored is not None
        parameter = value.stored[0]
        wide = str(value.dtype) == "float32"
        again = wide and value.index in self.graph.lasting
        if parameter not in self.gathered or again:
            kind = GATHERED_HALF if wide and rounds_operands(op) else GATHERED
            gathered = self.new_buffer(value, op, kind)
            groups.insert(self.last, Group(self.sources[value.index], (gathered,)))
            self.last += 1
            self.gathered[parameter] = gathered
            if self.depth == 1:
                self.hoisted.append(gathered)
        return self.gathered[parameter]

    # ---- tables with narrow rows ----

    def _table(
        self,
        op: Operation,
        value: Value,
        groups: list[Group],
    ) -> Buffers:
        """Return the buffers that a lookup in narrow rows reads.

        The state is copied so that each row has a whole register. If more is looked up
        than there is, the copy is gathered.
        """
        assert value.stored is not None
        parameter = value.stored[0]
        if parameter not in self.tables:
            self.tables[parameter] = self.copy(
                value,
                op,
                (),
                groups,
                STORED_ROWS,
            )
        reads: Buffers = (self.tables[parameter],)
        if not sparse(op):
            gathered = self.copy(value, op, reads, groups, COMPUTED_ROWS)
            reads = (*reads, gathered)
        return reads

    def _scatter_rows(
        self,
        op: Operation,
        reads: list[int],
        groups: list[Group],
    ) -> None:
        """Add the gradient of a table with narrow rows, which is taken at once.

        Where few rows of a whole table are added to, the sum over the devices is a
        second buffer.
        """
        target = op.outputs[0]
        kind = STORED_ROWS if sparse(op) else COMPUTED_ROWS
        own = self.materialize(target, op, kind)
        if not sparse(op) and size(target) < COMBINED:
            # Devices sum small gradients together, so each waits for the others.
            self.in_hbm.append(own)
            groups.append(Group(reads, (own,)))
            return
        self._take(own, reads, groups)
        if sparse(op):
            total = self.copy(
                target,
                op,
                (own,),
                groups,
                STORED_ROWS,
            )
            self.conditions[total] = (target.index, "unsplit")
            groups.append(Group((total,), ()))
            self.taken.append(total)
            self.in_hbm.append(total)
        else:
            groups.append(Group((own,), ()))
        self._set(target, ())

    def _take(
        self,
        gradient: int,
        reads: list[int],
        groups: list[Group],
    ) -> None:
        groups.append(Group(reads, (gradient,)))
        self.taken.append(gradient)
        self.in_hbm.append(gradient)


def _looks_up_numbers(op: Operation) -> bool:
    return op.name == "gather" and set(op.params["slice_sizes"]) == {1}


def _is_kernels_gradient(op: Operation) -> bool:
    target = op.outputs[0]
    return op.name in DOTS and target.stored is not None and len(target.shape) > 1


def _lanes(value: Value) -> int:
    """Return the extent of the last dim, dims of one left out."""
    wide = [extent for extent in value.shape if extent > 1]
    return wide[-1] if wide else 1


def _attends(products: list[Operation]) -> bool:
    """Whether these are products of attention: all of them have batch dims.

    From scores of bfloat16 they compute the probabilities again, from scores of float32
    they don't (libtpu of jax 0.10, v5p and v6e, GPT-2 and a vision transformer).
    """
    dims = [product.params["dimension_numbers"] for product in products]
    return bool(dims) and all(
        product.name == "dot_general" and pair[1][0]
        for product, pair in zip(products, dims, strict=True)
    )
