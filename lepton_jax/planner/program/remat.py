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
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lepton_jax.compat import ClosedJaxpr, Literal, at_source, row_major, scan_counts
from lepton_jax.planner.program import keeping
from lepton_jax.planner.program.keeping import SMALL, is_layer, nbytes
from lepton_jax.planner.rewrite.attention import ATTENTION
from lepton_jax.planner.rewrite.eight_bits import RESULT
from lepton_jax.planner.rewrite.own import OWN
from lepton_jax.planner.rewrite.pipeline import PROJECTION
from lepton_jax.planner.rewrite.program import opened
from lepton_jax.planner.rewrite.staged_attention import STAGED


def _projections(primitive: Any, *avals: Any, **params: Any) -> bool:
    """Whether an operation is a projection, or a kernel that keeps as little.

    Of a product of 8 bits its result is kept, not the sums that it is scaled from.
    """
    if primitive.name == "name":
        return params["name"] == RESULT
    if primitive.name == "dot_general" and avals[0].dtype.itemsize == 1:
        return False
    keeps = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    if params.get("name") == PROJECTION or primitive.name == STAGED:
        return True
    if primitive.name == OWN:
        return params["own"].rule.kept
    return primitive.name == ATTENTION or bool(keeps(primitive, *avals, **params))


# What a segment keeps for the backward pass: everything; the results of projections
# (dots without batch dims); nothing.
# There is one more for each set of projections, see `keeping`.
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


def place(remat: str) -> int:
    """Return the place of a policy among all, the simplest first."""
    order = list(POLICIES)
    return order.index(remat) if remat in order else len(order)


