"""`lepton predict`: each row once, whatever happens meanwhile."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lepton_jax as lepton
from lepton_jax.cli.predict import INTERRUPTED, MISTAKE, main
from lepton_jax.errors import DataError, SettingError
from lepton_jax.ship.scale import batch, engines
from tests.ship import artifacts

ROWS = 120


@pytest.fixture(scope="module")
def places(tmp_path_factory, quick_compilation):
    folder = tmp_path_factory.mktemp("predict")
    made = lepton.Artifact.of(artifacts.people(folder / "prepared"), rows=20)
    made.save(folder / "people.lepton")
    lepton.Artifact.of(artifacts.numbers(), rows=20).save(folder / "numbers.lepton")
    draw = np.random.default_rng(1)
    table = pl.DataFrame(
        {
            "id": np.arange(2 * ROWS),
            "age": draw.integers(17, 90, 2 * ROWS),
            "hours": draw.normal(40, 5, 2 * ROWS).round(1),
            "job": draw.choice(["clerk", "smith", "cook", "pilot"], 2 * ROWS),
        }
    )
    for number in range(2):
        part = table.slice(number * ROWS, ROWS)
        part.write_csv(folder / f"rows-{number}.csv")
    return folder


def predict(places, out, *words, data="rows-*.csv", artifact="people.lepton"):
    return main(
        [
            str(places / artifact),
            *("--data", str(places / data), "--out", str(out), *words),
        ]
    )


def rows_of(out):
    return pl.read_parquet(out / "part-*.parquet")


def request(places, out, **more):
    return batch.Request(
        str(places / "people.lepton"),
        (str(places / "rows-*.csv"),),
        str(out),
        **more,
    )


@given(piece=st.integers(40, 6_000))
@settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_every_row_comes_out_once_however_the_data_is_cut(
    places, tmp_path_factory, piece
):
    out = tmp_path_factory.mktemp("out")
    job = batch.plan(request(places, out, keep=("id",), piece_bytes=piece))
    for _ in engines.run_here(job):
        pass
    summary = batch.finish(job)
    made = rows_of(out)
    assert made["id"].to_list() == list(range(2 * ROWS)) and summary.rows == 2 * ROWS
    assert made.select("file", "row").n_unique() == made.height
    assert made["row"].to_list() == [*range(ROWS), *range(ROWS)]
    model = lepton.Artifact.open(places / "people.lepton")
    whole = pl.concat([pl.read_csv(places / f"rows-{k}.csv") for k in range(2)])
    assert made["prediction"].to_list() == model.predict(whole, words=True)


def test_the_command_says_what_it_did(places, tmp_path, capsys):
    out = tmp_path / "out"
    assert predict(places, out, "--outputs", "--json") == 0
    done = json.loads(capsys.readouterr().out)
    assert done["rows"] == 2 * ROWS and done["refused"] == 0
    made = rows_of(out)
    assert made["outputs"].dtype.shape == (2,) and made["error"].is_null().all()
    assert predict(places, out, "--outputs") == 0  # all is there already
    assert json.loads((out / "done.json").read_text()) == done


def test_a_row_that_can_t_be_predicted_has_the_reason_and_stops_no_other(
    places, tmp_path, capsys
):
    is_odd = pl.col("id").is_in([7, 40])
    table = pl.read_csv(places / "rows-0.csv").with_columns(
        age=pl.when(is_odd).then(pl.lit("old")).otherwise(pl.col("age").cast(pl.String))
    )
    table.write_parquet(tmp_path / "odd.parquet")
    out = tmp_path / "out"
    assert predict(places, out, "--keep", "id", data=tmp_path / "odd.parquet") == 0
    made = rows_of(out)
    assert made["id"].to_list() == list(range(ROWS))
    lost = made.filter(pl.col("error").is_not_null())
    assert lost["id"].to_list() == [7, 40] and lost["prediction"].is_null().all()
    assert made.filter(pl.col("error").is_null())["prediction"].null_count() == 0
    assert "2 rows have an error" in capsys.readouterr().out


def test_data_that_is_wrong_as_a_whole_is_one_mistake(places, tmp_path, capsys):
    pl.DataFrame({"age": [1, 2], "wages": [3, 4]}).write_csv(tmp_path / "other.csv")
    assert predict(places, tmp_path / "out", data=tmp_path / "other.csv") == MISTAKE
    assert "hours" in capsys.readouterr().err


def test_arrays_are_predicted_as_rows_are(places, tmp_path):
    arrays = np.random.default_rng(0).normal(size=(50, 12)).astype(np.float32)
    model = lepton.Artifact.open(places / "numbers.lepton")
    expected = model.predict(arrays).tolist()
    np.save(tmp_path / "one.npy", arrays)
    np.savez(tmp_path / "named.npz", inputs=arrays)
    for name in ("one.npy", "named.npz"):
        out = tmp_path / name.replace(".", "-")
        data = tmp_path / name
        assert predict(places, out, data=data, artifact="numbers.lepton") == 0
        assert rows_of(out)["prediction"].to_list() == expected


def test_a_folder_of_other_predictions_is_left_alone(places, tmp_path, capsys):
    out = tmp_path / "out"
    assert predict(places, out) == 0
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert predict(places, out, "--outputs") == MISTAKE
    assert "something else: outputs" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    assert predict(places, other) == MISTAKE


def test_data_that_changes_meanwhile_is_noticed(places, tmp_path):
    data = tmp_path / "rows.csv"
    data.write_bytes((places / "rows-0.csv").read_bytes())
    asked = batch.Request(
        str(places / "people.lepton"),
        (str(data),),
        str(tmp_path / "out"),
        piece_bytes=1_000,
    )
    job = batch.plan(asked)
    batch.predict_part(job, job.parts[0])
    data.write_bytes(data.read_bytes()[::-1])
    with pytest.raises(DataError):
        batch.predict_part(job, job.parts[1])


def test_an_artifact_that_is_replaced_meanwhile_is_noticed(places, tmp_path):
    artifact = tmp_path / "people.lepton"
    shutil.copytree(places / "people.lepton", artifact)
    asked = batch.Request(
        str(artifact),
        (str(places / "rows-0.csv"),),
        str(tmp_path / "out"),
    )
    job = batch.plan(asked)
    shutil.rmtree(artifact)
    shutil.copytree(places / "numbers.lepton", artifact)
    batch.opened.cache_clear()  # as in another worker
    with pytest.raises(DataError, match="another artifact"):
        batch.predict_part(job, job.parts[0])


def test_a_part_that_is_missing_or_cut_short_is_noticed(places, tmp_path):
    job = batch.plan(request(places, tmp_path / "out", piece_bytes=1_500))
    list(engines.run_here(job))
    victim = job.path(job.parts[1])
    whole = victim.read_bytes()
    pl.read_parquet(victim).head(-1).write_parquet(victim)
    with pytest.raises(DataError, match="does not hold its rows"):
        batch.finish(job)
    victim.unlink()
    with pytest.raises(DataError, match="is missing"):
        batch.finish(job)
    assert [part.number for part in job.left()] == [1]
    list(engines.run_here(job))
    assert victim.read_bytes() == whole


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "no artifact is named"),
        (("a.lepton", "--out", "x"), "--data is missing"),
        (("a.lepton", "--data", "x", "--out", "y"), "a.lepton"),
        (("a.lepton", "--data", "x", "--out", "y", "--cpus", "2"), "without --on ray"),
        (("a.lepton", "--dta", "x"), "did you mean '--data'"),
    ],
)
def test_mistakes_of_the_command_line(words, said, capsys):
    assert main(list(words)) == MISTAKE
    assert said in capsys.readouterr().err


def test_columns_to_keep_must_be_there(places, tmp_path):
    with pytest.raises(SettingError, match="'wage'"):
        batch.plan(request(places, tmp_path / "out", keep=("wage",)))


def test_killed_and_started_again_it_goes_on_and_no_row_is_twice(places, tmp_path):
    out = tmp_path / "out"
    words = ["--data", str(places / "rows-*.csv"), "--out", str(out), "--piece", "50"]
    command = [sys.executable, "-m", "lepton_jax", "predict"]
    command += [str(places / "people.lepton"), *words, "--keep", "id"]
    environment = {**os.environ, "XLA_FLAGS": ""}

    def until(more, number):
        count = len(list(out.glob("part-*.parquet"))) + more
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
        while len(list(out.glob("part-*.parquet"))) < count:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.002)
        process.send_signal(number)
        process.communicate()
        return process.returncode

    # a few parts each, so that some are left to do, however late the signal comes
    assert until(2, signal.SIGKILL) == -signal.SIGKILL
    assert until(2, signal.SIGINT) in (INTERRUPTED, 0)
    assert main([*command[4:], *[]]) == 0
    made = rows_of(out)
    assert sorted(made["id"].to_list()) == list(range(2 * ROWS))
    assert not list(out.glob("*unfinished"))


def test_a_task_on_a_cluster_makes_the_same_files(places, tmp_path):
    pytest.importorskip("ray", reason="needs the extra 'ray'")
    assert predict(places, tmp_path / "here", "--piece", "2KB") == 0
    assert predict(places, tmp_path / "there", "--piece", "2KB", "--on", "ray") == 0
    here, there = (
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("part-*")}
        for name in ("here", "there")
    )
    assert here == there
