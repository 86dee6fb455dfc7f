"""Expressions of one row, as text.

The text has the form of a Python expression, but no code of it is run: it is parsed,
and each node becomes a Polars expression. Polars' own `sql_expr` also takes sums over
all rows, by which one row's result would depend on others'.

    age >= 18 and sex in ("f", "m")
    log(1 + col("capital gain")) if known(age) else 0

There are names of columns, col("...") for a name that is no plain word, numbers,
"text", True, False and None, + - * / // % **, comparisons, in, and, or, not,
`x if c else y`, and the functions below. A missing value (null or NaN) makes a
comparison and arithmetic missing; known(x) tells.
"""

from __future__ import annotations

import ast
import functools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from lepton_jax.data.prepare.steps.columns import require
from lepton_jax.errors import DataError, nearest

LONGEST = 10_000  # characters of an expression (assumption)
DEEPEST = 100  # levels of an expression, far below Python's limit of 1,000 calls

OPERATORS: dict[type, Callable[..., pl.Expr]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.invert,
    ast.And: operator.and_,
    ast.Or: operator.or_,
}


def _known(value: pl.Expr) -> pl.Expr:
    return value.is_not_null()


def _least(*values: pl.Expr) -> pl.Expr:
    return pl.min_horizontal(*values)


def _most(*values: pl.Expr) -> pl.Expr:
    return pl.max_horizontal(*values)


def _first_known(*values: pl.Expr) -> pl.Expr:
    return pl.coalesce(*values)


def _number(value: pl.Expr) -> pl.Expr:
    return value.cast(pl.Float64, strict=False)


def _integer(value: pl.Expr) -> pl.Expr:
    return value.cast(pl.Int64, strict=False)


def _text(value: pl.Expr) -> pl.Expr:
    return value.cast(pl.String)


def _contains(text: pl.Expr, part: pl.Expr) -> pl.Expr:
    return text.str.contains(part, literal=True)


def _starts(text: pl.Expr, part: pl.Expr) -> pl.Expr:
    return text.str.starts_with(part)


def _ends(text: pl.Expr, part: pl.Expr) -> pl.Expr:
    return text.str.ends_with(part)


def _strip(text: pl.Expr) -> pl.Expr:
    return text.str.strip_chars()


# Functions by name: the least and the largest count of their arguments, and the
# function.
FUNCTIONS: dict[str, tuple[int, int, Callable[..., pl.Expr]]] = {
    "abs": (1, 1, pl.Expr.abs),
    "sqrt": (1, 1, pl.Expr.sqrt),
    "exp": (1, 1, pl.Expr.exp),
    "log": (1, 1, pl.Expr.log),
    "floor": (1, 1, pl.Expr.floor),
    "ceil": (1, 1, pl.Expr.ceil),
    "round": (1, 1, pl.Expr.round),
    "min": (2, 16, _least),
    "max": (2, 16, _most),
    "known": (1, 1, _known),
    "first_known": (2, 16, _first_known),
    "number": (1, 1, _number),
    "integer": (1, 1, _integer),
    "text": (1, 1, _text),
    "lower": (1, 1, lambda text: text.str.to_lowercase()),
    "upper": (1, 1, lambda text: text.str.to_uppercase()),
    "strip": (1, 1, _strip),
    "length": (1, 1, lambda text: text.str.len_chars()),
    "contains": (2, 2, _contains),
    "starts_with": (2, 2, _starts),
    "ends_with": (2, 2, _ends),
}


