"""Rematerialization value by value: which products a backward pass finds kept.

Between "dots", which keeps the results of all projections, and "full", which keeps
none, lies a policy for each set of them. It is written as a word and the numbers of the
projections, in the order of the program; a loop's body is counted once:

    >>> keeping_of("keep attention,0-2,5")
    Keeping(always=('attention', 0, 1, 2, 5), first=(), turns=0, host=())

What is kept is kept in each turn of a loop, or in its first ones alone:

    >>> keeping_of("keep attention and 0,1 in 20")
    Keeping(always=('attention',), first=(0, 1), turns=20, host=())
    >>> str(Keeping(always=("attention",), first=(0, 1), turns=20))
    'keep attention and 0-1 in 20'

or in the host's memory, from which the backward pass fetches it again:

    >>> keeping_of("keep attention,0-1 and offload 2,3").host
    (2, 3)
    >>> str(Keeping(always=(), host=(0, 1)))
    'offload 0-1'

Attention is one choice for all layers, as its operation keeps two arrays together.

    >>> import jax, jax.numpy as jnp
    >>> def mlp(params, x):
    ...     up, down = params
    ...     return (jnp.tanh(x @ up) @ down).sum()
    >>> params = (jnp.ones((8, 32)), jnp.ones((32, 8)))
    >>> program = jax.make_jaxpr(mlp)(params, jnp.ones((4, 8)))
    >>> [(kept.key, kept.bytes, kept.flops) for kept in values(program.jaxpr, 2)]
    [(0, 512, 2048.0), (1, 0, 0.0)]
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name

from lepton_jax.compat import HOST_MEMORY, Jaxpr, Literal, scan_counts
from lepton_jax.planner.rewrite.attention import ATTENTION
from lepton_jax.planner.rewrite.eight_bits import RESULT
from lepton_jax.planner.rewrite.program import Uses, equations, parts
from lepton_jax.planner.rewrite.staged_attention import STAGED

NUMBERS = r"\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*"
LIST = r"(?:attention|\d+(?:-\d+)?)(?:,\d+(?:-\d+)?)*"
ON_DEVICE = re.compile(rf"keep ({LIST})(?: and ({LIST}) in ([1-9]\d*))?")
ON_HOST = re.compile(rf"offload ({NUMBERS})")
BETWEEN = " and offload "
ALL_ATTENTION = "attention"

# Bytes that are not worth a second run. Assumption.
SMALL = 2**16

# A loop's body is run again if it computes this many times the bytes that it carries.
# Assumption: a layer does, a cell of a recurrent network does not.
LAYER_BY_CARRIED = 4

# what one of the values is called in a program
NAME = "lepton_kept_{}"

# Operations whose derivative reads none of their operands.
LINEAR = {
    "add",
    "add_any",
    "sub",
    "neg",
    "convert_element_type",
    "copy",
    "layout_constraint",
    "name",
    "reduce_precision",
    "reshape",
    "squeeze",
    "transpose",
    "broadcast_in_dim",
    "reduce_sum",
}

Key = int | str


class Keeping(NamedTuple):
    """The values that a policy keeps.

    Attributes:
      always: keys of values that are kept in each turn of their loop.
      first: of those that are kept in the first turns.
      turns: how many these are.
      host: of those that are kept in the host's memory, in each turn.
    """

    always: tuple[Key, ...]
    first: tuple[Key, ...] = ()
    turns: int = 0
    host: tuple[Key, ...] = ()

    def __str__(self) -> str:
        """Return the policy as it is written."""
        parts = []
        if self.always:
            parts.append(f"keep {_listed(self.always)}")
        if self.turns:
            parts.append(f"{_listed(self.first)} in {self.turns}")
        if self.host:
            parts.append(f"offload {_listed(self.host)}")
        return " and ".join(parts)

    @property
    def keys(self) -> tuple[Key, ...]:
        """Keys of all values that are kept somewhere."""
        return (*self.always, *self.first, *self.host)

    def policy(self, turn: int = 0) -> Callable[..., Any]:
        """Return the policy of a loop's turn, as `jax.checkpoint` takes it."""
        keys = self.always
        if turn < self.turns:
            keys = (*self.always, *self.first)
        keeps = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[NAME.format(key) for key in keys],
            names_which_can_be_offloaded=[NAME.format(key) for key in self.host],
            offload_src="device",
            offload_dst=HOST_MEMORY,
        )
        attention = ALL_ATTENTION in keys

        def keeps_it(primitive: Any, *avals: Any, **params: Any) -> Any:
            if primitive.name in (ATTENTION, STAGED):
                return attention
            return keeps(primitive, *avals, **params)

        return keeps_it


