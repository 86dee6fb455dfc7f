"""A jaxpr as a graph of operations on values, calls inlined; and its dims joined into
named axes.

A *named axis* is a class of dims that are the same thing all over a program: the batch,
the heads, the vocabulary. They are found by union-find: each operation says which dims
of its operands and results are one (`rules`). Cf. the named dims of TOAST (Alabed et
al. 2025, arXiv 2508.15010).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from lepton_jax.compat import ClosedJaxpr, Jaxpr, Literal, scan_counts
from lepton_jax.planner.program.rules import ELEMENTWISE, RULES, unknown

# inlined: what they compute is what their jaxpr says
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
}
BARRIER = "optimization_barrier"
POSITIONAL = {
    *ELEMENTWISE,
    "iota",
    "broadcast_in_dim",
    "reshape",
    "transpose",
    "squeeze",
    "expand_dims",
} - {BARRIER}
WORTH_SINKING = 2**16  # elements


class Value:
    """An array of the program: shape, dtype, and a node of the union-find for each dim.

    Attributes:
      stored: (parameter's index, its dim behind each dim) of a value that is a
        parameter or a parameter's gradient as the state keeps it: only cast, transposed
        or sliced by a loop since or before.
    """

    __slots__ = ("dtype", "index", "nodes", "shape", "stored")

    def __init__(
        self,
        index: int,
        shape: tuple[int, ...],
        dtype: Any,
        nodes: tuple[int, ...],
    ):
        self.index = index
        self.shape = shape
        self.dtype = dtype
        self.nodes = nodes
        self.stored: tuple[int, tuple[int, ...]] | None = None


class Operation:
    """One equation.

    Attributes:
      eqn: the jaxpr's equation.
      name: of its primitive.
      inputs: values; None for literals.
      outputs: values.
      blocks: of a loop or a branch: the bodies.
      callers: equations of the calls around it, outermost first.
      times: how often a step runs it.
      whole: (input, dim) pairs of which each device needs all.
      reduced: (input, dim) pairs that are summed (or otherwise reduced) over.
      known: whether there is a rule for the primitive.
    """

    __slots__ = (
        "blocks",
        "callers",
        "eqn",
        "inputs",
        "known",
        "name",
        "outputs",
        "reduced",
        "times",
        "whole",
    )

    def __init__(
        self,
        eqn: Any,
        inputs: list[Value | None],
        outputs: list[Value],
        callers: tuple,
        times: int,
    ):
        self.eqn = eqn
        self.name = eqn.primitive.name
        self.inputs = inputs
        self.outputs = outputs
        self.callers = callers
        self.times = times
        self.blocks: tuple[Block, ...] = ()
        self.whole: list[tuple[int, int]] = []
        self.reduced: list[tuple[int, int]] = []
        self.known = True

    @property
    def params(self) -> dict[str, Any]:
        return self.eqn.params


class Block:
    """Operations in their order; `results` are values, or literals as they are."""

    __slots__ = ("constants", "consts", "inputs", "operations", "results")

    def __init__(
        self,
        inputs: list[Value],
        constants: list[Value],
        consts: list[Any],
    ):
        self.inputs = inputs
        self.constants = constants
        self.consts = consts
        self.operations: list[Operation] = []
        self.results: list[Any] = []


class Graph:
    """A program's operations and the named axes among its dims.

    Args:
      program: a closed jaxpr. Its first inputs and its first results may be told to be
        parameters and their gradients:
      parameters: how many inputs are parameters.
      gradients: how many results, the first ones, are their gradients.

    Attributes:
      block: the operations.
      values: all values, by index.
      unknown: primitive name to count, of those without a rule.
      pieces: node of a grouped convolution's channels to the number of groups, none of
        which can be split.
      stepping: loops with the numbers of the inputs that they take slices of.
      lasting: indices of the stored values that live from the forward pass to the
        backward pass.
    """

    def __init__(
        self,
        program: ClosedJaxpr,
        parameters: int = 0,
        gradients: int = 0,
    ):
        self.values: list[Value] = []
        self.parents: list[int] = []
        self.loops: set[int] = set()  # nodes along which a loop steps
        self.stepping: list[tuple[Operation, int]] = []  # loops, and inputs of theirs
        self.unknown: dict[str, int] = {}
        self.pieces: dict[int, int] = {}
        # values that only positions decide; None: a scalar constant
        self._free: dict[int, Operation | None] = {}
        self._consts: dict[int, Any] = {}
        self.block = self._block(
            program.jaxpr,
            list(program.consts),
            (),
            1,
        )
        _prune(self.block)
        for index, value in enumerate(self.block.inputs[:parameters]):
            value.stored = (index, tuple(range(len(value.shape))))
        _spread_stored(self.block)
        for index, value in enumerate(self.block.results[:gradients]):
            if isinstance(value, Value) and value.stored is None:
                value.stored = (index, tuple(range(len(value.shape))))
                self.join_all(value, self.block.inputs[index])
        _spread_gradients(self.block)
        held = {
            v.index
            for op in self.block.operations
            if op.name == BARRIER
            for v in op.outputs
        }
        straight = [
            *self.block.inputs,
            *(v for op in self.block.operations for v in op.outputs),
        ]
        self.lasting = {
            v.index for v in straight if v.stored is not None and v.index not in held
        }

    # ---- union-find ----

    def value(
        self,
        shape: tuple[int, ...],
        dtype: Any,
    ) -> Value:
        first = len(self.parents)
        nodes = tuple(range(first, first + len(shape)))
        self.parents.extend(nodes)
        self.values.append(
            Value(
                len(self.values),
                tuple(shape),
                dtype,
                nodes,
            )
        )
        return self.values[-1]

    def find(self, node: int) -> int:
        parents = self.parents
        while parents[node] != node:
            parents[node] = parents[parents[node]]
            node = parents[node]
        return node

    def join(
        self,
        left: int,
        right: int,
    ) -> None:
        left = self.find(left)
        right = self.find(right)
        if left != right:
            self.parents[max(left, right)] = min(left, right)

    def join_all(
        self,
        left: Value,
        right: Value,
    ) -> None:
        for a, b, m, n in zip(
            left.nodes,
            right.nodes,
            left.shape,
            right.shape,
            strict=True,
        ):
            if m == n:
                self.join(a, b)

    def operations(self) -> Iterator[Operation]:
        """All operations, those inside of loops after the loop."""
        yield from _walk(self.block)

    # ---- building ----

    def _block(
        self,
        jaxpr: Jaxpr,
        consts: list[Any],
        callers: tuple,
        times: int,
    ) -> Block:
        new = lambda var: self.value(
            getattr(var.aval, "shape", ()),
            getattr(
                var.aval,
                "dtype",
                None,
            ),
        )
        block = Block(
            [new(v) for v in jaxpr.invars],
            [new(v) for v in jaxpr.constvars],
            consts,
        )
        env = dict(zip(jaxpr.invars, block.inputs, strict=True)) | dict(
            zip(jaxpr.constvars, block.constants, strict=True)
        )
        self._fill(block, jaxpr, env, callers, times)
        block.results = [v if isinstance(v, Literal) else env[v] for v in jaxpr.outvars]
        return block

    def _fill(
        self,
        block: Block,
        jaxpr: Jaxpr,
        env: dict,
        callers: tuple,
        times: int,
    ) -> None:
        for eqn in jaxpr.eqns:
            name = eqn.primitive.name
            inputs = [None if isinstance(v, Literal) else env[v] for v in eqn.invars]
            if (
                name in CALLS
                and CALLS[name] in eqn.params
                and self._inline(block, eqn, inputs, env, callers, times)
            ):
                continue
            outputs = [
                self.value(getattr(v.aval, "shape", ()), getattr(v.aval, "dtype", None))
                for v in eqn.outvars
            ]
            operation = Operation(eqn, inputs, outputs, callers, times)
            if name == "scan":
                self._scan(operation)
            elif name == "while":
                self._while(operation)
            elif name == "cond":
                self._cond(operation)
            else:
                RULES.get(name, unknown)(self, operation)
                if not operation.known:
                    self.unknown[name] = self.unknown.get(name, 0) + 1
            block.operations.append(operation)
            env.update(
                zip(
                    eqn.outvars,
                    outputs,
                    strict=True,
                )
            )
            if (
                name in POSITIONAL
                and len(outputs) == 1
                and all(v is None or v.index in self._free for v in inputs)
            ):
                self._free[outputs[0].index] = operation

    def _inline(
        self,
        block: Block,
        eqn: Any,
        inputs: list,
        env: dict,
        callers: tuple,
        times: int,
    ) -> bool:
        inner = eqn.params[CALLS[eqn.primitive.name]]
        closed = isinstance(inner, ClosedJaxpr)
        jaxpr, consts = (inner.jaxpr, inner.consts) if closed else (inner, ())
        if len(jaxpr.invars) != len(inputs):
            return False
        if eqn.params.get("differentiated") and eqn.params.get("prevent_cse", True):
            inputs = self._barrier(
                block,
                eqn,
                inputs,
                callers,
                times,
            )

        def constant(aval: Any, const: Any) -> Value:
            value = self.value(aval.shape, aval.dtype)
            block.constants.append(value)
            block.consts.append(const)
            if not aval.shape:
                self._free[value.index] = None
                self._consts[value.index] = const
            return value

        inside: dict[Any, Any] = {}
        for var, outer, value in zip(jaxpr.invars, eqn.invars, inputs, strict=True):
            inside[var] = constant(outer.aval, outer.val) if value is None else value
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            inside[var] = constant(var.aval, const)
        self._fill(
            block,
            jaxpr,
            inside,
            (*callers, eqn),
            times,
        )
        for var, out in zip(eqn.outvars, jaxpr.outvars, strict=True):
            env[var] = (
                constant(out.aval, out.val) if isinstance(out, Literal) else inside[out]
            )
        return True

    def _barrier(
        self,
        block: Block,
        eqn: Any,
        inputs: list,
        callers: tuple,
        times: int,
    ) -> list:
        """Copies of the inputs that hold back what is computed from them: how JAX
        lowers rematerialization.
        """
        held = [v for v in inputs if v is not None]
        operation = Operation(
            eqn,
            held,
            [self.value(v.shape, v.dtype) for v in held],
            callers,
            times,
        )
        operation.name = BARRIER
        RULES[BARRIER](self, operation)
        block.operations.append(operation)
        copies = iter(operation.outputs)
        return [None if v is None else next(copies) for v in inputs]

    def _scan(self, operation: Operation) -> None:
        p = operation.params
        ins = operation.inputs
        outs = operation.outputs
        consts, carried = scan_counts(operation.eqn)
        body = self._block(
            p["jaxpr"].jaxpr,
            list(p["jaxpr"].consts),
            (),
            operation.times * p["length"],
        )
        operation.blocks = (body,)
        for index in range(consts):
            self._sink(operation, index, body)
        for index, (outer, inner) in enumerate(zip(ins, body.inputs, strict=True)):
            if outer is None:
                continue
            if index < consts + carried:
                self.join_all(outer, inner)
            else:
                self._stacked(outer, inner)
                self.stepping.append((operation, index))
        for index, (outer, inner) in enumerate(zip(outs, body.results, strict=True)):
            if index < carried:
                self.join_all(outer, body.inputs[consts + index])
                if isinstance(inner, Value):
                    self.join_all(outer, inner)
            elif isinstance(inner, Value):
                self._stacked(outer, inner)

    def _sink(
        self,
        operation: Operation,
        index: int,
        body: Block,
    ) -> None:
        """Make a loop's constant, such as a mask, in the body, if nothing but positions
        goes into it.

        JAX moves such constants out of loops that it differentiates, and they would lie
        in memory, broadcast to full size.
        """
        outer = operation.inputs[index]
        if (
            outer is None
            or math.prod(outer.shape) < WORTH_SINKING
            or outer.index not in self._free
        ):
            return
        chain: dict[int, Operation] = {}
        pending = [outer.index]
        while pending:
            made = self._free[pending.pop()]
            if made is not None and made.outputs[0].index not in chain:
                chain[made.outputs[0].index] = made
                pending += [v.index for v in made.inputs if v is not None]
        inside: dict[int, Value] = {outer.index: body.inputs[index]}

        def inner(value: Value) -> Value:
            if value.index not in inside:
                inside[value.index] = self.value(value.shape, value.dtype)
                if self._free[value.index] is None:
                    body.constants.append(inside[value.index])
                    body.consts.append(self._consts[value.index])
            return inside[value.index]

        clones = []
        for op in sorted(chain.values(), key=lambda op: op.outputs[0].index):
            clone = Operation(
                op.eqn,
                [None if v is None else inner(v) for v in op.inputs],
                [inner(op.outputs[0])],
                op.callers,
                operation.times * operation.params["length"],
            )
            RULES[op.name](self, clone)
            clones.append(clone)
        body.operations[:0] = clones
        operation.inputs[index] = None

    def _stacked(
        self,
        outer: Value,
        inner: Value,
    ) -> None:
        self.loops.add(outer.nodes[0])
        for a, b in zip(outer.nodes[1:], inner.nodes, strict=True):
            self.join(a, b)

    def _while(self, operation: Operation) -> None:
        p = operation.params
        ins = operation.inputs
        outs = operation.outputs
        cond = self._block(
            p["cond_jaxpr"].jaxpr,
            list(p["cond_jaxpr"].consts),
            (),
            operation.times,
        )
        body = self._block(
            p["body_jaxpr"].jaxpr,
            list(p["body_jaxpr"].consts),
            (),
            operation.times,
        )
        operation.blocks = (cond, body)
        nc = p["cond_nconsts"]
        nb = p["body_nconsts"]
        pairs = [
            *zip(ins[:nc], cond.inputs[:nc], strict=True),
            *zip(ins[nc : nc + nb], body.inputs[:nb], strict=True),
        ]
        pairs += [
            *zip(ins[nc + nb :], cond.inputs[nc:], strict=True),
            *zip(ins[nc + nb :], body.inputs[nb:], strict=True),
        ]
        pairs += [
            *zip(outs, body.inputs[nb:], strict=True),
            *zip(outs, body.results, strict=True),
        ]
        for a, b in pairs:
            if isinstance(a, Value) and isinstance(b, Value):
                self.join_all(a, b)

    def _cond(self, operation: Operation) -> None:
        branches = operation.params["branches"]
        operation.blocks = tuple(
            self._block(b.jaxpr, list(b.consts), (), operation.times) for b in branches
        )
        for block in operation.blocks:
            for a, b in [
                *zip(operation.inputs[1:], block.inputs, strict=True),
                *zip(operation.outputs, block.results, strict=True),
            ]:
                if isinstance(a, Value) and isinstance(b, Value):
                    self.join_all(a, b)


def _prune(block: Block) -> None:
    """Drop what nothing needs."""
    needed = {v.index for v in block.results if isinstance(v, Value)}
    kept = []
    for operation in reversed(block.operations):
        if operation.eqn.effects or any(v.index in needed for v in operation.outputs):
            kept.append(operation)
            needed.update(v.index for v in operation.inputs if v is not None)
            for inner in operation.blocks:
                _prune(inner)
    block.operations = kept[::-1]


def _walk(block: Block) -> Iterator[Operation]:
    for operation in block.operations:
        yield operation
        for inner in operation.blocks:
            yield from _walk(inner)


# ---- what is stored: parameters on their way in, gradients on their way out ----

KEEPING = {
    "convert_element_type",
    "copy",
    "neg",
    "name",
    "optimization_barrier",
    "reduce_precision",
    "transpose",
    "stop_gradient",
    "copy_p",
}


def _through(
    operation: Operation, stored: tuple[int, tuple[int, ...]]
) -> tuple[int, tuple[int, ...]]:
    if operation.name != "transpose":
        return stored
    return stored[0], tuple(stored[1][d] for d in operation.params["permutation"])


def _entering(operation: Operation) -> Iterator[tuple[Any, Value, bool]]:
    """(value outside, value inside, whether the loop takes slices of it) of what enters
    the blocks.
    """
    if operation.name == "scan":
        head, carried = scan_counts(operation.eqn)
        first = head + carried
        for index, (outer, inner) in enumerate(
            zip(
                operation.inputs,
                operation.blocks[0].inputs,
                strict=True,
            )
        ):
            if index < head or index >= first:
                yield outer, inner, index >= first
    elif operation.name == "cond":
        for block in operation.blocks:
            for outer, inner in zip(operation.inputs[1:], block.inputs, strict=True):
                yield outer, inner, False


def _spread_stored(block: Block) -> None:
    for operation in block.operations:
        if operation.name in KEEPING:
            for source, target in zip(
                operation.inputs, operation.outputs, strict=False
            ):
                if (
                    source is not None
                    and source.stored is not None
                    and target.stored is None
                ):
                    target.stored = _through(operation, source.stored)
        for outer, inner, sliced in _entering(operation):
            if outer is not None and outer.stored is not None:
                inner.stored = (
                    (outer.stored[0], outer.stored[1][1:]) if sliced else outer.stored
                )
        for inside in operation.blocks:
            _spread_stored(inside)


def _spread_gradients(block: Block) -> None:
    """From the gradients back to the operations that make them, through casts,
    transposes, sums and loops.
    """
    for operation in reversed(block.operations):
        for index, target in enumerate(operation.outputs):
            if target.stored is None:
                continue
            if operation.name in KEEPING:
                source = operation.inputs[min(index, len(operation.inputs) - 1)]
                if source is not None and source.stored is None:
                    back = target.stored[1]
                    if operation.name == "transpose":
                        order = operation.params["permutation"]
                        back = tuple(
                            target.stored[1][order.index(d)] for d in range(len(order))
                        )
                    source.stored = (target.stored[0], back)
            elif operation.name == "add_any":
                for source in operation.inputs:
                    if (
                        source is not None
                        and source.stored is None
                        and source.shape == target.shape
                    ):
                        source.stored = target.stored
            elif operation.name == "scan":
                _into_blocks(operation, index, target)
        for inside in operation.blocks:
            _spread_gradients(inside)


def _into_blocks(
    operation: Operation,
    index: int,
    target: Value,
) -> None:
    assert target.stored is not None
    inside = operation.blocks[0].results[index]
    consts, carried = scan_counts(operation.eqn)
    stacked = index >= carried
    stored = (target.stored[0], target.stored[1][1:]) if stacked else target.stored
    if isinstance(inside, Value) and inside.stored is None:
        inside.stored = stored
    if not stacked:  # a sum over the loop
        slot = consts + index
        for value in (operation.inputs[slot], operation.blocks[0].inputs[slot]):
            if value is not None and value.stored is None:
                value.stored = stored
