"""Products that leave a loop over time, and those in it that become one.

JAX differentiates a loop step by step. For a recurrent cell

    h = tanh(x_t @ u + h @ w)

that is three products at each step backward: two for the gradients of u and w, which
are added up in the carry, and one for that of h. XLA's CPU backend runs them as they
stand, some thousand of small ones with a pass over the sums after each. Here

  inputs       products of slices that the carry does not touch, such as x_t @ u, are
               one product over all steps, before the loop
  sums         products that are only added up, such as the gradients of u and w, are
               one product over all steps, after the loop; so are sums over a batch
  results      products that only go into stacked results, such as the gradient of x_t,
               are one product over all steps, after the loop
  shared       products of one operand with several kernels, such as the four gates of a
               cell, are one product with all the kernels side by side
  kernels      kernels that enter a product transposed are transposed before the loop

The terms are the same; their order in a sum is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lepton_jax.compat import ClosedJaxpr, Literal, scan_counts
from lepton_jax.planner.rewrite.program import (
    Env,
    Uses,
    bind,
    operands_of,
    read,
    retraced,
    run_equations,
)

SUMS = ("add_any", "add")
# How a value of a body comes about: it is the same at each step; it is made of a step's
# slices; or of what is carried, too.
SAME = 0
SLICED = 1
CARRIED = 2
# Operations next to a product that may leave the loop with it, for all steps at once.
SIMPLE = {
    *SUMS,
    "broadcast_in_dim",
    "concatenate",
    "convert_element_type",
    "copy",
    "div",
    "dot_general",
    "mul",
    "neg",
    "reduce_sum",
    "reshape",
    "select_n",
    "slice",
    "squeeze",
    "sub",
    "transpose",
}


def is_candidate(eqn: Any) -> bool:
    """Whether an operation is one that the pass may write anew."""
    return eqn.primitive.name == "scan"


def rewrite(program: ClosedJaxpr) -> ClosedJaxpr:
    """Return a flat program with faster loops."""

    def rule(eqn: Any, env: Env) -> list[Any] | None:
        if eqn.primitive.name != "scan":
            return None
        loop = _Loop(eqn)
        if not loop.gains:
            return None
        return loop.run(operands_of(eqn, env))

    return retraced(program, rule)


# ---- internals ----


@dataclass(frozen=True)
class _Sum:
    """A carried sum that leaves the loop.

    Attributes:
      number: of the carried value.
      term: the product, or the sum over a batch, that is added at each step.
      after: equations from it to what is added.
    """

    number: int
    term: Any
    after: tuple[Any, ...] = ()


@dataclass
class _Product:
    """A product in the loop with kernels that are the same at each step.

    Attributes:
      left: variable of the operand.
      dims: its contracted dims.
      eqns: the products, one for each kernel.
    """

    left: Any
    dims: tuple[int, ...]
    eqns: list[Any] = field(default_factory=list)


class _Loop:
    """A scan, and what leaves it.

    Attributes:
      gains: whether there is anything to be rewritten.
    """

    def __init__(self, eqn: Any):
        self.eqn = eqn
        self.body = eqn.params["jaxpr"]
        self.consts, self.carried = scan_counts(eqn)
        jaxpr = self.body.jaxpr
        self.uses = Uses(jaxpr)
        first = self.consts + self.carried
        self.constants = jaxpr.invars[: self.consts]
        self.carry = jaxpr.invars[self.consts : first]
        self.slices = jaxpr.invars[first:]
        self.next = jaxpr.outvars[: self.carried]
        self.stacked = jaxpr.outvars[self.carried :]
        self.kinds = self._classified()

        self.inputs = self._inputs()
        self.sums = self._sums()
        self.results = self._results()
        self.products = self._products()
        self.gains = bool(self.inputs or self.sums or self.results or self.products)
        self.gains &= not eqn.effects

    # ---- what leaves ----

    def _classified(self) -> dict[Any, int]:
        kinds: dict[Any, int] = {}
        kinds.update(dict.fromkeys(self.body.jaxpr.constvars, SAME))
        kinds.update(dict.fromkeys(self.constants, SAME))
        kinds.update(dict.fromkeys(self.carry, CARRIED))
        kinds.update(dict.fromkeys(self.slices, SLICED))
        for eqn in self.body.jaxpr.eqns:
            inputs = (kinds[v] for v in eqn.invars if not isinstance(v, Literal))
            kind = max(inputs, default=SAME)
            kinds.update(dict.fromkeys(eqn.outvars, kind))
        return kinds

    def _kind(self, variable: Any) -> int:
        return SAME if isinstance(variable, Literal) else self.kinds[variable]

    def _inputs(self) -> list[Any]:
        """Return products of slices with kernels."""
        return [
            eqn
            for eqn in self.body.jaxpr.eqns
            if _is_plain_product(eqn)
            and sorted(map(self._kind, eqn.invars)) == [SAME, SLICED]
            and self._is_simple(eqn)
        ]

    def _is_simple(self, eqn: Any) -> bool:
        """Whether a product is made of slices and constants by simple operations."""
        there = dict.fromkeys((*self.slices, *self.constants))
        eqns = self._ancestors([eqn], there, {})
        return all(inner.primitive.name in SIMPLE for inner in eqns)

    def _sums(self) -> list[_Sum]:
        """Return carried sums that are only added to."""
        found = []
        for number, variable in enumerate(self.carry):
            user = self.uses.only_user(variable)
            result = self.next[number]
            if user is None or user.primitive.name not in SUMS:
                continue
            once = sum(1 for other in self.body.jaxpr.outvars if other is result) == 1
            if user.outvars[0] is not result or not once or self.uses.users(result):
                continue
            added = user.invars[1 if user.invars[0] is variable else 0]
            term = self._term(number, added)
            if term is not None:
                found.append(term)
        return found

    def _term(self, number: int, added: Any) -> _Sum | None:
        """Return the product, or sum over a batch, that is added at each step."""
        after: list[Any] = []
        eqn = self.uses.made_by(added, "transpose", "dot_general", "reduce_sum")
        while eqn is not None and self.uses.only_user(eqn.outvars[0]) is not None:
            if eqn.primitive.name == "transpose":
                after.insert(0, eqn)
                names = ("transpose", "dot_general")
                eqn = self.uses.made_by(eqn.invars[0], *names)
                continue
            varies = all(self._kind(v) != SAME for v in eqn.invars)
            is_sum = eqn.primitive.name == "reduce_sum" and not after
            if varies and (is_sum or _is_plain_product(eqn)):
                return _Sum(number, eqn, tuple(after))
            return None
        return None

    def _results(self) -> list[Any]:
        """Return equations, from a product on, that only stacked results need."""
        leaving: set[int] = set()
        free: set[int] = set()
        moved = {id(eqn) for eqn in self.inputs}
        needed = {v for v in self.next if not isinstance(v, Literal)}
        for eqn in reversed(self.body.jaxpr.eqns):
            users = [user for v in eqn.outvars for user in self.uses.users(v)]
            is_free = all(id(user) in free for user in users)
            is_free &= eqn.primitive.name in SIMPLE
            if is_free and not any(v in needed for v in eqn.outvars):
                free.add(id(eqn))
        for eqn in self.body.jaxpr.eqns:
            if id(eqn) not in free or id(eqn) in moved:
                continue
            kinds = sorted(map(self._kind, eqn.invars))
            follows = any(
                id(maker) in leaving
                for v in eqn.invars
                if not isinstance(v, Literal)
                and (maker := self.uses.maker.get(v)) is not None
            )
            if follows or (_is_plain_product(eqn) and kinds == [SAME, CARRIED]):
                leaving.add(id(eqn))
        return [eqn for eqn in self.body.jaxpr.eqns if id(eqn) in leaving]

    def _products(self) -> dict[int, _Product]:
        """Return products with kernels that stay in the loop, by their equations' ids.

        Only those that are shared, or whose kernels enter transposed.
        """
        gone = {id(eqn) for eqn in (*self.inputs, *self.results)}
        shared: dict[Any, _Product] = {}
        for eqn in self.body.jaxpr.eqns:
            if id(eqn) in gone or not _is_kernel_product(eqn):
                continue
            if list(map(self._kind, eqn.invars)) != [CARRIED, SAME]:
                continue
            left = eqn.invars[0]
            dims = tuple(eqn.params["dimension_numbers"][0][0])
            product = shared.setdefault((left, dims), _Product(left, dims))
            product.eqns.append(eqn)
        return {
            id(eqn): product
            for product in shared.values()
            if len(product.eqns) > 1 or _enters_transposed(product.eqns[0])
            for eqn in product.eqns
        }

    # ---- running it ----

    def run(self, operands: Sequence[Any]) -> list[Any]:
        """Run the loop on its operands, and what left it before and after."""
        first = self.consts + self.carried
        same = self._constants(operands)
        stacks: Env = dict(zip(self.slices, operands[first:], strict=True))
        for eqn in self.inputs:
            eqns = self._ancestors([eqn], stacks, same)
            values = self._over_steps(eqns, eqn.outvars, stacks, same)
            stacks[eqn.outvars[0]] = values[0]

        given = operands[self.consts : first]
        carry = self._run_rest(given, stacks, same)
        for term in self.sums:
            carry[term.number] = given[term.number] + self._total(term, stacks)
        after = [carry[number] for number in range(self.carried)]
        return after + self._stacked_results(stacks, same)

    def _run_rest(
        self,
        given: Sequence[Any],
        stacks: Env,
        same: Env,
    ) -> dict[int, Any]:
        """Run what stays in the loop, and add what it stacks to the stacks.

        Returns:
          The carried values after it, by their numbers.
        """
        leaving = {term.number for term in self.sums}
        numbers = [n for n in range(self.carried) if n not in leaving]
        emitted = self._emitted(stacks)
        eqns = self._remaining(numbers, emitted, stacks)
        kernels = self._kernels(eqns, same)
        results = [self.next[number] for number in numbers]
        used = _inputs_of(eqns, [*emitted, *results])
        carried = [self.carry[number] for number in numbers]
        scanned = [v for v in stacks if v in used]

        def step(carry: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
            env = dict(same)
            env.update(zip(carried, carry, strict=True))
            env.update(zip(scanned, slices, strict=True))
            run_equations(eqns, env, self._shared(kernels))
            after = [read(env, v) for v in results]
            return after, [env[v] for v in emitted]

        last, more = lax.scan(
            step,
            [given[number] for number in numbers],
            [stacks[v] for v in scanned],
            length=self.eqn.params["length"],
            reverse=self.eqn.params["reverse"],
            unroll=self.eqn.params["unroll"],
        )
        stacks.update(zip(emitted, more, strict=True))
        return dict(zip(numbers, last, strict=True))

    def _constants(self, operands: Sequence[Any]) -> Env:
        """Return the values that are the same at each step."""
        jaxpr = self.body.jaxpr
        same: Env = dict(zip(jaxpr.constvars, self.body.consts, strict=True))
        given = operands[: self.consts]
        same.update(zip(self.constants, given, strict=True))
        self._run_same(same)
        return same

    def _run_same(self, same: Env) -> None:
        """Compute before the loop what is the same at each step and goes to a product.

        The rest stays, as XLA makes it of nothing where it is used.
        """
        wanted: set[Any] = set()
        for eqn in (*self.inputs, *self.results, *self._all_products()):
            wanted |= {v for v in eqn.invars if not isinstance(v, Literal)}
        eqns = []
        for eqn in reversed(self.body.jaxpr.eqns):
            made = [v for v in eqn.outvars if v in wanted]
            if made and self.kinds[made[0]] == SAME:
                eqns.append(eqn)
                wanted |= {v for v in eqn.invars if not isinstance(v, Literal)}
        run_equations(reversed(eqns), same)

    def _all_products(self) -> list[Any]:
        by_id = {
            id(eqn): eqn for product in self.products.values() for eqn in product.eqns
        }
        return list(by_id.values())

    def _ancestors(self, eqns: list[Any], stacks: Env, same: Env) -> list[Any]:
        """Return equations and those before them, up to values that are there."""
        wanted: set[Any] = set()
        chosen = {id(eqn) for eqn in eqns}
        found = []
        for eqn in reversed(self.body.jaxpr.eqns):
            is_wanted = any(v in wanted for v in eqn.outvars)
            if id(eqn) in chosen or is_wanted:
                found.append(eqn)
                wanted |= {
                    v
                    for v in eqn.invars
                    if not isinstance(v, Literal) and v not in stacks and v not in same
                }
        return found[::-1]

    def _over_steps(
        self,
        eqns: list[Any],
        results: Sequence[Any],
        stacks: Env,
        same: Env,
    ) -> list[Any]:
        """Run equations for all steps at once, on stacked values."""
        used = _inputs_of(eqns, results)
        names = [v for v in stacks if v in used]

        def at_step(values: list[Any]) -> list[Any]:
            env = {**same, **dict(zip(names, values, strict=True))}
            run_equations(eqns, env)
            return [env[v] for v in results]

        return jax.vmap(at_step)([stacks[v] for v in names])

    def _emitted(self, stacks: Env) -> list[Any]:
        """Return variables whose values the loop must stack."""
        gone = {v for eqn in self.results for v in eqn.outvars}
        wanted: list[Any] = [v for v in self.stacked if not isinstance(v, Literal)]
        for term in self.sums:
            wanted += term.term.invars
        for eqn in self.results:
            wanted += [v for v in eqn.invars if not isinstance(v, Literal)]
        return [
            v
            for v in dict.fromkeys(wanted)
            if v not in stacks and v not in gone and self._is_needed(v)
        ]

    def _is_needed(self, variable: Any) -> bool:
        """Whether a variable can't be had outside of the loop."""
        return self._kind(variable) != SAME or variable in self.stacked

    def _remaining(
        self, numbers: list[int], emitted: list[Any], stacks: Env
    ) -> list[Any]:
        """Return the equations that stay in the loop."""
        needed = {*emitted, *(self.next[n] for n in numbers)}
        eqns = []
        for eqn in reversed(self.body.jaxpr.eqns):
            if any(v in needed and v not in stacks for v in eqn.outvars):
                eqns.append(eqn)
                needed |= {v for v in eqn.invars if not isinstance(v, Literal)}
        return eqns[::-1]

    def _kernels(self, eqns: list[Any], same: Env) -> dict[int, jax.Array]:
        """Return the kernels of each product, side by side, by the product's id."""
        staying = {id(eqn) for eqn in eqns}
        kernels: dict[int, jax.Array] = {}
        for product in self.products.values():
            if id(product) in kernels or id(product.eqns[0]) not in staying:
                continue
            parts = [_kernel(eqn, read(same, eqn.invars[1])) for eqn in product.eqns]
            whole = jnp.concatenate(parts, 1) if len(parts) > 1 else parts[0]
            # XLA would put the transpose back into the loop.
            kernels[id(product)] = lax.optimization_barrier(whole)
        return kernels

    def _shared(self, kernels: dict[int, jax.Array]) -> Callable[..., Any]:
        """Return a rule that computes products with the same operand at once."""
        done: dict[int, jax.Array] = {}

        def rule(eqn: Any, env: Env) -> list[Any] | None:
            product = self.products.get(id(eqn))
            if product is None or id(product) not in kernels:
                return None
            if id(product) not in done:
                left = _rows(product, read(env, product.left))
                done[id(product)] = left @ kernels[id(product)]
            place = next(i for i, own in enumerate(product.eqns) if own is eqn)
            widths = [_width(own) for own in product.eqns]
            start = sum(widths[:place])
            y = done[id(product)][:, start : start + widths[place]]
            return [y.reshape(eqn.outvars[0].aval.shape)]

        return rule

    def _total(self, term: _Sum, stacks: Env) -> jax.Array:
        """Return what a carried sum gains over all steps."""
        eqn = term.term
        arrays = [stacks[v] for v in eqn.invars]
        if eqn.primitive.name == "reduce_sum":
            axes = eqn.params["axes"]
            return arrays[0].sum((0, *(axis + 1 for axis in axes)))
        (left, right), _ = eqn.params["dimension_numbers"]
        contracted = (_with_steps(left), _with_steps(right))
        numbers = (contracted, ((), ()))
        total = bind(eqn, arrays, dimension_numbers=numbers)[0]
        env: Env = {eqn.outvars[0]: total}
        run_equations(term.after, env)
        return env[term.after[-1].outvars[0]] if term.after else total

    def _stacked_results(self, stacks: Env, same: Env) -> list[Any]:
        """Return the loop's stacked results."""
        gone = {v for eqn in self.results for v in eqn.outvars}
        late = [v for v in dict.fromkeys(self.stacked) if v in gone]
        if late:
            values = self._over_steps(self.results, late, stacks, same)
            stacks.update(zip(late, values, strict=True))
        pairs = zip(self.stacked, self.eqn.outvars[self.carried :], strict=True)
        return [
            jnp.full(outer.aval.shape, v.val, outer.aval.dtype)
            if isinstance(v, Literal)
            else stacks[v]
            for v, outer in pairs
        ]


