"""A function laid out on a mesh, which is not touched itself.

Its jaxpr is run again, operation by operation, with constraints on where the operands
and results lie. XLA's partitioner fills in the collectives.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lepton_jax.compat import at_source, on_host, scan_counts
from lepton_jax.planner.program import around
from lepton_jax.planner.program.graph import BARRIER, Graph, Operation, Region, Value
from lepton_jax.planner.program.kernels import (
    BATCH,
    HEADS,
    KERNELS,
    LENGTH,
)
from lepton_jax.planner.program.layout import (
    Contraction,
    Decision,
    Layout,
    Spec,
    contraction,
)
from lepton_jax.planner.program.ruled import Choice, added_up
from lepton_jax.planner.program.rules import ELEMENTWISE, SOURCES
from lepton_jax.planner.program.staged import attention_spec
from lepton_jax.planner.rewrite import ring
from lepton_jax.planner.rewrite.ring import Ring
from lepton_jax.planner.rewrite.stage_moves import (
    LAYERS,
    LAYERS_BACK,
    ROLL,
    chunks_exchanged,
    rolled_over,
)
from lepton_jax.planner.rewrite.staged_attention import STAGED_KERNELS
from lepton_jax.step.training_loss import argument_paths
from lepton_jax.trees import with_leaves

# the primitives of kernels written with pallas, and of an array's layout in memory
PALLAS = "pallas_call"
LAYOUT = "layout_constraint"

# Primitives whose results XLA's own propagation never gets wrong: they need no
# constraint. Held by tests/planner/test_correctness.py.
FOLLOWING = {
    *ELEMENTWISE,
    *SOURCES,
    "broadcast_in_dim",
    "transpose",
    "squeeze",
    "expand_dims",
} - {LAYOUT}


def laid_out(
    function: Callable,
    layout: Callable[[Graph, list[str]], Layout],
    mesh: Mesh,
    names: tuple[str, ...],
    gradients: bool = False,
) -> Callable:
    """Return a function with its values constrained to a layout.

    Args:
      function: of arrays in pytrees; the first argument holds the parameters.
      layout: the function's graph and the paths of its inputs to their layout.
      mesh: with the layout's axes, in their order.
      names: of the arguments, as in `argument_paths`.
      gradients: whether the first result mirrors the parameters.
    """
    if mesh.size == 1:
        return function

    def constrained(*args: Any) -> Any:
        program, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        count = len(jax.tree.leaves(args[0]))
        graph = Graph(program, count, count if gradients else 0)
        paths = argument_paths(names, args)

        interpreter = _Interpreter(layout(graph, paths), mesh)
        results = interpreter.run(jax.tree.leaves(args))
        return with_leaves(shapes, results)

    return constrained


def partition(
    spec: Spec,
    names: tuple[str, ...],
) -> PartitionSpec:
    """Return a spec as JAX takes it.

    Args:
      spec: a mask of mesh axes for each dim.
      names: of the mesh axes.
    """
    return PartitionSpec(*(_axes(mask, names) or None for mask in spec))


# ---- internals ----


class _Interpreter:
    """Runs a graph under a layout."""

    def __init__(self, layout: Layout, mesh: Mesh):
        self.layout = layout
        self.mesh = mesh
        # stored values as they are used: (value's index, spec) to array
        self._gathered: dict[tuple[int, Spec], Any] = {}

    def run(
        self,
        leaves: list[Any],
    ) -> list[Any]:
        """Run the graph's program on the leaves of its arguments."""
        main = self.layout.graph.main
        pairs = zip(leaves, main.inputs, strict=True)
        args = [self._put_where_it_lies(x, value) for x, value in pairs]
        return self._run_region(main, args)

    def _put(
        self,
        x: Any,
        spec: Spec,
    ) -> Any:
        if not spec or on_host(jax.typeof(x)):
            return x
        sharding = NamedSharding(self.mesh, partition(spec, self.mesh.axis_names))
        return jax.lax.with_sharding_constraint(x, sharding)

    def _put_where_it_lies(
        self,
        x: Any,
        value: Value,
    ) -> Any:
        return self._put(x, self.layout.spec(value))

    def _run_region(
        self,
        region: Region,
        args: list[Any],
    ) -> list[Any]:
        env: dict[int, Any] = {}
        pairs = zip(region.inputs, args, strict=True)
        for value, x in pairs:
            env[value.index] = x
        pairs = zip(region.constants, region.consts, strict=True)
        for value, const in pairs:
            env[value.index] = const

        for op in region.operations:
            operands = _literals(op)
            for number, operand in enumerate(op.inputs):
                if operand is not None:
                    operands[number] = env[operand.index]
            with at_source(op.eqn, op.callers):
                results = self._run_operation(op, operands)
            pairs = zip(op.outputs, results, strict=True)
            for value, x in pairs:
                env[value.index] = x

        results = []
        for result in region.results:
            is_value = isinstance(result, Value)
            results.append(env[result.index] if is_value else result.val)
        return results

    # ---- one operation ----

    def _run_operation(
        self,
        op: Operation,
        operands: list[Any],
    ) -> list[Any]:
        if op.name == BARRIER:
            return list(jax.lax.optimization_barrier(tuple(operands)))
        if op.name == "scan":
            return self._scan(op, operands)
        if op.name == "while":
            return self._while(op, operands)
        if op.name == "cond":
            return self._cond(op, operands)

        product = contraction(op)
        decision = self.layout.decide(op, product)
        operands = self._move_operands(op, operands, decision)
        if op.name in (*KERNELS, *STAGED_KERNELS):
            results = self._kernel(op, operands, decision)
            pairs = zip(results, op.outputs, strict=True)
            return [self._put_where_it_lies(x, value) for x, value in pairs]
        if decision.choice is not None:
            results = self._own(op, operands, decision.choice)
            pairs = zip(results, op.outputs, strict=False)
            placed = [self._put_where_it_lies(x, value) for x, value in pairs]
            # nothing reads the arrays that it needs while it runs
            return [*placed, *(None for _ in op.outputs[len(placed) :])]
        results = self._computed(op, product, operands, decision)
        if op.name in FOLLOWING and not decision.inputs:
            return results
        return self._constrain_results(op, product, decision, results)

    def _computed(
        self,
        op: Operation,
        product: Contraction | None,
        operands: list[Any],
        decision: Decision,
    ) -> list[Any]:
        """Return the results of an operation that XLA divides, or has others divide."""
        if op.name == ROLL:
            return [self._rolled(op, operands[0])]
        if op.name in (LAYERS, LAYERS_BACK):
            return [self._exchanged(op, operands[0])]
        if product is not None and product.groups > 1:
            return [self._grouped(op, product, operands, decision)]
        if op.name == PALLAS:
            return self._on_each_device(op, operands)
        if op.name == LAYOUT:
            return [self._arranged(op, operands[0])]
        return _bind(op.eqn, operands)

    def _move_operands(
        self,
        op: Operation,
        operands: list[Any],
        decision: Decision,
    ) -> list[Any]:
        """Put the operands where the operation wants them."""
        moved = list(operands)
        for number, spec in decision.inputs.items():
            value = op.inputs[number]
            assert value is not None
            x = operands[number]
            lies = self.layout.spec(value)
            if value.stored is not None and lies != spec:
                moved[number] = self._gather(value, x, spec)
            else:
                # Without the first constraint XLA would carry the second one back into
                # the operation that makes the operand.
                for place in (lies, *_between(lies, spec), spec):
                    x = self._put(x, place)
                moved[number] = x
        return moved

    def _constrain_results(
        self,
        op: Operation,
        product: Contraction | None,
        decision: Decision,
        results: list[Any],
    ) -> list[Any]:
        """Put the results first where they come out, then where they are to lie."""
        if op.known and op.whole and product is None:
            results = self._results_of_whole(op, results)
        if decision.natural is not None:
            spec = self.layout.spec(op.outputs[0])
            if not _only_scatters(op, product, decision.natural, spec):
                first = self._put(results[0], decision.natural)
                results = [first, *results[1:]]
        if not op.known:
            return results

        constrained = []
        pairs = zip(results, op.outputs, strict=True)
        for x, value in pairs:
            is_array = hasattr(x, "shape")
            constrained.append(self._put_where_it_lies(x, value) if is_array else x)
        return constrained

    def _results_of_whole(
        self,
        op: Operation,
        results: list[Any],
    ) -> list[Any]:
        """Constrain the results of an operation with whole dims as its inputs lie.

        XLA (jax 0.10, 0.12) would split such an operation along that dim, and e.g. a
        pad between elements comes out wrong then.
        """
        constrained = []
        pairs = zip(results, op.outputs, strict=True)
        for x, value in pairs:
            spec = self.layout.result(op, value)
            if spec != self.layout.spec(value):
                x = self._put(x, spec)
            constrained.append(x)
        return constrained

    def _gather(
        self,
        value: Value,
        x: Any,
        spec: Spec,
    ) -> Any:
        """Gather a stored value as it is used, once in each pass.

        The backward pass gathers again what the forward pass has gathered, so that it
        is not kept between them.
        """
        before = self._gathered.get((value.index, spec))
        if before is not None:
            if value.index not in self.layout.graph.lasting:
                return before
            x = jax.lax.optimization_barrier(x)
        gathered = self._put(x, spec)
        self._gathered[value.index, spec] = gathered
        return gathered

    def _kernel(
        self,
        op: Operation,
        operands: list[Any],
        decision: Decision,
    ) -> list[Any]:
        """Run a kernel on each device's samples, heads and, in a ring, tokens.

        XLA can't divide it.
        """
        specs = []
        for number, value in enumerate(op.inputs):
            assert value is not None
            specs.append(decision.inputs.get(number, self.layout.spec(value)))
        length = 0
        if op.name in KERNELS:
            length = specs[0][LENGTH]
        results = []
        for value in op.outputs:
            if op.name in STAGED_KERNELS:
                spec = attention_spec(specs, value.shape)
            else:
                samples = specs[0][BATCH]
                heads = specs[0][HEADS]
                spec = around.goal(value.shape, samples, heads, length)
            results.append(partition(spec, self.mesh.axis_names))
        run = partial(_bind, op.eqn)
        if length:
            devices = Ring(
                _axes(length, self.mesh.axis_names),
                self.layout.counts[length],
            )
            run = partial(ring.run, op.name, op.params["how"], devices)
        return jax.shard_map(
            lambda *local: run(list(local)),
            mesh=self.mesh,
            in_specs=tuple(partition(s, self.mesh.axis_names) for s in specs),
            out_specs=results,
            check_vma=False,
        )(*operands)

    def _rolled(self, op: Operation, held: Any) -> Any:
        """Hand what each stage holds to the next one, device by device."""
        value = op.inputs[0]
        assert value is not None
        spec = self.layout.spec(value)
        if not spec[0]:
            return _bind(op.eqn, [held])[0]
        local = partial(
            rolled_over,
            by=op.params["by"],
            wraps=op.params["wraps"],
            axes=_axes(spec[0], self.mesh.axis_names),
            devices=self.layout.counts[spec[0]],
        )
        partitioned = partition(spec, self.mesh.axis_names)
        return jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=partitioned,
            out_specs=partitioned,
            check_vma=False,
        )(held)

    def _exchanged(self, op: Operation, layers: Any) -> Any:
        """Bring the layers of each chunk to their stage, or back."""
        value = op.inputs[0]
        assert value is not None
        spec = self.layout.spec(value)
        back = op.name == LAYERS_BACK
        mask = spec[1] if back else spec[0]
        stages = op.params["stages"]
        chunks = op.params["chunks"]
        if chunks == 1 or self.layout.counts[mask] != stages:
            return _bind(op.eqn, [layers])[0]

        def local(kept: Any) -> Any:
            kept = kept[:, 0] if back else kept
            axes = _axes(mask, self.mesh.axis_names)
            moved = chunks_exchanged(kept, chunks, axes, stages, back)
            return moved if back else moved[:, None]

        rest = spec[2:] if back else spec[1:]
        result = (mask, *rest) if back else (0, mask, *rest)
        names = self.mesh.axis_names
        return jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=partition(spec, names),
            out_specs=partition(result, names),
            check_vma=False,
        )(layers)

    def _on_each_device(self, op: Operation, operands: list[Any]) -> list[Any]:
        """Run a kernel without a rule as a whole on each device.

        XLA does not divide kernels, and JAX refuses to compile one for several TPUs
        outside of `shard_map`.
        """
        return jax.shard_map(
            lambda *whole: _bind(op.eqn, list(whole)),
            mesh=self.mesh,
            in_specs=PartitionSpec(),
            out_specs=PartitionSpec(),
            check_vma=False,
        )(*operands)

    def _arranged(self, op: Operation, x: Any) -> Any:
        """Say how each device's part of an array lies in memory.

        XLA would gather the array first (libtpu 0.0.42, without the flags that keep
        gathers: 4 TiB of a mixture's residual stream in a step).
        """
        spec = partition(self.layout.spec(op.outputs[0]), self.mesh.axis_names)
        return jax.shard_map(
            lambda part: _bind(op.eqn, [part])[0],
            mesh=self.mesh,
            in_specs=spec,
            out_specs=spec,
            check_vma=False,
        )(x)

    def _own(
        self,
        op: Operation,
        operands: list[Any],
        choice: Choice,
    ) -> list[Any]:
        """Run an operation with a user's rule on each device's part."""
        names = self.mesh.axis_names
        specs = []
        for number, x in enumerate(operands):
            whole = (0,) * jax.numpy.ndim(x)
            specs.append(partition(choice.inputs.get(number, whole), names))

        def local(*parts: Any) -> list[Any]:
            return added_up(_bind(op.eqn, list(parts)), choice, self.mesh)

        return jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=tuple(specs),
            out_specs=[partition(spec, names) for spec in choice.results],
            check_vma=False,
        )(*operands)

    def _grouped(
        self,
        op: Operation,
        product: Contraction,
        operands: list[Any],
        decision: Decision,
    ) -> Any:
        """Run a grouped convolution on each device's part of it.

        XLA's partitioner (jax 0.10, 0.12) gathers all operands of most of them.
        """
        specs = self._grouped_specs(op, decision)
        if not any(any(spec) for spec in specs):
            return _bind(op.eqn, operands)[0]

        left = specs[0]
        sums = 0
        for index in product.indices:
            if index.out is None:
                assert index.left is not None
                sums |= left[index.left]
        place = product.indices[0].left
        assert place is not None
        local = partial(
            _local_convolution,
            op.eqn,
            self.layout.counts[left[place]],
            _axes(sums, self.mesh.axis_names),
        )
        partitions = [partition(spec, self.mesh.axis_names) for spec in specs]
        return jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=tuple(partitions[:2]),
            out_specs=partitions[2],
            check_vma=False,
        )(*operands)

    def _grouped_specs(
        self,
        op: Operation,
        decision: Decision,
    ) -> list[Spec]:
        """Return the specs in which left, right and result meet."""
        specs = []
        for number in (0, 1):
            value = op.inputs[number]
            assert value is not None
            lies = self.layout.spec(value)
            specs.append(decision.inputs.get(number, lies))
        wanted = self.layout.spec(op.outputs[0])
        specs.append(decision.natural or wanted)
        return specs

    # ---- loops and conditionals ----

    def _scan(
        self,
        op: Operation,
        operands: list[Any],
    ) -> list[Any]:
        consts, carried = scan_counts(op.eqn)
        sliced = consts + carried
        constants = operands[:consts]
        region = op.regions[0]

        def body(
            carry: list[Any],
            slices: list[Any],
        ) -> tuple[list[Any], list[Any]]:
            args = [*constants, *carry, *slices]
            results = self._loop_body(region, args)
            return results[:carried], results[carried:]

        carry, stacked = jax.lax.scan(
            body,
            operands[consts:sliced],
            self._scanned(op, operands, sliced),
            length=op.params["length"],
            reverse=op.params["reverse"],
            unroll=op.params["unroll"],
        )
        pairs = zip(
            [*carry, *stacked],
            op.outputs,
            strict=True,
        )
        return [self._put_where_it_lies(x, value) for x, value in pairs]

    def _loop_body(
        self,
        region: Region,
        args: list[Any],
    ) -> list[Any]:
        for number, value in enumerate(region.inputs):
            if args[number] is not None:
                args[number] = self._put_where_it_lies(args[number], value)
        results = self._run_region(region, args)
        for number, value in enumerate(region.results):
            if isinstance(value, Value):
                results[number] = self._put_where_it_lies(results[number], value)
        return results

    def _scanned(
        self,
        op: Operation,
        operands: list[Any],
        first: int,
    ) -> list[Any]:
        """Return the operands of which a loop takes slices.

        Where the loop steps along a dim that is split, as one over samples does, they
        are gathered once and not at each step.
        """
        scanned = operands[first:]
        for number, value in enumerate(op.inputs[first:]):
            spec = () if value is None else self.layout.spec(value)
            if spec and spec[0]:
                gathered = (0, *spec[1:])
                scanned[number] = self._put(scanned[number], gathered)
        return scanned

    def _while(
        self,
        op: Operation,
        operands: list[Any],
    ) -> list[Any]:
        condition, body = op.regions
        consts = op.params["cond_nconsts"]
        first = consts + op.params["body_nconsts"]
        condition_constants = operands[:consts]
        body_constants = operands[consts:first]

        def goes_on(carry: list[Any]) -> Any:
            return self._run_region(condition, [*condition_constants, *carry])[0]

        def step(
            carry: list[Any],
        ) -> list[Any]:
            return self._run_region(body, [*body_constants, *carry])

        return jax.lax.while_loop(goes_on, step, operands[first:])

    def _cond(
        self,
        op: Operation,
        operands: list[Any],
    ) -> list[Any]:
        def branch(region: Region, *args: Any) -> list[Any]:
            return self._run_region(region, list(args))

        branches = [partial(branch, region) for region in op.regions]
        return jax.lax.switch(
            operands[0],
            branches,
            *operands[1:],
        )


