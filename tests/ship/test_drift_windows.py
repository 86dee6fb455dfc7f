"""Drift on a server: windows of counts, and the gauges that come of them."""

import json
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

import lepton_jax as lepton
from lepton_jax.monitor.energy import EnergyMeter, Found
from lepton_jax.ship.watch import Meter
from lepton_jax.ship.watch.meter import ModelMeter, tallies_of
from lepton_jax.ship.watch.reference import Reference, of_arrays, of_table
from lepton_jax.ship.watch.tallies import LONGEST_LINE, MOST_CELLS, Tallies
from lepton_jax.ship.watch.window import LONGEST, PARTS, Window
from tests.ship import artifacts

NOTHING = EnergyMeter(Found((), ("no counters in a test",)))
JOBS = ("clerk", "smith", "cook")


def people(rows, seed=0, older=0.0, jobs=JOBS, lost=0.1):
    draw = np.random.default_rng(seed)
    pay = pl.Series(draw.lognormal(3, 1, rows))
    is_lost = pl.Series(draw.random(rows) < lost)
    return pl.DataFrame(
        {
            "age": draw.normal(40 + older, 12, rows).round(),
            "job": draw.choice(jobs, rows),
            "pay": pay.zip_with(~is_lost, pl.Series([None] * rows, dtype=pl.Float64)),
        }
    )


REFERENCE = of_table(people(5_000))


def alarms(tallies):
    return {
        (one.column, what)
        for one in tallies.moved()
        for what, is_on in one.alarms.items()
        if is_on
    }


def counted(table, rows=2_000):
    tallies = Tallies(REFERENCE, Window(REFERENCE, rows))
    for piece in table.iter_slices(500):
        tallies.add_rows(piece.to_dicts())
        tallies.count()
    return tallies


def shifted_model(meter):
    """Let a meter have a model whose rows have moved."""
    model = ModelMeter(meter, "people", "1", REFERENCE.to_json())
    model.rows(people(1_000, seed=1, older=12).to_dicts())
    meter._models["people", "1"] = model


def test_no_alarm_is_on_for_rows_like_training_s():
    assert not [k for k in range(20) if alarms(counted(people(1_000, seed=100 + k)))]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"older": 12}, ("age", "distribution")),
        ({"jobs": ("clerk", "cook", "cook", "cook", "cook")}, ("job", "distribution")),
        ({"jobs": (*JOBS * 6, "pilot")}, ("job", "unseen")),
        ({"lost": 0.25}, ("pay", "missing")),
    ],
)
def test_an_alarm_is_on_for_what_was_changed_and_for_that_alone(change, expected):
    found = alarms(counted(people(2_000, seed=7, **change)))
    assert expected in found
    assert {column for column, _ in found} == {expected[0]}


def test_few_rows_raise_no_alarm_however_odd_they_are():
    assert not alarms(counted(people(5, older=12)))


@given(st.lists(st.integers(1, 300), min_size=1, max_size=8))
@settings(max_examples=20)
def test_rows_are_counted_alike_however_requests_cut_them(cuts):
    table = people(sum(cuts), seed=3)
    whole = Window(REFERENCE, 100_000)
    whole.count(table)
    cut = Window(REFERENCE, 100_000)
    start = 0
    for rows in cuts:
        cut.count(table.slice(start, rows))
        start += rows
    assert cut.moved() == whole.moved() and cut.counted == table.height


def test_a_window_is_bounded_by_rows_and_by_time():
    now = [0.0]
    window = Window(REFERENCE, 1_000, clock=lambda: now[0])
    window.count(people(50_000, older=12))
    assert 900 <= window.counted <= 1_000 and len(window._parts) <= PARTS
    assert window.moved()[0].level == 2
    window.count(people(1_000))  # the shifted rows have fallen out
    assert not any(any(one.alarms.values()) for one in window.moved())
    now[0] += LONGEST + 1
    assert window.counted == 0 and window.moved() == []


