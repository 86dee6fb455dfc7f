"""Child processes: their environment, their output, and hosts started together.

`spawn` runs one process for each host, and one that fails ends all. A supervisor, which
restarts its worker, is in `supervise/`.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from lepton_jax.errors import LeptonError, SettingError
from lepton_jax.launch import tokens

ROOT = Path(__file__).resolve().parents[2]
# assumption: seconds from asking a host to end until it is killed; one that waits for a
# lost host can't hear
GRACE = 10.0
# assumption: the same after a signal from outside, when all hosts are there and may
# save
GRACE_TO_SAVE = 90.0
POLL = 0.05  # seconds between two looks at the processes
READER_TIME = 5  # seconds for a thread to forward what is left of an output
CHUNK = 1 << 16  # bytes of one read
# XLA's Gloo writes this to the standard output of every worker on a CPU; it may come in
# the middle of a line (jaxlib 0.10)
GLOO = re.compile(
    rb"\[Gloo\] Rank \d+ is connected to \d+ peer ranks\. Expected number of connected"
    rb" peer ranks is : \d+\n"
)
GLOO_BEGINS = b"[Gloo] Rank "
LONGEST_GLOO = 160  # bytes
LOCK = threading.Lock()  # of standard error


def python() -> list[str]:
    """Return the command that starts a worker, before its arguments."""
    return [sys.executable, "-m", "lepton_jax", "launch"]


def variables(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a process that runs this very package, unbuffered.

    The run's token is left out: it is only for those that speak with other hosts.

    Args:
      more: variables on top of this process's own.
    """
    environ = {**os.environ, "PYTHONUNBUFFERED": "1"}
    environ.pop(tokens.VARIABLE, None)
    paths = [str(ROOT), os.environ.get("PYTHONPATH")]
    environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return {**environ, **(more or {})}


# ---- hosts started together ----


def spawn(
    commands: Sequence[Sequence[str]],
    environment: Mapping[str, str] | None = None,
    *,
    lifeline: bool = False,
    with_fewer: bool = False,
    first: str = "",
) -> int:
    """Start a process for each host and wait for them; one that fails ends all.

    Host 0 writes to this process's output. What the others write comes on standard
    error, behind `[host I] `.

    Args:
      commands: one for each host.
      environment: variables to set on top of this process's own.
      lifeline: the processes are told to end by the end of their standard input instead
        of by a signal, which ssh would not pass on.
      with_fewer: a process that fails ends no other, and host 0's exit code counts.
      first: with `lifeline`, the text that each process reads first there.

    Returns:
      0, or the exit code of the host that failed first (128 + n if signal n ended it);
      130 if a signal asked for the end.

    Raises:
      SettingError: a process can't be started.
    """
    inherited = variables(environment)
    processes: list[subprocess.Popen] = []
    readers: list[threading.Thread] = []
    lock = threading.Lock()
    with _passing_on(processes) as signalled:
        try:
            for host, command in enumerate(commands):
                process = _started(host, command, inherited, lifeline)
                processes.append(process)
                _write_first(process, first)
                if host:
                    reader = threading.Thread(
                        target=forward,
                        args=(process.stdout, host, lock),
                        daemon=True,
                    )
                    readers.append(reader)
                    reader.start()
            failed = _wait(processes, signalled, with_fewer)
        finally:
            _end(processes)
            for reader in readers:
                reader.join(timeout=READER_TIME)

    if with_fewer:
        failed = 0 if processes[0].returncode else None
    if failed is None:
        return 0
    if signalled:
        return 130
    return _report_failure(failed, processes)


def _started(
    host: int,
    command: Sequence[str],
    environment: Mapping[str, str],
    lifeline: bool,
) -> subprocess.Popen:
    pipes: dict[str, Any] = {
        "stdin": subprocess.PIPE if lifeline else subprocess.DEVNULL
    }
    if host:
        pipes |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    try:
        # a group of its own: Ctrl-C in the terminal would reach it twice
        return subprocess.Popen(
            command,
            env=environment,
            process_group=0,
            **pipes,
        )
    except OSError as error:
        raise SettingError(
            f"host {host} can't be started: {error.strerror}",
            where=command[0],
            remedy="start fewer hosts, or fix that and start again",
        ) from error


def _write_first(process: subprocess.Popen, text: str) -> None:
    if process.stdin is None:
        return
    with contextlib.suppress(OSError):  # it has ended already
        process.stdin.write(text.encode())
        process.stdin.flush()


