"""Requests to a run that is under way, as files in the run folder's `control/`.

A client puts a request there as a file that appears whole. The run claims it by
deleting the file, and writes an answer of the same name:

    client                                  run
    writes 17-4.request.part, renames it
    to 17-4.request                         reads 17-4.request, deletes it
                                            does what it asks
                                            writes 17-4.answer
    reads 17-4.answer, deletes it

Whoever may write into the folder may ask. `run.json`, which only the run's owner can
read, holds a token for servers that pass on requests from elsewhere. The run keeps a
lock on that file as long as it lives, so a file without a lock is that of a run that
was killed.

What a request means is not known here: see `lepton_jax.controller.live`.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import json
import os
import platform
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lepton_jax.errors import LeptonError, SettingError, writing_remedy

FOLDER = "control"
CARD = "run.json"

# All of these are assumptions.
# Seconds between two looks at the folder: a person notices no longer wait.
POLL_SECONDS = 0.25
# Seconds that an answer may take once the run has claimed the request: an evaluation
# may be long.
TIME_TO_DO = 120.0
# Seconds after which an answer that nobody fetched is that of a client long gone.
STALE_SECONDS = 3600.0
# Times that a lock or a card is looked for, and seconds between them: another process
# holds the lock for a moment while it looks whether the run lives.
TRIES = 20
TRY_SECONDS = 0.05
# Seconds between two looks for an answer, and between two checks that the run lives.
ANSWER_SECONDS = 0.02
ALIVE_SECONDS = 0.5

# The name of a request, and its content.
Letter = tuple[str, dict[str, Any]]


class Mailbox:
    """The run's end of the folder.

    Args:
      folder: the run folder.

    Raises:
      SettingError: another process is at work in the folder.
      LeptonError: the folder can't be made.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder) / FOLDER
        self._polled = 0.0
        self._file = -1
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_stale()
            self._file = os.open(
                self.folder / CARD,
                os.O_RDWR | os.O_CREAT,
                0o600,
            )
            self._lock()
            os.ftruncate(self._file, 0)
            os.write(self._file, json.dumps(_card()).encode())
        except OSError as error:
            raise LeptonError(
                "the run's folder for requests can't be made:"
                f" {error.strerror or error}",
                where=self.folder,
                remedy=f"{writing_remedy(error)}, or name another run folder",
            ) from error

    def take(self) -> list[Letter]:
        """Claim the next request, if it is time to look into the folder.

        It is one request at a time, because a request may halt the run.
        """
        now = time.monotonic()
        if self._file < 0 or now - self._polled < POLL_SECONDS:
            return []
        claimed = next(self._claimed(), None)
        if claimed is None:
            self._polled = now
            return []
        return [claimed]

    def answer(
        self,
        name: str,
        answer: dict[str, Any],
    ) -> None:
        """Answer the request of this name."""
        if self._file < 0:
            return
        # If the disk is full the client finds out by waiting; the run goes on.
        with contextlib.suppress(OSError):
            _put(self.folder / f"{name}.answer", answer)

    def close(self, status: str) -> None:
        """Tell the clients that still ask that the run has ended."""
        if self._file < 0:
            return
        for name, _ in self._claimed():
            self.answer(name, {"ok": False, "text": f"the run has ended: {status}"})
        (self.folder / CARD).unlink(missing_ok=True)
        os.close(self._file)
        self._file = -1
        # The folder stays if there are answers that nobody has fetched yet.
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _claimed(self) -> Iterator[Letter]:
        """Claim the requests in the folder, in their order.

        Deleting the file is what makes a request this run's.
        """
        for path in sorted(self.folder.glob("*.request")):
            try:
                request = json.loads(path.read_text())
                path.unlink()
            except (OSError, ValueError):  # withdrawn, or not written by `ask`
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
                continue
            if isinstance(request, dict) and request.get("until", 0) > time.time():
                yield path.stem, request

    def _remove_stale(self) -> None:
        answers = self.folder.glob("*.answer")
        parts = self.folder.glob("*.part")
        for path in (*answers, *parts):
            age = time.time() - path.stat().st_mtime
            if age > STALE_SECONDS:
                path.unlink(missing_ok=True)

    def _lock(self) -> None:
        for attempt in range(TRIES):
            if attempt:
                time.sleep(TRY_SECONDS)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                continue
            except OSError:  # a file system without locks
                return
        os.close(self._file)
        self._file = -1
        raise SettingError(
            "another process is at work in this run folder:"
            f" {_place(_read_card(self.folder))}",
            where=self.folder.parent,
            remedy=(
                "wait for it, stop it with tools/control.py RUN stop, or name "
                "another folder"
            ),
        )


class NoMailbox(Mailbox):
    """The mailbox of a run that nobody can ask."""

    def __init__(self) -> None:
        pass

    def take(self) -> list[Letter]:
        return []

    def answer(
        self,
        name: str,
        answer: dict[str, Any],
    ) -> None:
        pass

    def close(self, status: str) -> None:
        pass


