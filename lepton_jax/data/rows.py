"""Rows: several samples at once.

Rows are a pair (inputs, targets) of arrays, or of dicts of them, with the samples along
the leading dim; or a list of documents.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from lepton_jax.data.arrays import Arrays, Pair, aligned_empty
from lepton_jax.errors import DataError, pointing_at_user

Rows = Pair | list[np.ndarray]


@dataclass(frozen=True, eq=False)
class Function:
    """A person's function of samples, applied to rows.

    Attributes:
      function: of (inputs, targets), or of (tokens) for a document.
      batched: whether it takes rows instead.
      kind: "filter", "map" or "augment", for messages.
      name: its name, for messages.
      where: file and line, for messages.
    """

    function: Callable[..., Any]
    batched: bool
    kind: str
    name: str
    where: str

    @property
    def role(self) -> str:
        """Its kind and name, for messages."""
        return f"the {self.kind} {self.name}"

    def tests(self, rows: Rows) -> np.ndarray:
        """Return which samples the function keeps: bool (count,)."""
        results = self._call(rows)
        if self.batched:
            return self._checked_mask(results, length(rows))

        for value in results:
            if not _is_boolean(value):
                raise DataError(
                    f"{self.role} returned {value!r}",
                    where=self.where,
                    remedy="return True to keep the sample, False to leave it out",
                )
        return np.array(results, bool)

    def maps(
        self,
        rows: Rows,
        keys: np.ndarray | None = None,
    ) -> Rows:
        """Apply the function to the rows; there must be as many afterwards.

        Args:
          rows: the samples.
          keys: of each, uint64 (count,), for a function that augments them.
        """
        results = self._call(rows, keys)
        if not self.batched:
            results = self._stacked(results)

        mapped: Rows
        if isinstance(results, list):
            mapped = [document(x, f"{self.role}'s document") for x in results]
        elif _is_pair(results):
            pairs = Arrays(*results)
            mapped = pairs.inputs, pairs.targets
        else:
            raise DataError(
                f"{self.role} returned a {type(results).__name__}",
                where=self.where,
                remedy=(
                    "return a pair of arrays (inputs, targets), or a list of documents"
                ),
            )

        if length(mapped) != length(rows):
            raise DataError(
                f"{self.role} made {length(mapped)} samples of {length(rows)}",
                where=self.where,
                remedy="return as many as came in; filter() leaves samples out",
            )
        return mapped

    def _call(
        self,
        rows: Rows,
        keys: np.ndarray | None = None,
    ) -> Any:
        """Return the function's result, or a list of one for each sample."""
        expected = "compare what the function expects with the samples' shapes and"
        with pointing_at_user(
            self.role,
            f"{expected} dtypes: {described(rows)}",
            where=self.where,
            kind=DataError,
        ):
            if self.batched:
                first = () if keys is None else (keys,)
                arguments = (rows,) if isinstance(rows, list) else rows
                return self.function(*first, *arguments)
            if keys is None:
                return [self.function(*arguments) for arguments in samples(rows)]
            return [
                self.function(_generator(key), *arguments)
                for key, arguments in zip(keys.tolist(), samples(rows), strict=True)
            ]

    def _checked_mask(
        self,
        results: Any,
        count: int,
    ) -> np.ndarray:
        mask = np.asarray(results)
        if mask.dtype != np.bool_ or mask.shape != (count,):
            raise DataError(
                f"{self.role} returned {mask.dtype}{list(mask.shape)}",
                where=self.where,
                remedy=f"return booleans, one for each of the {count} samples",
            )
        return mask

    def _stacked(self, results: list) -> Any:
        """Return pairs as one pair of arrays; anything else as it is."""
        pairs = [_is_pair(result) for result in results]
        if not any(pairs):
            return results
        if not all(pairs):
            other = results[pairs.index(False)]
            raise DataError(
                f"{self.role} returned a pair for one sample and a"
                f" {type(other).__name__} for another",
                where=self.where,
                remedy="return a pair (inputs, targets) for each",
            )
        return stacked(results, self.role, self.where)


def _generator(key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=key))


def _is_pair(result: Any) -> bool:
    return isinstance(result, tuple) and len(result) == 2


