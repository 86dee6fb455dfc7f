"""Tables in memory: arrays, pandas, Polars, Arrow, Hugging Face data sets, tensors.

The libraries that a value comes from are recognised by its class, and never imported
here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from lepton_jax.data.readers.counted import (
    CountedReader,
    check_names,
    columns_of,
    numbered,
    table_digest,
)
from lepton_jax.data.readers.reader import Column, Piece, Rows
from lepton_jax.errors import DataError, first_line

_REMEDY = (
    "give a path, NumPy arrays or a dict of them, a pandas or Polars frame, an Arrow"
    " table, a Hugging Face Dataset, or CPU tensors"
)


class MemoryReader(CountedReader):
    """A table in memory.

    Args:
      table: the rows.
      name: what messages call it.
      reason: why the columns have their types.
    """

    def __init__(
        self,
        table: pl.DataFrame,
        name: str = "table in memory",
        reason: str = "the table's own type",
    ):
        check_names(table.columns, name)
        _check_types(table, name)
        self.name = name
        self.table = table
        self.reason = reason

    def columns(self) -> list[Column]:
        return columns_of(self.table, self.reason)

    def count(self) -> int:
        return self.table.height

    def pieces(
        self,
        size: int,
    ) -> list[Piece]:
        if not self.table.height:
            return []
        row_bytes = max(
            1,
            int(self.table.estimated_size()) // self.table.height,
        )
        step = max(1, size // row_bytes)
        pieces = []
        for start in range(
            0,
            self.table.height,
            step,
        ):
            part = self.table.slice(start, step)
            stop = start + part.height
            pieces.append(
                Piece(
                    "",
                    start,
                    stop,
                    start,
                    table_digest(part),
                )
            )
        return pieces

    def read(self, piece: Piece) -> Rows:
        rows = self.table.slice(
            piece.start,
            piece.stop - piece.start,
        )
        if table_digest(rows) != piece.digest:
            raise DataError(
                "the table changed after it was divided",
                where=self.name,
                remedy="give a copy that nobody writes to",
            )
        return numbered(rows, piece.first_row)


def reader_of_memory(
    anything: Any,
    name: str | None = None,
) -> MemoryReader:
    """Return a reader of what a person holds in memory.

    Args:
      anything: the rows.
      name: what messages call it.

    Raises:
      DataError: it is no table.
    """
    kind = f"{_library(anything)} {type(anything).__name__}".strip()
    name = name or kind
    try:
        table = table_of(anything, name)
    except DataError:
        raise
    except Exception as error:
        # The libraries raise classes of their own for values that have no one type.
        message = first_line(error)
        raise DataError(
            f"the {kind} is no table: {type(error).__name__}: {message}",
            where=name,
            remedy="give each column values of one type",
        ) from error
    return MemoryReader(table, name)


def table_of(
    anything: Any,
    name: str,
) -> pl.DataFrame:
    """Return a table in memory as Polars'.

    NaN in NumPy arrays and pandas frames stands for a missing value.

    Raises:
      DataError: it is no table.
    """
    if isinstance(anything, pl.DataFrame):
        return anything
    if isinstance(anything, pl.LazyFrame):
        return anything.collect()
    if isinstance(anything, pl.Series):
        return anything.to_frame()
    make = _MAKERS.get(_library(anything))
    if make is not None:
        return make(anything, name)
    if isinstance(anything, Mapping):
        return _from_mapping(anything, name)
    if isinstance(anything, Sequence) and not isinstance(
        anything,
        str | bytes,
    ):
        return _from_sequence(anything, name)
    raise DataError(
        f"can't read rows from {type(anything).__name__}",
        where=name,
        remedy=_REMEDY,
    )


def is_memory(anything: Any) -> bool:
    """Whether something is a table in memory rather than a path or several."""
    is_polars = isinstance(
        anything,
        pl.DataFrame | pl.LazyFrame | pl.Series,
    )
    return (
        is_polars
        or _library(anything) in _MAKERS
        or isinstance(
            anything,
            Mapping,
        )
    )


# ---- internals ----


def _check_types(
    table: pl.DataFrame,
    name: str,
) -> None:
    """Check that no column holds Python objects.

    Raises:
      DataError: one does.
    """
    for series in table:
        if series.dtype == pl.Object():
            raise DataError(
                f"column {series.name!r} holds Python objects",
                where=name,
                remedy="give each column values of one type that a table can hold",
            )


def _library(anything: Any) -> str:
    """Return the library that something's class, or one it derives from, is of."""
    for base in type(anything).__mro__:
        library = base.__module__.partition(".")[0]
        if library in _MAKERS:
            return library
    return ""


