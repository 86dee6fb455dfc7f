"""The graph of a jaxpr, calls inlined, and the named axes among its dims.

A *named axis* is a class of dims that are the same thing all over a program, such as
the batch, the heads or the vocabulary. Union-find builds these classes: the rule of
each primitive says which dims of its operands and results are one (see `rules`). Cf.
the named dims of TOAST (Alabed et al. 2025, arXiv 2508.15010).

The program of a two-layer MLP has three operations:

    >>> import jax, jax.numpy as jnp
    >>> def mlp(w1, w2, x):
    ...     return jnp.tanh(x @ w1) @ w2
    >>> shapes = [(4, 16), (16, 3), (8, 4)]
    >>> arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    >>> graph = Graph(jax.make_jaxpr(mlp)(*arguments))
    >>> [operation.name for operation in graph.operations()]
    ['dot_general', 'tanh', 'dot_general']

At first each dim is a node of its own: 0 and 1 in `w1`, 2 and 3 in `w2`, 4 and 5 in
`x`, and so on. The first product joins 5 with 0, since it sums over both, and the dims
of its result with 4 and 1; the second one joins 2 with 1. The roots of the nodes are
then the same wherever dims are the same thing:

    >>> for value in graph.values:
    ...     print(value.shape, [graph.find(node) for node in value.nodes])
    (4, 16) [0, 1]
    (16, 3) [1, 3]
    (8, 4) [4, 0]
    (8, 16) [4, 1]
    (8, 16) [4, 1]
    (8, 3) [4, 3]

These are four named axes: 0 is the features, 1 the hidden units, 3 the classes and 4
the batch. Splitting axis 1 over devices splits both kernels and the activations
between them, which is tensor parallelism; splitting axis 4 is data parallelism.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lepton_jax.compat import ClosedJaxpr, Jaxpr, Literal, on_host, scan_counts
from lepton_jax.planner.program.rules import ELEMENTWISE, RULES, unknown
from lepton_jax.planner.program.staged import IN_PART, Samples, behind
from lepton_jax.planner.rewrite.eight_bits import GRADIENT
from lepton_jax.planner.rewrite.stage_moves import LAYERS, LAYERS_BACK

# Calls are inlined: primitive name to the parameter that holds the jaxpr of the call.
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

# Primitives whose result depends on positions alone if all of their operands do.
POSITIONAL = {
    *ELEMENTWISE,
    "iota",
    "broadcast_in_dim",
    "reshape",
    "transpose",
    "squeeze",
    "expand_dims",
} - {BARRIER}

# Primitives whose result is a parameter as the state keeps it if their operand is.
KEEPING = {
    "convert_element_type",
    "copy",
    "neg",
    "layout_constraint",
    "name",
    "optimization_barrier",
    "reduce_precision",
    "transpose",
    "stop_gradient",
    "copy_p",
    LAYERS,
    LAYERS_BACK,
}

# What is between the sums of a product of 8 bits and its result.
SCALING = {"name", "mul", "convert_element_type"}

# Elements from which on a loop's constant is computed in the loop (see `_sink`).
# Assumption: below, a copy in memory costs less than computing it at each step.
WORTH_SINKING = 2**16

# (number of a parameter, the parameter's dim behind each dim of the value, or IN_PART)
Stored = tuple[int, tuple[int, ...]]


class Value:
    """An array of the program: shape, dtype, and a node of the union-find for each dim.

    Attributes:
      index: its number in `Graph.values`.
      shape, dtype: as in the jaxpr.
      nodes: the node of each dim.
      on_host: whether it lies in the host's memory.
      stored: set where the value is a parameter, or a parameter's gradient, as the
        state keeps it: only cast, transposed or sliced by a loop since or before.
    """

    __slots__ = ("dtype", "index", "nodes", "on_host", "shape", "stored")

    def __init__(
        self,
        index: int,
        shape: tuple[int, ...],
        dtype: Any,
        nodes: tuple[int, ...],
    ):
        """Make a value that is not stored."""
        self.index = index
        self.shape = shape
        self.dtype = dtype
        self.nodes = nodes
        self.on_host = False
        self.stored: Stored | None = None


class Operation:
    """One equation of the program.

    Attributes:
      eqn: the jaxpr's equation.
      name: the name of its primitive.
      inputs: values; None for literals.
      outputs: values.
      regions: the bodies of a loop, or the branches of a conditional.
      callers: equations of the calls around it, outermost first.
      times: the number of times that a step runs it.
      whole: (input, dim) pairs of which each device needs all.
      reduced: (input, dim) pairs that are summed (or otherwise reduced) over.
      known: whether there is a rule for the primitive.
    """

    __slots__ = (
        "callers",
        "eqn",
        "inputs",
        "known",
        "name",
        "outputs",
        "reduced",
        "regions",
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
        """Make an operation to which no rule has been applied yet."""
        self.eqn = eqn
        self.name = eqn.primitive.name
        self.inputs = inputs
        self.outputs = outputs
        self.callers = callers
        self.times = times
        self.regions: tuple[Region, ...] = ()
        self.whole: list[tuple[int, int]] = []
        self.reduced: list[tuple[int, int]] = []
        self.known = True

    @property
    def params(self) -> dict[str, Any]:
        """The parameters of the jaxpr's equation."""
        return self.eqn.params


