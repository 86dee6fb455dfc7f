"""Supervisors, their head and the watchdog, with real processes and signals.

The workers (dummy.py) need no JAX. Most of the time is waiting for limits and graces,
so the runs of PLANS go on next to the other tests, three at once.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from watched import QUICK, Watched

from lepton_jax.launch.supervise import watchdog

HERE = Path(__file__).resolve().parent


def fault(host, phase, do, step=5, generation=1):
    return {"host": host, "phase": phase, "do": do, "step": step} | (
        {"generation": generation} if generation else {}
    )


class Failure(NamedTuple):
    """A worker that fails, and what follows.

    Args:
      host: number of the host.
      phase: where it fails.
      do: how it fails, see dummy.py.
      step: at which step.
      told: end of the sentence that names the host.
      resumed: the step from which the next generation goes on.
    """

    host: int
    phase: str
    do: str
    step: int
    told: str
    resumed: int


FAULTS = {
    "killed": Failure(
        0,
        "data",
        "kill",
        step=5,
        told="was ended by SIGKILL, last seen in data at step 5",
        resumed=4,
    ),
    "exit in save": Failure(
        1,
        "save",
        "exit 3",
        step=8,
        told="ended with exit code 3, last seen in save at step 8",
        resumed=4,
    ),
    "exit in compile": Failure(
        2,
        "compile",
        "exit 1",
        step=0,
        told="ended with exit code 1, last seen in compile at step 0",
        resumed=0,
    ),
    "killed at the start": Failure(
        1,
        "start",
        "kill",
        step=0,
        told="was ended by SIGKILL, last seen in start at step 0",
        resumed=0,
    ),
    "stuck in data": Failure(
        2,
        "data",
        "hang",
        step=5,
        told="while the others wait in steps at step 6; it is in data at step 5",
        resumed=4,
    ),
    "stuck and deaf in save": Failure(
        0,
        "save",
        "deaf",
        step=8,
        told="while the others wait in save at step 8; it is in save at step 8",
        resumed=4,
    ),
    "stuck before a collective": Failure(
        1,
        "steps",
        "hang",
        step=5,
        told="the others wait in steps at step 6; it is in steps at step 5",
        resumed=4,
    ),
    "stuck in restore": Failure(
        0,
        "restore",
        "hang",
        step=0,
        told="it is in restore at step 0",
        resumed=0,
    ),
    "frozen": Failure(
        1,
        "data",
        "freeze",
        step=5,
        told=(
            "(limit 1.5 s): the process is stopped; it was last seen in data at step 5"
        ),
        resumed=4,
    ),
    "holds the interpreter": Failure(
        2,
        "data",
        "hold",
        step=5,
        told="no thread of it gets to run Python; it was last seen in data",
        resumed=4,
    ),
}
ENDS = {
    "well": ({}, {}),
    "mistake of host 0": ({"faults": [fault(0, "restore", "mistake", 0)]}, {}),
    "mistake of host 1": ({"faults": [fault(1, "restore", "mistake", 0)]}, {}),
    "repeated": ({"faults": [fault(1, "data", "exit 3", 5, None)]}, {}),
    "forgiven": (
        {
            "faults": [
                fault(0, "data", "exit 3", 5, 1),
                fault(0, "data", "exit 3", 9, 2),
            ]
        },
        {"restarts": 1},
    ),
    "used up": (
        {
            "faults": [
                fault(0, "data", "exit 3", 5, 1),
                fault(0, "data", "exit 4", 6, 2),
            ]
        },
        {"restarts": 1},
    ),
    "no restarts": ({"faults": [fault(1, "data", "hang")]}, {"restarts": 0}),
    "all follow one": (
        {
            "faults": [
                fault(2, "data", "kill"),
                fault(0, "data", "exit 1"),
                fault(1, "data", "exit 1"),
            ]
        },
        {},
    ),
}
PLANS = {
    name: ({"faults": [fault(*failure[:4])]}, {}) for name, failure in FAULTS.items()
} | ENDS


@pytest.fixture(autouse=True, scope="module")
def runs(tmp_path_factory, forkserver):
    """Begin the runs of all PLANS.

    Returns a function from a name to the run's result, its output and its folder.
    """
    # made by who asks first, which no two threads may be
    tmp_path_factory.getbasetemp()
    with ThreadPoolExecutor(3) as pool:

        def run(name):
            plan, rules = PLANS[name]
            folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
            return (*Watched(folder, plan=plan, rules=rules).done(), folder)

        futures = {name: pool.submit(run, name) for name in PLANS}
        yield lambda name: futures[name].result()
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def forkserver():
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(HERE), str(HERE.parents[1]), before])
    )
    # which it finds by PYTHONPATH alone
    multiprocessing.set_forkserver_preload(["watched"])
    yield
    (
        os.environ.pop("PYTHONPATH")
        if before is None
        else os.environ.update(PYTHONPATH=before)
    )
    for each in Watched.started:
        each.process.kill()
        each.process.join()


def status(folder):
    return json.loads((folder / "hosts.json").read_text())


def text(path, limit=20.0):
    until = time.monotonic() + limit
    while not path.exists():
        assert time.monotonic() < until, path
        time.sleep(0.02)
    return path.read_text()


def worker(folder, generation, host):
    """Wait for a worker, and return what it was told."""
    return json.loads(text(folder / f"worker-{generation}-{host}"))


def reached(folder, step, generation=1, host=0):
    until = time.monotonic() + 20
    while int(text(folder / f"reached-{generation}-{host}")) < step:
        assert time.monotonic() < until
        time.sleep(0.02)


def deaf(folder, host):
    """Wait until this worker no longer hears SIGTERM, or all save and end at once."""
    until = time.monotonic() + 20
    while not (folder / f"deaf-{host}").exists():
        assert time.monotonic() < until
        time.sleep(0.02)


def gone(*pids, limit=5.0):
    """Wait until none of these processes runs."""
    until = time.monotonic() + limit
    alive = set(pids)
    while alive:
        assert time.monotonic() < until, "a worker outlives its supervisor"
        for pid in sorted(alive):
            state = "X"
            with contextlib.suppress(OSError):
                state = (
                    Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
                )
            if state in "ZX":
                alive.discard(pid)
        time.sleep(0.02)


def heard(watched, words, limit=20.0):
    until = time.monotonic() + limit
    while words not in watched.said():
        assert time.monotonic() < until, watched.said()
        time.sleep(0.02)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


FINISHED = {"status": "finished", "exit_code": 0}


def test_one_host_alone_is_restarted(tmp_path):
    result, out, _ = Watched(
        tmp_path,
        hosts=1,
        rules={"restarts": 2},
        plan={"faults": [fault(0, "data", "kill")]},
    ).done()
    assert result == FINISHED
    assert out == "done 12\n"
    assert worker(tmp_path, 2, 0)["coordinator"] is None


def test_a_worker_that_cannot_be_started(tmp_path):
    result = Watched(tmp_path, hosts=2, command=[str(tmp_path / "nothing")]).done()[0]
    assert "can't be started" in result["what"]
    assert result["exit_code"] == 2


ENDLESS = {"until": 10**6, "every": 10**6}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends_all(tmp_path, number):
    run = Watched(tmp_path, plan=ENDLESS)
    reached(tmp_path, 3)
    run.signal(number)
    time.sleep(0.1)
    with contextlib.suppress(ProcessLookupError):  # it may have ended by now
        run.signal(number)  # to the process and to its group, as a terminal does

    result, out, err = run.done()
    assert result == {"status": "interrupted", "exit_code": 130}
    assert out == "asked 1\n"
    assert sorted(err.splitlines()) == ["[host 1] asked 1", "[host 2] asked 1"]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


def test_a_second_signal_ends_at_once(tmp_path):
    run = Watched(
        tmp_path,
        plan={**ENDLESS, "faults": [fault(1, "data", "deaf", 3)]},
        rules={"limits": {"stop": 60.0}},
    )
    deaf(tmp_path, host=1)
    run.signal(signal.SIGTERM)
    time.sleep(0.8)
    assert run.process.is_alive(), "it waits for the save"

    began = time.monotonic()
    run.signal(signal.SIGTERM)
    assert run.done()[0]["exit_code"] == 130, "not after the limit of 60 s"
    assert time.monotonic() - began < 10, "not after the limit of 60 s"

    gone(*(worker(tmp_path, 1, host)["pid"] for host in range(3)), limit=1.0)


def test_who_does_not_stop_is_ended_after_the_limit(tmp_path):
    run = Watched(
        tmp_path,
        hosts=2,
        plan={**ENDLESS, "faults": [fault(1, "data", "deaf", 3)]},
        rules={"limits": {"stop": 1.0, "silence": 60.0}},
    )
    deaf(tmp_path, host=1)
    run.signal(signal.SIGINT)
    result, _, err = run.done()
    assert result["exit_code"] == 130
    assert "ended without a save: " in err
    assert "host 1 in data at step 3" in err


def test_who_was_asked_to_stop_before_it_could_agree_takes_the_others_along(tmp_path):
    plan = {
        **ENDLESS,
        "faults": [
            fault(1, "data", f"exit {watchdog.EARLY}", 3),
            fault(0, "data", "deaf", 3),
        ],
    }
    run = Watched(
        tmp_path,
        plan=plan,
        rules={"limits": {"stop": 60.0, "data": 60.0, "silence": 60.0}},
    )
    result, _, err = run.done()
    assert result == {"status": "interrupted", "exit_code": 130}
    assert "ended without a save: " in err
    assert "restart" not in err


def test_workers_end_with_their_supervisor_even_if_it_is_killed(tmp_path):
    run = Watched(
        tmp_path,
        plan={**ENDLESS, "faults": [fault(1, "data", "freeze", 3)]},
        rules={"limits": {}},
    )
    reached(tmp_path, 3, host=1)
    time.sleep(1.0)
    run.process.kill()
    gone(*(worker(tmp_path, 1, host)["pid"] for host in range(3)))


# ---- hosts whose supervisors are processes of their own ----


def start(folder, ids, port, hosts=3, **more):
    return [Watched(folder, hosts=hosts, host=host, port=port, **more) for host in ids]


def test_a_supervisor_that_is_killed_and_comes_back(tmp_path):
    port = free_port()
    runs = start(tmp_path, [2, 0, 1], port, plan={"until": 400})
    reached(tmp_path, 5)
    old = worker(tmp_path, 1, 2)["pid"]
    runs[0].process.kill()
    gone(old)
    heard(runs[1], "host 2 is lost: the connection was closed")
    runs[0] = start(tmp_path, [2], port, plan={"until": 400})[0]
    assert worker(tmp_path, 2, 2)["hosts"] == 3

    reached(tmp_path, 5, generation=2)
    for each in runs:
        each.process.terminate()
    assert [each.done()[0]["exit_code"] for each in runs] == [130] * 3
    assert runs[1].said().count("hosts: host 2 is lost") == 1


def test_a_supervisor_that_is_silent_is_told_apart(tmp_path):
    runs = start(
        tmp_path, [0, 1], free_port(), hosts=2, plan=ENDLESS, rules={"restarts": 0}
    )
    reached(tmp_path, 3)
    runs[1].signal(signal.SIGSTOP)
    result = runs[0].done()[0]
    assert "host 1 is lost: no word from its supervisor for 2.5 s" in result["what"]
    assert result["exit_code"] == 1
    runs[1].signal(signal.SIGCONT)
    runs[1].process.kill()


def test_a_host_that_hears_of_nobody_else_is_named_itself(tmp_path):
    runs = start(tmp_path, [0, 1, 2], free_port(), plan=ENDLESS, rules={"restarts": 0})
    reached(tmp_path, 3)
    for each in runs[1:]:
        each.signal(signal.SIGSTOP)
    result = runs[0].done()[0]
    assert (
        "host 0 has lost all others at once: no word from hosts 1, 2 for 2.5 s"
        in result["what"]
    )
    assert result["exit_code"] == 1

    for each in runs[1:]:
        each.process.kill()


def test_a_head_that_falls_silent_is_named_and_met_again(tmp_path):
    runs = start(tmp_path, [0, 1], free_port(), hosts=2, plan=ENDLESS)
    reached(tmp_path, 3)
    runs[0].signal(signal.SIGSTOP)
    heard(
        runs[1],
        "hosts: host 0 is lost: no word from it for 2.5 s; host 1 ends its training"
        " process",
    )
    runs[0].signal(signal.SIGCONT)
    reached(tmp_path, 3, generation=2)
    runs[0].signal(signal.SIGTERM)
    assert [each.done()[0]["exit_code"] for each in runs] == [130] * 2


def test_a_signal_to_any_supervisor_stops_all(tmp_path):
    runs = start(tmp_path, [0, 1, 2], free_port(), plan=ENDLESS)
    reached(tmp_path, 3)
    runs[2].signal(signal.SIGTERM)
    assert [each.done()[0]["exit_code"] for each in runs] == [130] * 3
    assert [each.said("out") for each in runs] == ["asked 1\n"] * 3


def test_going_on_with_what_is_left_and_taking_in_who_comes_back(tmp_path):
    port = free_port()
    rules = {"least_hosts": 2, "grace": 0.5}
    plan = {"until": 2000, "every": 50, "seconds": 0.01}
    runs = start(tmp_path, [0, 1, 2], port, plan=plan, rules=rules)
    reached(tmp_path, 60)
    runs[1].process.kill()
    reached(tmp_path, 70, generation=2)
    assert [
        (worker(tmp_path, 2, host)["hosts"], worker(tmp_path, 2, host)["host_id"])
        for host in (0, 1)
    ] == [(2, 0), (2, 1)]
    assert text(tmp_path / "began-2-0") == "50"
    assert "hosts: going on without host 1" in runs[0].said()
    assert [each["host_id"] for each in status(tmp_path)["hosts"].values()] == [
        0,
        None,
        1,
    ]

    runs[1] = start(tmp_path, [1], port, plan=plan, rules=rules)[0]
    reached(tmp_path, 75, generation=3)
    assert worker(tmp_path, 3, 2)["hosts"] == 3
    assert "taking in host 1" in runs[0].said()
    assert int(text(tmp_path / "began-3-0")) >= 70, "they saved before they stopped"
    assert status(tmp_path)["restarts"] == 1, "to take in a host is no failure"

    runs[0].signal(signal.SIGTERM)
    assert [each.done()[0]["exit_code"] for each in runs] == [130] * 3


def test_without_enough_hosts_it_ends(tmp_path):
    runs = start(tmp_path, [0, 1, 2], free_port(), plan=ENDLESS, rules={"grace": 0.5})
    reached(tmp_path, 3)
    runs[2].process.kill()
    result = runs[0].done()[0]
    assert "host 2 did not come back within 0.5 s" in result["what"]
    assert "--least-hosts" in result["what"]
    assert runs[1].done()[0] == {"status": "failed", "exit_code": 1}, (
        "host 0 speaks for all"
    )


def test_the_head_is_killed_and_comes_back(tmp_path):
    port = free_port()
    runs = start(tmp_path, [0, 1, 2], port, plan={"until": 400})
    reached(tmp_path, 3)
    pids = [worker(tmp_path, 1, host)["pid"] for host in range(3)]
    runs[0].process.kill()
    gone(*pids)
    runs[0] = start(tmp_path, [0], port, plan={"until": 400})[0]
    assert worker(tmp_path, 2, 1)["hosts"] == 3, (
        "the generations go on where the lost head had them"
    )

    reached(tmp_path, 3, generation=2)
    runs[1].signal(signal.SIGTERM)
    assert [each.done()[0]["exit_code"] for each in runs] == [130] * 3


def test_without_a_head_the_others_end(tmp_path):
    runs = start(
        tmp_path, [0, 1], free_port(), hosts=2, plan=ENDLESS, rules={"grace": 1.0}
    )
    reached(tmp_path, 3)
    runs[0].process.kill()
    result = runs[1].done()[0]
    assert result["error"] == "HostsError"
    assert result["exit_code"] == 1
    assert (
        "host 0 is lost: the connection was closed, and for 1 s it could not be met"
        " again" in result["what"]
    )
    assert "look at the network" in result["remedy"]

    gone(worker(tmp_path, 1, 1)["pid"], limit=0.1)


@pytest.mark.parametrize(
    ("hosts", "ids", "more", "what"),
    [
        (3, [0, 1], {}, "of 3 hosts 1 did not come within 2 s: 2"),
        (2, [1], {}, "host 0 can't be met"),
        (3, [0, 1, 1], {}, "two processes say that they are host 1"),
        (
            2,
            [0, 1],
            {1: {"facts": {"jax": "2"}}},
            "host 1 differs from host 0 in jax: 2 there, None here",
        ),
    ],
    ids=["missing", "no head", "twice", "facts"],
)
def test_hosts_that_do_not_fit_end_in_one_error_everywhere(
    tmp_path, hosts, ids, more, what
):
    port = free_port()
    rules = {"grace": 1.0}
    runs = [
        start(
            tmp_path,
            [host],
            port,
            hosts=hosts,
            limit=2.0,
            rules=rules,
            **more.get(host, {}),
        )[0]
        for host in ids
    ]
    results = [each.done()[0] for each in runs]
    assert all(
        result["exit_code"] == 2 and what in result["what"] for result in results
    ), results
    assert not list(tmp_path.glob("worker-*"))


def test_a_stranger_and_another_run_are_turned_away(tmp_path):
    port = free_port()
    first = start(tmp_path, [0], port, hosts=2, name="mine", plan={"until": 6})[0]
    for words in (
        b"GET / HTTP/1.1\r\n\r\n",
        b'{"host": "x"}\n',
        b"[]\n",
        b'{"host": 1}\n',
        b"",
    ):
        until = time.monotonic() + 10
        while time.monotonic() < until:
            with (
                contextlib.suppress(ConnectionRefusedError),
                socket.create_connection(("127.0.0.1", port)) as connection,
            ):
                connection.sendall(words)
                break
            time.sleep(0.02)
    other = start(tmp_path, [1], port, hosts=2, name="other")[0].done()[0]
    assert "host 1 belongs to another run: 'other' there, 'mine' here" in other["what"]
    assert other["exit_code"] == 2

    second = start(tmp_path, [1], port, hosts=2, name="mine", plan={"until": 6})[0]
    assert [each.done()[0] for each in (first, second)] == [FINISHED] * 2


def test_a_second_process_of_a_host_that_runs_is_told_to_come_later(tmp_path):
    port = free_port()
    runs = start(tmp_path, [0, 1], port, hosts=2, plan=ENDLESS)
    reached(tmp_path, 3)
    second = start(tmp_path, [1], port, hosts=2, plan=ENDLESS)[0]
    time.sleep(1.0)
    assert second.process.is_alive()
    assert status(tmp_path)["generation"] == 1

    runs[1].process.kill()
    assert worker(tmp_path, 2, 1)["parent"] == second.process.pid, (
        "once the place is free it is let in"
    )

    runs[0].signal(signal.SIGTERM)
    assert [each.done()[0]["exit_code"] for each in (runs[0], second)] == [130] * 2


def test_a_taken_port_is_an_error(tmp_path):
    with socket.create_server(("", 0)) as taken:
        result = start(tmp_path, [0], taken.getsockname()[1], hosts=2)[0].done()[0]
    assert "host 0 can't listen on port" in result["what"]
    assert result["exit_code"] == 2


# ---- the runs of PLANS ----


def test_all_is_well(runs):
    result, out, err, folder = runs("well")
    assert result == FINISHED

    told = [worker(folder, 1, host) for host in range(3)]
    assert [(each["hosts"], each["host_id"]) for each in told] == [
        (3, 0),
        (3, 1),
        (3, 2),
    ]
    assert len({each["coordinator"] for each in told}) == 1
    assert len({each["pid"] for each in told}) == 3
    assert not any(each["variables"] for each in told), (
        "what a worker is told is not for its children"
    )
    assert out == "done 12\n"
    assert sorted(err.splitlines()) == ["[host 1] done 12", "[host 2] done 12"]

    found = status(folder)
    assert (
        found["state"],
        found["exit_code"],
        found["restarts"],
        found["recoveries"],
    ) == ("over", 0, 0, [])


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_and_the_run_goes_on(runs, name):
    failure = FAULTS[name]
    result, out, err, folder = runs(name)
    assert result == FINISHED

    line = next(line for line in err.splitlines() if line.startswith("hosts: "))
    assert line.startswith(f"hosts: host {failure.host} "), err
    assert failure.told in line, err
    assert "restart 1 of 10" in line, err

    source = {
        "hang": "time.sleep(1000)",
        "deaf": "time.sleep(1000)",
        "hold": "c.pthread_mutex_lock(mutex)",
    }.get(failure.do)
    assert source is None or ("dummy.py" in err and source in err), err
    assert out.splitlines()[-1] == "done 12"

    began = [text(folder / f"began-2-{host}") for host in range(3)]
    assert began == [str(failure.resumed)] * 3, "from the last committed step"

    gone(*(worker(folder, 1, each)["pid"] for each in range(3)), limit=0.1)
    assert worker(folder, 1, 0)["coordinator"] != worker(folder, 2, 0)["coordinator"]

    (recovery,) = status(folder)["recoveries"]
    assert recovery["host"] == failure.host
    assert recovery["phase"] == failure.phase
    assert status(folder)["restarts"] == 1
    assert (
        0
        < recovery["seconds_to_ended"]
        < recovery["seconds_to_begun"]
        < recovery["seconds_to_stepped"]
        < 15
    )

    patience = 6 if source or failure.do == "freeze" else 1
    assert recovery["seconds_to_notice"] < patience


def test_what_follows_from_a_death_is_not_taken_for_its_cause(runs):
    result, _, err, _ = runs("all follow one")
    assert result == FINISHED
    assert "hosts: host 2 was ended by SIGKILL" in err


@pytest.mark.parametrize("host", [0, 1])
def test_a_mistake_is_shown_once_and_not_tried_again(runs, host):
    result, _, err, folder = runs(f"mistake of host {host}")
    what = "a bad cell" if host == 0 else "host 1: a bad cell"
    assert result == {
        "error": "LeptonError",
        "what": what,
        "where": "table.csv:7",
        "remedy": "fix it",
        "exit_code": 2,
    }
    assert status(folder)["generation"] == 1
    assert status(folder)["exit_code"] == 2
    assert "a bad cell" not in err, "the command line shows it"


def test_a_fault_that_repeats_at_one_step_ends_it(runs):
    result, _, _, folder = runs("repeated")
    assert (result["error"], result["exit_code"]) == ("HostsError", 2)
    assert (
        "host 1 ended with exit code 3, last seen in data at step 5, for the third"
        " time, and with no checkpoint since step 4" in result["what"]
    )
    assert status(folder)["generation"] == 3


def test_failures_with_checkpoints_between_them_are_forgiven_and_others_are_not(runs):
    assert runs("forgiven")[0] == FINISHED
    result = runs("used up")[0]
    assert (result["error"], result["exit_code"]) == ("HostsError", 1)
    assert "exit code 4, last seen in data at step 6" in result["what"]
    assert "the one restart of --restarts is used up" in result["what"]


def test_without_restarts_a_fault_ends_it_with_the_stack(runs):
    result = runs("no restarts")[0]
    assert (result["error"], result["exit_code"]) == ("HostsError", 1)
    assert result["what"].startswith("host 1 has been stuck")
    assert "dummy.py" in result["where"]
    assert "in hang" in result["where"]
    assert "--restarts" in result["remedy"]


assert QUICK["grace"] > QUICK["lost"], "a host that is lost can come back"
