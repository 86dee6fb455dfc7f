"""Which host it was, which limit holds, and whether to try again: without processes."""

import argparse
import json
import math
import sys

import pytest

from lepton_jax.errors import SettingError
from lepton_jax.launch.cluster import Cluster
from lepton_jax.launch.supervise import rules, verdict
from lepton_jax.launch.supervise.head import Head, committed
from lepton_jax.launch.supervise.rules import (
    DEFAULTS,
    HostsError,
    Limits,
    Rules,
    nested,
)
from lepton_jax.launch.supervise.verdict import Budget, Fault, Place


def died(code, host=0, place=None, error=None):
    return verdict.died(host, code, place or Place("steps", 7), error)


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ({0: ("steps", 9, 5), 1: ("data", 8, 5)}, [1]),  # has handed over less
        # has handed over as much, and knows less of it done
        ({0: ("steps", 8, 8), 1: ("steps", 8, 5)}, [1]),
        # the others wait in the step after
        ({0: ("steps", 8, 8), 1: ("save", 8, 8), 2: ("steps", 8, 8)}, [1]),
        ({0: ("steps", 1, 0), 1: ("restore", 0, 0)}, [1]),
        # the others wait for what it says
        ({0: ("agreement", 0, 0), 1: ("compile", 0, 0), 2: ("agreement", 0, 0)}, [1]),
        ({0: ("compile", 0, 0), 1: ("start", 0, 0), 2: ("compile", 0, 0)}, [1]),
        ({0: ("steps", 8, 8), 1: ("steps", 8, 8)}, [0, 1]),
    ],
)
def test_who_is_behind(places, expected):
    assert (
        verdict.behind({host: Place(*place) for host, place in places.items()})
        == expected
    )


def test_only_who_is_behind_is_measured_by_its_limit():
    waits = Place("steps", 9, 5, age=100.0, limit=10.0)
    works = Place("save", 5, 5, age=100.0, limit=500.0)
    assert verdict.over({0: waits, 1: works}, {0}) == []
    assert verdict.over({0: waits, 1: works._replace(age=800.0)}, set()) == [1]
    assert verdict.over({0: waits, 1: works}, {1}) == [1], "by its supervisor's word"
    assert verdict.over({0: waits._replace(phase="pause", limit=math.inf)}, set()) == []


def test_of_hosts_that_are_level_the_one_that_stands_elsewhere():
    waits = ("b.py:1 in wait", "a.py:1 in step")
    stands = ("c.py:1 in read", "a.py:1 in step")
    assert verdict.odd({0: waits, 1: stands, 2: waits}) == 1
    assert verdict.odd({0: waits, 1: stands}) is None
    assert verdict.odd({0: waits, 1: waits, 2: waits}) is None
    assert verdict.odd({0: waits, 1: stands, 2: waits, 3: stands}) is None

    inside = (
        "/venv/lib/site-packages/jax/_src/api.py:1 in block_until_ready",
        "a.py:1 in step",
    )
    assert verdict.odd({0: inside, 1: waits}) == 1
    assert verdict.odd({0: inside, 1: inside}) is None
    assert verdict.odd({0: inside, 1: waits, 2: stands}) is None

    places = {host: Place("save", 8, 8, 70.0, 60.0) for host in range(3)}
    fault = verdict.stuck(places, [0, 1, 2], {0: waits, 1: stands, 2: waits})
    assert fault.host == 1
    assert "c.py:1 in read" in fault.story()
    assert "none is behind the others" in str(verdict.stuck(places, [0, 1, 2], {}))


def test_the_root_of_several_faults():
    aborted = died(-6)
    failed = died(1, 1)
    killed = died(-9, 2)
    mistake = died(2, 3, error={"what": "x"})
    lost = Fault(4, "lost", "is lost", Place())
    assert verdict.root([aborted, failed, killed]) is killed
    assert verdict.root([failed, mistake, aborted]) is mistake
    assert verdict.root([mistake, lost]) is lost
    assert verdict.root([failed, died(1, 5)]) is failed, "the first of equals"


def test_jaxs_coordinator_takes_the_others_with_it():
    first = died(-6, 2)
    its = died(-6, 0)
    failed = died(1, 1)
    assert verdict.root([first, its], at_once=2, coordinator=0) is its
    assert verdict.root([first, its], at_once=1, coordinator=0) is first, (
        "it died of the others, later"
    )
    assert verdict.root([first, its, failed], at_once=3, coordinator=0) is failed
    assert verdict.root([first, died(-6, 1)], at_once=2, coordinator=0) is first