class Region:
    """The part of a graph that comes from one jaxpr: the program, a loop's body, ...

    Attributes:
      inputs: the values that the jaxpr takes.
      constants: values that it holds itself.
      consts: the array or number of each of the constants.
      operations: in the order in which they run.
      results: values, or literals as they are.
    """

    __slots__ = ("constants", "consts", "inputs", "operations", "results")

    def __init__(
        self,
        inputs: list[Value],
        constants: list[Value],
        consts: list[Any],
    ):
        """Make a region without operations."""
        self.inputs = inputs
        self.constants = constants
        self.consts = consts
        self.operations: list[Operation] = []
        self.results: list[Any] = []


@dataclass(frozen=True)
class _Scope:
    """The place of a jaxpr's equations while the graph is built.

    Attributes:
      region: where its operations go.
      values: the value of each variable of the jaxpr.
      callers, times: as in `Operation`.
    """

    region: Region
    values: dict[Any, Value]
    callers: tuple
    times: int


class Graph:
    """A program's operations and the named axes among its dims.

    Args:
      program: a closed jaxpr, whose first inputs may be parameters and whose first
        results may be their gradients.
      parameters: the number of inputs that are parameters.
      gradients: the number of results that are gradients.
      whole: for embeddings of which the program takes some rows only: number of the
        parameter to the rows of the whole.

    Attributes:
      main: the region of the program itself; other regions are in its operations.
      values: all values, by index.
      parents: the parent of each node of the union-find.
      loops: nodes along which a loop steps.
      stepping: loops with the numbers of the inputs of which they take slices.
      unknown: primitive name to count, for the primitives without a rule.
      pieces: node of a grouped convolution's channels to the number of groups, none of
        which can be split.
      samples: the samples of a batch and of a pipeline's micro-batch, if there is one.
      lasting: indices of the stored values that live from the forward pass to the
        backward pass.
    """

    def __init__(
        self,
        program: ClosedJaxpr,
        parameters: int = 0,
        gradients: int = 0,
        whole: Mapping[int, int] | None = None,
    ):
        """Build the graph."""
        self.whole = dict(whole or {})
        self.values: list[Value] = []
        self.parents: list[int] = []
        self.loops: set[int] = set()
        self.stepping: list[tuple[Operation, int]] = []
        self.unknown: dict[str, int] = {}
        self.pieces: dict[int, int] = {}
        self.samples: Samples | None = None

        # values that only positions decide, with what computes them; None for constants
        self._positional: dict[int, Operation | None] = {}
        self._scalars: dict[int, Any] = {}

        self.main = self._region(program, 1)
        _prune(self.main)
        self._mark_stored(parameters, gradients)
        self.lasting = self._stored_outside_barriers()

    def operations(self) -> Iterator[Operation]:
        """Iterate over all operations, those of a loop's body after the loop."""
        return _walk(self.main)

    # ---- union-find ----

    def find(self, node: int) -> int:
        """Return the root of a node, which stands for its named axis."""
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
        """Make the named axes of two nodes one; the smaller root stays."""
        left = self.find(left)
        right = self.find(right)
        if left != right:
            self.parents[max(left, right)] = min(left, right)

    def join_all(
        self,
        left: Value,
        right: Value,
    ) -> None:
        """Join the dims of two values of one rank where their extents are equal."""
        dims = zip(
            left.nodes,
            right.nodes,
            left.shape,
            right.shape,
            strict=True,
        )
        for a, b, m, n in dims:
            if m == n:
                self.join(a, b)

    # ---- building ----

    def _new_value(
        self,
        shape: tuple[int, ...],
        dtype: Any,
    ) -> Value:
        first = len(self.parents)
        nodes = tuple(range(first, first + len(shape)))
        self.parents.extend(nodes)
        value = Value(
            len(self.values),
            tuple(shape),
            dtype,
            nodes,
        )
        self.values.append(value)
        return value

    def _copy_of(self, value: Value) -> Value:
        """Add a value like another one, with dims of its own."""
        copy = self._new_value(value.shape, value.dtype)
        copy.on_host = value.on_host
        return copy

    def scratch(self, shape: tuple[int, ...], dtype: Any) -> Value:
        """Add an array that an operation needs while it runs."""
        return self._new_value(shape, dtype)

    def _values_of(
        self,
        variables: Any,
    ) -> list[Value]:
        values = []
        for variable in variables:
            aval = variable.aval  # a token has neither shape nor dtype
            shape = getattr(aval, "shape", ())
            dtype = getattr(aval, "dtype", None)
            value = self._new_value(shape, dtype)
            value.on_host = on_host(aval)
            values.append(value)
        return values

    def _region(
        self,
        program: ClosedJaxpr,
        times: int,
    ) -> Region:
        jaxpr = program.jaxpr
        inputs = self._values_of(jaxpr.invars)
        constants = self._values_of(jaxpr.constvars)
        region = Region(inputs, constants, list(program.consts))

        values = dict(zip(jaxpr.invars, inputs, strict=True))
        values.update(zip(jaxpr.constvars, constants, strict=True))
        self._fill(_Scope(region, values, (), times), jaxpr)

        for variable in jaxpr.outvars:
            if isinstance(variable, Literal):
                region.results.append(variable)
            else:
                region.results.append(values[variable])
        return region

    def _fill(
        self,
        scope: _Scope,
        jaxpr: Jaxpr,
    ) -> None:
        """Append the operations of a jaxpr's equations to the scope's region."""
        values = scope.values
        for eqn in jaxpr.eqns:
            inputs = [None if isinstance(v, Literal) else values[v] for v in eqn.invars]
            if self._inline(scope, eqn, inputs):
                continue

            outputs = self._values_of(eqn.outvars)
            operation = Operation(
                eqn,
                inputs,
                outputs,
                scope.callers,
                scope.times,
            )
            self._apply_rule(operation)
            scope.region.operations.append(operation)
            values.update(zip(eqn.outvars, outputs, strict=True))
            self._note_if_positional(operation)

    def _apply_rule(self, operation: Operation) -> None:
        name = operation.name
        if name == "scan":
            self._scan(operation)
        elif name == "while":
            self._while(operation)
        elif name == "cond":
            self._cond(operation)
        else:
            RULES.get(name, unknown)(self, operation)
            if not operation.known:
                label = _label(operation)
                self.unknown[label] = self.unknown.get(label, 0) + 1

    def _note_if_positional(self, operation: Operation) -> None:
        if operation.name not in POSITIONAL or len(operation.outputs) != 1:
            return
        if all(v is None or v.index in self._positional for v in operation.inputs):
            self._positional[operation.outputs[0].index] = operation

    # ---- calls ----

    def _inline(
        self,
        scope: _Scope,
        eqn: Any,
        inputs: list[Value | None],
    ) -> bool:
        """Put the operations of a call into its caller's region.

        Returns:
          Whether the equation is a call that could be inlined.
        """
        called = eqn.params.get(CALLS.get(eqn.primitive.name))
        if called is None:
            return False
        jaxpr, consts = opened(called)
        if len(jaxpr.invars) != len(inputs):
            return False
        if eqn.params.get("differentiated") and eqn.params.get("prevent_cse", True):
            inputs = self._hold_back(scope, eqn, inputs)

        inside = self._operands(scope.region, jaxpr, eqn, inputs)
        pairs = zip(jaxpr.constvars, consts, strict=True)
        for variable, const in pairs:
            inside[variable] = self._constant(
                scope.region,
                variable.aval,
                const,
            )

        callers = (*scope.callers, eqn)
        inner_scope = _Scope(scope.region, inside, callers, scope.times)
        self._fill(inner_scope, jaxpr)

        pairs = zip(eqn.outvars, jaxpr.outvars, strict=True)
        for variable, result in pairs:
            if isinstance(result, Literal):
                value = self._constant(
                    scope.region,
                    result.aval,
                    result.val,
                )
            else:
                value = inside[result]
            scope.values[variable] = value
        return True

    def _operands(
        self,
        region: Region,
        jaxpr: Jaxpr,
        call: Any,
        inputs: list[Value | None],
    ) -> dict[Any, Value]:
        """Map the variables that a called jaxpr takes to the values given to it."""
        operands = {}
        for variable, given, value in zip(
            jaxpr.invars,
            call.invars,
            inputs,
            strict=True,
        ):
            if value is None:
                value = self._constant(region, given.aval, given.val)
            operands[variable] = value
        return operands

    def _constant(
        self,
        region: Region,
        aval: Any,
        const: Any,
    ) -> Value:
        """Add a constant to a region."""
        value = self._new_value(aval.shape, aval.dtype)
        region.constants.append(value)
        region.consts.append(const)
        if not aval.shape:
            self._positional[value.index] = None
            self._scalars[value.index] = const
        return value

    def _hold_back(
        self,
        scope: _Scope,
        eqn: Any,
        inputs: list[Value | None],
    ) -> list[Value | None]:
        """Put a barrier before a call, and return the copies that come out of it.

        JAX lowers rematerialization so: the barrier keeps XLA from computing anything
        of the call before its time.
        """
        given = [value for value in inputs if value is not None]
        copies = [self._copy_of(value) for value in given]
        barrier = Operation(
            eqn,
            [*given],
            copies,
            scope.callers,
            scope.times,
        )
        barrier.name = BARRIER
        RULES[BARRIER](self, barrier)
        scope.region.operations.append(barrier)

        rest = iter(copies)
        return [None if value is None else next(rest) for value in inputs]

    # ---- loops and conditionals ----

    def _scan(self, loop: Operation) -> None:
        consts, carried = scan_counts(loop.eqn)
        sliced = consts + carried
        times = loop.times * loop.params["length"]
        body = self._region(loop.params["jaxpr"], times)
        loop.regions = (body,)
        for index in range(consts):
            self._sink(loop, index, body)

        for index, outer in enumerate(loop.inputs):
            if outer is None:
                continue
            if index < sliced:
                self.join_all(outer, body.inputs[index])
            else:
                self._join_slices(outer, body.inputs[index])
                self.stepping.append((loop, index))

        for index, outer in enumerate(loop.outputs):
            inner = body.results[index]
            if index < carried:
                self.join_all(outer, body.inputs[consts + index])
                self._join_if_values(outer, inner)
            elif isinstance(inner, Value):
                self._join_slices(outer, inner)

    def _join_slices(
        self,
        stacked: Value,
        piece: Value,
    ) -> None:
        """Join an array with the slice of it that a loop takes or makes at a step."""
        self.loops.add(stacked.nodes[0])
        for a, b in zip(stacked.nodes[1:], piece.nodes, strict=True):
            self.join(a, b)

    def _join_if_values(
        self,
        left: Any,
        right: Any,
    ) -> None:
        if isinstance(left, Value) and isinstance(right, Value):
            self.join_all(left, right)

    def _join_lists(
        self,
        outer: Sequence[Any],
        inner: Sequence[Any],
    ) -> None:
        """Join values outside of a loop or branch with those inside, one by one."""
        for left, right in zip(outer, inner, strict=True):
            self._join_if_values(left, right)

    def _while(self, loop: Operation) -> None:
        condition = self._region(loop.params["cond_jaxpr"], loop.times)
        body = self._region(loop.params["body_jaxpr"], loop.times)
        loop.regions = (condition, body)

        # operands: the condition's constants, the body's constants, what is carried
        first = loop.params["cond_nconsts"]
        last = first + loop.params["body_nconsts"]
        condition_constants = loop.inputs[:first]
        body_constants = loop.inputs[first:last]
        carried = loop.inputs[last:]
        self._join_lists([*condition_constants, *carried], condition.inputs)
        self._join_lists([*body_constants, *carried], body.inputs)
        self._join_lists(loop.outputs, body.inputs[last - first :])
        self._join_lists(loop.outputs, body.results)

    def _cond(self, conditional: Operation) -> None:
        branches = conditional.params["branches"]
        regions = [self._region(branch, conditional.times) for branch in branches]
        conditional.regions = tuple(regions)
        for region in regions:
            operands = conditional.inputs[1:]  # the first one chooses the branch
            self._join_lists(operands, region.inputs)
            self._join_lists(conditional.outputs, region.results)

    # ---- constants of loops ----

    def _sink(
        self,
        loop: Operation,
        index: int,
        body: Region,
    ) -> None:
        """Compute a loop's constant in its body, if only positions decide it.

        JAX moves constants such as masks out of loops that it differentiates. There
        they would lie in memory, broadcast to full size.
        """
        constant = loop.inputs[index]
        if constant is None or constant.index not in self._positional:
            return
        if math.prod(constant.shape) < WORTH_SINKING:
            return

        inside: dict[int, Value] = {constant.index: body.inputs[index]}
        times = loop.times * loop.params["length"]
        clones = []
        for op in self._producers(constant):
            inputs = [
                None if v is None else self._copy_into(body, inside, v)
                for v in op.inputs
            ]
            outputs = [self._copy_into(body, inside, v) for v in op.outputs]
            clone = Operation(
                op.eqn,
                inputs,
                outputs,
                op.callers,
                times,
            )
            RULES[op.name](self, clone)
            clones.append(clone)
        body.operations[:0] = clones
        loop.inputs[index] = None

    def _producers(
        self,
        value: Value,
    ) -> list[Operation]:
        """List the operations that compute a value from positions, first to last."""
        producers: dict[int, Operation] = {}
        pending = [value.index]
        while pending:
            producer = self._positional[pending.pop()]
            if producer is None:
                continue
            output = producer.outputs[0].index
            if output not in producers:
                producers[output] = producer
                pending += [v.index for v in producer.inputs if v is not None]
        return [producers[output] for output in sorted(producers)]

    def _copy_into(
        self,
        body: Region,
        inside: dict[int, Value],
        value: Value,
    ) -> Value:
        """Return the copy of an outer value in a loop's body; a new one at first."""
        if value.index not in inside:
            copy = self._copy_of(value)
            inside[value.index] = copy
            if self._positional[value.index] is None:
                body.constants.append(copy)
                body.consts.append(self._scalars[value.index])
        return inside[value.index]

    # ---- parameters and gradients ----

    def _mark_stored(
        self,
        parameters: int,
        gradients: int,
    ) -> None:
        """Set `stored` on parameters and gradients, and on what is only moved of them.

        Parameters are followed on their way in, gradients back on their way out.
        """
        for index, value in enumerate(self.main.inputs[:parameters]):
            value.stored = (index, tuple(range(len(value.shape))))
        _spread_stored(self.main)

        for index, value in enumerate(self.main.results[:gradients]):
            if isinstance(value, Value) and value.stored is None:
                value.stored = (index, tuple(range(len(value.shape))))
                self.join_all(value, self.main.inputs[index])
        _spread_gradients(self.main)

    def _stored_outside_barriers(self) -> set[int]:
        """List the indices of the stored values that do not come out of a barrier."""
        values = list(self.main.inputs)
        for op in self.main.operations:
            if op.name != BARRIER:
                values += op.outputs
        return {value.index for value in values if value.stored is not None}


