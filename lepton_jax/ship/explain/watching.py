"""A program run operation by operation, so that its inner values can be seen.

Explanations need values that a model does not return: the weights of its attentions,
the embeddings that it looked up, what its last layer sees. They are found in the traced
program, so that a model needs no hooks, and any module will do:

    a look-up    gather(table, ids)  where ids come of an input, and the table does not
    attention    e / sum(e)  of exponentials e (..., length, length)
    features     what the last product is taken of
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from lepton_jax.compat import Literal
from lepton_jax.ship.programs import called_jaxpr

Names = frozenset[str]
NONE: Names = frozenset()


class Step(NamedTuple):
    """An operation of a program that has just run.

    Attributes:
      name: of its primitive.
      eqn: its equation.
      inputs: values.
      origins: names of the inputs of the program that each of `inputs` depends on.
      makers: name of the operation that made each of `inputs`; "" of an input.
      outputs: values.
    """

    name: str
    eqn: Any
    inputs: Sequence[Any]
    origins: Sequence[Names]
    makers: Sequence[str]
    outputs: list[Any]


# Called after each operation; what it returns takes the place of the outputs.
Visit = Callable[[Step], "list[Any] | None"]


class Known(NamedTuple):
    """A value of a program that runs.

    Attributes:
      value: the array.
      origins: names of the inputs that it depends on.
      maker: name of the operation that made it.
    """

    value: Any
    origins: Names = NONE
    maker: str = ""


def watched(
    function: Callable[[Mapping[str, Any]], Any],
    inputs: Mapping[str, Any],
    visit: Visit,
) -> Any:
    """Run a function of named arrays, and look at each of its operations.

    It can be traced: differentiated, compiled.

    Args:
      function: in JAX.
      inputs: arrays by name.
      visit: called after each operation, those inside of jitted functions included; not
        those inside of loops and branches.

    Returns:
      What the function returns, an array.
    """
    names = sorted(inputs)  # the order in which JAX flattens a dict
    program = jax.make_jaxpr(function)(dict(inputs))
    given = [Known(inputs[name], frozenset((name,))) for name in names]
    constants = [Known(constant) for constant in program.consts]
    (output,) = _run(program.jaxpr, constants, given, visit)
    return output.value


class Seen(NamedTuple):
    """A result of an operation that was looked for.

    Attributes:
      eqn: the operation's equation.
      origins: names of the inputs of the program that its inputs depend on.
      value: the result.
    """

    eqn: Any
    origins: Sequence[Names]
    value: jax.Array


def seeing(
    function: Callable[[Mapping[str, Any]], Any],
    wanted: Callable[[Step], bool],
) -> Callable[[Mapping[str, Any]], list[Seen]]:
    """Return a function to the first result of each operation that is wanted.

    It takes the arrays by name. It is compiled with these results as its own, once for
    each shape of the arrays.

    Args:
      function: in JAX, of named arrays to an array.
      wanted: whether an operation's result is.
    """
    found: list[tuple[Any, Sequence[Names]]] = []

    @jax.jit
    def run(given: Mapping[str, Any]) -> list[Any]:
        values: list[Any] = []
        found.clear()

        def visit(step: Step) -> None:
            if wanted(step):
                found.append((step.eqn, step.origins))
                values.append(step.outputs[0])

        watched(function, given, visit)
        return values

    def look(inputs: Mapping[str, Any]) -> list[Seen]:
        values = run(dict(inputs))
        pairs = zip(found, values, strict=True)
        return [Seen(eqn, origins, value) for (eqn, origins), value in pairs]

    return look


def is_lookup(step: Step) -> bool:
    """Whether rows of a table of weights were looked up by an input's numbers."""
    if step.name != "gather":
        return False
    table, indices = step.origins
    return not table and bool(indices)


def is_attention(step: Step) -> bool:
    """Whether the weights of a self-attention were made: a softmax over the length."""
    if step.name != "div" or step.makers[0] != "exp":
        return False
    shape = step.outputs[0].shape
    return len(shape) >= 3 and shape[-1] == shape[-2] and bool(step.origins[0])


# ---- internals ----


def _run(
    program: Any,
    constants: Sequence[Known],
    given: Sequence[Known],
    visit: Visit,
) -> list[Known]:
    known: dict[Any, Known] = {}
    known.update(zip(program.constvars, constants, strict=True))
    known.update(zip(program.invars, given, strict=True))

    def look_up(x: Any) -> Known:
        return Known(x.val) if isinstance(x, Literal) else known[x]

    for eqn in program.eqns:
        inputs = [look_up(x) for x in eqn.invars]
        outputs = _outputs(eqn, inputs, visit)
        known.update(zip(eqn.outvars, outputs, strict=True))
    return [look_up(x) for x in program.outvars]


def _outputs(
    eqn: Any,
    inputs: list[Known],
    visit: Visit,
) -> list[Known]:
    inner = called_jaxpr(eqn)
    if inner is not None and len(inner[0].invars) == len(inputs):
        constants = [Known(constant) for constant in inner[1]]
        return _run(inner[0], constants, inputs, visit)

    values = [one.value for one in inputs]
    params = eqn.primitive.get_bind_params(eqn.params)
    made = eqn.primitive.bind(*values, **params)
    outputs = list(made) if eqn.primitive.multiple_results else [made]
    name = eqn.primitive.name
    origins = [one.origins for one in inputs]
    makers = [one.maker for one in inputs]
    changed = visit(Step(name, eqn, values, origins, makers, outputs))
    together = NONE.union(*origins)
    is_cast = name in ("convert_element_type", "stop_gradient", "copy")
    maker = makers[0] if is_cast else name
    return [Known(x, together, maker) for x in changed or outputs]
