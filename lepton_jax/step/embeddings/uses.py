"""How a program uses its parameters: to look rows up, or in another way.

>>> import jax, jax.numpy as jnp
>>> def loss(table, kernel, ids):
...     return (table[ids] @ kernel).sum()
>>> shapes = [jax.ShapeDtypeStruct(shape, "float32") for shape in ((8, 4), (4, 2))]
>>> program = jax.make_jaxpr(loss)(*shapes, jnp.array([5, 2, 5]))
>>> for use in uses(program.jaxpr, parameters=2):
...     print(use.lookups, use.ids, len(use.others))
1 3 0
0 0 1
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lepton_jax.compat import ClosedJaxpr, Jaxpr, Literal, source_line

# operations on a table that give one whose rows are those of the former, one by one
BY_ROW = ("convert_element_type", "copy", "neg", "reduce_precision", "stop_gradient")
# calls that are looked into: primitive name to the parameter that holds the jaxpr
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
}
# those of them that are run again in the backward pass
REMATERIALIZED = ("remat2", "checkpoint")


@dataclass
class Use:
    """How a program uses one parameter.

    Attributes:
      lookups: how often it looks rows of it up.
      ids: how many rows it looks up in all.
      others: other uses, and lookups that can't be rewritten, in words.
    """

    lookups: int = 0
    ids: int = 0
    others: list[str] = field(default_factory=list)


def uses(
    jaxpr: Jaxpr,
    parameters: int,
) -> list[Use]:
    """Return the use of each of the first inputs of a program.

    Args:
      jaxpr: the program.
      parameters: the number of these inputs.
    """
    found = [Use() for _ in range(parameters)]
    walk = _Walk(found)
    known = {variable: i for i, variable in enumerate(jaxpr.invars[:parameters])}
    walk.through(jaxpr, known, "")
    for variable in jaxpr.outvars:
        if not isinstance(variable, Literal) and variable in known:
            found[known[variable]].others.append("the loss returns it")
    return found


def is_lookup(eqn: Any) -> bool:
    """Whether an equation takes single rows of its first operand."""
    if eqn.primitive.name == "dynamic_slice":
        return eqn.params["slice_sizes"][0] == 1
    if eqn.primitive.name != "gather":
        return False
    numbers = eqn.params["dimension_numbers"]
    return (
        0 in numbers.start_index_map
        and 0 not in numbers.operand_batching_dims
        and eqn.params["slice_sizes"][0] == 1
    )


def called(eqn: Any) -> Any:
    """Return the jaxpr that an equation calls and that is looked into, else None."""
    return eqn.params.get(CALLS.get(eqn.primitive.name))


def opened(jaxpr: ClosedJaxpr | Jaxpr) -> tuple[Jaxpr, list[Any]]:
    """Split the jaxpr of a call into the jaxpr and its constants."""
    if isinstance(jaxpr, ClosedJaxpr):
        return jaxpr.jaxpr, jaxpr.consts
    return jaxpr, []


# ---- internals ----


class _Walk:
    """Follows parameters through a program, and notes their uses."""

    def __init__(
        self,
        found: list[Use],
    ):
        self._found = found

    def through(
        self,
        jaxpr: Jaxpr,
        known: dict[Any, int],
        inside: str,
    ) -> None:
        """Note the uses in a jaxpr.

        Args:
          jaxpr: the jaxpr.
          known: the number of the parameter that a variable is; added to.
          inside: the loop or the like around it, which can't be rewritten.
        """
        for eqn in jaxpr.eqns:
            operands = [
                None if isinstance(v, Literal) else known.get(v) for v in eqn.invars
            ]
            if any(number is not None for number in operands):
                self._note(eqn, operands, known, inside)

    def _note(
        self,
        eqn: Any,
        operands: list[int | None],
        known: dict[Any, int],
        inside: str,
    ) -> None:
        name = eqn.primitive.name
        inner = called(eqn)
        if inner is not None:
            self._note_call(
                eqn,
                opened(inner)[0],
                operands,
                known,
                inside,
            )
        elif name in BY_ROW:
            known[eqn.outvars[0]] = next(x for x in operands if x is not None)
        elif is_lookup(eqn) and operands[0] is not None and operands[1] is None:
            use = self._found[operands[0]]
            use.lookups += 1
            use.ids += math.prod(eqn.invars[1].aval.shape[:-1])
            if inside:
                use.others.append(
                    f"rows are looked up inside of a {inside}, {source_line(eqn)}"
                )
        else:
            self._note_other(eqn, operands)

    def _note_call(
        self,
        eqn: Any,
        jaxpr: Jaxpr,
        operands: list[int | None],
        known: dict[Any, int],
        inside: str,
    ) -> None:
        inner = _paired(jaxpr.invars, operands)
        self.through(jaxpr, inner, inside)
        for outer, result in zip(eqn.outvars, jaxpr.outvars, strict=True):
            if not isinstance(result, Literal) and result in inner:
                known[outer] = inner[result]

    def _note_other(
        self,
        eqn: Any,
        operands: list[int | None],
    ) -> None:
        """Note an operation that needs more of a parameter than single rows."""
        name = eqn.primitive.name
        bodies = list(_bodies(eqn))
        for number in {x for x in operands if x is not None} if not bodies else ():
            text = f"{name} takes all of it, {source_line(eqn)}"
            self._found[number].others.append(text)
        for body in bodies:
            before = [(use.lookups, len(use.others)) for use in self._found]
            # a conditional's first operand chooses the branch
            given = operands[len(operands) - len(body.invars) :]
            self.through(
                body,
                _paired(body.invars, given),
                name,
            )
            for number in {x for x in operands if x is not None}:
                use = self._found[number]
                if (use.lookups, len(use.others)) == before[number]:
                    use.others.append(f"a {name} takes it, {source_line(eqn)}")


def _paired(
    variables: Any,
    operands: list[int | None],
) -> dict[Any, int]:
    pairs = zip(variables, operands, strict=False)
    return {v: number for v, number in pairs if number is not None}


def _bodies(eqn: Any) -> Iterator[Jaxpr]:
    for value in eqn.params.values():
        candidates = value if isinstance(value, tuple | list) else (value,)
        for candidate in candidates:
            if isinstance(candidate, ClosedJaxpr | Jaxpr):
                yield opened(candidate)[0]
