"""The engine of preparation: passes, resuming, what comes out, and raw rows."""

from __future__ import annotations

import dataclasses
import json

import polars as pl
import pytest

from lepton_jax.data.prepare import Preparation, open_prepared, prepare
from lepton_jax.data.prepare.passes import plan_passes
from lepton_jax.data.prepare.preparation import check
from lepton_jax.data.readers.reader import ROW
from lepton_jax.errors import DataError
from tests.data.preparing import PIECE_ROWS, Above, Center, Memory, Once, Tenth
from tools.same_bytes import files_of

ROWS = 400
STEPS = (Tenth(), Above("age", 2), Center("age"), Once("text"))


def people(rows: int = ROWS) -> pl.DataFrame:
    """A table with missing ages and repeated texts."""
    numbers = range(rows)
    return pl.DataFrame(
        {
            "age": [i % 71 if i % 13 else None for i in numbers],
            "text": [f"word {i % 133}" for i in numbers],
            "sick": [i % 2 for i in numbers],
        }
    )


def preparation(*steps, table: pl.DataFrame | None = None, **fields) -> Preparation:
    rows = people() if table is None else table
    return Preparation({"a": Memory(rows)}, steps or STEPS, target="sick", **fields)


def by_hand() -> pl.DataFrame:
    """The same preparation, written with Polars alone."""
    table = people().with_row_index(ROW)
    table = table.filter(pl.col("age") > 2)
    mean = table.filter(pl.col(ROW) % 10 != 0)["age"].mean()
    table = table.with_columns(pl.col("age") - mean)
    return table.unique("text", keep="first", maintain_order=True)


def test_the_rows_are_those_of_polars_and_their_counts_are_said(tmp_path):
    prepared = prepare(preparation(), tmp_path)
    whole = pl.concat([prepared.table(name, traced=True) for name in prepared.splits])
    expected = by_hand()
    assert (
        whole.sort(ROW)
        .select("age", "text", "sick")
        .equals(expected.select("age", "text", "sick"))
    )
    steps = prepared.manifest["steps"]
    missing = people()["age"].null_count()
    assert prepared.manifest["sources"][0]["columns"][0]["missing"] == missing
    assert [step["in"] for step in steps] == [ROWS, ROWS, *[steps[1]["out"]] * 2]
    assert steps[3]["out"] == expected.height
    prepared.verify()


@pytest.mark.parametrize("workers", [2, 5])
def test_any_number_of_workers_gives_the_same_bytes(tmp_path, workers):
    prepare(preparation(), tmp_path / "one", workers=1)
    prepare(preparation(), tmp_path / "more", workers=workers)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "more")


def test_fittings_share_a_pass_unless_one_needs_what_the_other_makes():
    def fits(*steps):
        checked = check(preparation(*steps))
        return [one.fits for one in plan_passes(checked.steps, checked.schemas)]

    assert fits(Tenth(), Center("age"), Center("sick")) == [(1, 2), ()]
    assert fits(Tenth(), Center("age"), Center("age")) == [(1,), (2,), ()]
    assert fits(Tenth(), Center("age"), Above("sick", 0), Once("text")) == [(1, 3), ()]
    assert fits(Tenth(), Center("age"), Above("age", 0), Once("text")) == [
        (1,),
        (3,),
        (),
    ]
    assert fits(Tenth(), Once("text"), Center("age")) == [(1,), (2,), ()]


def test_a_statistic_before_the_split_is_refused_before_any_row_is_read(tmp_path):
    with pytest.raises(DataError, match=r"Center learns .* stands before Tenth"):
        prepare(preparation(Center("age"), Tenth()), tmp_path)


def test_the_fitted_mean_is_that_of_the_training_split_alone(tmp_path):
    prepared = prepare(preparation(Tenth(), Center("age")), tmp_path)
    train = people().with_row_index(ROW).filter(pl.col(ROW) % 10 != 0)
    assert prepared.steps[1].state["mean"][0] == train["age"].mean()


