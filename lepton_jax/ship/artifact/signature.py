"""The signature of an artifact: the program's arrays, and the columns of raw rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lepton_jax.trees import by_path

INPUTS = "inputs"  # name of a model's only input
OUTPUTS = "outputs"  # of the model's own outputs
PREDICTION = "prediction"  # of the decoded ones
ANY = -1  # extent of the batch dim, which comes first


@dataclass(frozen=True)
class Tensor:
    """An array that a program takes or returns.

    Attributes:
      name: "inputs", or the model's argument; "outputs", "prediction", or, where
        there are several, "outputs.path".
      dtype: NumPy's name of it: "float32".
      shape: extents; the first is -1, the batch.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def from_fields(
        cls,
        fields: Mapping[str, Any],
    ) -> Tensor:
        """Return the tensor of plain data."""
        shape = tuple(int(extent) for extent in fields["shape"])
        return cls(
            str(fields["name"]),
            str(fields["dtype"]),
            shape,
        )


@dataclass(frozen=True)
class Column:
    """A column of raw rows.

    Attributes:
      name: of the column.
      kind: "number", "text", "category" or "image".
      values: of a category, the most frequent ones of training first. Of an image: its
        shape, where a cell is the pixels as nested lists; () where it is the bytes of
        a file. Else ().
      example: a value of a stored row, as JSON has it; None: it was missing, or is an
        image.
    """

    name: str
    kind: str
    values: tuple[Any, ...] = ()
    example: Any = None

    @classmethod
    def from_fields(
        cls,
        fields: Mapping[str, Any],
    ) -> Column:
        """Return the column of plain data."""
        return cls(
            str(fields["name"]),
            str(fields["kind"]),
            tuple(fields["values"]),
            fields["example"],
        )


def to_fields(parts: tuple[Any, ...]) -> list[dict[str, Any]]:
    """Return tensors or columns as plain data."""
    return [asdict(part) for part in parts]


def named(
    tree: Any,
    root: str,
) -> dict[str, Any]:
    """Return the leaves of a tree by the names that a signature gives them.

    >>> named({"a": 1, "b": {"c": 2}}, "outputs")
    {'outputs.a': 1, 'outputs.b.c': 2}
    >>> named(3, "outputs")
    {'outputs': 3}
    """
    leaves = by_path(tree).items()
    return {
        f"{root}.{path.replace('/', '.')}" if path else root: leaf
        for path, leaf in leaves
    }


def named_inputs(tree: Any) -> dict[str, Any]:
    """Return a model's inputs by name: its arguments, or "inputs" for the only one."""
    return {path or INPUTS: leaf for path, leaf in by_path(tree).items()}
