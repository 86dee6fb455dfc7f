"""The training loss on the touched rows of its tables.

The loss is traced on tables of full size, as its author wrote it, and its program is
run again operation by operation. There a table is `Held`: its touched rows, and which
ones they are. A lookup of row 5 among the slots [2, 5, 8] takes slot 1:

>>> held = Held("items", 8, jnp.zeros((3, 2)), jnp.array([2, 5, 8]))
>>> held.slots_of(jnp.array([5, 2, 5]), GatherScatterMode.CLIP)
Array([1, 0, 1], dtype=int32)

An id that is no row is none among the slots either, so that the lookup still gives what
its author asked for: NaN, 0, or the nearest row.

>>> held.slots_of(jnp.array([99]), GatherScatterMode.FILL_OR_DROP)
Array([3], dtype=int32)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval
from jax.lax import GatherScatterMode

from lepton_jax.compat import ClosedJaxpr, Jaxpr, Literal, at_source
from lepton_jax.step.embeddings.tables import Tables
from lepton_jax.step.embeddings.uses import (
    BY_ROW,
    REMATERIALIZED,
    called,
    is_lookup,
    opened,
)
from lepton_jax.trees import with_leaves

# bytes of the narrowest whole number that counts the rows of any table
WIDE = 4
# modes of a lookup in which an id that is no row gives the nearest one
CLIPPING = (GatherScatterMode.CLIP, GatherScatterMode.PROMISE_IN_BOUNDS)


class Held(NamedTuple):
    """A table in a program that is run on the touched rows.

    Attributes:
      path: of the parameter.
      size: rows of the whole table.
      x: the touched rows, (slots, ...).
      rows: their numbers, int32 (slots,), ascending; those of free slots are `size` and
        more.
    """

    path: str
    size: int
    x: Any
    rows: Any

    def slots_of(
        self,
        ids: Any,
        mode: Any,
    ) -> Any:
        """Return the slots of some ids; the number of slots for ids without a row."""
        ids = _wide(ids)
        slots = jnp.searchsorted(self.rows, clipped(ids, self.size, mode))
        if mode in CLIPPING:
            return slots.astype(jnp.int32)
        is_row = (ids >= 0) & (ids < self.size)
        return jnp.where(is_row, slots, len(self.rows)).astype(jnp.int32)


def clipped(
    ids: Any,
    size: int,
    mode: Any,
) -> Any:
    """Return ids with a row each; in modes that look up nothing, `size` for the others.

    Args:
      ids: whole numbers of any shape.
      size: rows of the table.
      mode: of the lookup.
    """
    ids = _wide(ids)
    if mode in CLIPPING:
        return jnp.clip(ids, 0, size - 1).astype(jnp.int32)
    is_row = (ids >= 0) & (ids < size)
    return jnp.where(is_row, ids, size).astype(jnp.int32)


def compacted(
    loss: Callable,
    tables: Tables,
    around: Callable[[Callable], Callable] = lambda loss: loss,
) -> Callable:
    """Return a training loss that takes the touched rows in place of its tables.

    Args:
      loss: a function of `training_loss.ARGUMENTS`.
      tables: its tables.
      around: what is made of it then.

    Returns:
      A function of these arguments and of the rows, by path of the table.
    """

    def run(params: Any, *args: Any) -> Any:
        *others, rows = args
        whole = tables.whole(params)
        trace = jax.make_jaxpr(loss, return_shape=True)
        program, shapes = trace(whole, *others)
        held = [
            Held(
                path,
                tables.sizes[path],
                x,
                rows[path],
            )
            if path in rows
            else x
            for path, x in tables.leaves(params).items()
        ]
        values = [*held, *jax.tree.leaves(others)]
        results = _Compact().run(
            program.jaxpr,
            program.consts,
            values,
        )
        return with_leaves(shapes, results)

    return around(run)


def looked_up(
    loss: Callable,
    tables: Tables,
    params: Any,
    args: tuple,
) -> tuple[ClosedJaxpr, list[str], list[bool]]:
    """Return the program that computes the ids of a batch, with all else left out.

    Args:
      loss: a function of `training_loss.ARGUMENTS`.
      tables: its tables.
      params: shapes of the parameters, the tables whole.
      args: the other arguments, or their shapes.

    Returns:
      The program of (params, *args), flat; the path of the table that each of its
      results holds ids of; and which inputs it needs.
    """
    paths: list[str] = []

    def collect(params: Any, *args: Any) -> list[Any]:
        program = jax.make_jaxpr(loss)(params, *args)
        held = [
            Held(path, tables.sizes[path], x, None) if path in tables.sizes else x
            for path, x in tables.leaves(params).items()
        ]
        interpreter = _Collect()
        values = [*held, *jax.tree.leaves(args)]
        interpreter.run(
            program.jaxpr,
            program.consts,
            values,
        )
        paths.extend(path for path, _ in interpreter.ids)
        return [ids for _, ids in interpreter.ids]

    program = jax.make_jaxpr(collect)(params, *args)
    wanted = [True] * len(program.jaxpr.outvars)
    jaxpr, used = partial_eval.dce_jaxpr(program.jaxpr, wanted)
    return ClosedJaxpr(jaxpr, program.consts), paths, used


def cast_late(
    function: Callable,
    tables: Tables,
) -> Callable:
    """Return a function that casts the rows that it looks up, and not whole tables.

    Args:
      function: of the parameters and other arguments, such as a forward pass.
      tables: the tables among the parameters.
    """

    def run(params: Any, *args: Any) -> Any:
        trace = jax.make_jaxpr(function, return_shape=True)
        program, shapes = trace(params, *args)
        raw = [
            Raw(x) if path in tables.sizes else x
            for path, x in tables.leaves(params).items()
        ]
        values = [*raw, *jax.tree.leaves(args)]
        results = _Late().run(
            program.jaxpr,
            program.consts,
            values,
        )
        results = [_done(x) for x in results]
        return with_leaves(shapes, results)

    return run


class Raw(NamedTuple):
    """A table in a program, before operations that change each row by itself.

    Attributes:
      x: the table.
      pending: the equations of these operations, such as a cast.
    """

    x: Any
    pending: tuple = ()


# ---- internals ----


class _Interpreter:
    """Runs a program with tables among its values."""

    def run(
        self,
        jaxpr: Jaxpr,
        consts: list[Any],
        args: list[Any],
    ) -> list[Any]:
        """Return the program's results; a table among them is `Held` as well."""
        env = dict(zip(jaxpr.constvars, consts, strict=True))
        env |= zip(jaxpr.invars, args, strict=True)

        def read(variable: Any) -> Any:
            return variable.val if isinstance(variable, Literal) else env[variable]

        for eqn in jaxpr.eqns:
            operands = [read(variable) for variable in eqn.invars]
            with at_source(eqn, ()):
                results = self._results(eqn, operands)
            env |= zip(eqn.outvars, results, strict=True)
        return [read(variable) for variable in jaxpr.outvars]

    def _results(
        self,
        eqn: Any,
        operands: list[Any],
    ) -> list[Any]:
        if not any(isinstance(x, Held) for x in operands):
            return _bind(eqn, operands)
        inner = called(eqn)
        if inner is not None:
            return self.call(eqn, *opened(inner), operands)
        if is_lookup(eqn):
            return self.look_up(eqn, operands)
        assert eqn.primitive.name in BY_ROW, eqn.primitive.name
        held = operands[0]
        return [held._replace(x=_bind(eqn, [held.x])[0])]

    def call(
        self,
        eqn: Any,
        jaxpr: Jaxpr,
        consts: list[Any],
        operands: list[Any],
    ) -> list[Any]:
        """Return the results of a call that takes a table."""
        del eqn
        return self.run(jaxpr, consts, operands)

    def look_up(
        self,
        eqn: Any,
        operands: list[Any],
    ) -> list[Any]:
        """Return the result of a lookup."""
        raise NotImplementedError


