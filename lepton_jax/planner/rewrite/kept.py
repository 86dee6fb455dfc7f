"""Values that a loop need not keep for its backward pass.

JAX stacks all that the backward loop reads. Of a sigmoid s it keeps s and s (1 - s), of
a mask its copies for each channel. What simple operations make of values that are there
anyway is made again in the backward loop:

    >>> import jax, jax.numpy as jnp
    >>> from lepton_jax.planner.rewrite.program import flat
    >>> def last(xs):
    ...     step = lambda h, x: (jax.nn.sigmoid(h + x), None)
    ...     return jax.lax.scan(step, 0.0, xs)[0]
    >>> program = flat(jax.make_jaxpr(jax.grad(last))(jnp.ones(3)))
    >>> def outputs(program):
    ...     loop = next(e for e in program.eqns if e.primitive.name == "scan")
    ...     return len(loop.outvars)
    >>> outputs(program), outputs(rewrite(program))
    (2, 2)

The operations are the same, so are the values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from jax import lax

from lepton_jax.compat import ClosedJaxpr, Literal, scan_counts
from lepton_jax.planner.rewrite.program import (
    Env,
    Replaced,
    Uses,
    operands_of,
    read,
    read_all,
    retraced,
    run,
    run_equations,
    variables_of,
    write,
)

# Operations that take less time than reading what they make.
CHEAP = {
    "add",
    "and",
    "broadcast_in_dim",
    "convert_element_type",
    "mul",
    "neg",
    "not",
    "reshape",
    "select_n",
    "squeeze",
    "sub",
}
# Operations that make one value, at most. Assumption: a sigmoid's slope takes two, and
# more would be work.
MOST_OPERATIONS = 4


class _Remade(NamedTuple):
    """A stacked value that is made again.

    Attributes:
      number: of the loop's stacked result.
      eqns: that make it.
      leaves: values of the body that they use: slices, or what stays stacked.
    """

    number: int
    eqns: tuple[Any, ...]
    leaves: tuple[Any, ...]


class _Pair(NamedTuple):
    """A loop and its backward loop.

    Attributes:
      forward, backward: the scans.
      remade: by the operand of the backward loop that it replaces.
    """

    forward: Any
    backward: Any
    remade: dict[int, _Remade]

    def leaves(self) -> list[Any]:
        """List the values of the body that all that is made again needs, each once."""
        leaves: dict[Any, None] = {}
        for made in self.remade.values():
            leaves.update(dict.fromkeys(made.leaves))
        return list(leaves)


def is_candidate(eqn: Any) -> bool:
    """Whether an operation is one that the pass may write anew."""
    return eqn.primitive.name == "scan"


def rewrite(program: ClosedJaxpr) -> ClosedJaxpr:
    """Return a flat program whose loops keep less for their backward passes."""
    uses = Uses(program.jaxpr)
    pairs = []
    for eqn in program.jaxpr.eqns:
        pair = _pair(eqn, uses)
        if pair is not None:
            pairs.append(pair)
    forwards = {id(pair.forward): pair for pair in pairs}
    backwards = {id(pair.backward): pair for pair in pairs}

    def rule(eqn: Any, env: Env) -> Replaced:
        if id(eqn) in forwards:
            return _forward(forwards[id(eqn)], operands_of(eqn, env))
        if id(eqn) in backwards:
            return _backward(backwards[id(eqn)], env)
        return None

    return retraced(program, rule)


# ---- internals ----


def _pair(backward: Any, uses: Uses) -> _Pair | None:
    """Return a loop with the one whose stacked results it reads, if that helps."""
    if backward.primitive.name != "scan" or backward.effects:
        return None
    read_by = _read_by(backward, uses)
    if not read_by:
        return None
    forward = uses.maker[next(iter(read_by))]
    is_as_long = forward.params["length"] == backward.params["length"]
    if forward.effects or not is_as_long:
        return None
    remade = _all_remade(forward, read_by)
    if not remade:
        return None
    return _Pair(forward, backward, remade)


def _read_by(backward: Any, uses: Uses) -> dict[Any, int]:
    """Return the values of other loops that one alone reads, and as which operand."""
    first = sum(scan_counts(backward))
    read_by: dict[Any, int] = {}
    for number, variable in enumerate(backward.invars[first:], first):
        maker = uses.made_by(variable, "scan")
        if maker is None or uses.only_user(variable) is not backward:
            continue
        read_by[variable] = number
    return read_by


def _all_remade(forward: Any, read_by: dict[Any, int]) -> dict[int, _Remade]:
    """Return what of a loop's stacked results is made again, by who reads it."""
    consts, carried = scan_counts(forward)
    body = forward.params["jaxpr"].jaxpr
    inner = Uses(body)
    there = set(variables_of(body.outvars[carried:]))
    there.update(body.invars[consts + carried :])

    remade: dict[int, _Remade] = {}
    needed: set[Any] = set()
    for number in range(carried, len(body.outvars)):
        outer = forward.outvars[number]
        variable = body.outvars[number]
        if outer not in read_by or isinstance(variable, Literal):
            continue
        if variable in needed or body.outvars.count(variable) > 1:
            continue
        made = _remade(number, variable, inner, there)
        if made is not None:
            remade[read_by[outer]] = made
            there.discard(variable)
            needed.update(made.leaves)
    return remade


