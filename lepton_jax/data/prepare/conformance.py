"""The laws that a step keeps, and a suite that checks any step: `conformance`.

Engines rely on them: on any division of the rows among any number of workers the result
is the same, and each row that is no longer there has a reason.

Example:
  >>> import polars as pl
  >>> from lepton_jax.data import prepare
  >>> rows = pl.DataFrame({"age": [22.0, None, 38.0, 35.0]})
  >>> print(prepare.conformance(prepare.FillMissing("age", by="median"), rows))
  FillMissing keeps the laws: plain, checked, pure, traced, stored, mergeable, \
divisible, idempotent, serves
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from lepton_jax.data.prepare.step import SPLIT, Fitted, Outcome, Step
from lepton_jax.data.readers.reader import NOTES, ROW, SOURCE
from lepton_jax.errors import DataError, LeptonError

LAWS = {
    "plain": "its arguments are plain data: it can be made again from their JSON",
    "checked": (
        "`check` says the columns and types that `run` makes, and names a column that"
        " is missing, before a row is read"
    ),
    "pure": (
        "the same rows and state give the same outcome, in memory and streamed, and"
        " none is written to"
    ),
    "traced": (
        "SOURCE and ROW go with each row, rows keep their order, and each row that is"
        " dropped has one note with a reason"
    ),
    "stored": "partials and states are tables that an Arrow file holds",
    "mergeable": (
        "partials of neighbouring pieces, some of them empty, merge to the same in any"
        " grouping: counts exactly, sums up to 1e-12 of the largest"
    ),
    "divisible": (
        "if it claims to be independent of the rows' order: run piece by piece, or on"
        " rows in another order, it makes the same of each row, and rows in another"
        " order give the same state"
    ),
    "idempotent": (
        "if it claims so: with the same state, applying it to its own result changes"
        " nothing"
    ),
    "serves": "if it is part of prediction: it runs on rows without SOURCE and ROW",
}
# Relative error that a sum may have for being added in another order; the protocol of
# steps says so.
TOLERANCE = 1e-12
PIECES = 4  # into which rows are divided, if the caller does not say where
ACTIONS = ("dropped", "changed", "flagged")


@dataclass(frozen=True)
class Conformance:
    """The laws that a step keeps.

    Attributes:
      step: name of its class.
      kept: names of the laws that were checked.
      unlearned: why the step could not be fitted to the rows, in which case only the
        laws before a fit were checked; None: it could, or has no state.
    """

    step: str
    kept: tuple[str, ...]
    unlearned: str | None = None

    def __str__(self) -> str:
        return f"{self.step} keeps the laws: {', '.join(self.kept)}"


def conformance(
    step: Step,
    rows: pl.DataFrame,
    *,
    cuts: Sequence[int] | None = None,
    seed: int = 0,
    without: Collection[str] = (),
) -> Conformance:
    """Check that a step keeps the laws on which engines and prediction rely.

    It is one line in anybody's tests.

    Args:
      step: the step.
      rows: some rows that it can work on. SOURCE and ROW are added if they are not
        there.
      cuts: where the rows are divided into pieces, ascending, some perhaps twice; None:
        at random.
      seed: decides cuts and orders.
      without: names of laws that are not checked.

    Raises:
      DataError: a law is broken; its name comes first in the message.
    """
    rng = np.random.default_rng(seed)
    case = _Case(
        step,
        _numbered(rows).rechunk(),
        cuts,
        rng,
    )
    kept = []
    unlearned = None
    for law in LAWS:
        if law == "pure":
            unlearned = case.fit()
        if unlearned is not None:
            break
        if law in without or not case.applies(law):
            continue
        with _breaking(law, step):
            getattr(case, f"check_{law}")()
        kept.append(law)
    return Conformance(
        type(step).__name__,
        tuple(kept),
        unlearned,
    )


def fitted(step: Step, pieces: Sequence[pl.DataFrame]) -> pl.DataFrame | None:
    """Return the state of a step, fitted to some rows; None: it has none.

    Args:
      step: the step.
      pieces: the rows; at least one piece, which may be empty.

    Raises:
      DataError: there is nothing to learn.
    """
    if not isinstance(step, Fitted):
        return None
    return step.finish(
        step.merge(
            [
                _partial(
                    step,
                    piece,
                )
                for piece in pieces
            ]
        )
    )


# ---- internals ----


class _Case:
    """A step, rows, their division, and the state."""

    def __init__(
        self,
        step: Step,
        rows: pl.DataFrame,
        cuts: Sequence[int] | None,
        rng: np.random.Generator,
    ):
        self.step = step
        self.rows = rows
        self.rng = rng
        if cuts is None:
            cuts = sorted(
                rng.integers(
                    0,
                    len(rows) + 1,
                    PIECES - 1,
                ).tolist()
            )
        ends = [*cuts, len(rows)]
        starts = [0, *cuts]
        self.pieces = [
            rows[start:end]
            for start, end in zip(
                starts,
                ends,
                strict=True,
            )
        ]
        self.state: pl.DataFrame | None = None

    def applies(self, law: str) -> bool:
        claims = {
            "stored": isinstance(self.step, Fitted),
            "mergeable": isinstance(self.step, Fitted),
            "divisible": self.step.order_independent,
            "idempotent": self.step.idempotent,
            "serves": self.step.serves,
        }
        return claims.get(law, True)

    def fit(self) -> str | None:
        """Fit the step; return why there is nothing to learn."""
        try:
            with _breaking("mergeable", self.step):
                self.state = fitted(self.step, self.pieces)
        except DataError as error:
            if error.what.startswith("mergeable:"):
                raise
            return error.what
        return None

    def run(self, rows: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
        """Return the rows and the notes of the outcome."""
        outcome = self.step.run(
            rows.lazy(),
            self.state,
        )
        return outcome.table.collect(), _notes_of(outcome)

    def check_plain(self) -> None:
        arguments = json.loads(json.dumps(self.step.to_json()))
        name = arguments.pop("step")
        _require(name == type(self.step).__name__, f"it calls itself {name}")
        known = {field.name for field in dataclasses.fields(self.step)}
        _require(known <= set(arguments), "its JSON has not all of its arguments")
        # It may say more, such as the digest of a file that it reads.
        given = {name: arguments[name] for name in known}
        again = type(self.step)(**given)
        _require(again == self.step, f"from its JSON comes {again}, not {self.step}")

    def check_checked(self) -> None:
        schema = self.rows.schema
        self.step.check(schema)
        for name in schema:
            rest = {other: t for other, t in schema.items() if other != name}
            try:
                self.step.check(pl.Schema(rest))
            except DataError as error:
                _require(
                    repr(name) in str(error),
                    f"without the column {name!r} the error is: {error.what}",
                )

    def check_pure(self) -> None:
        rows = self.rows.clone()
        table, notes = self.run(rows)
        declared = self.step.check(self.rows.schema)
        _require(
            table.schema == declared,
            f"it makes {table.schema}, but `check` says {declared}",
        )
        _require(rows.equals(self.rows), "it wrote to the rows")
        again, notes_again = self.run(rows)
        _require_same(table, again, "the second time the rows are others")
        _require_same(notes, notes_again, "the second time the notes are others")
        outcome = self.step.run(
            rows.lazy(),
            self.state,
        )
        streamed = outcome.table.collect(engine="streaming")
        _require_same(table, streamed, "streamed, the rows are others")

    def check_traced(self) -> None:
        table, notes = self.run(self.rows)
        _require(notes.schema == NOTES, f"the notes have the columns {notes.schema}")
        actions = set(notes["action"]) - set(ACTIONS)
        _require(not actions, f"notes say {actions}")
        _require(not notes["reason"].has_nulls(), "a note has no reason")
        before = self.rows.select(
            SOURCE,
            ROW,
        ).rows()
        after = table.select(SOURCE, ROW).rows()
        _require(set(after) <= set(before), "a row comes from nowhere")
        place = {row: number for number, row in enumerate(before)}
        places = [place[row] for row in after]
        _require(places == sorted(places), "the rows have another order")
        dropped = notes.filter(pl.col("action") == "dropped")
        named = dropped.select(SOURCE, ROW).rows()
        _require(
            len(set(named)) == len(named),
            "a row is dropped twice",
        )
        lost = set(before) - set(after)
        _require(
            lost == set(named),
            f"{len(lost)} rows are lost, but {len(named)} notes say so",
        )

    def check_stored(self) -> None:
        assert isinstance(self.step, Fitted) and self.state is not None
        partial = _partial(
            self.step,
            self.pieces[0],
        )
        for what, table in (("partial", partial), ("state", self.state)):
            file = io.BytesIO()
            table.write_ipc(file)
            file.seek(0)
            again = pl.read_ipc(file)
            _require(again.schema == table.schema, f"its {what} has other types")
            _require_same(table, again, f"its {what} is another one")

    def check_mergeable(self) -> None:
        step = self.step
        assert isinstance(step, Fitted)
        parts = [
            _partial(
                step,
                piece,
            )
            for piece in self.pieces
        ]
        parts.append(
            _partial(
                step,
                self.rows[:0],
            )
        )
        whole = step.merge(parts)
        alone = step.merge(
            [
                _partial(
                    step,
                    self.rows,
                )
            ]
        )
        size = _largest(self.rows)
        _require_near(whole, alone, size, "of all rows at once")
        for part in parts:
            _require(part.schema == whole.schema, "partials have different columns")

        cut = int(
            self.rng.integers(
                1,
                len(parts),
            )
        )
        left = step.merge(parts[:cut])
        right = step.merge(parts[cut:])
        _require_near(
            whole,
            step.merge([left, right]),
            size,
            f"cut at {cut}",
        )
        one_by_one = parts[0]
        for part in parts[1:]:
            one_by_one = step.merge([one_by_one, part])
        _require_near(whole, one_by_one, size, "one by one")
        assert self.state is not None
        _require_near(
            self.state,
            step.finish(alone),
            size,
            "of the state",
        )

    def check_divisible(self) -> None:
        table, notes = self.run(self.rows)
        parts = [self.run(piece) for piece in self.pieces]
        joined = pl.concat([part for part, _ in parts])
        _require_same(table, joined, "piece by piece, the rows are others")
        all_notes = pl.concat([part for _, part in parts])
        _require_same(
            _ordered(notes),
            _ordered(all_notes),
            "piece by piece, the notes are others",
        )
        mixed = self.rows.sample(
            fraction=1,
            shuffle=True,
            seed=1,
        )
        again, _ = self.run(mixed)
        _require_same(
            table.sort(SOURCE, ROW, maintain_order=True),
            again.sort(SOURCE, ROW, maintain_order=True),
            "in another order, the rows are others",
        )
        if isinstance(self.step, Fitted):
            state = fitted(self.step, [mixed])
            assert state is not None and self.state is not None
            _require_near(
                self.state,
                state,
                _largest(self.rows),
                "in another order",
            )

    def check_idempotent(self) -> None:
        table, _ = self.run(self.rows)
        again, _ = self.run(table)
        _require_same(table, again, "applied twice, the rows are others")

    def check_serves(self) -> None:
        table, _ = self.run(self.rows)
        raw = self.rows.drop(SOURCE, ROW)
        outcome = self.step.run(
            raw.lazy(),
            self.state,
        )
        _require_same(
            table.drop(SOURCE, ROW),
            outcome.table.collect(),
            "without SOURCE and ROW, the rows are others",
        )


def _numbered(rows: pl.DataFrame) -> pl.DataFrame:
    added = []
    if SOURCE not in rows.columns:
        added.append(
            pl.lit(
                0,
                dtype=pl.UInt32,
            ).alias(SOURCE)
        )
    if ROW not in rows.columns:
        added.append(
            pl.int_range(
                pl.len(),
                dtype=pl.UInt64,
            ).alias(ROW)
        )
    return rows.with_columns(added)


def _partial(step: Fitted, rows: pl.DataFrame) -> pl.DataFrame:
    if step.fits_on == "train" and SPLIT in rows.columns:
        rows = rows.filter(pl.col(SPLIT) == "train")
    return step.partial(rows.lazy()).collect()


def _notes_of(outcome: Outcome) -> pl.DataFrame:
    if outcome.notes is None:
        return pl.DataFrame(schema=NOTES)
    return outcome.notes.collect()


def _ordered(notes: pl.DataFrame) -> pl.DataFrame:
    return notes.sort(
        SOURCE,
        ROW,
        "column",
        "reason",
        "before",
    )


def _largest(rows: pl.DataFrame) -> float:
    """Return the largest square of a finite number, at least 1: what sums are of."""
    largest = 1.0
    for column in rows.iter_columns():
        if column.dtype.is_numeric():
            values = column.cast(pl.Float64)
            finite = values.filter(values.is_finite())
            most = finite.abs().max()
            largest = max(largest, float(most or 0.0))  # type: ignore[arg-type]
    return largest**2


def _require_same(
    left: pl.DataFrame,
    right: pl.DataFrame,
    what: str,
) -> None:
    """Check that two tables are the same to the bit."""
    is_same = left.schema == right.schema and left.equals(right)
    if is_same:
        return
    found = f"{len(left)} and {len(right)} rows"
    if left.schema != right.schema:
        found = f"{left.schema} and {right.schema}"
    elif len(left) == len(right):
        pairs = zip(
            left.rows(),
            right.rows(),
            strict=True,
        )
        found = next(f"{a} and {b}" for a, b in pairs if repr(a) != repr(b))
    raise _Broken(f"{what}: {found}")


def _require_near(
    left: pl.DataFrame,
    right: pl.DataFrame,
    size: float,
    what: str,
) -> None:
    """Check that two tables are the same: floats up to a relative error."""
    floats = [name for name, dtype in left.schema.items() if dtype.is_float()]
    is_same_size = left.schema == right.schema and len(left) == len(right)
    if not is_same_size or not floats:
        _require_same(left, right, f"{what}, it is another one")
        return
    _require_same(
        left.drop(floats),
        right.drop(floats),
        f"{what}, it is another one",
    )
    for name in floats:
        a = left[name].to_numpy()
        b = right[name].to_numpy()
        near = np.isclose(
            a,
            b,
            rtol=TOLERANCE,
            atol=TOLERANCE * size,
            equal_nan=True,
        )
        if not near.all():
            row = int(np.argmin(near))
            raise _Broken(f"{what}, {name} is {b[row]}, not {a[row]}")


class _Broken(Exception):
    """A law is broken."""


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise _Broken(what)


@contextlib.contextmanager
def _breaking(law: str, step: Any) -> Iterator[None]:
    """Let an error that is none of data break a law."""
    try:
        yield
    except LeptonError:
        raise
    except Exception as error:
        text = str(error)
        if not isinstance(error, _Broken):
            text = f"{type(error).__name__}: {text.strip()[:500]}"
        raise DataError(
            f"{law}: {text}. The law: {LAWS[law]}",
            where=f"step {step}",
            remedy="fix what is named",
        ) from error
