"""The columns of raw rows, as a client has to know them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lepton_jax.ship.artifact.signature import Column

MOST_VALUES = 100  # of a category that are listed; assumption: what a menu has room for
LONGEST_EXAMPLE = 400  # characters of a text; assumption
# Steps that take texts apart; what they read is text, whatever it looks like.
TEXTS = (
    "ByteTokens",
    "CharacterTokens",
    "FileTokens",
    "NgramTokens",
    "WordTokens",
    "CleanText",
)
CATEGORIES = ("Vocabulary", "OneHot", "HashCategories")
PICTURES = "Images"


def columns_of(
    serving: Any,
    rows: Any = None,
) -> tuple[Column, ...]:
    """Return the raw columns that a model's inputs depend on.

    Args:
      serving: the `Serving`; None: there is none.
      rows: a Polars table of raw rows, of which examples are taken; None: there is
        none.
    """
    if serving is None:
        return ()
    schema = serving.prepared._raw.schema
    names = [name for name in schema if name in serving.needed]
    left_out = {*serving.prepared.targets, *names_of_files(serving)}
    texts = _columns_of_steps(serving, TEXTS)
    columns = []
    for name in names:
        if name in left_out:
            continue
        kind = _kind(name, schema[name], texts)
        values: tuple[Any, ...] = ()
        if kind == "category":
            values = _values(serving, name)
        elif kind == "image":
            values = tuple(
                getattr(
                    schema[name],
                    "shape",
                    None,
                )
                or ()
            )
        columns.append(
            Column(
                name,
                kind,
                values,
                _example(name, kind, rows),
            )
        )
    return tuple(columns)


def names_of_files(serving: Any) -> set[str]:
    """Return the columns that only name a picture in messages.

    Raw rows need not have them.
    """
    from lepton_jax.data.prepare.steps.images import FILES  # needs an extra

    entries = [entry["arguments"] for entry in serving.prepared.manifest["steps"]]
    if PICTURES not in [arguments["step"] for arguments in entries]:
        return set()
    served = [
        arguments
        for arguments, fitted in zip(
            entries,
            serving.prepared.steps,
            strict=True,
        )
        if fitted.step.serves
    ]
    used = {value for arguments in served for value in _words(arguments)}
    return (set(FILES) & set(serving.needed)) - used


def _words(value: Any) -> set[str]:
    """Return all texts in plain data."""
    if isinstance(value, str):
        return {value}
    parts = (
        value.values()
        if isinstance(
            value,
            Mapping,
        )
        else value
    )
    if not isinstance(value, Mapping | list | tuple):
        return set()
    return {word for part in parts for word in _words(part)}


# ---- internals ----


def _columns_of_steps(
    serving: Any,
    steps: tuple[str, ...],
) -> set[str]:
    """Return the columns that some kinds of steps name."""
    found: set[str] = set()
    for entry in serving.prepared.manifest["steps"]:
        arguments = entry["arguments"]
        if arguments["step"] in steps:
            named = arguments.get("columns") or arguments.get("column") or ()
            found |= (
                {named}
                if isinstance(
                    named,
                    str,
                )
                else set(named)
            )
    return found


def _kind(
    name: str,
    dtype: Any,
    texts: set[str],
) -> str:
    import polars as pl  # an extra: a model of arrays alone does not need it

    if (
        dtype == pl.Binary
        or isinstance(
            dtype,
            pl.Array,
        )
        or dtype == pl.List
    ):
        return "image"
    if dtype.is_numeric():
        return "number"
    if dtype == pl.String and name in texts:
        return "text"
    return "category"


def _values(
    serving: Any,
    name: str,
) -> tuple[Any, ...]:
    """Return the categories of a column that training saw, most frequent first."""
    for entry, fitted in zip(
        serving.prepared.manifest["steps"], serving.prepared.steps, strict=True
    ):
        if entry["arguments"]["step"] not in CATEGORIES or fitted.state is None:
            continue
        if {"column", "value", "code"} <= set(fitted.state.columns):
            rows = fitted.state.sort("code").rows(named=True)
            found = [row["value"] for row in rows if row["column"] == name]
            known = [value for value in found if value is not None]
            if known:
                return tuple(known[:MOST_VALUES])
    return ()


def _example(
    name: str,
    kind: str,
    rows: Any,
) -> Any:
    """Return the first value of a column that is there, as JSON has it."""
    if rows is None or kind == "image" or name not in rows.columns:
        return None
    for value in rows[name].to_list():
        if isinstance(
            value,
            float,
        ) and not math.isfinite(value):
            continue
        if isinstance(value, int | float | bool):
            return value
        if value is not None:
            return str(value)[:LONGEST_EXAMPLE]
    return None
