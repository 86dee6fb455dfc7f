"""Break runs on several hosts in every way that clusters do, and judge what becomes of
them: see --help.

A trial starts a real run of several processes, makes one fault drawn from the seed come
true in it, and holds what follows against that fault's promise. What is expected of an
undisturbed run is taken from one.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lepton_jax.cli.settings import Parser
from lepton_jax.errors import LeptonError, SettingError
from lepton_jax.monitor import read_samples
from tools.bench.cli import surroundings
from tools.faults import network as faults_network
from tools.faults.network import Loopback, Network

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "tools" / "launch.py"
RECIPE = ROOT / "tools" / "faults" / "recipe.py"
STEPS = 60
# short limits, so that what hangs is noticed soon; four processes on two cores must
# still get by
LIMITS = {
    "silence": 12,
    "start": 60,
    "plan": 20,
    "restore": 15,
    "compile": 25,
    "steps": 15,
    "data": 10,
    "evaluation": 12,
    "save": 15,
    "shutdown": 20,
    "stop": 30,
}
# seconds within which any trial's first part must have ended, whatever happens
BOUND = 150.0


@dataclass(frozen=True)
class Fault:
    """One fault of a trial.

    Attributes:
      name: of its kind.
      promise: what must become of the run; a key of `PROMISES`.
      stages: for `recipe.py`.
      says: pattern of what standard error must say.
      options: further ones of the command line.
      apart: each host is started by a command of its own, as on a cluster.
      again: start what was killed from outside again, after so many seconds.
      late: seconds by which the last host is started later than the others.
      network: each host has a network namespace of its own; with `apart`.
    """

    name: str
    promise: str
    stages: tuple[dict[str, Any], ...] = ()
    says: str = ""
    options: tuple[str, ...] = ()
    apart: bool = False
    again: float | None = None
    late: float = 0.0
    network: bool = False


# ---- which faults there are ----


def kinds(hosts: int) -> dict[str, Callable[[random.Random], Fault]]:
    """A fault of each kind, drawn by the generator it is given."""

    def dies(kind: str, *phases: str) -> Callable[[random.Random], Fault]:
        def draw(rng: random.Random) -> Fault:
            stages = somewhere(rng, kind, *phases)
            return Fault(
                f"{kind} in {stages[-1]['phase']}",
                "recovered",
                stages,
                says=rf"(?m)^hosts: host {stages[-1]['host']} (was|has been|ended|is) ",
            )

        return draw

    def somewhere(
        rng: random.Random,
        kind: str,
        *phases: str,
        **more: Any,
    ) -> tuple[dict[str, Any], ...]:
        phase = rng.choice(phases)
        host = rng.randrange(hosts)
        early = phase in ("start", "plan", "compile", "restore")
        step = (
            0
            if early
            else STEPS
            if phase == "shutdown"
            else rng.randrange(1, STEPS - 2)
        )
        stage = {
            "kind": kind,
            "host": host,
            "phase": phase,
            "step": step,
            **more,
        }
        if phase != "restore":
            return (stage,)
        first = {
            "kind": "kill",
            "host": rng.randrange(hosts),
            "phase": "steps",
            "step": rng.randrange(12, STEPS - 2),
        }
        return (first, stage | {"generation": 2})

    def damaged(rng: random.Random) -> Fault:
        how = rng.choice(["bit", "truncate", "delete", "half"])
        first = {
            "kind": "kill",
            "host": rng.randrange(hosts),
            "phase": "steps",
            "step": rng.randrange(31, STEPS - 2),
        }
        return Fault(
            f"damaged checkpoint ({how})",
            "recovered",
            (
                first,
                {
                    "kind": "damage",
                    "how": how,
                    "host": 0,
                    "phase": "plan",
                    "generation": 2,
                },
            ),
        )

    def refused(kind: str, says: str) -> Callable[[random.Random], Fault]:
        stage = {"kind": kind, "phase": "never"}
        return lambda rng: Fault(
            f"{kind} differs",
            "refused",
            (stage | {"host": rng.randrange(1, hosts)},),
            says=says,
        )

    def ends(
        name: str,
        kind: str,
        says: str,
        *phases: str,
    ) -> Callable[[random.Random], Fault]:
        return lambda rng: Fault(
            name,
            "ended, then goes on",
            somewhere(rng, kind, *phases),
            says=says,
        )

    def interrupted(kind: str) -> Callable[[random.Random], Fault]:
        def draw(rng: random.Random) -> Fault:
            stages = somewhere(
                rng, kind, "plan", "compile", "data", "steps", "evaluation", "save"
            )
            return Fault(
                f"{kind} in {stages[-1]['phase']}", "interrupted, then goes on", stages
            )

        return draw

    def repeats(rng: random.Random) -> Fault:
        stage = {
            "kind": "raise",
            "host": rng.randrange(hosts),
            "phase": "steps",
            "step": rng.randrange(11, 20),
            "always": True,
        }
        return Fault(
            "the same fault again and again",
            "given up",
            (stage,),
            says="same|again|times",
        )

    def supervisor(
        name: str,
        promise: str,
        host: Callable[[random.Random], int],
        again: float,
        *options: str,
    ) -> Callable[[random.Random], Fault]:
        def draw(rng: random.Random) -> Fault:
            stage = {
                "kind": "supervisor",
                "host": host(rng),
                "phase": "steps",
                "step": rng.randrange(12, STEPS - 20),
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

    other = lambda rng: rng.randrange(1, hosts)
    cut = lambda fields: (
        lambda rng: Fault(
            **fields(rng),
            apart=True,
            network=True,
        )
    )
    few = faults_network.without(hosts)
    return {
        "kill": dies(
            "kill",
            "start",
            "plan",
            "compile",
            "restore",
            "data",
            "steps",
            "evaluation",
            "save",
            "shutdown",
        ),
        "kill in steps": dies("kill", "steps"),
        "kill in save": dies("kill", "save"),
        "stop": dies(
            "stop", "plan", "compile", "restore", "data", "steps", "evaluation", "save"
        ),
        "stall": dies(
            "stall", "plan", "compile", "restore", "data", "steps", "evaluation", "save"
        ),
        "freeze": dies("freeze", "data", "steps", "evaluation"),
        "abort": dies("abort", "compile", "steps", "evaluation"),
        "exit": dies("exit", "save", "steps", "evaluation"),
        "raise": dies("raise", "plan", "steps", "data"),
        "damaged checkpoint": damaged,
        "program": refused(
            "program", r"host \d+ differs from host 0 in the train step"
        ),
        "full disk": ends("full disk", "disk", r"can't be written", "save"),
        "unreadable data": ends(
            "unreadable data",
            "no-data",
            r"a shard of the data can't be read",
            "reading",
        ),
        "corrupted data": ends(
            "corrupted data", "bad-data", r"loss of step \d+ is nan", "reading"
        ),
        "SIGTERM": interrupted("sigterm"),
        "SIGTERM to one process": interrupted("sigterm-worker"),
        "clock jump": lambda rng: Fault(
            "clock jump",
            "unharmed",
            somewhere(
                rng,
                "clock",
                "start",
                "steps",
                seconds=rng.choice([-86400.0, -5.0, 86400.0]),
            ),
        ),
        "repeated": repeats,
        "late host": lambda rng: Fault(
            "late host",
            "unharmed",
            apart=True,
            late=rng.uniform(3, 10),
        ),
        "supervisor": supervisor("supervisor killed", "recovered", other, 1.0),
        "head": supervisor(
            "host 0's supervisor killed", "recovered", lambda rng: 0, 1.0
        ),
        "lost host": supervisor(
            "host lost for good", "went on with what is left", other, 1e9, *few
        ),
        "host back late": supervisor(
            "host back late", "went on with what is left", other, 25.0, *few
        ),
        **{
            kind: cut(fields)
            for kind, fields in faults_network.kinds(hosts, STEPS).items()
        },
    }


def draw(
    seed: int,
    number: int,
    hosts: int,
    only: list[str] | None = None,
) -> Fault:
    """Fault `number` of the campaign of a seed: the kinds take turns in an order of the
    seed's, the rest is drawn for each.
    """
    found = kinds(hosts)
    names = [name for name in found if only is None or name in only]
    order = random.Random(f"{seed}").sample(names, len(names))
    return found[order[number % len(order)]](random.Random(f"{seed}/{number}"))


# ---- a trial ----


class Started:
    """The processes of a run, each the leader of a session so that nothing outlives the
    trial.
    """

    def __init__(
        self,
        folder: Path,
        hosts: int,
        devices: int,
        fault: Fault,
        faulty: bool = True,
    ):
        self.folder = folder
        self.hosts = hosts
        self.fault = fault
        self.environment = {
            k: v
            for k, v in os.environ.items()
            if k not in ("XLA_FLAGS", "LEPTON_FAULTS")
        }
        self.environment |= {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        if faulty:
            self.environment["LEPTON_FAULTS"] = str(folder / "faults.json")
        limits = [
            text
            for name, limit in LIMITS.items()
            for text in ("--limit", f"{name}={limit}")
        ]
        self.command = [
            sys.executable,
            str(LAUNCH),
            str(RECIPE),
            "--run-dir",
            str(folder / "run"),
            "--go-on",
            "--trace-samples",
            "--devices",
            str(devices),
            *limits,
            *fault.options,
        ]
        self.log = (folder / "log.txt").open("ab")
        self.began = time.time()
        self.processes: dict[int, subprocess.Popen] = {}
        self._restarts: dict[int, float] = {}
        self.network = (
            Network(folder, hosts, fault.stages) if fault.network else Loopback()
        )
        if not fault.apart:
            self._start(0, "--hosts", f"local:{hosts}")
            return
        for host in range(hosts):
            if fault.late and host == hosts - 1:
                self._restarts[host] = self.began + fault.late
            else:
                self._apart(host)

    def _apart(self, host: int) -> None:
        self._start(
            host,
            *self.network.options(host),
            "--hosts",
            str(self.hosts),
            "--host-id",
            str(host),
        )

    def _start(
        self,
        host: int,
        *options: str,
    ) -> None:
        command = self.network.inside(host, [*self.command, *options])
        self.processes[host] = subprocess.Popen(
            command,
            env=self.environment,
            stdout=self.log,
            stderr=self.log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def wait(self, bound: float) -> list[int] | None:
        """Exit codes, host 0's first; None if it is not over within the bound. What was
        killed is started again in time.
        """
        until = time.monotonic() + bound
        gone: set[int] = set()
        while time.monotonic() < until:
            codes = {host: process.poll() for host, process in self.processes.items()}
            for host, code in codes.items():
                if (
                    code == -signal.SIGKILL
                    and host not in gone
                    and self.fault.again is not None
                ):
                    gone.add(host)
                    self._restarts[host] = time.time() + self.fault.again
            for host, at in list(self._restarts.items()):
                if time.time() >= at:
                    del self._restarts[host]
                    self._apart(host)
            waiting = [
                host for host, at in self._restarts.items() if at < time.time() + bound
            ]
            codes = {host: process.poll() for host, process in self.processes.items()}
            self.network.tend(codes)
            if None not in codes.values() and (not waiting or codes.get(0) == 0):
                return [codes[host] for host in sorted(codes)]
            time.sleep(0.05)
        return None

    def close(self) -> None:
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.network.close()
        self.log.close()
        for pid in _with(str(self.folder / "run")):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _with(text: str) -> list[int]:
    """Processes whose command line holds a text, this one apart."""
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit() and int(path.name) != os.getpid():
            with contextlib.suppress(OSError):
                if text.encode() in (path / "cmdline").read_bytes():
                    found.append(int(path.name))
    return found


@dataclass
class Ending:
    """What a run left: when it was over, exit codes, checksums of the last checkpoint's
    arrays, the steps' samples and losses, its log, processes, and the faults that its
    supervisors noticed.
    """

    at: float
    codes: list[int] | None
    checksums: dict[str, int]
    samples: list[Any]
    losses: list[float]
    log: str
    left: list[int]
    recoveries: list[Any]


def look(folder: Path, codes: list[int] | None) -> Ending:
    """See how a run ended; processes that are left of it are counted."""
    from lepton_jax.checkpoint.durable import Checkpoints
    from lepton_jax.monitor import read_events

    at = time.time()
    run = folder / "run"
    checksums = {}
    samples = []
    losses = {}
    checkpoints = Checkpoints(run / "checkpoints")
    if STEPS in checkpoints.steps():
        checksums = checkpoints._record(STEPS)[1]
        checkpoints.close()
    with contextlib.suppress(OSError):
        samples = read_samples(run)
    with contextlib.suppress(LeptonError, OSError):
        for event in read_events(run):
            if event["kind"] == "steps":
                losses |= zip(
                    range(event["first"], event["last"] + 1),
                    event["records"]["loss"],
                    strict=True,
                )
    return Ending(
        at,
        codes,
        checksums,
        samples,
        [losses.get(step, float("nan")) for step in range(1, STEPS + 1)],
        (folder / "log.txt").read_text(errors="replace"),
        _with(str(run)),
        recoveries(run),
    )


def recoveries(run: Path) -> list[Any]:
    """The faults that its supervisors noticed, and what came after."""
    record = run / "hosts.json"
    return json.loads(record.read_text())["recoveries"] if record.exists() else []


def whole(ending: Ending, reference: Ending) -> str | None:
    """What a run that reached its end lacks of being the undisturbed one, to the
    bit.
    """
    if ending.checksums != reference.checksums:
        return (
            "there is no final checkpoint"
            if not ending.checksums
            else "the final parameters differ"
        )
    if ending.samples != reference.samples:
        return "other samples were trained on"
    return "processes are left" if ending.left else None


def recovered(
    fault: Fault, first: Ending, reference: Ending, trial: Trial
) -> str | None:
    if first.codes is None or first.codes[0] != 0:
        return f"exit codes {first.codes}"
    if not trial.fired:
        return "the fault did not happen"
    if not first.recoveries and not fault.apart:
        return "nothing was restarted"
    return whole(first, reference)


def unharmed(
    fault: Fault, first: Ending, reference: Ending, trial: Trial
) -> str | None:
    if first.codes is None or any(first.codes):
        return f"exit codes {first.codes}"
    return "something was restarted" if first.recoveries else whole(first, reference)


def refused(
    fault: Fault,
    first: Ending,
    reference: Ending,
    trial: Trial,
) -> str | None:
    if first.codes is None or first.codes[0] != 2:
        return f"exit codes {first.codes}"
    if first.samples:
        return "it trained"
    return "processes are left" if first.left else None


def ended(
    fault: Fault,
    first: Ending,
    reference: Ending,
    trial: Trial,
) -> str | None:
    if first.codes is None or first.codes[0] not in (1, 2):
        return f"exit codes {first.codes}"
    return "processes are left" if first.left else whole(trial.on(), reference)


def interrupted(
    fault: Fault, first: Ending, reference: Ending, trial: Trial
) -> str | None:
    if first.codes is None or first.codes[0] not in (0, 130):
        return f"exit codes {first.codes}"
    if first.codes[0] and not trial.fired:
        return "the fault did not happen"
    if first.codes[0] and (took := first.at - trial.fired[-1]) > LIMITS["stop"] + 15:
        return f"it took {took:.0f} s to stop"
    return (
        "processes are left"
        if first.left
        else whole(trial.on() if first.codes[0] else first, reference)
    )


def given_up(
    fault: Fault, first: Ending, reference: Ending, trial: Trial
) -> str | None:
    if first.codes is None or first.codes[0] not in (1, 2):
        return f"exit codes {first.codes}"
    if not 2 <= len(first.recoveries) <= 6:
        return f"it was tried again {len(first.recoveries)} times"
    return "processes are left" if first.left else whole(trial.on(), reference)


def with_less(
    fault: Fault, first: Ending, reference: Ending, trial: Trial
) -> str | None:
    if first.codes is None or first.codes[0] != 0:
        return f"exit codes {first.codes}"
    if first.samples != reference.samples:
        return "samples were lost or repeated"
    if first.left:
        return "processes are left"
    away = max(
        abs(a - b) / b for a, b in zip(first.losses, reference.losses, strict=True)
    )
    return None if away < 1e-4 else f"the losses differ by {away:.2g}"


PROMISES = {
    "recovered": recovered,
    "unharmed": unharmed,
    "refused": refused,
    "ended, then goes on": ended,
    "interrupted, then goes on": interrupted,
    "given up": given_up,
    "went on with what is left": with_less,
}


class Trial:
    """One fault in one run, in a folder of its own."""

    def __init__(
        self,
        folder: Path,
        hosts: int,
        devices: int,
        fault: Fault,
    ):
        self.folder = folder
        self.hosts = hosts
        self.devices = devices
        self.fault = fault
        self.restarts: list[tuple[int, str]] = []
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "faults.json").write_text(json.dumps(fault.stages))

    def run(self, reference: Ending) -> dict[str, Any]:
        """Run it, and judge it."""
        began = time.monotonic()
        run = Started(
            self.folder,
            self.hosts,
            self.devices,
            self.fault,
        )
        bound = BOUND * max(1, len(self.fault.stages) / 2)
        try:
            first = look(self.folder, run.wait(bound))
        finally:
            run.close()
        wrong = (
            "it hangs"
            if first.codes is None
            else PROMISES[self.fault.promise](self.fault, first, reference, self)
        )
        wrong = wrong or run.network.wrong()
        if wrong is None and not re.search(self.fault.says, first.log):
            wrong = f"it does not say /{self.fault.says}/"
        self.restarts = [(each["host"], each["cause"]) for each in first.recoveries]
        return {
            "fault": self.fault.name,
            "promise": self.fault.promise,
            "kept": wrong is None,
            "wrong": wrong,
            "seconds": round(time.monotonic() - began, 1),
            "to_next_step": self.to_next_step(),
            "stages": list(self.fault.stages),
        }

    def on(self) -> Ending:
        """Go on with the run where nothing is wrong any more."""
        mended = dataclasses.replace(
            self.fault,
            options=(),
            apart=False,
        )
        run = Started(
            self.folder,
            self.hosts,
            self.devices,
            mended,
            faulty=False,
        )
        try:
            return look(self.folder, run.wait(BOUND))
        finally:
            run.close()

    @property
    def fired(self) -> list[float]:
        """When the faults happened; a link is cut a moment after it was asked for."""
        files = {
            path.suffix: path
            for what in ("fired", "cut")
            for path in self.folder.glob(f"faults.json.{what}.*")
        }
        return sorted(json.loads(path.read_text())["time"] for path in files.values())

    def to_next_step(self) -> float | None:
        """Seconds from the last fault to the next step that a host trained; None where
        there was none.
        """
        steps = [
            json.loads(path.read_text())["time"]
            for path in self.folder.glob("faults.json.stepped.*")
        ]
        after = [at for at in steps if self.fired and at > self.fired[-1]]
        return round(min(after) - self.fired[-1], 2) if after else None


def reference(
    folder: Path,
    hosts: int,
    devices: int,
) -> Ending:
    """An undisturbed run, made once for a campaign.

    Raises:
      LeptonError: it fails by itself.
    """
    trial = folder / "undisturbed"
    if not (trial / "done").exists():
        shutil.rmtree(trial, ignore_errors=True)
        trial.mkdir(parents=True)
        (trial / "faults.json").write_text("[]")
        run = Started(
            trial,
            hosts,
            devices,
            Fault("none", "unharmed"),
        )
        try:
            codes = run.wait(2 * BOUND)
        finally:
            run.close()
        if codes != [0]:
            raise LeptonError(
                f"the undisturbed run ends with exit code {codes}",
                where=trial / "log.txt",
                remedy="see its log",
            )
        (trial / "done").touch()
    return look(trial, [0])


def campaign(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the trials that are not done yet; prints a line for each."""
    options.folder.mkdir(parents=True, exist_ok=True)
    results = options.folder / f"seed{options.seed}.jsonl"
    done = {}
    if results.exists():
        done = {
            row["number"]: row
            for row in map(json.loads, results.read_text().splitlines())
        }
    expected = reference(
        options.folder,
        options.hosts,
        options.devices,
    )
    for number in range(options.count):
        if number in done:
            continue
        fault = draw(
            options.seed,
            number,
            options.hosts,
            options.only,
        )
        if fault.network and (why := faults_network.forbidden()):
            done[number] = {
                "number": number,
                "fault": fault.name,
                "promise": fault.promise,
                "kept": None,
                "skipped": why,
                "to_next_step": None,
            }
            print(
                f"{number:4}  {fault.name:32} {fault.promise:26} skipped: no networks"
                f" of its own here: {why}",
                flush=True,
            )
            continue
        trial = Trial(
            options.folder / f"seed{options.seed}-{number}",
            options.hosts,
            options.devices,
            fault,
        )
        row = {"number": number, **trial.run(expected)}
        done[number] = row
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        says = (
            "as promised"
            if row["kept"]
            else f"NOT as promised: {row['wrong']} (see {trial.folder}/log.txt)"
        )
        took = (
            ""
            if row["to_next_step"] is None
            else f", {row['to_next_step']:.1f} s to the next step"
        )
        print(
            f"{number:4}  {row['fault']:32} {row['promise']:26} {says}{took}",
            flush=True,
        )
        if row["kept"] and not options.keep:
            shutil.rmtree(trial.folder)
    return [done[number] for number in range(options.count)]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How many were kept, and the distribution of seconds from a fault to the next
    step; "away" for links that were away.
    """
    skipped = sum("skipped" in row for row in rows)
    found = {
        "trials": len(rows) - skipped,
        "skipped": skipped,
        "kept": sum(row["kept"] is True for row in rows),
    }
    for name, away in (("", False), ("away_", True)):
        times = sorted(
            row["to_next_step"]
            for row in rows
            if row["to_next_step"] is not None
            and row["promise"] == "recovered"
            and row["fault"].startswith("network away") == away
        )
        found |= {f"{name}recoveries": len(times)} | {
            f"{name}{what}": times[min(len(times) - 1, int(share * len(times)))]
            for what, share in (("median", 0.5), ("p95", 0.95), ("worst", 1.0))
            if times
        }
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns 0 if every promise was kept, 1 if not, 2 for an
    error of the user's.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = Parser(
        prog="python -m tools.faults",
        description=__doc__,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--count",
        type=int,
        default=100,
        metavar="N",
        help="trials (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=1,
        metavar="S",
        help="what is drawn (default: %(default)s)",
    )
    parser.add_argument(
        "--hosts",
        type=int,
        default=4,
        metavar="N",
        help="processes of a run (default: %(default)s)",
    )
    parser.add_argument(
        "--devices",
        type=int,
        default=2,
        metavar="N",
        help="virtual devices of each (default: %(default)s)",
    )
    parser.add_argument(
        "--only", nargs="+", metavar="KIND", help=f"of {', '.join(kinds(4))}"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        metavar="DIR",
        default=Path(tempfile.gettempdir()) / "lepton-faults",
        help=(
            "for the runs; trials that are done are not repeated (default: %(default)s)"
        ),
    )
    parser.add_argument(
        "--keep", action="store_true", help="keep the runs that ended as promised too"
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="also write results, machine and versions to FILE",
    )
    try:
        options = parser.parse_args(arguments)
        if options.count < 1 or options.hosts < 2 or options.devices < 1:
            raise SettingError(
                "there is nothing to break",
                where="command line",
                remedy="give 1 trial and 2 hosts or more",
            )
        if unknown := set(options.only or ()) - kinds(4).keys():
            raise SettingError(
                f"there is no kind {', '.join(sorted(unknown))}",
                where="--only",
                remedy=f"the kinds are {', '.join(kinds(4))}",
            )
        rows = campaign(options)
    except LeptonError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = summary(rows)
    print(
        f"{found['kept']} of {found['trials']} as promised; all, with the seconds from"
        f" a fault to the next step: {found}"
    )
    if options.json is not None:
        here = surroundings([]) | {
            "command": f"python -m tools.faults {' '.join(arguments)}"
        }
        options.json.write_text(
            json.dumps({**here, "summary": found, "results": rows}, indent=1) + "\n"
        )
    return 0 if found["kept"] == found["trials"] else 1
