from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stepping import applied, cut, existing, fitted, row_numbers, rows  # noqa: F401

from lepton_jax.data.prepare import Duplicates
from lepton_jax.data.prepare.steps.content import BLOCK, MOST_SHORT, content_hash
from lepton_jax.data.readers import SOURCE
from lepton_jax.errors import DataError

LOW = [
    "22e674d2d1296ba4",
    "2ec21ee8a00081bd",
    "71be4f7f61690b8",
    "230cfffca3ff210b",
    "17c401cca2affb6a",
]
CELLS = st.none() | st.sampled_from(["", "a", "b", "ab"])


def test_the_first_of_equal_rows_stays_and_the_others_notes_name_it():
    table = rows({"text": ["a", "b", "a", None, "a", None], "n": [1, 1, 1, 2, 1, 2]})
    kept, notes = applied(Duplicates(), table)
    assert row_numbers(kept) == [0, 1, 3]
    assert row_numbers(notes) == [2, 4, 5]
    assert notes["partner_row"].to_list() == [0, 0, 3]
    assert notes["partner_source"].to_list() == [0, 0, 0]
    assert set(notes["reason"]) == {"duplicate"}


def test_only_the_named_columns_are_compared():
    table = rows({"text": ["a", "a"], "n": [1, 2]})
    assert len(applied(Duplicates(), table)[0]) == 2
    assert row_numbers(applied(Duplicates(["text"]), table)[0]) == [0]


def test_an_earlier_source_has_the_first_row_in_whatever_order_it_is_read():
    later = rows({"text": ["a", "b"]}, source=1)
    earlier = rows({"text": ["c", "b"]}, source=0)
    state = fitted(Duplicates(), [later, earlier])
    kept, notes = applied(Duplicates(), pl.concat([later, earlier]), state)
    assert kept["text"].to_list() == ["a", "c", "b"]
    assert notes.select(SOURCE, "partner_source").rows() == [(1, 0)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(CELLS, st.none() | st.integers(0, 1)), max_size=12),
    st.lists(st.integers(0, 100), max_size=4),
    st.randoms(use_true_random=False),
)
def test_pieces_in_any_order_and_grouping_give_polars_unique(cells, bounds, random):
    text = [cell[0] for cell in cells]
    number = pl.Series([cell[1] for cell in cells], dtype=pl.Int64)
    table = rows({"text": pl.Series(text, dtype=pl.String), "number": number})
    step = Duplicates()
    partials = [step.partial(piece.lazy()).collect() for piece in cut(table, bounds)]
    random.shuffle(partials)
    middle = len(partials) // 2
    grouped = [
        step.merge(part) for part in (partials[:middle], partials[middle:]) if part
    ]
    state = step.finish(step.merge(grouped))
    kept, notes = applied(step, table, state)
    columns = ["text", "number"]
    expected = table.unique(columns, keep="first", maintain_order=True)
    assert kept.equals(expected)
    assert len(kept) + len(notes) == len(table)
    assert state.equals(fitted(step, [table]))
    assert applied(step, kept)[0].equals(kept)  # a second time drops nothing


def test_rows_of_an_existing_set_are_dropped_and_their_partner_is_named(existing):  # noqa: F811
    existing({"text": ["x", "b", "b"]})
    table = rows({"text": ["a", "b", "a", "b"]})
    kept, notes = applied(Duplicates(["text"], existing="published.csv"), table)
    assert kept["text"].to_list() == ["a"]
    assert row_numbers(notes) == [1, 2, 3]
    assert notes["partner_source"].to_list() == [None, 0, None]
    assert notes["partner_row"].to_list() == [1, 0, 1]
    assert notes["reason"][0] == "duplicate of a row of published.csv"
    step = Duplicates(["text"], existing="published.csv")
    assert step.to_json()["existing_digest"] == "0-2"