class _Compact(_Interpreter):
    """Runs a program on the touched rows of its tables."""

    def call(
        self,
        eqn: Any,
        jaxpr: Jaxpr,
        consts: list[Any],
        operands: list[Any],
    ) -> list[Any]:
        if eqn.primitive.name not in REMATERIALIZED:
            return self.run(jaxpr, consts, operands)

        def run(arrays: list[Any]) -> list[Any]:
            pairs = zip(operands, arrays, strict=True)
            return self.run(
                jaxpr,
                consts,
                [_with_arrays(o, a) for o, a in pairs],
            )

        again = jax.checkpoint(
            run,
            policy=eqn.params["policy"],
            prevent_cse=eqn.params["prevent_cse"],
        )
        return again([_arrays(x) for x in operands])

    def look_up(
        self,
        eqn: Any,
        operands: list[Any],
    ) -> list[Any]:
        held, indices, *rest = operands
        ids, mode = _ids(eqn, indices)
        slots = held.slots_of(ids, mode)
        if eqn.primitive.name == "dynamic_slice":
            return _bind(eqn, [held.x, slots.astype(indices.dtype), *rest])
        indices = indices.astype(jnp.int32).at[..., _id_column(eqn)].set(slots)
        return _bind(eqn, [held.x, indices, *rest])