def test_the_stack_of_the_main_thread():
    text = (
        'Thread 0x01 (most recent call first):\n  File "/x/watchdog.py", line 9 in'
        ' run\n\nCurrent thread 0x02 [python] (most recent call first):\n  File "/x/a'
        ' b.py", line 3 in inner\n  File "<string>", line 1 in <module>\n'
    )
    assert verdict.frames(text) == ("/x/a b.py:3 in inner", "<string>:1 in <module>")

    library = f"{sys.prefix}/lib/python3.11/site-packages/jax/x.py:5 in wait"
    ours = f"{verdict.__file__}:5 in died"
    user = f"{__file__}:7 in f"
    assert verdict.innermost([library, ours, user]) == user
    assert verdict.innermost([library, ours]) == ours
    assert verdict.innermost([library]) == library
    assert verdict.innermost([]) is None
    assert verdict.shown([library] * 20 + [user])[-1].startswith(user)


def test_pauses_double_and_end_at_a_minute():
    budget = Budget(20, 1.0)
    pauses = [budget.charge(died(code), None, 0.0) for code in (1, 3, 1, 3, 1, 3, 1, 3)]
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]


def test_a_checkpoint_and_a_day_make_the_budget_whole():
    budget = Budget(2, 1.0)
    assert [budget.charge(died(1), 5, 0.0), budget.charge(died(3), 5, 1.0)] == [1, 2]
    assert budget.charge(died(1), 6, 2.0) == 1
    assert budget.left == 1
    budget.charge(died(3), 6, 3.0)
    with pytest.raises(HostsError, match="the 2 restarts of --restarts are used up"):
        budget.charge(died(4), 6, 4.0)
    assert budget.charge(died(4), 6, 5.0 + verdict.DAY) == 1


def test_what_repeats_is_told_from_what_does_not():
    budget = Budget(10, 1.0)
    for code in (1, 3, 1, 1):  # not three times in a row
        budget.charge(died(code), None, 0.0)
    with pytest.raises(
        HostsError,
        match="for the third time, and with no checkpoint: it is not tried again",
    ) as caught:
        budget.charge(died(1), None, 0.0)
    assert caught.value.exit_code == 2

    other = Budget(10, 1.0)
    for saved in (1, 2, 3, 4):
        other.charge(died(1), saved, 0.0)


def test_limits_nest():
    for limit in (1.0, 60.0, 3600.0):
        assert limit < nested(limit, 1) < nested(limit, 2) < 1.2 * limit + 3
    assert nested(math.inf, 1) == math.inf


def test_the_limit_of_a_step_follows_the_longest_one():
    limits = Limits({})
    assert limits.of("steps") == rules.UNKNOWN
    assert limits.of("save") == DEFAULTS["save"]

    for seconds in (200.0, 0.1, 0.1):
        limits.saw(seconds)
    assert limits.of("steps") == 2000.0

    quick = Limits({})
    for _ in range(3):
        quick.saw(0.01)
    assert quick.of("steps") == DEFAULTS["steps"]

    given = Limits({"steps": 5.0})
    given.saw(100.0)
    assert given.of("steps") == 5.0


def options(*arguments):
    parser = argparse.ArgumentParser(exit_on_error=False)
    rules.add_options(parser)
    return parser.parse_args(arguments)


def test_options():
    assert rules.read(options()) == Rules()

    found = rules.read(
        options(
            "--limit",
            "steps=5",
            "--limit",
            "pause=0",
            "--restarts",
            "0",
            "--grace",
            "2.5",
            "--least-hosts",
            "3",
        )
    )
    assert found == Rules({"steps": 5.0, "pause": math.inf}, 0, 2.5, 3)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--limit", "step=5"], "did you mean 'steps'"),
        (["--limit", "steps"], "no number of seconds"),
        (["--limit", "steps=-1"], "no number of seconds"),
        (["--limit", "steps=nan"], "no number of seconds"),
        (["--least-hosts", "0"], "--least-hosts is 0"),
    ],
)
def test_wrong_options(arguments, what):
    with pytest.raises(SettingError, match=what):
        rules.read(options(*arguments))


def test_more_hosts_must_be_left_than_there_are():
    with pytest.raises(SettingError, match="--least-hosts is 3, and there are 2"):
        Head(Cluster("local", "a test", hosts=2), Rules(least_hosts=3), {})


def test_what_is_committed(tmp_path):
    assert committed(tmp_path) is None
    assert committed(None) is None
    for name in ("5", "40", "60.orbax-checkpoint-tmp-1", "set_aside"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert committed(tmp_path) == 40


def test_a_record_is_plain_data():
    head = Head(Cluster("local", "a test", hosts=2), Rules(), {})
    head.gate.close(0, None)
    found = json.loads(json.dumps(head.record.to_json(), allow_nan=False))
    assert found["hosts"]["1"]["state"] == "missing"
    assert found["restarts_left"] == 10
