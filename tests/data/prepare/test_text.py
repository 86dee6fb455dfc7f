from __future__ import annotations

import io
import zipfile
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stepping import applied, row_numbers, rows

from lepton_jax.data.prepare import GOPHER, CleanText, TextQuality
from lepton_jax.errors import DataError

RT_POLARITY = Path(__file__).resolve().parents[4] / "shared" / "data" / "rt_polarity"


def cleaned(text: str, **settings) -> str:
    table = applied(CleanText(["text"], **settings), rows({"text": [text]}))[0]
    return table["text"][0]


@pytest.mark.parametrize(
    ("text", "settings", "expected"),
    [
        ("e\u0301", {}, "é"),
        ("e\u200b\u0301", {}, "é"),  # the two meet when what is between is gone
        ("\ufb01 ², \uff21", {}, "\ufb01 ², \uff21"),
        ("\ufb01 ², \uff21", {"form": "NFKC"}, "fi 2, A"),
        ("e\u0301", {"form": "keep"}, "e\u0301"),
        ("\ufeffa\x00b\x07\u00adc\u202e", {}, "abc"),
        (
            "\u0645\u06cc\u200c\u062e 👩\u200d👩",
            {},
            "\u0645\u06cc\u200c\u062e 👩\u200d👩",
        ),
        (" a \t\u00a0 b\r\n\r\n\r\nc\u3000", {}, "a b c"),
        (" a \t b \r\n\r\n \r\n\r\nc ", {"spaces": "lines"}, "a b\n\nc"),
        ("a\r\nb\rc\u2028d  ", {"spaces": "keep"}, "a\nb\nc\nd  "),
        ("a &amp; b &lt; c", {}, "a &amp; b &lt; c"),
        ("a &amp;amp; b &lt; &#233;", {"html": "entities"}, "a & b < é"),
        (
            "?a=1&copy=2 &nosuch; &#0;",
            {"html": "entities"},
            "?a=1&copy=2 &nosuch; \ufffd",
        ),
        (
            "<p>one</p><p>t<b>w</b>o<br/>3",
            {"html": "tags", "spaces": "lines"},
            "one\n\ntwo\n3",
        ),
        (
            "<!-- x --><script>if (a<b) c</script>y<style>z</style>",
            {"html": "tags"},
            "y",
        ),
        ("1 < 2 and 3 > 2, a <- b", {"html": "tags"}, "1 < 2 and 3 > 2, a <- b"),
        ("<<b>i>x &amp;lt;u&gt;", {"html": "tags"}, "x"),
        ("\uff1cb\uff1ex", {"html": "tags", "form": "NFKC"}, "x"),
    ],
)
def test_text_is_cleaned_as_asked(text, settings, expected):
    assert cleaned(text, **settings) == expected


def test_changed_cells_have_notes_and_missing_ones_stay_missing():
    table = rows({"a": ["x", " y", None], "b": ["x ", "y", None], "n": [1, 2, 3]})
    result, notes = applied(CleanText(["a", "b"]), table)
    assert result.columns == table.columns
    assert result["a"].to_list() == ["x", "y", None]
    assert notes.select("column", "before", "after").rows() == [
        ("a", " y", "y"),
        ("b", "x ", "x"),
    ]
    assert set(notes["action"]) == {"changed"}
    assert applied(CleanText("a", noted=False), table)[1] is None


TEXT = st.text(
    st.sampled_from(
        "ab <>&;#x/-!?\n\r\t\u00a0\u0301é\ufb01\uff1c\uff21\u200b\u2028\u00ad"
    )
    | st.characters(codec="utf-8"),
    max_size=20,
) | st.lists(
    st.sampled_from(
        ["<b>", "&lt;", "&amp;", "lt;", "amp;", "<", ">", "b", "\n", "<!--"]
    ),
    max_size=10,
).map("".join)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(TEXT, min_size=1, max_size=5),
    st.sampled_from(["NFC", "NFKC", "keep"]),
    st.sampled_from(["collapse", "lines", "keep"]),
    st.sampled_from(["keep", "entities", "tags"]),
)
def test_cleaning_again_changes_nothing(texts, form, spaces, html):
    step = CleanText(["text"], form=form, spaces=spaces, html=html)
    once, _ = applied(step, rows({"text": texts}))
    twice, notes = applied(step, once)
    assert twice.equals(once)
    assert notes.is_empty()


