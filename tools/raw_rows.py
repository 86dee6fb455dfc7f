"""Check that raw rows get the predictions that training's own rows get, to the bit.

    python -m tools.raw_rows [RECIPE ...] [--data FOLDER]

Each recipe is trained for some steps on its embedded data, or on the data sets of a
folder, and saved. Then a fresh process that knows the saved folder alone opens it and
predicts 200 raw rows; the trainer predicts the prepared rows that came of these in
training. The outputs of both must have the same bits.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import polars as pl

import lepton_jax as lepton
from lepton_jax.cli import settings
from lepton_jax.data.readers import ROW, reader_of
from lepton_jax.errors import LeptonError

ROOT = Path(__file__).resolve().parents[1]
ROWS = 200
STEPS = 12
PIECE_BYTES = 2**26  # of a source that are read at once; assumption
# What the fresh process does: its arguments are the folder, the rows, and the outputs.
FRESH = """
import sys
import numpy as np, polars as pl
import lepton_jax as lepton
trainer = lepton.Trainer.open(sys.argv[1], devices=1)
rows = pl.read_parquet(sys.argv[2])
np.save(sys.argv[3], trainer.predict(rows, decode=lambda outputs: outputs))
"""


class Case(NamedTuple):
    """A recipe and its data.

    Attributes:
      recipe: name of its file.
      data: the file or folder below the folder of data sets; "": the embedded data.
      settings: of the recipe.
      reading: settings of `reader_of` for the data.
    """

    recipe: str
    data: str
    settings: dict[str, Any]
    reading: Mapping[str, Any] = MappingProxyType({})


CASES = (
    Case("csv_mlp", "adult/adult.data.gz", {"label": "column_15"}),
    Case(
        "csv_mlp",
        "titanic/titanic.csv",
        {"label": "Survived", "ignore": "Name"},
    ),
    Case(
        "table",
        "titanic/titanic.csv",
        {"label": "Survived", "ignore": "Name", "group": "Ticket"},
    ),
    Case(
        "logistic",
        "titanic/titanic.csv",
        {"label": "Survived", "ignore": "Name,Sex,Ticket,Cabin,Embarked"},
    ),
    Case("two_tower", "movielens_latest_small/ratings.csv", {}),
    Case(
        "click_through",
        "criteo_sample/train.tiny.csv",
        {"label": "Label", "ignore": "Id"},
    ),
    Case("text_classifier", "rt_polarity/sentence_polarity.zip", {}),
    Case("image_classifier", "cats_dogs_subset/cats_dogs_600.tar", {"size": 32}),
    Case("mnist_mlp", "mnist", {}),
    Case("mnist_cnn", "mnist", {"width": 4}),
    Case("lm", "tinyshakespeare/input.txt", {"batch_size": 4}),
)


def check(case: Case, data: Path) -> str:
    """Check a case, and return what came out in words.

    Raises:
      AssertionError: bits differ.
    """
    file = data / case.data
    argument = "text" if case.recipe == "lm" else "data"
    make = settings.load(ROOT / "recipes" / f"{case.recipe}.py")
    recipe = make(
        **{argument: file},
        steps=STEPS,
        **case.settings,
    )
    trainer = lepton.Trainer(
        recipe.with_(test=None),
        devices=1,
    )
    trainer.fit()
    inputs, rows = _rows(recipe, file, case)
    expected = trainer.predict(inputs, decode=_outputs)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        trainer.save(folder / "model")
        rows.write_parquet(folder / "rows.parquet")
        found = fresh(folder)
    same = expected.tobytes() == found.tobytes()
    assert same, f"{case.recipe}: {int((expected != found).sum())} outputs differ"
    shape = " x ".join(
        map(
            str,
            found.shape,
        )
    )
    return (
        f"{case.recipe} on {case.data}: {rows.height} raw rows, {shape} outputs equal"
    )


def fresh(folder: Path) -> np.ndarray:
    """Return the outputs of a process that knows a saved folder and raw rows alone."""
    outputs = folder / "outputs.npy"
    arguments = [folder / "model", folder / "rows.parquet", outputs]
    done = subprocess.run(
        [sys.executable, "-c", FRESH, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return np.load(outputs)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the cases, and return 1 if one fails."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
    )
    parser.add_argument("recipes", nargs="*", metavar="RECIPE")
    parser.add_argument(
        "--data",
        type=Path,
        default=ROOT.parent / "shared" / "data",
        help="folder of the data sets (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    failed = 0
    for case in CASES:
        if options.recipes and case.recipe not in options.recipes:
            continue
        try:
            print(
                check(case, options.data),
                flush=True,
            )
        except (AssertionError, LeptonError) as error:
            failed += 1
            print(f"{case.recipe} on {case.data}: FAILED: {error}", flush=True)
    return int(failed > 0)


# ---- internals ----


def _outputs(outputs: Any) -> Any:
    return outputs


def _rows(
    recipe: lepton.Recipe,
    file: Path,
    case: Case,
) -> tuple[Any, pl.DataFrame]:
    """Return the inputs of some training rows, and the same rows raw."""
    serving = recipe.preparation
    if case.recipe == "lm":
        return _texts(recipe, file)

    prepared = serving.prepared.table("train", traced=True)
    numbers = prepared[ROW].head(ROWS)
    samples = serving.split("train").take(np.arange(len(numbers)))[0]
    reader = reader_of(
        file,
        **case.reading,
        **serving.reading,
    )
    if case.reading:
        reader = reader_of(file, **case.reading)
    wanted = pl.DataFrame({ROW: numbers})
    found = []
    for piece in reader.pieces(PIECE_BYTES):
        table = reader.read(piece).table
        found.append(
            table.join(
                wanted,
                on=ROW,
                how="semi",
                maintain_order="left",
            )
        )
    rows = (
        pl.concat(found)
        .sort(ROW)
        .drop(
            ROW,
            serving.prepared.target,
        )
    )
    return samples, rows


def _texts(
    recipe: lepton.Recipe,
    file: Path,
) -> tuple[Any, pl.DataFrame]:
    """Return the first windows of a text as tokens, and as characters."""
    inputs = recipe.train.inputs[:ROWS]
    length = inputs.shape[1]
    content = file.read_text(encoding="utf-8")
    starts = range(
        0,
        len(inputs) * length,
        length,
    )
    texts = [content[start : start + length] for start in starts]
    return inputs, pl.DataFrame({"text": texts})


if __name__ == "__main__":
    sys.exit(main())