def meaning(remat: str) -> str:
    """Return what a policy keeps, in words."""
    if remat in MEANINGS:
        return MEANINGS[remat]
    return "keeps those of a layer's results that are dearest to compute again"


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
      policy: one of `POLICIES`, or one of `keeping`.
    """
    if policy == "none":
        return function

    def forward(*args: Any) -> Any:
        program, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        parameters = len(jax.tree.leaves(args[0]))
        if keeping.is_keeping(policy):
            program = opened(program)
            kept = keeping.keeping_of(policy)
            names = keeping.named(program.jaxpr, parameters, kept)
            segments = Segments(
                kept.policy(kept.turns),
                names,
                kept.turns,
                kept.policy(),
                row_major=True,
            )
        else:
            segments = Segments(POLICIES[policy])
        leaves = jax.tree.leaves(args)
        results = segments.run(program, leaves, parameters)
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
    own = keeping.fixed(jaxpr, parameters)
    sizes = _bytes_made(jaxpr, own)
    total = sum(sizes)
    if total < SMALL or any(map(is_layer, jaxpr.eqns)):
        return [0, count]

    alive = _bytes_alive(jaxpr, own)
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


def keepable(program: ClosedJaxpr, parameters: int) -> list[keeping.Kept]:
    """List the values of a program that a policy may keep one by one.

    Args:
      program: to be differentiated.
      parameters: the number of its inputs that are parameters.
    """
    jaxpr = opened(program).jaxpr
    *cuts, last, end = boundaries(jaxpr, parameters)
    last_use = _last_uses(jaxpr.eqns)
    there = set()
    for number, eqn in enumerate(jaxpr.eqns):
        after = next((cut for cut in (*cuts, last) if cut > number), end)
        for variable in eqn.outvars:
            if number >= last or last_use.get(variable, -1) >= after:
                there.add(variable)
    return keeping.values(jaxpr, parameters, there)


# ---- sizes ----


def _bytes_made(
    jaxpr: Any,
    fixed: set[Any],
) -> list[int]:
    """Return the bytes that each equation makes, but for what is fixed."""
    sizes = []
    for eqn in jaxpr.eqns:
        own = [variable for variable in eqn.outvars if variable not in fixed]
        sizes.append(sum(map(nbytes, own)))
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
                change[number + 1] += nbytes(variable)
                change[last_use[variable] + 1] -= nbytes(variable)
    return list(itertools.accumulate(change))


def _is_valley(
    alive: list[int],
    place: int,
) -> bool:
    """Whether nowhere near a place less is alive, but something is."""
    first = max(1, place - VALLEY)
    near = alive[first : place + VALLEY + 1]
    return 0 < alive[place] <= min(near)


# ---- running a program in segments ----


@dataclass(frozen=True)
class Segments:
    """A program's forward pass in segments.

    Attributes:
      policy: what they keep, as `jax.checkpoint` takes it.
      names: names of the variables that a policy keeps one by one.
      turns: first turns of a loop that keep more, see `keeping`.
      more: what they keep.
      row_major: whether what a loop's turn hands on lies row by row. Otherwise libtpu
        may lay out what the forward pass stacks and what the backward pass reads in two
        ways, and copy whole stacks: 8 GiB of 35 for an 8B model (libtpu 0.0.42).
    """

    policy: Any
    names: dict[Any, str] = field(default_factory=dict)
    turns: int = 0
    more: Any = None
    row_major: bool = False

    def run(
        self,
        program: ClosedJaxpr,
        leaves: list[Any],
        parameters: int,
    ) -> list[Any]:
        """Run a program."""
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
            self._checkpointed(eqns, env, wanted)

        # the backward pass begins here: what this segment keeps, it frees at once
        start, stop = last
        self._equations(jaxpr.eqns[start:stop], env, loops=True)
        return _read(jaxpr.outvars, env)

    def _checkpointed(
        self,
        eqns: Sequence[Any],
        env: dict[Any, Any],
        wanted: set,
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
          prevent_cse: as in `jax.checkpoint`.
        """
        dividing = [i for i, eqn in enumerate(eqns) if eqn.effects and eqn.outvars]
        start = 0
        for stop in dividing:
            later = wanted | _operands(eqns[stop:]).keys()
            self._piece(eqns[start:stop], env, later, prevent_cse)
            self._equations([eqns[stop]], env)
            start = stop + 1
        self._piece(eqns[start:], env, wanted, prevent_cse)

    def _piece(
        self,
        eqns: Sequence[Any],
        env: dict[Any, Any],
        wanted: set,
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
            self._equations(pure, inside)
            return [inside[v] for v in gives]

        if gives:
            run = jax.checkpoint(
                segment,
                policy=self.policy,
                prevent_cse=prevent_cse,
            )
            results = run(*(env[v] for v in needs))
            env.update(zip(gives, results, strict=True))
        self._equations(effectful, env)

    def _equations(
        self,
        eqns: Iterable[Any],
        env: dict[Any, Any],
        loops: bool = False,
    ) -> None:
        """Run equations in an environment, which their results are added to.

        Args:
          eqns: the equations.
          env: variable to its value.
          loops: whether the bodies of layers' loops are under `jax.checkpoint`.
        """
        for eqn in eqns:
            operands = _read(eqn.invars, env)
            with at_source(eqn, ()):
                if loops and is_layer(eqn):
                    results = self._scan(eqn, operands)
                else:
                    params = eqn.primitive.get_bind_params(eqn.params)
                    results = eqn.primitive.bind(*operands, **params)
            if not eqn.primitive.multiple_results:
                results = [results]
            results = keeping.with_name(results, eqn, self.names)
            env.update(zip(eqn.outvars, results, strict=True))

    def _scan(
        self,
        eqn: Any,
        operands: list[Any],
    ) -> list[Any]:
        """Run a loop with its body under `jax.checkpoint`, or both parts of it."""
        consts, carried = scan_counts(eqn)
        constants = operands[:consts]
        carry = operands[consts : consts + carried]
        slices = operands[consts + carried :]
        length = eqn.params["length"]
        if not self._is_in_two(eqn):
            is_short = 0 < length <= self.turns
            policy = self.more if is_short else self.policy
            body = self._body(eqn, constants, policy)
            carry, stacked = _looped(eqn, body, carry, slices, 0, length)
            return [*carry, *stacked]

        body = self._body(eqn, constants, self.more)
        carry, head = _looped(eqn, body, carry, slices, 0, self.turns)
        body = self._body(eqn, constants, self.policy)
        carry, tail = _looped(eqn, body, carry, slices, self.turns, length)
        stacked = [jnp.concatenate(both) for both in zip(head, tail, strict=True)]
        return [*carry, *stacked]

    def _is_in_two(self, eqn: Any) -> bool:
        """Whether the first turns of a loop keep more than the others."""
        is_short = self.turns >= eqn.params["length"]
        return bool(self.turns) and not is_short and not eqn.params["reverse"]

    def _body(
        self,
        eqn: Any,
        constants: list[Any],
        policy: Any,
    ) -> Callable:
        """Return a loop's body under `jax.checkpoint`."""
        program = eqn.params["jaxpr"]
        _, carried = scan_counts(eqn)
        if program.effects:
            run: Callable = partial(self._with_effects_apart, program)
        else:
            # a loop's body can't be merged with another's: CSE need not be prevented
            run = jax.checkpoint(
                self._plain(program),
                policy=policy,
                prevent_cse=False,
            )

        def body(
            carry: list[Any],
            slices: list[Any],
        ) -> tuple[list[Any], list[Any]]:
            if self.row_major:
                carry = [row_major(x) for x in carry]
            results = run(*constants, *carry, *slices)
            return results[:carried], results[carried:]

        return body

    def _plain(self, program: ClosedJaxpr) -> Callable:
        """Return a loop's body as a function, with names."""
        if not self.names:
            return partial(jax.core.eval_jaxpr, program.jaxpr, program.consts)

        def run(*args: Any) -> list[Any]:
            env = _environment(program, args)
            self._equations(program.jaxpr.eqns, env)
            return _read(program.jaxpr.outvars, env)

        return run

    def _with_effects_apart(
        self,
        program: ClosedJaxpr,
        *args: Any,
    ) -> list[Any]:
        """Run a loop's body under `jax.checkpoint`, but for what has effects."""
        jaxpr = program.jaxpr
        env = _environment(program, args)
        wanted = set(_variables(jaxpr.outvars))
        self._checkpointed(
            jaxpr.eqns,
            env,
            wanted,
            prevent_cse=False,
        )
        return _read(jaxpr.outvars, env)


def _looped(
    eqn: Any,
    body: Callable,
    carry: list[Any],
    slices: list[Any],
    start: int,
    stop: int,
) -> tuple[list[Any], list[Any]]:
    """Run some turns of a loop."""
    length = eqn.params["length"]
    if stop - start < length:
        slices = [array[start:stop] for array in slices]
    return jax.lax.scan(
        body,
        carry,
        slices,
        length=stop - start,
        reverse=eqn.params["reverse"],
        unroll=eqn.params["unroll"],
    )


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
