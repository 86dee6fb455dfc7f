from __future__ import annotations

import io
import re

import pytest

from lepton_jax.monitor import Progress
from lepton_jax.monitor import progress as progress_module
from lepton_jax.monitor.progress import best_evaluation, duration, number

START = {
    "kind": "start",
    "name": "digits",
    "parameters": 50_186,
    "platform": "cpu",
    "device_kind": "cpu",
    "devices": 8,
    "steps": 400,
    "step": 0,
    "batch_size": 128,
    "samples_per_epoch": 1000,
    "metrics": ["accuracy"],
}
EVALUATION = {
    "kind": "evaluation",
    "step": 100,
    "seconds": 0.4,
    "metrics": {"loss": 0.5, "accuracy": 0.91},
}
END = {
    "kind": "end",
    "status": "finished",
    "step": 400,
    "seconds": 65.0,
    "samples_per_second": 12_800.0,
    "compilations": 3,
}


def steps(
    first,
    last,
    seconds=1.0,
    loss=0.25,
):
    n = last - first + 1
    return {
        "kind": "steps",
        "first": first,
        "last": last,
        "seconds": seconds,
        "data_wait": 0.1,
        "samples": n * 128,
        "records": {
            "loss": [loss] * n,
            "accuracy": [0.9] * n,
            "learning_rate": [1e-3] * n,
        },
    }


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(
        progress_module.time,
        "monotonic",
        lambda: now[0],
    )
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return now


def screen(text: str) -> list[str]:
    """Return the lines that a terminal would show of `text`, without colours."""
    lines = [""]
    for part in re.split(r"(\n|\r|\x1b\[K)", re.sub(r"\x1b\[[0-9;]*m", "", text)):
        if part == "\n":
            lines.append("")
        elif part == "\r":
            lines[-1] = ""
        elif part != "\x1b[K":
            lines[-1] += part
    return lines


def test_a_file_gets_plain_lines_two_seconds_apart(clock):
    out = io.StringIO()
    progress = Progress(out)
    for event in [START, steps(1, 10), steps(11, 20)]:
        progress.event(event)
    progress.event(EVALUATION)
    clock[0] += 2.1
    progress.event(steps(21, 30))
    progress.event(END)
    progress.close()
    text = out.getvalue()
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", text)
    lines = text.splitlines()
    assert "digits" in lines[0]
    assert "50,186 parameters" in lines[0]
    assert "8 x cpu" in lines[0]
    assert [line.split("  ")[0] for line in lines[1:4]] == [
        "step 10/400",
        "evaluation at step 100",
        "step 30/400",
    ]
    assert "accuracy 0.91" in lines[2]
    assert "1,280 samples/s" in lines[1]
    assert "ETA 39.0 s" in lines[1]


def test_a_terminal_keeps_one_live_line_and_the_warnings_above_it(clock, monkeypatch):
    monkeypatch.setattr(Progress, "_width", lambda self: 120)
    out = Terminal()
    progress = Progress(out)
    progress.event(START)
    for first in (1, 101, 201):
        clock[0] += 1
        progress.event(steps(first, first + 99))
    progress.event({"kind": "warning", "text": "row 7 dropped"})
    progress.event(
        {
            "kind": "compile",
            "program": "train",
            "count": 2,
            "seconds": 3.0,
            "changed": "x grew",
        }
    )
    progress.event(
        {
            "kind": "damaged",
            "step": 50,
            "reason": "checksum",
        }
    )
    shown = screen(out.getvalue())
    assert len(shown) == 5
    assert "row 7" in shown[1]
    assert "x grew" in shown[2]
    assert "step 50" in shown[3]
    assert "step 300/400" in shown[4]
    assert "━" in shown[4]
    assert "epoch 39/52" in shown[4]


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_the_live_line_fits_and_keeps_the_step_longest(clock, monkeypatch, width):
    monkeypatch.setattr(Progress, "_width", lambda self: width)
    out = Terminal()
    progress = Progress(out)
    for event in [START, EVALUATION, steps(1, 100)]:
        clock[0] += 1
        progress.event(event)
    line = screen(out.getvalue())[-1]
    assert "step 100/400" in line
    assert len(line) < width
    assert ("evaluation" in line) == (width == 200)


