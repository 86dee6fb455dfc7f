"""Operations that a user brings, each with a rule of how it may be split.

A function with a rule (see `rule.rule`) is one operation forward and one backward:

    >>> import jax, jax.numpy as jnp
    >>> from lepton_jax.planner.rewrite.rule import rule
    >>> @rule("batch width, width -> batch width", whole="width")
    ... def scaled(x, scale):
    ...     return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True)) * scale
    >>> x, scale = jnp.ones((4, 3)), jnp.ones(3)
    >>> program = jax.make_jaxpr(jax.grad(lambda s: scaled(x, s).sum()))(scale)
    >>> names = [eqn.primitive.name for eqn in program.eqns]
    >>> [name for name in names if "own" in name]
    ['own_operation', 'own_operation_gradient']

The gradient is the function's own (`jax.custom_vjp`, or what JAX derives). What its
forward pass keeps for the backward pass are operands, results, and arrays besides.
The planner must know the dims of the latter (`saves`); without, the backward pass runs
the forward pass again.

On several devices each runs the function on its part of the operands. A result that
lacks a split axis is the sum of all devices' parts, and so is a gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from lepton_jax.compat import Literal
from lepton_jax.errors import ModelError
from lepton_jax.planner.rewrite import notation
from lepton_jax.planner.rewrite.notation import Names, Notation
from lepton_jax.trees import with_leaves

# the two operations
OWN = "own_operation"
OWN_GRADIENT = "own_operation_gradient"
OWN_OPERATIONS = (OWN, OWN_GRADIENT)

MAPPED = "mapped"  # how the names of dims that `jax.vmap` adds begin

# platforms for which kernels are compiled; elsewhere they are interpreted
COMPILED = ("tpu", "cuda", "rocm")

# FLOP or bytes of an operation on whole arrays, from the shapes of its operands
Count = Callable[..., float]
Shapes = tuple[jax.ShapeDtypeStruct, ...]


@dataclass(frozen=True)
class Rule:
    """A user's description of an operation; see `rule.rule`.

    Attributes:
      flops, bytes: forward, and backward; None: not said.
      told: options of the function that say where it runs: `interpret`, `platform`.
    """

    name: str
    function: Callable
    notation: Notation
    whole: frozenset[str]
    summed: frozenset[str]
    saves: tuple[Names, ...] | None
    flops: tuple[Count | None, Count | None]
    bytes: tuple[Count | None, Count | None]
    workspace: tuple[Names, ...]
    kept: bool
    told: frozenset[str]


@dataclass(frozen=True)
class Own:
    """One call of an operation, or of its gradient.

    Attributes:
      rule: what the user says of it.
      options: keyword arguments, (name, value).
      shapes: of the operands of the forward pass, whole.
      backward: whether it is the gradient.
      maps: for each `jax.vmap` around it, the dim of each operand; the first one is
        the innermost.
    """

    rule: Rule
    options: tuple[tuple[str, Any], ...]
    shapes: Shapes
    backward: bool = False
    maps: tuple[tuple[int | None, ...], ...] = ()

    @property
    def name(self) -> str:
        """The function's name."""
        return f"{self.rule.name}{' gradient' if self.backward else ''}"

    def dims(self) -> Notation:
        """Return the names of the dims of what it takes and returns."""
        given = _forward_dims(self)
        plan = _plan(self._forward())
        saved = _saved_dims(self)
        if self.backward:
            seen = [given.results[i] for i in plan.results]
            slopes = [given.results[i] for i in plan.slopes]
            inputs = (*given.inputs, *seen, *saved, *slopes)
            real = _of_real(given.inputs, self.shapes)
            given = Notation(inputs, tuple(real))
        else:
            results = (*given.results, *saved)
            given = Notation(given.inputs, results)
        for depth, places in enumerate(self.maps):
            given = _mapped_dims(given, places, f"{MAPPED}{depth}")
        return given

    @property
    def repeats(self) -> bool:
        """Whether it is a gradient that runs the forward pass again for want of a rule.

        It does where the dims of what the forward pass keeps are not known.
        """
        plan = _plan(self._forward())
        return self.backward and plan.sources is None

    def workspace(self) -> tuple[Names, ...]:
        """Return the names of the dims of the arrays that it needs while it runs."""
        return _further_dims(self, self.rule.workspace)

    def whole(self) -> set[str]:
        """Return the names of dims that each device needs whole."""
        given = _forward_dims(self)
        whole = {notation.UNNAMED, *self.rule.whole}
        for own in given.results:
            missing = given.names.difference(own)
            whole |= missing - self.rule.summed
        return whole

    def run(self, platform: str, *arrays: Any) -> list[Any]:
        """Run it on arrays, which may be a device's part.

        Args:
          platform: JAX's name of the backend; "": any.
          *arrays: its operands.
        """
        run: Any = _backward if self.backward else _forward
        call = partial(run, self, platform)
        for places in self.maps:
            call = jax.vmap(call, in_axes=places)
        return list(call(*arrays))

    def before(self) -> Own:
        """Return the forward pass of a gradient."""
        count = len(self.shapes)
        maps = tuple(places[:count] for places in self.maps)
        return replace(self, backward=False, maps=maps)

    def _forward(self) -> Own:
        return replace(self, backward=False, maps=())


