"""In the worker: a thread that tells the supervisor what the process is doing.

It must speak while the main thread computes, waits or hangs. The supervisor can also
have the worker's stack at any time: a signal's handler in C writes it, which needs no
interpreter and works even if something holds the interpreter forever.
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
from lepton_jax.launch.supervise.rules import Limits

VARIABLE = "LEPTON_WORKER"
EVERY = 0.5  # seconds between two lines
LOOK = 0.1  # seconds between two looks
TELLING_TIME = 5.0  # seconds in which the supervisor must take a person's mistake
MEMORY_EVERY = 5.0  # seconds between two looks at the devices' memory
SHOW_STACK = signal.SIGRTMIN + 7 if hasattr(signal, "SIGRTMIN") else signal.SIGUSR2
PR_SET_PDEATHSIG = 1  # of Linux' prctl

# Exit codes of a worker.
# It stopped so that the run may go on with other hosts.
AGAIN = 75
# A person asked it to stop, and it has saved.
INTERRUPTED = 130
# It was asked to stop where it could not agree on that with the others, which now wait
# for it in vain.
EARLY = 131

COUNTED = ("data", "steps", "evaluation", "save")  # phases whose seconds are reported
_watchdog: Watchdog | None = None
_device_memory: int | None = None


@dataclass(frozen=True)
class Assignment:
    """Message from the supervisor to its worker, by the variable LEPTON_WORKER.

    Args:
      generation: number of the attempt, from 1.
      hosts: number of hosts that take part in it.
      host_id: number of this host among them; a host that is lost leaves no gap.
      coordinator: "name:port" for JAX; None where there is one host.
      run_dir: folder of the run.
      limits: those that differ from `rules.DEFAULTS`.
      pipe: file descriptor for lines to the supervisor.
      stack: file descriptor for the stack.
      lifeline: file descriptor that ends with the supervisor.
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


def begin(environ: MutableMapping[str, str] = os.environ) -> Assignment | None:
    """Start the watchdog, once, if this process is a worker.

    From then on the process ends when its supervisor does.

    Returns:
      The supervisor's message; None if this process is no worker.
    """
    global _watchdog
    if _watchdog is None and VARIABLE in environ:
        # neither the variable nor the pipes are for its children
        _watchdog = Watchdog(Assignment(**json.loads(environ.pop(VARIABLE))))
        _watchdog.start()
    return None if _watchdog is None else _watchdog.assignment


def tell(error: LeptonError) -> bool:
    """Hand a person's mistake to the supervisor, which shows it once for all hosts.

    Returns:
      False if there is no supervisor that takes it.
    """
    if _watchdog is None:
        return False
    message = {
        "what": error.what,
        "where": error.where,
        "remedy": error.remedy,
    }
    return _watchdog.write({"error": message}, patience=TELLING_TIME)


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """End a worker at once if it fails inside the block.

    At its exit JAX would wait minutes for the other hosts, which wait for this one.
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
    """Return the exit code; a worker that failed ends here and now, see `leaving`."""
    if _watchdog is not None and code not in (0, AGAIN, INTERRUPTED):
        _watchdog.write(_watchdog.line())
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)
    return code


def reading(limit: float) -> dict[str, Any]:
    """Return this process's state as the fields of a `verdict.Place`.

    Args:
      limit: seconds allowed in the present phase.
    """
    where = phase.where()
    spent = phase.spent()
    seconds = {name: round(spent[name], 3) for name in COUNTED}
    return {
        "phase": where.phase,
        "step": where.step,
        "done": where.done,
        "age": round(time.monotonic() - where.since, 3),
        "limit": limit,
        **seconds,
        "memory": _resident(),
        "device_memory": _device_memory,
    }


def measure(
    read: Callable[[], int | None],
    every: float = MEMORY_EVERY,
) -> None:
    """Have the devices' memory read from time to time, in a thread of its own.

    A device that does not answer must not silence the watchdog.

    Args:
      read: returns the bytes in use on the device that has the most; None: they can't
        be known.
      every: seconds.
    """

    def run() -> None:
        global _device_memory
        while (size := read()) is not None:
            _device_memory = size
            time.sleep(every)

    threading.Thread(target=run, name="memory", daemon=True).start()


def _resident() -> int | None:
    """Return the bytes of this process that lie in memory, where the system tells."""
    try:
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


class Watchdog(threading.Thread):
    """Thread that writes a line every half second, and at once when the phase changes.

    A line is the result of `reading` as JSON.
    """

    def __init__(self, assignment: Assignment):
        super().__init__(name="watchdog", daemon=True)
        self.assignment = assignment
        self.limits = Limits(assignment.limits)
        self._lock = threading.Lock()

    def start(self) -> None:
        """Tie the process to its supervisor, and start the thread."""
        for end in (
            self.assignment.pipe,
            self.assignment.stack,
            self.assignment.lifeline,
        ):
            os.set_inheritable(end, False)
            os.set_blocking(end, False)  # nobody may be reading

        if sys.platform == "linux":
            ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != self.assignment.parent:
            _end()
        # without it, the last line of a process would be up to `EVERY` old
        atexit.register(lambda: self.write(self.line()))
        faulthandler.register(
            SHOW_STACK,
            file=self.assignment.stack,
            all_threads=True,
        )
        super().start()

    def run(self) -> None:
        """Write lines, and the stack when a limit is over, until the lifeline ends."""
        last = phase.where()
        written_at = 0.0
        stack_of = None
        while True:
            where = phase.where()
            now = time.monotonic()
            if where.since != last.since and where.phase == last.phase == "steps":
                self.limits.saw(where.since - last.since)

            limit = self.limits.of(where.phase)
            if where.phase != last.phase or now - written_at >= EVERY:
                self.write(self.line())
                written_at = now
            if now - where.since > limit and stack_of != where:
                faulthandler.dump_traceback(self.assignment.stack)
                stack_of = where
            last = where

            readable, _, _ = select.select(
                [self.assignment.lifeline],
                [],
                [],
                LOOK,
            )
            if readable:
                _end()

    def line(self) -> dict[str, Any]:
        """Return what the process is doing."""
        return reading(self.limits.of(phase.where().phase))

    def write(
        self,
        line: dict[str, Any],
        patience: float = 0.0,
    ) -> bool:
        """Write a line if there is room for it within `patience` seconds."""
        text = json.dumps(line).encode() + b"\n"
        until = time.monotonic() + patience
        with self._lock:
            while text:
                try:
                    text = text[os.write(self.assignment.pipe, text) :]
                except BlockingIOError:
                    if time.monotonic() > until:
                        # a line shorter than the pipe's unit is written whole or not at
                        # all
                        return False
                    select.select(
                        [],
                        [self.assignment.pipe],
                        [],
                        LOOK,
                    )
                except OSError:
                    return False
        return True


def _end() -> None:
    """Kill the worker, with all that it has started if it has a group of its own."""
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