def test_an_existing_set_without_the_column_or_columns_unnamed_is_an_error(existing):  # noqa: F811
    existing({"texts": ["x"]})
    table = rows({"text": ["a"]})
    with pytest.raises(DataError, match="did you mean 'texts'"):
        fitted(Duplicates(["text"], existing="published.csv"), [table])
    with pytest.raises(DataError, match="not named"):
        Duplicates(existing="published.csv").check(table.schema)
    with pytest.raises(DataError, match="did you mean 'text'"):
        Duplicates(["txt"]).check(table.schema)


def test_hashes_are_these_on_every_machine_and_with_every_version():
    table = pl.DataFrame(
        {
            "text": ["", "a", None, "ä" * 100, "b" * (MOST_SHORT + 1)],
            "number": [0.0, -0.0, float("nan"), None, 1.5],
            "whole": pl.Series([0, -1, 2, None, 4], dtype=pl.Int8),
            "when": pl.Series([0, 1, 2, None, 4], dtype=pl.Datetime("ms")),
        }
    )
    hashes = content_hash(table)
    low = [f"{number:x}" for number in hashes["hash_low"]]
    assert low == LOW
    code = (
        "import polars as pl\n"
        "from lepton_jax.data.prepare.steps.content import content_hash\n"
        "print(content_hash(pl.DataFrame({'text': ['a', 'b']}))['hash_high'].to_list())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parents[3],
        env={"PYTHONHASHSEED": "7", "POLARS_MAX_THREADS": "1"},
    )
    here = content_hash(pl.DataFrame({"text": ["a", "b"]}))["hash_high"].to_list()
    assert done.stdout.strip() == str(here)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=400) | st.just(b"x" * 2000), max_size=40))
def test_two_texts_have_one_hash_just_if_they_are_equal(texts):
    column = pl.Series("text", texts, dtype=pl.Binary)
    hashes = content_hash(column.to_frame())
    assert hashes.n_unique() == column.n_unique()
    one_by_one = [
        content_hash(column.slice(at, 1).to_frame()) for at in range(len(texts))
    ]
    if one_by_one:
        assert pl.concat(one_by_one).equals(hashes)


def test_texts_that_differ_in_little_have_different_hashes():
    ends = ["", "\0", "\0\0", " ", "a"]
    texts = [
        "x" * size + end for size in range(0, 3 * MOST_SHORT // 2, 7) for end in ends
    ]
    distinct = sorted(set(texts))
    assert content_hash(pl.DataFrame({"text": distinct})).n_unique() == len(distinct)
    numbers = pl.DataFrame({"number": np.arange(4 * BLOCK)})
    assert content_hash(numbers)["hash_low"].n_unique() == 4 * BLOCK
    apart = pl.DataFrame({"a": ["x", "", "xy"], "b": ["", "x", ""]})
    assert content_hash(apart).n_unique() == 3


@pytest.mark.parametrize(
    "column",
    [
        pl.Series([True, False, None]),
        pl.Series([[1, 2], [1], None]),
        pl.Series([["a"], ["a", None], []]),
        pl.Series([{"a": 1}, {"a": 2}, None]),
        pl.Series(["a", "b", None], dtype=pl.Categorical),
        pl.Series(["1.5", "2.5", None]).cast(pl.Decimal(10, 2)),
        pl.Series([[[1, 2]], [[3, 4]], [[5, 6]]], dtype=pl.Array(pl.UInt8, (1, 2))),
        pl.Series([2**64 - 1, 0, None], dtype=pl.UInt64),
    ],
    ids=lambda column: str(column.dtype),
)
def test_each_type_of_column_can_be_compared(column):
    table = rows({"value": pl.concat([column, column])})
    assert row_numbers(applied(Duplicates(), table)[0]) == [0, 1, 2]


def test_integers_and_floats_of_any_width_have_the_same_hash():
    narrow = pl.DataFrame({"n": pl.Series([1, 2], dtype=pl.Int8)})
    wide = narrow.cast(pl.UInt32)
    assert content_hash(narrow).equals(content_hash(wide))
    half = pl.DataFrame({"n": pl.Series([0.5, -0.0], dtype=pl.Float32)})
    double = pl.DataFrame({"n": pl.Series([0.5, 0.0], dtype=pl.Float64)})
    assert content_hash(half).equals(content_hash(double))
