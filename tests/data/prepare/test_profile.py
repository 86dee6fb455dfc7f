"""Profiles of columns, drift between two, and the page that shows them."""

from __future__ import annotations

import re
from datetime import date, timedelta
from html.parser import HTMLParser

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_jax.cli import prepare as command
from lepton_jax.data.prepare import (
    Classes,
    DropOutliers,
    Duplicates,
    Leaks,
    Preparation,
    Profile,
    Split,
    Standardize,
    drift,
    prepare,
    profile,
    read_profile,
    write_preparation_report,
)
from lepton_jax.errors import DataError
from lepton_jax.monitor import data_page

DRAW = np.random.default_rng(0)


def normal(rows: int, shift: float = 0.0) -> pl.DataFrame:
    return pl.DataFrame({"x": DRAW.normal(shift, 1, rows)})


values = st.lists(
    st.none() | st.floats(-1e6, 1e6) | st.just(float("nan")), min_size=1, max_size=40
)


@given(values, st.integers(0, 40))
@settings(max_examples=40, deadline=None)
def test_a_table_in_pieces_has_the_profile_of_the_whole(cells, cut):
    table = pl.DataFrame({"x": cells}, schema={"x": pl.Float64()})
    whole = profile(lambda: [table])
    pieces = profile(lambda: [table.head(cut), table.slice(cut)], like=whole)
    one = whole.columns["x"]
    other = pieces.columns["x"]
    present = table["x"].drop_nulls().drop_nans()
    assert one.missing == table.height - len(present) == other.missing
    assert sum(one.counts) == len(present) == sum(one.part_counts)
    assert (one.counts, one.outliers) == (other.counts, other.outliers)
    if len(present):
        assert one.mean == pytest.approx(present.mean(), rel=1e-9, abs=1e-6)
        assert other.std == pytest.approx(present.std(ddof=0), rel=1e-9, abs=1e-6)
        assert (one.least, one.greatest) == (present.min(), present.max())


def test_each_kind_of_column_has_a_profile_that_json_keeps():
    days = [date(2024, 1, 1) + timedelta(days=i) for i in range(300)]
    table = pl.DataFrame(
        {
            "day": days,
            "word": ["a", "b", None] * 100,
            "text": [f"sentence number {i} of a text that is long" for i in range(300)],
            "tokens": [[1] * (i % 7) for i in range(300)],
            "bytes": [b"x" * (i % 5) for i in range(300)],
            "flag": [True, False, True] * 100,
            "empty": pl.Series([None] * 300, dtype=pl.Float64),
        }
    )
    one = profile(lambda: [table])
    kinds = {name: column.kind for name, column in one.columns.items()}
    assert kinds == {
        "day": "time",
        "word": "category",
        "text": "text",
        "tokens": "list",
        "bytes": "bytes",
        "flag": "category",
        "empty": "number",
    }
    assert one.columns["word"].words == ["a", "b"]
    assert one.columns["word"].missing == 100
    assert one.columns["tokens"].greatest == 6
    assert Profile.from_json(one.to_json()) == one
    with pytest.raises(DataError, match="no profile"):
        Profile.from_json("[1]")


def test_tables_of_one_distribution_are_alike_and_a_shift_is_found():
    train = profile(lambda: [normal(20_000)])
    verdicts = [
        moved.verdict
        for rows in (300, 1_000, 20_000)
        for _ in range(20)
        for moved in drift(train, profile(lambda n=rows: [normal(n)], like=train))
    ]
    assert set(verdicts) == {"none"}
    shifted = profile(lambda: [normal(20_000, 1.0)], like=train)
    (moved,) = drift(train, shifted)
    assert moved.verdict == "large"
    # of two normals one standard deviation apart
    assert moved.distance == pytest.approx(0.383, abs=0.02)


def test_many_rows_do_not_make_a_small_shift_an_alarm_and_few_do_not_hide_a_large_one():
    train = profile(lambda: [normal(400_000)])
    slightly = profile(lambda: [normal(400_000, 0.05)], like=train)
    (moved,) = drift(train, slightly)
    assert moved.psi > 20 * moved.noise, "significant, and of no interest"
    assert moved.verdict == "none"
    few = profile(lambda: [normal(60, 2.0)], like=train)
    assert drift(train, few)[0].verdict == "large"


