"""A function laid out on a mesh: its jaxpr run again, with constraints on what it
computes; the function is not touched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lepton_jax.compat import at_source, scan_counts
from lepton_jax.planner.program.graph import BARRIER, Region, Graph, Operation, Value
from lepton_jax.planner.program.layout import (
    Contraction,
    Decision,
    Layout,
    Spec,
    contraction,
)
from lepton_jax.planner.program.rules import ELEMENTWISE, SOURCES
from lepton_jax.step.training_loss import argument_paths

# what XLA's own propagation never gets wrong needs no constraint
FOLLOWING = {
    *ELEMENTWISE,
    *SOURCES,
    "broadcast_in_dim",
    "transpose",
    "squeeze",
    "expand_dims",
}


def laid_out(
    function: Callable,
    layout: Callable[[Graph, list[str]], Layout],
    mesh: Mesh,
    names: tuple[str, ...],
    gradients: bool = False,
) -> Callable:
    """`function` with its values constrained to a layout.

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
        results = Evaluation(layout(graph, argument_paths(names, args)), mesh).program(
            jax.tree.leaves(args)
        )
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return constrained


class Evaluation:
    """Runs a graph under a layout."""

    def __init__(self, layout: Layout, mesh: Mesh):
        self.layout = layout
        self.mesh = mesh
        self._gathered: dict[tuple[int, Spec], Any] = {}

    def program(self, leaves: list[Any]) -> list[Any]:
        block = self.layout.graph.main
        return self._block(
            block,
            [
                self._put(x, self.layout.spec(v))
                for x, v in zip(leaves, block.inputs, strict=True)
            ],
        )

    def _put(
        self,
        x: Any,
        spec: Spec,
    ) -> Any:
        if not spec:
            return x
        return jax.lax.with_sharding_constraint(
            x, NamedSharding(self.mesh, partition(spec, self.mesh.axis_names))
        )

    def _block(
        self,
        block: Region,
        args: list[Any],
    ) -> list[Any]:
        env: dict[int, Any] = {}
        for value, x in [
            *zip(block.inputs, args, strict=True),
            *zip(block.constants, block.consts, strict=True),
        ]:
            env[value.index] = x
        for op in block.operations:
            literals = (
                [getattr(v, "val", None) for v in op.eqn.invars]
                if op.name != BARRIER
                else [None] * len(op.inputs)
            )
            inputs = [
                x if v is None else env[v.index]
                for x, v in zip(literals, op.inputs, strict=True)
            ]
            with at_source(op.eqn, op.callers):
                outputs = self._operation(op, inputs)
            env.update((v.index, x) for v, x in zip(op.outputs, outputs, strict=True))
        return [env[v.index] if isinstance(v, Value) else v.val for v in block.results]

    def _operation(
        self,
        op: Operation,
        inputs: list[Any],
    ) -> list[Any]:
        if op.name == BARRIER:
            return list(jax.lax.optimization_barrier(tuple(inputs)))
        if op.name == "scan":
            return self._scan(op, inputs)
        if op.name == "while":
            return self._while(op, inputs)
        if op.name == "cond":
            return self._cond(op, inputs)
        product = contraction(op)
        decision = self.layout.decide(op, product)
        for i, spec in decision.inputs.items():
            value = op.inputs[i]
            assert value is not None
            if value.stored is not None and self.layout.spec(value) != spec:
                inputs[i] = self._gather(value, inputs[i], spec)
            # from where it lies: else XLA would carry what this operation wants back
            # into what made it
            else:
                inputs[i] = self._put(
                    self._put(inputs[i], self.layout.spec(value)), spec
                )
        grouped = product is not None and product.groups > 1
        out = (
            [self._grouped(op, product, inputs, decision)]  # type: ignore[arg-type]
            if grouped
            else _bind(op.eqn, inputs)
        )
        if op.name in FOLLOWING and not decision.inputs:
            return out
        if op.known and op.whole and product is None:
            # else XLA splits what needs all of a dim along that dim, and e.g. a pad
            # between elements comes out wrong
            out = [
                (
                    self._put(x, made)
                    if (made := self.layout.result(op, v)) != self.layout.spec(v)
                    else x
                )
                for x, v in zip(out, op.outputs, strict=True)
            ]
        if decision.natural is not None and not _summed(
            op,
            product,
            decision.natural,
            self.layout.spec(op.outputs[0]),
        ):
            out[0] = self._put(out[0], decision.natural)
        return [
            self._put(x, self.layout.spec(v)) if hasattr(x, "shape") and op.known else x
            for x, v in zip(out, op.outputs, strict=True)
        ]

    def _gather(
        self,
        value: Value,
        x: Any,
        spec: Spec,
    ) -> Any:
        """A stored value as it is used, gathered once a block; but not kept from the
        forward pass to the backward pass.
        """
        done = self._gathered.get((value.index, spec))
        if done is not None and value.index not in self.layout.graph.lasting:
            return done
        gathered = self._put(
            x if done is None else jax.lax.optimization_barrier(x), spec
        )
        self._gathered[value.index, spec] = gathered
        return gathered

    def _grouped(
        self,
        op: Operation,
        product: Contraction,
        inputs: list[Any],
        decision: Decision,
    ) -> Any:
        """A grouped convolution on each device's part: of most, XLA's partitioner (jax
        0.10, 0.12) gathers all operands.
        """
        left, right = (
            decision.inputs.get(i, self.layout.spec(op.inputs[i]))  # type: ignore[arg-type]
            for i in (0, 1)
        )
        out = decision.natural or self.layout.spec(op.outputs[0])
        if not any((*left, *right, *out)):
            return _bind(op.eqn, inputs)[0]
        group = product.indices[0]
        summed = [index for index in product.indices if index.out is None]
        sums = 0
        for index in summed:
            sums |= left[index.left]  # type: ignore[index]
        split = self.layout.counts[left[group.left]]  # type: ignore[index]
        counted = {
            k: n // split if n > 1 else n
            for k, n in op.params.items()
            if k.endswith("_group_count")
        }
        names = self.mesh.axis_names

        def local(x: Any, kernel: Any) -> Any:
            y = op.eqn.primitive.bind(
                x,
                kernel,
                **{**op.eqn.primitive.get_bind_params(op.eqn.params), **counted},
            )
            return (
                jax.lax.psum(y, tuple(n for i, n in enumerate(names) if sums >> i & 1))
                if sums
                else y
            )

        specs = [partition(spec, names) for spec in (left, right, out)]
        return jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=tuple(specs[:2]),
            out_specs=specs[2],
            check_vma=False,
        )(*inputs)

    def _scan(
        self,
        op: Operation,
        inputs: list[Any],
    ) -> list[Any]:
        consts, carried = scan_counts(op.eqn)
        head = inputs[:consts]
        carry = inputs[consts : consts + carried]
        for i, value in enumerate(op.inputs[consts + carried :], consts + carried):
            spec = () if value is None else self.layout.spec(value)
            if spec and spec[0]:  # a loop over samples: gathered once, not at each step
                inputs[i] = self._put(inputs[i], (0, *spec[1:]))
        xs = inputs[consts + carried :]
        block = op.regions[0]
        specs = [self.layout.spec(v) for v in block.inputs]

        def body(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
            args = [
                x if x is None else self._put(x, s)
                for x, s in zip([*head, *carry, *xs], specs, strict=True)
            ]
            results = self._block(block, args)
            results = [
                self._put(x, self.layout.spec(v)) if isinstance(v, Value) else x
                for x, v in zip(results, block.results, strict=True)
            ]
            return results[:carried], results[carried:]

        p = op.params
        carry, ys = jax.lax.scan(
            body,
            carry,
            xs,
            length=p["length"],
            reverse=p["reverse"],
            unroll=p["unroll"],
        )
        return [
            self._put(x, self.layout.spec(v))
            for x, v in zip([*carry, *ys], op.outputs, strict=True)
        ]

    def _while(
        self,
        op: Operation,
        inputs: list[Any],
    ) -> list[Any]:
        nc = op.params["cond_nconsts"]
        nb = op.params["body_nconsts"]
        cond, body = op.regions
        return jax.lax.while_loop(
            lambda c: self._block(cond, [*inputs[:nc], *c])[0],
            lambda c: self._block(body, [*inputs[nc : nc + nb], *c]),
            inputs[nc + nb :],
        )

    def _cond(
        self,
        op: Operation,
        inputs: list[Any],
    ) -> list[Any]:
        branches = [lambda *args, b=b: self._block(b, list(args)) for b in op.regions]
        return jax.lax.switch(
            inputs[0],
            branches,
            *inputs[1:],
        )


def partition(spec: Spec, names: tuple[str, ...]) -> PartitionSpec:
    return PartitionSpec(
        *(
            tuple(n for i, n in enumerate(names) if mask >> i & 1) or None
            for mask in spec
        )
    )


def _summed(
    op: Operation,
    product: Contraction | None,
    natural: Spec,
    spec: Spec,
) -> bool:
    """Whether a result differs from what is wanted only by sums that are still to be
    scattered.
    """
    if product is None:
        return False
    # XLA (jax 0.10, 0.12) looks up wrong rows where such a dim is split already
    if op.name == "gather":
        return all(n in (0, s) for n, s in zip(natural, spec, strict=True))
    return all(n & ~s == 0 for n, s in zip(natural, spec, strict=True))


def _bind(eqn: Any, inputs: list[Any]) -> list[Any]:
    out = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]
