"""Arrays that somebody gives a program, checked against its signature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lepton_jax.data import Limit, check_limits
from lepton_jax.errors import DataError, nearest
from lepton_jax.ship.artifact.signature import INPUTS, Tensor
from lepton_jax.trees import by_path

WHAT = "inputs"


def as_inputs(
    given: Any,
    signature: Sequence[Tensor],
) -> dict[str, np.ndarray]:
    """Return arrays by name, of the dtypes and shapes of a signature.

    Args:
      given: an array where the model has one input, else a dict of arrays.
      signature: of the program's inputs.

    Raises:
      DataError: a name is missing or not known, or an array does not fit.
    """
    arrays = _by_name(given, signature)
    known = {tensor.name: tensor for tensor in signature}
    for name in arrays:
        if name not in known:
            raise DataError(
                f"the model has no input {name!r}{nearest(name, known)}",
                where=WHAT,
                remedy=f"its inputs are {', '.join(known)}",
            )
    missing = [name for name in known if name not in arrays]
    if missing:
        raise DataError(
            f"the input {missing[0]!r} is missing",
            where=WHAT,
            remedy=f"give all of: {', '.join(known)}",
        )
    return {
        name: _fitted(
            arrays[name],
            tensor,
        )
        for name, tensor in known.items()
    }


def check_ranges(
    inputs: Mapping[str, np.ndarray],
    limits: Sequence[Mapping[str, Any]],
) -> None:
    """Check that whole numbers are within the tables that they are looked up in.

    Raises:
      DataError: one is not.
    """
    if not limits:
        return
    known = [Limit(**_tuples(limit)) for limit in limits]
    tree: Any = dict(inputs)
    if set(inputs) == {INPUTS}:
        tree = inputs[INPUTS]
    check_limits(known, (tree, None), WHAT, str)


# ---- internals ----


def _by_name(
    given: Any,
    signature: Sequence[Tensor],
) -> dict[str, Any]:
    if isinstance(given, Mapping):
        return dict(by_path(dict(given)))
    names = [tensor.name for tensor in signature]
    if len(names) == 1:
        return {names[0]: given}
    raise DataError(
        f"the model has {len(names)} inputs, but one array is given",
        where=WHAT,
        remedy=f"give a dict of arrays: {', '.join(names)}",
    )


def _fitted(
    given: Any,
    tensor: Tensor,
) -> np.ndarray:
    """Return an array of a tensor's dtype.

    Raises:
      DataError: its shape is another, or a number does not fit into the dtype.
    """
    array = np.asarray(given)
    expected = tensor.shape[1:]
    if array.ndim == 0 or array.shape[1:] != expected or array.dtype.kind in "OSU":
        raise DataError(
            f"{tensor.name} is {array.dtype}{list(array.shape)}",
            where=WHAT,
            remedy=f"give {tensor.dtype}{['rows', *expected]}".replace("'", ""),
        )
    dtype = _dtype(tensor.dtype)
    if array.dtype == dtype:
        return array
    return _cast(array, dtype, tensor)


def _cast(
    array: np.ndarray,
    dtype: np.dtype,
    tensor: Tensor,
) -> np.ndarray:
    """Return an array as another dtype that holds its numbers."""
    is_whole = array.dtype.kind in "iub"
    asks_whole = dtype.kind in "iu"
    fits = np.can_cast(array.dtype, dtype, "same_kind")
    if asks_whole and is_whole:
        limits = np.iinfo(dtype)
        values = (
            array.astype(
                np.int64,
                copy=False,
            )
            if array.size
            else np.zeros(1)
        )
        fits = bool(values.min() >= limits.min and values.max() <= limits.max)
    elif dtype.kind not in "iub":  # a number becomes a float
        fits = array.dtype.kind in "iuf" or array.dtype.kind == "V"
    if not fits:
        raise DataError(
            f"{tensor.name} is {array.dtype}, which does not fit into {tensor.dtype}",
            where=WHAT,
            remedy=f"give {tensor.dtype}",
        )
    return array.astype(dtype)


def _dtype(name: str) -> np.dtype:
    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, name))


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: tuple(value)
        if isinstance(
            value,
            list,
        )
        else value
        for name, value in fields.items()
    }
