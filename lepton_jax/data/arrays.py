"""Samples held in memory: NumPy arrays with one common leading dim."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lepton_jax.errors import DataError, first_line

Pair = tuple[Any, Any]  # (inputs, targets): arrays, or dicts of them
Empty = Callable[[tuple[int, ...], Any], np.ndarray]  # (shape, dtype) to memory

# Bytes. On the CPU, JAX adopts a host buffer without a copy only if it is so aligned.
ALIGNMENT = 64

# References to a buffer that `Buffers` may give out again: its list, the loop's
# variable and the argument of `getrefcount`.
REFERENCES_OF_AN_UNUSED_BUFFER = 3

_NARROWER = {
    np.dtype(np.int64): np.dtype(np.int32),
    np.dtype(np.uint64): np.dtype(np.uint32),
    np.dtype(np.float64): np.dtype(np.float32),
    np.dtype(np.longdouble): np.dtype(np.float32),
    np.dtype(np.complex128): np.dtype(np.complex64),
}


@dataclass(frozen=True, eq=False, repr=False)
class Arrays:
    """Samples as arrays whose leading dim counts the samples.

    The arrays must not be changed afterwards: devices may hold copies of them.

    64-bit numbers become 32-bit ones, as JAX would make them; a value that doesn't fit
    is an error, not a wrap-around.

    Attributes:
      inputs: an array of shape (n, ...), or a dict of them; anything `np.asarray`
        takes.
      targets: the same, or None for samples that are only to be predicted.

    Raises:
      DataError: no samples, different lengths, scalars, or arrays that hold no numbers.
    """

    inputs: Any
    targets: Any = None

    def __post_init__(self):
        inputs = _tree(self.inputs, "inputs")
        object.__setattr__(self, "inputs", inputs)
        if self.targets is not None:
            targets = _tree(self.targets, "targets")
            object.__setattr__(self, "targets", targets)

        named = self._named()
        lengths = {len(x) for _, x in named}
        if len(lengths) > 1:
            counts = ", ".join(f"{name} has {len(x)}" for name, x in named)
            raise DataError(
                f"the arrays differ in length: {counts}",
                where="Arrays",
                remedy="give every array one row per sample",
            )
        if len(self) == 0:
            raise DataError(
                f"there are no samples: {self!r}",
                where="Arrays",
                remedy="give at least one sample",
            )

    def __len__(self) -> int:
        _, first = self._named()[0]
        return len(first)

    def __repr__(self) -> str:
        parts = [f"{name} {x.dtype}{list(x.shape)}" for name, x in self._named()]
        return f"Arrays({', '.join(parts)})"

    def _named(self) -> list[tuple[str, np.ndarray]]:
        parts = []
        trees = {"inputs": self.inputs, "targets": self.targets}
        for name, tree in trees.items():
            if isinstance(tree, dict):
                parts += [(f"{name}[{key!r}]", x) for key, x in tree.items()]
            elif tree is not None:
                parts.append((name, tree))
        return parts

    def take(
        self,
        indices: Any,
        empty: Empty | None = None,
    ) -> Pair:
        """Copy some samples.

        Args:
          indices: integers from 0 to n - 1, shape (k,).
          empty: (shape, dtype) to the memory they are copied into; None:
            `aligned_empty`.

        Returns:
          (inputs, targets) of k rows each.

        Raises:
          DataError: the indices are no vector of integers, or out of range.
        """
        empty = empty or aligned_empty
        indices = np.asarray(indices)
        are_integers = indices.dtype.kind in "iu" or not indices.size
        if indices.ndim != 1 or not are_integers:
            raise DataError(
                f"indices are {indices.dtype}{list(indices.shape)}, not a vector of"
                " integers",
                where="Arrays.take",
                remedy="give the positions of the samples",
            )
        if not _all_between(indices, 0, len(self) - 1):
            raise DataError(
                f"indices run from {indices.min()} to {indices.max()}, but there are"
                f" {len(self)} samples",
                where="Arrays.take",
                remedy=f"use positions from 0 to {len(self) - 1}",
            )
        indices = indices.astype(np.intp, copy=False)

        def rows(x: np.ndarray) -> np.ndarray:
            return _rows(x, indices, empty)

        inputs = _map(rows, self.inputs)
        return inputs, _map(rows, self.targets)

    def _parts(self, first: Any, second: Any) -> tuple[Arrays, Arrays]:
        """Return the samples of two lists of indices."""
        return Arrays(*self.take(first)), Arrays(*self.take(second))

    def split(
        self,
        fraction: float,
        seed: int,
    ) -> tuple[Arrays, Arrays]:
        """Return two random parts that keep the samples' order.

        Args:
          fraction: share of the samples in the second part, which has
            round(fraction * n) of them.
          seed: decides which.
        """
        first, second = partition(len(self), fraction, seed)
        return self._parts(first, second)

    def fold(
        self,
        folds: int,
        fold: int,
        seed: int = 0,
        stratify: bool = False,
    ) -> tuple[Arrays, Arrays]:
        """Return the samples to train on and to test on in one of several folds.

        Each sample is in the test of one fold; their sizes differ by one at most.

        Args:
          folds: how many there are.
          fold: which one, from 0.
          seed: decides which samples are together.
          stratify: whether each fold has its share of each target, which is a class.

        Raises:
          DataError: there is no such fold, or there are fewer samples than folds.
        """
        if not 2 <= folds <= len(self) or not 0 <= fold < folds:
            raise DataError(
                f"fold {fold} of {folds} of {len(self)} samples",
                where="Arrays.fold",
                remedy=(
                    "give from 2 folds to as many as there are samples, and a fold"
                    " from 0 to one less than their count"
                ),
            )
        order = np.random.default_rng(seed).permutation(len(self))
        if stratify:
            by_class = np.argsort(self.targets[order], kind="stable")
            order = order[by_class]
        test = np.sort(order[fold::folds])
        train = np.setdiff1d(order, test)
        return self._parts(train, test)


def from_any(data: Any) -> Arrays:
    """Return data as `Arrays`.

    Args:
      data: `Arrays`, or a pair (inputs, targets) of arrays, dicts of arrays or lists.

    Raises:
      DataError: it is neither.
    """
    if isinstance(data, Arrays):
        return data
    if isinstance(data, tuple | list) and len(data) == 2:
        return Arrays(*data)
    size = f" of {len(data)}" if isinstance(data, tuple | list) else ""
    raise DataError(
        f"the data are a {type(data).__name__}{size}, not a pair of inputs and targets",
        where="data",
        remedy=(
            "give (inputs, targets), or lepton_jax.data.Arrays(inputs) where there are"
            " no targets"
        ),
    )


def partition(
    count: int,
    fraction: float,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Return a random partition of range(count), each part in ascending order.

    Args:
      count: of the numbers.
      fraction: share of the numbers in the second part, which has
        round(fraction * count) of them.
      seed: decides which.

    Raises:
      DataError: a part would be empty.
    """
    second = -1
    if math.isfinite(fraction):
        second = round(fraction * count)
    if not 0 < second < count:
        raise DataError(
            f"a fraction of {fraction!r} splits {count} samples into {count - second}"
            f" and {second}",
            where="split",
            remedy=(
                "choose a fraction between 0 and 1 that leaves samples on both sides"
            ),
        )
    order = np.random.default_rng(seed).permutation(count)
    first = np.sort(order[second:])
    return first, np.sort(order[:second])


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return an array like `np.empty` whose memory is aligned to 64 bytes."""
    return _aligned(_raw(shape, dtype), shape, dtype)


class Buffers:
    """Aligned memory that is given out again once nobody refers to an array in it.

    The kernel's work for a block of fresh pages costs about as much as gathering the
    rows into it. An array that JAX has adopted, or still copies from, counts as
    referred to until the last computation on it is over.
    """

    def __init__(self) -> None:
        self._by_bytes: dict[int, list[np.ndarray]] = {}

    def empty(
        self,
        shape: tuple[int, ...],
        dtype: Any,
    ) -> np.ndarray:
        """Return an array like `aligned_empty`, in memory that nobody else uses."""
        size = _bytes(shape, dtype)
        buffers = self._by_bytes.setdefault(size, [])
        for raw in buffers:
            if sys.getrefcount(raw) == REFERENCES_OF_AN_UNUSED_BUFFER:
                return _aligned(raw, shape, dtype)
        buffers.append(_raw(shape, dtype))
        return _aligned(buffers[-1], shape, dtype)


class ArraysByPosition:
    """Arrays as an endless sequence of samples, in a new seeded order each epoch.

    Position p is the p-th sample that training consumes, whatever the batch size. An
    epoch's permutation takes 8 bytes of memory for each sample.

    >>> data = Arrays(np.arange(3.0), np.arange(3))
    >>> ArraysByPosition(data, seed=0, shuffle=False).indices(2, 5)
    array([2, 0, 1], dtype=int32)
    """

    checked_when_read = False  # all arrays are checked at once, before the first step
    many_may_read = False  # one thread keeps up with any step; buffers are used again

    def __init__(
        self,
        data: Arrays,
        seed: int,
        shuffle: bool,
    ):
        self.data = data
        self.samples = len(data)
        self.seed = seed
        self.shuffle = shuffle
        self._orders: dict[int, np.ndarray] = {}
        self._buffers = Buffers()

    def rows(
        self,
        start: int,
        stop: int,
        wanted: Any = slice(None),
    ) -> Pair:
        """Return copies of the samples at positions start to stop.

        Args:
          start: the first position.
          stop: the position after the last one.
          wanted: which of them to read, as an index of a vector of stop - start.
        """
        indices = self.indices(start, stop)[wanted]
        return self.data.take(indices, self._buffers.empty)

    def indices(
        self,
        start: int,
        stop: int,
    ) -> np.ndarray:
        """Return the samples' numbers at positions start to stop: int32 vector."""
        if not self.shuffle:
            positions = np.arange(start, stop)
            return (positions % self.samples).astype(np.int32)

        indices = np.empty(stop - start, np.int32)
        first_epoch = start // self.samples
        last_epoch = (stop - 1) // self.samples
        for epoch in range(first_epoch, last_epoch + 1):
            epoch_start = epoch * self.samples
            low = max(start, epoch_start)
            high = min(stop, epoch_start + self.samples)
            own = slice(low - epoch_start, high - epoch_start)
            part = self._order(epoch)[own]
            indices[low - start : high - start] = part
        return indices

    def ids(
        self,
        start: int,
        stop: int,
    ) -> list[str]:
        """Return "EPOCH:INDEX" of each sample at positions start to stop."""
        epochs = np.arange(start, stop) // self.samples
        indices = self.indices(start, stop)
        pairs = zip(epochs, indices, strict=True)
        return [f"{epoch}:{index}" for epoch, index in pairs]

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            bits = np.random.Philox(key=[self.seed, epoch])
            order = np.random.Generator(bits).permutation(self.samples)
            # a block may still reach back into the epoch before
            before = self._orders.get(epoch - 1)
            self._orders = {epoch: order}
            if before is not None:
                self._orders[epoch - 1] = before
        return self._orders[epoch]


