"""Errors made for people: what is wrong, where, and what to do about it.

A person's mistake raises a `LeptonError`; the command line prints it and exits with
code 2, without a traceback. A broken invariant of the library itself is an `assert`.
"""

from __future__ import annotations

import difflib
import errno
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# Words of Gloo, NCCL, and JAX's coordination service about a process that is gone.
UNREACHABLE = re.compile(
    "Gloo|NCCL|coordination|[Cc]onnection|[Ss]ocket|heartbeat"
    "|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED"
)
# How TensorStore writes the system's number of a fault into its text.
SYSTEM_CODE = re.compile(r"os_error_code='(\d+)'|OS error (\d+)")
# Words of libraries about memory that could not be had.
NO_MEMORY = re.compile(
    "out of memory|bad_alloc|Unable to allocate|RESOURCE_EXHAUSTED.*alloc",
    re.IGNORECASE,
)
# Least likeness of two names, from 0 to 1, at which one is suggested for the other
# (assumption).
LEAST_LIKENESS = 0.5


class LeptonError(Exception):
    """Base of every error that a user can cause and fix.

    Args:
      what: the fault, in one sentence, with the values that show it.
      where: the place: file and line, column and row, parameter path, step.
      remedy: what to do now. None: `what` is the whole text of such an error, of which
        this one is made again, as Polars does with one that is raised in its workers.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        remedy: str | None = None,
    ):
        if remedy is None:
            what, where, remedy = _parts(what)
        self.what = what
        self.where = None if where is None else str(where)
        self.remedy = remedy
        place = f"\n  where:  {self.where}" if self.where else ""
        super().__init__(f"{what}{place}\n  remedy: {remedy}")


def _parts(text: str) -> tuple[str, str | None, str]:
    """Return the parts of an error's text: what, where, and the remedy."""
    text, _, remedy = text.partition("\n  remedy: ")
    what, _, where = text.partition("\n  where:  ")
    return what, where or None, remedy or "see the message"


class RecipeError(LeptonError):
    """A recipe file, or a field of a Recipe, that can't be used."""


class SettingError(LeptonError):
    """A setting on the command line that is unknown, ill-typed or out of range."""


class DataError(LeptonError):
    """Data that can't be read, or doesn't fit what the recipe asks of it."""


class ModelError(LeptonError):
    """A module that can't be built, traced or applied to the batch."""


class PlanError(LeptonError):
    """A plan that is impossible on the devices at hand."""


class CheckpointError(LeptonError):
    """A checkpoint that can't be written, read, or restored into this model."""


class NoCheckpointError(CheckpointError):
    """A folder in which there is no committed checkpoint."""


class DivergedError(LeptonError):
    """A loss that is no longer a finite number."""


def of_another_host(error: BaseException) -> bool:
    """Whether an error of JAX's says that another process can no longer be reached.

    Then it is not the fault of what ran here. JAX raises one class for everything that
    its runtime reports, so only the text tells.
    """
    if type(error).__name__ not in ("JaxRuntimeError", "XlaRuntimeError"):
        return False
    return UNREACHABLE.search(str(error)) is not None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message; "": it has none."""
    line, _, _ = str(error).strip().partition("\n")
    return line


COMPARE_SHAPES = (
    "compare the shapes and dtypes of the batch with what the model and the loss expect"
)


class pointing_at_user:
    """Context that makes a LeptonError of an error in a user's own code.

    That is the model, the loss, the recipe; the LeptonError names the user's line.

    Args:
      doing: for the message, what fails.
      remedy: of the error.
      where: the place, if no line of the user's own code is involved.
      kind: class of the error.
    """

    def __init__(
        self,
        doing: str,
        remedy: str = COMPARE_SHAPES,
        where: object = None,
        kind: type[LeptonError] = ModelError,
    ):
        self.doing = doing
        self.remedy = remedy
        self.where = where
        self.kind = kind

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: Any,
        error: BaseException | None,
        trace: Any,
    ) -> None:
        is_told = isinstance(error, LeptonError | StopIteration | MemoryError)
        # sys.exit() in a user's file would end the run without a word.
        is_error = isinstance(error, Exception | SystemExit)
        if is_told or not is_error:
            return
        assert error is not None
        if of_another_host(error):
            return

        message = first_line(error)
        colon = ": " if message else ""
        raise self.kind(
            f"{self.doing} failed: {type(error).__name__}{colon}{message}",
            where=_users_line(error, trace) or self.where,
            remedy=self.remedy,
        ) from error


def _users_line(error: BaseException, trace: Any) -> str | None:
    """Return the innermost line of the user's own code; None: there is none."""
    file = getattr(error, "filename", None)
    if isinstance(error, SyntaxError) and file and not of_a_library(file):
        text = (error.text or "").strip()
        return f"{file}:{error.lineno}: {text}"
    for frame in reversed(traceback.extract_tb(trace)):
        if not of_a_library(frame.filename):
            return f"{frame.filename}:{frame.lineno}: {frame.line}"
    return None


