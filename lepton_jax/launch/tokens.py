"""The token of a run, by which its hosts know each other, and its sources.

One host alone, and hosts that one process starts (`local:N`), get a token that never
leaves the process. Else it comes, in this order, from `--token-file`, from the variable
LEPTON_TOKEN, or from the file `token` in the run folder, which host 0 makes and all
hosts read that see the folder. Where none of these can be, the run does not begin.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path

from lepton_jax.errors import SettingError
from lepton_jax.launch.cluster import Cluster

VARIABLE = "LEPTON_TOKEN"
FILE = "token"
LEAST = 32  # characters; in hexadecimal these are 128 bits, beyond all guessing
MOST = 512  # characters (assumption)
BYTES = 32  # of a new token
GOOD = re.compile(f"[!-~]{{{LEAST},{MOST}}}")
OF_OTHERS = 0o077  # modes by which others than the owner may use a file
ROOT = 0  # user number
MAKE = "python3 -c 'import secrets; print(secrets.token_hex(32))'"


def make() -> str:
    """Return a new token."""
    return secrets.token_hex(BYTES)


class NotThereError(Exception):
    """The file with the token can't be read or made, which may change."""


class Token:
    """Source of a run's token for one host; called, it returns the token.

    Args:
      text: the token itself; None: it lies in the run folder.
      file: its file in the run folder.
      makes: whether this host makes the file if there is none.
    """

    def __init__(
        self,
        text: str | None,
        file: Path | None = None,
        makes: bool = False,
    ):
        self._text = text
        self._file = file
        self._makes = makes

    def __call__(self) -> str:
        """Return the token.

        Raises:
          NotThereError: the file in the run folder is not there yet, or can't be read
            or made.
          SettingError: the file is not this user's alone, or holds no token.
        """
        if self._text is not None:
            return self._text
        assert self._file is not None
        try:
            if self._makes:
                _make_file(self._file)
            return read(self._file)
        except OSError as error:
            verb = "can leave" if self._makes else "has left"
            raise NotThereError(
                f"host 0 {verb} no token of the run in {self._file}: "
                f"{error.strerror or error}"
            ) from error

    def forget(self) -> None:
        """Delete the file that this host made, once the run is over."""
        if self._makes and self._file is not None:
            with contextlib.suppress(OSError):
                self._file.unlink()


def of_run(
    cluster: Cluster,
    folder: Path | None,
    file: Path | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Token:
    """Return the source of the token of the run that this host takes part in.

    Args:
      cluster: as this host found it.
      folder: of the run, if it is the same on all hosts; None: it is not known to be.
      file: of --token-file.
      environ: the environment variables.

    Raises:
      SettingError: there is no token, or it is too short, or others can read its file.
    """
    if file is not None:
        try:
            return Token(read(file))
        except OSError as error:
            raise SettingError(
                f"the run's token can't be read: {error.strerror or error}",
                where=f"--token-file {file}",
                remedy=(
                    f"make one, and bring it to all hosts: (umask 077; {MAKE} > {file})"
                ),
            ) from error

    text = environ.get(VARIABLE, "").strip()
    if text:
        return Token(_checked(text, f"environment variable {VARIABLE}"))
    if cluster.hosts == 1 or cluster.coordinator is None:
        return Token(make())
    if folder is not None:
        return Token(None, folder / FILE, makes=cluster.host_id == 0)

    raise SettingError(
        f"the {cluster.hosts} hosts have no token by which to know each other",
        where=cluster,
        remedy=(
            "name the same --run-dir on all hosts, in storage that all of them "
            f"see, or set {VARIABLE} to the same value on all; {MAKE} makes one"
        ),
    )


def read(file: Path) -> str:
    """Return the token in a file.

    Raises:
      OSError: it can't be read, or is not whole yet.
      SettingError: others can read it, it is another user's, or it holds no token.
    """
    # an NFS client may remember for half a minute that there was no such file; it
    # forgets that when it looks at the folder
    os.listdir(file.parent)
    number = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(number)
        regular = stat.S_ISREG(status.st_mode)
        content = os.read(number, 2 * MOST) if regular else b""
    finally:
        os.close(number)
    if not regular:
        raise SettingError(
            "the run's token is no file",
            where=file,
            remedy="name a file, or delete what stands there",
        )

    modes = stat.S_IMODE(status.st_mode)
    if modes & OF_OTHERS or status.st_uid not in (os.geteuid(), ROOT):
        raise SettingError(
            f"the file of the run's token is user {status.st_uid}'s and has mode "
            f"{modes:04o}: others know the token",
            where=file,
            remedy=(
                "delete it and start again; where the file system keeps no modes, "
                f"set {VARIABLE} to the same value on all hosts"
            ),
        )

    text = content.decode(errors="replace").strip()
    if not text:
        raise OSError(f"{file} is still empty")
    return _checked(text, file)


def _make_file(file: Path) -> None:
    """Make the file with a new token, unless it is there.

    Raises:
      OSError: it can't be made.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):
        status = file.stat()
        # left by a process that was killed before it had written
        if stat.S_ISREG(status.st_mode) and not status.st_size:
            file.unlink()
    with contextlib.suppress(FileExistsError):
        number = os.open(
            file,
            os.O_WRONLY | os.O_CREAT | os.O_EXCL,
            0o600,
        )
        with open(number, "w", encoding="utf-8") as stream:
            stream.write(make() + "\n")


def _checked(text: str, where: object) -> str:
    """Return the token if it is a good one."""
    if GOOD.fullmatch(text):
        return text

    fault = f"has {len(text)} characters, and could be guessed"
    if len(text) >= LEAST:
        fault = "holds spaces or other characters that are none of ASCII's"
    if len(text) > MOST:
        fault = f"has {len(text)} characters"
    raise SettingError(
        f"the run's token {fault}",
        where=where,
        remedy=f"take {LEAST} to {MOST} letters, digits and signs: {MAKE} makes one",
    )
