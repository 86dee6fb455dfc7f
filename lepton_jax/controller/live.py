"""A person's requests to a run that is under way, as files in the run folder's
`control/`.

A request is a file that appears whole; the run claims it by deleting it, does it
between two steps and writes an answer of the same name. Whoever may write into the
folder may ask; `run.json`, which the run's owner alone can read, holds a token for
servers that pass on requests from elsewhere. The run keeps a lock on that file as long
as it lives.
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

from lepton_jax.controller.knobs import settable
from lepton_jax.controller.state import set_base, with_rate_factor
from lepton_jax.errors import LeptonError, SettingError, nearest, writing_remedy
from lepton_jax.hosts.phase import reached

FOLDER = "control"
POLL_SECONDS = 0.25
# seconds that an answer may take once the run has claimed the request: an evaluation
# may be long
TIME_TO_DO = 120.0
REQUESTS = ("set", "save", "evaluate", "pause", "resume", "stop", "status")


class Live:
    """The run's end: who holds it may be asked.

    Args:
      folder: of the run. None: nobody can ask here; where several hosts train, all but
        host 0 only do what it was asked.

    Attributes:
      paused: whether somebody asked for a pause.

    Raises:
      SettingError: another process is at work in the folder.
    """

    def __init__(self, folder: Path | None):
        self.paused = False
        self._polled = 0.0
        self._file = -1
        if folder is None:
            return
        self.folder = Path(folder) / FOLDER
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for old in (*self.folder.glob("*.answer"), *self.folder.glob("*.part")):
                # of a client that has long gone
                if time.time() - old.stat().st_mtime > 3600:
                    old.unlink(missing_ok=True)
            self._file = os.open(
                self.folder / "run.json", os.O_RDWR | os.O_CREAT, 0o600
            )
            self._lock()
            os.ftruncate(self._file, 0)
            os.write(
                self._file,
                json.dumps(
                    {
                        "pid": os.getpid(),
                        "host": platform.node(),
                        "began": time.time(),
                        "token": secrets.token_hex(16),
                    }
                ).encode(),
            )
        except OSError as error:
            raise LeptonError(
                "the run's folder for requests can't be made:"
                f" {error.strerror or error}",
                where=self.folder,
                remedy=f"{writing_remedy(error)}, or name another run folder",
            ) from error

    def obey(self, run: Any) -> None:
        """Do what was asked of a `Loop` that stands between two steps; it looks at the
        folder four times a second at most.

        While it is paused this does not return.
        """
        while True:
            found = run.hear(lambda: self._found(run))
            for name, request in found:
                self._answer(name, self._done(run, request))
            if found:
                continue  # there may be more
            if not self.paused or run.halted or run.stop_requested:
                return
            began = time.perf_counter()
            reached(phase="pause")
            run.read(everything=True)
            time.sleep(POLL_SECONDS / 5)
            run.waited(time.perf_counter() - began)

    def _found(self, run: Any) -> list[tuple[str, dict[str, Any]]]:
        """The next request, claimed, if it is time to look; one at a time, for one may
        halt the run.
        """
        now = time.monotonic()
        if self._file < 0 or run.halted or now - self._polled < POLL_SECONDS:
            return []
        claimed = next(self._claimed(), None)
        if claimed is None:
            self._polled = now
            return []
        return [claimed]

    def close(self, status: str) -> None:
        """Tell those who still ask that the run has ended."""
        if self._file < 0:
            return
        for name, _ in self._claimed():
            self._answer(name, {"ok": False, "text": f"the run has ended: {status}"})
        (self.folder / "run.json").unlink(missing_ok=True)
        os.close(self._file)
        self._file = -1
        with contextlib.suppress(OSError):  # answers that are not fetched yet stay
            self.folder.rmdir()

    # ---- requests ----

    def _done(
        self,
        run: Any,
        request: dict[str, Any],
    ) -> dict[str, Any]:
        """Do one request, say so, and return the answer."""
        what = request.get("do")
        who = {
            "who": str(request.get("who", "?")),
            "pid": request.get("pid"),
        }
        try:
            if what not in REQUESTS:
                raise SettingError(
                    f"a run can't {what!r}{nearest(str(what), REQUESTS)}",
                    where="control",
                    remedy=f"ask for one of {', '.join(REQUESTS)}",
                )
            if what == "status":
                return {
                    "ok": True,
                    "step": run.step,
                    **run.status(),
                    "paused": self.paused,
                }
            answer = {
                "ok": True,
                "step": run.step,
                **getattr(self, f"_{what}")(run, request, who),
            }
        except LeptonError as error:
            answer = {
                "ok": False,
                "step": run.step,
                "text": error.what,
                "remedy": error.remedy,
            }
        run.monitor.event(
            "control",
            do=what,
            **{k: v for k, v in answer.items() if k != "metrics"},
            **who,
        )
        return answer

    def _set(
        self,
        run: Any,
        request: dict[str, Any],
        who: dict[str, Any],
    ) -> dict[str, Any]:
        present = run.program.controller.base
        asked = request.get("settings") or {}
        if not asked:
            raise SettingError(
                "nothing is given to set",
                where="control",
                remedy="write e.g. set learning_rate=3e-4",
            )
        values = {
            name: settable(name, str(text), present) for name, text in asked.items()
        }
        makers = getattr(run.recipe.optimizer, "makers", ())
        if values.get("optimizer", 0) >= max(len(makers), 1):
            raise SettingError(
                f"optimizer can't be {values['optimizer']:g}: there are {len(makers)}",
                where="optimizer",
                remedy=f"give a number from 0 to {len(makers) - 1}",
            )
        run.state = set_base(run.state, **values)
        # the number that was asked for, whatever rollbacks made of the one before
        if "learning_rate" in values:
            run.state = with_rate_factor(run.state, 1.0)
        run.journal.requested(
            run.step,
            "set",
            who,
            values,
        )
        texts = []
        for name, value in values.items():
            movers = run.journal.movers(name)
            texts.append(
                f"{name} is {value:g}"
                + (f", as far as {' and '.join(movers)} let it" if movers else "")
            )
        return {
            "text": f"from step {run.step + 1} on {', '.join(texts)}",
            "settings": values,
        }

    def _save(
        self,
        run: Any,
        request: dict[str, Any],
        who: dict[str, Any],
    ) -> dict[str, Any]:
        run.journal.requested(
            run.step,
            "save",
            who,
            {},
        )
        run.read(everything=True)
        if run.halted:
            return {
                "text": f"step {run.step} is not saved: the run does not go on from it"
            }
        run.save(None)
        return {"text": f"step {run.step} is being saved"}

    def _evaluate(
        self,
        run: Any,
        request: dict[str, Any],
        who: dict[str, Any],
    ) -> dict[str, Any]:
        if run.test is None:
            raise SettingError(
                "there is nothing to evaluate on",
                where="Recipe.test",
                remedy="start the run with test data",
            )
        run.journal.requested(
            run.step,
            "evaluate",
            who,
            {},
        )
        run.read(everything=True)
        metrics = run.evaluate()
        return {
            "text": (
                ", ".join(f"{k} {v:.6g}" for k, v in metrics.items())
                + f" after step {run.step}"
            ),
            "metrics": metrics,
        }

    def _pause(
        self,
        run: Any,
        request: dict[str, Any],
        who: dict[str, Any],
    ) -> dict[str, Any]:
        run.journal.requested(
            run.step,
            "pause",
            who,
            {},
        )
        self.paused = True
        return {"text": f"paused after step {run.step}"}

    def _resume(
        self,
        run: Any,
        request: dict[str, Any],
        who: dict[str, Any],
    ) -> dict[str, Any]:
        run.journal.requested(
            run.step,
            "resume",
            who,
            {},
        )
        text = f"goes on after step {run.step}" if self.paused else "it was not paused"
        self.paused = False
        return {"text": text}

    def _stop(
        self,
        run: Any,
        request: dict[str, Any],
        who: dict[str, Any],
    ) -> dict[str, Any]:
        run.journal.requested(
            run.step,
            "stop",
            who,
            {},
        )
        run.stop_requested = True
        run.history.reason = f"stopped at step {run.step} by {who['who']}"
        self.paused = False
        return {"text": f"stops after step {run.step}"}

    # ---- files ----

    def _claimed(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The requests that are there, in their order; deleting the file is what makes
        one this run's.
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

    def _answer(
        self,
        name: str,
        answer: dict[str, Any],
    ) -> None:
        if self._file < 0:
            return
        # who asked finds out by waiting; the run goes on
        with contextlib.suppress(OSError):
            _put(self.folder / f"{name}.answer", answer)

    def _lock(self) -> None:
        for patience in range(20):
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                # one who looks whether a run lives holds it for a moment
                time.sleep(0.05 * (patience < 19))
            except OSError:  # a file system without locks
                return
        os.close(self._file)
        self._file = -1
        raise SettingError(
            "another process is at work in this run folder:"
            f" {_place(_holder(self.folder))}",
            where=self.folder.parent,
            remedy=(
                "wait for it, stop it with tools/control.py RUN stop, or name "
                "another folder"
            ),
        )


def ask(
    folder: Path,
    request: dict[str, Any],
    timeout: float = 60.0,
) -> dict[str, Any]:
    """Put a request to the run in a folder, and wait for the answer; without one it is
    withdrawn.

    Args:
      folder: of the run.
      request: {"do": one of REQUESTS, "settings": {name: text}}.
      timeout: seconds to wait: a run that compiles answers when it steps.

    Returns:
      {"ok": whether it was done, "step": after which, "text": in words, ...}; with
      "remedy" if it was refused.

    Raises:
      SettingError: no run is at work there, or it does not answer.
    """
    folder = Path(folder)
    control = folder / FOLDER
    name = f"{time.time_ns():020}-{os.getpid()}-{secrets.token_hex(4)}"
    _check_alive(folder)
    path = control / f"{name}.request"
    answer = control / f"{name}.answer"
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
    until = time.monotonic() + timeout
    looked = time.monotonic()
    try:
        while not answer.exists():
            now = time.monotonic()
            if now > until and _withdrawn(path):
                raise SettingError(
                    f"the run did not answer within {timeout:g} s; the request is"
                    " withdrawn",
                    where=folder,
                    remedy="it may be compiling: ask again with a longer --timeout",
                )
            if now > until + TIME_TO_DO:
                raise SettingError(
                    "the run took the request and did not answer within"
                    f" {TIME_TO_DO:g} s",
                    where=folder,
                    remedy="see its events.jsonl for whether it was done",
                )
            if now - looked > 0.5:
                if not answer.exists():
                    _check_alive(folder, "ended without an answer")
                looked = now
            time.sleep(0.02)
        found = json.loads(answer.read_text())
        answer.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            control.rmdir()  # the last one out, if the run has ended
        return found
    finally:
        path.unlink(missing_ok=True)


def _withdrawn(path: Path) -> bool:
    """Whether the request was still there to be deleted; else the run has claimed
    it.
    """
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True


def holder(folder: Path) -> dict[str, Any] | None:
    """{"pid", "host", "began", "token"} of the run at work in a folder; None if there
    is none.
    """
    return _holder(Path(folder) / FOLDER)


def _check_alive(folder: Path, how: str = "is not at work") -> None:
    if not folder.is_dir():
        raise SettingError(
            "there is no such run folder",
            where=folder,
            remedy="name the folder of a run: it holds recipe.json",
        )
    control = folder / FOLDER
    found = _holder(control)
    for _ in range(20):
        if found is not None or not (control / "run.json").exists():
            break
        time.sleep(0.05)  # the run makes the file, locks it, and then writes who it is
        found = _holder(control)
    if found is None or _unlocked(control / "run.json", found):
        raise SettingError(
            f"the run {how}" + (f": {_place(found)} has gone" if found else ""),
            where=folder,
            remedy=(
                f"go on with it by launch.py --resume {folder}, or name a run that is"
                " under way"
            ),
        )


def _unlocked(path: Path, found: dict[str, Any]) -> bool:
    """Whether the process that wrote the file has ended, as far as can be told from
    here.
    """
    if found.get("host") != platform.node():
        return False
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError:
        return False
    finally:
        os.close(file)


def _holder(control: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((control / "run.json").read_text())
    # another user's: the folder's own permissions decide whether a request can be
    # written
    except PermissionError:
        return {"host": None}
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _place(found: dict[str, Any] | None) -> str:
    return (
        f"process {found.get('pid')} on {found.get('host')}"
        if found
        else "an unknown one"
    )


def _put(path: Path, content: dict[str, Any]) -> None:
    """A file that appears whole."""
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(json.dumps(content))
    os.replace(part, path)
