"""The recipes that read files: a few steps of each, and the files that they refuse."""

from __future__ import annotations

import gzip
import sys
import types
from dataclasses import dataclass

import numpy as np
import pytest

import lepton_jax as lepton
from lepton_jax.errors import DataError, LeptonError, RecipeError
from recipes import lm, two_tower

pytestmark = pytest.mark.usefixtures("quick_compilation")

SENTENCE = "the quick brown fox jumps over the lazy dog, äöü.\n"


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(SENTENCE * 40, encoding="utf-8")
    return file


@pytest.fixture
def ratings(tmp_path):
    file = tmp_path / "ratings.csv"
    rows = [f"{i % 13},{i % 7 * 10},{1 + i % 9 / 2},{i}" for i in range(400)]
    file.write_text("userId,movieId,rating,timestamp\n" + "\n".join(rows) + "\n")
    return file


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(
            {},
            id="dense",
            marks=pytest.mark.slow,
        ),
        pytest.param({"experts": 4, "loop": "scan"}, id="experts"),
    ],
)
def test_a_text_is_learned_character_by_character(text, settings):
    recipe = lm.recipe(
        text=text,
        length=16,
        batch_size=8,
        steps=12,
        **settings,
    )
    history = lepton.Trainer(recipe, devices=1).fit()
    assert recipe.model.keywords["vocab"] == len(set(SENTENCE))
    assert history["loss"][-1] < history["loss"][0]
    assert history.metrics["perplexity"] == pytest.approx(
        np.exp(history.metrics["loss"]), rel=1e-4
    )


def test_each_token_is_predicted_once_from_those_before_it(text):
    recipe = lm.recipe(text=text, length=16)
    characters = sorted(set(SENTENCE))
    inputs, targets = (
        np.concatenate(
            [getattr(part, name) for part in (recipe.train, recipe.test)]
        ).ravel()
        for name in ("inputs", "targets")
    )
    back = "".join(characters[i] for i in inputs)
    assert (SENTENCE * 40).startswith(back)
    assert len(back) > 40 * len(SENTENCE) - 17
    np.testing.assert_array_equal(inputs[1:], targets[:-1])
    assert len(recipe.test) == round(0.1 * (len(recipe.train) + len(recipe.test)))


def test_gzip_and_a_byte_order_mark_change_nothing(text, tmp_path):
    packed = tmp_path / "text.gz"
    packed.write_bytes(gzip.compress("\ufeff".encode() + text.read_bytes()))
    np.testing.assert_array_equal(
        lm.recipe(text=packed).train.inputs, lm.recipe(text=text).train.inputs
    )


@pytest.mark.parametrize("size", ["8b", "405b"])
def test_the_large_sizes_bring_their_vocabulary_and_cost_nothing_to_look_at(size):
    recipe = lm.recipe(size)
    assert recipe.model.keywords["vocab"] == 128_256
    assert recipe.model.keywords["loop"] == "scan"
    assert recipe.precision == "bfloat16"
    assert recipe.train.inputs.shape[1] == 8192
    assert np.shares_memory(recipe.train.inputs, recipe.train.targets), (
        "views of one array"
    )
    assert recipe.train.inputs.flags.c_contiguous, (
        "else np.take would copy it all for each batch"
    )


def test_settings_go_before_what_is_usual(text):
    recipe = lm.recipe(
        "124m",
        text,
        length=32,
        batch_size=4,
        precision="float32",
        loop="scan",
        vocab=77,
    )
    assert (recipe.batch_size, recipe.precision, recipe.train.inputs.shape[1]) == (
        4,
        "float32",
        32,
    )
    assert recipe.model.keywords["vocab"] == 77
    assert recipe.model.keywords["loop"] == "scan"


@dataclass
class Processor:
    """A stand-in for sentencepiece: a token a word, numbered by its first letter."""

    model_proto: bytes

    def __post_init__(self):
        if self.model_proto != b"pieces":
            raise RuntimeError("could not parse ModelProto")

    def encode(self, text):
        return [ord(word[0]) for word in text.split()]

    def get_piece_size(self):
        return 300


def test_pieces_of_a_tokenizer(text, tmp_path, monkeypatch):
    monkeypatch.setitem(
        sys.modules,
        "sentencepiece",
        types.SimpleNamespace(SentencePieceProcessor=Processor),
    )
    model = tmp_path / "words.model"
    model.write_bytes(b"pieces")
    recipe = lm.recipe(
        text=text,
        tokenizer=model,
        length=16,
    )
    assert recipe.model.keywords["vocab"] == 300
    assert recipe.train.inputs[0, :4].tolist() == [ord(c) for c in "tqbf"]
    model.write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match="no SentencePiece model"):
        lm.recipe(text=text, tokenizer=model)
    with pytest.raises(DataError, match="no such file"):
        lm.recipe(text=text, tokenizer=tmp_path / "none.model")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(RecipeError, match=r"\[text\]"):
        lm.recipe(text=text, tokenizer=model)


