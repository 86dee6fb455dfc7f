"""The status of made-up runs.

What counts, what it costs to look again, and the metrics' text.
"""

import fcntl
import json
import math
import os
import re
import time

import pytest

from lepton_jax.errors import DataError
from lepton_jax.launch.supervise.record import HostRecord, Record, slowest
from lepton_jax.launch.supervise.verdict import Fault, Place
from lepton_jax.monitor import encode, prometheus, status, stragglers, write_report
from lepton_jax.monitor.status import AT_WORK, STATES, Watch

NOW = 1_700_000_000.0


def write(folder, *events, start=NOW):
    """Write events (seconds after `start`, kind, fields)."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "events.jsonl").open("ab") as file:
        for seconds, kind, fields in events:
            file.write(encode({"time": start + seconds, "kind": kind, **fields}))
    return folder


def steps(
    at,
    first,
    last,
    seconds,
    wait=0.0,
    **records,
):
    return (
        at,
        "steps",
        {
            "first": first,
            "last": last,
            "seconds": seconds,
            "data_wait": wait,
            "samples": 32 * (last - first + 1),
            "records": records or {"loss": [0.5] * (last - first + 1)},
        },
    )


def begin(at, step=0, until=100):
    return (
        at,
        "start",
        {
            "step": step,
            "steps": until,
            "name": "toy",
            "devices": 8,
            "device_kind": "cpu",
        },
    )


@pytest.fixture
def restarted(tmp_path):
    """A run of ten steps of a second each.

    Four of them are lost in a crash; it goes on from step 6 after a pause.
    """
    return write(
        tmp_path / "run",
        begin(0),
        (
            1,
            "compile",
            {"program": "init", "seconds": 1.0},
        ),
        (
            4,
            "compile",
            {"program": "train", "seconds": 3.0},
        ),
        steps(8, 1, 4, 7.0, wait=0.5),
        (
            10,
            "evaluation",
            {
                "step": 4,
                "metrics": {"loss": 0.7, "accuracy": 0.25},
                "seconds": 2.0,
            },
        ),
        (
            11,
            "save",
            {"step": 4, "seconds": 1.0},
        ),
        steps(17, 5, 10, 6.0),
        begin(40, step=6),
        steps(
            46,
            7,
            10,
            4.0,
            loss=[0.5, 0.4, 0.3, 0.2],
        ),
        (
            50,
            "end",
            {"status": "finished", "step": 10},
        ),
    )


def test_goodput_of_a_restarted_run(restarted):
    found = status.status(restarted)
    # 4 s of the first window (3 of its 7 compiled), 2 of the 6 s of the second, 4 s
    # after the restart; of 50 s in all
    assert found["goodput"] == pytest.approx(10 / 50)
    assert found["seconds"] == pytest.approx(
        {
            "wall": 50,
            "steps": 10,
            "undone": 4,
            "data": 0.5,
            "compile": 3,
            "evaluation": 2,
            "save": 1,
            "other": 30,
        }
    )
    assert (found["starts"], found["restarts"], found["step"], found["until"]) == (
        2,
        1,
        10,
        100,
    )
    assert (
        found["state"],
        found["loss"],
        found["evaluation"]["step"],
        found["eta"],
    ) == ("finished", 0.2, 4, None)


def test_a_window_in_which_a_restart_falls_counts_by_its_share(tmp_path):
    write(
        tmp_path,
        begin(0),
        steps(10, 1, 10, 10.0),
        (
            12,
            "rollback",
            {"step": 10, "to": 3},
        ),
        steps(20, 4, 5, 2.0),
        (21, "end", {"status": "interrupted"}),
    )
    found = status.status(tmp_path)
    assert found["seconds"]["steps"] == pytest.approx(5)
    assert found["seconds"]["undone"] == pytest.approx(7)
    assert (found["rollbacks"], found["restarts"], found["step"]) == (1, 0, 5)


def test_who_goes_on_after_an_end_was_not_restarted_by_a_failure(tmp_path):
    for status_, restarts in (
        ("interrupted", 0),
        ("finished", 0),
        ("failed", 1),
        ("diverged", 1),
    ):
        run = write(
            tmp_path / status_,
            begin(0),
            (5, "end", {"status": status_}),
            begin(9),
        )
        assert status.status(run)["restarts"] == restarts, status_


def test_looking_again_reads_only_what_is_new_and_a_torn_line_later(restarted):
    watch = Watch(restarted)
    path = restarted / "events.jsonl"
    assert watch.status()["step"] == 10
    line = encode(
        {
            "time": NOW + 60,
            "kind": "start",
            "step": 10,
            "steps": 12,
        }
    )
    with path.open("ab") as file:
        file.write(line[:20])
    assert watch.status()["starts"] == 2
    with path.open("ab") as file:
        file.write(
            line[20:] + b"no event\n" + encode({"time": "soon", "kind": "steps"})
        )
    again = watch.status()
    assert (again["starts"], again["until"], again["damaged_lines"]) == (3, 12, 2)
    assert {**again, "time": 0, "event_age": 0} == {
        **status.status(restarted),
        "time": 0,
        "event_age": 0,
    }
    read = []
    watch._take = read.append
    watch.status()
    assert not read
    path.unlink()
    write(restarted, begin(0))
    watch = Watch(restarted)
    assert watch.status()["starts"] == 1
    path.unlink()
    write(
        restarted,
        begin(0.5, until=7),
        begin(1, until=8),
    )
    assert watch.status()["until"] == 8, "another file in its place"


def test_a_journal_longer_than_it_reads_at_once(tmp_path, monkeypatch):
    write(
        tmp_path,
        begin(0),
        *(steps(i, i, i, 1.0) for i in range(1, 200)),
    )
    whole = status.status(tmp_path)
    monkeypatch.setattr(status, "CHUNK_BYTES", 37)
    monkeypatch.setattr(status, "WINDOWS", 8)
    parts = status.status(tmp_path)
    assert parts["damaged_lines"] == 0
    assert parts["step"] == 199
    assert (
        parts["seconds"]["steps"]
        == pytest.approx(whole["seconds"]["steps"])
        == pytest.approx(199)
    )


def test_its_memory_does_not_grow_with_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(status, "WINDOWS", 16)
    watch = Watch(
        write(
            tmp_path,
            begin(0),
            *(steps(i, 2 * i - 1, 2 * i, 1.0) for i in range(1, 500)),
        )
    )
    watch.status()
    assert len(watch.history._windows) <= 17
    # of the window that holds the step its share counts
    write(tmp_path, begin(600, step=499))
    assert watch.status()["seconds"]["steps"] == pytest.approx(249.5)


def lock(folder, host=None):
    """As a run at work does."""
    (folder / "control").mkdir()
    file = (folder / "control" / "run.json").open("w")
    json.dump({"host": host or os.uname().nodename, "token": "secret"}, file)
    file.flush()
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def supervised(
    folder,
    state="running",
    age=0.0,
    exit_code=None,
    **more,
):
    (folder / "hosts.json").write_text(
        json.dumps(
            {
                "time": time.time() - age,
                "state": state,
                "restarts": 2,
                "restarts_left": 8,
                "exit_code": exit_code,
                "hosts": {},
                "recoveries": [],
                **more,
            }
        )
    )


def test_the_state_of_one_host_alone(tmp_path):
    began = write(
        tmp_path,
        begin(0),
        start=time.time(),
    )
    assert status.status(began)["state"] == "gone", "no process is at work there"
    file = lock(began)
    assert status.status(began)["state"] == "running"
    file.close()
    assert status.status(began)["state"] == "gone"
    (began / "control" / "run.json").write_text('{"host": "elsewhere"}')
    assert status.status(began)["state"] == "running", (
        "what another machine does can't be known from here"
    )


@pytest.mark.parametrize(
    ("told", "events", "expected"),
    [
        ({"state": "meeting"}, (), "meeting"),
        ({}, (), "starting"),
        ({}, (begin(0),), "running"),
        (
            {"state": "waiting"},
            (
                begin(0),
                (
                    1,
                    "end",
                    {"status": "failed"},
                ),
            ),
            "waiting",
        ),
        (
            {},
            (
                begin(0),
                (
                    1,
                    "end",
                    {"status": "failed"},
                ),
            ),
            "starting",
        ),
        (
            {"age": 40},
            (begin(-50),),
            "gone",
        ),
        (
            {"state": "over", "exit_code": 1},
            (begin(-50),),
            "failed",
        ),
        (
            {"state": "over", "exit_code": 0},
            (
                begin(-50),
                (
                    -9,
                    "end",
                    {"status": "finished"},
                ),
            ),
            "finished",
        ),
        (
            {"state": "over", "exit_code": 2},
            (
                begin(-50),
                (
                    -9,
                    "end",
                    {"status": "diverged"},
                ),
            ),
            "diverged",
        ),
        # begun again without supervisors
        (
            {"state": "over", "exit_code": 0, "age": 20},
            (begin(-5),),
            "running",
        ),
        (
            {"age": 90},
            (begin(-5),),
            "running",
        ),
    ],
)
def test_the_state_as_supervisors_say_it(tmp_path, told, events, expected):
    write(tmp_path, *events, start=time.time())
    supervised(tmp_path, **told)
    with lock(tmp_path) if expected == "running" else open(os.devnull):
        found = status.status(tmp_path)
    assert found["state"] == expected
    assert expected in STATES
    if expected in AT_WORK and "age" not in told:
        assert (found["restarts"], found["restarts_left"]) == (2, 8)


def test_while_it_runs_the_time_goes_on(tmp_path):
    write(
        tmp_path,
        begin(-100, until=20),
        steps(-60, 1, 10, 20.0),
        (
            -55,
            "save",
            {"step": 10, "seconds": 5.0},
        ),
        start=time.time(),
    )
    with lock(tmp_path):
        found = status.status(tmp_path)
    assert found["goodput"] == pytest.approx(0.2, rel=0.05)
    assert found["event_age"] == pytest.approx(55, abs=5)
    assert found["steps_per_second"] == 0.5
    assert found["samples_per_second"] == 16
    assert found["eta"] == pytest.approx(10 / 0.5 * 1.25)


def test_what_else_lies_in_the_folder(tmp_path):
    for name in ("3", "7", "9.orbax-checkpoint-tmp", "set_aside"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "plan.json").write_text(
        '{"bytes_per_device": {"params": 40, "data": 8}}'
    )
    found = status.status(tmp_path)
    assert found["checkpoint"] == 7
    assert found["memory"]["planned"] == {
        "params": 40,
        "data": 8,
    }
    assert found["state"] == "starting" or found["state"] == "gone"
    assert (
        found["goodput"],
        found["hosts"],
        found["slowest"],
        found["evaluation"],
    ) == (None, {}, None, None)
    for name in ("plan.json", "hosts.json", "events.jsonl"):
        (tmp_path / name).write_text("[1, 2")
    assert status.status(tmp_path)["hosts"] == {}
    assert "lepton_step 0\n" in prometheus(status.status(tmp_path))


def test_a_folder_without_a_run(tmp_path):
    for place in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(DataError, match="there is no run in this folder"):
            status.status(place)


# ---- the text for Prometheus ----


def parsed(text):
    """Parse the text format 0.0.4 to {(name, labels): value}.

    It fails on text that the grammar does not allow.
    """
    found = {}
    family = None
    kinds = {}
    assert text.endswith("\n")
    for line in text[:-1].split("\n"):
        if match := re.fullmatch(
            r"# HELP ([a-zA-Z_:][a-zA-Z0-9_:]*) (?:[^\\\n]|\\\\|\\n)+", line
        ):
            assert match[1] not in kinds, "a family stands in one piece"
            family = match[1]
            kinds[match[1]] = None
        elif match := re.fullmatch(r"# TYPE (\S+) (counter|gauge)", line):
            assert match[1] == family
            assert kinds[family] is None
            kinds[family] = match[2]
        else:
            match = re.fullmatch(
                r'([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{((?:[a-zA-Z_]\w*="(?:[^"\\]|\\["\\n])*",?)+)\})?'
                r" (\S+)",
                line,
            )
            assert match and match[1] == family, line
            labels = tuple(
                (
                    name,
                    value.replace(r"\"", '"').replace(r"\n", "\n").replace(r"\\", "\\"),
                )
                for name, value in re.findall(
                    r'([a-zA-Z_]\w*)="((?:[^"\\]|\\["\\n])*)"', match[2] or ""
                )
            )
            assert (family, labels) not in found
            found[family, labels] = float(match[3])
    assert all(
        (kind == "counter") == name.endswith("_total") for name, kind in kinds.items()
    )
    return found


HOSTS = {
    "0": {
        "state": "running",
        "machine": "a",
        "phase": "steps",
        "step": 12,
        "done": 8,
        "seconds_in_it": 0.5,
        "limit": None,
        "seconds": {
            "data": 1.0,
            "steps": 9.0,
            "evaluation": 0.0,
            "save": 0.5,
        },
        "data_share": 0.02,
        "memory": 2**30,
        "device_memory": None,
        "seconds_silent": 0.1,
        "seconds_slowest": 0.0,
    },
    "1": {
        "state": "running",
        "machine": "b",
        "phase": "data",
        "step": 11,
        "done": 8,
        "seconds_in_it": 3.0,
        "limit": 600.0,
        "seconds": {
            "data": 7.0,
            "steps": 3.0,
            "evaluation": 0.0,
            "save": 0.5,
        },
        "data_share": 0.7,
        "memory": 2**31,
        "device_memory": 2**33,
        "seconds_silent": 0.2,
        "seconds_slowest": 42.0,
    },
    "2": {
        "state": "missing",
        "machine": "",
        "host_id": None,
        "seconds_silent": 0.0,
    },
}


def test_the_metrics_text(restarted):
    supervised(
        restarted,
        hosts=HOSTS,
        slowest={"host": 1, "why": "it waits"},
        refused_connections=12,
        recoveries=[
            {
                "host": 1,
                "cause": "SIGKILL",
                "what": "x",
                "stack": ["long"],
                "seconds_to_stepped": 7.5,
            }
        ],
    )
    with (restarted / "events.jsonl").open("ab") as file:
        file.write(
            encode(
                {
                    "time": NOW + 51,
                    "kind": "start",
                    "name": 'a "name"\nof \\ two \udc80',
                    "steps": 99,
                    "step": 10,
                }
            )
        )
        file.write(
            encode(
                {
                    "time": NOW + 52,
                    "kind": "steps",
                    "first": 11,
                    "last": 11,
                    "seconds": 1.0,
                    "samples": 8,
                    "records": {"loss": [math.nan], "gradient_norm": [math.inf]},
                }
            )
        )
    found = status.status(restarted)
    text = prometheus(found)
    metrics = parsed(text)
    assert {k: v for k, v in metrics.items() if k[0] == "lepton_run_state" and v} == {
        ("lepton_run_state", (("state", "running"),)): 1
    }
    assert (
        next(
            dict(labels)["name"]
            for name, labels in metrics
            if name == "lepton_run_info"
        )
        == 'a "name"\nof \\ two ?'
    )
    assert math.isnan(metrics["lepton_loss", ()])
    assert metrics["lepton_record", (("name", "gradient_norm"),)] == math.inf
    assert metrics["lepton_evaluation", (("metric", "accuracy"),)] == 0.25
    assert metrics["lepton_restarts_total", ()] == 2
    assert metrics["lepton_starts_total", ()] == 3
    assert metrics["lepton_last_recovery_seconds", ()] == 7.5
    assert metrics["lepton_target_step", ()] == 99
    assert metrics["lepton_goodput_ratio", ()] == found["goodput"]
    assert (
        metrics["lepton_refused_connections_total", ()]
        == found["refused_connections"]
        == 12
    )
    assert [metrics["lepton_host_slowest", (("host", host),)] for host in "012"] == [
        0,
        1,
        0,
    ]
    assert [metrics["lepton_host_up", (("host", host),)] for host in "012"] == [1, 1, 0]
    assert (
        metrics["lepton_host_spent_seconds", (("host", "1"), ("phase", "data"))] == 7.0
    )
    assert metrics["lepton_host_device_memory_bytes", (("host", "1"),)] == 2**33
    assert metrics["lepton_host_phase", (("host", "1"), ("phase", "data"))] == 1
    assert (
        "lepton_host_device_memory_bytes",
        (("host", "0"),),
    ) not in metrics, "what is not known is left out"
    assert found["memory"]["host"] == 2**31
    assert found["recoveries"][0].get("stack") is None
    assert json.loads(encode(found))["record"]["loss"] == "NaN"


# ---- hosts side by side ----


def heard(
    *places,
    shares=(),
    at=100.0,
    silent=(),
):
    hosts = {}
    for host, place in enumerate(places):
        hosts[host] = HostRecord("running", f"m{host}", host)
        share = shares[host] if shares else 0.0
        for second in range(31):
            hosts[host].hear(
                place._replace(data=5 + share * second),
                at - 30 + second,
                silent[host] if silent else 0.0,
            )
    return hosts


STEPS = Place("steps", 9, 5, 0.1)


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        (heard(STEPS, STEPS), None),
        (heard(STEPS), None),
        (heard(STEPS, shares=[0.9]), None),
        (
            heard(
                STEPS,
                STEPS,
                STEPS,
                shares=[0.02, 0.31, 0.02],
            ),
            (1, "31 % of its time it waits for data, the others 2 %"),
        ),
        (heard(STEPS, STEPS, shares=[0.4, 0.3]), None),
        (heard(STEPS, STEPS, shares=[0.001, 0.01]), None),
        # one goes on
        (heard(STEPS, STEPS._replace(age=9.0), Place("data", 8, 5, 7.0)), None),
        (
            heard(
                STEPS._replace(age=9.0),
                STEPS._replace(age=9.0),
                Place("data", 8, 5, 7.0),
            ),
            (2, "in data at step 8 for 7 s, and the others wait for it"),
        ),
        (heard(STEPS, STEPS, silent=[12.0, 0.2]), (0, "silent for 12 s")),
    ],
)
def test_which_host_is_the_slowest_and_why(hosts, expected):
    found = slowest(hosts, 100.0)
    assert (found and (found["host"], found["why"])) == expected


def test_the_share_is_of_the_last_minute_and_of_one_worker():
    host = HostRecord("running")
    host.hear(STEPS, 0.0, 0.0)
    assert host.data_share is None
    for second in range(1, 200):
        host.hear(
            STEPS._replace(data=min(second, 100.0)),
            float(second),
            0.0,
        )
    assert host.data_share == pytest.approx(1 / 60, abs=0.02)
    assert len(host.recent) <= 62
    host.hear(STEPS, 200.0, 0.0)
    assert host.data_share is None, "another worker began"


def test_the_record_tells_of_each_host_for_how_long_it_was_the_slowest(tmp_path):
    record = Record(
        state="running",
        hosts=heard(
            STEPS,
            STEPS,
            shares=[0.0, 0.5],
            at=time.monotonic(),
        ),
    )
    now = time.monotonic()
    for second in range(5):
        record.write(tmp_path, now + second)
    told = json.loads((tmp_path / "hosts.json").read_text())
    assert told["slowest"]["host"] == 1
    assert told["hosts"]["0"]["seconds_slowest"] == 0
    assert 4 <= told["hosts"]["1"]["seconds_slowest"] <= 6
    assert told["hosts"]["1"]["seconds"] == {
        "data": 20.0,
        "steps": 0.0,
        "evaluation": 0.0,
        "save": 0.0,
    }
    assert told["hosts"]["1"]["data_share"] == 0.5


def test_the_table_for_a_terminal():
    lines = stragglers.text(
        HOSTS, {"host": 1, "why": "70 % of its time it waits for data, the others 2 %"}
    ).splitlines()
    assert len(lines) == 5
    assert lines[0].split()[:4] == ["host", "state", "phase", "for"]
    assert "slowest for" in lines[0]
    assert re.match(
        r"1 b\s+running  data\s+3.00 s  11\s+7.00 s \(70 % lately\)", lines[2]
    )
    assert lines[2].endswith("42.0 s       2.00 GiB, 8.00 GiB on a device")
    assert lines[3].split() == ["2", "missing", "0", "s"]
    assert (
        lines[4]
        == "slowest: host 1, 70 % of its time it waits for data, the others 2 %"
    )
    assert stragglers.text(HOSTS).endswith(
        "no host stands out now; host 1 did for 42.0 s"
    )
    assert stragglers.text({}) == ""


def test_the_report_has_the_hosts_of_this_start_alone(restarted):
    fault = Fault(
        1,
        "SIGKILL",
        "was ended by <SIGKILL>, last seen",
        Place("data", 5),
    )
    supervised(
        restarted,
        "over",
        exit_code=0,
        hosts=HOSTS,
        recoveries=[{"what": str(fault), "seconds_to_stepped": 7.5}],
    )
    page = write_report(restarted).read_text()
    assert "<h2>Hosts</h2>" in page
    assert (
        "host 1 was ended by &lt;SIGKILL&gt;, last seen in data at step 5; 7.50 s until"
        in page
    )
    assert "No host stands out now; host 1 did for 42.0 s" in page
    assert "7.00 s (70 % lately)" in page
    supervised(
        restarted,
        "over",
        age=time.time() - NOW - 1,
        hosts=HOSTS,
    )
    assert "<h2>Hosts</h2>" not in write_report(restarted).read_text()
    (restarted / "hosts.json").unlink()
    assert "<h2>Hosts</h2>" not in write_report(restarted).read_text()
