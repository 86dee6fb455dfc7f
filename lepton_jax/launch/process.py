"""The worker of one host, as its supervisor holds it: started, listened to, asked to
stop, ended with all that it started.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from lepton_jax.launch import tokens
from lepton_jax.launch.rules import DEFAULTS, nested
from lepton_jax.launch.verdict import Place, frames
from lepton_jax.launch.watchdog import SHOW_STACK, VARIABLE, Told

ROOT = Path(__file__).resolve().parents[2]
QUIET = 0.2  # seconds without more after which a stack is whole
MOST = 1 << 20  # bytes of a stack, or of a line
# what XLA's Gloo writes to the standard output of every worker on a CPU; it may come in
# the middle of a line
GLOO = re.compile(
    rb"\[Gloo\] Rank \d+ is connected to \d+ peer ranks\. Expected number of connected"
    rb" peer ranks is : \d+\n"
)
GLOO_BEGINS = b"[Gloo] Rank "
LONGEST_GLOO = 160


def variables(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a process that runs this very package, its output as it comes.

    Without the run's token, which is for those alone that speak with other hosts.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environ = {
        name: value for name, value in os.environ.items() if name != tokens.VARIABLE
    }
    return {
        **environ,
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        **(more or {}),
    }


class Worker:
    """A worker process in a group of its own.

    Args:
      command, environment: of the process; the environment is complete.
      told: what it is told, as in `watchdog.Told`, without the pipes.
      forward: takes its output stream, in a thread; None: it writes to this process's
        own, or as good as that.

    Attributes:
      generation: its attempt.
      heard: when its last line came (monotonic); None before the first one.
      error: the person's mistake that it told of.

    Raises:
      OSError: it can't be started.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        told: Mapping[str, Any],
        forward: Callable[[IO[bytes]], None] | None = None,
    ):
        self._pipe, pipe = os.pipe()
        self._stack, stack = os.pipe()
        lifeline, self._lifeline = os.pipe()
        theirs = (pipe, stack, lifeline)
        self._open = {self._pipe, self._stack}
        full = Told(
            **told,
            pipe=pipe,
            stack=stack,
            lifeline=lifeline,
            parent=os.getpid(),
        )
        streams: dict[str, Any] = (
            {}
            if forward is None
            else {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        )
        if forward is None and full.hosts > 1:
            streams = {"stdout": subprocess.PIPE}
            forward = pass_on
        try:
            # a group of its own: Ctrl-C in the terminal reaches the supervisor alone
            self.process = subprocess.Popen(
                command,
                env={**environment, VARIABLE: json.dumps(vars(full))},
                process_group=0,
                stdin=subprocess.DEVNULL,
                pass_fds=theirs,
                **streams,
            )
        except OSError:
            self._close()
            raise
        finally:
            for end in theirs:
                os.close(end)
        for end in self._open:
            os.set_blocking(end, False)
        self._forwarding = (
            threading.Thread(
                target=forward,
                args=(self.process.stdout,),
                daemon=True,
            )
            if forward
            else None
        )
        if self._forwarding is not None:
            self._forwarding.start()
        self.generation = full.generation
        self.heard: float | None = None
        self.error: dict[str, Any] | None = None
        self._place = Place(limit=full.limits.get("start", DEFAULTS["start"]))
        self._at = time.monotonic()
        self._lines = self._text = b""
        self._text_at: float | None = None
        self._asked = False
        self._until: float | None = None

    def wait(
        self,
        others: Sequence[Any],
        seconds: float,
    ) -> None:
        """Until it says something, one of `others` can be read, or the time is over."""
        select.select(
            [*others, *self._open],
            [],
            [],
            seconds,
        )

    def listen(self, now: float) -> None:
        """Read what it has said."""
        self._lines += self._read(self._pipe)
        *lines, self._lines = self._lines[-MOST:].split(b"\n")
        for line in lines:
            # the first line after a pipe that was full may be cut
            with contextlib.suppress(ValueError):
                said = json.loads(line)
                self.heard = now
                if "error" in said:
                    self.error = said["error"]
                else:
                    self._place = Place(**said)
                    self._at = now
        more = self._read(self._stack)
        if more:
            self._text = (self._text + more)[-MOST:]
            self._text_at = now

    def _read(self, end: int) -> bytes:
        if end not in self._open:
            return b""
        try:
            data = os.read(end, 1 << 16)
        except BlockingIOError:
            return b""
        if not data:
            self._open.remove(end)
            os.close(end)
        return data

    def place(self, now: float) -> Place:
        return self._place._replace(age=self._place.age + now - self._at)

    def held_up(self, seconds: float) -> None:
        """So long this process itself was stopped, and could not listen."""
        self._at += seconds
        if self.heard is not None:
            self.heard += seconds

    def silent(self, now: float) -> float:
        """Seconds since its last line; 0 before the first, when the limit of "start"
        watches over it.
        """
        return 0.0 if self.heard is None else now - self.heard

    def over(self, now: float) -> bool:
        """Whether it is over its limit, as this process, one further out, sees it."""
        at = self.place(now)
        return at.age > nested(at.limit, 1)

    def state(self) -> str:
        """As the system calls it: "T" is stopped; empty where that is not told."""
        try:
            stat = Path(f"/proc/{self.process.pid}/stat").read_text()
        except OSError:
            return ""
        return stat.rpartition(")")[2].split()[0].upper()

    def ask_stack(self) -> None:
        """It comes after a moment, as `stack`; a process without a watchdog yet would
        be ended by the question.
        """
        if self.heard is not None:
            self._signal(SHOW_STACK)

    def stack(self, now: float) -> tuple[str, ...]:
        """A stack that has come and was not taken yet, innermost first."""
        if self._text_at is None or now - self._text_at < QUIET:
            return ()
        text = self._text.decode(errors="replace")
        self._text = b""
        self._text_at = None
        return frames(text)

    def stop(self) -> None:
        """SIGTERM, once."""
        if not self._asked:
            self._asked = True
            self._signal(signal.SIGTERM)

    def end(
        self,
        seconds: float,
        now: float,
    ) -> None:
        """SIGTERM, and SIGKILL after so many seconds."""
        if seconds:
            self.stop()
        until = now + seconds
        self._until = until if self._until is None else min(until, self._until)

    def code(self, now: float) -> int | None:
        """Its exit code once it has ended (-n for signal n), and all that it had
        started as well.
        """
        if self._until is not None and now > self._until:
            self.kill()
        # seen but not yet collected, so that its number can't be another's when its
        # group is ended
        if (
            os.waitid(
                os.P_PID,
                self.process.pid,
                os.WEXITED | os.WNOHANG | os.WNOWAIT,
            )
            is None
        ):
            return None
        self.kill()
        self.listen(now)
        code = self.process.wait()
        if self._forwarding is not None:
            self._forwarding.join(timeout=2.0)
        self._close()
        return code

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def _close(self) -> None:
        for end in (*self._open, self._lifeline):
            os.close(end)
        self._open = set()


def pass_on(stream: IO[bytes]) -> None:
    """All that comes, as it comes, to this process's standard output, but for what Gloo
    says there.
    """
    held = b""
    # nobody reads any more: the worker shall hear of it
    with stream, contextlib.suppress(OSError):
        while True:
            more = os.read(stream.fileno(), 1 << 16)
            text = GLOO.sub(b"", held + more)
            tail = text[max(text.rfind(b"["), 0) :]
            begun = (
                tail[:1] == b"["
                and GLOO_BEGINS.startswith(tail[: len(GLOO_BEGINS)])
                and len(tail) < LONGEST_GLOO
            )
            held = tail if begun and b"\n" not in tail and more else b""
            text = text[: len(text) - len(held)]
            while text:
                text = text[os.write(1, text) :]
            if not more:
                return


def python() -> list[str]:
    """The command that starts a worker, before its arguments."""
    return [sys.executable, "-m", "lepton_jax", "launch"]
