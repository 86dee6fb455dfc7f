"""How XLA's backends fuse: what differs from `Fusion`."""

from __future__ import annotations

import jax

from lepton_jax.planner.program.graph import Region, Graph, Operation, Value
from lepton_jax.planner.program.layout import itemsize
from lepton_jax.planner.xla.fusion import (
    ALIASES,
    COSTLY,
    DOTS,
    DOUBLE,
    GATHERED,
    GATHERED_DOUBLE,
    GATHERED_HALF,
    HALF,
    KEPT,
    KEPT_ROWS,
    LANES,
    NOTHING,
    REDUCED,
    ROWS,
    ROWWISE,
    SCATTERS,
    USED,
    WORDS,
    Fusion,
    Group,
    convolves,
    large,
    narrow,
    rounds,
    size,
    sparse,
)

# XLA's CPU backend computed products of low precision in float32, and let barriers fall
# early, in jaxlib 0.10, but doesn't in jaxlib 0.12
OLDER = jax.__version_info__ < (0, 11)


class TpuFusion(Fusion):
    """As libtpu fuses: products take in what is cheap, and give their result in several
    forms.

    Args:
      graph: what runs.
      windowed: whether gradients of kernels are summed over the devices while they are
        computed (see `memory.windowed`).
      eager: whether that of the head doesn't wait for others, and the optimizer's state
        is copied at once where it has to be.
    """

    keeps_dots = False

    def __init__(
        self,
        graph: Graph,
        windowed: bool = False,
        eager: bool = False,
    ):
        self.windowed = windowed
        self.eager = eager
        # groups of the products that values stem from
        self.products: dict[int, Group] = {}
        # values to the product, and its buffer, that only they need
        self.only: dict[int, tuple[Group, int]] = {}
        self.ranks: dict[int, int] = {}  # buffers that are made with an earlier one
        self.whole: dict[int, int] = {}
        self.depth = 0  # of loops around what is looked at
        self.last = 0  # where the last product stands among its block's groups
        self.given: set[int] = set()  # values that a product gives in several forms
        # copies that are there when the optimizer takes a gradient
        self.turned: list[int] = []
        self.taken: list[int] = []  # gradients that are not there until the end
        super().__init__(graph)

    def spreads(self, op: Operation) -> bool:
        return (
            op.name in SCATTERS
            and not op.params["dimension_numbers"].update_window_dims
        )

    def waits(self, target: Value) -> bool:
        readers = self._readers(target) if self.windowed else []
        return len(readers) > 1 and any(
            u is not None and u.name in DOTS and u.outputs[0].stored for u in readers
        )

    def once(
        self,
        op: Operation,
        target: Value,
        sources: tuple[int, ...],
        wide: bool,
        heavy: bool,
    ) -> bool:
        """Not again, where a product writes it at its end, where that would read more
        than is written and read otherwise, or where products would compute something
        costly.
        """
        users = self.users.get(target.index, ())
        times = len(users) + (target.index in self.stacks)
        if not wide:
            stacked = target.index in self.stacks
            kept = stacked or self.eager or not self.windowed
            return (
                heavy
                and kept
                and sum(u is not None and u.name in DOTS for u in users) + stacked > 1
            )
        if all(u is not None and u.name in DOTS | REDUCED for u in users):
            return (
                self._follow(
                    [v for v in op.inputs if v is not None],
                    target,
                    sources,
                )
                is not None
            )
        before = sum(self._bytes(b) for b in sources)
        after = size(target) / (2 if self.kind(target) == HALF else 1)
        return times * before >= before + after + times * after

    def _bytes(self, buffer: int) -> float:
        return size(self.graph.values[self.values[buffer]]) / (
            2 if self.kinds[buffer] == HALF else 1
        )

    def kind(
        self,
        value: Value,
        sums: bool = False,
    ) -> int:
        """Products round float32 operands to bfloat16, unless told otherwise: what only
        they read is kept so; `sums` of it may be taken where it is made.
        """
        if str(value.dtype) != "float32" or value.stored is not None:
            return KEPT
        users = self._readers(value)
        if sums:
            users = [u for u in users if u is None or u.name not in REDUCED]
        return HALF if users and all(rounds(u) for u in users) else KEPT

    def _readers(self, value: Value) -> list[Operation | None]:
        """What uses a value, under whatever name, also where a loop has it slice by
        slice.
        """
        found: list[Operation | None] = []
        for user in self.users.get(value.index, ()):
            if user is None or user.name not in ALIASES | {"transpose", "scan"}:
                found.append(user)
                continue
            for i, source in enumerate(user.inputs):
                if source is value:
                    inside = user.regions[0].inputs if user.regions else user.outputs
                    found += self._readers(inside[min(i, len(inside) - 1)])
        if value.index in self.stacks:
            found += self._readers(self.stacks[value.index])
        return found

    def _table(
        self,
        op: Operation,
        value: Value,
        groups: list[Group],
    ) -> tuple[int, ...]:
        """A parameter with narrow rows that are looked up: the state is copied to have
        its rows in lines of the vector's width; if all of it is needed, that is
        gathered.
        """
        assert value.stored is not None
        if value.stored[0] not in self.tables:
            self.tables[value.stored[0]] = self.buffer(value, op, KEPT_ROWS)
            groups.append(Group((), (self.tables[value.stored[0]],)))
        reads: tuple[int, ...] = (self.tables[value.stored[0]],)
        if not sparse(op):
            whole = (self.buffer(value, op, ROWS),)
            groups.append(Group(reads, whole))
            reads += whole
        return reads

    def _spread_rows(
        self,
        op: Operation,
        reads: list[int],
        groups: list[Group],
    ) -> None:
        """The gradient of such a table, which the optimizer takes at once. Where few
        rows of a whole table get something, its sum over the devices is another buffer.
        """
        target = op.outputs[0]
        own = self.own(
            target,
            op,
            KEPT_ROWS if sparse(op) else ROWS,
        )
        groups.append(Group(reads, (own,)))
        self.taken.append(own)
        self.lying.append(own)
        if sparse(op):
            summed = self.buffer(target, op, KEPT_ROWS)
            self.conditions[summed] = target.index, "unsplit"
            groups.append(Group((own,), (summed,)))
            groups.append(Group((summed,), ()))
            self.taken.append(summed)
            self.lying.append(summed)
        else:
            groups.append(Group((own,), ()))
        self.near[target.index] = self.far[target.index] = ()

    def _turn(
        self,
        value: Value,
        op: Operation,
        groups: list[Group],
    ) -> None:
        """What a loop over pieces reads of the chain is copied to lie transposed, and
        need not wait for it itself.
        """
        source = self.near[value.index]
        if len(source) == 1 and source[0] in groups[-1].reads:
            copy = self.buffer(
                self.graph.values[self.values[source[0]]],
                op,
                self.kinds[source[0]],
            )
            groups.insert(len(groups) - 1, Group(source, (copy,)))
            groups[-1].reads = tuple(
                copy if b == source[0] else b for b in groups[-1].reads
            )

    def _turn_state(
        self,
        op: Operation,
        groups: list[Group],
    ) -> None:
        """A gradient comes out of its product transposed, and the optimizer's whole
        state of that kernel is copied to lie so, instead of the gradient; not where the
        dims' tiles say what is minor, or where the state lies in parts.
        """
        target = op.outputs[0]
        if (
            target.stored is None
            or target.stored[1] != (1, 0)
            or any(n % LANES for n in target.shape)
        ):
            return
        if target.stored[0] not in self.tables:
            b = self.tables[target.stored[0]] = self.buffer(target, op)
            self.conditions[b] = target.index, "ungathered"
            self.turned.append(b)

    def _finish(self, block: Region) -> list[int]:
        self.lying += self.tables.values()
        early = [b for b in self.tables.values() if self.eager or b not in self.turned]
        self.groups.insert(0, Group((), self.turned if self.eager else ()))
        self.groups.append(Group(early, ()))
        for b in () if self.eager else self.turned:  # one kernel after the other
            self.groups += [Group((), (b,)), Group((b,), ())]
        return super()._finish(block) + self.taken

    def _rename(
        self,
        source: Value,
        target: Value,
        alike: bool = True,
    ) -> None:
        super()._rename(source, target, alike)
        if source.index in self.products:
            self.products[target.index] = self.products[source.index]
        if source.index in self.only and len(self.users.get(source.index, ())) == 1:
            self.only[target.index] = self.only[source.index]

    def _joins(
        self,
        op: Operation,
        inputs: list[Value],
        target: Value,
        sources: tuple[int, ...],
        fused: bool,
    ) -> bool:
        way = self._follow(inputs, target, sources) if fused else None
        if way is not None:
            self.only[target.index] = way
        product = self.products.get(inputs[0].index)
        if product is None or len(large(inputs, target)) > 1:
            return False
        users = self.users.get(target.index, ())
        # what is read from memory in a higher precision than a product has is there in
        # both; what several products read is computed once
        widens = (
            op.name == "convert_element_type"
            and itemsize(target) > itemsize(inputs[0])
            and not fused
        )
        dots = [u for u in users if u is not None and u.name in DOTS]
        # the gradient of a kernel that is summed in a loop takes nothing in
        several = (
            fused
            and len(dots) > 1
            and (
                self.windowed or not any(v and v.stored for u in dots for v in u.inputs)
            )
        )
        if widens or several:
            product.writes = (
                *product.writes,
                self.own(
                    target,
                    op,
                    KEPT if widens else self.kind(target),
                ),
            )
            self.far[target.index] = sources
            self.given.add(target.index)
            return True
        if fused and op.name not in COSTLY:
            self.products[target.index] = product
        return False

    def _follow(
        self,
        inputs: list[Value],
        target: Value,
        sources: tuple[int, ...],
    ) -> tuple[Group, int] | None:
        """The last product, with its buffer, that is needed for nothing but this
        value.
        """
        ways = [
            self.only[v.index]
            for v in inputs
            if v.index in self.only
            and len(self.users.get(v.index, ())) == 1
            and v.index not in self.stacks
            and size(v) >= size(target) // 2
        ]

        def rank(b: int) -> int:
            return self.ranks.get(b, b)

        best = max(
            ways,
            key=lambda way: rank(way[1]),
            default=None,
        )
        return best if best and all(rank(b) <= rank(best[1]) for b in sources) else None

    def _ends_product(
        self,
        op: Operation,
        inputs: list[Value],
        target: Value,
        sources: tuple[int, ...],
    ) -> bool:
        way = self._follow(inputs, target, sources)
        users = self.users.get(target.index, ())
        if way is None or (
            op.name == "transpose"
            and any(u is not None and u.name == "scan" for u in users)
        ):
            # what a loop takes slices of has its order, and is copied into it
            return False
        product, raw = way
        own = self.own(
            target,
            op,
            self.kind(target, sums=True),
        )
        self.ranks[own] = self.ranks.get(raw, raw)
        product.writes = tuple(own if b == raw else b for b in product.writes)
        product.reads = tuple(
            dict.fromkeys((*product.reads, *(b for b in sources if b != raw)))
        )
        self.only[target.index] = (product, own)
        self.products[target.index] = product
        return True

    def _reads(
        self,
        op: Operation,
        value: Value,
        groups: list[Group],
    ) -> tuple[int, ...]:
        if value.index in self.given:
            return self.near[value.index]
        if narrow(op, value):
            return self._table(op, value, groups)
        if value.stored is None and convolves(op):
            copy = self.buffer(value, op)
            groups.append(Group(self.far[value.index], (copy,)))
            return (copy,)
        if value.stored is None or len(value.shape) < 2 or op.name in ROWWISE:
            reads = super()._reads(op, value, groups)
            self.fixed += (
                reads[-1:] if value.stored is not None and self.depth == 1 else ()
            )
            return reads
        # libtpu gathers a parameter once a block, while the product before runs; one
        # that products round, for each pass
        if value.stored[0] not in self.whole or (
            str(value.dtype) == "float32" and value.index in self.graph.lasting
        ):
            whole = self.buffer(
                value,
                op,
                (
                    GATHERED_HALF
                    if rounds(op) and str(value.dtype) == "float32"
                    else GATHERED
                ),
            )
            groups.insert(self.last, Group(self.far[value.index], (whole,)))
            self.last += 1
            self.whole[value.stored[0]] = whole
            if self.depth == 1:
                self.fixed.append(whole)
        return (*self.far[value.index], self.whole[value.stored[0]])

    def _block(self, block: Region) -> list[Group]:
        outer = (self.whole, self.last)
        self.whole = {}
        self.last = 0
        self.depth += 1
        groups = super()._block(block)
        self.depth -= 1
        self.whole, self.last = outer
        return groups

    def _hard(
        self,
        op: Operation,
        inputs: list[Value],
        groups: list[Group],
    ) -> None:
        if op.name in SCATTERS and narrow(op, op.outputs[0]):
            self._spread_rows(
                op,
                [b for value in inputs[1:] for b in self._reads(op, value, groups)],
                groups,
            )
            return
        super()._hard(op, inputs, groups)
        if op.name in DOTS:
            if (
                len(op.outputs[0].shape) > 1
                and op.outputs[0].stored is not None
                and len(inputs) == 2
            ):
                if self.windowed:
                    # what it frees is most of what it needs
                    head = not self.weighing and size(inputs[0]) > size(inputs[1])
                    groups[-1].writes = groups[-1].writes[:1]
                    groups[-1].late = not (head and self.eager)
                    self._turn(inputs[0], op, groups)
                self.weighing.append((*(v.index for v in inputs), op.outputs[0].index))
            self._turn_state(op, groups)
            self.products[op.outputs[0].index] = groups[-1]
            if op.outputs[0].stored is None:
                self.only[op.outputs[0].index] = (
                    groups[-1],
                    self.near[op.outputs[0].index][0],
                )
            self.last = len(groups) - 1


