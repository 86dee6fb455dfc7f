from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stepping import applied, cut, existing, fitted, row_numbers, rows  # noqa: F401

from lepton_jax.data.prepare import Join, Mixture
from lepton_jax.data.readers import ROW, SOURCE
from lepton_jax.errors import DataError

FILMS = {"film": [3, 1, 2], "title": ["c", "a", "b"], "year": [2003, 2001, None]}


@pytest.fixture
def films(existing):  # noqa: F811
    existing(FILMS)


def join(**settings) -> Join:
    return Join("published.csv", **{"on": ["film"], **settings})


def test_columns_are_added_by_key_and_rows_without_a_match_are_flagged(films):
    table = rows({"film": [2, 1, 9, None, 1], "stars": [5, 4, 3, 2, 1]})
    kept, notes = applied(join(), table)
    assert row_numbers(kept) == [0, 1, 2, 3, 4]
    assert kept["title"].to_list() == ["b", "a", None, None, "a"]
    assert kept.columns == [*table.columns, "title", "year"]
    assert notes.select("action", ROW, "before").rows() == [
        ("flagged", 2, "9"),
        ("flagged", 3, None),
    ]
    assert set(notes["reason"]) == {"no row of published.csv has this key"}


def test_an_inner_join_drops_them_instead(films):
    table = rows({"film": [2, 9]})
    kept, notes = applied(join(how="inner", columns=["year"]), table)
    assert row_numbers(kept) == [0] and kept.columns[-1] == "year"
    assert notes["action"].to_list() == ["dropped"]


def test_the_state_is_the_other_source_and_says_which_keys_were_there(films):
    state = fitted(join(), [rows({"film": [2, 9]}), rows({"film": [2]}, first=2)])
    assert state["film"].to_list() == [3, 1, 2]
    assert state["lepton.matched"].to_list() == [False, False, True]


def test_a_key_that_is_twice_in_the_other_source_is_an_error(existing):  # noqa: F811
    existing({"film": [1, None, 2, None, 1], "title": list("abcde")})
    with pytest.raises(DataError, match="film = 1") as caught:
        fitted(join(), [rows({"film": [1]})])
    assert caught.value.where == "published.csv, rows 0 and 4"


def test_one_to_one_wants_each_key_once_among_the_rows(films):
    pieces = [rows({"film": [1, 2]}), rows({"film": [3, 2]}, first=2)]
    assert len(fitted(join(), pieces)) == 3
    with pytest.raises(DataError, match="film = 2") as caught:
        fitted(join(expect="one-to-one"), pieces)
    assert caught.value.where == "the rows, rows 0:1 and 0:3"
    assert len(fitted(join(expect="one-to-one"), pieces[:1])) == 3


def test_integers_of_other_widths_match_but_text_does_not_match_numbers(films):
    narrow = rows({"film": pl.Series([2, 1], dtype=pl.Int16)})
    assert applied(join(), narrow)[0]["title"].to_list() == ["b", "a"]
    with pytest.raises(DataError, match="String here and Int64"):
        join().check(rows({"film": ["2"]}).schema)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on": ["flim"]}, "did you mean 'film'"),
        ({"on": []}, "no name"),
        ({"columns": ["titel"]}, "did you mean 'title'"),
        ({"how": "outer"}, "how is 'outer'"),
        ({"columns": ["year"]}, "there is a column 'year' already"),
    ],
)
def test_wrong_arguments_are_errors_before_any_row_is_read(films, settings, message):
    schema = rows({"film": [1], "year": [1]}).schema
    with pytest.raises(DataError, match=message):
        join(**settings).check(schema)


def sources(*counts: int) -> pl.DataFrame:
    return pl.concat(
        rows({"x": range(count)}, source=number) for number, count in enumerate(counts)
    )


def test_sources_are_mixed_in_proportion_as_far_as_the_scarcest_allows():
    table = sources(4000, 1000, 500)
    kept, notes = applied(Mixture([2, 1, 0]), table)
    counts = dict(kept[SOURCE].value_counts().iter_rows())
    assert counts[1] == 1000 and 2 not in counts
    assert 1850 < counts[0] < 2150
    assert len(kept) + len(notes) == len(table)
    first = notes.filter(pl.col(SOURCE) == 0)["reason"][0]
    assert first == "mixture: 0.5 of the source's rows stay"


def test_a_seed_chooses_other_rows_and_pieces_do_not():
    table = sources(300, 100)
    one, _ = applied(Mixture([1, 1]), table)
    other, _ = applied(Mixture([1, 1], seed=1), table)
    assert not one.equals(other)
    step = Mixture([1, 1])
    state = fitted(step, cut(table, [50, 320]))
    parts = [applied(step, piece, state)[0] for piece in cut(table, [50, 320])]
    assert pl.concat(parts).equals(one)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 60), max_size=4), st.randoms(use_true_random=False))
def test_a_mixtures_state_is_the_same_from_pieces_in_any_order(bounds, random):
    step = Mixture([1, 2])
    table = sources(40, 20)
    pieces = cut(table, bounds)
    random.shuffle(pieces)
    assert fitted(step, pieces).equals(fitted(step, [table]))


def test_wrong_weights_are_errors():
    with pytest.raises(DataError, match="source 1 has no weight"):
        fitted(Mixture([1]), [sources(2, 2)])
    with pytest.raises(DataError, match="but no rows"):
        fitted(Mixture([1, 1]), [sources(2)])
    for weights in ([], [-1, 1], [0, 0]):
        with pytest.raises(DataError, match="weights are"):
            Mixture(weights).check(sources(1).schema)
