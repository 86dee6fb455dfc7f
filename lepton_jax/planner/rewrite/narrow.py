"""A training loss whose large kernels are multiplied in 8 bits.

What is found in the traced loss are the products of a parameter (cast, transposed or
reshaped) with something that is none, in the dtype that the model computes in. Left as
they are:

  small kernels    with fewer than `LEAST_WIDTH` rows or columns
  heads            products after which no other product comes
  routers          products of which something is chosen (`top_k`, `argmax`), and what a
                   model computes in float32 though the recipe says otherwise
  scores           of attention: both operands are activations

    >>> import jax, jax.numpy as jnp
    >>> def loss(params, x, key):
    ...     up, down, head = params
    ...     hidden = jnp.tanh(x @ up)
    ...     return ((hidden @ down + x) @ head).sum(), None
    >>> shapes = (64, 128), (128, 64), (64, 100)
    >>> params = [jax.ShapeDtypeStruct(shape, "bfloat16") for shape in shapes]
    >>> x = jax.ShapeDtypeStruct((4, 64), "bfloat16")
    >>> program = jax.make_jaxpr(loss)(params, x, jax.random.key(0))
    >>> [eqn.invars[1].aval.shape for eqn in find(program, parameters=3)]
    [(64, 128), (128, 64)]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lepton_jax.compat import ClosedJaxpr, Jaxpr, Literal, scan_counts
from lepton_jax.planner.rewrite.eight_bits import FORMATS, How, product
from lepton_jax.planner.rewrite.program import (
    Env,
    bind,
    opened,
    operands_of,
    parts,
    retraced,
    run,
)

# The kinds of products.
KINDS = tuple(FORMATS)
# What follows a kind that a device computes in a wider dtype: "fp8 as float32".
EMULATED = " as "

# Rows and columns of a kernel, at least. Assumption: half a tile of a matrix unit, and
# more than a mixture has experts; below, rounding costs more than the product.
LEAST_WIDTH = 64
# Dtype of the operands: the one in which these precisions compute all else.
COMPUTED_IN = ("bfloat16",)

# Operations whose result is a parameter if their operand is.
KEEPING = {
    "convert_element_type",
    "copy",
    "name",
    "reshape",
    "squeeze",
    "transpose",
}
CHOOSING = {"approx_top_k", "argmax", "argmin", "sort", "top_k"}
# Operations that round an array to 8 bits.
ROUNDING = {
    "abs",
    "broadcast_in_dim",
    "clamp",
    "convert_element_type",
    "div",
    "max",
    "min",
    "mul",
    "reduce_max",
    "round",
}
PRODUCTS = {"dot_general", "conv_general_dilated"}

# The place of the key among the arguments of a training loss.
KEY = 2


def narrowed(function: Callable, products: str) -> Callable:
    """Return a training loss whose large kernels are multiplied in 8 bits.

    Args:
      function: of (params, variables, key, ...); the first are parameters.
      products: a kind, perhaps with the dtype that emulates it: "int8", "fp8 as
        float32"; "": the function stays.
    """
    if not products:
        return function
    kind, _, computed = products.partition(EMULATED)

    def narrow(*args: Any) -> Any:
        program, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        program = opened(program)
        count = len(jax.tree.leaves(args[0]))
        wanted = {id(eqn) for eqn in find(program, count)}
        leaves = jax.tree.leaves(args)
        if wanted:
            salt = jnp.uint32(0)
            if kind == "int8":
                salt = jax.random.bits(args[KEY], (), jnp.uint32)
            rule = _Rule(wanted, kind, computed, salt)
            results = run(program, leaves, rule)
        else:
            results = run(program, leaves)
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return narrow


def find(program: ClosedJaxpr, parameters: int) -> list[Any]:
    """Return the products that are computed in 8 bits, those in loops too.

    Args:
      program: a loss, its named parts opened.
      parameters: its first inputs, which are parameters.
    """
    jaxpr = program.jaxpr
    is_parameter = [n < parameters for n in range(len(jaxpr.invars))]
    leads = [False] * len(jaxpr.outvars)
    return list(_find(jaxpr, is_parameter, leads))


def merged(function: Callable) -> Callable:
    """Return a function that computes nothing twice that it can take from before.

    Queries, keys and values round the same activations. XLA sees that they are one, and
    so must what is priced. What is computed again behind a barrier stays.

    Args:
      function: of arrays in pytrees, with all derivatives taken already.
    """

    def once(*args: Any) -> Any:
        program, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        program = _merged(program)
        results = run(program, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return once


# ---- internals: finding ----


def _find(
    jaxpr: Jaxpr,
    is_parameter: list[bool],
    leads_on: list[bool],
) -> Iterator[Any]:
    """Iterate over the products of a program and its loops.

    Args:
      jaxpr: the program.
      is_parameter: for each input, whether it is a parameter.
      leads_on: for each result, whether a product outside uses it.
    """
    known = {v for v, own in zip(jaxpr.invars, is_parameter, strict=True) if own}
    leads, chosen = _uses(jaxpr, leads_on)
    eqn: Any
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name in KEEPING and eqn.invars[0] in known:
            known.update(eqn.outvars)
        elif name == "scan":
            own = [not isinstance(v, Literal) and v in known for v in eqn.invars]
            consts, carried = scan_counts(eqn)
            own[consts : consts + carried] = [False] * carried
            body = eqn.params["jaxpr"].jaxpr
            further = [True] * carried
            further += [v in leads for v in eqn.outvars[carried:]]
            yield from _find(body, own, further)
        elif name == "dot_general" and _is_projection(eqn, known):
            result = eqn.outvars[0]
            if result in leads and result not in chosen:
                yield eqn


def _uses(jaxpr: Jaxpr, leads_on: list[bool]) -> tuple[set[Any], set[Any]]:
    """Return the variables that lead to a product, and those something is chosen of."""
    results = zip(jaxpr.outvars, leads_on, strict=True)
    leads = {v for v, further in results if further and not isinstance(v, Literal)}
    chosen: set[Any] = set()
    for eqn in reversed(jaxpr.eqns):
        used = [v for v in eqn.invars if not isinstance(v, Literal)]
        multiplies = _multiplies(eqn)
        if multiplies or any(v in leads for v in eqn.outvars):
            leads.update(used)
        if multiplies:
            continue
        if eqn.primitive.name in CHOOSING or any(v in chosen for v in eqn.outvars):
            chosen.update(used)
    return leads, chosen


def _multiplies(eqn: Any) -> bool:
    """Whether an operation is a product, or runs one."""
    if eqn.primitive.name in PRODUCTS:
        return True
    return any(_multiplies(inner) for part in parts(eqn) for inner in part.eqns)


def _is_projection(eqn: Any, known: set[Any]) -> bool:
    """Whether a product is one of a large kernel with something else."""
    left, right = eqn.invars
    of_parameter = [not isinstance(v, Literal) and v in known for v in (left, right)]
    if sum(of_parameter) != 1:
        return False
    if any(v.aval.dtype.name not in COMPUTED_IN for v in (*eqn.invars, *eqn.outvars)):
        return False
    number = of_parameter.index(True)
    shape = eqn.invars[number].aval.shape
    contracted, batch = (sides[number] for sides in eqn.params["dimension_numbers"])
    rows = 1
    columns = 1
    for dim, extent in enumerate(shape):
        if dim in contracted:
            rows *= extent
        elif dim not in batch:
            columns *= extent
    return min(rows, columns) >= LEAST_WIDTH


# ---- internals: replacing ----


class _Rule:
    """Replaces products.

    Args:
      wanted: ids of the equations.
      kind, computed: see `eight_bits.How`.
      salt: of all products; each adds a number of its own.
    """

    def __init__(self, wanted: set[int], kind: str, computed: str, salt: Any):
        self.wanted = wanted
        self.kind = kind
        self.computed = computed
        self.salt = salt
        self.count = 0

    def __call__(self, eqn: Any, env: Env) -> list[Any] | None:
        """See `program.Rule`."""
        if eqn.primitive.name == "scan" and self._is_inside(eqn.params["jaxpr"].jaxpr):
            return self._scan(eqn, operands_of(eqn, env))
        if id(eqn) not in self.wanted:
            return None
        self.count += 1
        # each product draws twice
        salt = self.salt + jnp.uint32(2 * self.count)
        how = How(self.kind, eqn.params["dimension_numbers"], self.computed)
        return [product(*operands_of(eqn, env), salt, how)]

    def _is_inside(self, jaxpr: Jaxpr) -> bool:
        for eqn in jaxpr.eqns:
            if id(eqn) in self.wanted:
                return True
            is_loop = eqn.primitive.name == "scan"
            if is_loop and self._is_inside(eqn.params["jaxpr"].jaxpr):
                return True
        return False

    def _scan(self, eqn: Any, operands: list[Any]) -> list[Any]:
        body = eqn.params["jaxpr"]
        consts, carried = scan_counts(eqn)
        first = consts + carried

        def step(carry: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
            results = run(body, [*operands[:consts], *carry, *slices], self)
            return results[:carried], results[carried:]

        carry, stacked = lax.scan(
            step,
            operands[consts:first],
            operands[first:],
            length=eqn.params["length"],
            reverse=eqn.params["reverse"],
            unroll=eqn.params["unroll"],
        )
        return [*carry, *stacked]


# ---- internals: merging ----


def _merged(program: ClosedJaxpr) -> ClosedJaxpr:
    # By operation: operands and results. The operands stay alive, so no other value
    # can have the identity of one of them.
    known: dict[Any, tuple[list[Any], list[Any]]] = {}

    def rule(eqn: Any, env: Env) -> list[Any] | None:
        operands = operands_of(eqn, env)
        if eqn.primitive.name == "scan":
            return bind(eqn, operands, jaxpr=_merged(eqn.params["jaxpr"]))
        key = _key(eqn, operands)
        if key is None:
            return None
        if key not in known:
            known[key] = operands, bind(eqn, operands)
        return known[key][1]

    return retraced(program, rule)


def _key(eqn: Any, operands: Sequence[Any]) -> Any:
    """Return what makes an operation equal to another; None: it is no part of rounding.

    A number counts by its value, another operand by its identity.
    """
    if eqn.primitive.name not in ROUNDING:
        return None
    used = [
        (v.val.dtype.name if hasattr(v.val, "dtype") else type(v.val), float(v.val))
        if isinstance(v, Literal) and not np.shape(v.val)
        else id(operand)
        for v, operand in zip(eqn.invars, operands, strict=True)
    ]
    return eqn.primitive, tuple(used), str(eqn.params)
