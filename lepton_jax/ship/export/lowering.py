"""A model as a function of JAX's own operations, and as StableHLO."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.interpreters import partial_eval

from lepton_jax.compat import ClosedJaxpr, static_text
from lepton_jax.ship.export import inlined
from lepton_jax.ship.export.rules import Rule
from lepton_jax.ship.export.target import Source


def operations(
    source: Source,
    inputs: Sequence[Any],
    rules: Mapping[str, Rule],
) -> Callable[..., tuple[Any, ...]]:
    """Return a model as a function of nothing but JAX's operations, of given shapes.

    Args:
      source: the model; of one that is not live nothing can be replaced.
      inputs: shapes of its inputs, in their order.
      rules: by the name of an operation, what is run in its place.
    """
    if not source.is_live:
        return source.closed()
    program = traced(source, inputs)

    def function(*arrays: Any) -> tuple[Any, ...]:
        return tuple(
            inlined.run(
                program,
                arrays,
                rules=rules,
            )
        )

    return function


def traced(source: Source, inputs: Sequence[Any]) -> ClosedJaxpr:
    """Return a model's program without what its outputs do not depend on.

    A module that could draw random numbers makes a key for them in any case, and a
    converter that can't would refuse the model for it.

    Args:
      source: the model.
      inputs: shapes of its inputs, in their order.
    """
    program = jax.make_jaxpr(source.closed())(*inputs)
    wanted = [True] * len(program.jaxpr.outvars)
    needed, _ = partial_eval.dce_jaxpr(program.jaxpr, wanted, instantiate=True)
    return ClosedJaxpr(needed, program.consts)


def lowered_text(
    source: Source,
    batch: int,
    rules: Mapping[str, Rule],
) -> str:
    """Return a model's program as MLIR text; its function is `main`.

    Args:
      source: the model.
      batch: rows of a batch.
      rules: see `operations`.
    """
    shapes = list(source.shapes(batch).values())
    function = operations(source, shapes, rules)
    return static_text(jax.jit(function).lower(*shapes))
