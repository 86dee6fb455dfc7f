"""The worker process of one host, as its supervisor holds it.

It is started, listened to, asked to stop, and ended with all that it started.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from lepton_jax.launch.children import CHUNK, pass_on
from lepton_jax.launch.supervise.rules import DEFAULTS, nested
from lepton_jax.launch.supervise.verdict import Place, frames
from lepton_jax.launch.supervise.watchdog import SHOW_STACK, VARIABLE, Assignment

QUIET = 0.2  # seconds without more after which a stack is whole
MOST = 1 << 20  # bytes of a stack, or of a line
FORWARDING_TIME = 2.0  # seconds to forward what is left of an ended worker's output


class Worker:
    """A worker process in a group of its own.

    Args:
      command: of the process.
      environment: all of its variables.
      fields: of the worker's `watchdog.Assignment`, without the pipes.
      forward: takes the output stream, in a thread; None: the worker writes to this
        process's own output, or as good as that.

    Attributes:
      generation: the attempt that the worker belongs to.
      heard: time of its last line (monotonic); None before the first one.
      error: the mistake of a person that it reported.

    Raises:
      OSError: it can't be started.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        fields: Mapping[str, Any],
        forward: Callable[[IO[bytes]], None] | None = None,
    ):
        self._pipe, pipe = os.pipe()
        self._stack, stack = os.pipe()
        lifeline, self._lifeline = os.pipe()
        self._open = {self._pipe, self._stack}
        assignment = Assignment(
            **fields,
            pipe=pipe,
            stack=stack,
            lifeline=lifeline,
            parent=os.getpid(),
        )

        streams: dict[str, Any] = {}
        if forward is not None:
            streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        elif assignment.hosts > 1:
            # Gloo's words are taken out
            streams = {"stdout": subprocess.PIPE}
            forward = pass_on

        self.process = self._start(command, environment, assignment, streams)
        for end in self._open:
            os.set_blocking(end, False)
        self._forwarding: threading.Thread | None = None
        if forward is not None:
            self._forwarding = threading.Thread(
                target=forward,
                args=(self.process.stdout,),
                daemon=True,
            )
            self._forwarding.start()

        self.generation = assignment.generation
        self.heard: float | None = None
        self.error: dict[str, Any] | None = None
        self._place = Place(limit=assignment.limits.get("start", DEFAULTS["start"]))
        self._at = time.monotonic()
        self._lines = b""
        self._text = b""
        self._text_at: float | None = None
        self._asked = False
        self._until: float | None = None

    def _start(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        assignment: Assignment,
        streams: Mapping[str, Any],
    ) -> subprocess.Popen:
        theirs = (assignment.pipe, assignment.stack, assignment.lifeline)
        try:
            # a group of its own: Ctrl-C in the terminal reaches the supervisor alone
            return subprocess.Popen(
                command,
                env={**environment, VARIABLE: json.dumps(vars(assignment))},
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

    # ---- what it says ----

    def wait(
        self,
        others: Sequence[Any],
        seconds: float,
    ) -> None:
        """Wait until it speaks, one of `others` can be read, or the time is over."""
        select.select(
            [*others, *self._open],
            [],
            [],
            seconds,
        )

    def listen(self, now: float) -> None:
        """Read what it has written since the last call."""
        self._lines += self._read(self._pipe)
        *lines, self._lines = self._lines[-MOST:].split(b"\n")
        for line in lines:
            # the first line after a pipe that was full may be cut
            with contextlib.suppress(ValueError):
                message = json.loads(line)
                self.heard = now
                if "error" in message:
                    self.error = message["error"]
                else:
                    self._place = Place(**message)
                    self._at = now

        text = self._read(self._stack)
        if text:
            self._text = (self._text + text)[-MOST:]
            self._text_at = now

    def _read(self, end: int) -> bytes:
        if end not in self._open:
            return b""
        try:
            data = os.read(end, CHUNK)
        except BlockingIOError:
            return b""
        if not data:
            self._open.remove(end)
            os.close(end)
        return data

    def place(self, now: float) -> Place:
        """Return where it was last seen, with the time since then in `age`."""
        return self._place._replace(age=self._place.age + now - self._at)

    def held_up(self, seconds: float) -> None:
        """Make up for a time in which this process itself was stopped."""
        self._at += seconds
        if self.heard is not None:
            self.heard += seconds

    def silent(self, now: float) -> float:
        """Return the seconds since its last line.

        0 before the first line, when the limit of "start" watches over it.
        """
        return 0.0 if self.heard is None else now - self.heard

    def over(self, now: float) -> bool:
        """Whether it is over its limit, as this process, one further out, sees it."""
        place = self.place(now)
        return place.age > nested(place.limit, 1)

    def state(self) -> str:
        """Return the system's letter for its state.

        "T" is stopped; empty where the system does not tell.
        """
        try:
            stat = Path(f"/proc/{self.process.pid}/stat").read_text()
        except OSError:
            return ""
        after_name = stat.rpartition(")")[2]
        return after_name.split()[0].upper()

    def ask_stack(self) -> None:
        """Ask for its stack, which comes after a moment, as `stack`.

        A process without a watchdog yet would be ended by the question.
        """
        if self.heard is not None:
            self._signal(SHOW_STACK)

    def stack(self, now: float) -> tuple[str, ...]:
        """Return a stack that has come and was not taken yet, innermost first."""
        if self._text_at is None or now - self._text_at < QUIET:
            return ()
        text = self._text.decode(errors="replace")
        self._text = b""
        self._text_at = None
        return frames(text)

    # ---- its end ----

    def stop(self) -> None:
        """Send SIGTERM, once."""
        if not self._asked:
            self._asked = True
            self._signal(signal.SIGTERM)

    def end(
        self,
        seconds: float,
        now: float,
    ) -> None:
        """Send SIGTERM, and after some seconds SIGKILL."""
        if seconds:
            self.stop()
        until = now + seconds
        self._until = until if self._until is None else min(until, self._until)

    def code(self, now: float) -> int | None:
        """Return its exit code once it and all that it had started have ended.

        -n for signal n; None while it runs.
        """
        if self._until is not None and now > self._until:
            self.kill()
        # The end is seen but not yet collected: until the group is killed, its number
        # must not become another's.
        look = os.WEXITED | os.WNOHANG | os.WNOWAIT
        if os.waitid(os.P_PID, self.process.pid, look) is None:
            return None

        self.kill()
        self.listen(now)
        code = self.process.wait()
        if self._forwarding is not None:
            self._forwarding.join(timeout=FORWARDING_TIME)
        self._close()
        return code

    def kill(self) -> None:
        """Kill it and all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def _close(self) -> None:
        for end in (*self._open, self._lifeline):
            os.close(end)
        self._open = set()
