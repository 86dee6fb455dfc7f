"""How XLA's backends fuse: what differs from `Fusion`."""

from __future__ import annotations

import math
from typing import Any

from lepton_jax.planner.fusion import (
    ALIASES,
    COSTLY,
    DOTS,
    DOUBLE,
    GATHERED,
    GATHERED_DOUBLE,
    HALF,
    KEPT,
    KEPT_ROWS,
    LANES,
    REDUCED,
    ROWS,
    ROWWISE,
    SCATTERS,
    USED,
    WORDS,
    Fusion,
    Group,
    large,
    sparse,
)
from lepton_jax.planner.graph import Block, Graph, Operation, Value
from lepton_jax.planner.layout import itemsize
from lepton_jax.planner.rules import ELEMENTWISE


class TpuFusion(Fusion):
    """As libtpu fuses: products take in what is cheap, and give their result in several forms."""

    keeps_dots = False

    def __init__(self, graph: Graph):
        self.products: dict[int, Group] = {}  # groups of the products that values stem from
        self.loops: dict[int, tuple[int, ...]] = {}  # stacks that a loop fills: what it reads
        self.looped = {v.index for op in graph.operations() if op.name == "scan" for v in op.outputs}
        self.whole: dict[int, int] = {}
        self.last = 0  # where the last product stands among its block's groups
        self.given: set[int] = set()  # values that a product gives in several forms
        super().__init__(graph)

    def spreads(self, op: Operation) -> bool:
        if op.name == "gather":
            return not op.params["dimension_numbers"].offset_dims
        return op.name in SCATTERS and not op.params["dimension_numbers"].update_window_dims

    def once(self, op: Operation) -> bool:
        return False

    def besides(self, op: Operation, sources: tuple[int, ...]) -> tuple[int, ...]:
        """A loop's result is copied into another order while what the loop read is there yet."""
        return tuple(x for b in sources for x in self.loops.get(b, ())) if op.name == "transpose" else ()

    def _loop(self, groups: list[Group], reads: list[int], writes: list[int], stacks: list[int], inside: list[Group],
              places: tuple[int, ...]) -> None:
        super()._loop(groups, reads, writes, stacks, inside, places)
        self.loops.update(dict.fromkeys(stacks, tuple(reads)))

    def takes(self, user: Operation, op: Operation, heavy: bool) -> bool:
        return super().takes(user, op, heavy) and not (op.name == "transpose" and op.inputs[0] is not None
                                                       and op.inputs[0].index in self.looped)

    def kind(self, value: Value) -> int:
        """Products round float32 operands to bfloat16, unless told otherwise: what only they read is kept so."""
        if str(value.dtype) != "float32" or value.stored is not None:
            return KEPT
        users = self._readers(value)
        low = bool(users) and all(u is not None and u.name in DOTS and u.params.get("precision") is None for u in users)
        return HALF if low else KEPT

    def _readers(self, value: Value) -> list[Operation | None]:
        """What uses a value, under whatever name, also where a loop has it slice by slice."""
        found: list[Operation | None] = []
        for user in self.users.get(value.index, ()):
            if user is None or user.name not in ALIASES | {"transpose", "scan"}:
                found.append(user)
                continue
            for i, source in enumerate(user.inputs):
                if source is value:
                    inside = user.blocks[0].inputs if user.blocks else user.outputs
                    found += self._readers(inside[min(i, len(inside) - 1)])
        if value.index in self.stacks:
            found += self._readers(self.stacks[value.index])
        return found

    def gathers(self, op: Operation, value: Value) -> int:
        """Tables with narrow rows are copied to have their rows in lines of the vector's width."""
        if op.name not in ROWWISE or not value.shape[-1] % LANES:
            return GATHERED
        return KEPT_ROWS if sparse(op) else ROWS

    def _finish(self, block: Block) -> list[int]:
        rows = [b for b, kind in enumerate(self.kinds) if kind in (ROWS, KEPT_ROWS)]
        if rows:  # the optimizer changes these copies, with one more of its own state
            widest = max(rows, key=lambda b: math.prod(self.graph.values[self.values[b]].shape))
            more = self.buffer(self.graph.values[self.values[widest]], self.owners[widest], self.kinds[widest])
            self.groups.append(Group(rows, (more,)))
        return super()._finish(block)

    def _rename(self, source: Value, target: Value) -> None:
        super()._rename(source, target)
        if source.index in self.products:
            self.products[target.index] = self.products[source.index]

    def _joins(self, op: Operation, inputs: list[Value], target: Value, sources: tuple[int, ...], fused: bool) -> bool:
        product = self.products.get(inputs[0].index)
        if product is None or len(large(inputs, target)) > 1:
            return False
        users = self.users.get(target.index, ())
        # what is reduced in a higher precision than a product has is there in both; what several products read is computed
        # once
        widens = (op.name == "convert_element_type" and itemsize(target) > itemsize(inputs[0])
                  and any(u is not None and u.name in REDUCED for u in users))
        several = fused and sum(u is not None and u.name in DOTS for u in users) > 1
        if widens or several:
            product.writes = (*product.writes, self.own(target, op))
            self.far[target.index] = sources
            self.given.add(target.index)
            return True
        if fused and op.name not in COSTLY:
            self.products[target.index] = product
        return False

    def _reads(self, op: Operation, value: Value, groups: list[Group]) -> tuple[int, ...]:
        if value.index in self.given:
            return self.near[value.index]
        if value.stored is None or len(value.shape) < 2 or op.name in ROWWISE:
            return super()._reads(op, value, groups)
        # libtpu gathers a parameter once for a block, while the product before runs
        if value.stored[0] not in self.whole:
            whole = self.buffer(value, op, GATHERED)
            groups.insert(self.last, Group(self.far[value.index], (whole,)))
            self.last += 1
            self.whole[value.stored[0]] = whole
        return (*self.far[value.index], self.whole[value.stored[0]])

    def _block(self, block: Block) -> list[Group]:
        outer, self.whole, self.last = (self.whole, self.last), {}, 0
        groups = super()._block(block)
        self.whole, self.last = outer
        return groups

    def _hard(self, op: Operation, inputs: list[Value], groups: list[Group]) -> None:
        super()._hard(op, inputs, groups)
        if op.name in DOTS:
            self.products[op.outputs[0].index] = groups[-1]
            self.last = len(groups) - 1