class Kept(NamedTuple):
    """A value that a policy may keep.

    Attributes:
      key: its number among the projections, or `ALL_ATTENTION`.
      turns: of the loop that it is in; 1: of none.
      bytes: of it, on all devices and in all turns of its loop.
      flops: that make it, likewise.
      variable: where the program holds it; None: in several places.
      mild: whether "dots" keeps it; an expert's products it does not.
    """

    key: Key
    turns: int
    bytes: int
    flops: float
    variable: Any
    mild: bool = True


def keeping_of(policy: str) -> Keeping:
    """Return what a policy keeps.

    Args:
      policy: written as `Keeping` is.
    """
    device, host = _places(policy)
    keeping = Keeping(())
    if device is not None:
        always, first, turns = device.groups()
        keeping = Keeping(tuple(_keys(always)), tuple(_keys(first)), int(turns or 0))
    if host is not None:
        away = tuple(_keys(host[1]))
        keeping = keeping._replace(host=away)
    return keeping


def is_keeping(policy: str) -> bool:
    """Whether a policy lists what it keeps."""
    device, host = _places(policy)
    if BETWEEN in policy:
        return device is not None and host is not None
    return device is not None or host is not None


def values(
    jaxpr: Jaxpr,
    parameters: int,
    there: Collection[Any] = (),
) -> list[Kept]:
    """List the values of a program that may be kept, see `Kept`.

    A value that no derivative reads costs nothing, and brings nothing: the last product
    of a layer, which is only added to what the next layer is given, is one.

    Args:
      jaxpr: a program to be differentiated, without named parts (`opened`).
      parameters: the number of its inputs that are parameters.
      there: variables that are kept in any case.
    """
    found = []
    attention_bytes = 0
    attention_flops = 0.0
    count = itertools.count()
    for eqn, turns, uses, own in _turned(jaxpr, fixed(jaxpr, parameters)):
        if is_projection(eqn, own):
            result = eqn.outvars[0]
            if result in there or not _is_read(result, uses, there):
                turns = 0
            size = turns * nbytes(result)
            product = _product_of(eqn)
            flops = turns * _flops(product)
            mild = not _batched(product)
            found.append(Kept(next(count), max(turns, 1), size, flops, result, mild))
        for attention in _attentions(eqn):
            attention_bytes += turns * sum(map(nbytes, attention.outvars))
            attention_flops += turns * _attention_flops(attention)
    if attention_bytes:
        found.append(Kept(ALL_ATTENTION, 1, attention_bytes, attention_flops, None))
    return found


def named(jaxpr: Jaxpr, parameters: int, keeping: Keeping) -> dict[Any, str]:
    """Return the names of the variables that a policy keeps."""
    return {
        value.variable: NAME.format(value.key)
        for value in values(jaxpr, parameters)
        if value.key in keeping.keys and value.variable is not None
    }


def with_name(results: Any, eqn: Any, names: dict[Any, str]) -> Any:
    """Return an equation's results, under the name that its first one has."""
    name = names.get(eqn.outvars[0]) if eqn.outvars else None
    if name is None:
        return results
    return [checkpoint_name(results[0], name)]


def is_layer(eqn: Any) -> bool:
    """Whether an equation is a loop whose body computes more than it carries.

    Such a body is a layer, not a cell of a recurrent network's state update.
    """
    if eqn.primitive.name != "scan" or eqn.params["length"] < 2:
        return False
    body = eqn.params["jaxpr"].jaxpr
    carried = sum(nbytes(v) for v in body.outvars if not isinstance(v, Literal))
    computed = 0
    for inner in body.eqns:
        computed += sum(map(nbytes, inner.outvars))
    return computed > max(SMALL, LAYER_BY_CARRIED * carried)


def nbytes(variable: Any) -> int:
    """Return the bytes of a variable on a device; 0 for what is no array."""
    aval = variable.aval
    if not hasattr(aval, "size") or not hasattr(aval.dtype, "itemsize"):
        return 0
    return aval.size * aval.dtype.itemsize


def is_projection(eqn: Any, own: Collection[Any]) -> bool:
    """Whether an equation is a product of a layer, or of experts.

    Args:
      eqn: the equation.
      own: variables that the parameters alone decide.
    """
    product = _product_of(eqn)
    if product is None:
        return False
    by_kernel = any(v in own for v in eqn.invars if not isinstance(v, Literal))
    return by_kernel or not _batched(product)


def fixed(jaxpr: Jaxpr, parameters: int) -> set[Any]:
    """Return the variables that the parameters alone decide: they are there anyway."""
    return _decided(jaxpr, {*jaxpr.invars[:parameters], *jaxpr.constvars})


# ---- internals ----


