"""Where a source's samples are read from: arrays, documents, or a data set of
Grain's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grain
import numpy as np

from lepton_jax.data.arrays import Arrays, from_any
from lepton_jax.data.rows import Rows, document, stacked
from lepton_jax.errors import DataError, pointing_at_user


@dataclass(frozen=True, eq=False, repr=False)
class Documents:
    """Documents of different lengths, as one long vector of their tokens.

    Attributes:
      tokens: the documents one after the other, integers of at most 32 bits, shape (all
        tokens,); a `numpy.memmap` stays on the disk.
      lengths: tokens of each document, shape (documents,).

    Raises:
      DataError: the lengths don't add up to the tokens, a document is empty, or the
        tokens are no integers.
    """

    tokens: Any
    lengths: Any

    def __post_init__(self):
        object.__setattr__(
            self,
            "tokens",
            document(self.tokens, "Documents.tokens"),
        )
        lengths = np.asarray(self.lengths)
        if (
            lengths.ndim != 1
            or lengths.dtype.kind not in "iu"
            or not lengths.size
            or lengths.min() < 1
        ):
            found = (
                f", from {lengths.min()}" if lengths.ndim == 1 and lengths.size else ""
            )
            raise DataError(
                f"the lengths are {lengths.dtype}{list(lengths.shape)}{found}",
                where="Documents.lengths",
                remedy=(
                    "give one whole number for each document, at least 1; leave out"
                    " those that are empty"
                ),
            )
        lengths = lengths.astype(np.int64)
        if lengths.sum() != len(self.tokens):
            raise DataError(
                f"the lengths add up to {lengths.sum()}, but there are"
                f" {len(self.tokens)} tokens",
                where="Documents.lengths",
                remedy="give each document's number of tokens",
            )
        object.__setattr__(self, "lengths", lengths)
        object.__setattr__(
            self,
            "starts",
            np.cumsum(lengths) - lengths,
        )

    @classmethod
    def of(cls, documents: Sequence[Any]) -> Documents:
        """A copy of documents that are vectors of token ids of their own."""
        if not documents:
            raise DataError(
                "the list of documents is empty",
                where="Source",
                remedy="give at least one document",
            )
        vectors = [document(x, f"document {i}") for i, x in enumerate(documents)]
        return cls(np.concatenate(vectors), np.array([len(x) for x in vectors]))

    def __len__(self) -> int:
        return len(self.lengths)

    def __repr__(self) -> str:
        return (
            f"Documents({len(self)} of {len(self.tokens)} {self.tokens.dtype} tokens)"
        )


class Reader(Protocol):
    """Samples by index."""

    @property
    def lengths(self) -> np.ndarray | None:
        """Tokens of each document, where they are known without reading."""

    def __len__(self) -> int: ...

    def read(
        self,
        indices: np.ndarray,
        epochs: np.ndarray | None = None,
    ) -> Rows:
        """The samples at `indices`, at least one; as they are in their `epochs`, None
        for epoch 0, where that matters.
        """


class ArraysReader:
    lengths = None

    def __init__(self, data: Arrays):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def read(
        self,
        indices: np.ndarray,
        epochs: np.ndarray | None = None,
    ) -> Rows:
        return self.data.take(indices)


class DocumentsReader:
    def __init__(self, data: Documents):
        self.data = data
        self.lengths = data.lengths

    def __len__(self) -> int:
        return len(self.data)

    def read(
        self,
        indices: np.ndarray,
        epochs: np.ndarray | None = None,
    ) -> Rows:
        starts = self.data.starts[indices].tolist()  # type: ignore[attr-defined]
        return [
            self.data.tokens[start : start + count]
            for start, count in zip(
                starts,
                self.data.lengths[indices].tolist(),
                strict=True,
            )
        ]


class GrainReader:
    """A `grain.MapDataset`, whose random transformations differ from epoch to epoch."""

    lengths = None

    def __init__(
        self,
        data: grain.MapDataset,
        name: str,
    ):
        self.samples = len(data)
        self.name = name
        self.data = data.repeat()

    def __len__(self) -> int:
        return self.samples

    def read(
        self,
        indices: np.ndarray,
        epochs: np.ndarray | None = None,
    ) -> Rows:
        with pointing_at_user(
            f"reading the source {self.name!r}",
            "mend the Grain data set",
            where=repr(self.data),
            kind=DataError,
        ):
            positions = indices if epochs is None else epochs * self.samples + indices
            elements = [self.data[position] for position in positions.tolist()]
        for element, index in zip(elements, indices.tolist(), strict=True):
            pair = isinstance(element, tuple | list) and len(element) == 2
            if not (pair or hasattr(element, "dtype")):
                raise DataError(
                    f"element {index} of the Grain data set is a"
                    f" {type(element).__name__}",
                    where=f"source {self.name!r}",
                    remedy=(
                        "map each to a pair (inputs, targets), or to a vector of"
                        " tokens; filter with .filter of the Source, for Grain's own"
                        " leaves gaps"
                    ),
                )
        if isinstance(elements[0], tuple | list):
            return stacked(
                [tuple(element) for element in elements],
                f"the source {self.name!r}",
                repr(self.data),
            )
        return [
            document(x, f"document {index} of {self.name!r}")
            for x, index in zip(elements, indices.tolist(), strict=True)
        ]


def checked(data: Any) -> Arrays | Documents | grain.MapDataset:
    """What a person gave a `Source`, as something that a reader can be made for.

    Raises:
      DataError: it is of another kind, or empty.
    """
    if isinstance(data, grain.IterDataset):
        raise DataError(
            "a Grain data set that can only be iterated has no position that holds on"
            " any number of hosts",
            where="Source",
            remedy="give a grain.MapDataset, arrays or documents",
        )
    if isinstance(data, grain.MapDataset):
        if not len(data):
            raise DataError(
                "the Grain data set is empty",
                where=repr(data),
                remedy="give at least one sample",
            )
        if len(data) > 2**40:
            raise DataError(
                "the Grain data set has no end",
                where=repr(data),
                remedy="leave out .repeat(): a Source is endless by itself",
            )
        return data
    if isinstance(data, list):
        return Documents.of(data)
    return data if isinstance(data, Documents) else from_any(data)


def reader(data: Arrays | Documents | grain.MapDataset, name: str) -> Reader:
    if isinstance(data, Arrays):
        return ArraysReader(data)
    return (
        DocumentsReader(data)
        if isinstance(data, Documents)
        else GrainReader(data, name)
    )
