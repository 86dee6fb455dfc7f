"""An artifact as a folder or as one zip file, whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import weakref
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from lepton_jax.errors import CheckpointError, writing_remedy
from lepton_jax.ship.artifact.manifest import NAME

ZIP = ".zip"
CHUNK_BYTES = 2**20  # read at once for a checksum; assumption
AGAIN = "export the artifact again: lepton export RUN --to lepton"


@contextlib.contextmanager
def writing(place: Path) -> Iterator[Path]:
    """Give a folder to write an artifact into; at the end it takes its place.

    Args:
      place: of the artifact: a folder, or a file whose name ends in .zip.

    Raises:
      CheckpointError: something else stands there, or it can't be written.
    """
    _check_free(place)
    draft = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        made = tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent)
        draft = Path(made)
        inner = draft / "artifact"
        inner.mkdir()
        yield inner
        _put(inner, place, draft)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise CheckpointError(
            f"the artifact can't be written: {error}",
            where=place,
            remedy=f"{writing_remedy(error)}, or name another place",
        ) from error
    finally:
        if draft is not None:
            shutil.rmtree(draft, ignore_errors=True)


class opened:
    """Context that has an artifact as a folder; a zip file is unpacked.

    Args:
      place: of the artifact.

    Attributes:
      folder: with its files.

    Raises:
      CheckpointError: there is none, or its zip file is damaged.
    """

    def __init__(self, place: Path):
        self.place = place
        self.folder = place
        self._is_kept = False

    def __enter__(self) -> opened:
        if self.place.is_file():
            self.folder = Path(tempfile.mkdtemp(prefix="lepton-artifact-"))
            _unpack(self.place, self.folder)
        if not (self.folder / NAME).is_file():
            self._remove()
            fault = f"there is no {NAME}, so this is no artifact"
            raise CheckpointError(
                fault if self.place.exists() else "there is no artifact",
                where=self.place,
                remedy="name what Artifact.save or lepton export --to lepton wrote",
            )
        return self

    def __exit__(self, *error: object) -> None:
        if not self._is_kept:
            self._remove()

    def keep_for(self, owner: Any) -> None:
        """Keep what was unpacked for as long as an object lives."""
        self._is_kept = True
        if self.folder != self.place:
            weakref.finalize(
                owner,
                shutil.rmtree,
                self.folder,
                ignore_errors=True,
            )

    def _remove(self) -> None:
        if self.folder != self.place:
            shutil.rmtree(self.folder, ignore_errors=True)


def checksums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file below a folder but the manifest, by path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in files}
    return {name: _checksum(path) for name, path in names.items() if name != NAME}


def check(
    folder: Path,
    expected: dict[str, str],
    place: Path,
) -> None:
    """Check that the files of an artifact are as they were written.

    Raises:
      CheckpointError: one is gone, or has changed.
    """
    for name, checksum in expected.items():
        path = folder / name
        if not _is_inside(name):
            fault = f"{name!r} leads out of it"
        elif not path.is_file():
            fault = f"{name} is missing"
        elif _checksum(path) != checksum:
            fault = f"{name} is not as it was written"
        else:
            continue
        raise CheckpointError(
            f"the artifact is damaged: {fault}",
            where=place,
            remedy=f"copy it again, or {AGAIN}",
        )


# ---- internals ----


def _check_free(place: Path) -> None:
    if not os.path.lexists(place):
        return
    is_artifact = (place / NAME).is_file() if place.is_dir() else _is_zip(place)
    if not is_artifact:
        raise CheckpointError(
            "something else than an artifact stands there",
            where=place,
            remedy="name another place",
        )


def _is_zip(place: Path) -> bool:
    if not zipfile.is_zipfile(place):
        return False
    with zipfile.ZipFile(place) as file:
        return NAME in file.namelist()


def _put(
    inner: Path,
    place: Path,
    draft: Path,
) -> None:
    """Put what was written in its place; what stood there goes once it is whole."""
    if place.suffix == ZIP:
        packed = draft / "packed"
        _pack(inner, packed)
        packed.replace(place)
        return
    if place.exists():
        place.rename(draft / "old")
    inner.rename(place)


def _pack(folder: Path, place: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with zipfile.ZipFile(
        place,
        "w",
        zipfile.ZIP_DEFLATED,
    ) as file:
        for path in files:
            file.write(
                path,
                path.relative_to(folder).as_posix(),
            )


def _unpack(place: Path, folder: Path) -> None:
    try:
        with zipfile.ZipFile(place) as file:
            for name in file.namelist():
                _check_inside(name)
            file.extractall(folder)
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise CheckpointError(
            f"the zip file can't be read: {error}",
            where=place,
            remedy=f"copy it again, or {AGAIN}",
        ) from error


def _check_inside(name: str) -> None:
    """Raise ValueError if a name in a zip file leads out of its folder."""
    if not _is_inside(name):
        raise ValueError(f"the name {name!r} leads out of the artifact")


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in name


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