def _places(policy: str) -> tuple[re.Match | None, re.Match | None]:
    """Return what a policy says of the devices and of the hosts."""
    device, between, host = policy.partition(BETWEEN)
    on_host = f"offload {host}" if between else policy
    return ON_DEVICE.fullmatch(device), ON_HOST.fullmatch(on_host)


def _listed(keys: Iterable[Key]) -> str:
    """Write keys, those in a row as a range."""
    every = set(keys)
    words = [ALL_ATTENTION] if ALL_ATTENTION in every else []
    known = sorted(key for key in every if isinstance(key, int))
    by_run = itertools.groupby(enumerate(known), lambda pair: pair[1] - pair[0])
    for _, pairs in by_run:
        run = [number for _, number in pairs]
        words.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ",".join(words)


def _keys(listed: str | None) -> Iterator[Key]:
    """Read what `_listed` writes; None: nothing."""
    for entry in listed.split(",") if listed else ():
        if entry == ALL_ATTENTION:
            yield entry
            continue
        first, _, last = entry.partition("-")
        yield from range(int(first), int(last or first) + 1)


def _decided(jaxpr: Jaxpr, known: set[Any]) -> set[Any]:
    """Return the variables that some known ones decide."""
    known = set(known)
    eqn: Any
    for eqn in jaxpr.eqns:
        if all(v in known for v in eqn.invars if not isinstance(v, Literal)):
            known.update(eqn.outvars)
    return known


def _turned(
    jaxpr: Jaxpr,
    own: set[Any],
) -> Iterator[tuple[Any, int, Uses, set[Any]]]:
    """Yield equations, and how often each runs, with what is known of variables there.

    The bodies of layers' loops are looked into, those of loops in them are not.

    Args:
      jaxpr: the program.
      own: its variables that the parameters alone decide.

    Yields:
      An equation, its turns, the uses of variables around it, and those of them that
      the parameters decide.
    """
    uses = Uses(jaxpr)
    eqn: Any
    for eqn in jaxpr.eqns:
        yield eqn, 1, uses, own
        if is_layer(eqn):
            body = eqn.params["jaxpr"].jaxpr
            inside = Uses(body)
            decided = _decided(body, set(_handed(eqn, own)))
            for inner in body.eqns:
                yield inner, eqn.params["length"], inside, decided


def _handed(loop: Any, own: set[Any]) -> Iterator[Any]:
    """Yield the inputs of a loop's body that the parameters decide."""
    consts, carried = scan_counts(loop)
    inputs = loop.params["jaxpr"].jaxpr.invars
    for number, (outer, inner) in enumerate(zip(loop.invars, inputs, strict=True)):
        is_carried = consts <= number < consts + carried
        if not is_carried and not isinstance(outer, Literal) and outer in own:
            yield inner


def _product_of(eqn: Any) -> Any:
    """Return the product that an equation is, or that one of 8 bits holds; or None."""
    if eqn.primitive.name == "dot_general":
        return eqn
    if not eqn.primitive.name.startswith("custom_vjp"):
        return None
    inside = [found for inner in parts(eqn) for found in equations(inner)]
    if not any(found.params.get("name") == RESULT for found in inside):
        return None
    return next(found for found in inside if found.primitive.name == "dot_general")


def _batched(eqn: Any) -> bool:
    """Whether a product has batch dims."""
    _, (batch, _) = eqn.params["dimension_numbers"]
    return bool(batch)


def _is_read(variable: Any, uses: Uses, there: Collection[Any]) -> bool:
    """Whether a derivative reads a variable, or what is made of it by linear steps."""
    for user in uses.users(variable):
        if user.primitive.name not in LINEAR:
            return True
        made = user.outvars[0]
        if made not in there and _is_read(made, uses, there):
            return True
    return False


def _attentions(eqn: Any) -> Iterator[Any]:
    """Yield the operations of attention that a call with its own gradient holds."""
    if not eqn.primitive.name.startswith("custom_vjp"):
        return
    for inner in parts(eqn):
        for found in equations(inner):
            if found.primitive.name == ATTENTION:
                yield found


def _flops(eqn: Any) -> float:
    """Return the FLOP of a product."""
    (contracted, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    depth = _product([shape[dim] for dim in contracted])
    return 2.0 * eqn.outvars[0].aval.size * depth


def _attention_flops(eqn: Any) -> float:
    """Return the FLOP of both products of attention; causal: of the half that sees."""
    query, key, *_ = (variable.aval for variable in eqn.invars)
    seen = key.shape[1] / 2 if eqn.params["how"].causal else key.shape[1]
    return 4.0 * query.size * seen


def _product(extents: Sequence[int]) -> int:
    total = 1
    for extent in extents:
        total *= extent
    return total