# ---- the client's end ----


def ask(
    folder: Path,
    request: dict[str, Any],
    timeout: float = 60.0,
) -> dict[str, Any]:
    """Put a request to the run in a folder, and wait for the answer.

    A request that the run does not claim in time is withdrawn.

    Args:
      folder: the run folder.
      request: {"do": a verb, "settings": {name: text}}; see
        `lepton_jax.controller.live.REQUESTS`.
      timeout: seconds to wait: a run that compiles answers when it steps.

    Returns:
      {"ok": whether it was done, "step": after which, "text": in words, ...}; with
      "remedy" if it was refused.

    Raises:
      SettingError: no run is at work there, or it does not answer.
    """
    folder = Path(folder)
    _check_alive(folder)
    control = folder / FOLDER
    name = f"{time.time_ns():020}-{os.getpid()}-{secrets.token_hex(4)}"
    path = control / f"{name}.request"
    request = {
        "who": f"{getpass.getuser()}@{platform.node()}",
        "pid": os.getpid(),
        **request,
        "until": time.time() + timeout,
    }
    try:
        _put(path, request)
    except OSError as error:
        raise SettingError(
            f"the request can't be written: {error.strerror or error}",
            where=control,
            remedy="ask as a user who may write into the run folder",
        ) from error

    answer = control / f"{name}.answer"
    try:
        _wait_for(answer, path, folder, timeout)
        content = json.loads(answer.read_text())
        answer.unlink(missing_ok=True)
        # If the run has ended the last client to leave removes the folder.
        with contextlib.suppress(OSError):
            control.rmdir()
        return content
    finally:
        path.unlink(missing_ok=True)


def holder(folder: Path) -> dict[str, Any] | None:
    """Return {"pid", "host", "began", "token"} of the run at work in a folder.

    It is None if there is none.
    """
    return _read_card(Path(folder) / FOLDER)


def _wait_for(
    answer: Path,
    request: Path,
    folder: Path,
    timeout: float,
) -> None:
    until = time.monotonic() + timeout
    checked = time.monotonic()
    while not answer.exists():
        now = time.monotonic()
        if now > until and _withdrawn(request):
            raise SettingError(
                f"the run did not answer within {timeout:g} s; the request is"
                " withdrawn",
                where=folder,
                remedy="it may be compiling: ask again with a longer --timeout",
            )
        if now > until + TIME_TO_DO:
            raise SettingError(
                f"the run took the request and did not answer within {TIME_TO_DO:g} s",
                where=folder,
                remedy="see its events.jsonl for whether it was done",
            )
        if now - checked > ALIVE_SECONDS:
            if not answer.exists():
                _check_alive(folder, "ended without an answer")
            checked = now
        time.sleep(ANSWER_SECONDS)


def _withdrawn(path: Path) -> bool:
    """Whether the request could still be deleted; if not, the run has claimed it."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True


def _check_alive(
    folder: Path,
    fault: str = "is not at work",
) -> None:
    if not folder.is_dir():
        raise SettingError(
            "there is no such run folder",
            where=folder,
            remedy="name the folder of a run: it holds recipe.json",
        )
    control = folder / FOLDER
    card = _read_card(control)
    for _ in range(TRIES):
        if card is not None or not (control / CARD).exists():
            break
        # The run makes the file, locks it, and only then writes the card.
        time.sleep(TRY_SECONDS)
        card = _read_card(control)
    if card is None or _has_ended(control / CARD, card):
        which = f": {_place(card)} has gone" if card else ""
        raise SettingError(
            f"the run {fault}{which}",
            where=folder,
            remedy=(
                f"go on with it by launch.py --resume {folder}, or name a run that is"
                " under way"
            ),
        )


def _has_ended(
    path: Path,
    card: dict[str, Any],
) -> bool:
    """Whether the process that wrote the card has ended, as far as seen from here."""
    if card.get("host") != platform.node():
        return False
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return True
    except OSError:  # the lock is held, or there are no locks here
        return False
    finally:
        os.close(file)


# ---- files ----


def _card() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": platform.node(),
        "began": time.time(),
        "token": secrets.token_hex(16),
    }


def _read_card(control: Path) -> dict[str, Any] | None:
    try:
        card = json.loads((control / CARD).read_text())
    except PermissionError:
        # The run is another user's: the folder's own permissions decide whether a
        # request can be written.
        return {"host": None}
    except (OSError, ValueError):
        return None
    return card if isinstance(card, dict) else None


def _place(card: dict[str, Any] | None) -> str:
    if not card:
        return "an unknown one"
    return f"process {card.get('pid')} on {card.get('host')}"


def _put(
    path: Path,
    content: dict[str, Any],
) -> None:
    """Write a file that appears whole."""
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(json.dumps(content))
    os.replace(part, path)
