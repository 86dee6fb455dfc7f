"""Twenty-one of the campaign's faults on two hosts, several to a run.

A run ends as if nothing had happened, or with the reason. Lost networks are among them.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tools.faults import campaign, network, trial
from tools.faults.kinds import Fault, draw, kinds
from tools.faults.promises import PROMISES

FAST = {
    "silence": 5,
    "compile": 10,
    "steps": 5,
    "data": 5,
    "evaluation": 5,
    "save": 5,
}


def stages(*each):
    names = ("generation", "kind", "host", "phase", "step")
    return tuple(dict(zip(names, one[:5], strict=True)) | dict(one[5:]) for one in each)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    return folder, trial.reference(folder, 2, 1)


def try_fault(
    undisturbed,
    name,
    promise,
    *each,
    says="",
    **more,
):
    folder, expected = undisturbed
    tried = trial.Trial(
        folder / name,
        2,
        1,
        Fault(
            name,
            promise,
            stages(*each),
            says=says,
            **more,
        ),
    )
    row = tried.run(expected)
    log = (folder / name / "log.txt").read_text(errors="replace")
    assert row["kept"], f"{row['wrong']}\n{log}"
    assert len(tried.fired) == len(each), log
    return tried, log


@pytest.mark.slow
def test_hosts_that_die_one_after_the_other(undisturbed):
    tried, _ = try_fault(
        undisturbed,
        "die",
        "recovered",
        (1, "kill", 1, "data", 12),
        (2, "kill", 0, "save", 20),
        (3, "kill", 1, "compile", 0),
        (4, "abort", 1, "steps", 33),
        (5, "exit", 0, "evaluation", 40),
        (6, "kill", 0, "plan", 0),
        (7, "raise", 1, "data", 52),
    )
    assert tried.restarts == [
        (1, "SIGKILL"),
        (0, "SIGKILL"),
        (1, "SIGKILL"),
        (1, "SIGABRT"),
        (0, "exit code 3"),
        (0, "SIGKILL"),
        (1, "exit code 1"),
    ]


@pytest.mark.slow
def test_hosts_that_hang_one_after_the_other(undisturbed, monkeypatch):
    monkeypatch.setattr(trial, "LIMITS", trial.LIMITS | FAST)
    tried, log = try_fault(
        undisturbed,
        "hang",
        "recovered",
        (1, "stop", 1, "save", 10),
        (2, "stall", 0, "data", 22),
        (3, "freeze", 1, "steps", 33),
        (4, "stall", 1, "compile", 30),
    )
    assert tried.restarts == [(1, "silent"), (0, "stuck"), (1, "silent"), (1, "stuck")]
    assert "do_stall" in log  # the stack of the one that slept


@pytest.mark.slow
def test_checkpoints_are_damaged_and_hosts_die_while_they_come_back(undisturbed):
    try_fault(
        undisturbed,
        "damage",
        "recovered",
        (1, "kill", 1, "steps", 35),
        (
            2,
            "damage",
            0,
            "plan",
            0,
            ("how", "bit"),
        ),
        (2, "kill", 1, "restore", 0),
        (
            3,
            "damage",
            0,
            "plan",
            0,
            ("how", "delete"),
        ),
        (3, "kill", 0, "compile", 0),
        (4, "kill", 1, "shutdown", 60),
    )


@pytest.mark.parametrize(
    ("name", "stage", "says"),
    [
        (
            "full disk",
            (1, "disk", 1, "save", 20),  # whichever host says it first
            (
                r"(host 1: .*can't be written|can't be written.*host 1: ).*(File too"
                r" large|OUT_OF_RANGE)"
            ),
        ),
        pytest.param(
            "unreadable data",
            (1, "no-data", 1, "reading", 15),
            "host 1: .*a shard of the data can't be read",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "corrupted data",
            (1, "bad-data", 1, "reading", 25),
            r"the loss of step \d+ is nan",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_a_person_must_fix_ends_the_run_with_the_reason(
    undisturbed, name, stage, says
):
    _, log = try_fault(
        undisturbed,
        name,
        "ended, then goes on",
        stage,
        says=says,
    )
    assert "remedy:" in log
    assert "Traceback" not in log


def test_the_same_fault_is_not_tried_for_ever(undisturbed):
    stage = (
        1,
        "raise",
        1,
        "steps",
        15,
        ("always", True),
    )
    tried, log = try_fault(undisturbed, "repeated", "given up", stage)
    assert 2 <= len(tried.restarts) <= 4
    assert "a fault of the program's own" in log


# ---- networks of their own ----


@pytest.fixture
def permitted():
    if why := network.forbidden():
        pytest.skip(f"no network namespaces here: {why}")


DIAL = "import socket, sys; socket.create_connection((sys.argv[1], 9), timeout=0.5)"


@pytest.mark.parametrize("how", network.WAYS)
def test_a_link_that_is_cut_loses_packets_without_a_word(tmp_path, permitted, how):
    cables = network.Network(tmp_path, 2)

    def dial():
        command = cables.inside(
            0,
            [
                sys.executable,
                "-c",
                DIAL,
                "host1",
            ],
        )
        return subprocess.run(
            command, capture_output=True, text=True, timeout=20
        ).stderr

    try:
        assert "Connection refused" in dial(), "there is an answer"
        cables.tell("cut", 1, how)
        assert "timed out" in dial()
        cables.tell("mend", 1, how)
        assert "Connection refused" in dial()
    finally:
        cables.close()


def test_nothing_of_a_network_is_left_when_its_campaign_is_killed(tmp_path, permitted):
    script = (
        "import subprocess, sys, time, pathlib; from tools.faults import network; n ="
        " network.Network(pathlib.Path(sys.argv[1]), 2);p ="
        " subprocess.Popen(n.inside(1, ['sleep', '600'])); print(n._process.pid,"
        " *n.holders, p.pid, flush=True);time.sleep(600)"
    )
    environment = os.environ | {"PYTHONPATH": str(trial.ROOT)}
    campaign = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    pids = campaign.stdout.readline().split()
    campaign.send_signal(signal.SIGKILL)
    campaign.communicate()
    until = time.monotonic() + 10
    assert len(pids) == 4
    while left := [
        pid
        for pid in pids
        if (status := Path("/proc", pid, "stat")).exists()
        and ") Z " not in status.read_text()
    ]:
        assert time.monotonic() < until, left
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("host", "seconds"), [(1, 2.0), (0, 20.0)])
def test_the_network_comes_back(undisturbed, permitted, host, seconds):
    says = "" if seconds < 10 else f"host {host} is lost: no word from it for 10 s"
    tried, _ = try_fault(
        undisturbed,
        f"away {seconds}",
        "recovered",
        (
            1,
            "network",
            host,
            "steps",
            12,
            ("seconds", seconds),
            ("how", "silent"),
        ),
        says=says,
        apart=True,
        network=True,
    )
    assert seconds < 10 or tried.restarts[0][1] == "lost"


@pytest.mark.slow
def test_a_host_that_is_cut_off_for_good_ends_and_the_other_goes_on(
    undisturbed, permitted
):
    says = (
        r"(?s)(?=.*going on without host 1)(?=.*host 0 is lost: [^\n]*could not be met"
        r" again)"
    )
    try_fault(
        undisturbed,
        "cut off",
        "went on with what is left",
        (
            1,
            "network",
            1,
            "save",
            20,
            ("seconds", None),
            ("how", "unplugged"),
        ),
        says=says,
        apart=True,
        network=True,
        options=network.without(2),
    )


def test_where_networks_are_not_permitted_their_trials_are_skipped(
    undisturbed, monkeypatch, capsys
):
    monkeypatch.setattr(network, "forbidden", lambda: "not permitted")
    code = campaign.main(
        [
            "--only",
            "network",
            "network lost",
            "--count",
            "2",
            "--hosts",
            "2",
            "--devices",
            "1",
            "--folder",
            str(undisturbed[0]),
        ]
    )
    said = capsys.readouterr().out
    assert code == 0
    assert said.count("skipped: ") == 2
    assert "0 of 0 as promised" in said


def test_the_campaign_is_drawn_from_the_seed():
    drawn = [draw(3, number, 4) for number in range(40)]
    assert drawn == [draw(3, number, 4) for number in range(40)]
    assert drawn != [draw(4, number, 4) for number in range(40)]
    assert {one.promise for one in drawn} <= PROMISES.keys()
    every = kinds(4)
    assert len({one.name.split()[0] for one in drawn}) >= 12 and len(every) > 20
    for kind in every.values():
        for seed in range(20):
            one = kind(random.Random(seed))
            json.dumps(one.stages)
            assert replace(one, name="x").promise in PROMISES and all(
                stage["host"] < 4 for stage in one.stages
            )
