"""Readers of a source's samples: of arrays, documents, or a data set of Grain's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import grain
import numpy as np

from lepton_jax.data.arrays import Arrays, from_any
from lepton_jax.data.indexed import Indexed, IndexedReader
from lepton_jax.data.memory import HeldGroups
from lepton_jax.data.rows import Rows, document, stacked
from lepton_jax.errors import DataError, pointing_at_user

# Samples of a Grain data set, at most: `.repeat()` makes it sys.maxsize long.
MOST_SAMPLES = 2**40


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
        object.__setattr__(self, "tokens", document(self.tokens, "Documents.tokens"))
        lengths = _checked_lengths(self.lengths)
        if lengths.sum() != len(self.tokens):
            raise DataError(
                f"the lengths add up to {lengths.sum()}, but there are"
                f" {len(self.tokens)} tokens",
                where="Documents.lengths",
                remedy="give each document's number of tokens",
            )
        object.__setattr__(self, "lengths", lengths)
        object.__setattr__(self, "starts", np.cumsum(lengths) - lengths)

    @classmethod
    def of(cls, documents: Sequence[Any]) -> Documents:
        """Copy documents that are vectors of token ids."""
        if not documents:
            raise DataError(
                "the list of documents is empty",
                where="Source",
                remedy="give at least one document",
            )
        vectors = [document(x, f"document {i}") for i, x in enumerate(documents)]
        lengths = [len(vector) for vector in vectors]
        return cls(np.concatenate(vectors), np.array(lengths))

    def __len__(self) -> int:
        return len(self.lengths)

    def __repr__(self) -> str:
        return (
            f"Documents({len(self)} of {len(self.tokens)} {self.tokens.dtype} tokens)"
        )


def _checked_lengths(given: Any) -> np.ndarray:
    lengths = np.asarray(given)
    is_vector = lengths.ndim == 1 and lengths.size > 0
    if not is_vector or lengths.dtype.kind not in "iu" or lengths.min() < 1:
        least = f", from {lengths.min()}" if is_vector else ""
        raise DataError(
            f"the lengths are {lengths.dtype}{list(lengths.shape)}{least}",
            where="Documents.lengths",
            remedy=(
                "give one whole number for each document, at least 1; leave out"
                " those that are empty"
            ),
        )
    return lengths.astype(np.int64)


class Reader(Protocol):
    """Samples by index."""

    @property
    def lengths(self) -> np.ndarray | None:
        """Tokens of each document, if they are known without reading."""

    def __len__(self) -> int: ...

    def read(
        self,
        indices: np.ndarray,
        epochs: np.ndarray | None = None,
    ) -> Rows:
        """Read the samples at some indices.

        Args:
          indices: at least one.
          epochs: the epoch that each is read in, for data whose random transformations
            differ from epoch to epoch; None: epoch 0.
        """


class ArraysReader:
    """Arrays in memory."""

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
    """Documents in one vector of tokens."""

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
        starts = self.data.starts[indices]  # type: ignore[attr-defined]
        stops = starts + self.data.lengths[indices]
        ranges = zip(
            starts.tolist(),
            stops.tolist(),
            strict=True,
        )
        return [self.data.tokens[start:stop] for start, stop in ranges]


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
        positions = indices
        if epochs is not None:
            positions = epochs * self.samples + indices
        with pointing_at_user(
            f"reading the source {self.name!r}",
            "fix the Grain data set",
            where=repr(self.data),
            kind=DataError,
        ):
            elements = [self.data[position] for position in positions.tolist()]

        for element, index in zip(elements, indices.tolist(), strict=True):
            self._check(element, index)
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

    def _check(
        self,
        element: Any,
        index: int,
    ) -> None:
        is_pair = isinstance(element, tuple | list) and len(element) == 2
        if is_pair or hasattr(element, "dtype"):
            return
        raise DataError(
            f"element {index} of the Grain data set is a {type(element).__name__}",
            where=f"source {self.name!r}",
            remedy=(
                "map each to a pair (inputs, targets), or to a vector of tokens; filter"
                " with .filter of the Source, for Grain's own leaves gaps"
            ),
        )


Samples: TypeAlias = Arrays | Documents | Indexed | grain.MapDataset


def checked(data: Any) -> Samples:
    """Return what a person gave a `Source` as something that `reader` takes.

    Args:
      data: a pair of arrays, an `Arrays`, a list of documents, a `Documents`, or a
        `grain.MapDataset`, or samples on a disk.

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
        if len(data) > MOST_SAMPLES:
            raise DataError(
                "the Grain data set has no end",
                where=repr(data),
                remedy="leave out .repeat(): a Source is endless by itself",
            )
        return data
    if isinstance(data, list):
        return Documents.of(data)
    if isinstance(data, Documents | Indexed):
        return data
    return from_any(data)


def reader(
    data: Samples,
    name: str,
    held: HeldGroups,
) -> Reader:
    """Return a reader of a source's samples.

    Args:
      data: the samples, as `checked` returns them.
      name: of the source, for messages.
      held: what is in memory of samples on a disk.
    """
    if isinstance(data, Indexed):
        return IndexedReader(data, held)
    if isinstance(data, Arrays):
        return ArraysReader(data)
    if isinstance(data, Documents):
        return DocumentsReader(data)
    return GrainReader(data, name)
