"""Flat jaxprs, and how they are run again with some operations replaced.

>>> import jax, jax.numpy as jnp
>>> program = jax.make_jaxpr(lambda x: jax.nn.relu(x) * 2.0)(jnp.ones(3))
>>> [eqn.primitive.name for eqn in program.eqns]
['custom_jvp_call', 'mul']
>>> [eqn.primitive.name for eqn in flat(program).eqns]
['max', 'mul']
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax

from lepton_jax.compat import ClosedJaxpr, Jaxpr, Literal, at_source

# Calls that a flat jaxpr has no longer: primitive name to the parameter that holds the
# jaxpr of the call.
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}

# Those of them that only give a part a name: the others have a derivative of their own.
NAMED_PARTS = ("jit", "pjit", "closed_call", "core_call")

Env = dict[Any, Any]
# (equation, values so far) to its results; None: it is bound as it is
Rule = Callable[[Any, Env], list[Any] | None]


def flat(program: ClosedJaxpr) -> ClosedJaxpr:
    """Return a program without calls, also in the bodies of its scans."""
    return retraced(program, _inlined)


def opened(program: ClosedJaxpr) -> ClosedJaxpr:
    """Return a program that is still to be differentiated, without named parts.

    Those in the bodies of its loops are opened, too.
    """

    def rule(eqn: Any, env: Env) -> list[Any] | None:
        name = eqn.primitive.name
        operands = operands_of(eqn, env)
        if name == "scan":
            return bind(eqn, operands, jaxpr=opened(eqn.params["jaxpr"]))
        if name not in NAMED_PARTS:
            return None
        return run(called(eqn), operands, rule)

    return retraced(program, rule)


def retraced(program: ClosedJaxpr, rule: Rule) -> ClosedJaxpr:
    """Return a program with some of its operations replaced.

    Args:
      program: the program.
      rule: the replacement.
    """
    shapes = [_shape(variable.aval) for variable in program.jaxpr.invars]
    traced = jax.make_jaxpr(lambda *leaves: run(program, leaves, rule))(*shapes)
    return _without_dead(traced)


def run(
    program: ClosedJaxpr,
    leaves: Sequence[Any],
    rule: Rule | None = None,
    callers: tuple = (),
) -> list[Any]:
    """Run a program, operation by operation.

    Args:
      program: the program.
      leaves: its inputs.
      rule: operations that are replaced.
      callers: equations of the calls around it, outermost first.
    """
    jaxpr = program.jaxpr
    env: Env = {}
    env.update(zip(jaxpr.constvars, program.consts, strict=True))
    env.update(zip(jaxpr.invars, leaves, strict=True))
    run_equations(jaxpr.eqns, env, rule, callers)
    return [read(env, variable) for variable in jaxpr.outvars]


def run_equations(
    eqns: Iterable[Any],
    env: Env,
    rule: Rule | None = None,
    callers: tuple = (),
) -> None:
    """Run equations, and put their results into the environment."""
    for eqn in eqns:
        with at_source(eqn, callers):
            results = rule(eqn, env) if rule else None
            if results is None:
                results = bind(eqn, operands_of(eqn, env))
        env.update(zip(eqn.outvars, results, strict=True))


def bind(
    eqn: Any,
    operands: Sequence[Any],
    **changed: Any,
) -> list[Any]:
    """Run one operation, with some of its parameters changed."""
    params = {**eqn.params, **changed}
    params = eqn.primitive.get_bind_params(params)
    results = eqn.primitive.bind(*operands, **params)
    return list(results) if eqn.primitive.multiple_results else [results]


def read(env: Env, variable: Any) -> Any:
    """Return the value of a variable or a literal."""
    if isinstance(variable, Literal):
        return variable.val
    return env[variable]


def operands_of(eqn: Any, env: Env) -> list[Any]:
    """Return the values that an equation takes."""
    return [read(env, variable) for variable in eqn.invars]


def equations(jaxpr: Jaxpr) -> Iterator[Any]:
    """Yield the equations of a program, those of its parts too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in parts(eqn):
            yield from equations(inner)


def primitives(jaxpr: Jaxpr) -> set[str]:
    """Return the names of the operations of a program, those of its parts too."""
    return {eqn.primitive.name for eqn in equations(jaxpr)}


def parts(eqn: Any) -> Iterator[Jaxpr]:
    """Iterate over the programs that an equation runs: a loop's body, a call's, ..."""
    for value in eqn.params.values():
        for inner in value if isinstance(value, tuple | list) else (value,):
            if isinstance(inner, ClosedJaxpr):
                yield inner.jaxpr
            elif isinstance(inner, Jaxpr):
                yield inner


def called(eqn: Any) -> ClosedJaxpr:
    """Return the program of a call, as `CALLS` names it."""
    inner = eqn.params[CALLS[eqn.primitive.name]]
    return ClosedJaxpr(inner, ()) if isinstance(inner, Jaxpr) else inner


