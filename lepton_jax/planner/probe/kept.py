"""What XLA said of a program, kept from one process to the next.

A file holds XLA's account of one program. Its name is a hash of the program as it goes
to the compiler, of the devices, and of the versions of JAX and of XLA, so that no file
is ever out of date.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jaxlib

from lepton_jax.compat import compile_request
from lepton_jax.planner import ahead

# The file's form: with another number, older files are not read.
FORM = 1


@dataclass(frozen=True)
class Account:
    """XLA's account of one program.

    Attributes:
      memory: None if XLA refuses the program.
      error: XLA's message then.
      whole: whether the program was compiled to its end.
    """

    memory: ahead.Memory | None
    error: str | None = None
    whole: bool = False


def users_folder() -> Path:
    """Return the folder in which a user's files are kept.

    It follows the XDG Base Directory Specification.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base or Path.home() / ".cache") / "lepton_jax" / "probe"


def file_of(
    lowered: jax.stages.Lowered,
    devices: Any,
    folder: Path,
    whole: bool,
) -> Path:
    """Return the file for the account of a program.

    Args:
      lowered: the program.
      devices: those that it is for, in the mesh's order.
      folder: for all such files.
      whole: whether the account is that of the compiled program.
    """
    parts = (
        FORM,
        whole,
        jax.__version__,
        jaxlib.__version__,
        _libtpu(),
        devices[0].device_kind,
        [device.id for device in devices],
        os.environ.get("XLA_FLAGS", ""),
        os.environ.get("LIBTPU_INIT_ARGS", ""),
        lowered.as_text(),
        compile_request(lowered)[1].hex(),
    )
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part}\0".encode())
    return folder / f"{digest.hexdigest()}.json"


def read(file: Path) -> Account | None:
    """Return the account in a file; None if there is none that can be read."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        memory = data.pop("memory")
        return Account(None if memory is None else ahead.Memory(**memory), **data)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def write(file: Path, account: Account) -> None:
    """Keep an account in a file, if that is possible: it can be had again."""
    draft = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(asdict(account)), encoding="utf-8")
        draft.replace(file)
    except OSError:
        draft.unlink(missing_ok=True)


def _libtpu() -> str:
    try:
        return importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return ""
