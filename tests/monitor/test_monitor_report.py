from __future__ import annotations

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from lepton_jax.errors import DataError
from lepton_jax.monitor import Monitor, read_events, write_report
from lepton_jax.monitor import events as events_module
from lepton_jax.monitor.chart import (
    Axis,
    Curve,
    Mark,
    downsample,
    draw,
    linear,
    logarithmic,
    smooth,
)
from lepton_jax.monitor.report import collect, main


class Page(HTMLParser):
    """The tags, the text and the charts of a page; fails on tags that do not close."""

    VOID = frozenset({"meta", "wbr", "path"})

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.attributes = []
        self.text = ""
        self.charts = {}
        self.open = []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)
        found = dict(attrs)
        if "data-chart" in found:
            self.charts[len(self.charts)] = json.loads(found["data-chart"])

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data + " "


def steps(monitor, first, losses, **fields):
    monitor.event(
        "steps",
        first=first,
        last=first + len(losses) - 1,
        records={"loss": losses},
        **{"seconds": 1.0, "data_wait": 0.25, "samples": 64, **fields},
    )


def run(folder: Path, events) -> Page:
    monitor = Monitor(folder)
    for kind, fields in events:
        monitor.event(kind, **fields)
    monitor.close()
    return Page(write_report(folder).read_text())


def test_the_later_record_of_a_repeated_step_wins(tmp_path):
    monitor = Monitor(tmp_path)
    monitor.event("start", step=0)
    steps(
        monitor,
        1,
        [4.0, 3.0, 2.0, 1.0],
    )
    monitor.event(
        "evaluation",
        step=4,
        metrics={"loss": 9.0},
    )
    monitor.event("start", step=2)
    steps(monitor, 3, [2.5, 1.5, 0.5])
    monitor.event(
        "evaluation",
        step=4,
        metrics={"loss": 8.0},
    )
    found = collect(read_events(tmp_path))
    x, y = found.records["loss"]
    assert x.tolist() == [1, 2, 3, 4, 5]
    assert y.tolist() == [4.0, 3.0, 2.5, 1.5, 0.5]
    assert found.evaluations == {4: {"loss": 8.0}}
    assert [(m.kind, m.x) for m in found.marks] == [("resume", 2)]


def test_a_rollback_takes_back_what_came_after_it_and_shows_it_apart(tmp_path):
    def steps_of(first, losses):
        zeros = [0.0] * len(losses)
        fields = {
            "first": first,
            "last": first + len(losses) - 1,
            "records": {"loss": losses, "skip": zeros, "guard:skip": zeros},
        }
        return "steps", fields

    lines = [
        {"kind": "start", "step": 0},
        {
            "kind": "motion",
            "step": 1,
            "last": 2,
            "policy": "warmup",
            "knob": "learning_rate",
            "from": 0.0,
            "to": 0.2,
            "values": [0.1, 0.2],
            "contribution": 1.0,
            "signals": {"step": 1},
        },
        {
            "kind": "decision",
            "step": 3,
            "policy": "warmup",
            "knob": "learning_rate",
            "from": 0.2,
            "to": 0.3,
            "contribution": 1.0,
            "signals": {"step": 2},
        },
        {
            "kind": "live",
            "step": 3,
            "request": "set",
            "settings": {"learning_rate": 9.0},
            "who": "ann@here",
            "pid": 1,
        },
        {
            "kind": "decision",
            "step": 4,
            "policy": "guard",
            "knob": "rollback",
            "from": 0.0,
            "to": 1.0,
            "contribution": 1.0,
            "signals": {"loss": 99.0},
        },
        {
            "kind": "rollback",
            "step": 4,
            "to": 2,
            "policy": "guard",
            "why": "loss is 99",
            "rate": 0.5,
        },
    ]
    (tmp_path / "controller.jsonl").write_bytes(
        b"".join(map(events_module.encode, lines))
    )
    page = run(
        tmp_path,
        [
            ("start", {"step": 0}),
            steps_of(1, [3.0, 2.0, 50.0, 99.0]),
            ("evaluation", {"step": 4, "metrics": {"loss": 70.0}}),
            (
                "rollback",
                {
                    "step": 4,
                    "to": 2,
                    "why": "loss is 99",
                },
            ),
            steps_of(3, [1.5]),
            ("end", {"step": 3}),
        ],
    )
    found = collect(read_events(tmp_path))
    assert found.records["loss"][1].tolist() == [3.0, 2.0, 1.5]
    assert not found.evaluations
    assert [part.tolist() for part in found.undone[0]] == [[3.0, 4.0], [50.0, 99.0]]
    assert [(m.kind, m.x) for m in found.marks] == [("rollback", 4)]
    assert "rolled back" in page.text
    assert "undone" in page.text
    assert "guard:skip" not in page.text.lower()
    rows = page.text[page.text.index("Decisions") : page.text.index("Plan")]
    for words in (
        "1 to 3   warmup   learning rate 0 to 0.3",
        "ann@here   set learning_rate=9",
        "rollback (undone)",
        "back to step 2, learning rate times 0.5   loss is 99",
    ):
        assert " ".join(words.split()) in " ".join(rows.split()), rows


