"""Ctrl-C while a run trains."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def on_interrupt(ask: Callable[[], None]) -> Iterator[None]:
    """Inside, the first Ctrl-C calls `ask`; the second one stops the process.

    Only the main thread of a process can receive signals: in others this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    before = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: Any) -> None:
        ask()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        # None: the handler was not installed by Python, and can't be put back by it.
        if before is not None:
            signal.signal(signal.SIGINT, before)