def _from_arrow(
    anything: Any,
    name: str,
) -> pl.DataFrame:
    if type(anything).__name__ == "RecordBatchReader":
        anything = anything.read_all()
    elif hasattr(anything, "to_table"):  # a data set of files
        anything = anything.to_table()
    return plain_types(_frame(pl.from_arrow(anything)))


def _from_pandas(
    anything: Any,
    name: str,
) -> pl.DataFrame:
    if hasattr(anything, "to_frame"):  # a Series or an Index
        anything = anything.to_frame()
    names = [str(each) for each in anything.columns]
    twice = {each for each in names if names.count(each) > 1}
    if twice:
        raise DataError(
            f"column {min(twice)!r} is there twice",
            where=name,
            remedy="give each column a name of its own",
        )
    return plain_types(_frame(pl.from_pandas(anything)))


def _from_datasets(
    anything: Any,
    name: str,
) -> pl.DataFrame:
    kind = type(anything).__name__
    if kind == "DatasetDict":
        raise DataError(
            f"the data set has the splits {', '.join(map(repr, anything))}",
            where=name,
            remedy="give one of them, such as dataset['train']",
        )
    if not hasattr(
        anything,
        "with_format",
    ) or kind.startswith("Iterable"):
        raise DataError(
            f"a {kind} has no known number of rows",
            where=name,
            remedy="load it with streaming=False",
        )
    return _from_arrow(
        anything.with_format("arrow")[:],
        name,
    )


def _from_torch(
    anything: Any,
    name: str,
) -> pl.DataFrame:
    return _from_array(tensor_values(anything, name), name)


def tensor_values(
    tensor: Any,
    name: str,
) -> np.ndarray:
    """Return a tensor's values.

    Raises:
      DataError: they are on another device, or it is no tensor.
    """
    if not hasattr(tensor, "detach"):
        raise DataError(
            f"can't read rows from torch's {type(tensor).__name__}",
            where=name,
            remedy="give its tensors: a dict of them is a table",
        )
    if tensor.device.type != "cpu":
        raise DataError(
            f"the tensor is on {tensor.device}",
            where=name,
            remedy="give tensor.cpu()",
        )
    plain = tensor.detach().resolve_conj().resolve_neg()
    if str(plain.dtype) == "torch.bfloat16":
        plain = plain.float()
    return plain.numpy()


def _from_array(
    anything: Any,
    name: str,
) -> pl.DataFrame:
    is_masked = np.ma.isMA(anything)
    array = np.ma.asarray(anything) if is_masked else np.asarray(anything)
    if array.dtype.names:
        fields = {field: array[field] for field in array.dtype.names}
        return _from_mapping(fields, name)
    if array.ndim == 2:
        columns = {
            f"column_{i + 1}": column_of(array[:, i], name)
            for i in range(array.shape[1])
        }
        return pl.DataFrame(columns)
    if array.ndim == 0:
        raise DataError(
            "the array is a single number",
            where=name,
            remedy="give an array with the rows along its first dim",
        )
    key = "column_1" if array.ndim == 1 else "values"
    return pl.DataFrame(
        {
            key: column_of(
                array,
                name,
            )
        }
    )