def test_the_time_between_a_stop_and_its_resumption_is_not_counted():
    kinds = [
        ("start", 100),
        ("save", 110),
        ("damaged", 900),
        ("start", 901),
        ("end", 905),
        ("warning", 990),
    ]
    found = collect({"kind": kind, "time": float(at)} for kind, at in kinds)
    assert found.seconds == 10 + 4


def test_nothing_from_the_events_is_markup_and_nothing_is_fetched(tmp_path):
    evil = "<script>alert(1)</script>\"'&"
    page = run(
        tmp_path,
        [
            (
                "start",
                {
                    "name": evil,
                    "plan": evil,
                    "metrics": [evil],
                    "settings": {evil: evil},
                    "device_kind": evil,
                    "devices": 1,
                    "version": evil,
                    "table": [
                        {
                            "path": evil,
                            "shape": [2],
                            "dtype": evil,
                            "bytes": 8,
                            "spec": evil,
                            "kind": evil,
                        }
                    ],
                },
            ),
            (
                "compile",
                {
                    "program": evil,
                    "count": 2,
                    "changed": evil,
                },
            ),
            (
                "steps",
                {
                    "first": 1,
                    "last": 2,
                    "seconds": 1.0,
                    "records": {evil: [1.0, 2.0]},
                },
            ),
            ("evaluation", {"step": 2, "metrics": {evil: 0.5}}),
            ("warning", {"text": evil}),
            (evil, {evil: evil}),
            (
                "end",
                {
                    "status": evil,
                    "reason": evil,
                    "metrics": {evil: evil},
                },
            ),
        ],
    )
    assert page.tags.count("script") == 1
    assert page.text.count("alert(1)") >= 12
    assert not {name for name, _ in page.attributes} & {
        "src",
        "href",
        "onload",
        "onclick",
    }
    assert "http" not in (tmp_path / "report.html").read_text()
    assert "url(" not in (tmp_path / "report.html").read_text()


def test_missing_fields_are_tolerated(tmp_path):
    kinds = (
        "start",
        "compile",
        "steps",
        "evaluation",
        "save",
        "committed",
        "damaged",
        "skipped",
        "warning",
        "end",
    )
    page = run(tmp_path, [(kind, {}) for kind in kinds])
    assert "No step was recorded" in page.text


def test_key_figures_marks_and_events(tmp_path):
    page = run(
        tmp_path,
        [
            (
                "start",
                {
                    "name": "digits",
                    "step": 100,
                    "steps": 300,
                    "devices": 8,
                    "device_kind": "cpu",
                },
            ),
            ("damaged", {"step": 150, "reason": "bad checksum"}),
            (
                "steps",
                {
                    "first": 101,
                    "last": 102,
                    "seconds": 0.02,
                    "data_wait": 0.01,
                    "samples": 256,
                    "records": {"loss": [1.0, float("nan")]},
                },
            ),
            (
                "compile",
                {
                    "program": "train",
                    "count": 2,
                    "seconds": 1.0,
                    "changed": "x: (8,) became (7,)",
                },
            ),
            ("save", {"step": 102, "seconds": 0.01}),
            ("committed", {"step": 102}),
            (
                "end",
                {
                    "status": "diverged",
                    "step": 102,
                    "reason": "loss is NaN",
                    "metrics": {"accuracy": 0.875},
                },
            ),
        ],
    )
    for text in (
        "resumed at step 100",
        "0.875",
        "50.0 %",
        "12,800",
        "bad checksum",
        "became (7,)",
        "diverged",
        "compiled again",
        "not finite",
        "committed",
    ):
        assert text in page.text, text


def test_a_folder_without_events_is_an_error_and_exit_code_2(tmp_path, capsys):
    with pytest.raises(DataError):
        write_report(tmp_path)
    (tmp_path / "events.jsonl").write_text("")
    assert main([str(tmp_path)]) == 2
    assert "events.jsonl" in capsys.readouterr().err


