from __future__ import annotations

from collections import Counter
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stepping import applied, cut, fitted, rows

from lepton_jax.data.prepare import ByteTokens, FileTokens, WordTokens
from lepton_jax.errors import DataError

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
MISTRAL = SHARED / "tok_mistral_spm" / "tokenizer.model.v1"


def tokens(step, *texts: str | None) -> list:
    table = rows({"text": pl.Series(texts, dtype=pl.String)})
    return applied(step, table)[0]["text"].to_list()


def test_bytes_are_framed_padded_and_cut_and_the_cut_is_said():
    table = rows({"text": ["Hi", "Hi there", "", None, "é"]})
    step = ByteTokens("text", length=6, begin=257, end=258)
    kept, notes = applied(step, table)
    assert kept["text"].to_list() == [
        [257, 72, 105, 258, 256, 256],
        [257, 72, 105, 32, 116, 258],
        [257, 258, 256, 256, 256, 256],
        None,
        [257, 195, 169, 258, 256, 256],
    ]
    assert notes.select("action", "reason", "column", "before").rows() == [
        ("changed", "cut to 6 tokens: 10 were there", "text", "Hi there")
    ]


def test_without_a_length_each_text_is_a_list_of_its_own():
    step = ByteTokens("text", end=258)
    assert tokens(step, "ab", "", None) == [[97, 98, 258], [258], None]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=8), max_size=6), st.integers(1, 12))
def test_bytes_are_those_of_utf_8(texts, length):
    whole = tokens(ByteTokens("text"), *texts)
    assert whole == [list(text.encode()) for text in texts]
    arrays = tokens(ByteTokens("text", length=length), *texts)
    assert arrays == [(ids + [256] * length)[:length] for ids in whole]


def test_words_are_numbered_by_how_often_they_are_there():
    step = WordTokens("text", length=4)
    table = rows({"text": ["b a A", "a c, b", None]})
    state = fitted(step, [table])
    expected = [("a", 3, 2), ("b", 2, 3), (",", 1, 4), ("c", 1, 5)]
    assert state.rows() == expected
    kept, notes = applied(step, rows({"text": ["A zz c", "a a a a a", ""]}), state)
    assert kept["text"].to_list() == [[2, 1, 5, 0], [2, 2, 2, 2], [0, 0, 0, 0]]
    assert notes["reason"].to_list() == ["cut to 4 tokens: 5 were there"]
    cased = fitted(WordTokens("text", lower=False, least_count=2, most=1), [table])
    assert cased["word"].to_list() == ["a"]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.none() | st.text("ab ,C", max_size=8), max_size=8),
    st.lists(st.integers(0, 100), max_size=3),
)
def test_a_vocabulary_is_the_same_from_pieces_in_any_grouping(texts, bounds):
    table = rows({"text": pl.Series([*texts, "x"], dtype=pl.String)})
    step = WordTokens("text")
    partials = [step.partial(piece.lazy()).collect() for piece in cut(table, bounds)]
    left = step.merge([step.merge(partials[:2]), *partials[2:]])
    right = step.merge([*partials[:-1], step.merge(partials[-1:])])
    assert step.finish(left).equals(step.finish(right))
    state = fitted(step, [table])
    assert step.finish(left).equals(state)
    counts = Counter(char for text in texts for char in (text or "") if char == ",")
    found = dict(state.select("word", "count").iter_rows())
    assert found.get(",", 0) == counts[","]


def test_no_word_and_no_room_are_errors():
    table = rows({"text": pl.Series([None], dtype=pl.String)})
    with pytest.raises(DataError, match="no word"):
        fitted(WordTokens("text"), [table])
    with pytest.raises(DataError, match="no room"):
        ByteTokens("text", length=2, begin=257, end=258).check(table.schema)
    with pytest.raises(DataError, match="did you mean 'text'"):
        WordTokens("txt").check(table.schema)


@pytest.mark.skipif(not MISTRAL.is_file(), reason="needs ../shared/data")
def test_a_sentencepiece_model_travels_in_the_state(tmp_path):
    pytest.importorskip("sentencepiece", reason="needs the extra text")
    copy = tmp_path / "tokenizer.model"
    copy.write_bytes(MISTRAL.read_bytes())
    step = FileTokens("text", str(copy), length=5, begin=1, end=2)
    table = rows({"text": ["Hello world", "Hello world Hello world", None]})
    state = fitted(step, [table])
    assert step.vocab() == 32_000
    digest = step.to_json()["file_digest"]
    assert len(digest) == 64
    copy.unlink()
    outcome = step.run(table.lazy(), state)
    kept = outcome.table.collect()["text"].to_list()
    assert kept == [[1, 22557, 1526, 2, 0], [1, 22557, 1526, 22557, 2], None]
    assert outcome.notes.collect()["reason"][0] == "cut to 5 tokens: 6 were there"


def test_a_tokenizer_json_is_read_and_adds_nothing_of_its_own(tmp_path):
    library = pytest.importorskip("tokenizers", reason="needs the extra text")
    words = {"[UNK]": 0, "[CLS]": 1, "hello": 2, "world": 3}
    tokenizer = library.Tokenizer(library.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = library.pre_tokenizers.Whitespace()
    tokenizer.post_processor = library.processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", 1)]
    )
    file = tmp_path / "tokenizer.json"
    tokenizer.save(str(file))
    step = FileTokens("text", str(file))
    assert tokens(step, "hello big world") == [[2, 0, 3]]
    assert step.vocab() == 4


def test_a_file_that_is_no_tokenizer_is_an_error_before_any_row_is_read(tmp_path):
    schema = rows({"text": ["a"]}).schema
    with pytest.raises(DataError, match="can't be read"):
        FileTokens("text", str(tmp_path / "none.model")).check(schema)
    file = tmp_path / "broken.json"
    file.write_text("{")
    pytest.importorskip("tokenizers", reason="needs the extra text")
    with pytest.raises(DataError, match=r"tokenizers can't read .*"):
        FileTokens("text", str(file)).check(schema)
    pytest.importorskip("sentencepiece", reason="needs the extra text")
    file.write_text("no model")
    with pytest.raises(DataError, match="sentencepiece can't read"):
        FileTokens("text", str(file)).check(schema)