class Uses:
    """Makers and uses of the variables of a jaxpr.

    Attributes:
      maker: variable to the equation that makes it.
      results: variables that are results.
    """

    def __init__(self, jaxpr: Jaxpr):
        self.maker: dict[Any, Any] = {}
        self.results = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
        self._users: dict[Any, list[Any]] = defaultdict(list)
        for eqn in jaxpr.eqns:
            for variable in eqn.outvars:
                self.maker[variable] = eqn
            for used in eqn.invars:
                if not isinstance(used, Literal):
                    self._users[used].append(eqn)

    def users(self, variable: Any) -> list[Any]:
        """Return the equations that use a variable, each as often as it does."""
        return self._users[variable]

    def only_user(self, variable: Any) -> Any:
        """Return the one equation that uses a variable; None: there are others."""
        users = self._users[variable]
        if len(users) == 1 and variable not in self.results:
            return users[0]
        return None

    def made_by(self, variable: Any, *names: str) -> Any:
        """Return the equation that makes a variable, if it is of these primitives."""
        if isinstance(variable, Literal):
            return None
        eqn = self.maker.get(variable)
        return eqn if eqn is not None and eqn.primitive.name in names else None


def is_zero(variable: Any, uses: Uses) -> bool:
    """Whether a variable is known to hold zeros."""
    eqn = uses.made_by(variable, "broadcast_in_dim")
    if eqn is not None:
        variable = eqn.invars[0]
    if not isinstance(variable, Literal):
        return False
    return not getattr(variable.val, "shape", ()) and bool(variable.val == 0)


def alike(left: Jaxpr, right: Jaxpr) -> bool:
    """Whether two programs are the same operations on arrays of the same shapes.

    They may lie on different devices.
    """
    if len(left.invars) != len(right.invars) or len(left.eqns) != len(right.eqns):
        return False
    same: dict[Any, Any] = {}
    same.update(zip(left.invars, right.invars, strict=True))
    if len(left.constvars) != len(right.constvars):
        return False
    same.update(zip(left.constvars, right.constvars, strict=True))
    for mine, theirs in zip(left.eqns, right.eqns, strict=True):
        if not _alike(mine, theirs, same):
            return False
        same.update(zip(mine.outvars, theirs.outvars, strict=True))
    return _same_operands(left.outvars, right.outvars, same)


# ---- internals ----

# Options that say where an array lies: a program that is traced for a mesh has others.
PLACES = ("sharding", "out_sharding")


def _alike(left: Any, right: Any, same: dict[Any, Any]) -> bool:
    """Whether two equations are of one operation, on operands that are the same."""
    name = left.primitive.name
    if name != right.primitive.name or len(left.outvars) != len(right.outvars):
        return False
    if not _same_operands(left.invars, right.invars, same):
        return False
    if name in CALLS:
        return alike(called(left).jaxpr, called(right).jaxpr)
    if left.params.keys() != right.params.keys():
        return False
    for option, mine in left.params.items():
        theirs = right.params[option]
        if option in PLACES:
            continue
        if isinstance(mine, ClosedJaxpr):
            if not alike(mine.jaxpr, theirs.jaxpr):
                return False
        elif mine is not theirs and str(mine) != str(theirs):
            return False
    return True


def _same_operands(
    left: Sequence[Any], right: Sequence[Any], same: dict[Any, Any]
) -> bool:
    if len(left) != len(right):
        return False
    for mine, theirs in zip(left, right, strict=True):
        if isinstance(mine, Literal) or isinstance(theirs, Literal):
            both = isinstance(mine, Literal) and isinstance(theirs, Literal)
            if not both or str(mine.val) != str(theirs.val):
                return False
        elif same.get(mine) is not theirs:
            return False
        own = mine.aval
        if (own.shape, own.dtype) != (theirs.aval.shape, theirs.aval.dtype):
            return False
    return True


def _inlined(eqn: Any, env: Env) -> list[Any] | None:
    name = eqn.primitive.name
    operands = operands_of(eqn, env)
    if name == "scan":
        return bind(eqn, operands, jaxpr=flat(eqn.params["jaxpr"]))
    if name not in CALLS:
        return None
    return run(called(eqn), operands, _inlined)


def _shape(aval: Any) -> jax.ShapeDtypeStruct:
    weak = getattr(aval, "weak_type", False)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=weak)


def _without_dead(program: ClosedJaxpr) -> ClosedJaxpr:
    """Return a program without operations whose results nothing uses."""
    jaxpr = program.jaxpr
    needed = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
    live = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or any(variable in needed for variable in eqn.outvars):
            live.append(eqn)
            needed |= {v for v in eqn.invars if not isinstance(v, Literal)}
    return program.replace(jaxpr=jaxpr.replace(eqns=live[::-1]))