def _is_boolean(value: Any) -> bool:
    if isinstance(value, bool):
        return True
    return getattr(value, "dtype", None) == np.bool_ and not np.shape(value)


def stacked(
    pairs: Sequence[Pair],
    role: str,
    where: str,
) -> Pair:
    """Return samples as rows.

    Args:
      pairs: the samples: pairs of arrays of one shape, or of dicts of them.
      role: what gave them, for messages.
      where: its place, for messages.

    Raises:
      DataError: the samples' shapes differ, or they hold no numbers.
    """
    with pointing_at_user(
        f"stacking the samples of {role}",
        "make them pairs (inputs, targets) of one shape",
        where=where,
        kind=DataError,
    ):
        inputs, targets = jax.tree.map(_stack, *pairs)
        rows = Arrays(inputs, targets)
    return rows.inputs, rows.targets


def _stack(*leaves: Any) -> np.ndarray:
    return np.stack([np.asarray(x) for x in leaves])


def document(x: Any, name: str) -> np.ndarray:
    """Return a document's tokens as a vector of at most 32-bit integers.

    Raises:
      DataError: it is empty, of another rank, or holds no whole numbers.
    """
    if np.ndim(x) != 1 or not np.size(x):
        raise DataError(
            f"{name} has the shape {np.shape(x)}",
            where=name,
            remedy=(
                "give each document as a vector of at least one token; leave out those"
                " that are empty; a pair (inputs, targets) is a tuple"
            ),
        )
    tokens = Arrays(x).inputs
    if tokens.dtype.kind not in "iu":
        raise DataError(
            f"{name} has dtype {tokens.dtype}",
            where=name,
            remedy="give token ids as integers",
        )
    return tokens


def length(rows: Rows) -> int:
    """Return how many samples there are."""
    if isinstance(rows, list):
        return len(rows)
    return len(jax.tree.leaves(rows)[0])


def lengths(rows: Rows) -> np.ndarray:
    """Return the tokens of each document: int64 (count,).

    Raises:
      DataError: the samples are no documents.
    """
    if not isinstance(rows, list):
        raise DataError(
            f"there are no documents to pack, but {described(rows)}",
            where="pack",
            remedy="pack a source of documents: a list of vectors of token ids",
        )
    return np.array([len(tokens) for tokens in rows], np.int64)


def samples(rows: Rows) -> list[tuple]:
    """Return each sample as the arguments of a person's function."""
    if isinstance(rows, list):
        return [(tokens,) for tokens in rows]

    def sample(index: int) -> tuple:
        return jax.tree.map(lambda x: x[index], rows)

    return [sample(index) for index in range(length(rows))]


def merged(parts: Sequence[tuple[np.ndarray, Rows]], count: int) -> Rows:
    """Put rows together.

    Args:
      parts: (the places that they go to, rows).
      count: samples of all parts.
    """
    if isinstance(parts[0][1], list):
        documents: list = [None] * count
        for places, rows in parts:
            for place, tokens in zip(places.tolist(), rows, strict=True):
                documents[place] = tokens
        return documents
    if len(parts) == 1:
        return parts[0][1]

    def scatter(*leaves: np.ndarray) -> np.ndarray:
        first = leaves[0]
        out = aligned_empty((count, *first.shape[1:]), first.dtype)
        for (places, _), leaf in zip(parts, leaves, strict=True):
            out[places] = leaf
        return out

    return jax.tree.map(scatter, *(rows for _, rows in parts))


def described(rows: Rows) -> str:
    """Describe a sample's shapes and dtypes; equal texts can stand in one batch."""
    if isinstance(rows, list):
        return "documents"
    leaves, tree = jax.tree.flatten(rows)
    kinds = tuple((x.dtype, x.shape[1:]) for x in leaves)
    return _described(tree, kinds)


@functools.lru_cache(256)
def _described(tree: Any, leaves: tuple) -> str:
    kinds = [f"{dtype}{list(shape)}" for dtype, shape in leaves]
    inputs, targets = jax.tree.unflatten(tree, kinds)
    return f"inputs {inputs}, targets {targets}".replace("'", "")