def test_no_value_of_a_row_is_kept():
    table = people(200).with_columns(job=pl.lit("secret-diagnosis"))
    tallies = counted(table)
    state = json.dumps(
        [
            [part.counts.to_json(), list(part.unseen.items()), part.began]
            for part in tallies.window._parts
        ]
    )
    assert "secret-diagnosis" not in state and not tallies._waiting
    (job,) = [one for one in tallies.moved() if one.column == "job"]
    assert job.unseen == 1.0 and job.is_unseen


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.binary(max_size=9),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
)


KINDS = of_table(
    people(300).with_columns(
        born=pl.datetime(1990, 1, 1) + pl.duration(days=pl.col("age")),
        photo=pl.col("job").cast(pl.Binary),
        tags=pl.concat_list("age", "age"),
        story=pl.concat_str([pl.col("job")] * 20),
    )
)


@given(
    st.lists(
        st.dictionaries(st.sampled_from([*KINDS.profile.columns, "other"]), ODD),
        min_size=1,
        max_size=8,
    )
)
@settings(max_examples=60, deadline=None)
def test_any_cell_that_json_can_bring_is_counted_or_missing(rows):
    tallies = Tallies(KINDS)
    tallies.add_rows(rows)
    tallies.moved()
    is_known = any(name in rows[0] for name in KINDS.profile.columns)
    assert tallies.counted == (len(rows) if is_known else 0)
    assert tallies.skipped == (0 if is_known else len(rows))


def test_cells_of_every_kind_are_read_as_json_has_them():
    kinds = {name: column.kind for name, column in KINDS.profile.columns.items()}
    assert set(kinds.values()) >= {"time", "bytes", "list", "text", "category"}
    tallies = Tallies(KINDS)
    row = {"age": "41", "job": "cook", "pay": 3, "born": "1990-02-03T04:05:06+02:00"}
    tallies.add_rows([{**row, "photo": b"png", "tags": [1, 2], "story": "s" * 90}])
    assert {one.column: one.missing[1] for one in tallies.moved()} == dict.fromkeys(
        kinds, 0.0
    )


def test_rows_in_every_form_are_counted_alike():
    table = people(300, seed=5)
    forms = [table, table.to_dict(as_series=False), table.to_dicts()]
    forms.append({name: table[name].to_numpy() for name in ("age", "job")})
    found = []
    for form in forms:
        tallies = Tallies(REFERENCE)
        tallies.add_rows(form)
        found.append({one.column: one for one in tallies.moved()})
    assert found[0] == found[1] == found[2]
    assert found[3]["age"] == found[0]["age"] and found[3]["pay"].missing[1] == 1.0


def test_a_server_under_load_counts_a_sample_and_says_how_many_it_left_out():
    tallies = Tallies(REFERENCE)
    rows = people(100).to_dicts()
    for _ in range(100):
        tallies.add_rows(rows)
    assert LONGEST_LINE <= tallies._rows <= LONGEST_LINE + 100
    tallies.count()
    assert tallies.counted + tallies.skipped == 10_000


def test_rows_of_many_columns_are_counted_less_often():
    wide = of_table(pl.DataFrame({f"x{k}": [0.0, 1.0, 2.0] for k in range(1_000)}))
    tallies = Tallies(wide)
    for _ in range(100):
        tallies.add_rows([{"x1": 1.0}] * 10)
    assert MOST_CELLS // 1_000 <= tallies._rows < MOST_CELLS // 1_000 + 10


def test_pictures_drift_by_what_stands_for_them():
    draw = np.random.default_rng(0)
    training = {"image": draw.random((2_000, 12, 12, 1), np.float32)}
    reference = of_arrays(training)
    assert set(reference.profile.columns) == {"image.mean", "image.std"}
    tallies = Tallies(reference)
    tallies.add_arrays({"image": draw.random((1_000, 12, 12, 1), np.float32)})
    assert not alarms(tallies)
    dark = Tallies(reference)
    dark.add_rows({"image": draw.random((1_000, 12, 12, 1), np.float32) * 0.8})
    assert ("image.mean", "distribution") in alarms(dark)