def _report_failure(failed: int, processes: Sequence[subprocess.Popen]) -> int:
    """Say on standard error which host failed; return this process's exit code."""
    code = processes[failed].returncode
    how = f"ended with exit code {code}"
    if code < 0:
        how = f"was ended by {signal.Signals(-code).name}"
    output = f", behind [host {failed}]" if failed else ""
    fault = LeptonError(
        f"host {failed} {how}; the others were stopped",
        where=f"host {failed} of {len(processes)}",
        remedy=f"see what it wrote above{output}",
    )
    print(f"error: {fault}", file=sys.stderr, flush=True)
    return 128 - code if code < 0 else code


@contextlib.contextmanager
def _passing_on(processes: Sequence[subprocess.Popen]) -> Iterator[list[int]]:
    """Pass SIGINT and SIGTERM on to all processes inside the block.

    Yields a list to which each signal that comes is added.
    """
    signals: list[int] = []

    def pass_signal_on(number: int, _: Any) -> None:
        signals.append(number)
        for process in processes:
            _ask_to_end(process, number)

    # only there may handlers be set
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    handlers = {
        number: signal.signal(number, pass_signal_on)
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield signals
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _wait(
    processes: Sequence[subprocess.Popen],
    signalled: Sequence[int],
    with_fewer: bool,
) -> int | None:
    """Wait until all processes have ended well or one has failed; return its number.

    After a signal, wait until all have ended or the grace is over; `with_fewer`, until
    all have ended, whatever their exit codes.
    """
    failed: int | None = None
    until: float | None = None
    while True:
        codes = [process.poll() for process in processes]
        if failed is None:
            failed = next((host for host, code in enumerate(codes) if code), None)
        if None not in codes:
            return failed
        if failed is not None and not signalled and not with_fewer:
            return failed
        if signalled:
            until = until or time.monotonic() + GRACE_TO_SAVE
            if time.monotonic() > until:
                return codes.index(None) if failed is None else failed
        time.sleep(POLL)


def _end(processes: Sequence[subprocess.Popen]) -> None:
    """Ask the processes that still run to end, and kill them after the grace."""
    running = [process for process in processes if process.poll() is None]
    for process in running:
        _ask_to_end(process, signal.SIGTERM)

    until = time.monotonic() + GRACE
    for process in running:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    for process in processes:
        if process.stdin is not None:
            process.stdin.close()


def _ask_to_end(process: subprocess.Popen, number: int) -> None:
    """Send a signal, or close the standard input where that is the lifeline."""
    if process.stdin is not None:
        process.stdin.close()
    elif process.poll() is None:
        process.send_signal(number)


# ---- their output ----


def forward(
    stream: IO[bytes],
    host: int,
    lock: threading.Lock = LOCK,
) -> None:
    """Copy a host's lines to standard error behind `[host I] `, until the stream ends.

    What Gloo says there is left out.
    """
    with stream:
        for line in stream:
            line = GLOO.sub(b"", line)
            if not line:
                continue
            text = line.decode(errors="replace").rstrip("\r\n")
            # a closed terminal is no reason to block the host
            with lock, contextlib.suppress(OSError):
                # in one piece, for host 0 writes there too
                sys.stderr.write(f"[host {host}] {text}\n")
                sys.stderr.flush()


def pass_on(stream: IO[bytes]) -> None:
    """Copy a stream to standard output as it comes, without Gloo's words.

    The beginning of what may become Gloo's line is held back until it is known.
    """
    held = b""
    # if nobody reads any more, closing the stream lets the worker hear of it
    with stream, contextlib.suppress(OSError):
        while True:
            chunk = os.read(stream.fileno(), CHUNK)
            text = GLOO.sub(b"", held + chunk)
            held = _unfinished(text) if chunk else b""

            text = text[: len(text) - len(held)]
            while text:
                text = text[os.write(1, text) :]
            if not chunk:
                return


def _unfinished(text: bytes) -> bytes:
    """Return the end of a text, if it may be the beginning of Gloo's line."""
    tail = text[max(text.rfind(b"["), 0) :]
    head = tail[: len(GLOO_BEGINS)]
    may_be_gloo = head != b"" and GLOO_BEGINS.startswith(head)
    if may_be_gloo and len(tail) < LONGEST_GLOO and b"\n" not in tail:
        return tail
    return b""