def _label(operation: Operation) -> str:
    """Return the name of an operation without a rule, with that of its kernel."""
    kernel = operation.params.get("name") or operation.params.get("target_name")
    name = operation.name
    return f"{name} {kernel}" if isinstance(kernel, str) and kernel else name


def opened(
    called: ClosedJaxpr | Jaxpr,
) -> tuple[Jaxpr, list[Any]]:
    """Split the jaxpr of a call into the jaxpr and its constants."""
    if isinstance(called, ClosedJaxpr):
        return called.jaxpr, called.consts
    return called, []


def _prune(region: Region) -> None:
    """Drop the operations whose results nothing needs."""
    needed = {v.index for v in region.results if isinstance(v, Value)}
    used = []
    for operation in reversed(region.operations):
        if operation.eqn.effects or any(v.index in needed for v in operation.outputs):
            used.append(operation)
            needed.update(v.index for v in operation.inputs if v is not None)
            for inner in operation.regions:
                _prune(inner)
    region.operations = used[::-1]


def _walk(region: Region) -> Iterator[Operation]:
    for operation in region.operations:
        yield operation
        for inner in operation.regions:
            yield from _walk(inner)


# ---- stored values: parameters on their way in ----


def _spread_stored(region: Region) -> None:
    for operation in region.operations:
        if operation.name in KEEPING:
            _store_outputs(operation)
        elif operation.name == "slice":
            _store_part(operation)
        for outer, inner, sliced in _entering(operation):
            if outer is not None and outer.stored is not None:
                inner.stored = _slice_of(outer.stored) if sliced else outer.stored
        for inside in operation.regions:
            _spread_stored(inside)