def called(own: Own, *arrays: Any) -> Any:
    """Call an operation: an array, or a tuple of them.

    Raises:
      ModelError: it returns other arrays than its rule names.
    """
    _check_results(own)
    results = _differentiated(own, *arrays)
    if _plan(own).several:
        return tuple(results)
    return results[0]


# ---- internals ----


def _check_results(own: Own) -> None:
    named = _forward_dims(own).results
    made = _plan(own).shapes
    if _ranks(made) == list(map(len, named)):
        return
    found = ", ".join(f"{x.dtype}{list(x.shape)}" for x in made)
    raise ModelError(
        f"{own.rule.name!r} returns {found}, and the rule names other dims",
        where="lepton.planner.rule",
        remedy="name each dim of each result behind the arrow",
    )


def shape_of(x: Any) -> jax.ShapeDtypeStruct:
    """Return the shape and dtype of an array or a variable's abstract value."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _is_real(x: Any) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.inexact))


def _of_real(values: Sequence[Any], arrays: Sequence[Any]) -> list[Any]:
    """Return the values that belong to arrays of real numbers, one for each array."""
    pairs = zip(values, arrays, strict=True)
    return [value for value, x in pairs if _is_real(x)]


def _ranks(arrays: Sequence[Any]) -> list[int]:
    return [len(x.shape) for x in arrays]


def _function(own: Own, platform: str) -> Callable[..., tuple]:
    """Return the user's function, which returns a tuple."""
    options = dict(own.options)
    where = {"platform": platform, "interpret": platform not in COMPILED}
    for name in own.rule.told:
        options.setdefault(name, where[name])

    def call(*arrays: Any) -> tuple:
        results = own.rule.function(*arrays, **options)
        if isinstance(results, tuple | list):
            return tuple(results)
        return (results,)

    return call


@dataclass(frozen=True)
class _Plan:
    """The way in which the gradient of an operation gets its arrays.

    Attributes:
      several: whether the function returns a tuple.
      shapes: of its results.
      slopes: numbers of the results that have a gradient.
      results: numbers of the results that the backward pass needs.
      saved: shapes of the arrays that it needs besides operands and results.
      sources: what each array that the backward pass needs is: ("operand", number),
        ("result", number) or ("saved", number); None: it runs the forward pass again.
    """

    several: bool
    shapes: Shapes
    slopes: tuple[int, ...]
    results: tuple[int, ...] = ()
    saved: Shapes = ()
    sources: tuple[tuple[str, int], ...] | None = None


