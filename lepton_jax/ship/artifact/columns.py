"""The columns of raw rows, as a client has to know them."""

from __future__ import annotations

import math
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


def columns_of(serving: Any, rows: Any = None) -> tuple[Column, ...]:
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
    targets = serving.prepared.targets
    texts = _columns_of_steps(serving, TEXTS)
    columns = []
    for name in names:
        if name in targets:
            continue
        values = _values(serving, name)
        kind = _kind(name, schema[name], texts)
        columns.append(
            Column(
                name,
                kind,
                values if kind == "category" else (),
                _example(name, kind, rows),
            )
        )
    return tuple(columns)


# ---- internals ----


def _columns_of_steps(serving: Any, steps: tuple[str, ...]) -> set[str]:
    """Return the columns that some kinds of steps name."""
    found: set[str] = set()
    for entry in serving.prepared.manifest["steps"]:
        arguments = entry["arguments"]
        if arguments["step"] in steps:
            named = arguments.get("columns") or arguments.get("column") or ()
            found |= {named} if isinstance(named, str) else set(named)
    return found


def _kind(name: str, dtype: Any, texts: set[str]) -> str:
    import polars as pl  # an extra: a model of arrays alone does not need it

    if dtype == pl.Binary or isinstance(dtype, pl.Array) or dtype == pl.List:
        return "image"
    if dtype.is_numeric():
        return "number"
    if dtype == pl.String and name in texts:
        return "text"
    return "category"


def _values(serving: Any, name: str) -> tuple[Any, ...]:
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


def _example(name: str, kind: str, rows: Any) -> Any:
    """Return the first value of a column that is there, as JSON has it."""
    if rows is None or kind == "image" or name not in rows.columns:
        return None
    for value in rows[name].to_list():
        if isinstance(value, float) and not math.isfinite(value):
            continue
        if isinstance(value, int | float | bool):
            return value
        if value is not None:
            return str(value)[:LONGEST_EXAMPLE]
    return None