class CpuFusion(Fusion):
    """As XLA's CPU backend fuses: in an older one no barriers, products in float32; all
    gradients summed at once at the end.
    """

    early = OLDER

    def __init__(self, graph: Graph):
        self.wide: dict[tuple[int, bool], tuple[int, ...]] = {}
        self.whole: dict[tuple, tuple[int, ...]] = {}
        self.depth = 0  # of loops around what is looked at
        # sums scattered into zeros that are added to something: what they read
        self.added: dict[int, tuple[int, ...]] = {}
        self.transposed: set[int] = set()  # values that are transposes of others
        self.loose: set[int] = set()  # values that are computed number by number
        self.spread: dict[tuple, Value] = {}
        # values that are only there in float32, as operands of products
        self.unwritten: set[int] = set()
        super().__init__(graph)

    def _finish(self, block: Region) -> list[int]:
        results = [v for v in block.results if isinstance(v, Value)]
        parts = [b for v in results if v.stored is not None for b in self.near[v.index]]
        summed = [self.buffer(v, None, USED) for v in results if v.stored is not None]
        self.groups.append(Group(parts, summed))
        self.groups.append(
            Group(
                (
                    *summed,
                    *(
                        b
                        for v in results
                        for b in self.near[v.index]
                        if v.stored is None
                    ),
                ),
                (),
            )
        )
        return summed

    def takes(
        self,
        user: Operation,
        op: Operation,
        heavy: bool,
    ) -> bool:
        """A product in low precision has its operands widened, which takes in what they
        are computed from.
        """
        return self._widens(user) or super().takes(user, op, heavy)

    def once(
        self,
        op: Operation,
        target: Value,
        sources: tuple[int, ...],
        wide: bool,
        heavy: bool,
    ) -> bool:
        """A product is float32; what several need of it in low precision is written
        so.
        """
        if OLDER and itemsize(target) == 2:
            if len(target.shape) < 3 and all(
                u is not None and u.name in DOTS | REDUCED
                for u in self.users[target.index]
            ):
                self.unwritten.add(target.index)
                return False
            if any(self.kinds[b] == DOUBLE for b in sources):
                return True
        return super().once(
            op,
            target,
            sources,
            wide,
            heavy,
        )

    def _fusible(
        self,
        op: Operation,
        inputs: list[Value],
        groups: list[Group],
    ) -> None:
        if op.name == "mul" and all(v.shape != op.outputs[0].shape for v in inputs):
            inputs = [self._spreadout(v, op, groups) for v in inputs]
        added = next((v for v in inputs if v.index in self.added), None)
        # zeros with something added to some of them, and to the rest: added to the rest
        # at once
        if added is not None:
            rest = [b for v in inputs if v is not added for b in self.far[v.index]]
            own = self.own(op.outputs[0], op)
            groups.append(Group(rest, (own,)))
            groups.append(
                Group(
                    self.added[added.index],
                    (),
                    updates=(own,),
                )
            )
            return
        self.loose.update(v.index for v in op.outputs)
        if op.name == "transpose" and len(op.outputs[0].shape) > 2:
            self.transposed.add(op.outputs[0].index)
        super()._fusible(op, inputs, groups)

    def _rename(
        self,
        source: Value,
        target: Value,
        alike: bool = True,
    ) -> None:
        super()._rename(source, target, alike)
        if source.index in self.loose:
            self.loose.add(target.index)

    def _hold(
        self,
        op: Operation,
        groups: list[Group],
    ) -> None:
        if self.early:
            return
        token = self.buffer(
            op.outputs[0],
            op,
            NOTHING,
        )
        groups.append(
            Group(
                (b for v in op.inputs if v is not None for b in self.near[v.index]),
                (token,),
            )
        )
        for value in op.outputs:
            self.near[value.index] = (
                *self.near[value.index],
                token,
            )
            self.far[value.index] = (*self.far[value.index], token)

    def _spreadout(
        self,
        value: Value,
        op: Operation,
        groups: list[Group],
    ) -> Value:
        """An operand of an outer product at the result's size: it is written out
        first.
        """
        target = op.outputs[0]
        if (
            len(value.shape) != len(target.shape)
            or value.shape == target.shape
            or not any(n > 1 for n in value.shape)
        ):
            return value
        key = (self.first.get(value.index, value.index), target.shape)
        if key not in self.spread:
            self.spread[key] = Value(
                -1 - len(self.spread),
                target.shape,
                target.dtype,
                target.nodes,
            )
            b = self.buffer(target, op)
            self.near[self.spread[key].index] = self.far[self.spread[key].index] = (b,)
            groups.append(Group(self.far[value.index], (b,)))
        return self.spread[key]

    def _hard(
        self,
        op: Operation,
        inputs: list[Value],
        groups: list[Group],
    ) -> None:
        if op.name == "select_and_scatter_add":
            self._unpool(op, inputs, groups)
            return
        low = self._widens(op)
        turns = self._turns(op) if op.name == "dot_general" else (False,) * len(inputs)
        reads = [
            b
            for value, turned in zip(inputs, turns, strict=True)
            for b in (
                self._widened(op, value, groups, turned)
                if low
                else (
                    self._turned(op, value, groups)
                    if turned
                    else self._reads(op, value, groups)
                )
            )
        ]
        # a callback gives nothing
        users = self.users.get(op.outputs[0].index, ()) if op.outputs else ()
        zeros = op.name in SCATTERS and not self.near[inputs[0].index]
        if (
            zeros
            and len(users) == 1
            and users[0] is not None
            and users[0].name == "add_any"
        ):
            self.added[op.outputs[0].index] = tuple(reads)
            self.near[op.outputs[0].index] = self.far[op.outputs[0].index] = ()
            return
        if zeros:  # which are ready when the program starts
            groups.append(
                Group(
                    (),
                    (
                        self.own(
                            op.outputs[0],
                            op,
                            KEPT if sparse(op) else USED,
                        ),
                    ),
                )
            )
            groups.append(
                Group(
                    reads,
                    (),
                    updates=self.near[op.outputs[0].index],
                )
            )
            return
        targets = op.outputs
        if low:
            product = self.buffer(targets[0], op, DOUBLE)
            groups.append(Group(reads, (product,)))
            groups[-1].late = targets[0].stored is not None
            users = self.users.get(targets[0].index, ())
            if len(users) > 1 or not all(
                u is not None and self.takes(u, op, True) for u in users
            ):
                groups.append(Group((product,), (self.own(targets[0], op, USED),)))
            else:
                self.near[targets[0].index] = self.far[targets[0].index] = (product,)
            return
        writes = [
            self.own(t, op, USED if t.stored is not None else KEPT) for t in targets
        ]
        groups.append(Group(reads, writes))
        # the other user of a fused operand is made anew with it, and so asks for it
        # first
        groups[-1].late = (
            op.name in DOTS
            and targets[0].stored is not None
            and inputs[0].index in self.loose
        )

    def _turns(self, op: Operation) -> tuple[bool, bool]:
        """Whether a product's operands are transposed first: the left one to sum over
        its last dims, the right one to sum over its first ones after those that both
        share. Products of matrices are computed as they are.
        """
        (left, right), (_, shared) = op.params["dimension_numbers"]
        rank = len(op.inputs[0].shape) if op.inputs[0] is not None else 0
        first = range(len(shared), len(shared) + len(right))
        return rank > 2 and sorted(left) != list(
            range(rank - len(left), rank)
        ), rank > 2 and sorted(right) != list(first)

    def _unpool(
        self,
        op: Operation,
        inputs: list[Value],
        groups: list[Group],
    ) -> None:
        """The gradient of pooling by maximum: indices of every number for each dim, and
        of each window's greatest.
        """
        source = inputs[0]
        operand = inputs[1]
        dims = len(operand.shape)
        indices = [self.buffer(operand, op, WORDS) for _ in range(dims)]
        zeros = self.own(op.outputs[0], op)
        for b in (*indices, zeros):
            groups.append(Group((), (b,)))
        greatest = [self.buffer(source, op, WORDS) for _ in range(dims)]
        groups.append(
            Group(
                (*indices, *self.near[operand.index]),
                (*greatest, self.buffer(source, op)),
            )
        )
        groups.append(
            Group(
                (*greatest, *self.near[source.index]),
                (),
                updates=(zeros,),
            )
        )

    def _reads(
        self,
        op: Operation,
        value: Value,
        groups: list[Group],
    ) -> tuple[int, ...]:
        source = self.far[value.index] if op.name in REDUCED else self.near[value.index]
        # written in float32 first
        if op.name in REDUCED and value.index in self.transposed:
            copy = self.buffer(value, op, WORDS)
            groups.append(Group(source, (copy,)))
            return (copy,)
        if value.stored is None or len(value.shape) < 2:
            return source
        key = (self.first.get(value.index, value.index), GATHERED)
        if key not in self.whole:
            self.whole[key] = (self.buffer(value, op, GATHERED),)
            groups.append(Group(source, self.whole[key]))
            if self.depth == 1:
                self.fixed += self.whole[key]
        return (*source, *self.whole[key])

    def _widens(self, op: Operation) -> bool:
        """Whether a product is one of low precision that is computed in float32."""
        return OLDER and op.name in DOTS and itemsize(op.outputs[0]) == 2

    def _turned(
        self,
        op: Operation,
        value: Value,
        groups: list[Group],
    ) -> tuple[int, ...]:
        """A transposed copy of an operand, once for all that need it; kernels are read
        as they are.
        """
        source = self._reads(op, value, groups)
        key = (self.first.get(value.index, value.index), True)
        if value.stored is None and key not in self.wide:
            self.wide[key] = (self.buffer(value, op),)
            groups.append(Group(source, self.wide[key]))
        return self.wide.get(key, source)

    def _widened(
        self,
        op: Operation,
        value: Value,
        groups: list[Group],
        turned: bool = False,
    ) -> tuple[int, ...]:
        """The operand of a product in float32, as it is or transposed."""
        key = (self.first.get(value.index, value.index), turned)
        if key in self.wide:
            return self.wide[key]
        kernel = value.stored is not None and len(value.shape) > 1
        source = (
            self._widened(op, value, groups)
            if turned and kernel
            else self.far[value.index]
        )
        if kernel and not turned:
            for kind in (GATHERED_DOUBLE, USED):
                step = (self.buffer(value, op, kind),)
                groups.append(Group(source, step))
                source = step
        self.wide[key] = (self.buffer(value, op, DOUBLE),)
        groups.append(Group(source, self.wide[key]))
        if kernel and self.depth == 1:
            self.fixed += self.wide[key]
        if value.index in self.unwritten and not turned:
            self.near[value.index] = self.far[value.index] = self.wide[key]
        return self.wide[key]

    def _block(self, block: Region) -> list[Group]:
        outer = self.wide, self.whole, self.spread
        self.wide = {}
        self.whole = {}
        self.spread = {}
        self.depth += 1
        groups = super()._block(block)
        self.depth -= 1
        self.wide, self.whole, self.spread = outer
        return groups

    def _slices(
        self,
        op: Operation,
        values: list[Value],
    ) -> list[Group]:
        groups = []
        for value in values:
            if str(value.dtype) == "float32" and value.stored is None:
                source = self.near[value.index]
                groups.append(Group(source, (self.own(value, op),)))
        return groups

    def _enters(
        self,
        value: Value,
        op: Operation,
        groups: list[Group],
    ) -> tuple[int, ...]:
        """A stack in low precision is widened as a whole, before the loop."""
        source = self.near[value.index]
        if (
            not OLDER
            or str(value.dtype) not in ("bfloat16", "float16")
            or value.stored is not None
        ):
            return source
        b = self.buffer(value, op, DOUBLE)
        groups.append(Group(source, (b,)))
        return (b,)

    def _loop(
        self,
        groups: list[Group],
        reads: list[int],
        writes: list[int],
        stacks: list[int],
        inside: list[Group],
        places: tuple[int, ...],
    ) -> None:
        for b in stacks:  # zeros, which are ready when the program starts
            groups.append(Group((), (b,)))
        groups.append(
            Group(
                reads,
                writes,
                inside,
                places,
                stacks,
            )
        )
