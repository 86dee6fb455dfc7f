from __future__ import annotations

from collections import Counter

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stepping import applied, cut, fitted, rows

from lepton_jax.data.prepare import NgramTokens, WordTokens
from lepton_jax.errors import DataError

TEXTS = st.lists(st.none() | st.text("ab ,É中\n", max_size=12), min_size=1, max_size=8)


def table_of(texts) -> pl.DataFrame:
    return rows({"text": pl.Series(texts, dtype=pl.String)})


def word_ngrams(text: str, least: int, most: int) -> set:
    import re

    words = re.findall(r"中|[a-zé]+|,", text.lower())
    return {
        ("word", *words[i : i + n])
        for n in range(least, most + 1)
        for i in range(len(words) - n + 1)
    }


def character_ngrams(text: str, least: int, most: int) -> set:
    even = f" {' '.join(text.lower().split())} "
    runs = {
        even[i : i + n]
        for n in range(least, most + 1)
        for i in range(len(even) - n + 1)
    }
    return {("character", run) for run in runs if run.strip() and " " not in run[1:-1]}


@settings(max_examples=60, deadline=None)
@given(TEXTS, st.integers(1, 2), st.integers(0, 2))
def test_they_are_the_distinct_runs_of_words_and_characters(texts, least, more):
    orders = (least, least + more)
    step = NgramTokens("text", words=orders, characters=orders)
    table = table_of([*texts, "a"])
    expected = [
        set()
        if text is None
        else word_ngrams(text, *orders) | character_ngrams(text, *orders)
        for text in table["text"]
    ]
    counts = Counter(ngram for each in expected for ngram in each)
    if not counts:
        return
    state = fitted(step, [table])
    found = applied(step, table, state)[0]["text"]

    assert sorted(state["count"]) == sorted(counts.values())
    sizes = [0 if each is None else len(set(each)) for each in found.to_list()]
    assert sizes == [len(each) for each in expected]
    # the same pairs of texts share the same number of n-grams
    lists = [set(each or ()) for each in found.to_list()]
    shared = [len(a & b) for a in lists for b in lists]
    assert shared == [len(a & b) for a in expected for b in expected]


@settings(max_examples=30, deadline=None)
@given(TEXTS, st.lists(st.integers(0, 100), max_size=3))
def test_their_ids_are_the_same_from_pieces_in_any_grouping(texts, bounds):
    table = table_of([*texts, "x"])
    step = NgramTokens("text", most=9)
    state = fitted(step, cut(table, bounds))
    assert state.equals(fitted(step, [table]))
    assert sorted(state["id"]) == list(range(1, len(state) + 1))
    by_id = state.sort("id")["count"].to_list()
    assert by_id == sorted(by_id, reverse=True)


def test_many_short_blocks_give_what_one_gives(monkeypatch):
    from lepton_jax.data.prepare.steps import ngrams

    table = table_of(["one two", "", None, "two three two", "four", "one two"] * 5)
    step = NgramTokens("text", length=12)
    state = fitted(step, [table])
    whole = applied(step, table, state)[0]
    monkeypatch.setattr(ngrams, "BLOCK", 10)
    assert fitted(step, [table]).equals(state)
    assert applied(step, table, state)[0].equals(whole)


def test_what_is_rare_unknown_or_too_much_is_left_out_and_a_cut_is_said():
    step = NgramTokens("text", characters=(), least_count=2, length=3)
    table = table_of(["b a a", "a c b", "a , c", None])
    state = fitted(step, [table])
    assert state.sort("id")["count"].to_list() == [3, 2, 2]  # a, b and c
    kept, notes = applied(step, table_of(["c b a", "zz", None, ""]), state)
    assert kept["text"].to_list() == [[1, 2, 3], [0, 0, 0], None, [0, 0, 0]]
    assert not len(notes)
    short = NgramTokens("text", characters=(), least_count=2, length=2)
    _, notes = applied(short, table_of(["c b a"]), state)
    assert notes["reason"].to_list() == ["cut to 2 tokens: 3 were there"]


def test_they_may_stand_next_to_their_text():
    step = NgramTokens("text", characters=(), into="ngrams")
    kept, _ = applied(step, table_of(["a b", None]))
    assert kept.select("text", "ngrams").rows()[1] == (None, None)
    assert [kept["text"][0], len(kept["ngrams"][0])] == ["a b", 3]
    with pytest.raises(DataError, match="'ngrams' already"):
        step.check(kept.schema)


def test_a_script_without_spaces_has_a_word_a_character():
    table = table_of(["电影很好", "我很喜欢abc ภาพ カナ"])
    apart = fitted(WordTokens("text", apart=True), [table])
    assert {"很", "abc", "ภ", "カ"} <= set(apart["word"])
    together = fitted(WordTokens("text"), [table])
    assert {"电影很好", "我很喜欢abc"} <= set(together["word"])


def test_orders_that_are_none_are_errors():
    schema = table_of(["a"]).schema
    with pytest.raises(DataError, match=r"words is \(2, 1\)"):
        NgramTokens("text", words=(2, 1)).check(schema)
    with pytest.raises(DataError, match="neither"):
        NgramTokens("text", words=(), characters=()).check(schema)
    with pytest.raises(DataError, match="in 2 texts"):
        fitted(NgramTokens("text", least_count=2), [table_of(["a"])])
