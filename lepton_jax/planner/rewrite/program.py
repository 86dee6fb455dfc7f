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
# The results of an equation that is replaced; None: it is bound as it is.
Replaced = list[Any] | None
# (equation, values so far) to its results
Rule = Callable[[Any, Env], Replaced]


def flat(program: ClosedJaxpr) -> ClosedJaxpr:
    """Return a program without calls, also in the bodies of its scans."""
    return retraced(program, _inlined)


def opened(program: ClosedJaxpr) -> ClosedJaxpr:
    """Return a program that is still to be differentiated, without named parts.

    Those in the bodies of its loops are opened, too.
    """

    def rule(eqn: Any, env: Env) -> Replaced:
        name = eqn.primitive.name
        operands = operands_of(eqn, env)
        if name == "scan":
            body = opened(eqn.params["jaxpr"])
            return bind(eqn, operands, jaxpr=body)
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

    def changed(*leaves: Any) -> list[Any]:
        return run(program, leaves, rule)

    shapes = [_shape(variable.aval) for variable in program.jaxpr.invars]
    return _without_dead(jax.make_jaxpr(changed)(*shapes))


def trace(function: Callable, *args: Any) -> tuple[ClosedJaxpr, Any]:
    """Return the program of a function, opened, and the shapes of its results."""
    traced = jax.make_jaxpr(function, return_shape=True)
    program, shapes = traced(*args)
    return opened(program), shapes


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
    env = inputs_of(program, leaves)
    run_equations(jaxpr.eqns, env, rule, callers)
    return read_all(env, jaxpr.outvars)


def inputs_of(program: ClosedJaxpr, leaves: Sequence[Any]) -> Env:
    """Return the values that a program begins with: constants and inputs."""
    env = constants_of(program)
    write(env, program.jaxpr.invars, leaves)
    return env


def constants_of(program: ClosedJaxpr) -> Env:
    """Return the arrays that a program holds, by their variables."""
    env: Env = {}
    write(env, program.jaxpr.constvars, program.consts)
    return env


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
        write(env, eqn.outvars, results)


def bind(
    eqn: Any,
    operands: Sequence[Any],
    **changed: Any,
) -> list[Any]:
    """Run one operation, with some of its parameters changed."""
    params = {**eqn.params, **changed}
    params = eqn.primitive.get_bind_params(params)
    results = eqn.primitive.bind(*operands, **params)
    if eqn.primitive.multiple_results:
        return list(results)
    return [results]


def read(env: Env, variable: Any) -> Any:
    """Return the value of a variable or a literal."""
    if isinstance(variable, Literal):
        return variable.val
    return env[variable]


def read_all(env: Env, variables: Iterable[Any]) -> list[Any]:
    """Return the values of variables and literals."""
    return [read(env, variable) for variable in variables]


def write(env: Env, variables: Iterable[Any], values: Iterable[Any]) -> None:
    """Put the values of variables into the environment."""
    env.update(zip(variables, values, strict=True))


def operands_of(eqn: Any, env: Env) -> list[Any]:
    """Return the values that an equation takes."""
    return read_all(env, eqn.invars)


def variables_of(atoms: Iterable[Any]) -> list[Any]:
    """Return those of some operands or results that are no literals."""
    return [atom for atom in atoms if not isinstance(atom, Literal)]


def shape_of_operand(eqn: Any, number: int = 0) -> tuple[int, ...]:
    """Return the shape of an operand of an equation, the first if none is named."""
    return eqn.invars[number].aval.shape


def shape_of_result(eqn: Any) -> tuple[int, ...]:
    """Return the shape of the first result of an equation."""
    return eqn.outvars[0].aval.shape


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
        several = isinstance(value, tuple | list)
        for inner in value if several else (value,):
            if isinstance(inner, ClosedJaxpr):
                yield inner.jaxpr
            elif isinstance(inner, Jaxpr):
                yield inner


def called(eqn: Any) -> ClosedJaxpr:
    """Return the program of a call, as `CALLS` names it."""
    parameter = CALLS[eqn.primitive.name]
    inner = eqn.params[parameter]
    if isinstance(inner, Jaxpr):
        return ClosedJaxpr(inner, ())
    return inner


