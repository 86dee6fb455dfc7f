"""Which faults there are, and how one of them is drawn from a seed.

Each kind of fault has a `Draw`: given a random generator, it returns a `Fault`. The
order of the kinds and of the calls of the generator decides which faults a seed stands
for, so a change of either makes other campaigns of all seeds.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tools.faults import network

STEPS = 60  # of a run; long enough for six checkpoints and three evaluations
CHECKPOINTS = 10  # steps between two of them, as in `recipe.py`

# Phases that a worker passes before its first step.
EARLY = ("start", "plan", "compile", "restore")

Draw = Callable[[random.Random], "Fault"]
Stage = dict[str, Any]


@dataclass(frozen=True)
class Fault:
    """One fault of a trial.

    Attributes:
      name: the kind, with what was drawn.
      promise: what must become of the run; a key of `PROMISES`.
      stages: what happens and where, for `recipe.py`.
      says: a pattern that must be found in standard error.
      options: further options of the command line.
      apart: each host is started by a command of its own, as on a cluster.
      again: seconds after which a host that was killed from outside is started again.
      late: seconds by which the last host is started later than the others.
      network: each host has a network namespace of its own; needs `apart`.
    """

    name: str
    promise: str
    stages: tuple[Stage, ...] = ()
    says: str = ""
    options: tuple[str, ...] = ()
    apart: bool = False
    again: float | None = None
    late: float = 0.0
    network: bool = False


def draw(
    seed: int,
    number: int,
    hosts: int,
    only: Sequence[str] | None = None,
) -> Fault:
    """Return fault `number` of the campaign of a seed.

    The kinds take turns in an order that the seed decides; the rest is drawn for each
    fault.
    """
    draws = kinds(hosts)
    names = [name for name in draws if only is None or name in only]
    order = random.Random(f"{seed}").sample(names, len(names))
    name = order[number % len(order)]
    return draws[name](random.Random(f"{seed}/{number}"))


def kinds(hosts: int) -> dict[str, Draw]:
    """Return what draws a fault of each kind, for a run with `hosts` processes."""
    return {
        **_kinds_of_processes(hosts),
        **_kinds_of_files(hosts),
        **_kinds_of_requests(hosts),
        **_kinds_of_hosts(hosts),
        **_kinds_of_networks(hosts),
    }


# ---- a training process dies or hangs ----


def _kinds_of_processes(hosts: int) -> dict[str, Draw]:
    hanging = ("plan", "compile", "restore", "data", "steps", "evaluation", "save")
    return {
        "kill": _dies(hosts, "kill", "start", *hanging, "shutdown"),
        "kill in steps": _dies(hosts, "kill", "steps"),
        "kill in save": _dies(hosts, "kill", "save"),
        "stop": _dies(hosts, "stop", *hanging),
        "stall": _dies(hosts, "stall", *hanging),
        "freeze": _dies(hosts, "freeze", "data", "steps", "evaluation"),
        "abort": _dies(hosts, "abort", "compile", "steps", "evaluation"),
        "exit": _dies(hosts, "exit", "save", "steps", "evaluation"),
        "raise": _dies(hosts, "raise", "plan", "steps", "data"),
    }


def _dies(hosts: int, kind: str, *phases: str) -> Draw:
    """Return a draw of a worker that fails in one of the phases."""

    def draw(rng: random.Random) -> Fault:
        stages = _somewhere(rng, hosts, kind, phases)
        host = stages[-1]["host"]
        return Fault(
            f"{kind} in {stages[-1]['phase']}",
            "recovered",
            stages,
            says=rf"(?m)^hosts: host {host} (was|has been|ended|is) ",
        )

    return draw


def _somewhere(
    rng: random.Random,
    hosts: int,
    kind: str,
    phases: Sequence[str],
    **more: Any,
) -> tuple[Stage, ...]:
    """Draw the host, the phase and the step of a fault.

    There is something to restore only after a failure: then a kill goes ahead.
    """
    phase = rng.choice(phases)
    host = rng.randrange(hosts)
    if phase in EARLY:
        step = 0
    elif phase == "shutdown":
        step = STEPS
    else:
        step = rng.randrange(1, STEPS - 2)
    stage = {"kind": kind, "host": host, "phase": phase, "step": step, **more}
    if phase != "restore":
        return (stage,)

    first = _kill_in_steps(rng, hosts, CHECKPOINTS + 2)
    return (first, stage | {"generation": 2})


def _kill_in_steps(
    rng: random.Random,
    hosts: int,
    earliest: int,
) -> Stage:
    return {
        "kind": "kill",
        "host": rng.randrange(hosts),
        "phase": "steps",
        "step": rng.randrange(earliest, STEPS - 2),
    }


# ---- files that are lost, damaged or differ ----


def _kinds_of_files(hosts: int) -> dict[str, Draw]:
    return {
        "damaged checkpoint": _damaged(hosts),
        "program": _refused(
            hosts, "program", r"host \d+ differs from host 0 in the train step"
        ),
        "full disk": _ends(hosts, "full disk", "disk", r"can't be written", "save"),
        "unreadable data": _ends(
            hosts,
            "unreadable data",
            "no-data",
            r"a shard of the data can't be read",
            "reading",
        ),
        "corrupted data": _ends(
            hosts, "corrupted data", "bad-data", r"loss of step \d+ is nan", "reading"
        ),
    }


def _damaged(hosts: int) -> Draw:
    """Return a draw of a checkpoint that is damaged before the run goes on from it."""

    def draw(rng: random.Random) -> Fault:
        how = rng.choice(["bit", "truncate", "delete", "half"])
        # three checkpoints are there, of which the newest is damaged
        first = _kill_in_steps(rng, hosts, 3 * CHECKPOINTS + 1)
        damage = {
            "kind": "damage",
            "how": how,
            "host": 0,
            "phase": "plan",
            "generation": 2,
        }
        return Fault(f"damaged checkpoint ({how})", "recovered", (first, damage))

    return draw


def _refused(
    hosts: int,
    kind: str,
    says: str,
) -> Draw:
    """Return a draw of a host whose program differs, so that nothing may start."""

    def draw(rng: random.Random) -> Fault:
        stage = {"kind": kind, "phase": "never", "host": rng.randrange(1, hosts)}
        return Fault(f"{kind} differs", "refused", (stage,), says=says)

    return draw


def _ends(hosts: int, name: str, kind: str, says: str, *phases: str) -> Draw:
    """Return a draw of what only a person can fix."""

    def draw(rng: random.Random) -> Fault:
        stages = _somewhere(rng, hosts, kind, phases)
        return Fault(name, "ended, then goes on", stages, says=says)

    return draw


# ---- signals, clocks, and a fault that comes again ----


def _kinds_of_requests(hosts: int) -> dict[str, Draw]:
    return {
        "SIGTERM": _interrupted(hosts, "sigterm"),
        "SIGTERM to one process": _interrupted(hosts, "sigterm-worker"),
        "clock jump": _clock_jumps(hosts),
        "repeated": _repeats(hosts),
    }


def _interrupted(hosts: int, kind: str) -> Draw:
    phases = ("plan", "compile", "data", "steps", "evaluation", "save")

    def draw(rng: random.Random) -> Fault:
        stages = _somewhere(rng, hosts, kind, phases)
        name = f"{kind} in {stages[-1]['phase']}"
        return Fault(name, "interrupted, then goes on", stages)

    return draw


def _clock_jumps(hosts: int) -> Draw:
    day = 86400.0

    def draw(rng: random.Random) -> Fault:
        seconds = rng.choice([-day, -5.0, day])
        stages = _somewhere(
            rng,
            hosts,
            "clock",
            ("start", "steps"),
            seconds=seconds,
        )
        return Fault("clock jump", "unharmed", stages)

    return draw


def _repeats(hosts: int) -> Draw:
    """Return a draw of a fault that no restart gets past, before a new checkpoint."""

    def draw(rng: random.Random) -> Fault:
        stage = {
            "kind": "raise",
            "host": rng.randrange(hosts),
            "phase": "steps",
            "step": rng.randrange(CHECKPOINTS + 1, 2 * CHECKPOINTS),
            "always": True,
        }
        return Fault(
            "the same fault again and again",
            "given up",
            (stage,),
            says="same|again|times",
        )

    return draw


# ---- a supervisor, or a whole host, is lost ----


def _kinds_of_hosts(hosts: int) -> dict[str, Draw]:
    def other(rng: random.Random) -> int:
        return rng.randrange(1, hosts)

    def head(rng: random.Random) -> int:
        return 0

    # seconds after which the host is started again
    at_once = 1.0
    late = 25.0
    never = 1e9
    with_fewer = network.without(hosts)
    fewer = "went on with what is left"
    return {
        "late host": _comes_late,
        "supervisor": _supervisor("supervisor killed", "recovered", other, at_once),
        "head": _supervisor("host 0's supervisor killed", "recovered", head, at_once),
        "lost host": _supervisor(
            "host lost for good", fewer, other, never, *with_fewer
        ),
        "host back late": _supervisor(
            "host back late", fewer, other, late, *with_fewer
        ),
    }


def _comes_late(rng: random.Random) -> Fault:
    return Fault("late host", "unharmed", apart=True, late=rng.uniform(3, 10))


def _supervisor(
    name: str,
    promise: str,
    host: Callable[[random.Random], int],
    again: float,
    *options: str,
) -> Draw:
    """Return a draw of a supervisor that is killed, with its worker."""

    def draw(rng: random.Random) -> Fault:
        stage = {
            "kind": "supervisor",
            "host": host(rng),
            "phase": "steps",
            "step": rng.randrange(CHECKPOINTS + 2, STEPS - 20),
        }
        return Fault(
            name,
            promise,
            (stage,),
            apart=True,
            again=again,
            options=options,
        )

    return draw


# ---- a host's link goes down ----


def _kinds_of_networks(hosts: int) -> dict[str, Draw]:
    return {
        "network": _link_is_away(hosts),
        "network lost": _link_is_lost(hosts),
        "network back late": _link_is_back_late(hosts),
    }


def _link_is_away(hosts: int) -> Draw:
    """Return a draw of a link that comes back: before it is noticed, or after."""

    def draw(rng: random.Random) -> Fault:
        short = rng.random() < 0.5
        host = rng.randrange(hosts)
        seconds = round(rng.uniform(1, 3) if short else rng.uniform(20, 40), 1)
        phases = ("steps", "data", "evaluation", "save")
        stage = _cut(rng, host, seconds, phases)
        return Fault(
            f"network away {seconds} s in {stage['phase']}",
            "recovered",
            (stage,),
            says="" if short else rf"host {host} (is lost|has lost all)",
            apart=True,
            network=True,
        )

    return draw


def _link_is_lost(hosts: int) -> Draw:
    """Return a draw of a link that never comes back: both sides must say so."""

    def draw(rng: random.Random) -> Fault:
        host = rng.randrange(1, hosts)
        stage = _cut(rng, host, None, ("steps", "data", "evaluation", "save"))
        says = (
            rf"(?s)(?=.*host {host} is lost)"
            r"(?=.*host 0 is lost: [^\n]*could not be met again)"
            r"(?=.*remedy: look at the network)"
        )
        return Fault(
            f"network lost in {stage['phase']}",
            "went on with what is left",
            (stage,),
            says=says,
            options=network.without(hosts),
            apart=True,
            network=True,
        )

    return draw


def _link_is_back_late(hosts: int) -> Draw:
    """Return a draw of a link that comes back when the others have gone on."""

    def draw(rng: random.Random) -> Fault:
        host = rng.randrange(1, hosts)
        seconds = round(rng.uniform(20, 24), 1)
        stage = _cut(rng, host, seconds, ("steps", "data"))
        return Fault(
            "network back late",
            "went on with what is left",
            (stage | {"grace": 60},),
            says=rf"going on without host {host}",
            options=network.without(hosts),
            apart=True,
            network=True,
        )

    return draw


def _cut(
    rng: random.Random,
    host: int,
    seconds: float | None,
    phases: Sequence[str],
) -> Stage:
    """Draw where and how a link is cut; `seconds` None: for good."""
    return {
        "kind": "network",
        "host": host,
        "phase": rng.choice(phases),
        "step": rng.randrange(1, STEPS - 20),
        "seconds": seconds,
        "how": rng.choice(sorted(network.WAYS)),
    }
