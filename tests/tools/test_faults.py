"""Twenty of the campaign's faults on two hosts, several to a run: it ends as if nothing had been, or with the reason.

Six of them run with the rest of the tests, all with `pytest -m "slow or not slow"`.
"""

import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))
import faults

FAST = {"silence": 5, "steps": 5, "data": 5, "evaluation": 5, "save": 5}


def stages(*each):
    names = ("generation", "kind", "host", "phase", "step")
    return tuple(dict(zip(names, one[:5], strict=True)) | dict(one[5:]) for one in each)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    return folder, faults.reference(folder, 2, 1)


def trial(undisturbed, name, promise, *each, says=""):
    folder, expected = undisturbed
    found = faults.Trial(folder / name, 2, 1, faults.Fault(name, promise, stages(*each), says=says))
    row = found.run(expected)
    log = (folder / name / "log.txt").read_text(errors="replace")
    assert row["kept"], f"{row['wrong']}\n{log}"
    assert len(found.fired) == len(each), log
    return found, log


def test_hosts_that_die_one_after_the_other(undisturbed):
    found, _ = trial(undisturbed, "die", "recovered", (1, "kill", 1, "data", 12), (2, "kill", 0, "save", 20),
                     (3, "abort", 1, "steps", 33), (4, "exit", 0, "evaluation", 40), (5, "raise", 1, "data", 52))
    assert found.restarts == [(1, "SIGKILL"), (0, "SIGKILL"), (1, "SIGABRT"), (0, "exit code 3"), (1, "exit code 1")]


@pytest.mark.slow
def test_hosts_that_hang_one_after_the_other(undisturbed, monkeypatch):
    monkeypatch.setattr(faults, "LIMITS", faults.LIMITS | FAST)
    found, log = trial(undisturbed, "hang", "recovered", (1, "stop", 1, "steps", 12), (2, "stall", 0, "data", 22),
                       (3, "freeze", 1, "steps", 33), (4, "stall", 0, "evaluation", 40), (5, "stop", 1, "save", 50))
    assert [host for host, _ in found.restarts] == [1, 0, 1, 0, 1]
    assert [cause for _, cause in found.restarts] == ["silent", "stuck", "silent", "stuck", "silent"]
    assert "do_stall" in log  # the stack of the one that slept


@pytest.mark.slow
def test_checkpoints_are_damaged_and_hosts_die_while_they_come_back(undisturbed):
    trial(undisturbed, "damage", "recovered", (1, "kill", 1, "steps", 35), (2, "damage", 0, "plan", 0, ("how", "bit")),
          (2, "kill", 1, "restore", 0), (3, "damage", 0, "plan", 0, ("how", "delete")), (3, "kill", 0, "compile", 0),
          (4, "kill", 1, "shutdown", 60))


@pytest.mark.parametrize(("name", "stage", "says"), [
    ("full disk", (1, "disk", 1, "save", 20), r"host 1: .*can't be written.*(File too large|OUT_OF_RANGE)"),
    pytest.param("unreadable data", (1, "no-data", 1, "reading", 15), "host 1: .*a shard of the data can't be read",
                 marks=pytest.mark.slow),
    pytest.param("corrupted data", (1, "bad-data", 1, "reading", 25), r"the loss of step \d+ is nan", marks=pytest.mark.slow),
])
def test_what_a_person_must_mend_ends_the_run_with_the_reason(undisturbed, name, stage, says):
    _, log = trial(undisturbed, name, "ended, then goes on", stage, says=says)
    assert "remedy:" in log and "Traceback" not in log


@pytest.mark.slow
def test_the_same_fault_is_not_tried_for_ever(undisturbed):
    stage = (1, "raise", 1, "steps", 15, ("always", True))
    found, log = trial(undisturbed, "repeated", "given up", stage)
    assert 2 <= len(found.restarts) <= 4 and "a fault of the program's own" in log


def test_the_campaign_is_drawn_from_the_seed():
    drawn = [faults.draw(3, number, 4) for number in range(40)]
    assert drawn == [faults.draw(3, number, 4) for number in range(40)]
    assert drawn != [faults.draw(4, number, 4) for number in range(40)]
    assert {one.promise for one in drawn} <= faults.PROMISES.keys()
    every = faults.kinds(4)
    assert len({one.name.split()[0] for one in drawn}) >= 12 and len(every) > 20
    for kind in every.values():
        for seed in range(20):
            one = kind(random.Random(seed))
            json.dumps(one.stages)
            assert replace(one, name="x").promise in faults.PROMISES and all(stage["host"] < 4 for stage in one.stages)
