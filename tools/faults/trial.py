"""One fault in one run: its processes, and how it is judged."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lepton_jax.errors import LeptonError
from tools.faults.ending import Ending, look, processes_with
from tools.faults.kinds import Fault
from tools.faults.network import Loopback, Network
from tools.faults.promises import PROMISES, ROUNDING, STOP_SECONDS

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "tools" / "launch.py"
RECIPE = ROOT / "tools" / "faults" / "recipe.py"

# Limits of `launch.py --limit` in seconds: short, so that what hangs is noticed soon;
# long enough for four processes on two cores (by trial).
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
    "stop": STOP_SECONDS,
}
# Seconds within which a run with up to two faults must be over, whatever happens.
BOUND = 150.0
POLL = 0.05  # seconds between two looks at the processes


class Processes:
    """The processes of a run.

    Each leads a session of its own, so that nothing outlives the trial.

    Args:
      folder: of the trial; the run's is `run` in it.
      hosts, devices: processes, and virtual devices of each.
      fault: of the trial.
      options: of the command line, of this and every other trial of the campaign.
      faulty: whether the fault comes true in this run.
    """

    def __init__(
        self,
        folder: Path,
        hosts: int,
        devices: int,
        fault: Fault,
        options: Sequence[str] = (),
        faulty: bool = True,
    ):
        self.folder = folder
        self.hosts = hosts
        self.fault = fault
        self.environment = _environment(folder, faulty)
        self.command = [*_command(folder, devices, fault), *options]
        self.log = (folder / "log.txt").open("ab")
        self.began = time.time()
        self.processes: dict[int, subprocess.Popen] = {}
        self.network = (
            Network(folder, hosts, fault.stages) if fault.network else Loopback()
        )
        self._killed: set[int] = set()  # hosts whose supervisor was killed
        self._restarts: dict[int, float] = {}  # by host, the time of its next start

        if not fault.apart:
            self._start(0, "--hosts", f"local:{hosts}")
            return
        for host in range(hosts):
            if fault.late and host == hosts - 1:
                self._restarts[host] = self.began + fault.late
            else:
                self._start_apart(host)

    def wait(self, bound: float) -> list[int] | None:
        """Wait for the end, and start again what was killed, in time.

        Returns:
          Exit codes, host 0's first; None if it is not over within `bound` seconds.
        """
        until = time.monotonic() + bound
        while time.monotonic() < until:
            self._note_killed()
            self._start_again()
            codes = self._codes()
            self.network.tend(codes)
            over = None not in codes.values()
            if over and (not self._awaited(bound) or codes.get(0) == 0):
                return [code for _, code in sorted(codes.items()) if code is not None]
            time.sleep(POLL)
        return None

    def close(self) -> None:
        """End all that is left of the run."""
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.network.close()
        self.log.close()
        for pid in processes_with(str(self.folder / "run")):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _start_apart(self, host: int) -> None:
        self._start(
            host,
            *self.network.options(host),
            "--hosts",
            str(self.hosts),
            "--host-id",
            str(host),
        )

    def _start(self, host: int, *options: str) -> None:
        command = self.network.inside(host, [*self.command, *options])
        self.processes[host] = subprocess.Popen(
            command,
            env=self.environment,
            stdout=self.log,
            stderr=self.log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _codes(
        self,
    ) -> dict[int, int | None]:
        return {host: process.poll() for host, process in self.processes.items()}

    def _note_killed(self) -> None:
        """Set the time at which a host that was killed starts again, once a host."""
        if self.fault.again is None:
            return
        for host, code in self._codes().items():
            if code == -signal.SIGKILL and host not in self._killed:
                self._killed.add(host)
                self._restarts[host] = time.time() + self.fault.again

    def _start_again(self) -> None:
        due = [host for host, at in self._restarts.items() if time.time() >= at]
        for host in due:
            del self._restarts[host]
            self._start_apart(host)

    def _awaited(self, bound: float) -> bool:
        """Return whether a host is still to be started within the bound."""
        return any(at < time.time() + bound for at in self._restarts.values())


def _environment(
    folder: Path,
    faulty: bool,
) -> dict[str, str]:
    dropped = ("XLA_FLAGS", "LEPTON_FAULTS")
    environment = {k: v for k, v in os.environ.items() if k not in dropped}
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    if faulty:
        environment["LEPTON_FAULTS"] = str(folder / "faults.json")
    return environment


def _command(
    folder: Path,
    devices: int,
    fault: Fault,
) -> list[str]:
    limits = []
    for name, limit in LIMITS.items():
        limits += ["--limit", f"{name}={limit}"]
    return [
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


class Trial:
    """One fault in one run, in a folder of its own.

    Args:
      folder: for it; what is there is removed.
      hosts, devices: processes, and virtual devices of each.
      fault: what happens.
      options: further ones of the command line.
      rounding: relative difference of losses on fewer devices.

    Attributes:
      restarts: after `run`: (host, cause) of each failure that was noticed.
      last: how the last of its runs ended.
    """

    def __init__(
        self,
        folder: Path,
        hosts: int,
        devices: int,
        fault: Fault,
        options: Sequence[str] = (),
        rounding: float = ROUNDING,
    ):
        self.folder = folder
        self.hosts = hosts
        self.devices = devices
        self.fault = fault
        self.options = options
        self.rounding = rounding
        self.restarts: list[tuple[int, str]] = []
        self.last: Ending | None = None
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "faults.json").write_text(json.dumps(fault.stages))

    def run(self, reference: Ending) -> dict[str, Any]:
        """Run it and judge it; return a row of the campaign's results."""
        began = time.monotonic()
        bound = BOUND * max(1, len(self.fault.stages) / 2)
        run = Processes(self.folder, self.hosts, self.devices, self.fault, self.options)
        try:
            first = look(self.folder, run.wait(bound))
        finally:
            run.close()
        self.last = first

        wrong = self._judge(first, reference) or run.network.wrong()
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
        harmless = dataclasses.replace(self.fault, options=(), apart=False)
        run = Processes(
            self.folder,
            self.hosts,
            self.devices,
            harmless,
            self.options,
            faulty=False,
        )
        try:
            self.last = look(self.folder, run.wait(BOUND))
        finally:
            run.close()
        return self.last

    @property
    def fired(self) -> list[float]:
        """Unix times of the faults; a link is cut a moment after it was asked for."""
        files = {}
        for what in ("fired", "cut"):
            for path in self.folder.glob(f"faults.json.{what}.*"):
                files[path.suffix] = path
        return sorted(json.loads(path.read_text())["time"] for path in files.values())

    def to_next_step(self) -> float | None:
        """Return the seconds from the last fault to the next step, if there was one."""
        fired = self.fired
        if not fired:
            return None
        files = self.folder.glob("faults.json.stepped.*")
        steps = [json.loads(path.read_text())["time"] for path in files]
        after = [at for at in steps if at > fired[-1]]
        return round(min(after) - fired[-1], 2) if after else None

    def _judge(
        self,
        first: Ending,
        reference: Ending,
    ) -> str | None:
        if first.codes is None:
            return "it hangs"
        promise = PROMISES[self.fault.promise]
        return promise(self.fault, first, reference, self)


def reference(
    folder: Path,
    hosts: int,
    devices: int,
    options: Sequence[str] = (),
) -> Ending:
    """Return how an undisturbed run ends; it is made once for a campaign.

    Args:
      folder: of the campaign.
      hosts: processes of a run.
      devices: virtual ones of each.
      options: further ones of the command line.

    Raises:
      LeptonError: it fails by itself.
    """
    trial = folder / "undisturbed"
    if not (trial / "done").exists():
        shutil.rmtree(trial, ignore_errors=True)
        trial.mkdir(parents=True)
        (trial / "faults.json").write_text("[]")
        run = Processes(trial, hosts, devices, Fault("none", "unharmed"), options)
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
