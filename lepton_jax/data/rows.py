"""Several samples at once: a pair (inputs, targets) of arrays, samples along the
leading dim, or a list of documents.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from lepton_jax.data.arrays import Arrays, aligned_empty
from lepton_jax.errors import DataError, pointing_at_user

Rows = tuple[Any, Any] | list[np.ndarray]


@dataclass(frozen=True, eq=False)
class Function:
    """A person's function of samples, applied to rows.

    Attributes:
      function: of (inputs, targets), or of (tokens) for a document.
      batched: whether it takes rows instead: arrays with the samples along their
        leading dim, or a list of documents.
      kind, name, where: what it is, is called and stands, for messages.
    """

    function: Callable[..., Any]
    batched: bool
    kind: str
    name: str
    where: str

    @property
    def role(self) -> str:
        return f"the {self.kind} {self.name}"

    def tests(self, rows: Rows) -> np.ndarray:
        """Which samples it keeps: bool (count,)."""
        results = self._call(rows)
        if self.batched:
            kept = np.asarray(results)
            if kept.dtype != np.bool_ or kept.shape != (length(rows),):
                raise DataError(
                    f"{self.role} returned {kept.dtype}{list(kept.shape)}",
                    where=self.where,
                    remedy=(
                        f"return booleans, one for each of the {length(rows)} samples"
                    ),
                )
            return kept
        for value in results:
            if not isinstance(value, bool) and (
                getattr(value, "dtype", None) != np.bool_ or np.shape(value)
            ):
                raise DataError(
                    f"{self.role} returned {value!r}",
                    where=self.where,
                    remedy="return True to keep the sample, False to leave it out",
                )
        return np.array(results, bool)

    def maps(self, rows: Rows) -> Rows:
        """What it makes of them."""
        results = self._call(rows)
        if not self.batched:
            results = self._stacked(results)
        if isinstance(results, list):
            made: Rows = [document(x, f"{self.role}'s document") for x in results]
        elif isinstance(results, tuple) and len(results) == 2:
            pairs = Arrays(*results)
            made = pairs.inputs, pairs.targets
        else:
            raise DataError(
                f"{self.role} returned a {type(results).__name__}",
                where=self.where,
                remedy=(
                    "return a pair of arrays (inputs, targets), or a list of documents"
                ),
            )
        if length(made) != length(rows):
            raise DataError(
                f"{self.role} made {length(made)} samples of {length(rows)}",
                where=self.where,
                remedy="return as many as came in; filter() leaves samples out",
            )
        return made

    def _call(self, rows: Rows) -> Any:
        with pointing_at_user(
            self.role,
            "compare what the function expects with the samples' shapes and dtypes: "
            + described(rows),
            where=self.where,
            kind=DataError,
        ):
            if self.batched:
                return (
                    self.function(rows)
                    if isinstance(rows, list)
                    else self.function(*rows)
                )
            return [self.function(*one) for one in samples(rows)]

    def _stacked(self, results: list) -> Any:
        pairs = [isinstance(one, tuple) and len(one) == 2 for one in results]
        if not any(pairs):
            return results
        if not all(pairs):
            raise DataError(
                f"{self.role} returned a pair for one sample and a"
                f" {type(results[pairs.index(False)]).__name__} for another",
                where=self.where,
                remedy="return a pair (inputs, targets) for each",
            )
        return stacked(results, self.role, self.where)


def stacked(
    pairs: Sequence[tuple[Any, Any]],
    role: str,
    where: str,
) -> tuple[Any, Any]:
    """Rows of samples that are pairs of arrays of one shape, or of dicts of them.

    Raises:
      DataError: the samples' shapes differ, or they hold no numbers.
    """
    with pointing_at_user(
        f"stacking the samples of {role}",
        "make them pairs (inputs, targets) of one shape",
        where=where,
        kind=DataError,
    ):
        rows = Arrays(
            *jax.tree.map(
                lambda *leaves: np.stack([np.asarray(x) for x in leaves]), *pairs
            )
        )
    return rows.inputs, rows.targets


def document(x: Any, name: str) -> np.ndarray:
    """A document's tokens as a vector of at most 32-bit integers.

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
    return len(rows) if isinstance(rows, list) else len(jax.tree.leaves(rows)[0])


def lengths(rows: Rows) -> np.ndarray:
    """Tokens of each document: int64 (count,).

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
    """Each sample as the arguments of a person's function."""
    if isinstance(rows, list):
        return [(tokens,) for tokens in rows]
    return [jax.tree.map(lambda x: x[i], rows) for i in range(length(rows))]  # noqa: B023


def merged(parts: Sequence[tuple[np.ndarray, Rows]], count: int) -> Rows:
    """Rows put together from (the places they go to, rows)."""
    if isinstance(parts[0][1], list):
        documents: list = [None] * count
        for places, rows in parts:
            for place, tokens in zip(places.tolist(), rows, strict=True):
                documents[place] = tokens
        return documents
    if len(parts) == 1:
        return parts[0][1]

    def scatter(*leaves: np.ndarray) -> np.ndarray:
        out = aligned_empty((count, *leaves[0].shape[1:]), leaves[0].dtype)
        for (places, _), leaf in zip(parts, leaves, strict=True):
            out[places] = leaf
        return out

    return jax.tree.map(scatter, *(rows for _, rows in parts))


def described(rows: Rows) -> str:
    """Shapes and dtypes of a sample; equal for samples that can stand in one batch."""
    if isinstance(rows, list):
        return "documents"
    leaves, tree = jax.tree.flatten(rows)
    return _described(tree, tuple((x.dtype, x.shape[1:]) for x in leaves))


@functools.lru_cache(256)
def _described(tree: Any, leaves: tuple) -> str:
    inputs, targets = jax.tree.unflatten(
        tree, [f"{dtype}{list(shape)}" for dtype, shape in leaves]
    )
    return f"inputs {inputs}, targets {targets}".replace("'", "")
