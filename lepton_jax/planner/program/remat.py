"""Rematerialization put into a function from outside: parts of its forward pass are run
again in the backward pass.

Which parts: the bodies of loops, and in straight code segments between places where
little is alive (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost": with
a boundary of c bytes and t bytes inside, about sqrt(t / c) of them).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from lepton_jax.compat import ClosedJaxpr, Literal, at_source, scan_counts

# What a segment keeps for the backward pass: everything; the results of projections
# (dots without batch dims); nothing.
POLICIES: dict[str, Any] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
MEANINGS = {
    "none": "keeps every activation that the backward pass needs",
    "dots": "keeps the results of projections and computes the rest again",
    "full": "keeps what enters each layer and computes the layer again",
}
SMALL = 2**16  # bytes that are not worth a second run


def rematerialized(function: Callable, policy: str) -> Callable:
    """`function` with the same values and gradients, which keeps less for the backward
    pass.

    Args:
      function: of arrays in pytrees; what depends on the first argument alone, such as
        cast parameters, is kept.
      policy: one of `POLICIES`.
    """
    if policy == "none":
        return function

    def forward(*args: Any) -> Any:
        leaves = jax.tree.leaves(args)
        program, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        results = _run(
            program,
            leaves,
            len(jax.tree.leaves(args[0])),
            POLICIES[policy],
        )
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return forward


def _run(
    program: ClosedJaxpr,
    leaves: list[Any],
    parameters: int,
    policy: Any,
) -> list[Any]:
    jaxpr = program.jaxpr
    env: dict[Any, Any] = dict(
        zip(
            jaxpr.constvars,
            program.consts,
            strict=True,
        )
    )
    env.update(
        zip(
            jaxpr.invars,
            leaves,
            strict=True,
        )
    )
    bounds = boundaries(jaxpr, parameters)
    last_use = {
        v: i
        for i, eqn in enumerate(jaxpr.eqns)
        for v in eqn.invars
        if not isinstance(v, Literal)
    }
    last_use.update(
        (v, len(jaxpr.eqns)) for v in jaxpr.outvars if not isinstance(v, Literal)
    )
    for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
        eqns = jaxpr.eqns[start:stop]
        # the backward pass begins here: what it keeps, it frees at once
        if number == len(bounds) - 2:
            _equations(eqns, env, policy)
            continue
        wanted = {v for eqn in eqns for v in eqn.outvars if last_use.get(v, -1) >= stop}
        _checkpointed(eqns, env, wanted, policy)
    return [v.val if isinstance(v, Literal) else env[v] for v in jaxpr.outvars]


def _checkpointed(
    eqns: Any,
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
    for stop in [*dividing, len(eqns)]:
        later = wanted | _operands(eqns[stop:]).keys() if stop < len(eqns) else wanted
        _piece(
            eqns[start:stop],
            env,
            later,
            policy,
            prevent_cse,
        )
        _equations(eqns[stop : stop + 1], env, None)
        start = stop + 1


def _piece(
    eqns: Any,
    env: dict[Any, Any],
    wanted: set,
    policy: Any,
    prevent_cse: bool,
) -> None:
    """Run equations under `jax.checkpoint`, then what has effects but no results."""
    pure = [eqn for eqn in eqns if not eqn.effects]
    telling = [eqn for eqn in eqns if eqn.effects]
    if telling:
        wanted = wanted | _operands(telling).keys()
    made = {v for eqn in pure for v in eqn.outvars}
    needs = [v for v in _operands(pure) if v not in made]
    gives = [v for eqn in pure for v in eqn.outvars if v in wanted]

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
    _equations(telling, env, None)


def _operands(eqns: Any) -> dict[Any, None]:
    """The variables that equations read, in their order."""
    return {v: None for eqn in eqns for v in eqn.invars if not isinstance(v, Literal)}


def _equations(
    eqns: Any,
    env: dict[Any, Any],
    policy: Any,
) -> None:
    """Run equations in an environment; the bodies of loops under the policy, where one
    is given.
    """
    for eqn in eqns:
        values = [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]
        with at_source(eqn, ()):
            if policy is not None and _worthwhile(eqn):
                out = _scan(eqn, values, policy)
            else:
                out = eqn.primitive.bind(
                    *values, **eqn.primitive.get_bind_params(eqn.params)
                )
        env.update(
            zip(
                eqn.outvars,
                out if eqn.primitive.multiple_results else [out],
                strict=True,
            )
        )


def _worthwhile(eqn: Any) -> bool:
    """A loop whose body computes more than it carries: a layer, not a cell of a
    recurrent network's state update.
    """
    if eqn.primitive.name != "scan" or eqn.params["length"] < 2:
        return False
    body = eqn.params["jaxpr"].jaxpr
    carried = sum(_bytes(v) for v in body.outvars if not isinstance(v, Literal))
    return sum(_bytes(v) for inner in body.eqns for v in inner.outvars) > max(
        SMALL, 4 * carried
    )


def _scan(
    eqn: Any,
    values: list[Any],
    policy: Any,
) -> list[Any]:
    consts, carried = scan_counts(eqn)
    closed = eqn.params["jaxpr"]
    p = eqn.params

    def plain(*args: Any) -> list[Any]:
        return jax.core.eval_jaxpr(
            closed.jaxpr,
            closed.consts,
            *args,
        )

    # a loop's body can't be merged with another's
    run = jax.checkpoint(
        plain,
        policy=policy,
        prevent_cse=False,
    )
    if closed.effects:
        run = partial(_with_effects_apart, closed, policy)

    def body(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        results = run(
            *values[:consts],
            *carry,
            *xs,
        )
        return results[:carried], results[carried:]

    carry, ys = jax.lax.scan(
        body,
        values[consts : consts + carried],
        values[consts + carried :],
        length=p["length"],
        reverse=p["reverse"],
        unroll=p["unroll"],
    )
    return [*carry, *ys]


def _with_effects_apart(
    closed: ClosedJaxpr,
    policy: Any,
    *args: Any,
) -> list[Any]:
    """Run a loop's body under `jax.checkpoint`, but for what has effects."""
    jaxpr = closed.jaxpr
    env: dict[Any, Any] = dict(
        zip(
            jaxpr.constvars,
            closed.consts,
            strict=True,
        )
    )
    env.update(
        zip(
            jaxpr.invars,
            args,
            strict=True,
        )
    )
    wanted = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
    _checkpointed(
        jaxpr.eqns,
        env,
        wanted,
        policy,
        prevent_cse=False,
    )
    return [v.val if isinstance(v, Literal) else env[v] for v in jaxpr.outvars]