def test_tensors_sent_to_a_model_of_raw_rows_are_no_missing_columns():
    tallies = Tallies(REFERENCE)
    tallies.add_rows({"numbers": np.zeros((5, 2))})
    tallies.add_arrays({"numbers": np.zeros((5, 2))})
    assert tallies.counted == 0 and tallies.skipped == 5


def test_a_reference_comes_back_from_its_text():
    again = Reference.from_json(REFERENCE.to_json())
    assert again == REFERENCE
    with pytest.raises(lepton.LeptonError, match="training histograms"):
        Reference.from_json('{"words": []}')


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, quick_compilation):
    return artifacts.people(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def artifact(trainer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("people")
    made = lepton.Artifact.of(trainer, rows=20)
    made.save(folder / "people.lepton")
    return lepton.Artifact.open(folder / "people.lepton")


def test_an_artifact_brings_all_that_its_gauges_need(artifact):
    reference = tallies_of(artifact.training).reference
    columns = reference.profile.columns
    assert set(columns) == {"age", "hours", "job"}  # raw: no step filled them in
    assert columns["hours"].missing > 0
    assert reference.words["job"] == {"clerk", "smith", "cook"}

    meter = Meter(energy=NOTHING)
    model = meter.model("people", "1", artifact)
    draw = np.random.default_rng(0)
    for _ in range(300):
        row = {"age": int(draw.integers(17, 90)), "hours": None, "job": "pilot"}
        model.rows([row])
    found = {
        (sample.name, sample.labels.get("column"), sample.labels.get("what")): (
            sample.value
        )
        for family in text_string_to_metric_families(meter.text())
        for sample in family.samples
    }
    meter.close()
    assert found["lepton_serve_drift_window_rows", None, None] == 300
    assert found["lepton_serve_drift_unseen_ratio", "job", None] == 1.0
    assert found["lepton_serve_drift_missing_ratio", "hours", None] == 1.0
    assert found["lepton_serve_drift_alarm", "hours", "missing"] == 1.0
    assert found["lepton_serve_drift_alarm", "age", "distribution"] == 0.0
    assert found["lepton_serve_drift_alarms", None, None] >= 3


def test_an_artifact_without_the_rows_of_training_says_that_it_can_t_be_watched(
    trainer, monkeypatch
):
    monkeypatch.setattr(trainer.preparation.prepared, "_sources", ())
    without_raw = lepton.Artifact.of(trainer, rows=0)
    assert Reference.from_json(without_raw.training).arrays  # the next best

    monkeypatch.setattr(trainer, "recipe", replace(trainer.recipe, train=None))
    made = lepton.Artifact.of(trainer, rows=0)
    assert made.training is None
    assert any("drift can't be watched" in note for note in made.manifest.notes)
    meter = Meter(energy=NOTHING)
    meter.model("people", "1", made).rows(people(5).to_dicts())
    assert "lepton_serve_drift_psi{" not in meter.text()
    meter.close()


def test_an_artifact_that_takes_another_s_place_begins_a_window_of_its_own(artifact):
    meter = Meter(energy=NOTHING)
    first = meter.model("people", "1", artifact)
    first.rows(people(10).to_dicts())
    assert meter.model("people", "1") is first
    assert meter.model("people", "1", artifact) is first
    newer = SimpleNamespace(training=REFERENCE.to_json())
    second = meter.model("people", "1", newer)
    second.batch([1], size=1, seconds=0.1)
    assert second is not first and second.tallies.moved() == []
    meter.close()


def test_rows_are_counted_by_a_thread_beside_the_server_s_work(artifact):
    meter = Meter(energy=NOTHING)
    model = meter.model("people", "1", artifact)
    model.rows(people(50).to_dicts())
    until = time.monotonic() + 5
    while model.tallies.counted < 50 and time.monotonic() < until:
        time.sleep(0.05)
    assert model.tallies.counted == 50 and not model.tallies._waiting
    meter.close()
