from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest

from lepton_jax.errors import DataError, LeptonError
from lepton_jax.monitor import Monitor, read_events
from lepton_jax.monitor import events as events_module


class Heard:
    def __init__(self):
        self.events = []
        self.closed = 0

    def event(self, event):
        self.events.append(event)

    def close(self):
        self.closed += 1


def test_float32_and_non_finite_values_come_back_exactly(tmp_path):
    values = np.random.default_rng(0).standard_normal(200).astype(np.float32)
    values[:3] = [
        np.nan,
        np.inf,
        -np.inf,
    ]
    heard = Heard()
    monitor = Monitor(tmp_path, [heard])
    monitor.event(
        "steps",
        records={"loss": values},
        scalar=np.float32(0.1),
        deep=[{"x": math.nan}],
        path=tmp_path,
    )
    monitor.close()
    for line in (tmp_path / "events.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    (event,) = read_events(tmp_path)
    np.testing.assert_array_equal(
        np.array(event["records"]["loss"], np.float32), values
    )
    assert event["scalar"] == np.float32(0.1)
    assert math.isnan(event["deep"][0]["x"])
    np.testing.assert_array_equal(
        heard.events[0]["records"]["loss"], event["records"]["loss"]
    )


def test_bfloat16_records_become_numbers(tmp_path):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    monitor = Monitor(tmp_path)
    monitor.event(
        "steps",
        loss=np.array([1.5, np.nan], ml_dtypes.bfloat16),
        one=ml_dtypes.bfloat16(0.25),
    )
    (event,) = read_events(tmp_path)
    assert event["loss"][0] == 1.5
    assert math.isnan(event["loss"][1])
    assert event["one"] == 0.25


def test_an_event_is_in_the_file_before_the_next_begins(tmp_path):
    monitor = Monitor(tmp_path)
    monitor.event("start")
    assert [e["kind"] for e in read_events(tmp_path)] == ["start"]


@pytest.mark.parametrize("cut", [1, 10, 70_000])
def test_a_torn_last_line_is_skipped_then_mended(tmp_path, cut):
    monitor = Monitor(tmp_path)
    path = tmp_path / "events.jsonl"
    monitor.event("start")
    monitor.event("steps", text="y" * 100_000)
    monitor.close()
    os.truncate(path, path.stat().st_size - 1 - cut)
    assert [e["kind"] for e in read_events(path)] == ["start"]
    again = Monitor(tmp_path)
    again.event("end")
    assert [e["kind"] for e in read_events(path)] == ["start", "end"]


def test_a_whole_event_without_its_newline_is_kept(tmp_path):
    monitor = Monitor(tmp_path)
    path = tmp_path / "events.jsonl"
    monitor.event("start")
    monitor.close()
    os.truncate(path, path.stat().st_size - 1)
    again = Monitor(tmp_path)
    again.event("end")
    assert [e["kind"] for e in read_events(path)] == ["start", "end"]


def test_a_journal_that_is_one_torn_line_starts_empty(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"time": 1, "ki')
    Monitor(tmp_path).event("start")
    assert [e["kind"] for e in read_events(path)] == ["start"]


@pytest.mark.parametrize(
    "line", [b'{"time": 1, "ki\n', b"7\n", b'{"time": 1}\n', b"\xff\xfe\n"]
)
def test_damage_elsewhere_names_file_and_line(tmp_path, line):
    path = tmp_path / "events.jsonl"
    path.write_bytes(
        b'{"time": 1, "kind": "start"}\n' + line + b'{"time": 2, "kind": "end"}\n'
    )
    with pytest.raises(DataError) as error:
        read_events(path)
    assert error.value.where == f"{path}, line 2"


def test_no_journal_is_an_error_that_names_the_file(tmp_path):
    with pytest.raises(DataError, match=r"events\.jsonl"):
        read_events(tmp_path)


def test_a_full_disk_names_the_file_and_leaves_whole_lines(tmp_path, monkeypatch):
    monitor = Monitor(tmp_path)
    path = tmp_path / "events.jsonl"
    write = os.write
    monitor.event("start")
    room = [10]

    def full(file, data):
        if not room[0]:
            raise OSError(28, "No space left on device")
        data = data[: room[0]]
        room[0] = 0
        return write(file, data)

    monkeypatch.setattr(events_module.os, "write", full)
    with pytest.raises(LeptonError) as error:
        monitor.event("steps", first=1, last=2)
    monkeypatch.undo()
    assert error.value.where == str(path)
    assert "No space left" in error.value.what
    monitor.event("end")
    assert [e["kind"] for e in read_events(path)] == ["start", "end"]


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LeptonError, match=r"events\.jsonl"):
        Monitor(tmp_path / "file" / "run")


def test_without_a_folder_sinks_still_hear_and_close_once():
    heard = Heard()
    monitor = Monitor(None, [heard])
    monitor.event("start", name="x")
    monitor.close()
    monitor.close()
    assert heard.events[0]["name"] == "x"
    assert heard.closed == 1


def test_monitor_does_not_import_jax():
    code = (
        "import sys, importlib.machinery as m, types\n"
        "package = types.ModuleType('lepton_jax'); package.__path__ = [sys.argv[1]]\n"
        "sys.modules['lepton_jax'] = package\n"
        "import lepton_jax.monitor, lepton_jax.monitor.report\n"
        "sys.exit('jax' in sys.modules or 'rich' in sys.modules)"
    )
    folder = os.path.dirname(os.path.dirname(events_module.__file__))
    assert (
        subprocess.run([sys.executable, "-c", code, folder], check=False).returncode
        == 0
    )