def boundaries(jaxpr: Any, parameters: int) -> list[int]:
    """Where straight code is cut: numbers of equations, 0 and their count among them.

    Loops are left to themselves: a segment ends before one and starts after it.
    """
    count = len(jaxpr.eqns)
    # what the parameters alone decide is there anyway
    fixed = set(jaxpr.invars[:parameters]) | set(jaxpr.constvars)
    for eqn in jaxpr.eqns:
        if all(isinstance(v, Literal) or v in fixed for v in eqn.invars):
            fixed.update(eqn.outvars)
    made = {
        v: i for i, eqn in enumerate(jaxpr.eqns) for v in eqn.outvars if v not in fixed
    }
    last = {
        v: i
        for i, eqn in enumerate(jaxpr.eqns)
        for v in eqn.invars
        if not isinstance(v, Literal)
    }
    change = [0] * (count + 2)
    for v, i in made.items():
        if v in last:
            change[i + 1] += _bytes(v)
            change[last[v] + 1] -= _bytes(v)
    alive: list[int] = []
    for amount in change[: count + 1]:
        alive.append((alive[-1] if alive else 0) + amount)
    loops = [i for i, eqn in enumerate(jaxpr.eqns) if _worthwhile(eqn)]
    inside = sum(_bytes(v) for v in made)
    places = [
        i for i in range(1, count) if 0 < alive[i] <= min(alive[max(1, i - 3) : i + 4])
    ]
    if not places or inside < SMALL or loops:
        return [0, count]
    least = sorted(alive[i] for i in places)[len(places) // 4]
    # the residual stream, not the scores between two products
    places = [i for i in places if alive[i] <= 2 * least]
    pieces = max(
        2, round(math.sqrt(inside / (sum(alive[i] for i in places) / len(places))))
    )
    cuts = [0]
    filled = 0
    for i in range(1, count):
        filled += sum(_bytes(v) for v in jaxpr.eqns[i - 1].outvars if v not in fixed)
        if i in places and filled >= inside / pieces:
            cuts.append(i)
            filled = 0
    return [*cuts, count]


def _bytes(v: Any) -> int:
    return (
        v.aval.size * v.aval.dtype.itemsize
        if hasattr(v.aval, "size") and hasattr(v.aval.dtype, "itemsize")
        else 0
    )
