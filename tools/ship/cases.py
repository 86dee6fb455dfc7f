"""Each recipe with data of its own kind, trained for some steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import polars as pl

import lepton_jax as lepton
from lepton_jax.cli import settings

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
STEPS = 12
NOTHING: Mapping[str, Any] = MappingProxyType({})


class Case(NamedTuple):
    """A recipe and its data.

    Attributes:
      recipe: name of its file.
      data: the file or folder below the folder of data sets; "": the embedded data.
      settings: of the recipe.
    """

    recipe: str
    data: str = ""
    settings: Mapping[str, Any] = NOTHING

    @property
    def name(self) -> str:
        """Recipe and data, as a table has them."""
        return f"{self.recipe} on {self.data}" if self.data else self.recipe

    def train(
        self,
        folder: Path = DATA,
        steps: int = STEPS,
    ) -> lepton.Trainer:
        """Return a trainer of this case that has trained.

        Args:
          folder: of the data sets.
          steps: to train for.
        """
        make = settings.load(ROOT / "recipes" / f"{self.recipe}.py")
        argument = "text" if self.recipe == "lm" else "data"
        given = {argument: folder / self.data} if self.data else {}
        recipe = make(
            **given,
            steps=steps,
            **self.settings,
        )
        trainer = lepton.Trainer(
            recipe.with_(evaluate_every=steps),
            devices=1,
        )
        trainer.fit()
        return trainer

    def raw_rows(
        self,
        trainer: lepton.Trainer,
        folder: Path,
        count: int,
    ) -> pl.DataFrame | None:
        """Return raw rows, where the test samples do not know theirs: a text's.

        Args:
          trainer: that has trained.
          folder: of the data sets.
          count: of rows.
        """
        if self.recipe != "lm":
            return None
        length = trainer.recipe.train.inputs.shape[1]
        content = (folder / self.data).read_text(encoding="utf-8")
        starts = range(0, count * length, length)
        texts = [content[start : start + length] for start in starts]
        return pl.DataFrame({"text": texts})


CASES = (
    Case("digits_cnn"),
    Case("mnist_mlp", "mnist"),
    Case("mnist_cnn", "mnist", {"width": 4}),
    Case(
        "cats_dogs",
        "cats_dogs_subset/cats_dogs_600.tar",
        {"size": 32, "width": 8},
    ),
    Case("image_classifier", "cats_dogs_subset/cats_dogs_600.tar", {"size": 32}),
    Case("text_classifier", "rt_polarity/sentence_polarity.zip"),
    Case(
        "table",
        "titanic/titanic.csv",
        {"label": "Survived", "ignore": "Name", "group": "Ticket"},
    ),
    Case("csv_mlp", "adult/adult.data.gz", {"label": "column_15"}),
    Case(
        "logistic",
        "titanic/titanic.csv",
        {"label": "Survived", "ignore": "Name,Sex,Ticket,Cabin,Embarked"},
    ),
    Case("recommender", "movielens_latest_small/ratings.csv"),
    Case("two_tower", "movielens_latest_small/ratings.csv"),
    Case(
        "click_through",
        "criteo_sample/train.tiny.csv",
        {"label": "Label", "ignore": "Id"},
    ),
    Case(
        "lm",
        "tinyshakespeare/input.txt",
        {"batch_size": 4, "precision": "float32"},
    ),
    Case("gan", "", {"width": 8}),
    Case("vae", "", {"width": 8}),
    Case("diffusion", "", {"width": 8}),
)