@functools.lru_cache(maxsize=256)
def _plan(own: Own) -> _Plan:
    """Return the plan of an operation's forward pass."""
    function = _function(own, "")

    def plain(*arrays: Any) -> Any:
        options = dict(own.options)
        return own.rule.function(*arrays, **options)

    returned = jax.eval_shape(plain, *own.shapes)
    several = isinstance(returned, tuple | list)
    shapes = tuple(returned) if several else (returned,)
    slopes = tuple(i for i, x in enumerate(shapes) if _is_real(x))
    plan = _Plan(several, shapes, slopes)
    if not slopes or not any(map(_is_real, own.shapes)):
        return plan

    def forward(*arrays: Any) -> Any:
        results, pull = jax.vjp(function, *arrays)
        return results, jax.tree.leaves(pull)

    try:
        program = jax.make_jaxpr(forward)(*own.shapes).jaxpr
    except (NotImplementedError, ValueError, AssertionError):
        return plan  # it has no gradient, which JAX says where one is asked for
    return _with_sources(own, plan, program)


def _with_sources(own: Own, plan: _Plan, program: Any) -> _Plan:
    """Find where the backward pass has each of its arrays from."""
    count = len(plan.shapes)
    outs = list(program.outvars)
    operands = list(program.invars)
    sources = []
    results = []
    saved: list[Any] = []
    for variable in outs[count:]:
        if isinstance(variable, Literal):
            return plan
        if variable in operands:
            sources.append(("operand", operands.index(variable)))
        elif variable in outs[:count]:
            number = outs[:count].index(variable)
            results += [number] if number not in results else []
            sources.append(("result", results.index(number)))
        else:
            saved += [variable] if variable not in saved else []
            sources.append(("saved", saved.index(variable)))
    shapes = tuple(shape_of(variable.aval) for variable in saved)
    if not _names_all(own, shapes):
        return plan
    return _Plan(
        plan.several,
        plan.shapes,
        plan.slopes,
        tuple(results),
        shapes,
        tuple(sources),
    )


def _names_all(own: Own, saved: Shapes) -> bool:
    """Whether the dims of all saved arrays are known; an error where they can't be."""
    named = own.rule.saves
    if named is None:
        return not any(x.shape for x in saved)
    has_any = any(dims[:1] == (notation.ANY,) for dims in named)
    has_ranks = _ranks(saved) == list(map(len, named))
    if has_ranks or (has_any and len(named) == len(saved)):
        return True
    found = ", ".join(f"{x.dtype}{list(x.shape)}" for x in saved) or "nothing"
    raise ModelError(
        f"`saves` of {own.rule.name!r} does not fit what its forward pass keeps"
        f" besides operands and results: {found}",
        where="lepton.planner.rule",
        remedy="name the dims of each of these arrays, or leave out `saves`",
    )


def _forward_dims(own: Own) -> Notation:
    return notation.expanded(own.rule.notation, _ranks(own.shapes))


def _saved_dims(own: Own) -> list[Names]:
    """Return the names of the dims of the saved arrays; scalars have none."""
    saved = _plan(own._forward()).saved
    named = own.rule.saves
    if named is None:
        return [()] * len(saved)
    return list(_further_dims(own, named))


def _further_dims(own: Own, arrays: tuple[Names, ...]) -> tuple[Names, ...]:
    """Return the names of arrays that are neither operands nor results."""
    known = Notation(own.rule.notation.inputs, arrays)
    expanded = notation.expanded(known, _ranks(own.shapes))
    return expanded.results


def _mapped_dims(given: Notation, places: Sequence[int | None], name: str) -> Notation:
    inputs = []
    for own, place in zip(given.inputs, places, strict=True):
        if place is None:
            inputs.append(own)
        else:
            inputs.append((*own[:place], name, *own[place:]))
    results = [(name, *own) for own in given.results]
    return Notation(tuple(inputs), tuple(results))


# ---- internals: what runs ----


def _forward(own: Own, platform: str, *arrays: Any) -> list[Any]:
    """Return the results, and what is saved besides."""
    function = _function(own, platform)
    plan = _plan(own._forward())
    if not plan.saved:
        return list(function(*arrays))
    results, pull = jax.vjp(function, *arrays)
    first: dict[int, Any] = {}
    sources = plan.sources or ()
    for (kind, number), leaf in zip(sources, jax.tree.leaves(pull), strict=True):
        if kind == "saved":
            first.setdefault(number, leaf)
    saved = [first[number] for number in range(len(plan.saved))]
    return [*results, *saved]


