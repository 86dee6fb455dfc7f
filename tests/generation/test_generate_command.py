"""`lepton generate` on a saved model."""

import json
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optax
import pytest

import lepton_jax as lepton
from lepton_jax.cli import main

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model that has learned to count to 9 and begin again."""
    rows = (np.arange(9)[None] + np.arange(8)[:, None]).astype(np.int32) % 10
    trainer = lepton.Trainer(
        model=partial(lepton.models.TransformerLM, 10, dim=16, layers=1, heads=2),
        loss=lepton.losses.cross_entropy,
        optimizer=optax.adam,
        learning_rate=0.02,
        train=(rows[:, :-1], rows[:, 1:]),
        batch_size=8,
        steps=40,
        devices=1,
    )
    trainer.fit()
    return trainer.save(tmp_path_factory.mktemp("counting") / "model")


def test_token_ids_are_shown_as_they_come(saved, capsys):
    words = ["generate", str(saved), "--prompt-tokens", "3,4", "--tokens", "5"]
    assert main(words) == 0
    assert capsys.readouterr().out.split() == ["3", "4", *"56789"]


class Digits:
    """Stands in for a tokenizer of the library tokenizers."""

    @staticmethod
    def from_file(path):
        if not Path(path).exists():
            raise Exception("No such file")  # as the library does
        return Digits()

    def encode(self, text):
        return SimpleNamespace(ids=[int(digit) for digit in text])

    def decode(self, tokens):
        return "".join(map(str, tokens))

    def get_vocab_size(self):
        return 10


@pytest.fixture
def tokenizers(monkeypatch):
    library = SimpleNamespace(Tokenizer=Digits)
    monkeypatch.setitem(sys.modules, "tokenizers", library)


def test_texts_by_a_tokenizer_of_their_own_and_a_stop_string(
    saved, tmp_path, capsys, tokenizers
):
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    words = ["generate", str(saved), "--tokenizer", str(file), "--prompt", "12"]
    assert main([*words, "--tokens", "4"]) == 0
    assert capsys.readouterr().out == "123456\n"
    assert main([*words, "--prompt", "5", "--stop", "9", "--json"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["text"] == "345678" and first["reason"] == "stop"
    assert second == {
        "prompt": "5",
        "text": "678",
        "tokens": [6, 7, 8, 9],
        "reason": "stop",
    }


def test_the_tokenizer_of_an_imported_folder_needs_no_word(
    saved, tmp_path, capsys, tokenizers
):
    imported = tmp_path / "model"
    shutil.copytree(saved, imported)
    (imported / "hub").mkdir()
    (imported / "hub" / "tokenizer.json").write_text("{}")
    words = ["generate", str(imported), "--prompt", "12", "--tokens", "4"]
    assert main(words) == 0
    assert capsys.readouterr().out == "123456\n"


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ([], "no run is named"),
        (["RUN"], "there is no prompt"),
        (["RUN", "--prompt", "a"], "no tokenizer"),
        (["RUN", "--prompt-tokens", "x"], "no list of token ids"),
        (["RUN", "--prompt-tokens", "1", "--top-p", "2"], "top_p is 2"),
        (["RUN", "--prompt-tokens", "1", "--tokenizer", "none.json"], "can't be read"),
        (["elsewhere", "--prompt-tokens", "1"], "no run, no saved model"),
    ],
)
def test_a_mistake_ends_with_2_and_says_what_to_do(
    saved, words, what, capsys, tokenizers
):
    words = [str(saved) if word == "RUN" else word for word in words]
    assert main(["generate", *words]) == 2
    error = capsys.readouterr().err
    assert what in error and "remedy" in error