_MAKERS = {
    "datasets": _from_datasets,
    "jax": _from_array,
    "jaxlib": _from_array,
    "numpy": _from_array,
    "pandas": _from_pandas,
    "pyarrow": _from_arrow,
    "torch": _from_torch,
}


def _from_mapping(
    mapping: Mapping[Any, Any],
    name: str,
) -> pl.DataFrame:
    columns = {
        str(key): column_of(
            value,
            name,
        )
        for key, value in mapping.items()
    }
    if len(columns) < len(mapping):
        raise DataError(
            "two keys are the same column name",
            where=name,
            remedy="give each column a name of its own",
        )
    lengths = {key: len(column) for key, column in columns.items()}
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{key!r}: {length}" for key, length in lengths.items())
        raise DataError(
            f"the columns have different numbers of rows: {shown}",
            where=name,
            remedy="give each column one value a row",
        )
    return pl.DataFrame(columns)


def _from_sequence(
    values: Sequence[Any],
    name: str,
) -> pl.DataFrame:
    if not len(values):
        raise DataError(
            "there are no rows",
            where=name,
            remedy="give at least one, so that the columns are known",
        )
    if all(
        isinstance(
            value,
            Mapping,
        )
        for value in values
    ):
        return pl.DataFrame(
            list(values),
            infer_schema_length=None,
            strict=True,
        )
    is_pair = (
        isinstance(
            values,
            tuple,
        )
        and len(values) == 2
    )
    if is_pair and all(is_memory(value) for value in values):
        parts: dict[str, Any] = {}
        for key, part in zip(
            ("inputs", "targets"),
            values,
            strict=True,
        ):
            if isinstance(part, Mapping):
                parts.update(part)
            else:
                parts[key] = part
        return _from_mapping(parts, name)
    return _from_array(np.asarray(values), name)


def column_of(
    values: Any,
    name: str,
) -> pl.Series:
    """Return a column; NaN of an array stands for a missing value.

    Raises:
      DataError: the values have no type of a column.
    """
    library = _library(values)
    if isinstance(values, pl.Series):
        return values
    if library == "pyarrow":
        return pl.Series(values=pl.from_arrow(values))
    if library == "pandas":
        return pl.Series(values=pl.from_pandas(values))
    if library == "torch":
        values = tensor_values(values, name)
    elif not hasattr(values, "__array__"):
        is_scalar = isinstance(
            values,
            str | bytes,
        ) or not hasattr(values, "__len__")
        return pl.Series(
            values=[values] if is_scalar else values,
            strict=True,
        )
    return _array_column(values, name)


def _array_column(
    values: Any,
    name: str,
) -> pl.Series:
    """Return a column of an array (rows, ...)."""
    array = np.asarray(values)
    kind = array.dtype.kind
    if kind == "c" or array.ndim == 0:
        raise DataError(
            f"an array {list(array.shape)} of {array.dtype} is no column",
            where=name,
            remedy="give real numbers with the rows along the first dim",
        )
    if kind in "OU":
        type_ = pl.String() if kind == "U" else None
        return pl.Series(
            values=array.tolist(),
            dtype=type_,
            strict=True,
        )
    is_odd = kind not in "biufMmS"  # bfloat16 and the like
    if is_odd or array.dtype == np.float16:
        array = array.astype(np.float32)
    array = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("=")))
    series = pl.Series(values=array)
    if np.ma.isMA(values) and array.ndim == 1:
        series = series.set(
            pl.Series(np.ma.getmaskarray(values)),
            None,
        )
    return series.fill_nan(None) if series.dtype.is_float() else series


def plain_types(table: pl.DataFrame) -> pl.DataFrame:
    """Return a table with strings in place of dictionaries."""
    types = (pl.Categorical, pl.Enum)
    names = [
        series.name
        for series in table
        if isinstance(
            series.dtype,
            types,
        )
    ]
    return table.with_columns(pl.col(names).cast(pl.String)) if names else table


def _frame(value: Any) -> pl.DataFrame:
    return (
        value.to_frame()
        if isinstance(
            value,
            pl.Series,
        )
        else value
    )
