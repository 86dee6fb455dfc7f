"""Files of texts as people have them: right data, a clear error, or a counted drop."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import lepton_jax as lepton
from lepton_jax.errors import DataError, LeptonError, RecipeError
from recipes import text_classifier

pytestmark = pytest.mark.usefixtures("quick_compilation")

GOOD = ["a fine film", "great fun, moving", "wonderful and warm", "the best of all"]
BAD = ["a dull film", "boring and long", "cold, flat and slow", "the worst of all"]
# 40 texts, no two of them the same
PAIRS = [
    (f"{text} {number}", label)
    for number in range(5)
    for texts, label in ((GOOD, "good"), (BAD, "bad"))
    for text in texts
]


def csv_of(pairs, head="text,label", end="\n") -> str:
    rows = [f'"{text}",{label}' for text, label in pairs]
    return end.join([head, *rows]) + end


def json_of(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def rows_of(recipe) -> int:
    return sum(
        split["rows"]
        for split in recipe.preparation.prepared.manifest["splits"].values()
    )


def written(folder: Path, content: Any, name: str) -> Path:
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


class Case(NamedTuple):
    """A file that is read, and what becomes of it.

    Attributes:
      content: of the file.
      rows: that are left of it.
      said: on the terminal.
      settings: of the recipe.
      name: of the file.
      words: the classes.
    """

    content: Any
    rows: int = 40
    said: str = ""
    settings: dict = {}  # noqa: RUF012
    name: str = "texts.csv"
    words: tuple = ("bad", "good")


ACCENTED = [(f"{text} café", label) for text, label in PAIRS]
MIXED = [
    (csv_of(PAIRS[:20]).encode() + "café déjà,good\n".encode() * 3)
    + "ça alors,bad\n".encode("latin-1")
    + csv_of(PAIRS[20:]).partition("\n")[2].encode()
][0]
OBJECTS = [{"text": text, "label": label} for text, label in PAIRS]
BROKEN = json_of(OBJECTS[:30]) + '{"text": "half a\n' + json_of(OBJECTS[30:])
READ = {
    "utf_16_with_a_mark": Case(csv_of(PAIRS).encode("utf-16")),
    "utf_16_without_a_mark": Case(csv_of(PAIRS).encode("utf-16-le")),
    "utf_8_with_a_mark": Case(csv_of(PAIRS).encode("utf-8-sig")),
    "latin_1": Case(csv_of(ACCENTED).encode("latin-1")),
    "lines_of_windows": Case(csv_of(PAIRS, end="\r\n")),
    "gzip": Case(gzip.compress(csv_of(PAIRS).encode()), name="texts.csv.gz"),
    "other_separators": Case(csv_of(PAIRS).replace('",', '";').replace("t,l", "t;l")),
    "right_to_left_and_emoji": Case(
        csv_of(
            [
                (f"{t} {'فيلم رائع 👍🏽' if c == 'good' else 'סרט רע 👎'}", c)
                for t, c in PAIRS
            ]
        )
    ),
    "line_ends_in_texts": Case(
        csv_of([(t.replace(" ", "\n", 1), c) for t, c in PAIRS])
    ),
    "texts_that_look_like_numbers": Case(
        csv_of([(i * 7, c) for i, (_, c) in enumerate(PAIRS)])
    ),
    "labels_that_look_missing": Case(
        csv_of([(t, "NA" if c == "bad" else "none") for t, c in PAIRS]),
        words=("NA", "none"),
    ),
    "labels_that_are_numbers": Case(
        csv_of([(t, int(c == "bad")) for t, c in PAIRS]), words=("0", "1")
    ),
    "labels_with_spaces_at_the_end": Case(
        csv_of([*PAIRS[:36], *((t, f"{c}  ") for t, c in PAIRS[36:])]),
        said="changed 4: text cleaned",
    ),
    "a_very_long_line": Case(csv_of([*PAIRS, ("long " * 200_000, "good")]), rows=41),
    "zero_bytes": Case(
        json_of([{"text": f"{t}\0", "label": c} for t, c in PAIRS]), name="texts.jsonl"
    ),
    "empty_texts": Case(
        csv_of([*PAIRS, ("", "good"), ("", "bad")]), said="dropped 2: missing"
    ),
    "white_space_alone": Case(
        csv_of([*PAIRS, (" \t ", "good"), ("\u3000", "bad"), ("\u200b", "bad")]),
        said="dropped 3: characters: 0, at least 1",
    ),
    "missing_labels": Case(
        csv_of([*PAIRS, ("what is it", ""), ("who knows", " ")]),
        said="dropped 1: missing",
    ),
    "a_label_that_training_did_not_see": Case(
        csv_of([*PAIRS, ("odd", "odd")]),
        said="is no class of the training split",
        settings={"folds": 4, "fold": 0},
    ),
    "texts_on_both_sides": Case(
        csv_of([*PAIRS, *PAIRS]), rows=80, said="alarm: rows of 'test' equal rows"
    ),
    "a_broken_line_refused": Case(
        BROKEN,
        said="1 unreadable",
        settings={"bad_rows": "refuse"},
        name="t.jsonl",
    ),
    "another_encoding_refused": Case(
        MIXED, rows=43, said="1 unreadable", settings={"bad_rows": "refuse"}
    ),
    "a_script_without_spaces": Case(
        csv_of(
            [
                ("这部电影很好看" if c == "good" else "这部电影很难看", c)
                for _, c in PAIRS
            ]
        ),
        said="script without spaces",
    ),
    "no_words": Case(
        csv_of(
            [
                (("ACGT" if c == "good" else "GGTA") * 20 + "A" * i, c)
                for i, (_, c) in enumerate(PAIRS)
            ]
        ),
        said="bytes are the tokens",
    ),
}


@pytest.mark.parametrize("name", READ)
def test_a_file_is_read_and_what_is_left_out_is_said(name, tmp_path, capfd):
    case = READ[name]
    file = written(tmp_path, case.content, case.name)
    recipe = text_classifier.recipe(data=file, steps=1, **case.settings)
    said = capfd.readouterr().err
    assert rows_of(recipe) == case.rows, said
    assert case.said in said
    assert recipe.preparation.words == case.words
    used = recipe.train.inputs["words"]
    assert used.max() > 0


class Refused(NamedTuple):
    """A mistake, and what its error says.

    Attributes:
      content: of the file; None: there is none.
      words: of the error.
      settings: of the recipe.
      name: of the file.
      kind: of the error.
    """

    content: Any
    words: str
    settings: dict = {}  # noqa: RUF012
    name: str = "texts.csv"
    kind: type[LeptonError] = DataError


REFUSED = {
    "no_file": Refused(None, "no such file"),
    "an_empty_file": Refused("", "empty|no row|nothing"),
    "a_head_alone": Refused("text,label\n", "no row|no text"),
    "one_class": Refused(csv_of([(t, "good") for t, _ in PAIRS]), "one value, 'good'"),
    "no_such_column": Refused(
        csv_of(PAIRS), "no column 'lable'; did you mean 'label'", {"label": "lable"}
    ),
    "columns_with_other_names": Refused(
        csv_of(PAIRS, head="x,y"), "which column holds the texts"
    ),
    "the_same_column_twice": Refused(
        csv_of(PAIRS), "the same column 'text'", {"label": "text"}
    ),
    "a_broken_line": Refused(BROKEN, "line 31", name="texts.jsonl"),
    "another_encoding": Refused(MIXED, "line 25|UTF-8"),
    "white_space_everywhere": Refused(
        csv_of([(" ", c) for _, c in PAIRS]), "no row|no text|empty"
    ),
    "a_file_of_lines_alone": Refused(
        "\n".join(t for t, _ in PAIRS), "no classes|which column", name="texts.txt"
    ),
    "a_picture": Refused(b"\x89PNG\r\n\x1a\n" + bytes(99), "image|picture|column|text"),
    "no_tokenizer": Refused(
        csv_of(PAIRS), "no tokenizer", {"tokenizer": "none.model"}, kind=RecipeError
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_mistake_is_an_error_that_says_what_to_do(name, tmp_path):
    case = REFUSED[name]
    file = tmp_path / case.name
    if case.content is not None:
        written(tmp_path, case.content, case.name)
    with pytest.raises(case.kind, match=f"(?s){case.words}") as caught:
        text_classifier.recipe(data=file, steps=1, **case.settings)
    assert caught.value.remedy


def folder_of_files(folder: Path) -> Path:
    for number, (text, label) in enumerate(PAIRS):
        (folder / label).mkdir(exist_ok=True)
        (folder / label / f"{number}.txt").write_text(f"{text}\nand more")
    return folder


def file_a_class(folder: Path) -> Path:
    for label in ("good", "bad"):
        lines = [text for text, each in PAIRS if each == label]
        (folder / f"films.{label}").write_text("\n".join(lines))
    return folder


def archive(folder: Path) -> Path:
    file = folder / "films.zip"
    with zipfile.ZipFile(file, "w") as into:
        for label in ("good", "bad"):
            lines = [text for text, each in PAIRS if each == label]
            into.writestr(f"films/films.{label}", "\n".join(lines))
        into.writestr("films/README.txt", "about the films")
    return file


@pytest.mark.parametrize("form", [folder_of_files, file_a_class, archive])
def test_folders_and_archives_are_read(form, tmp_path):
    recipe = text_classifier.recipe(data=form(tmp_path), steps=1)
    assert rows_of(recipe) == 40
    assert [word.removeprefix("films.") for word in recipe.preparation.words] == [
        "bad",
        "good",
    ]


TAGS = {"good": ["praise", "short"], "bad": ["short"]}


@pytest.mark.parametrize("form", ["lists", "text"])
def test_several_labels_a_text(form, tmp_path):
    if form == "lists":
        rows = [{"text": t, "tags": TAGS[c]} for t, c in PAIRS]
        file = written(tmp_path, json_of(rows), "texts.jsonl")
        more: dict = {}
    else:
        pairs = [(t, "; ".join(TAGS[c])) for t, c in PAIRS]
        file = written(tmp_path, csv_of(pairs, head="text,tags"), "texts.csv")
        more = {"separator": ";"}
    recipe = text_classifier.recipe(data=file, steps=30, batch_size=16, **more)
    assert recipe.train.targets.shape == (36, 2)
    trainer = lepton.Trainer(recipe, devices=1)
    trainer.fit()
    assert trainer.evaluate(recipe.test).f1 > 0.9
    found = trainer.predict([{"text": GOOD[0]}, {"text": BAD[1]}], words=True)
    assert found == [["praise", "short"], ["short"]]


@pytest.mark.parametrize("model", ["gru", "encoder"])
def test_a_network_may_be_alone(model, tmp_path):
    file = written(tmp_path, csv_of(PAIRS), "texts.csv")
    recipe = text_classifier.recipe(
        data=file,
        model=model,
        ngrams=False,
        steps=3,
        dim=8,
        hidden=8,
        batch_size=8,
    )
    assert recipe.train.inputs.ndim == 2
    losses = lepton.Trainer(recipe, devices=1).fit()["loss"]
    assert np.isfinite(losses).all()


def test_a_network_may_have_ngrams_next_to_it_and_bytes_for_tokens(tmp_path):
    file = written(tmp_path, csv_of(PAIRS), "texts.csv")
    recipe = text_classifier.recipe(
        data=file, model="conv", tokenizer="bytes", steps=3, hidden=4
    )
    tokens = recipe.train.inputs["tokens"]
    assert (tokens[:, :2].min() > 0) and tokens.max() < 256
    assert np.isfinite(lepton.Trainer(recipe, devices=1).fit()["loss"]).all()


def test_folds_hold_each_text_once(tmp_path):
    file = written(tmp_path, csv_of(PAIRS), "texts.csv")
    parts = [
        text_classifier.recipe(data=file, steps=1, folds=4, fold=fold).test.inputs
        for fold in range(4)
    ]
    assert [len(part["tokens"]) for part in parts] == [10] * 4
