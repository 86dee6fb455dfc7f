"""What a served model takes and returns, in the protocol's terms.

A model that knows how raw rows are prepared offers their columns as its inputs, one
tensor for each column with an element a row. The arrays of its program are taken, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from lepton_jax.errors import ModelError
from lepton_jax.ship.serve.datatypes import BYTES, FLOATS, datatype_of

BATCH = -1  # extent of the dim of rows
LABEL = "label"  # output: the prediction in words
OUTPUTS = "outputs"  # the model's own outputs, or the beginning of their names
PREDICTION = "prediction"  # the same of what is made of them
NUMBER = "number"  # kind of a column


@dataclass(frozen=True)
class Tensor:
    """A tensor of requests or responses.

    Attributes:
      name: of the tensor.
      datatype: of the protocol, such as "FP32".
      shape: extents; the first is -1, the rows.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]

    @cached_property
    def extents(self) -> tuple[int, ...]:
        """The extents of one row."""
        return self.shape[1:]

    def facts(self) -> dict[str, Any]:
        """Return the tensor as metadata state it."""
        return {
            "name": self.name,
            "datatype": self.datatype,
            "shape": list(self.shape),
        }


@dataclass(frozen=True, eq=False)
class Signature:
    """What a model takes and returns.

    Attributes:
      arrays: inputs of the program, by name.
      columns: of raw rows, by name; empty: the model takes arrays alone.
      outputs: by name.
    """

    arrays: Mapping[str, Tensor]
    columns: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]

    @classmethod
    def of(cls, artifact: Any) -> Signature:
        """Return the signature of an artifact.

        Raises:
          ModelError: an array has a dtype that the protocol can't send, or no rows.
        """
        outputs = [_tensor(part) for part in artifact.outputs]
        if artifact.columns and _has_words(artifact):
            outputs.append(Tensor(LABEL, BYTES, (BATCH,)))
        return cls(
            _by_name(_tensor(part) for part in artifact.inputs),
            _by_name(_column(column) for column in artifact.columns),
            _by_name(outputs),
        )

    @cached_property
    def hidden(self) -> tuple[str, ...]:
        """The outputs whose NaN a prediction of whole numbers would hide."""
        hides = any(
            name.startswith(PREDICTION) and tensor.datatype not in FLOATS
            for name, tensor in self.outputs.items()
        )
        return tuple(
            name
            for name, tensor in self.outputs.items()
            if hides and name.startswith(OUTPUTS) and tensor.datatype in FLOATS
        )

    @property
    def inputs(self) -> Mapping[str, Tensor]:
        """The inputs that metadata name: columns, or else arrays."""
        return self.columns or self.arrays


# ---- internals ----


def _by_name(tensors: Iterable[Tensor]) -> dict[str, Tensor]:
    return {tensor.name: tensor for tensor in tensors}


def _tensor(part: Any) -> Tensor:
    """Return an array of the artifact's program as a tensor.

    Raises:
      ModelError: the protocol can't send it.
    """
    datatype = datatype_of(part.dtype)
    shape = tuple(int(extent) for extent in part.shape)
    if datatype is None or not shape or shape[0] != BATCH:
        raise ModelError(
            f"{part.name} is {part.dtype}{list(shape)}, which can't be served",
            where="lepton serve",
            remedy="serve a model whose arrays hold numbers and begin with the rows",
        )
    return Tensor(part.name, datatype, shape)


def _column(column: Any) -> Tensor:
    datatype = "FP64" if column.kind == NUMBER else BYTES
    return Tensor(column.name, datatype, (BATCH,))


def _has_words(artifact: Any) -> bool:
    """Whether a prediction can be said in words: it numbers one class for each row."""
    if not artifact.manifest.labels:
        return False
    return any(
        part.name == PREDICTION
        and len(part.shape) == 1
        and np.dtype(part.dtype).kind in "iu"
        for part in artifact.outputs
    )
