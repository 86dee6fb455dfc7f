"""Samples that a function changes at random, the same way whenever they are read.

The function has a key, made of the recipe's seed and the sample's source, epoch and
index. So a sample is changed in the same way on any number of hosts, by whichever
thread, and after the run was resumed; and in another way in the next epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lepton_jax.data.rows import Function, Rows
from lepton_jax.data.streams import Draw, MapDraw, Stream, Test


class AugmentDraw(MapDraw):
    """Some samples, which a function changes by their keys."""

    def take(self, which: Any) -> AugmentDraw:
        return AugmentDraw(self.draw.take(which), self.function)

    def read(self) -> Rows:
        return self.function.maps(self.draw.read(), self.keys())

    def measured(
        self,
        key: Any,
        function: Callable[[Rows], np.ndarray],
    ) -> np.ndarray:
        raise AssertionError("what is augmented is not filtered or packed")


class AugmentStream:
    """The samples of a stream, which a function changes by their keys."""

    def __init__(
        self,
        stream: Stream,
        function: Function,
    ):
        self.stream = stream
        self.function = function
        self.advance = stream.advance
        self.state = stream.state
        self.restore = stream.restore
        self.hints = stream.hints

    def peek(self, count: int) -> Draw:
        return AugmentDraw(self.stream.peek(count), self.function)

    def possible(self, tests: Sequence[Test]) -> bool:
        raise AssertionError("what is augmented is not filtered")