def test_a_new_word_and_missing_cells_are_drift():
    words = pl.DataFrame({"w": ["a", "b"] * 500})
    train = profile(lambda: [words])
    other = profile(lambda: [pl.DataFrame({"w": ["a", "c"] * 500})], like=train)
    assert drift(train, other)[0].verdict == "large"
    gone = profile(lambda: [pl.DataFrame({"w": ["a", None] * 500})], like=train)
    (moved,) = drift(train, gone)
    assert moved.missing == (0.0, 0.5)
    assert moved.verdict == "large"


# ---- the page ----


class Checked(HTMLParser):
    """Checks that every tag is closed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "path", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag != "path":
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def text_of(page: str) -> str:
    parser = Checked()
    parser.feed(page)
    assert not parser.open
    return " ".join(parser.words)


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    people = pl.DataFrame(
        {
            "name": [f"<b>person {i}</b>" for i in range(400)],
            "age": [None if i % 50 == 7 else 20 + i % 40 for i in range(400)],
            "pay": [9e9 if i in (100, 300) else 1000.0 + i % 90 for i in range(400)],
            "rich": ["yes" if i % 40 > 25 else "no" for i in range(400)],
        }
    )
    people = pl.concat([people, people.head(3)])
    preparation = Preparation(
        {"people": people},
        [
            Duplicates(),
            Split(test=0.25, stratify="rich"),
            Leaks(target="rich"),
            DropOutliers("pay", by="iqr"),
            Standardize(["pay"]),
            Classes("rich"),
        ],
        inputs=["pay"],
        target="rich",
    )
    folder = tmp_path_factory.mktemp("people")
    prepared = prepare(preparation, folder)
    reference = profile(lambda: [people.filter(pl.col("age") > 45)])
    page = write_preparation_report(prepared, preparation, reference=reference)
    return prepared, page.read_text(encoding="utf-8")


def test_the_page_says_what_was_read_done_and_found(reported):
    text = text_of(reported[1])
    for words in (
        "8 (2.0 %)",  # missing ages
        "3 duplicate",
        "outlier",
        "the saved reference and train",
        "is different",
        "people:400",
        "people:0",
    ):
        assert words in text, words
    assert "Alarms" in text
    assert "age" in re.search(r"Alarms(.*?)What each step", text, re.DOTALL)[1]


def test_the_page_is_one_file_and_its_cells_are_no_markup(reported):
    _, page = reported
    assert "<b>person" not in page
    assert "&lt;b&gt;person" in page
    assert not re.search(r"(?:src|href)=", page)


def test_the_profile_next_to_the_page_is_the_reference_of_a_later_one(reported):
    prepared, _ = reported
    saved = read_profile(prepared.folder)
    assert saved.rows == prepared.manifest["splits"]["train"]["rows"]
    assert saved.columns["pay"].kind == "number"
    with pytest.raises(DataError, match="can't be read"):
        read_profile(prepared.folder / "nothing.json")


def test_facts_may_be_missing():
    text = text_of(data_page.render({"name": "nothing"}))
    assert "No leak was found" in text


SPEC = """
from lepton_jax.data.prepare import Preparation, Split

def preparation(data: str = "people.csv") -> Preparation:
    return Preparation({"people": data}, [Split(test=0.5)])
"""


def test_the_command_writes_the_page_and_compares_with_an_earlier_one(tmp_path, capsys):
    spec = tmp_path / "spec.py"
    spec.write_text(SPEC)
    for name, first in (("old", 20), ("new", 60)):
        ages = "\n".join(str(first + i % 30) for i in range(400))
        (tmp_path / f"{name}.csv").write_text(f"age\n{ages}\n")
    old = [str(spec), "--data", str(tmp_path / "old.csv"), "--report"]
    assert command.main([*old, "--out", str(tmp_path / "old")]) == 0
    new = [str(spec), "--data", str(tmp_path / "new.csv")]
    options = ["--out", str(tmp_path / "new"), "--reference", str(tmp_path / "old")]
    assert command.main([*new, *options]) == 0
    assert "report.html" in capsys.readouterr().out
    text = text_of((tmp_path / "new" / "report.html").read_text(encoding="utf-8"))
    assert "the saved reference and train differ in age" in text
