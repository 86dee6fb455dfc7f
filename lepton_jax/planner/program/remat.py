"""Rematerialization put into a function from outside.

Parts of its forward pass are run again in the backward pass, so that less is kept
between them. These parts are the bodies of loops, and in straight code segments between
places where little is alive. With a boundary of c bytes and t bytes inside, about
sqrt(t / c) segments need the least (Chen et al. 2016, "Training Deep Nets with
Sublinear Memory Cost").

Let each of three layers make a wide array of 256 KiB and a narrow one of 64 KiB:

    >>> import jax, jax.numpy as jnp
    >>> def tower(params, x):
    ...     for wide, narrow in params:
    ...         x = jnp.tanh(x @ wide) @ narrow
    ...     return (x**2).sum()
    >>> layer = (
    ...     jax.ShapeDtypeStruct((256, 1024), jnp.float32),
    ...     jax.ShapeDtypeStruct((1024, 256), jnp.float32),
    ... )
    >>> x = jax.ShapeDtypeStruct((64, 256), jnp.float32)
    >>> program = jax.make_jaxpr(tower)([layer] * 3, x)
    >>> [eqn.primitive.name for eqn in program.eqns[:3]]
    ['dot_general', 'tanh', 'dot_general']

After each layer, that is after every third operation, only a narrow array is alive, so
the program is cut there. The last segment holds the third layer and the loss:

    >>> boundaries(program.jaxpr, parameters=6)
    [0, 3, 6, 11]

`rematerialized` puts each segment under `jax.checkpoint`, but for the last one: the
backward pass begins there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax

from lepton_jax.compat import ClosedJaxpr, Literal, at_source, scan_counts
from lepton_jax.planner.rewrite.attention import ATTENTION
from lepton_jax.planner.rewrite.eight_bits import RESULT


def _projections(primitive: Any, *avals: Any, **params: Any) -> bool:
    """Whether an operation is a projection, or a kernel that keeps as little.

    Of a product of 8 bits its result is kept, not the sums that it is scaled from.
    """
    if primitive.name == "name":
        return params["name"] == RESULT
    if primitive.name == "dot_general" and avals[0].dtype.itemsize == 1:
        return False
    keeps = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return primitive.name == ATTENTION or bool(keeps(primitive, *avals, **params))


# What a segment keeps for the backward pass: everything; the results of projections
# (dots without batch dims); nothing.
POLICIES: dict[str, Any] = {
    "none": None,
    "dots": _projections,
    "full": jax.checkpoint_policies.nothing_saveable,
}
MEANINGS = {
    "none": "keeps every activation that the backward pass needs",
    "dots": "keeps the results of projections and computes the rest again",
    "full": "keeps what enters each layer and computes the layer again",
}

# Bytes that are not worth a second run. Assumption.
SMALL = 2**16

# A loop's body is run again if it computes this many times the bytes that it carries.
# Assumption: a layer does, a cell of a recurrent network does not.
LAYER_BY_CARRIED = 4

# Equations before and after a boundary that may not have less alive. Assumption.
VALLEY = 3

# A boundary may have this many times the bytes of the first quartile of all valleys:
# the residual stream has, the scores between two products of attention have not.
# Assumption.
MOST_BY_LOW_VALLEY = 2


def rematerialized(function: Callable, policy: str) -> Callable:
    """Return a function that keeps less for its backward pass.

    Its values and gradients stay the same.

    Args:
      function: of arrays in pytrees; what depends on the first argument alone, such as
        cast parameters, is kept.
      policy: one of `POLICIES`.
    """
    if policy == "none":
        return function

    def forward(*args: Any) -> Any:
        program, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        parameters = len(jax.tree.leaves(args[0]))
        leaves = jax.tree.leaves(args)
        results = _run(program, leaves, parameters, POLICIES[policy])
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return forward


def boundaries(
    jaxpr: Any,
    parameters: int,
) -> list[int]:
    """Choose the places at which straight code is cut.

    Loops are left to themselves: a program that has one worth a second run is not cut.

    Args:
      jaxpr: the program.
      parameters: the number of its inputs that are parameters.

    Returns:
      Numbers of equations before which it is cut, 0 and their count among them.
    """
    count = len(jaxpr.eqns)
    fixed = _fixed(jaxpr, parameters)
    sizes = _bytes_made(jaxpr, fixed)
    total = sum(sizes)
    if total < SMALL or any(map(_is_worthwhile, jaxpr.eqns)):
        return [0, count]

    alive = _bytes_alive(jaxpr, fixed)
    valleys = [place for place in range(1, count) if _is_valley(alive, place)]
    if not valleys:
        return [0, count]
    depths = sorted(alive[place] for place in valleys)
    low = depths[len(depths) // 4]
    valleys = [place for place in valleys if alive[place] <= MOST_BY_LOW_VALLEY * low]

    boundary = sum(alive[place] for place in valleys) / len(valleys)
    segments = max(2, round(math.sqrt(total / boundary)))
    cuts = [0]
    filled = 0
    for place in range(1, count):
        filled += sizes[place - 1]
        if place in valleys and filled >= total / segments:
            cuts.append(place)
            filled = 0
    return [*cuts, count]


# ---- sizes ----


def _fixed(
    jaxpr: Any,
    parameters: int,
) -> set[Any]:
    """Return the variables that the parameters alone decide: they are there anyway."""
    fixed = {*jaxpr.invars[:parameters], *jaxpr.constvars}
    for eqn in jaxpr.eqns:
        if all(variable in fixed for variable in _variables(eqn.invars)):
            fixed.update(eqn.outvars)
    return fixed


def _bytes_made(
    jaxpr: Any,
    fixed: set[Any],
) -> list[int]:
    """Return the bytes that each equation makes, but for what is fixed."""
    sizes = []
    for eqn in jaxpr.eqns:
        own = [variable for variable in eqn.outvars if variable not in fixed]
        sizes.append(sum(map(_bytes, own)))
    return sizes


def _bytes_alive(
    jaxpr: Any,
    fixed: set[Any],
) -> list[int]:
    """Return the bytes that are alive before each equation, and after the last one.

    A variable is alive after the equation that makes it, up to the last one that uses
    it. Inputs, results and what is fixed do not count.
    """
    last_use = _last_uses(jaxpr.eqns)
    change = [0] * (len(jaxpr.eqns) + 1)
    for number, eqn in enumerate(jaxpr.eqns):
        for variable in eqn.outvars:
            if variable in last_use and variable not in fixed:
                change[number + 1] += _bytes(variable)
                change[last_use[variable] + 1] -= _bytes(variable)
    return list(itertools.accumulate(change))


def _is_valley(
    alive: list[int],
    place: int,
) -> bool:
    """Whether nowhere near a place less is alive, but something is."""
    first = max(1, place - VALLEY)
    near = alive[first : place + VALLEY + 1]
    return 0 < alive[place] <= min(near)


def _is_worthwhile(eqn: Any) -> bool:
    """Whether an equation is a loop whose body computes more than it carries.

    Such a body is a layer, not a cell of a recurrent network's state update.
    """
    if eqn.primitive.name != "scan" or eqn.params["length"] < 2:
        return False
    body = eqn.params["jaxpr"].jaxpr
    carried = sum(map(_bytes, _variables(body.outvars)))
    computed = 0
    for inner in body.eqns:
        computed += sum(map(_bytes, inner.outvars))
    return computed > max(SMALL, LAYER_BY_CARRIED * carried)


def _bytes(variable: Any) -> int:
    aval = variable.aval
    if not hasattr(aval, "size") or not hasattr(aval.dtype, "itemsize"):
        return 0
    return aval.size * aval.dtype.itemsize


# ---- running a program in segments ----


def _run(
    program: ClosedJaxpr,
    leaves: list[Any],
    parameters: int,
    policy: Any,
) -> list[Any]:
    jaxpr = program.jaxpr
    env = _environment(program, leaves)
    bounds = boundaries(jaxpr, parameters)
    last_use = _last_uses(jaxpr.eqns)
    for variable in _variables(jaxpr.outvars):
        last_use[variable] = len(jaxpr.eqns)

    *segments, last = itertools.pairwise(bounds)
    for start, stop in segments:
        eqns = jaxpr.eqns[start:stop]
        outvars = {variable for eqn in eqns for variable in eqn.outvars}
        wanted = {v for v in outvars if last_use.get(v, -1) >= stop}
        _checkpointed(eqns, env, wanted, policy)

    # the backward pass begins here: what this segment keeps, it frees at once
    start, stop = last
    _equations(jaxpr.eqns[start:stop], env, policy)
    return _read(jaxpr.outvars, env)


def _checkpointed(
    eqns: Sequence[Any],
    env: dict[Any, Any],
    wanted: set,
    policy: Any,
    prevent_cse: bool = True,
) -> None:
    """Run equations under `jax.checkpoint`, those with effects apart.

    The backward pass runs again what is under `jax.checkpoint`: a print would print
    twice, and JAX refuses other callbacks there. So an equation with effects is run
    outside. One with results divides the equations; one without, such as a print,
    does not: its operands are given out, and it runs after the others.

    Args:
      eqns: the equations.
      env: variable to its value; filled.
      wanted: the variables that are needed afterwards.
      policy: what is kept, as `jax.checkpoint` takes it.
      prevent_cse: as in `jax.checkpoint`.
    """
    dividing = [i for i, eqn in enumerate(eqns) if eqn.effects and eqn.outvars]
    start = 0
    for stop in dividing:
        later = wanted | _operands(eqns[stop:]).keys()
        _piece(eqns[start:stop], env, later, policy, prevent_cse)
        _equations([eqns[stop]], env, None)
        start = stop + 1
    _piece(eqns[start:], env, wanted, policy, prevent_cse)


def _piece(
    eqns: Sequence[Any],
    env: dict[Any, Any],
    wanted: set,
    policy: Any,
    prevent_cse: bool,
) -> None:
    """Run equations under `jax.checkpoint`, then those that only have effects."""
    pure = [eqn for eqn in eqns if not eqn.effects]
    effectful = [eqn for eqn in eqns if eqn.effects]
    outvars = dict.fromkeys(variable for eqn in pure for variable in eqn.outvars)
    needs = [variable for variable in _operands(pure) if variable not in outvars]
    wanted = wanted | _operands(effectful).keys()
    gives = [variable for variable in outvars if variable in wanted]

    def segment(*values: Any) -> list[Any]:
        inside = dict(zip(needs, values, strict=True))
        _equations(pure, inside, None)
        return [inside[v] for v in gives]

    if gives:
        run = jax.checkpoint(
            segment,
            policy=policy,
            prevent_cse=prevent_cse,
        )
        results = run(*(env[v] for v in needs))
        env.update(zip(gives, results, strict=True))
    _equations(effectful, env, None)


def _equations(
    eqns: Iterable[Any],
    env: dict[Any, Any],
    policy: Any,
) -> None:
    """Run equations in an environment, which their results are added to.

    Args:
      eqns: the equations.
      env: variable to its value.
      policy: for the bodies of loops; None: they run as they are.
    """
    for eqn in eqns:
        operands = _read(eqn.invars, env)
        with at_source(eqn, ()):
            if policy is not None and _is_worthwhile(eqn):
                results = _scan(eqn, operands, policy)
            else:
                params = eqn.primitive.get_bind_params(eqn.params)
                results = eqn.primitive.bind(*operands, **params)
        if not eqn.primitive.multiple_results:
            results = [results]
        env.update(zip(eqn.outvars, results, strict=True))


def _scan(
    eqn: Any,
    operands: list[Any],
    policy: Any,
) -> list[Any]:
    """Run a loop with its body under `jax.checkpoint`."""
    program = eqn.params["jaxpr"]
    if program.effects:
        run: Callable = partial(_with_effects_apart, program, policy)
    else:
        # a loop's body can't be merged with another's, so CSE need not be prevented
        plain = partial(
            jax.core.eval_jaxpr,
            program.jaxpr,
            program.consts,
        )
        run = jax.checkpoint(plain, policy=policy, prevent_cse=False)

    consts, carried = scan_counts(eqn)
    constants = operands[:consts]

    def body(
        carry: list[Any],
        slices: list[Any],
    ) -> tuple[list[Any], list[Any]]:
        results = run(*constants, *carry, *slices)
        return results[:carried], results[carried:]

    carry, stacked = jax.lax.scan(
        body,
        operands[consts : consts + carried],
        operands[consts + carried :],
        length=eqn.params["length"],
        reverse=eqn.params["reverse"],
        unroll=eqn.params["unroll"],
    )
    return [*carry, *stacked]


def _with_effects_apart(
    program: ClosedJaxpr,
    policy: Any,
    *args: Any,
) -> list[Any]:
    """Run a loop's body under `jax.checkpoint`, but for what has effects."""
    jaxpr = program.jaxpr
    env = _environment(program, args)
    wanted = set(_variables(jaxpr.outvars))
    _checkpointed(
        jaxpr.eqns,
        env,
        wanted,
        policy,
        prevent_cse=False,
    )
    return _read(jaxpr.outvars, env)