def test_a_changed_row_is_prepared_again_and_other_pieces_are_not(tmp_path):
    steps = (Tenth(), Above("age", 2))
    prepare(preparation(*steps), tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    table = people()
    table[PIECE_ROWS + 3, "text"] = "another"
    prepared = prepare(preparation(*steps, table=table), tmp_path)

    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    kept = {path for path, time in files.items() if before.get(path) == time}
    assert {path.name[:9] for path in files.keys() - kept} == {"000-00001"}
    assert "another" in prepared.table("train")["text"]
    fresh = prepare(preparation(*steps, table=table), tmp_path / "fresh")
    assert prepared.manifest == fresh.manifest


def test_a_removed_source_takes_its_rows_along(tmp_path):
    two = Preparation({"a": Memory(people()), "b": Memory(people(90))}, STEPS)
    one = dataclasses.replace(two, sources={"a": Memory(people())})
    prepare(two, tmp_path / "two")
    prepare(one, tmp_path / "two")
    prepare(one, tmp_path / "one")
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_each_dropped_row_stands_in_the_quarantine_and_can_come_back(tmp_path):
    prepared = prepare(preparation(Above("age", 2)), tmp_path / "first")
    dropped = prepared.quarantine()
    raw = people().with_row_index("number")
    lost = raw.filter(~(pl.col("age") > 2).fill_null(False))
    assert dropped["lepton.row"].to_list() == lost["number"].to_list()
    assert dropped["text"].to_list() == lost["text"].to_list()
    assert set(dropped["lepton.reason"]) == {"not above"}

    corrected = dropped.with_columns(pl.lit(50).alias("age"))
    sources = {"a": Memory(people()), "corrected": Memory(corrected)}
    again = prepare(Preparation(sources, [Above("age", 2)]), tmp_path / "again")
    assert again.manifest["splits"]["train"]["rows"] == ROWS


def test_a_raw_row_gives_what_training_gave_to_the_bit(tmp_path):
    steps = (Tenth(), Above("age", 2), Center("age"))
    prepare(preparation(*steps), tmp_path)
    prepared = open_prepared(tmp_path, classes=[Tenth, Above, Center])
    trained = prepared.table("train", traced=True)
    rows = people()[trained[ROW].to_list()]
    assert prepared.apply(rows).equals(trained.select("age", "text", "sick"))
    one = prepared.apply({"age": rows["age"][0], "text": "unseen"})
    assert one.columns == ["age", "text"]
    assert one["age"][0] == trained["age"][0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"age": 1, "text": ""}, "Above drops row 0: not above"),
        ({"agee": 9, "text": ""}, "'age' is missing; did you mean 'agee'"),
        ({"age": 9.5, "text": ""}, "9.5 in the column 'age' is no Int64"),
        ({"age": "old", "text": ""}, "'old' in the column 'age' is no Int64"),
    ],
)
def test_a_raw_row_that_does_not_fit_is_an_error_and_is_never_lost(
    tmp_path, row, message
):
    prepared = prepare(preparation(), tmp_path)
    with pytest.raises(DataError, match=message):
        prepared.apply([{"age": 9, "text": ""}, row][1:])


def test_a_step_of_the_specs_own_is_asked_for_by_name(tmp_path):
    prepare(preparation(), tmp_path)
    with pytest.raises(DataError, match="the step Tenth is not one of Lepton's"):
        _ = open_prepared(tmp_path).steps


def test_records_hold_the_same_rows_as_parquet(tmp_path):
    parquet = prepare(preparation(), tmp_path / "parquet")
    records = prepare(preparation(output="arrayrecord"), tmp_path / "records")
    for split in parquet.splits:
        assert parquet.table(split, traced=True).equals(
            records.table(split, traced=True)
        )


def test_what_was_damaged_is_found_and_made_anew(tmp_path):
    prepared = prepare(preparation(), tmp_path)
    before = files_of(tmp_path)
    shard = prepared.shards("train")[2]
    shard.write_bytes(b"damaged")
    with pytest.raises(DataError, match="has changed"):
        prepared.verify()
    prepare(preparation(), tmp_path)
    assert files_of(tmp_path) == before


def test_sources_that_disagree_on_a_type_are_a_question(tmp_path):
    texts = people().with_columns(pl.col("age").cast(pl.String))
    sources = {"a": Memory(people()), "b": Memory(texts)}
    with pytest.raises(DataError, match="'age' is Int64 in 'a' and String in 'b'"):
        prepare(Preparation(sources), tmp_path)


def test_a_misspelt_target_names_the_nearest_column(tmp_path):
    wrong = dataclasses.replace(preparation(), target="sik")
    with pytest.raises(DataError, match="did you mean 'sick'"):
        prepare(wrong, tmp_path)


def test_a_preparation_that_drops_every_row_says_which_step_did(tmp_path):
    with pytest.raises(DataError, match="no row is left: 400 went in") as caught:
        prepare(preparation(Tenth(), Above("age", 1e9)), tmp_path)
    assert "Above" in str(caught.value)


def test_the_manifest_says_neither_when_nor_where(tmp_path):
    prepare(preparation(), tmp_path)
    text = (tmp_path / "manifest.json").read_text()
    assert str(tmp_path) not in text
    assert json.loads(text)["format"] == 1
