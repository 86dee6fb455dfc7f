"""The traced program, written so that XLA's CPU backend computes it faster.

A user's model stays as it is. What is rewritten is the jaxpr of its gradient, where the
same values have a form that one CPU device computes in less time:

  pooling     max pooling whose windows do not overlap, and its gradient
  slices      the gradient of a value that is taken apart, such as the gates of a cell
  loops       products that leave a loop over time, and those in it that become one
  kept        what a loop stacks for its backward pass and need not
  products    the gradient of a kernel, which is wider than what it is multiplied with
  units       dims of extent 1 in arrays of many dims
  angles      sines and cosines of few angles that many entries are multiplied with

Each pass takes a flat jaxpr (`program.flat`) and knows one exact pattern. Where the
pattern is not met, the operation stays. `pooling`, `slices`, `kept` and `units` keep
every bit (but the sign of a zero); `loops` and `products` add up the same terms in
another order, and what uses a table of `angles` may be rounded otherwise.

TPUs, GPUs and programs for several devices are left alone by these passes. What
`forms` chooses is for all: a loss whose logits never exist whole (`head`), attention
whose scores don't (`softmax`, `attention`, `splash`), a stack of layers as a pipeline
(`stages`, `pipeline`), and products of 8 bits (`narrow`, `eight_bits`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax

from lepton_jax.compat import ClosedJaxpr
from lepton_jax.planner.rewrite import (
    angles,
    kept,
    loops,
    pooling,
    products,
    slices,
    units,
)
from lepton_jax.planner.rewrite import forms as choice
from lepton_jax.planner.rewrite.forms import Forms
from lepton_jax.planner.rewrite.pipeline import Stages
from lepton_jax.planner.rewrite.program import equations, flat, run
from lepton_jax.planner.rewrite.softmax import fused
from lepton_jax.planner.rewrite.stages import in_stages
from lepton_jax.trees import with_leaves

__all__ = [
    "PASSES",
    "Forms",
    "Stages",
    "applies",
    "forms_for",
    "fused",
    "in_stages",
    "only",
    "rewritten",
]

# The passes by name, in the order in which they run.
PASSES: dict[str, Any] = {
    "pooling": pooling,
    "slices": slices,
    "loops": loops,
    "kept": kept,
    "products": products,
    "units": units,
    "angles": angles,
}

# Names of the passes that run; `only` changes them.
_active: tuple[str, ...] = tuple(PASSES)


def applies(platform: str, devices: int) -> bool:
    """Whether programs for these devices are rewritten.

    Args:
      platform: JAX's name of it.
      devices: their number.
    """
    return platform == "cpu" and devices == 1 and bool(_active)


@contextlib.contextmanager
def only(*names: str) -> Iterator[None]:
    """Let some passes alone run while the context is open.

    Args:
      names: of `PASSES`. None at all: programs are what JAX traces, to the bit.
    """
    global _active
    before = _active
    _active = tuple(name for name in PASSES if name in names)
    try:
        yield
    finally:
        _active = before


def forms_for(
    forward: ClosedJaxpr,
    traced: Callable[[], ClosedJaxpr],
    platform: str,
    devices: int,
    micro_batches: int | None,
    products: str = "",
) -> Forms:
    """Choose the forms of a loss, see `forms.forms_for`.

    Under `only()` they are plain, but for the products that the recipe asks for.
    """
    if not _active:
        return Forms(products=products)
    return choice.forms_for(forward, traced, platform, devices, micro_batches, products)


def rewritten(function: Callable) -> Callable:
    """Return a function of the same values that a CPU computes faster.

    Args:
      function: of arrays in pytrees, with all derivatives taken already.
    """

    def faster(*args: Any) -> Any:
        program, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        leaves = jax.tree.leaves(args)
        results = run(_passed(program), leaves)
        return with_leaves(shapes, results)

    return faster


# ---- internals ----


def _passed(program: ClosedJaxpr) -> ClosedJaxpr:
    """Return a program after all passes that find something to look at.

    Each pass traces the program anew. Those that would find nothing are left out.
    """
    wanted = [PASSES[name] for name in _active]
    if not any(_looks(part, program) for part in wanted):
        return program

    program = flat(program)
    for part in wanted:
        if _looks(part, program):
            program = part.rewrite(program)
    return program


def _looks(part: Any, program: ClosedJaxpr) -> bool:
    """Whether a pass finds something to look at."""
    return any(map(part.is_candidate, equations(program.jaxpr)))