def _remade(
    number: int,
    variable: Any,
    uses: Uses,
    there: set[Any],
) -> _Remade | None:
    """Return how a value is made of others that are there; None: it can't be."""
    makers: dict[Any, Any] = {}  # by what they make
    leaves: dict[Any, None] = {}
    missing = [variable]
    while missing:
        current = missing.pop()
        if current in there and current is not variable:
            leaves[current] = None
        elif current not in makers:
            maker = uses.made_by(current, *CHEAP)
            if maker is None or len(makers) == MOST_OPERATIONS:
                return None
            makers[current] = maker
            missing += variables_of(maker.invars)
    ordered = [makers[made] for made in uses.maker if made in makers]
    return _Remade(number, tuple(ordered), tuple(leaves))


def _forward(pair: _Pair, operands: Sequence[Any]) -> list[Any]:
    """Run a loop without the values that are made again, which become None."""
    eqn = pair.forward
    body = eqn.params["jaxpr"]
    consts, carried = scan_counts(eqn)
    first = consts + carried
    count = len(body.jaxpr.outvars)
    gone = {made.number for made in pair.remade.values()}
    stays = [n for n in range(carried, count) if n not in gone]

    def step(carry: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
        results = run(body, [*operands[:consts], *carry, *slices])
        stacked = [results[n] for n in stays]
        return results[:carried], stacked

    given = list(operands[consts:first])
    last, stacked = _scan(eqn, step, given, operands[first:])
    results = [*last, *[None] * (count - carried)]
    for number, values in zip(stays, stacked, strict=True):
        results[number] = values
    return results


def _backward(pair: _Pair, env: Env) -> list[Any]:
    """Run a backward loop that makes values again."""
    eqn = pair.backward
    body = eqn.params["jaxpr"]
    consts, carried = scan_counts(eqn)
    first = consts + carried
    constants = read_all(env, eqn.invars[:consts])
    given = read_all(env, eqn.invars[consts:first])
    read_stacks = range(first, len(eqn.invars))
    numbers = [n for n in read_stacks if n not in pair.remade]
    stacks = [read(env, eqn.invars[n]) for n in numbers]
    leaves = pair.leaves()
    outside = [_outside(pair.forward, leaf) for leaf in leaves]
    more = read_all(env, outside)

    def step(carry: list[Any], slices: Any) -> tuple[list[Any], list[Any]]:
        own, used = slices
        inner: Env = {}
        write(inner, leaves, used)
        values: dict[int, Any] = {}
        write(values, numbers, own)
        for number, made in pair.remade.items():
            run_equations(made.eqns, inner)
            last = made.eqns[-1]
            values[number] = inner[last.outvars[0]]
        ordered = [values[n] for n in read_stacks]
        results = run(body, [*constants, *carry, *ordered])
        return results[:carried], results[carried:]

    last, stacked = _scan(eqn, step, given, (stacks, more))
    return [*last, *stacked]


def _outside(forward: Any, leaf: Any) -> Any:
    """Return the stacked values outside of a loop for a value of its body."""
    body = forward.params["jaxpr"].jaxpr
    carried = scan_counts(forward)[1]
    if leaf in body.invars:
        return forward.invars[body.invars.index(leaf)]
    return forward.outvars[body.outvars.index(leaf, carried)]


def _scan(eqn: Any, step: Any, carry: list[Any], slices: Any) -> tuple[Any, Any]:
    return lax.scan(
        step,
        carry,
        slices,
        length=eqn.params["length"],
        reverse=eqn.params["reverse"],
        unroll=eqn.params["unroll"],
    )
