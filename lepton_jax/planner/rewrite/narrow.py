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
    >>> def loss(params, x):
    ...     up, down, head = params
    ...     hidden = jnp.tanh(x @ up)
    ...     return ((hidden @ down + x) @ head).sum(), None
    >>> shapes = (64, 128), (128, 64), (64, 100)
    >>> params = [jax.ShapeDtypeStruct(shape, "bfloat16") for shape in shapes]
    >>> x = jax.ShapeDtypeStruct((4, 64), "bfloat16")
    >>> program = jax.make_jaxpr(loss)(params, x)
    >>> [eqn.invars[1].aval.shape for eqn, _ in find(program, parameters=3)]
    [(64, 128), (128, 64)]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

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


def narrowed(function: Callable, products: str) -> Callable:
    """Return a training loss whose large kernels are multiplied in 8 bits.

    Args:
      function: of arrays in pytrees, the first of which are parameters.
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
        wanted = {id(eqn): number for eqn, number in find(program, count)}
        leaves = jax.tree.leaves(args)
        program = _replaced(program, wanted, kind, computed)
        results = run(program, leaves)
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return narrow


def find(program: ClosedJaxpr, parameters: int) -> list[tuple[Any, int]]:
    """Return the products that are computed in 8 bits, those in loops too.

    Args:
      program: a loss, its named parts opened.
      parameters: its first inputs, which are parameters.

    Returns:
      Each product's operation, and the number of the operand that is its kernel.
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
) -> Iterator[tuple[Any, int]]:
    """Iterate over the products of a program and its loops, see `find`.

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
        elif name == "dot_general":
            result = eqn.outvars[0]
            kernel = _kernel(eqn, known)
            if kernel is not None and result in leads and result not in chosen:
                yield eqn, kernel


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


def _kernel(eqn: Any, known: set[Any]) -> int | None:
    """Return which operand of a product is a large kernel; None: none is, or both."""
    left, right = eqn.invars
    of_parameter = [not isinstance(v, Literal) and v in known for v in (left, right)]
    if sum(of_parameter) != 1:
        return None
    if any(v.aval.dtype.name not in COMPUTED_IN for v in (*eqn.invars, *eqn.outvars)):
        return None
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
    return number if min(rows, columns) >= LEAST_WIDTH else None


# ---- internals: replacing ----


def _replaced(
    program: ClosedJaxpr,
    wanted: Mapping[int, int],
    kind: str,
    computed: str,
) -> ClosedJaxpr:
    """Return a program with some products of 8 bits.

    Args:
      program: the program.
      wanted: id of each product's operation to the operand that is its kernel.
      kind: as in `eight_bits.How`.
      computed: likewise.
    """

    def rule(eqn: Any, env: Env) -> list[Any] | None:
        if eqn.primitive.name == "scan":
            body = _replaced(eqn.params["jaxpr"], wanted, kind, computed)
            return bind(eqn, operands_of(eqn, env), jaxpr=body)
        if id(eqn) not in wanted:
            return None
        dims = eqn.params["dimension_numbers"]
        how = How(kind, dims, computed, wanted[id(eqn)])
        return [product(*operands_of(eqn, env), how)]

    return retraced(program, rule)


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
