"""In the worker: a thread that tells the supervisor what the process is doing, and a
way to have its stack at any time.

It must speak while the main thread computes, waits or hangs. The stack is written by a
signal's handler in C, which needs no interpreter: it works also where something holds
that for ever.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import json
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

from lepton_jax.errors import LeptonError
from lepton_jax.hosts import phase
from lepton_jax.launch.rules import Limits

VARIABLE = "LEPTON_WORKER"
EVERY = 0.5  # seconds between two lines
LOOK = 0.1  # seconds between two looks
SHOW_STACK = signal.SIGRTMIN + 7 if hasattr(signal, "SIGRTMIN") else signal.SIGUSR2
PR_SET_PDEATHSIG = 1
# exit code of a worker that stopped so that the run may go on with other hosts
AGAIN = 75
INTERRUPTED = 130  # of one that was asked to stop by a person, and has saved
# of one that was asked to stop where it could not agree on it with the others: they
# wait for it in vain
EARLY = 131
COUNTED = ("data", "steps", "evaluation", "save")  # phases whose seconds are told
_watchdog: Watchdog | None = None
_device_memory: int | None = None


@dataclass(frozen=True)
class Told:
    """What the supervisor tells its worker.

    Args:
      generation: which attempt this is, from 1.
      hosts, host_id: how many take part in it, and which of them this is; a host that
        is lost leaves no gap.
      coordinator: "name:port" for JAX; None where there is one host.
      run_dir: of the run.
      limits: those that are not the usual ones.
      pipe, stack, lifeline: file descriptors: lines to the supervisor, the stack, and
        what ends with the supervisor.
      parent: process id of the supervisor.
    """

    generation: int
    hosts: int
    host_id: int
    coordinator: str | None
    run_dir: str | None
    limits: dict[str, float]
    pipe: int
    stack: int
    lifeline: int
    parent: int


def begin(environ: MutableMapping[str, str] = os.environ) -> Told | None:
    """Start the watchdog if this process is a worker, once; what its supervisor told
    it, else None.

    From then on the process ends when its supervisor does.
    """
    global _watchdog
    if _watchdog is None and VARIABLE in environ:
        # not for its children: neither the variable nor the pipes
        _watchdog = Watchdog(Told(**json.loads(environ.pop(VARIABLE))))
        _watchdog.start()
    return None if _watchdog is None else _watchdog.told


def tell(error: LeptonError) -> bool:
    """Hand a person's mistake to the supervisor, which shows it once for all hosts;
    False if there is none to take it.
    """
    if _watchdog is None:
        return False
    return _watchdog.write(
        {
            "error": {
                "what": error.what,
                "where": error.where,
                "remedy": error.remedy,
            }
        },
        patience=5.0,
    )


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """Inside, a worker that fails ends at once: at its exit JAX waits minutes for the
    other hosts, who wait for this one.
    """
    try:
        yield
    except SystemExit:
        raise
    except BaseException:
        if _watchdog is None:
            raise
        traceback.print_exc()
        leave(1)


def leave(code: int) -> int:
    """The exit code; a worker that failed ends here and now, see `leaving`."""
    if _watchdog is not None and code not in (0, AGAIN, INTERRUPTED):
        _watchdog.write(_watchdog.line())
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)
    return code


def reading(limit: float) -> dict[str, Any]:
    """How this process stands, as the fields of a `verdict.Place`."""
    at = phase.where()
    spent = phase.spent()
    return {
        "phase": at.phase,
        "step": at.step,
        "done": at.done,
        "age": round(time.monotonic() - at.since, 3),
        "limit": limit,
        **{name: round(spent[name], 3) for name in COUNTED},
        "memory": _resident(),
        "device_memory": _device_memory,
    }


def measure(
    read: Callable[[], int | None],
    every: float = 5.0,
) -> None:
    """Have the devices' memory read from time to time, by a thread of its own: a device
    that does not answer must not silence the watchdog.

    Args:
      read: bytes in use on the device that has the most; None: it can't be known.
      every: seconds.
    """

    def run() -> None:
        global _device_memory
        while (found := read()) is not None:
            _device_memory = found
            time.sleep(every)

    threading.Thread(target=run, name="memory", daemon=True).start()


def _resident() -> int | None:
    """Bytes of this process that lie in memory, where the system tells."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


class Watchdog(threading.Thread):
    """Writes a line of what `reading` gives each half second, and at once when the
    phase changes; see `Told`.
    """

    def __init__(self, told: Told):
        super().__init__(name="watchdog", daemon=True)
        self.told = told
        self.limits = Limits(told.limits)
        self._lock = threading.Lock()

    def start(self) -> None:
        for end in (self.told.pipe, self.told.stack, self.told.lifeline):
            os.set_inheritable(end, False)
            os.set_blocking(end, False)  # nobody may be reading
        if sys.platform == "linux":
            ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != self.told.parent:
            _end()
        # of a process that is killed the last line is up to `EVERY` old
        atexit.register(lambda: self.write(self.line()))
        faulthandler.register(
            SHOW_STACK,
            file=self.told.stack,
            all_threads=True,
        )
        super().start()

    def run(self) -> None:
        last = phase.where()
        told = 0.0
        written = None
        while True:
            at = phase.where()
            now = time.monotonic()
            if at.since != last.since and at.phase == last.phase == "steps":
                self.limits.saw(at.since - last.since)
            limit = self.limits.of(at.phase)
            if at.phase != last.phase or now - told >= EVERY:
                self.write(self.line())
                told = now
            if now - at.since > limit and written != at:
                faulthandler.dump_traceback(self.told.stack)
                written = at
            last = at
            if select.select([self.told.lifeline], [], [], LOOK)[0]:
                _end()

    def line(self) -> dict[str, Any]:
        return reading(self.limits.of(phase.where().phase))

    def write(
        self,
        line: dict[str, Any],
        patience: float = 0.0,
    ) -> bool:
        """A line, if there is room for it within `patience` seconds."""
        text = json.dumps(line).encode() + b"\n"
        until = time.monotonic() + patience
        with self._lock:
            while text:
                try:
                    text = text[os.write(self.told.pipe, text) :]
                except BlockingIOError:
                    if time.monotonic() > until:
                        # a line shorter than the pipe's unit is written whole or not at
                        # all
                        return False
                    select.select(
                        [],
                        [self.told.pipe],
                        [],
                        0.1,
                    )
                except OSError:
                    return False
        return True


def _end() -> None:
    """With all that the worker has started, if it has a group of its own."""
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