def _with_steps(dims: Sequence[int]) -> tuple[int, ...]:
    """Return dims of a step's value as dims of the stacked values, and theirs."""
    return (0, *(dim + 1 for dim in dims))


def _is_plain_product(eqn: Any) -> bool:
    """Whether an equation is a product of two arrays without batch dims."""
    if eqn.primitive.name != "dot_general":
        return False
    if any(isinstance(variable, Literal) for variable in eqn.invars):
        return False
    (contracted, _), (batch, _) = eqn.params["dimension_numbers"]
    return bool(contracted) and not batch


def _is_kernel_product(eqn: Any) -> bool:
    """Whether an equation multiplies a kernel by rows, contracting their last dims."""
    if not _is_plain_product(eqn):
        return False
    (left, right), _ = eqn.params["dimension_numbers"]
    rows = eqn.invars[0].aval.ndim - len(left)
    params = eqn.params
    is_default = params["precision"] is None
    dtypes = {variable.aval.dtype for variable in (*eqn.invars, *eqn.outvars)}
    return (
        rows > 0
        and tuple(left) == tuple(range(rows, rows + len(left)))
        and len(right) < eqn.invars[1].aval.ndim
        and is_default
        and len(dtypes) == 1
    )


def _enters_transposed(eqn: Any) -> bool:
    """Whether a product's kernel has its contracted dims anywhere but first."""
    (_, right), _ = eqn.params["dimension_numbers"]
    return tuple(right) != tuple(range(len(right)))


def _kernel(eqn: Any, kernel: jax.Array) -> jax.Array:
    """Return a product's kernel as a matrix, its contracted dims first."""
    (_, right), _ = eqn.params["dimension_numbers"]
    free = [dim for dim in range(kernel.ndim) if dim not in right]
    rows = math.prod(kernel.shape[dim] for dim in right)
    return kernel.transpose(*right, *free).reshape(rows, -1)


def _rows(product: _Product, left: jax.Array) -> jax.Array:
    """Return a product's first operand as a matrix, its contracted dims last."""
    terms = math.prod(left.shape[dim] for dim in product.dims)
    return left.reshape(-1, terms)


def _width(eqn: Any) -> int:
    """Return the columns of a product's kernel as a matrix."""
    (_, right), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[1].aval.shape
    return math.prod(size for dim, size in enumerate(shape) if dim not in right)


def _inputs_of(eqns: Sequence[Any], results: Sequence[Any]) -> set[Any]:
    """Return the variables that equations use, and those that are results."""
    used = {v for v in results if not isinstance(v, Literal)}
    for eqn in eqns:
        used |= {v for v in eqn.invars if not isinstance(v, Literal)}
    return used