class Expression:
    """An expression of one row.

    Args:
      step: the step that has it, for messages.
      text: see above.

    Attributes:
      columns: names of the columns that it reads, in their order in the text.

    Raises:
      DataError: the text is no such expression.
    """

    def __init__(self, step: Any, text: str):
        self.text = text
        self.where = type(step).__name__
        self.step = step
        self.tree = self._parsed()
        self.columns: tuple[str, ...] = ()
        # Built once without types: every fault of the text alone is found now.
        self._build(self.tree, {}, 0)

    def on(self, schema: pl.Schema) -> pl.Expr:
        """Return the expression for a table's columns."""
        return self._build(self.tree, schema, 0)

    def type_on(self, schema: pl.Schema) -> pl.DataType:
        """Return its type for a table's columns.

        Raises:
          DataError: a column is missing, or has a type that the expression can't work
            on.
        """
        require(self.step, schema, self.columns)
        value = self.on(schema).alias("value")
        # Run on no rows: some types are found wrong only there.
        empty = pl.LazyFrame(schema=schema)
        try:
            return empty.select(value).collect().schema["value"]
        except (pl.exceptions.PolarsError, TypeError) as error:
            raise self._error(
                f"does not fit the columns' types: {error}",
                "convert with number(x), integer(x) or text(x)",
            ) from error

    def _parsed(self) -> ast.expr:
        if not isinstance(self.text, str) or len(self.text) > LONGEST:
            raise self._error("is no text, or too long", "write an expression")
        try:
            return ast.parse(
                self.text.strip(),
                mode="eval",
            ).body
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            raise self._error(
                f"can't be parsed: {error}",
                'write it like: age >= 18 and sex in ("f", "m")',
            ) from error

    def _build(
        self,
        node: ast.expr,
        types: Any,
        depth: int,
    ) -> pl.Expr:
        if depth > DEEPEST:
            raise self._error("is too deep", "divide it among several Derive steps")
        match node:
            case ast.Constant(value=value):
                return self._constant(value)
            case ast.Name(id=name):
                return self._column(name, types)
            case ast.Call(func=ast.Name(id="col")):
                return self._column(self._name_of(node), types)

        build = functools.partial(
            self._build,
            types=types,
            depth=depth + 1,
        )
        result = self._combined(node, build)
        if result is None:
            raise self._error(
                f"has {ast.unparse(node)!r}, which is not supported",
                f"use columns, constants, operators and {', '.join(FUNCTIONS)}",
            )
        return result

    def _combined(
        self,
        node: ast.expr,
        build: Callable,
    ) -> pl.Expr | None:
        """Return an expression made of others; None: it is not supported."""
        match node:
            case ast.BinOp(op=ast.Div()):
                return self._quotient(node, build)
            case ast.BinOp(op=op) if type(op) in OPERATORS:
                return OPERATORS[type(op)](
                    build(node.left),
                    build(node.right),
                )
            case ast.UnaryOp(op=op) if type(op) in OPERATORS:
                return OPERATORS[type(op)](build(node.operand))
            case ast.BoolOp():
                return functools.reduce(
                    OPERATORS[type(node.op)],
                    map(build, node.values),
                )
            case ast.IfExp():
                chosen = pl.when(build(node.test)).then(build(node.body))
                return chosen.otherwise(build(node.orelse))
            case ast.Compare():
                return self._comparison(node, build)
            case ast.Call(func=ast.Name(id=name)):
                return self._call(name, node, build)
        return None

    def _constant(self, value: Any) -> pl.Expr:
        if value is not None and not isinstance(value, bool | int | float | str):
            raise self._error(f"has the constant {value!r}", "use numbers and text")
        return pl.lit(value)

    def _column(
        self,
        name: str,
        types: Any,
    ) -> pl.Expr:
        if name not in self.columns:
            self.columns += (name,)
        column = pl.col(name)
        return (
            column.fill_nan(None)
            if name in types and types[name].is_float()
            else column
        )

    def _quotient(
        self,
        node: ast.BinOp,
        build: Callable,
    ) -> pl.Expr:
        divisor = build(node.right)
        if divisor.meta.root_names():
            return build(node.left) / divisor
        # By a constant NumPy divides, and not Polars: see columns.py.
        return (
            build(node.left)
            .cast(pl.Float64)
            .map_batches(
                _Quotient(pl.select(divisor).item()),
                return_dtype=pl.Float64,
                is_elementwise=True,
            )
        )

    def _comparison(
        self,
        node: ast.Compare,
        build: Callable,
    ) -> pl.Expr:
        """Return a comparison; a < b < c is a < b and b < c."""
        results = []
        left = node.left
        for op, right in zip(
            node.ops,
            node.comparators,
            strict=True,
        ):
            results.append(
                self._compared(
                    left,
                    op,
                    right,
                    build,
                )
            )
            left = right
        return functools.reduce(operator.and_, results)

    def _compared(
        self,
        left: ast.expr,
        op: ast.cmpop,
        right: ast.expr,
        build: Callable,
    ) -> pl.Expr:
        if type(op) in OPERATORS:
            return OPERATORS[type(op)](
                build(left),
                build(right),
            )
        if not isinstance(op, ast.In | ast.NotIn):
            raise self._not_comparable(right)
        if not isinstance(right, ast.Tuple | ast.List | ast.Set):
            raise self._not_comparable(right)

        value = build(left)
        equal = [value == build(item) for item in right.elts]
        among = functools.reduce(
            operator.or_,
            equal,
            pl.lit(False),
        )
        return ~among if isinstance(op, ast.NotIn) else among

    def _not_comparable(self, right: ast.expr) -> DataError:
        return self._error(
            f"has {ast.unparse(right)!r} after a comparison that is not supported",
            'use == and !=, and a list after in: sex in ("f", "m")',
        )

    def _call(
        self,
        name: str,
        node: ast.Call,
        build: Callable,
    ) -> pl.Expr:
        if name not in FUNCTIONS:
            raise self._error(
                f"has the unknown function {name!r}{nearest(name, FUNCTIONS)}",
                f"use some of {', '.join(FUNCTIONS)}",
            )
        least, most, function = FUNCTIONS[name]
        count = len(node.args)
        if node.keywords or not least <= count <= most:
            raise self._error(
                f"gives {name} {count} arguments",
                f"give it {least} to {most}, without names",
            )
        return function(*map(build, node.args))

    def _name_of(self, node: ast.Call) -> str:
        match node.args:
            case [ast.Constant(value=str(name))]:
                return name
        raise self._error(
            f"has {ast.unparse(node)!r}",
            'write col("the column\'s name")',
        )

    def _error(
        self,
        what: str,
        remedy: str,
    ) -> DataError:
        return DataError(
            f"the expression {str(self.text)[:200]!r} {what}",
            where=self.where,
            remedy=remedy,
        )


@dataclass(frozen=True)
class _Quotient:
    """Divide by a constant."""

    divisor: float | None

    def __call__(self, series: pl.Series) -> pl.Series:
        divisor = math.nan if self.divisor is None else float(self.divisor)
        with np.errstate(divide="ignore", invalid="ignore"):
            values = series.to_numpy() / np.float64(divisor)
        return pl.Series(
            series.name,
            values,
        ).fill_nan(None)