class CpuFusion(Fusion):
    """As XLA's CPU backend fuses: no barriers, products in float32, all gradients summed at once at the end."""

    def __init__(self, graph: Graph):
        self.same: dict[Any, Operation] = {}
        self.first: dict[int, int] = {}  # values to the first of those that are computed alike
        self.wide: dict[int, tuple[int, ...]] = {}
        self.whole: dict[tuple, tuple[int, ...]] = {}
        self.spread: dict[tuple, Value] = {}
        super().__init__(graph)

    def _finish(self, block: Block) -> list[int]:
        results = [v for v in block.results if isinstance(v, Value)]
        parts = [b for v in results if v.stored is not None for b in self.near[v.index]]
        summed = [self.buffer(v, None, USED) for v in results if v.stored is not None]
        self.groups.append(Group(parts, summed))
        self.groups.append(Group((*summed, *(b for v in results for b in self.near[v.index] if v.stored is None)), ()))
        return summed

    def _fusible(self, op: Operation, inputs: list[Value], groups: list[Group]) -> None:
        if self._again(op):
            return
        if op.name == "mul" and all(v.shape != op.outputs[0].shape for v in inputs):
            inputs = [self._spreadout(v, op, groups) for v in inputs]
        super()._fusible(op, inputs, groups)

    def _spreadout(self, value: Value, op: Operation, groups: list[Group]) -> Value:
        """An operand of an outer product at the result's size: it is written out first."""
        target = op.outputs[0]
        if len(value.shape) != len(target.shape) or value.shape == target.shape or not any(n > 1 for n in value.shape):
            return value
        key = (self.first.get(value.index, value.index), target.shape)
        if key not in self.spread:
            self.spread[key] = Value(-1 - len(self.spread), target.shape, target.dtype, target.nodes)
            b = self.buffer(target, op)
            self.near[self.spread[key].index] = self.far[self.spread[key].index] = (b,)
            groups.append(Group(self.far[value.index], (b,)))
        return self.spread[key]

    def _rename(self, source: Value, target: Value) -> None:
        super()._rename(source, target)
        self.first[target.index] = self.first.get(source.index, source.index)

    def _again(self, op: Operation) -> bool:
        """Whether the same is computed before: barriers fall early here, and with them rematerialization."""
        ins = tuple(repr(getattr(e, "val", None)) if v is None else self.first.get(v.index, v.index)
                    for v, e in zip(op.inputs, op.eqn.invars, strict=False))
        key = (op.name, ins, tuple(v.shape for v in op.outputs), tuple(str(v.dtype) for v in op.outputs),
               "" if op.name in ELEMENTWISE else str(sorted(op.params.items(), key=lambda p: p[0])))
        before = self.same.setdefault(key, op)
        if before is op:
            return False
        for old, new in zip(before.outputs, op.outputs, strict=True):
            self._rename(old, new)
        return True

    def _hard(self, op: Operation, inputs: list[Value], groups: list[Group]) -> None:
        if op.name != "random_bits" and self._again(op):
            return
        if op.name == "select_and_scatter_add":
            self._unpool(op, inputs, groups)
            return
        low = op.name in DOTS and itemsize(op.outputs[0]) == 2
        reads = [b for value in inputs for b in (self._widened(op, value, groups) if low else self._reads(op, value, groups))]
        if low and op.name == "dot_general" and self._turns(op):
            turned = self.buffer(inputs[0], op, DOUBLE)
            groups.append(Group(self._widened(op, inputs[0], groups), (turned,)))
            reads.append(turned)
        if op.name in SCATTERS and not self.near[inputs[0].index]:  # into zeros, which are ready when the program starts
            groups.append(Group((), (self.own(op.outputs[0], op, KEPT if sparse(op) else USED),)))
            groups.append(Group(reads, (), updates=self.near[op.outputs[0].index]))
            return
        targets = op.outputs
        if low:
            product = self.buffer(targets[0], op, DOUBLE)
            groups.append(Group(reads, (product,)))
            users = self.users.get(targets[0].index, ())
            if len(users) > 1 or not all(u is not None and self.takes(u, op, True) for u in users):
                groups.append(Group((product,), (self.own(targets[0], op, USED),)))
            else:
                self.near[targets[0].index] = self.far[targets[0].index] = (product,)
            return
        writes = [self.own(t, op, USED if t.stored is not None else KEPT) for t in targets]
        groups.append(Group(reads, writes))

    def _turns(self, op: Operation) -> bool:
        """Whether a product sums over dims of its left operand that are not its last: it is transposed first."""
        (left, _), _ = op.params["dimension_numbers"]
        rank = len(op.inputs[0].shape) if op.inputs[0] is not None else 0
        return sorted(left) != list(range(rank - len(left), rank))

    def _unpool(self, op: Operation, inputs: list[Value], groups: list[Group]) -> None:
        """The gradient of pooling by maximum: indices of every number for each dim, and of each window's greatest."""
        source, operand = inputs[0], inputs[1]
        dims = len(operand.shape)
        indices = [self.buffer(operand, op, WORDS) for _ in range(dims)]
        zeros = self.own(op.outputs[0], op)
        for b in (*indices, zeros):
            groups.append(Group((), (b,)))
        greatest = [self.buffer(source, op, WORDS) for _ in range(dims)]
        groups.append(Group((*indices, *self.near[operand.index]), (*greatest, self.buffer(source, op))))
        groups.append(Group((*greatest, *self.near[source.index]), (), updates=(zeros,)))

    def _reads(self, op: Operation, value: Value, groups: list[Group]) -> tuple[int, ...]:
        source = self.far[value.index] if op.name in REDUCED else self.near[value.index]
        if value.stored is None or len(value.shape) < 2:
            return source
        key = (self.first.get(value.index, value.index), GATHERED)
        if key not in self.whole:
            self.whole[key] = (self.buffer(value, op, GATHERED),)
            groups.append(Group(source, self.whole[key]))
        return (*source, *self.whole[key])

    def _widened(self, op: Operation, value: Value, groups: list[Group]) -> tuple[int, ...]:
        """The operand of a product in float32."""
        index = self.first.get(value.index, value.index)
        if index not in self.wide:
            source = self.far[value.index]
            if value.stored is not None and len(value.shape) > 1:
                for kind in (GATHERED_DOUBLE, USED):
                    step = (self.buffer(value, op, kind),)
                    groups.append(Group(source, step))
                    source = step
            self.wide[index] = (self.buffer(value, op, DOUBLE),)
            groups.append(Group(source, self.wide[index]))
        return self.wide[index]

    def _block(self, block: Block) -> list[Group]:
        outer = self.same, self.wide, self.whole, self.spread
        self.same, self.wide, self.whole, self.spread = {}, {}, {}, {}
        groups = super()._block(block)
        self.same, self.wide, self.whole, self.spread = outer
        return groups

    def _slices(self, op: Operation, values: list[Value]) -> list[Group]:
        groups = []
        for value in values:
            if str(value.dtype) == "float32" and value.stored is None:
                source = self.near[value.index]
                groups.append(Group(source, (self.own(value, op),)))
        return groups

    def _enters(self, value: Value, op: Operation, groups: list[Group]) -> tuple[int, ...]:
        """A stack in low precision is widened as a whole, before the loop."""
        source = self.near[value.index]
        if str(value.dtype) not in ("bfloat16", "float16") or value.stored is not None:
            return source
        b = self.buffer(value, op, DOUBLE)
        groups.append(Group(source, (b,)))
        return (b,)

    def _loop(self, groups: list[Group], reads: list[int], writes: list[int], stacks: list[int], inside: list[Group],
              places: tuple[int, ...]) -> None:
        for b in stacks:  # zeros, which are ready when the program starts
            groups.append(Group((), (b,)))
        groups.append(Group(reads, writes, inside, places, stacks))
