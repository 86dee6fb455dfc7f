"""Forms in which a weight is stored: as it is, or as whole numbers with scales.

A weight w of shape (inputs, outputs) is cut into tiles that share a scale s, and each
number is stored as round(w / s). A small example, 4 x 2 numbers in tiles of 2 inputs:

    w = [[ .5, 1],      scales, largest / 7.5    stored, 4 bits each
         [-.7, 2],  ->  [[.0933, .2667],     ->  [[ 5,  4],
         [ .2, 0],       [.0267, .0533]]          [-8,  7],
         [ .1, .4]]                               [ 7,  0],
                                                  [ 4,  7]]

Numbers of 4 bits lie in pairs in a byte, for neither safetensors nor most runtimes have
a type for them. The arithmetic is qwix's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_jax.ship.shrink.library import qwix

# Least and largest whole number of 4 bits.
NIBBLE = 4  # bits
LOW_NIBBLE = 0x0F

# Inputs from which on kernels side by side have scales of their own. Assumption: those
# are then an eighth of the numbers' bytes at most.
MANY = 32

# Shares of the largest absolute value at which numbers are cut off, of which the one
# with the least squared error is taken. Cutting off an outlier leaves finer steps to
# the rest. Assumption: finer choices gain nothing that a metric would show.
CUT_OFFS = (1.0, 0.9, 0.8, 0.7)


@dataclass(frozen=True)
class Form:
    """The way a weight is stored as whole numbers.

    Attributes:
      bits: of a number, 8 or 4.
      shape: of the weight.
      tiles: entries of each dim that share a scale: 1 for a scale an entry, the dim's
        extent for one scale along all of it.
    """

    bits: int
    shape: tuple[int, ...]
    tiles: tuple[int, ...]

    @property
    def scales(self) -> tuple[int, ...]:
        """Shape of the scales."""
        pairs = zip(self.shape, self.tiles, strict=True)
        return tuple(extent // tile for extent, tile in pairs)

    @property
    def nbytes(self) -> int:
        """Bytes of a stored weight, its scales in float32 included."""
        numbers = -(-math.prod(self.shape) * self.bits // 8)
        return numbers + 4 * math.prod(self.scales)

    def pack(
        self,
        weight: Any,
    ) -> dict[str, jax.Array]:
        """Return the arrays to store: "values" (int8, or uint8 in pairs) and "scale".

        Args:
          weight: floats of `shape`.
        """
        best = min(
            (self._quantized(weight, share) for share in CUT_OFFS),
            key=lambda array: float(_squared_error(weight, array)),
        )
        values = best.qvalue.astype(jnp.int8)
        if self.bits == NIBBLE:
            values = in_pairs(values)
        return {"values": values, "scale": best.scale.astype(jnp.float32)}

    def unpack(
        self,
        arrays: Mapping[str, Any],
    ) -> jax.Array:
        """Return the weight as floats, from what `pack` returned."""
        values = arrays["values"]
        if self.bits == NIBBLE:
            values = out_of_pairs(values, self.shape)
        return qwix().dequantize(qwix().QArray(values, arrays["scale"]))

    def rounded(
        self,
        weight: jax.Array,
    ) -> jax.Array:
        """Return the weight as it will be after `pack` and `unpack`, to train with.

        The gradient passes as if nothing were rounded (Bengio et al. 2013, "Estimating
        or Propagating Gradients Through Stochastic Neurons", the straight-through
        estimator).
        """
        plain = qwix().dequantize(self._quantized(weight, CUT_OFFS[0]))
        return weight + jax.lax.stop_gradient(plain - weight)

    def _quantized(
        self,
        weight: Any,
        share: float,
    ) -> Any:
        tiled = {}
        for dim, tile in enumerate(self.tiles):
            if tile < self.shape[dim]:
                tiled[dim] = tile
        return qwix().quantize(
            jnp.asarray(weight),
            f"int{self.bits}",
            tiled_axes=tiled,
            calibration_method=f"absmax,{share}",
        )


def by_outputs(
    shape: tuple[int, ...],
    bits: int,
    group: int | None = None,
) -> Form:
    """Return the form of a kernel (..., inputs, outputs): a scale for each output.

    Of many kernels side by side, as those of experts or of the columns of a table, each
    has scales of its own.

    Args:
      shape: of the kernel.
      bits: of a number.
      group: inputs that share a scale, or about so many; None: all.
    """
    *outer, inputs, _ = shape
    tile = inputs if group is None else divisor(inputs, group)
    if len(outer) == 1 and inputs >= MANY:
        outer = [1]
    return Form(bits, shape, (*outer, tile, 1))


def by_rows(
    shape: tuple[int, ...],
    bits: int,
    group: int | None = None,
) -> Form:
    """Return the form of an embedding (rows, dim): a scale, or several, for each row.

    Args:
      shape: of the embedding.
      bits: of a number.
      group: numbers of a row that share a scale, or about so many; None: all.
    """
    *rows, dim = shape
    tile = dim if group is None else divisor(dim, group)
    return Form(bits, shape, (*[1] * len(rows), tile))


def divisor(
    extent: int,
    wanted: int,
) -> int:
    """Return a divisor of an extent that is about a wanted number.

    It is the largest one up to it, or, if that is less than half of it, the smallest
    one above: a scale for each number or two would be larger than the weight was.

    >>> divisor(96, 32), divisor(50, 32), divisor(86, 32), divisor(7, 4)
    (32, 25, 43, 7)
    """
    divisors = [n for n in range(1, extent + 1) if extent % n == 0]
    below = max(n for n in divisors if n <= wanted)
    if 2 * below >= wanted or below == extent:
        return below
    return min(n for n in divisors if n > wanted)


def in_pairs(values: jax.Array) -> jax.Array:
    """Return whole numbers from -8 to 7, two to a byte, as a uint8 vector."""
    flat = values.reshape(-1)
    flat = jnp.pad(flat, (0, flat.size % 2))
    pairs = flat.reshape(-1, 2).astype(jnp.uint8)
    low = pairs[:, 0] & LOW_NIBBLE
    return low | (pairs[:, 1] << NIBBLE)


def out_of_pairs(
    pairs: jax.Array,
    shape: tuple[int, ...],
) -> jax.Array:
    """Return the int8 numbers that `in_pairs` put into bytes."""
    signed = jax.lax.bitcast_convert_type(pairs, jnp.int8)
    # a shift to the right keeps the sign
    low = jnp.right_shift(jnp.left_shift(signed, NIBBLE), NIBBLE)
    high = jnp.right_shift(signed, NIBBLE)
    flat = jnp.stack([low, high], axis=1).reshape(-1)
    return flat[: int(np.prod(shape))].reshape(shape)


def _squared_error(
    weight: Any,
    array: Any,
) -> jax.Array:
    apart = jnp.asarray(weight) - qwix().dequantize(array)
    return jnp.sum(apart**2)
