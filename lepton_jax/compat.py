"""The one place that knows where JAX versions differ (0.10 on Python 3.11, 0.12 on 3.12 and later), or what it hides."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from jax._src import source_info_util  # no public name gives an equation its place in the user's code again
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.sharding import AxisType, Mesh

__all__ = ["ClosedJaxpr", "Jaxpr", "Literal", "at_source", "make_mesh", "scan_counts", "source_line"]


def make_mesh(axes: dict[str, int], devices: Any) -> Mesh:
    """A mesh whose axes XLA's partitioner fills in; from 0.12 on JAX's default, Explicit, refuses un-annotated models."""
    shape = tuple(axes.values())
    return Mesh(np.asarray(devices).reshape(shape), tuple(axes), axis_types=(AxisType.Auto,) * len(shape))


@contextlib.contextmanager
def at_source(eqn: Any, stack: tuple) -> Iterator[None]:
    """What is bound inside keeps the equation's source line, its name stack below those of the calls around it."""
    names = source_info_util.current_name_stack()
    for outer in (*stack, eqn.source_info.name_stack):
        names = names + outer
    with source_info_util.user_context(eqn.source_info.traceback, name_stack=names), eqn.ctx.manager:
        yield


def source_line(eqn: Any) -> str:
    """"file.py:12 (function)" of the user's line that an equation stems from."""
    return source_info_util.summarize(eqn.source_info)


def scan_counts(eqn: Any) -> tuple[int, int]:
    """How many of a scan's operands are constants of its body, and how many are carried."""
    if "num_carry" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carried, _ = eqn.params["ft_in"].unpack()
    return len(list(consts)), len(list(carried))