def _between(lies: Spec, wanted: Spec) -> list[Spec]:
    """Return specs on the way, where mesh axes of several dims move to others.

    Each step moves one, outermost first: an all-to-all. XLA (libtpu 0.0.42, the
    gradient of an embedding whose tokens are split by sample and by position) gathers
    the whole array where two move at once.

    >>> _between((0b01, 0b10, 0), (0, 0, 0b11))
    [(0, 2, 1)]
    """
    steps = []
    spec = list(lies)
    moving = [d for d, mask in enumerate(lies) if mask & ~wanted[d]]
    if len(moving) < 2:
        return []
    for axis in range(max((*lies, *wanted), default=0).bit_length()):
        bit = 1 << axis
        sources = [d for d in moving if spec[d] & bit & ~wanted[d]]
        goals = [d for d, mask in enumerate(wanted) if mask & bit & ~spec[d]]
        if len(sources) == len(goals) == 1:
            spec[sources[0]] &= ~bit
            spec[goals[0]] |= bit
            steps.append(tuple(spec))
    return steps[:-1]


def _axes(
    mask: int,
    names: tuple[str, ...],
) -> tuple[str, ...]:
    """Return the names of the mesh axes in a mask."""
    return tuple(name for axis, name in enumerate(names) if mask >> axis & 1)