def of_a_library(file: str) -> bool:
    """Whether a file is not a user's own."""
    parts = (
        "site-packages",
        "dist-packages",
        sysconfig.get_path("stdlib"),
        str(Path(__file__).parent),
    )
    is_generated = file.startswith(("<frozen", "<string"))
    return is_generated or any(part in file for part in parts)


def users_frame() -> int:
    """Return the `stacklevel` with which a caller's warning names the user's line."""
    package = str(Path(__file__).parent)
    frame = sys._getframe(1)
    level = 1
    while frame.f_back is not None:
        if not frame.f_code.co_filename.startswith(package):
            break
        frame = frame.f_back
        level += 1
    return level


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` if a known name is near, else nothing."""
    close = difflib.get_close_matches(
        name,
        list(known),
        n=1,
        cutoff=LEAST_LIKENESS,
    )
    return f"; did you mean {close[0]!r}?" if close else ""


# Remedies for each of the system's reasons not to write a file.
_ROOM = "free disk space"
_ALLOW = "let this user write there (chmod, chown)"
_WRITING = {
    errno.ENOSPC: (
        f"{_ROOM} (df -h shows where to make room, df -i whether there are too many"
        " files)"
    ),
    errno.EDQUOT: f"{_ROOM} or have this user's quota raised",
    errno.EFBIG: f"{_ROOM} or raise the limit on the size of a file (ulimit -f)",
    errno.EACCES: _ALLOW,
    errno.EPERM: _ALLOW,
    errno.EROFS: "have the disk mounted for writing: it is mounted read-only",
    errno.ENAMETOOLONG: "make the path shorter",
    errno.ENOENT: "put the folder back: it was moved or deleted",
    errno.ESTALE: "mount the network disk again: the folder there is another one now",
    errno.ENOTDIR: "move the file away that stands where the path has a folder",
    errno.EEXIST: "move the file away that stands in its place",
    errno.EISDIR: "move the folder away that stands in its place",
    errno.ELOOP: "correct the links in the path, which run in a circle",
    errno.EIO: "have the disk repaired, which reports a fault of its own",
    errno.EMFILE: "raise the number of files that a process may have open (ulimit -n)",
    errno.ENFILE: "close other programs: the machine has no open files left",
    errno.ENOMEM: "free memory of this machine",
}


def writing_remedy(error: BaseException) -> str:
    """Return what a person can do about a file that could not be written, by the cause.

    Args:
      error: from the system, or from a library that wraps what the system said.
    """
    reasons: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in reasons:
        reasons.append(link)
        link = link.__cause__ or link.__context__

    for reason in reasons:
        code = _system_code(reason)
        if code in _WRITING:
            return _WRITING[code]

    if isinstance(error, MemoryError) or NO_MEMORY.search(str(error)):
        return (
            "free memory: a save holds a second copy of the state; use more devices, or"
            " make the model or its optimizer's state smaller"
        )
    if isinstance(error, TypeError | ValueError | AttributeError | OverflowError):
        return (
            "change what is to be stored so that it is arrays of numbers and plain"
            " data: the message names it"
        )
    return "remove the cause that the message names"


def _system_code(error: BaseException) -> int | None:
    """Return the system's number of a fault; None: the error has none."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    # TensorStore raises ValueError with the number in the text.
    match = SYSTEM_CODE.search(str(error))
    return int(match[1] or match[2]) if match else None
