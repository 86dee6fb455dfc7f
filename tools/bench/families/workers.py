"""Measure in a process of its own, so that a compiler that crashes loses one row."""

from __future__ import annotations

import contextlib
import itertools
import math
import multiprocessing
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from tools.bench.regret import virtual_devices

# Seconds after which a program is given up (assumption: compiling one takes half a
# minute, on a machine with much else to do ten times that).
LONGEST = 1200
# Programs after which a new process begins: compilers keep memory (assumption).
PROGRAMS_A_PROCESS = 16

Row = dict[str, Any]
Measure = Callable[..., Row]


def rows(
    measure: Measure,
    calls: Sequence[tuple[Any, ...]],
    quiet: bool = False,
    jobs: int = 1,
    seconds: float = math.inf,
    a_process: int = PROGRAMS_A_PROCESS,
) -> Iterator[Row]:
    """Call a function for each tuple of arguments, in other processes.

    Args:
      measure: a function of a module; (family, number, ...) to a row.
      calls: its arguments.
      quiet: whether what the processes write to stderr is dropped.
      jobs: number of processes.
      seconds: after which no further call begins.
      a_process: calls after which a new process begins.

    Yields:
      A row for each call that began, as it ends. Where it failed, "outcome" is
      "failed" and "why" says how: the process died, it took too long, or it raised.
    """
    found: queue.Queue[Row | BaseException | None] = queue.Queue()
    end = time.monotonic() + seconds

    def work(part: Sequence[tuple[Any, ...]]) -> None:
        in_time = itertools.takewhile(lambda _: time.monotonic() < end, part)
        try:
            for row in _in_one_process(measure, in_time, quiet, a_process):
                found.put(row)
        except BaseException as error:  # the caller waits for it, or for the end
            found.put(error)
        else:
            found.put(None)

    for i in range(jobs):
        part = calls[i::jobs]
        threading.Thread(target=work, args=(part,), daemon=True).start()
    working = jobs
    while working:
        row = found.get()
        if row is None:
            working -= 1
        elif isinstance(row, BaseException):
            raise row
        else:
            yield row


def once(function: Callable[[], Any]) -> Any:
    """Call a function of a module in a process of its own; return what it returns."""
    with _pool() as pool:
        return pool.submit(function).result(LONGEST)


def _in_one_process(
    measure: Measure,
    calls: Iterable[tuple[Any, ...]],
    quiet: bool,
    most: int,
) -> Iterator[Row]:
    """Yield a row for each call, in order, `most` from one process at a time."""
    pool = None
    for done, call in enumerate(calls):
        if pool is not None and done % most == 0:
            pool.shutdown()
            pool = None
        pool = pool or _pool(quiet)
        try:
            yield pool.submit(_safely, measure, call).result(LONGEST)
        except (BrokenProcessPool, TimeoutError) as error:
            _kill(pool)
            pool = None
            yield _failed(call, type(error).__name__)
    if pool is not None:
        pool.shutdown()


def _pool(quiet: bool = False) -> ProcessPoolExecutor:
    """Return a process that has the virtual devices, and nothing of this one."""
    return ProcessPoolExecutor(
        1,
        multiprocessing.get_context("spawn"),
        _begin,
        (quiet,),
    )


def _begin(quiet: bool) -> None:
    """Prepare the process; keep its compilers' words to itself.

    Args:
      quiet: drop all that it writes to stderr, crashes in a compiler included.
    """
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if quiet:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stderr.fileno())
    virtual_devices()


def _safely(
    measure: Measure,
    call: tuple[Any, ...],
) -> Row:
    """Return the row, or one that says what was raised."""
    try:
        return measure(*call)
    except Exception as error:  # a row tells of it, whatever it was
        return _failed(call, f"{type(error).__name__}: {error}")


def _failed(
    call: tuple[Any, ...],
    why: str,
) -> Row:
    family, number, *_ = call
    return {
        "family": family,
        "number": number,
        "outcome": "failed",
        "why": why,
    }


def _kill(pool: ProcessPoolExecutor) -> None:
    """End the process of a pool, which may hang in a compiler."""
    for process in list(pool._processes.values()):
        # The pool's own thread may have just taken note of its death.
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    pool.shutdown(wait=False, cancel_futures=True)
