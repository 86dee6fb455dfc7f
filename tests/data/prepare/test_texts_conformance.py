"""Laws of the steps that need files, several sources or splits; and all in one run."""

from __future__ import annotations

import io
import json

import polars as pl
import pytest
from PIL import Image

from lepton_jax.data import prepare
from lepton_jax.data.prepare.step import SPLIT
from lepton_jax.data.readers.reader import ROW, SOURCE
from lepton_jax.errors import DataError


@pytest.fixture
def films(tmp_path):
    path = tmp_path / "films.csv"
    path.write_text("film,title\n1,one\n2,two\n7,seven\n")
    return str(path)


def numbered(columns: dict, sources: list[int]) -> pl.DataFrame:
    table = pl.DataFrame(columns)
    return table.with_columns(
        pl.Series(SOURCE, sources, dtype=pl.UInt32),
        pl.int_range(pl.len(), dtype=pl.UInt64).alias(ROW),
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("how", ["left", "inner"])
def test_joins_keep_the_laws(films, how, seed):
    step = prepare.Join(films, on=["film"], how=how)
    table = pl.DataFrame({"film": [2, 1, None, 9, 2, 7], "stars": range(6)})
    report = prepare.conformance(step, table, seed=seed)
    assert report.unlearned is None


@pytest.mark.parametrize("seed", range(4))
def test_mixtures_keep_the_laws(seed):
    table = numbered({"x": range(9)}, sources=[0] * 6 + [1] * 3)
    report = prepare.conformance(prepare.Mixture([1, 1]), table, seed=seed)
    assert report.unlearned is None


@pytest.mark.parametrize("seed", range(4))
def test_leak_alarms_keep_the_laws(seed):
    columns = {
        "text": ["one and two", "three and four", "one and two!", None, "", "one"] * 2,
        "who": ["a", "b", "a", None, "c", "c"] * 2,
        "label": [0, 1, 0, 1, 0, 1] * 2,
        SPLIT: ["train", "train", "test"] * 4,
    }
    step = prepare.Leaks(
        target="label", inputs=["text"], near="text", group="who", time="label"
    )
    report = prepare.conformance(step, pl.DataFrame(columns), seed=seed)
    assert report.unlearned is None


@pytest.mark.parametrize("output", ["pixels", "png"])
def test_images_keep_the_laws(output):
    file = io.BytesIO()
    Image.new("RGB", (5, 4), (9, 8, 7)).save(file, "PNG")
    content = [file.getvalue(), b"text", file.getvalue()[:50], file.getvalue()]
    table = pl.DataFrame({"image": content, "n": range(4)})
    step = prepare.Images("image", (3, 3), output=output, broken="drop")
    report = prepare.conformance(step, table)

    assert report.unlearned is None


def test_tokens_of_a_file_keep_the_laws(tmp_path):
    library = pytest.importorskip("tokenizers", reason="needs the extra text")
    model = library.models.WordLevel({"?": 0, "a": 1, "b": 2}, unk_token="?")
    tokenizer = library.Tokenizer(model)
    tokenizer.pre_tokenizer = library.pre_tokenizers.Whitespace()
    file = tmp_path / "tokenizer.json"
    tokenizer.save(str(file))
    step = prepare.FileTokens("text", str(file), length=3)
    table = pl.DataFrame({"text": ["a b", None, "", "b c a b"]})
    assert prepare.conformance(step, table).unlearned is None


def sentences(count: int) -> str:
    lines = ["text,film"]
    for number in range(count):
        words = " ".join(f"word{(number * step) % 97}" for step in (1, 3, 7, 13, 29))
        lines.append(f"  {words} &amp; more,{number % 3}")
    return "\n".join(lines) + "\n"


def a_preparation(folder, films: str, **settings) -> prepare.Preparation:
    return prepare.Preparation(
        sources={"text": str(folder / "text.csv")},
        steps=[
            prepare.CleanText(["text"], html="entities"),
            prepare.TextQuality("text", least_words=3),
            prepare.Duplicates(["text"]),
            prepare.NearDuplicates("text", threshold=0.9),
            prepare.Join(films, on=["film"]),
            prepare.Split(test=0.3),
            prepare.Leaks(target="film", inputs=["title"]),
            prepare.WordTokens("text", length=8),
        ],
        inputs=["text"],
        target="film",
        **settings,
    )


def test_all_of_them_run_one_after_another_and_every_row_is_accounted_for(
    tmp_path, films
):
    (tmp_path / "text.csv").write_text(sentences(120))
    one = prepare.prepare(a_preparation(tmp_path, films), tmp_path / "one")
    small = a_preparation(tmp_path, films, piece_bytes=500)
    many = prepare.prepare(small, tmp_path / "many")
    for split in ("train", "test"):
        assert one.table(split).equals(many.table(split))
    # the rows repeat with the period of the words
    assert len(one.table("train")) + len(one.table("test")) == 97
    notes = one.quarantine().filter(pl.col("lepton.action") == "dropped").sort(ROW)
    assert len(notes) == 23
    assert notes["lepton.partner_row"].to_list() == [row - 97 for row in notes[ROW]]


def test_a_changed_file_of_a_join_is_read_again(tmp_path, films):
    (tmp_path / "text.csv").write_text(sentences(20))
    before = prepare.Join(films, on=["film"]).to_json()
    with open(films, "a") as file:
        file.write("0,zero\n")
    after = prepare.Join(films, on=["film"]).to_json()
    assert before["other_digest"] != after["other_digest"]
    assert json.dumps(after)


def test_a_leak_that_is_an_error_stops_the_preparation(tmp_path, films):
    (tmp_path / "text.csv").write_text(sentences(60))
    steps = [
        prepare.Split(test=0.3),
        prepare.Leaks(target="film", inputs=["film"], error=["duplicates"]),
    ]
    spec = prepare.Preparation({"text": str(tmp_path / "text.csv")}, steps)
    with pytest.raises(DataError, match="equal rows of 'train'"):
        prepare.prepare(spec, tmp_path / "out")