def _store_outputs(operation: Operation) -> None:
    pairs = zip(operation.inputs, operation.outputs, strict=False)
    for source, target in pairs:
        if source is None or source.stored is None or target.stored is not None:
            continue
        index, dims = source.stored
        if operation.name == "transpose":
            dims = tuple(dims[d] for d in operation.params["permutation"])
        elif operation.name == LAYERS:
            index, dims = behind(LAYERS, source.stored)
        target.stored = (index, dims)


def _store_part(operation: Operation) -> None:
    """Set `stored` on some layers of a stack: its rows from one number to another."""
    whole, part = operation.inputs[0], operation.outputs[0]
    if whole is not None and whole.stored is not None and _are_rows(part, whole):
        index, dims = whole.stored
        part.stored = (index, (IN_PART, *dims[1:]))


def _are_rows(part: Value, whole: Value) -> bool:
    """Whether an array differs from another in the extent of its first dim alone."""
    return len(part.shape) > 1 and part.shape[1:] == whole.shape[1:]


def _slice_of(stored: Stored) -> Stored:
    """Drop the leading dim of a stored array, along which a loop steps."""
    index, dims = stored
    return index, dims[1:]


def _entering(
    operation: Operation,
) -> Iterator[tuple[Any, Value, bool]]:
    """Iterate over the values that enter an operation's regions, but for carried ones.

    Yields:
      The value outside, the one inside, and whether a loop takes slices of it.
    """
    if operation.name == "scan":
        consts, carried = scan_counts(operation.eqn)
        body = operation.regions[0]
        pairs = zip(operation.inputs, body.inputs, strict=True)
        for index, (outer, inner) in enumerate(pairs):
            if index < consts:
                yield outer, inner, False
            elif index >= consts + carried:
                yield outer, inner, True
    elif operation.name == "cond":
        for region in operation.regions:
            for outer, inner in zip(operation.inputs[1:], region.inputs, strict=True):
                yield outer, inner, False