def _literals(op: Operation) -> list[Any]:
    """Return the value of each operand that is a literal, None for the others."""
    if op.name == BARRIER:  # it may stand for another equation
        return [None] * len(op.inputs)
    return [getattr(variable, "val", None) for variable in op.eqn.invars]


def _local_convolution(
    eqn: Any,
    devices: int,
    summed: tuple[str, ...],
    x: Any,
    kernel: Any,
) -> Any:
    """Run a grouped convolution on a device's part of its operands.

    Args:
      eqn: the convolution of the whole.
      devices: the number of devices among which its groups are divided.
      summed: mesh axes over which the parts of the result are added up.
      x: the part of the left operand.
      kernel: the part of the right operand.
    """
    params = dict(eqn.primitive.get_bind_params(eqn.params))
    for name, count in eqn.params.items():
        if name.endswith("_group_count") and count > 1:
            params[name] = count // devices
    y = eqn.primitive.bind(x, kernel, **params)
    return jax.lax.psum(y, summed) if summed else y


def _only_scatters(
    op: Operation,
    product: Contraction | None,
    natural: Spec,
    spec: Spec,
) -> bool:
    """Whether a result differs from the wanted one only by sums still to be scattered.

    Without a constraint between sum and scatter, XLA can make one reduce-scatter of
    them.
    """
    if product is None:
        return False
    pairs = zip(natural, spec, strict=True)
    if op.name == "gather":
        # XLA (jax 0.10, 0.12) looks up wrong rows where such a dim is split already
        return all(own in (0, wanted) for own, wanted in pairs)
    return all(own & ~wanted == 0 for own, wanted in pairs)


def _bind(
    eqn: Any,
    operands: list[Any],
) -> list[Any]:
    params = eqn.primitive.get_bind_params(eqn.params)
    results = eqn.primitive.bind(*operands, **params)
    return list(results) if eqn.primitive.multiple_results else [results]
