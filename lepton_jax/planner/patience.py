"""The time that planning may take, and a sign of life while it does."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType

# Seconds without a word. Assumption: who waits for longer wonders whether anything
# happens.
SILENT_SECONDS = 2.0
# Seconds of the planning thread's own computing after which the best plan so far is
# taken. Assumption: as long as XLA takes to compile a large model's step.
LIMIT_SECONDS = 60.0


class Patience:
    """A time limit, and lines on stderr about what is being done when that takes long.

    It is a context manager. The first line comes after `SILENT_SECONDS`, and each next
    one after twice that time: few lines, however long it takes. A thread writes them,
    since one trace of a large model can take minutes.

    The limit counts the computing of the thread that plans, and not what other
    processes of the machine take: what is planned depends on it as little as possible.

    Args:
      doing: what is being done, e.g. "planning for v5p:4x4x4".
      limit: seconds of computing; None: as long as it takes.

    Attributes:
      detail: how far the work is, for the next line; may be set at any time.
      limit: see above.
      cut: whether something was left out because time was over.
    """

    def __init__(
        self,
        doing: str,
        limit: float | None = None,
    ):
        self.doing = doing
        self.detail = ""
        self.limit = limit
        self.cut = False
        self._begun = time.thread_time()
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Patience:
        self._begun = time.thread_time()
        self._thread = threading.Thread(target=self._speak, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()

    @property
    def spent(self) -> float:
        """Seconds of computing so far, in the thread that reads this."""
        return time.thread_time() - self._begun

    def over(self) -> bool:
        """Whether time is over; the caller then leaves out what is left."""
        if self.limit is None or self.spent < self.limit:
            return False
        self.cut = True
        return True

    def _speak(self) -> None:
        begun = time.monotonic()
        wait = SILENT_SECONDS
        while not self._done.wait(wait):
            seconds = time.monotonic() - begun
            detail = f": {self.detail}" if self.detail else ""
            line = f"{self.doing}, {seconds:.0f} s{detail}"
            try:
                print(line, file=sys.stderr, flush=True)
            except (OSError, ValueError):  # a stream that is closed
                return
            wait = seconds
