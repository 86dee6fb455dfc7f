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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lepton_jax.compat import ClosedJaxpr, Literal, scan_counts
from lepton_jax.planner.rewrite.program import (
    Env,
    Replaced,
    Uses,
    bind,
    constants_of,
    operands_of,
    read,
    read_all,
    retraced,
    run_equations,
    shape_of_operand,
    shape_of_result,
    variables_of,
    write,
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

    def rule(eqn: Any, env: Env) -> Replaced:
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

    def columns(self, eqn: Any) -> tuple[int, int]:
        """Return where the columns of one of the products begin and end."""
        start = 0
        for own in self.eqns:
            width = _width(own)
            if own is eqn:
                break
            start += width
        return start, start + width


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
        leaving = [*self.inputs, *self.sums, *self.results]
        self.gains = not eqn.effects and bool(leaving or self.products)

    # ---- what leaves ----

    def _classified(self) -> dict[Any, int]:
        kinds: dict[Any, int] = {}
        kinds.update(dict.fromkeys(self.body.jaxpr.constvars, SAME))
        kinds.update(dict.fromkeys(self.constants, SAME))
        kinds.update(dict.fromkeys(self.carry, CARRIED))
        kinds.update(dict.fromkeys(self.slices, SLICED))
        for eqn in self.body.jaxpr.eqns:
            inputs = [kinds[v] for v in variables_of(eqn.invars)]
            kind = max(inputs, default=SAME)
            kinds.update(dict.fromkeys(eqn.outvars, kind))
        return kinds

    def _kind(self, variable: Any) -> int:
        if isinstance(variable, Literal):
            return SAME
        return self.kinds[variable]

    def _kinds_of(self, eqn: Any) -> list[int]:
        """Return the kinds of an equation's operands."""
        return [self._kind(operand) for operand in eqn.invars]

    def _inputs(self) -> list[Any]:
        """Return products of slices with kernels."""
        found = []
        for eqn in self.body.jaxpr.eqns:
            if sorted(self._kinds_of(eqn)) != [SAME, SLICED]:
                continue
            if _is_plain_product(eqn) and self._is_simple(eqn):
                found.append(eqn)
        return found

    def _is_simple(self, eqn: Any) -> bool:
        """Whether a product is made of slices and constants by simple operations."""
        there = dict.fromkeys([*self.slices, *self.constants])
        eqns = self._ancestors([eqn], there, {})
        return all(_is_simple(inner) for inner in eqns)

    def _sums(self) -> list[_Sum]:
        """Return carried sums that are only added to."""
        found = []
        for number, variable in enumerate(self.carry):
            user = self.uses.only_user(variable)
            if user is None or user.primitive.name not in SUMS:
                continue
            result = self.next[number]
            if user.outvars[0] is not result or not self._is_only_carried(result):
                continue
            left, right = user.invars
            added = right if left is variable else left
            term = self._term(number, added)
            if term is not None:
                found.append(term)
        return found

    def _is_only_carried(self, result: Any) -> bool:
        """Whether a result goes to the next step alone."""
        alike = [other for other in self.body.jaxpr.outvars if other is result]
        return len(alike) == 1 and not self.uses.users(result)

    def _term(self, number: int, added: Any) -> _Sum | None:
        """Return the product, or sum over a batch, that is added at each step."""
        after: list[Any] = []
        eqn = self.uses.made_by(added, "transpose", "dot_general", "reduce_sum")
        while self._has_one_use(eqn) and eqn.primitive.name == "transpose":
            after.insert(0, eqn)
            eqn = self.uses.made_by(eqn.invars[0], "transpose", "dot_general")
        if not self._has_one_use(eqn) or SAME in self._kinds_of(eqn):
            return None

        is_sum = eqn.primitive.name == "reduce_sum"
        if is_sum or _is_plain_product(eqn):
            return _Sum(number, eqn, tuple(after))
        return None

    def _has_one_use(self, eqn: Any) -> bool:
        """Whether an equation is there, and one other uses its result."""
        if eqn is None:
            return False
        return self.uses.only_user(eqn.outvars[0]) is not None

    def _results(self) -> list[Any]:
        """Return equations, from a product on, that only stacked results need."""
        leaving: list[Any] = []
        made: set[Any] = set()  # by those
        free = self._free() - _ids(self.inputs)
        for eqn in self.body.jaxpr.eqns:
            if id(eqn) not in free:
                continue
            kinds = sorted(self._kinds_of(eqn))
            begins = _is_plain_product(eqn) and kinds == [SAME, CARRIED]
            if begins or not made.isdisjoint(variables_of(eqn.invars)):
                leaving.append(eqn)
                made.update(eqn.outvars)
        return leaving

    def _free(self) -> set[int]:
        """Return the ids of simple equations that the next step does not need."""
        free: set[int] = set()
        needed = set(variables_of(self.next))
        for eqn in reversed(self.body.jaxpr.eqns):
            if not _is_simple(eqn) or not needed.isdisjoint(eqn.outvars):
                continue
            users = [user for v in eqn.outvars for user in self.uses.users(v)]
            if _ids(users) <= free:
                free.add(id(eqn))
        return free

    def _products(self) -> dict[int, _Product]:
        """Return products with kernels that stay in the loop, by their equations' ids.

        Only those that are shared, or whose kernels enter transposed.
        """
        gone = _ids([*self.inputs, *self.results])
        shared: dict[Any, _Product] = {}
        for eqn in self.body.jaxpr.eqns:
            if id(eqn) in gone or not _is_kernel_product(eqn):
                continue
            if self._kinds_of(eqn) != [CARRIED, SAME]:
                continue
            left = eqn.invars[0]
            contracted, _ = eqn.params["dimension_numbers"]
            dims = tuple(contracted[0])
            product = shared.setdefault((left, dims), _Product(left, dims))
            product.eqns.append(eqn)

        products = {}
        for product in shared.values():
            if len(product.eqns) > 1 or _enters_transposed(product.eqns[0]):
                products.update(dict.fromkeys(_ids(product.eqns), product))
        return products

    # ---- running it ----

    def run(self, operands: Sequence[Any]) -> list[Any]:
        """Run the loop on its operands, and what left it before and after."""
        first = self.consts + self.carried
        same = self._constants(operands)
        stacks: Env = {}
        write(stacks, self.slices, operands[first:])
        for eqn in self.inputs:
            eqns = self._ancestors([eqn], stacks, same)
            [product] = self._over_steps(eqns, eqn.outvars, stacks, same)
            stacks[eqn.outvars[0]] = product

        given = operands[self.consts : first]
        carry = self._run_rest(given, stacks, same)
        for term in self.sums:
            before = given[term.number]
            carry[term.number] = before + self._total(term, stacks)
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
            write(env, carried, carry)
            write(env, scanned, slices)
            run_equations(eqns, env, self._shared(kernels))
            return read_all(env, results), read_all(env, emitted)

        last, more = lax.scan(
            step,
            [given[number] for number in numbers],
            read_all(stacks, scanned),
            length=self.eqn.params["length"],
            reverse=self.eqn.params["reverse"],
            unroll=self.eqn.params["unroll"],
        )
        write(stacks, emitted, more)
        return dict(zip(numbers, last, strict=True))

    def _constants(self, operands: Sequence[Any]) -> Env:
        """Return the values that are the same at each step."""
        same = constants_of(self.body)
        write(same, self.constants, operands[: self.consts])
        self._run_same(same)
        return same

    def _run_same(self, same: Env) -> None:
        """Compute before the loop what is the same at each step and goes to a product.

        The rest stays, as XLA makes it of nothing where it is used.
        """
        wanted: set[Any] = set()
        for eqn in [*self.inputs, *self.results, *self._all_products()]:
            wanted.update(variables_of(eqn.invars))
        eqns = []
        for eqn in reversed(self.body.jaxpr.eqns):
            made = [v for v in eqn.outvars if v in wanted]
            if made and self.kinds[made[0]] == SAME:
                eqns.append(eqn)
                wanted.update(variables_of(eqn.invars))
        run_equations(reversed(eqns), same)

    def _all_products(self) -> list[Any]:
        by_id = {}
        for product in self.products.values():
            by_id.update({id(eqn): eqn for eqn in product.eqns})
        return list(by_id.values())

    def _ancestors(self, eqns: list[Any], stacks: Env, same: Env) -> list[Any]:
        """Return equations and those before them, up to values that are there."""
        wanted: set[Any] = set()
        there = {*stacks, *same}
        chosen = _ids(eqns)
        found = []
        for eqn in reversed(self.body.jaxpr.eqns):
            is_wanted = not wanted.isdisjoint(eqn.outvars)
            if is_wanted or id(eqn) in chosen:
                found.append(eqn)
                wanted.update(variables_of(eqn.invars))
                wanted -= there
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
            env = dict(same)
            write(env, names, values)
            run_equations(eqns, env)
            return read_all(env, results)

        return jax.vmap(at_step)(read_all(stacks, names))

    def _emitted(self, stacks: Env) -> list[Any]:
        """Return variables whose values the loop must stack."""
        wanted = variables_of(self.stacked)
        for term in self.sums:
            wanted += term.term.invars
        for eqn in self.results:
            wanted += variables_of(eqn.invars)

        there = self._late_results().union(stacks)
        distinct = dict.fromkeys(wanted)
        return [v for v in distinct if v not in there and self._is_needed(v)]

    def _late_results(self) -> set[Any]:
        """Return what is made after the loop, for all steps at once."""
        return {v for eqn in self.results for v in eqn.outvars}

    def _is_needed(self, variable: Any) -> bool:
        """Whether a variable can't be had outside of the loop."""
        return self._kind(variable) != SAME or variable in self.stacked

    def _remaining(
        self, numbers: list[int], emitted: list[Any], stacks: Env
    ) -> list[Any]:
        """Return the equations that stay in the loop."""
        needed = set(emitted)
        needed.update(variables_of(self.next[n] for n in numbers))
        eqns = []
        for eqn in reversed(self.body.jaxpr.eqns):
            made = needed.intersection(eqn.outvars)
            if made - stacks.keys():
                eqns.append(eqn)
                needed.update(variables_of(eqn.invars))
        return eqns[::-1]

    def _kernels(self, eqns: list[Any], same: Env) -> dict[int, jax.Array]:
        """Return the kernels of each product, side by side, by the product's id."""
        staying = _ids(eqns)
        kernels: dict[int, jax.Array] = {}
        for product in self.products.values():
            if id(product) in kernels or id(product.eqns[0]) not in staying:
                continue
            parts = []
            for eqn in product.eqns:
                kernel = read(same, eqn.invars[1])
                parts.append(_kernel(eqn, kernel))
            whole = jnp.concatenate(parts, 1) if len(parts) > 1 else parts[0]
            # XLA would put the transpose back into the loop.
            kernels[id(product)] = lax.optimization_barrier(whole)
        return kernels

    def _shared(self, kernels: dict[int, jax.Array]) -> Callable[..., Any]:
        """Return a rule that computes products with the same operand at once."""
        done: dict[int, jax.Array] = {}

        def rule(eqn: Any, env: Env) -> Replaced:
            product = self.products.get(id(eqn))
            if product is None or id(product) not in kernels:
                return None
            if id(product) not in done:
                left = _rows(product, read(env, product.left))
                done[id(product)] = left @ kernels[id(product)]

            start, stop = product.columns(eqn)
            y = done[id(product)][:, start:stop]
            return [y.reshape(shape_of_result(eqn))]

        return rule

    def _total(self, term: _Sum, stacks: Env) -> jax.Array:
        """Return what a carried sum gains over all steps."""
        eqn = term.term
        arrays = [stacks[v] for v in eqn.invars]
        if eqn.primitive.name == "reduce_sum":
            axes = _with_steps(eqn.params["axes"])
            return arrays[0].sum(axes)

        (left, right), _ = eqn.params["dimension_numbers"]
        contracted = (_with_steps(left), _with_steps(right))
        numbers = (contracted, ((), ()))
        [total] = bind(eqn, arrays, dimension_numbers=numbers)
        env: Env = {eqn.outvars[0]: total}
        run_equations(term.after, env)
        last = term.after[-1] if term.after else eqn
        return env[last.outvars[0]]

    def _stacked_results(self, stacks: Env, same: Env) -> list[Any]:
        """Return the loop's stacked results."""
        made = self._late_results()
        distinct = dict.fromkeys(variables_of(self.stacked))
        late = [v for v in distinct if v in made]
        if late:
            values = self._over_steps(self.results, late, stacks, same)
            write(stacks, late, values)

        results = []
        outside = self.eqn.outvars[self.carried :]
        for v, outer in zip(self.stacked, outside, strict=True):
            if isinstance(v, Literal):
                aval = outer.aval
                results.append(jnp.full(aval.shape, v.val, aval.dtype))
            else:
                results.append(stacks[v])
        return results


def _ids(eqns: Iterable[Any]) -> set[int]:
    return {id(eqn) for eqn in eqns}


def _is_simple(eqn: Any) -> bool:
    return eqn.primitive.name in SIMPLE


def _with_steps(dims: Sequence[int]) -> tuple[int, ...]:
    """Return dims of a step's value as dims of the stacked values, and theirs."""
    return (0, *(dim + 1 for dim in dims))


def _is_plain_product(eqn: Any) -> bool:
    """Whether an equation is a product of two arrays without batch dims."""
    if eqn.primitive.name != "dot_general":
        return False
    if len(variables_of(eqn.invars)) < len(eqn.invars):
        return False
    (contracted, _), (batch, _) = eqn.params["dimension_numbers"]
    return bool(contracted) and not batch


def _is_kernel_product(eqn: Any) -> bool:
    """Whether an equation multiplies a kernel by rows, contracting their last dims."""
    if not _is_plain_product(eqn):
        return False
    if eqn.params["precision"] is not None:
        return False
    variables = [*eqn.invars, *eqn.outvars]
    dtypes = {variable.aval.dtype for variable in variables}
    if len(dtypes) > 1:
        return False

    (left, right), _ = eqn.params["dimension_numbers"]
    rank = len(shape_of_operand(eqn, 0))
    rows = rank - len(left)
    if rows <= 0 or list(left) != list(range(rows, rank)):
        return False
    return len(right) < len(shape_of_operand(eqn, 1))


def _enters_transposed(eqn: Any) -> bool:
    """Whether a product's kernel has its contracted dims anywhere but first."""
    (_, right), _ = eqn.params["dimension_numbers"]
    return tuple(right) != tuple(range(len(right)))


def _kernel(eqn: Any, kernel: jax.Array) -> jax.Array:
    """Return a product's kernel as a matrix, its contracted dims first."""
    (_, right), _ = eqn.params["dimension_numbers"]
    free = [dim for dim in range(kernel.ndim) if dim not in right]
    rows = math.prod(kernel.shape[dim] for dim in right)
    kernel = kernel.transpose(*right, *free)
    return kernel.reshape(rows, -1)


def _rows(product: _Product, left: jax.Array) -> jax.Array:
    """Return a product's first operand as a matrix, its contracted dims last."""
    terms = math.prod(left.shape[dim] for dim in product.dims)
    return left.reshape(-1, terms)


def _width(eqn: Any) -> int:
    """Return the columns of a product's kernel as a matrix."""
    (_, right), _ = eqn.params["dimension_numbers"]
    shape = shape_of_operand(eqn, 1)
    free = [size for dim, size in enumerate(shape) if dim not in right]
    return math.prod(free)


def _inputs_of(eqns: Sequence[Any], results: Sequence[Any]) -> set[Any]:
    """Return the variables that equations use, and those that are results."""
    used = set(variables_of(results))
    for eqn in eqns:
        used.update(variables_of(eqn.invars))
    return used
