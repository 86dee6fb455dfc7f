"""Operands that an earlier product has moved already.

The gradient of y = a @ b reads a and b again. Where b lies in another way than the
product takes it, as the experts' outputs lie with the experts and are combined with the
tokens, both passes ask for the same move of the same value:

    tokens = combine @ moved(outputs)               # forward
    d_combine = d_tokens @ moved(outputs).T         # backward

On TPUs XLA moves it once. What a barrier stands before is another value, and moved
anew, so rematerialization does not share moves. The CPU backend moves it twice. Seen in
mixtures of 4 to 16 experts for v5e:2x2, v5e:4x2, v4:2x2x1 and cpu:4 (jaxlib 0.10.2,
libtpu 0.0.42). GPUs were not seen: nothing is shared (assumption).
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

from lepton_jax.planner.program.graph import Operation
from lepton_jax.planner.program.layout import (
    Contraction,
    Decision,
    Layout,
    Move,
    contraction,
)

# Backends that move an operand once for several products.
SHARING = ("tpu",)


class Read(NamedTuple):
    """A read of a value by an earlier product.

    Attributes:
      op: the product.
      number: of its input that is the value.
    """

    op: Operation
    number: int


# For the number of an operation's input, the earlier reads of the same value.
Earlier = dict[int, tuple[Read, ...]]


class Reads:
    """Collects the products that read each value, in the program's order.

    Args:
      platform: JAX's name of the backend. Where it shares no moves, nothing is
        collected.
    """

    def __init__(self, platform: str):
        self._shares = platform in SHARING
        self._of: dict[int, list[Read]] = defaultdict(list)

    def before(self, op: Operation, product: Contraction | None) -> Earlier:
        """Return the earlier reads of what a product reads, and note its own."""
        earlier: Earlier = {}
        if not self._shares:
            return earlier
        for number in sides(product):
            value = op.inputs[number]
            if value is None or value.stored is not None:
                continue
            reads = self._of[value.index]
            if reads:
                earlier[number] = tuple(reads)
            reads.append(Read(op, number))
        return earlier


def sides(product: Contraction | None) -> tuple[int, ...]:
    """Return the numbers of the inputs of a product of two arrays."""
    if product is None or product.right is None:
        return ()
    return (product.left, product.right)


def moved_before(
    layout: Layout,
    product: Contraction | None,
    decision: Decision,
    move: Move,
    earlier: Earlier,
) -> bool:
    """Whether an earlier product has moved an operand to where this one wants it.

    Args:
      layout: of the program.
      product: the operation, as a contraction.
      decision: how it is split.
      move: one of the decision's.
      earlier: reads of what it reads.
    """
    if product is None or move.where not in ("left", "right"):
        return False
    number = product.left if move.where == "left" else product.right
    assert number is not None
    goal = decision.inputs.get(number)
    for read in earlier.get(number, ()):
        before = layout.decide(read.op, contraction(read.op))
        if goal is not None and before.inputs.get(read.number) == goal:
            return True
    return False