def _raw(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    size = _bytes(shape, dtype)
    return np.empty(size + ALIGNMENT, np.uint8)


def _bytes(shape: tuple[int, ...], dtype: Any) -> int:
    itemsize = np.dtype(dtype).itemsize
    return math.prod(shape) * itemsize


def _aligned(
    raw: np.ndarray,
    shape: tuple[int, ...],
    dtype: Any,
) -> np.ndarray:
    start = -raw.ctypes.data % ALIGNMENT
    stop = start + len(raw) - ALIGNMENT
    aligned = raw[start:stop]
    return aligned.view(dtype).reshape(shape)


def _rows(
    x: np.ndarray,
    indices: np.ndarray,
    empty: Empty,
) -> np.ndarray:
    shape = (len(indices), *x.shape[1:])
    out = empty(shape, x.dtype)
    # Only "clip" and "wrap" let np.take write straight into `out`; the indices are
    # checked already.
    return np.take(
        x,
        indices,
        axis=0,
        out=out,
        mode="clip",
    )


def _map(function: Any, tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: function(x) for key, x in tree.items()}
    return None if tree is None else function(tree)


def _tree(data: Any, name: str) -> Any:
    if not isinstance(data, Mapping):
        return _array(data, name)
    are_names = all(isinstance(key, str) for key in data)
    if not data or not are_names:
        raise DataError(
            f"{name} is a dict with the keys {list(data)}",
            where=name,
            remedy=(
                "name each array by a string: the argument of the model that it goes to"
            ),
        )
    return {key: _array(x, f"{name}[{key!r}]") for key, x in data.items()}


def _array(data: Any, name: str) -> np.ndarray:
    """Return a native NumPy array of at most 32-bit numbers and at least one dim."""
    may_be_masked = isinstance(data, np.ma.MaskedArray)
    if may_be_masked and np.ma.is_masked(data):
        raise DataError(
            f"{name} has masked values",
            where=name,
            remedy="fill them in or leave out their samples",
        )

    x = _numpy(data, name)
    if not _holds_numbers(x.dtype):
        raise DataError(
            f"{name} has dtype {x.dtype}, which holds no numbers",
            where=name,
            remedy="convert it to numbers (categories to integers) first",
        )
    if x.ndim == 0:
        raise DataError(
            f"{name} is the single value {x}",
            where=name,
            remedy="give an array with one row per sample",
        )
    if not x.dtype.isnative:
        x = x.astype(x.dtype.newbyteorder("="))
    return _narrow(x, name)


def _numpy(data: Any, name: str) -> np.ndarray:
    try:
        return np.asarray(data)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{name} can't be made into an array: {error}",
            where=name,
            remedy="give an array, or lists of equal lengths",
        ) from error
    except Exception as error:  # whatever a container of another library says
        kind = f"{type(data).__module__}.{type(data).__qualname__}"
        raise DataError(
            f"{name} can't be made into an array: the {kind} says:"
            f" {_first_line(error)}",
            where=name,
            remedy=(
                "convert it to a NumPy array first, as its own message or its "
                "library's documentation says (a tensor: x.detach().cpu().numpy())"
            ),
        ) from error