class _Collect(_Interpreter):
    """Runs a program on whole tables, and collects the ids that it looks up.

    Attributes:
      ids: path of the table, and the ids, int32 (count,), of each lookup.
    """

    def __init__(self) -> None:
        self.ids: list[tuple[str, Any]] = []

    def look_up(
        self,
        eqn: Any,
        operands: list[Any],
    ) -> list[Any]:
        held, indices, *rest = operands
        ids, mode = _ids(eqn, indices)
        ids = clipped(ids.reshape(-1), held.size, mode)
        self.ids.append((held.path, ids))
        return _bind(eqn, [held.x, indices, *rest])


class _Late(_Interpreter):
    """Runs a program in which casts of a table wait until rows are looked up."""

    def _results(
        self,
        eqn: Any,
        operands: list[Any],
    ) -> list[Any]:
        if not any(isinstance(x, Raw) for x in operands):
            return _bind(eqn, operands)
        inner = called(eqn)
        if inner is not None:
            return self.run(*opened(inner), operands)
        first, *rest = operands
        if eqn.primitive.name in BY_ROW:
            return [first._replace(pending=(*first.pending, eqn))]
        if is_lookup(eqn) and isinstance(first, Raw):
            rows = _bind(eqn, [first.x, *rest])[0]
            return [_done(first._replace(x=rows))]
        return _bind(eqn, [_done(x) for x in operands])


def _done(operand: Any) -> Any:
    """Return an operand after the operations that are pending on it."""
    if not isinstance(operand, Raw):
        return operand
    x = operand.x
    for eqn in operand.pending:
        x = _bind(eqn, [x])[0]
    return x


def _wide(ids: Any) -> Any:
    """Return ids in a dtype that holds the size of any table."""
    return ids.astype(jnp.int32) if ids.dtype.itemsize < WIDE else ids


def _ids(
    eqn: Any,
    indices: Any,
) -> tuple[Any, Any]:
    """Return the row numbers that a lookup asks for, and its mode.

    Args:
      eqn: the equation: a gather, or a slice of one row.
      indices: its second operand.
    """
    if eqn.primitive.name == "dynamic_slice":
        return indices, GatherScatterMode.CLIP
    return indices[..., _id_column(eqn)], eqn.params["mode"]


def _id_column(eqn: Any) -> int:
    """Return the place of the row's number in the index vectors of a lookup."""
    return eqn.params["dimension_numbers"].start_index_map.index(0)


def _arrays(operand: Any) -> Any:
    """Return the arrays of an operand: of a table its rows and their numbers."""
    return (operand.x, operand.rows) if isinstance(operand, Held) else operand


def _with_arrays(
    operand: Any,
    arrays: Any,
) -> Any:
    if not isinstance(operand, Held):
        return arrays
    return operand._replace(x=arrays[0], rows=arrays[1])


def _bind(
    eqn: Any,
    operands: list[Any],
) -> list[Any]:
    params = eqn.primitive.get_bind_params(eqn.params)
    results = eqn.primitive.bind(*operands, **params)
    return list(results) if eqn.primitive.multiple_results else [results]