def test_the_command_prints_the_path_and_no_warning(tmp_path):
    Monitor(tmp_path).event("start", name="x")
    done = subprocess.run(
        [sys.executable, "-m", "lepton_jax.monitor.report", str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(events_module.__file__).parents[2],
    )
    assert done.stdout.strip() == str(tmp_path / "report.html")
    assert "Warning" not in done.stderr


def test_damaged_json_beside_the_events_is_said_not_raised(tmp_path):
    (tmp_path / "recipe.json").write_text("{")
    assert "recipe.json" in run(tmp_path, [("start", {})]).text


def test_down_sampling_keeps_spikes_and_gaps():
    x = np.arange(100_000.0)
    y = np.ones(100_000)
    y[[31_234, 77_777]] = [500.0, -3.0]
    y[50_000] = np.nan
    a, b = downsample(x, y)
    assert len(a) <= 1500
    assert (np.diff(a) > 0).all()
    assert a[0] == 0
    assert a[-1] == 99_999
    assert {31_234.0, 77_777.0, 50_000.0} <= set(a.tolist())
    assert np.nanmax(b) == 500


def test_smoothing_keeps_a_constant_a_gap_and_what_follows_a_huge_value():
    x = np.arange(1.0, 10_001)
    y = np.full(10_000, 0.5)
    y[2000] = 1e30
    y[6000:6400] = np.nan
    a, b = smooth(x, y)
    assert len(a) <= 750
    np.testing.assert_allclose(b[(a > 4000) & np.isfinite(b)], 0.5)
    assert np.isnan(b[(a > 6050) & (a < 6350)]).all()
    assert np.isfinite(b[(a < 5950) | (a > 6450)]).all()


@pytest.mark.parametrize(
    "low, high",
    [
        (0, 1),
        (0, 6000),
        (-3, 4),
        (1e-5, 3.3e-4),
        (7, 7),
        (0, 0),
        (1e7, 3e7),
        (0.97, 0.9701),
        (0, 123_456),
    ],
)
def test_linear_ticks_are_few_distinct_and_true(low, high):
    ticks = linear(low, high).ticks
    assert 3 <= len(ticks) <= 8
    assert len({label for _, label in ticks}) == len(ticks)
    for value, label in ticks:
        scale = {"k": 1e3, "M": 1e6}.get(label[-1], 1)
        assert float(label.rstrip("kM").replace(",", "")) * scale == pytest.approx(
            value, rel=1e-6, abs=1e-12
        )


@pytest.mark.parametrize(
    "low, high",
    [
        (0.01, 10),
        (1e-30, 1e30),
        (0.3, 20),
    ],
)
def test_logarithmic_ticks_are_few_and_within(low, high):
    scale = logarithmic(low, high)
    assert 2 <= len(scale.ticks) <= 8
    assert all(low <= v <= high for v, _ in scale.ticks)
    assert scale.at(low) == pytest.approx(0)
    assert scale.at(high) == pytest.approx(1)


@pytest.mark.parametrize(
    "y",
    [
        [np.nan, np.inf],
        [],
        [3.0],
        [0.0, 0.0],
        [-1e308, 1e308],
        [5e-324, 1e-300, 1.0],
    ],
)
def test_charts_of_strange_values_are_drawn_or_worded(y):
    y = np.array(y, np.float64)
    page = Page(
        draw(
            "loss",
            [
                Curve(
                    "train",
                    np.arange(len(y)) + 1.0,
                    y,
                    "train",
                )
            ],
            [Mark(1, "save", "checkpoint", "")],
            steps=(0, 2),
            axis=Axis(log=True),
        )
    )
    assert "nan" not in str(page.attributes).lower()
    assert "inf" not in str(page.attributes).lower()
    assert np.isfinite(y).any() or "No finite value" in page.text


def test_a_point_between_gaps_is_still_visible():
    y = np.array(
        [
            np.nan,
            2.0,
            np.nan,
            3.0,
            4.0,
        ]
    )
    page = Page(
        draw(
            "loss",
            [
                Curve(
                    "train",
                    np.arange(5.0),
                    y,
                    "train",
                )
            ],
            steps=(0, 4),
        )
    )
    (path,) = [
        value for name, value in page.attributes if name == "d" and "M250.0" in value
    ]
    assert path.count("M") == 2
    assert path.count("h0") == 1
    assert path.count("L") == 1
