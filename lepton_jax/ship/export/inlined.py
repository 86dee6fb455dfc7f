"""A traced program run again with its calls inlined, so that only operations are left.

Converters that know JAX's operations then meet neither modules nor functions in them:

    jit[jaxpr={ c = tanh a; d = mul c b }]      -> tanh, mul
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from lepton_jax.compat import ClosedJaxpr, Jaxpr, Literal, source_line
from lepton_jax.planner.program.graph import CALLS

Look = Callable[[Any, tuple, list[Any]], None]
Rules = Mapping[str, Callable[..., Any]]


def run(
    program: ClosedJaxpr,
    args: Sequence[Any],
    look: Look | None = None,
    rules: Rules | None = None,
) -> list[Any]:
    """Run a program, operation by operation.

    Args:
      program: what `jax.make_jaxpr` returned.
      args: leaves of its arguments.
      look: called with each equation, the calls around it, outermost first, and its
        results.
      rules: by the name of an operation, a function (operands, parameters) to results
        that is run in its place; None: the operation itself is run.
    """
    inlined = _Inlined(look, rules or {})
    return inlined.run(program.jaxpr, program.consts, args, ())


def equations(program: ClosedJaxpr) -> list[tuple[Any, tuple]]:
    """Return the equations that `run` runs, each with the calls around it."""
    found: list[tuple[Any, tuple]] = []
    shapes = [
        jax.ShapeDtypeStruct(leaf.aval.shape, leaf.aval.dtype)
        for leaf in program.jaxpr.invars
    ]

    def note(eqn: Any, callers: tuple, results: list[Any]) -> None:
        found.append((eqn, callers))

    jax.eval_shape(lambda *args: run(program, args, note), *shapes)
    return found


def place_of(eqn: Any, callers: tuple) -> str:
    """Return the user's line of an equation, without folders: "a.py:12 (function)"."""
    line = source_line(eqn, callers)
    path, colon, rest = line.partition(":")
    return Path(path).name + colon + rest


# ---- internals ----


class _Inlined:
    def __init__(
        self,
        look: Look | None,
        rules: Rules,
    ):
        self._look = look
        self._rules = rules

    def run(
        self,
        jaxpr: Jaxpr,
        consts: Sequence[Any],
        args: Sequence[Any],
        callers: tuple,
    ) -> list[Any]:
        env: dict[Any, Any] = {}
        _bind(env, jaxpr.constvars, consts)
        _bind(env, jaxpr.invars, args)
        for eqn in jaxpr.eqns:
            inputs = [_value(env, atom) for atom in eqn.invars]
            results = self._equation(eqn, inputs, callers)
            _bind(env, eqn.outvars, results)
        return [_value(env, atom) for atom in jaxpr.outvars]

    def _equation(
        self,
        eqn: Any,
        inputs: list[Any],
        callers: tuple,
    ) -> list[Any]:
        name = eqn.primitive.name
        called = _called(eqn)
        if called is not None and len(called[0].invars) == len(inputs):
            return self.run(*called, inputs, (*callers, eqn))
        if name in self._rules:
            replaced = self._rules[name](inputs, eqn.params)
            if replaced is not None:
                return replaced
        params = eqn.primitive.get_bind_params(eqn.params)
        out = eqn.primitive.bind(*inputs, **params)
        results = list(out) if eqn.primitive.multiple_results else [out]
        if self._look is not None:
            self._look(eqn, callers, results)
        return results


def _bind(
    env: dict[Any, Any],
    variables: Sequence[Any],
    values: Sequence[Any],
) -> None:
    env.update(zip(variables, values, strict=True))


def _value(env: Mapping[Any, Any], atom: Any) -> Any:
    return atom.val if isinstance(atom, Literal) else env[atom]


def _called(eqn: Any) -> tuple[Jaxpr, Sequence[Any]] | None:
    """Return the program that an equation calls, with its constants."""
    inner = eqn.params.get(CALLS.get(eqn.primitive.name, ""))
    if isinstance(inner, ClosedJaxpr):
        return inner.jaxpr, inner.consts
    return None if inner is None else (inner, ())