def test_wrong_columns_and_words_are_errors_with_the_nearest():
    schema = rows({"text": ["a"], "n": [1]}).schema
    with pytest.raises(DataError, match="did you mean 'text'"):
        CleanText(["txt"]).check(schema)
    with pytest.raises(DataError, match="must be text"):
        CleanText(["n"]).check(schema)
    with pytest.raises(DataError, match="did you mean 'NFC'"):
        CleanText(["text"], form="NFD").check(schema)
    with pytest.raises(DataError, match="no limit"):
        TextQuality("text").check(schema)


@pytest.mark.parametrize(
    ("text", "limits", "reason"),
    [
        (None, {"least_words": 1}, "no text"),
        ("a b", {"least_words": 3}, "words: 2, at least 3"),
        ("a b", {"most_words": 1}, "words: 2, at most 1"),
        ("", {"least_characters": 1}, "characters: 0, at least 1"),
        ("日本語", {"most_characters": 2}, "characters: 3, at most 2"),
        ("a bc", {"least_word_length": 2}, "mean word length: 1.5, at least 2"),
        ("abcdef", {"most_word_length": 5}, "mean word length: 6.0, at most 5"),
        ("# # a …", {"most_symbols": 0.1}, "symbols per word: 0.5, at most 0.1"),
        ("a1٢3", {"most_digits": 0.5}, "share of digits: 0.75, at most 0.5"),
        (
            "one 2 -- b4",
            {"least_alphabetic_words": 0.8},
            "share of words with a letter: 0.5, at least 0.8",
        ),
        (
            "• a\n - b\nc\n\n",
            {"most_bullet_lines": 0.5},
            "share of bullet lines: 0.6667, at most 0.5",
        ),
        (
            "a...\nb … \nc",
            {"most_ellipsis_lines": 0.5},
            "share of lines with an ellipsis: 0.6667, at most 0.5",
        ),
        (
            "a\n a \nb\na",
            {"most_repeated_lines": 0.3},
            "share of repeated lines: 0.5, at most 0.3",
        ),
        (
            "aaaa\nb\naaaa",
            {"most_repeated_characters": 0.2},
            "share of characters in repeated lines: 0.4444, at most 0.2",
        ),
        (
            "Lorem IPSUM x",
            {"forbidden": ["lorem ipsum"]},
            "forbidden phrase: lorem ipsum",
        ),
    ],
)
def test_each_limit_drops_with_its_reason_and_value(text, limits, reason):
    table = rows({"text": pl.Series(["plain words here", text], dtype=pl.String)})
    kept, notes = applied(TextQuality("text", **limits), table)
    dropped = notes.filter(pl.col("before").eq_missing(text))
    assert dropped["reason"].to_list() == [reason]
    assert text not in kept["text"].to_list()


def test_a_text_on_the_limit_stays():
    table = rows({"text": ["a b"]})
    step = TextQuality("text", least_words=2, most_words=2, most_digits=0.0)
    assert row_numbers(applied(step, table)[0]) == [0]


def test_gophers_limits_keep_prose_and_drop_lists_and_repetition():
    sentence = "The quick brown fox number {} jumps over the lazy dog again today. "
    prose = "".join(sentence.format(number) for number in range(8))
    menu = "\n".join(f"- item number {number} of this list" for number in range(20))
    again = "\n".join(["Buy the best shoes in town here."] * 20)
    table = rows({"text": [prose, menu, again, "short"]})
    kept, notes = applied(TextQuality("text", **GOPHER), table)
    assert row_numbers(kept) == [0]
    rules = [reason.partition(":")[0] for reason in notes["reason"]]
    assert rules == ["share of words with a letter", "share of repeated lines", "words"]


@pytest.mark.skipif(not RT_POLARITY.is_dir(), reason="needs ../shared/data")
def test_rt_polarity_is_cleaned_and_filtered():
    archive = zipfile.ZipFile(RT_POLARITY / "sentence_polarity.zip")
    names = [name for name in archive.namelist() if name.endswith((".pos", ".neg"))]
    lines: list[str] = []
    for name in sorted(names):
        raw = io.TextIOWrapper(archive.open(name), "latin-1", newline="\n")
        lines += raw.read().splitlines()
    table = rows({"text": lines})
    assert len(table) == 2 * 5331
    clean, notes = applied(CleanText(["text"]), table)
    assert len(clean) == len(table)
    assert len(notes) == (clean["text"] != table["text"]).sum()
    kept, dropped = applied(TextQuality("text", least_words=3), clean)
    assert len(kept) + len(dropped) == len(table)
    assert (clean["text"].str.count_matches(r"\S+") < 3).sum() == len(dropped)