def refused(
    function,
    kind: type[LeptonError],
    what: str,
    remedy: str,
    **settings,
):
    with pytest.raises(kind) as caught:
        function(**settings)
    assert what in caught.value.what
    assert remedy in caught.value.remedy
    assert caught.value.where


def test_texts_and_sizes_that_cannot_be_used(text, tmp_path):
    refused(
        lm.recipe,
        RecipeError,
        "did you mean '70b'",
        "405b",
        size="7b",
    )
    refused(
        lm.recipe,
        DataError,
        "no such file",
        "check the path",
        text=tmp_path / "none.txt",
    )
    refused(
        lm.recipe,
        DataError,
        "2,000 tokens",
        "999 or less",
        text=text,
        length=1000,
    )
    refused(
        lm.recipe,
        RecipeError,
        "length is 0",
        "length=256",
        text=text,
        length=0,
    )
    refused(
        lm.recipe,
        DataError,
        "has 9 rows",
        "vocab",
        text=text,
        vocab=9,
    )
    refused(
        lm.recipe,
        RecipeError,
        "experts is -1",
        "none",
        text=text,
        experts=-1,
    )
    for content, what in ((b"", "empty"), (b"ab", "tokens")):
        text.write_bytes(content)
        refused(
            lm.recipe,
            DataError,
            what,
            "",
            text=text,
        )


def test_ratings_are_learned_and_unknown_ones_have_a_row(ratings):
    recipe = two_tower.recipe(
        ratings,
        batch_size=32,
        learning_rate=1e-2,
    )
    history = lepton.Trainer(recipe, devices=1).fit(steps=60)
    assert history.metrics["rmse"] < np.std(recipe.test.targets)
    model = recipe.model.keywords
    assert model["users"] == 14 and model["items"] == 8, "those of the file, and row 0"
    assert set(recipe.train.inputs) == {"user", "item"}
    assert recipe.train.inputs["user"].min() == 1
    assert set(np.unique(recipe.train.targets)) == {1 + i / 2 for i in range(9)}


def test_embeddings_can_be_larger_than_the_data():
    recipe = two_tower.recipe(
        users=3_000_000,
        items=1_000_000,
        dim=128,
    )
    assert recipe.train.inputs["user"].max() > 2_900_000
    assert len(recipe.train) == 180_000
    assert (recipe.model.keywords["users"], recipe.model.keywords["items"]) == (
        3_000_000,
        1_000_000,
    )


def test_large_embeddings_are_updated_by_the_rows_that_are_looked_up():
    recipe = two_tower.recipe(
        users=300_000,
        items=300_000,
        sparse=True,
        steps=2,
        dim=4,
        batch_size=32,
    )
    trainer = lepton.Trainer(recipe, devices=1)
    trainer.fit(steps=1)
    before = np.array(trainer.state.params["users"]["embedding"])
    trainer.fit(steps=1)
    after = np.array(trainer.state.params["users"]["embedding"])
    moved = (before != after).any(axis=1).sum()
    assert 0 < moved <= 32


def test_ratings_that_cannot_be_used(ratings, tmp_path):
    refused(
        two_tower.recipe,
        DataError,
        "no such file",
        "check the path",
        data=tmp_path / "none.csv",
    )
    refused(
        two_tower.recipe,
        DataError,
        "did you mean 'userId'",
        "",
        data=ratings,
        user="userid",
    )
    refused(
        two_tower.recipe,
        RecipeError,
        "three columns",
        "different",
        data=ratings,
        item="userId",
    )
    refused(
        two_tower.recipe,
        RecipeError,
        "9 rows, but the ratings take 14",
        "14 or more",
        data=ratings,
        users=9,
    )
    refused(
        two_tower.recipe,
        RecipeError,
        "users is 0",
        "users=1000",
        users=0,
    )
    ratings.write_text(
        "userId,movieId,rating\n"
        + "".join(f"{i},{i},{('good', 'bad')[i % 2]}\n" for i in range(40))
    )
    refused(
        two_tower.recipe,
        DataError,
        "no numbers",
        "numbers",
        data=ratings,
    )