# ---- variables ----


def _variables(
    atoms: Iterable[Any],
) -> list[Any]:
    """List the variables among some variables and literals."""
    return [atom for atom in atoms if not isinstance(atom, Literal)]


def _operands(
    eqns: Iterable[Any],
) -> dict[Any, None]:
    """Return the variables that equations read, in their order, as keys."""
    operands: dict[Any, None] = {}
    for eqn in eqns:
        operands.update(dict.fromkeys(_variables(eqn.invars)))
    return operands


def _last_uses(
    eqns: Iterable[Any],
) -> dict[Any, int]:
    """Return the number of the last equation that reads each variable."""
    last: dict[Any, int] = {}
    for number, eqn in enumerate(eqns):
        last.update(dict.fromkeys(_variables(eqn.invars), number))
    return last


def _environment(
    program: ClosedJaxpr,
    args: Iterable[Any],
) -> dict[Any, Any]:
    """Return the values of a program's constants and inputs."""
    jaxpr = program.jaxpr
    env: dict[Any, Any] = {}
    env.update(
        zip(
            jaxpr.constvars,
            program.consts,
            strict=True,
        )
    )
    env.update(zip(jaxpr.invars, args, strict=True))
    return env


def _read(
    atoms: Iterable[Any],
    env: dict[Any, Any],
) -> list[Any]:
    return [atom.val if isinstance(atom, Literal) else env[atom] for atom in atoms]