def _backward(own: Own, platform: str, *arrays: Any) -> list[Any]:
    """Return the gradients of the operands that have one."""
    function = _function(own, platform)
    plan = _plan(own._forward())
    given = list(arrays)
    operands = _taken(given, len(own.shapes))
    parts = {
        "operand": operands,
        "result": _taken(given, len(plan.results)),
        "saved": _taken(given, len(given) - len(plan.slopes)),
    }
    slopes = iter(given)
    if plan.sources is None:
        # XLA would merge the two runs of the forward pass, and keep what it makes; and
        # it would begin the second one before there are slopes: of three layers in
        # straight code libtpu 0.0.42 held what all of them make (`planner-memory
        # --half tuning --dropless`).
        operands, _ = jax.lax.optimization_barrier((operands, given))
        _, pull = jax.vjp(function, *operands)
    else:
        shapes = jax.eval_shape(partial(_pull_of, function), *operands)
        leaves = [parts[kind][number] for kind, number in plan.sources]
        pull = with_leaves(shapes, leaves)

    cotangents = []
    results = jax.eval_shape(function, *operands)
    for number, x in enumerate(results):
        if number in plan.slopes:
            cotangents.append(next(slopes))
        else:
            nothing = np.zeros(x.shape, jax.dtypes.float0)
            cotangents.append(nothing)
    gradients = pull(tuple(cotangents))
    return _of_real(gradients, operands)


def _taken(arrays: list[Any], count: int) -> list[Any]:
    """Take the first arrays out of a list."""
    taken = arrays[:count]
    del arrays[:count]
    return taken


def _pull_of(function: Callable[..., tuple], *operands: Any) -> Any:
    """Return the backward pass of a function."""
    _, pull = jax.vjp(function, *operands)
    return pull


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiated(own: Own, *arrays: Any) -> list[Any]:
    made = own_p.bind(*arrays, own=own)
    count = len(_plan(own).shapes)
    return made[:count]


def _kept(own: Own, *arrays: Any) -> tuple[list[Any], Any]:
    plan = _plan(own)
    count = len(plan.shapes)
    made = own_p.bind(*arrays, own=own)
    needed = [made[number] for number in plan.results]
    saved = made[count:]
    return made[:count], (arrays, needed, saved)


def _pulled(own: Own, kept: Any, cotangents: Any) -> tuple[Any, ...]:
    arrays, needed, saved = kept
    numbers = _plan(own).slopes
    slopes = [cotangents[number] for number in numbers]
    backward = replace(own, backward=True, maps=())
    operands = [*arrays, *needed, *saved, *slopes]
    made = gradient_p.bind(*operands, own=backward)
    gradients = iter(made)
    return tuple(next(gradients) if _is_real(x) else None for x in arrays)


_differentiated.defvjp(_kept, _pulled)


# ---- internals: the two operations ----


def _operation(name: str) -> Primitive:
    """Return an operation that is compiled as the user's function says."""

    def shapes(*arrays: Any, own: Own) -> list[Any]:
        run = partial(own.run, "")
        made = jax.eval_shape(run, *map(shape_of, arrays))
        return [jax.core.ShapedArray(x.shape, x.dtype) for x in made]

    def run_now(*arrays: Any, own: Own) -> Any:
        bound = partial(primitive.bind, own=own)
        return jax.jit(bound)(*arrays)

    def mapped(arrays: Any, places: Any, *, own: Own) -> Any:
        maps = (*own.maps, tuple(places))
        outer = replace(own, maps=maps)
        made = primitive.bind(*arrays, own=outer)
        return made, [0] * len(made)

    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_abstract_eval(shapes)
    primitive.def_impl(run_now)
    batching.primitive_batchers[primitive] = mapped
    for platform in ("", *COMPILED):

        def run(*arrays: Any, own: Own, platform: str = platform) -> Any:
            return own.run(platform, *arrays)

        lowered = mlir.lower_fun(run, multiple_results=True)
        mlir.register_lowering(primitive, lowered, platform=platform or None)
    return primitive


own_p = _operation(OWN)
gradient_p = _operation(OWN_GRADIENT)