def _holds_numbers(dtype: np.dtype) -> bool:
    # bfloat16 and the like, of the ml_dtypes package, are of kind "V", as records are
    named_so = dtype.name.startswith(("bfloat", "float", "int", "uint"))
    return dtype.kind in "biufc" or named_so


def _first_line(error: Exception) -> str:
    name = type(error).__name__
    message = first_line(error)
    return f"{name}: {message}" if message else name


def _all_between(x: np.ndarray, least: int, most: int) -> bool:
    """Whether all numbers lie from one to another."""
    if not x.size:
        return True
    return bool(x.min() >= least and x.max() <= most)


def _narrow(x: np.ndarray, name: str) -> np.ndarray:
    """Return numbers of 64 bits as 32; raise a DataError if one doesn't fit."""
    narrow = _NARROWER.get(x.dtype)
    if narrow is None:
        return x

    if narrow.kind in "iu":
        limits = np.iinfo(str(narrow))
        if not _all_between(x, limits.min, limits.max):
            raise DataError(
                f"{name} has values from {x.min()} to {x.max()}, which don't fit"
                f" {narrow}",
                where=name,
                remedy=f"map them to the range {limits.min} to {limits.max}",
            )
        return x.astype(narrow)

    with np.errstate(over="ignore"):
        out = x.astype(narrow)
    overflown = np.isinf(out) & np.isfinite(x)
    if overflown.any():
        raise DataError(
            f"{name} has the value {x[overflown][0]}, which doesn't fit {narrow}",
            where=name,
            remedy="scale the values to within 3.4e38",
        )
    return out