# ---- stored values: gradients, followed back to the operations that make them ----


def _spread_gradients(region: Region) -> None:
    scaled: set[int] = set()
    for operation in reversed(region.operations):
        for index, target in enumerate(operation.outputs):
            if target.stored is not None:
                _store_sources(operation, index, target)
                _store_sums(operation, target, scaled)
        for inside in operation.regions:
            _spread_gradients(inside)


def _store_sources(
    operation: Operation,
    index: int,
    target: Value,
) -> None:
    """Set `stored` on what a stored result is cast, transposed or summed from."""
    assert target.stored is not None
    if operation.name in KEEPING:
        source = operation.inputs[min(index, len(operation.inputs) - 1)]
        parameter, dims = target.stored
        if operation.name == "transpose":
            order = operation.params["permutation"]
            dims = tuple(dims[order.index(d)] for d in range(len(order)))
        elif operation.name == LAYERS_BACK:
            parameter, dims = behind(LAYERS_BACK, target.stored)
        _store(source, (parameter, dims))
    elif operation.name == "pad":
        part = operation.inputs[0]
        if part is not None and _are_rows(part, target):
            parameter, dims = target.stored
            _store(part, (parameter, (IN_PART, *dims[1:])))
    elif operation.name == "add_any":
        for source in operation.inputs:
            if source is not None and source.shape == target.shape:
                _store(source, target.stored)
    elif operation.name == "scan":
        _store_in_loop(operation, index, target.stored)


def _store_sums(operation: Operation, target: Value, scaled: set[int]) -> None:
    """Set `stored` on the sums of a product of 8 bits, which are scaled afterwards.

    Args:
      operation: makes a stored value.
      target: the value.
      scaled: indices of values between such sums and the gradient; added to.
    """
    is_gradient = operation.name == "name" and operation.params["name"] == GRADIENT
    if not is_gradient and target.index not in scaled:
        return
    source = operation.inputs[0]
    if source is not None and operation.name in SCALING:
        assert target.stored is not None
        _store(source, target.stored)
        scaled.add(source.index)


def _store_in_loop(
    loop: Operation,
    index: int,
    stored: Stored,
) -> None:
    consts, carried = scan_counts(loop.eqn)
    body = loop.regions[0]
    if index >= carried:  # each step makes a slice of it
        _store(body.results[index], _slice_of(stored))
        return

    # a sum over the loop's steps
    _store(body.results[index], stored)
    _store(loop.inputs[consts + index], stored)
    _store(body.inputs[consts + index], stored)


def _store(value: Any, stored: Stored) -> None:
    if isinstance(value, Value) and value.stored is None:
        value.stored = stored
