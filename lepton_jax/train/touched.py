"""The rows of embeddings that a batch touches, found before its gradient is taken."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lepton_jax.augment import step_key
from lepton_jax.planner import Plan, Trace
from lepton_jax.step.embeddings import Rows, looked_up, touched
from lepton_jax.step.state import State
from lepton_jax.step.training_loss import whole_loss


class Touching:
    """Finds the touched rows of a plan's tables.

    Args:
      trace: the traced recipe.
      plan: how it lies on the devices.
      mesh: the devices.
    """

    def __init__(
        self,
        trace: Trace,
        plan: Plan,
        mesh: Mesh,
    ):
        self._trace = trace
        self._plan = plan
        self._mesh = mesh
        self._specs = {array.path: array.spec for array in plan.arrays}

    def rows(
        self,
        state: State,
        batch: Any,
    ) -> Rows:
        """Return the rows that a batch touches."""
        tables = self._trace.tables
        ids = self._ids(state, batch)
        rows = {path: touched(ids[path], table) for path, table in tables.sizes.items()}
        return Rows(tables, rows, self._placed)

    def _ids(
        self,
        state: State,
        batch: Any,
    ) -> dict[str, Any]:
        """Return the ids that a batch looks up, int32 (lookups,), by path of the table.

        They are computed as in the gradient, micro-batch by micro-batch.
        """
        key = jax.random.fold_in(state.key, state.step)
        count = self._plan.micro_batches
        keys = partial(
            step_key,
            self._trace.recipe.preprocess,
            step=key,
        )
        if count == 1:
            found = self._ids_of(
                state,
                keys(key, part=0),
                batch,
            )
        else:

            def part(
                _: None,
                item: Any,
            ) -> tuple[None, Any]:
                index, micro_batch = item
                own = keys(jax.random.fold_in(key, index), part=index)
                return None, self._ids_of(state, own, micro_batch)

            items = (jnp.arange(count), micro_batches(batch, count))
            _, found = jax.lax.scan(part, None, items)
        return {
            path: self._whole(jnp.concatenate([x.reshape(-1) for x in ids]))
            for path, ids in found.items()
        }

    def _ids_of(
        self,
        state: State,
        key: Any,
        batch: Any,
    ) -> dict[str, list[Any]]:
        trace = self._trace
        loss = whole_loss(
            trace.recipe,
            trace.functional,
            self._plan.micro_batches,
        )
        knobs = trace.controller.forward_knobs(state.controller)
        args = (state.variables, key, *batch, knobs)
        program, paths, used = looked_up(
            loss,
            trace.tables,
            trace.state.params,
            args,
        )
        leaves = [*jax.tree.leaves(trace.state.params), *jax.tree.leaves(args)]
        needed = [x for x, is_used in zip(leaves, used, strict=True) if is_used]
        results = jax.core.eval_jaxpr(
            program.jaxpr,
            program.consts,
            *needed,
        )
        found: dict[str, list[Any]] = {path: [] for path in trace.tables.sizes}
        for path, ids in zip(paths, results, strict=True):
            found[path].append(ids)
        return found

    # ---- on several devices ----

    def _whole(
        self,
        x: Any,
    ) -> Any:
        """Put all of an array on each device."""
        if self._mesh.size == 1:
            return x
        whole = NamedSharding(self._mesh, PartitionSpec())
        return jax.lax.with_sharding_constraint(x, whole)

    def _placed(
        self,
        path: str,
        x: Any,
    ) -> Any:
        """Put rows of an array of the state on each device that has its columns."""
        if self._mesh.size == 1:
            return x
        columns = self._specs[path][1:]
        spec = NamedSharding(self._mesh, PartitionSpec(None, *columns))
        return jax.lax.with_sharding_constraint(x, spec)


def micro_batches(
    batch: Any,
    count: int,
) -> Any:
    """Split a batch into micro-batches, which become the leading dim.

    It is split by strides, so that each device's rows are spread over the micro-batches
    without leaving the device.
    """

    def split(leaf: Any) -> Any:
        return leaf.reshape(-1, count, *leaf.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, batch)