class Uses:
    """Makers and uses of the variables of a jaxpr.

    Attributes:
      maker: variable to the equation that makes it.
      results: variables that are results.
    """

    def __init__(self, jaxpr: Jaxpr):
        self.maker: dict[Any, Any] = {}
        self.results = set(variables_of(jaxpr.outvars))
        self._users: dict[Any, list[Any]] = defaultdict(list)
        for eqn in jaxpr.eqns:
            for variable in eqn.outvars:
                self.maker[variable] = eqn
            for used in variables_of(eqn.invars):
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
        if eqn is None or eqn.primitive.name not in names:
            return None
        return eqn


def is_zero(variable: Any, uses: Uses) -> bool:
    """Whether a variable is known to hold zeros."""
    eqn = uses.made_by(variable, "broadcast_in_dim")
    if eqn is not None:
        variable = eqn.invars[0]
    if not isinstance(variable, Literal):
        return False
    is_scalar = not getattr(variable.val, "shape", ())
    return is_scalar and bool(variable.val == 0)


def alike(left: Jaxpr, right: Jaxpr) -> bool:
    """Whether two programs are the same operations on arrays of the same shapes.

    They may lie on different devices.
    """
    if _counts(left) != _counts(right):
        return False
    same: Env = {}
    write(same, left.invars, right.invars)
    write(same, left.constvars, right.constvars)
    for mine, theirs in zip(left.eqns, right.eqns, strict=True):
        if not _alike(mine, theirs, same):
            return False
        write(same, mine.outvars, theirs.outvars)
    return _same_operands(left.outvars, right.outvars, same)


# ---- internals ----

# Options that say where an array lies: a program that is traced for a mesh has others.
PLACES = ("sharding", "out_sharding")


def _counts(jaxpr: Jaxpr) -> tuple[int, int, int]:
    """Return how many inputs, constants and equations a program has."""
    return len(jaxpr.invars), len(jaxpr.constvars), len(jaxpr.eqns)


def _alike(left: Any, right: Any, same: Env) -> bool:
    """Whether two equations are of one operation, on operands that are the same."""
    name = left.primitive.name
    if name != right.primitive.name:
        return False
    if len(left.outvars) != len(right.outvars):
        return False
    if not _same_operands(left.invars, right.invars, same):
        return False
    if name in CALLS:
        return alike(called(left).jaxpr, called(right).jaxpr)
    return _same_options(left.params, right.params)


def _same_options(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Whether two equations have the same options, but for where arrays lie."""
    if left.keys() != right.keys():
        return False
    for option, mine in left.items():
        theirs = right[option]
        if option in PLACES:
            continue
        if isinstance(mine, ClosedJaxpr):
            if not alike(mine.jaxpr, theirs.jaxpr):
                return False
        elif mine is not theirs and str(mine) != str(theirs):
            return False
    return True


def _same_operands(left: Sequence[Any], right: Sequence[Any], same: Env) -> bool:
    if len(left) != len(right):
        return False
    pairs = zip(left, right, strict=True)
    return all(_same_operand(mine, theirs, same) for mine, theirs in pairs)


def _same_operand(mine: Any, theirs: Any, same: Env) -> bool:
    """Whether two operands are one value: equal literals, or variables of a pair."""
    literals = [isinstance(operand, Literal) for operand in (mine, theirs)]
    if all(literals):
        is_same = str(mine.val) == str(theirs.val)
    elif any(literals):
        is_same = False
    else:
        is_same = same.get(mine) is theirs
    return is_same and _kind(mine) == _kind(theirs)


def _kind(operand: Any) -> tuple[Any, Any]:
    """Return the shape and dtype of an operand."""
    return operand.aval.shape, operand.aval.dtype


def _inlined(eqn: Any, env: Env) -> Replaced:
    name = eqn.primitive.name
    operands = operands_of(eqn, env)
    if name == "scan":
        body = flat(eqn.params["jaxpr"])
        return bind(eqn, operands, jaxpr=body)
    if name not in CALLS:
        return None
    return run(called(eqn), operands, _inlined)


def _shape(aval: Any) -> jax.ShapeDtypeStruct:
    weak = getattr(aval, "weak_type", False)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=weak)


def _without_dead(program: ClosedJaxpr) -> ClosedJaxpr:
    """Return a program without operations whose results nothing uses."""
    jaxpr = program.jaxpr
    needed = set(variables_of(jaxpr.outvars))
    live = []
    for eqn in reversed(jaxpr.eqns):
        is_needed = any(variable in needed for variable in eqn.outvars)
        if eqn.effects or is_needed:
            live.append(eqn)
            needed.update(variables_of(eqn.invars))
    jaxpr = jaxpr.replace(eqns=live[::-1])
    return program.replace(jaxpr=jaxpr)
