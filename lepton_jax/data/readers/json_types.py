"""The types of JSON values, and values as they fit a type."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

import polars as pl

from lepton_jax.data.readers.many import common_type


class Unfit(Exception):
    """A value that does not fit its column's type."""


def kind_of(value: Any) -> str:
    """Return the kind of a value in words."""
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "text"
    return "a list" if isinstance(value, list) else "an object"


def type_of(value: Any) -> pl.DataType:
    """Return the type of a value; Null if it says nothing."""
    if isinstance(value, bool):
        return pl.Boolean()
    if isinstance(value, int):
        if -(2**63) <= value < 2**63:
            return pl.Int64()
        return pl.UInt64() if 0 <= value < 2**64 else pl.String()
    if isinstance(value, float):
        return pl.Null() if math.isnan(value) else pl.Float64()
    if isinstance(value, str):
        return pl.String()
    if isinstance(value, list):
        inner = _merged(map(type_of, value))
        return pl.List(pl.String() if inner is None else inner)
    if isinstance(value, dict) and value:
        fields = {name: type_of(inner) for name, inner in value.items()}
        return pl.Struct(fields)
    return pl.Null()


def merged(types: Iterable[pl.DataType]) -> pl.DataType | None:
    """Return the type that holds values of several; None if there is none.

    Where nothing is known of a type, it is String.
    """
    common = _merged(types)
    return None if common is None else _settled(common)


def conformed(
    value: Any,
    type_: pl.DataType,
) -> Any:
    """Return a value as one of a type.

    Raises:
      Unfit: it is none.
    """
    if value is None or (
        isinstance(
            value,
            float,
        )
        and math.isnan(value)
    ):
        return None
    if isinstance(type_, pl.List):
        return _list(value, type_)
    if isinstance(type_, pl.Struct):
        return _struct(value, type_)
    if type_ == pl.String():
        if isinstance(value, str):
            return value
        return json.dumps(value, ensure_ascii=False)
    return _scalar(value, type_)


# ---- internals ----


def _merged(types: Iterable[pl.DataType]) -> pl.DataType | None:
    """Return the type that holds values of several, Null where nothing is known."""
    common: pl.DataType = pl.Null()
    for type_ in dict.fromkeys(types):
        both = _both(common, type_)
        if both is None:
            return None
        common = both
    return common


def _both(
    one: pl.DataType,
    other: pl.DataType,
) -> pl.DataType | None:
    if isinstance(one, pl.List) and isinstance(
        other,
        pl.List,
    ):
        inner = _both(_inner(one), _inner(other))
        return None if inner is None else pl.List(inner)
    if isinstance(one, pl.Struct) and isinstance(
        other,
        pl.Struct,
    ):
        fields = {field.name: field.dtype for field in one.fields}
        for field in other.fields:
            known = fields.get(
                field.name,
                pl.Null(),
            )
            both = _both(
                _instance(known),
                _instance(field.dtype),
            )
            if both is None:
                return None
            fields[field.name] = both
        return pl.Struct(dict(sorted(fields.items())))
    numbers = {pl.String(), pl.Int64(), pl.UInt64()}
    if {one, other} <= numbers:
        # Whole numbers beyond 64 bits, or of either sign beyond 63, keep their digits.
        return common_type(one, other) or pl.String()
    return common_type(one, other)


def _settled(type_: pl.DataType) -> pl.DataType:
    if type_ == pl.Null():
        return pl.String()
    if isinstance(type_, pl.List):
        return pl.List(_settled(_inner(type_)))
    if isinstance(type_, pl.Struct):
        fields = {
            field.name: _settled(_instance(field.dtype)) for field in type_.fields
        }
        return pl.Struct(fields)
    return type_


def _inner(type_: pl.List) -> pl.DataType:
    return _instance(type_.inner)


def _instance(type_: Any) -> pl.DataType:
    return type_() if isinstance(type_, type) else type_


def _list(
    value: Any,
    type_: pl.List,
) -> list[Any]:
    if not isinstance(value, list):
        raise Unfit
    return [
        conformed(
            inner,
            _inner(type_),
        )
        for inner in value
    ]


def _struct(
    value: Any,
    type_: pl.Struct,
) -> dict[str, Any] | None:
    if not isinstance(value, dict):
        raise Unfit
    known = {field.name: _instance(field.dtype) for field in type_.fields}
    if not set(value) <= set(known):
        raise Unfit
    return {
        name: conformed(
            value.get(name),
            inner,
        )
        for name, inner in known.items()
    }


def _scalar(
    value: Any,
    type_: pl.DataType,
) -> Any:
    if type_ == pl.Boolean():
        if isinstance(value, bool):
            return value
        raise Unfit
    if isinstance(value, bool):
        raise Unfit
    if type_.is_numeric() and isinstance(
        value,
        int | float,
    ):
        if type_.is_float():
            return float(value)
        if float(value).is_integer():
            return int(value)
        raise Unfit
    if type_.is_temporal() and isinstance(value, str):
        parsed = pl.Series([value]).cast(
            type_,
            strict=False,
        )[0]
        if parsed is not None:
            return parsed
    raise Unfit
