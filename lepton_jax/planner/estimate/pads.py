"""Paddings with zeros that XLA makes part of the convolution that reads them.

A causal convolution pads its input in front and convolves without a padding. XLA writes
one convolution with a padding, whose taps on zeros need not be computed. The CPU
backend of jaxlib 0.10 transposes the operands of a convolution whose dims are in
another order than (batch, places, channels) first: a padding before a transpose stays,
such as that of a kernel's gradient.
"""

from __future__ import annotations

import numpy as np

from lepton_jax.planner.program.graph import BARRIER, Operation, Region, Value


class Pads:
    """Follows zeros and what is padded with them.

    Args:
      platform: JAX's name of the backend.
    """

    def __init__(self, platform: str):
        self.platform = platform
        self._zeros: set[int] = set()
        self._padded: dict[int, Operation] = {}

    def enter(self, region: Region) -> None:
        """Note the constants of a region that are zero."""
        for value, const in zip(region.constants, region.consts, strict=True):
            if not value.shape and _is_zero(const):
                self._zeros.add(value.index)

    def follow(self, op: Operation) -> None:
        """Note what an operation pads, or passes on."""
        if op.name == "pad" and self._with_zeros(op):
            self._padded[op.outputs[0].index] = op
        elif op.name == "convert_element_type":
            given = op.inputs[0]
            if given is not None and given.index in self._zeros:
                self._zeros.add(op.outputs[0].index)
        elif op.name == BARRIER and self.platform == "cpu":
            self._pass_on(op)

    def before(self, op: Operation) -> Operation | None:
        """Return the padding that XLA makes part of a convolution, if there is one."""
        if op.name != "conv_general_dilated":
            return None
        left = op.inputs[0]
        pad = None if left is None else self._padded.get(left.index)
        if pad is None or (self.platform == "cpu" and not _in_order(op)):
            return None
        batch, channels, *_ = op.params["dimension_numbers"].lhs_spec
        config = pad.params["padding_config"]
        outside = any(any(config[d]) for d in (batch, channels))
        odd = any(low < 0 or high < 0 or holes for low, high, holes in config)
        dilated = any(d != 1 for d in op.params["lhs_dilation"])
        return None if outside or odd or dilated else pad

    def _with_zeros(self, pad: Operation) -> bool:
        filling: Value | None = pad.inputs[1]
        if filling is None:
            return _is_zero(pad.eqn.invars[1].val)
        return filling.index in self._zeros

    def _pass_on(self, barrier: Operation) -> None:
        for given, copy in zip(barrier.inputs, barrier.outputs, strict=True):
            if given is not None and given.index in self._padded:
                self._padded[copy.index] = self._padded[given.index]


def _is_zero(const: object) -> bool:
    return not np.asarray(const).any()


def _in_order(op: Operation) -> bool:
    """Whether a convolution's dims are (batch, places, channels), the kernel's last."""
    numbers = op.params["dimension_numbers"]
    last = len(numbers.lhs_spec) - 1
    places = tuple(range(1, last))
    image = (0, last, *places)
    window = (last, last - 1, *range(last - 1))
    return numbers.lhs_spec == numbers.out_spec == image and numbers.rhs_spec == window