def test_dumb_terminals_get_plain_lines_and_no_color_no_colour(clock, monkeypatch):
    for variable, value, control in [
        ("TERM", "dumb", r"[\x1b\r]"),
        ("NO_COLOR", "1", r"\x1b\[[0-9;]*m"),
    ]:
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            out = Terminal()
            progress = Progress(out)
            for event in [START, steps(1, 100), EVALUATION, END]:
                progress.event(event)
            assert not re.search(control, out.getvalue()), variable


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_the_closing_table_says_what_came_of_it(clock, kind, tmp_path):
    out = kind()
    progress = Progress(out, folder=tmp_path)
    for event in [
        START,
        steps(1, 100),
        EVALUATION,
        EVALUATION | {"step": 200, "metrics": {"loss": 0.7}},
        END,
    ]:
        progress.event(event)
    table = "\n".join(screen(out.getvalue()))
    for text in (
        "finished",
        "400 of 400",
        "1 min 05 s",
        "12,800",
        "loss 0.5 at step 100",
        "10.0 %",
        "0.25",
    ):
        assert text in table
    assert str(tmp_path)[:20] in table


@pytest.mark.parametrize(
    "error",
    [
        BrokenPipeError(),
        ValueError("I/O operation on closed file"),
        OSError(5, "EIO"),
    ],
)
def test_a_stream_that_went_away_stops_nothing(clock, error):
    tried = []

    class Gone(Terminal):
        def write(self, text):
            tried.append(text)
            raise error

    progress = Progress(Gone())
    for event in [START, steps(1, 100), EVALUATION, END]:
        progress.event(event)
    progress.close()
    assert tried, "it did try to write"


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_missing_fields_and_unknown_events_are_tolerated(clock, kind):
    out = kind()
    progress = Progress(out)
    for name in (
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
        "new",
    ):
        progress.event({"kind": name})
    for event in [
        steps(1, 2, seconds=0.0),
        steps(3, 4, loss=float("nan")),
        {"kind": "end", "metrics": {"loss": None}},
    ]:
        progress.event(event)
    assert "nan" in out.getvalue()


def test_an_ascii_stream_gets_ascii(clock):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    out.isatty = lambda: True  # type: ignore[method-assign]
    progress = Progress(out)
    for event in [START, steps(1, 100), {"kind": "warning", "text": "größer"}, END]:
        progress.event(event)
    out.flush()
    assert b"step 100/400" in out.buffer.getvalue()  # type: ignore[attr-defined]


def test_the_best_evaluation_follows_the_rule():
    evaluations = [
        (1, {"loss": 0.5, "accuracy": 0.8}),
        (2, {"loss": float("nan"), "accuracy": 0.95}),
        (3, {"loss": 0.4, "accuracy": 0.9}),
        (4, {"loss": 0.4, "accuracy": 0.95}),
    ]
    assert best_evaluation(evaluations, {}) == (3, "loss", 0.4)
    assert best_evaluation(evaluations, {"settings": {"best": "accuracy"}}) == (
        2,
        "accuracy",
        0.95,
    )
    assert best_evaluation([], {}) is None


@pytest.mark.parametrize(
    "value, text",
    [
        (0.012345, "0.01235"),
        (12345.6, "12,346"),
        (0, "0"),
        (1.2346e-9, "1.235e-09"),
        (float("nan"), "nan"),
        (0.99999, "1"),
        (1, "1"),
        (999.96, "1000"),
    ],
)
def test_numbers(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0.34, "340 ms"),
        (0.9999, "1.00 s"),
        (59.97, "1 min 00 s"),
        (3599.7, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (273_600, "3 d 04 h"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
