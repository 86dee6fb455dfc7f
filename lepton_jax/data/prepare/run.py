"""Run a preparation: the passes, in order, on an engine."""

from __future__ import annotations

import fcntl
import hashlib
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

import lepton_jax
from lepton_jax.data.prepare import manifest as manifests
from lepton_jax.data.prepare import quarantine, shards
from lepton_jax.data.prepare.engines.engine import Engine
from lepton_jax.data.prepare.engines.local import Local
from lepton_jax.data.prepare.engines.ray_data import RayData
from lepton_jax.data.prepare.passes import Pass, plan_passes
from lepton_jax.data.prepare.pieces import (
    Job,
    Task,
    forget_states,
    is_done,
    partial_path,
    record_path,
    state_path,
)
from lepton_jax.data.prepare.preparation import Checked, Preparation, check
from lepton_jax.data.prepare.prepared import Prepared, files_of, open_prepared
from lepton_jax.data.prepare.step import Fitted, Step
from lepton_jax.data.prepare.store import (
    UNFINISHED,
    arrow_bytes,
    key_of,
    read_arrow,
    read_json,
    write_bytes,
    write_json,
)
from lepton_jax.data.readers.reader import ROW, SOURCE
from lepton_jax.errors import DataError, nearest

ENGINES = ("local", "ray")
# Partial states that are merged at once. The grouping depends on the pieces alone
# (assumption: few enough for memory, many enough that merging again is rare).
FAN_IN = 64
MOST_NAMES = 3  # of files that a message lists


class Progress(NamedTuple):
    """Progress of a pass.

    Attributes:
      number: of the pass, from 1.
      passes: how many there are.
      doing: what it does, in words.
      done: bytes of the sources, or entries of a folder, or rows in memory.
      total: as many when it ends.
    """

    number: int
    passes: int
    doing: str
    done: int
    total: int


Report = Callable[[Progress], None]


def prepare(
    preparation: Preparation,
    folder: str | Path,
    *,
    engine: str = "local",
    address: str | None = None,
    workers: int | None = None,
    report: Report | None = None,
) -> Prepared:
    """Prepare the sources' rows, and write them as shards.

    What an earlier run over the same content has made is taken as it is, also if that
    run was killed. The files do not depend on the engine or on the number of workers.

    Args:
      preparation: what to do.
      folder: where the shards, the manifest and the quarantine go.
      engine: "local", or "ray" for a cluster.
      address: of a Ray cluster; None: a fresh one on this machine.
      workers: pieces at once; None: as many as processors.
      report: called as the work goes on.

    Raises:
      DataError: the preparation does not fit its sources, a source can't be read, no
        row is left, or another process prepares into the same folder.
    """
    checked = check(preparation)
    root = Path(folder)
    with _locked(root):
        _remove(_unfinished(root))
        where = _engine(engine, address, workers, preparation)
        try:
            run = _Run(checked, root, where, report or _silent)
            run.all()
        finally:
            where.close()
            forget_states()
    return open_prepared(
        root,
        classes=[type(step) for step in preparation.steps],
        sources=checked.readers,
    )


def _silent(progress: Progress) -> None:
    """Say nothing."""


def _engine(
    name: str,
    address: str | None,
    workers: int | None,
    preparation: Preparation,
) -> Engine:
    if name == "local":
        if address is not None:
            raise DataError(
                "the local engine has no address",
                where="address",
                remedy="take engine 'ray', or leave the address out",
            )
        return Local(workers, preparation.memory, preparation.piece_bytes)
    if name == "ray":
        return RayData(address, workers)
    raise DataError(
        f"there is no engine {name!r}{nearest(name, ENGINES)}",
        where="engine",
        remedy="take 'local' or 'ray'",
    )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes from preparing into a folder.

    Raises:
      DataError: one is at it, or the folder can't be made.
    """
    _check_own(folder)
    try:
        (folder / "work").mkdir(parents=True, exist_ok=True)
        lock = (folder / "work" / "lock").open("w")
    except OSError as error:
        raise DataError(
            f"the folder can't be written: {error.strerror}",
            where=folder,
            remedy="name a folder that this user may write to",
        ) from error
    with lock:
        try:
            # the system lets go of it when the process ends, however it ends
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                "another process prepares into this folder",
                where=folder,
                remedy="wait for it, or name another folder",
            ) from error
        yield


def _check_own(folder: Path) -> None:
    """Raise DataError if a folder is somebody else's, whose files would be removed."""
    marks = (folder / manifests.NAME, folder / "work" / "lock")
    if not folder.is_dir() or any(mark.exists() for mark in marks):
        return
    others = sorted(path.name for path in folder.iterdir())
    if others:
        raise DataError(
            f"the folder has other files: {', '.join(others[:MOST_NAMES])}",
            where=folder,
            remedy="name a folder that is empty, or that does not exist yet",
        )


# ---- the passes ----


class _Run:
    """A run: its pieces, and the states as they become known."""

    def __init__(
        self,
        checked: Checked,
        folder: Path,
        engine: Engine,
        report: Report,
    ):
        self._checked = checked
        self._folder = folder
        self._engine = engine
        self._report = report
        self._passes = plan_passes(checked.steps, checked.schemas)
        self._tasks = _tasks(checked)
        self._states: list[str | None] = [None] * len(
            checked.steps,
        )
        self._used: set[Path] = {folder / "work" / "lock"}
        self._codes = tuple(_code(step) for step in checked.steps)
        self._identities = tuple(identities(checked))

    def all(self) -> None:
        """Do all passes, write the manifest, and remove what is no longer needed."""
        for number, one in enumerate(self._passes, start=1):
            job = self._job(one)
            self._do(job, number)
            for step in one.fits:
                self._states[step] = self._fitted(job, step)
        self._finish(self._job(self._passes[-1]))

    def _job(self, now: Pass) -> Job:
        checked = self._checked
        return Job(
            folder=str(self._folder),
            steps=checked.steps,
            codes=self._codes,
            states=tuple(self._states),
            schemas=checked.schemas,
            readers=checked.readers,
            identities=self._identities,
            now=now,
            outputs=checked.outputs,
            output=checked.preparation.output,
        )

    def _do(self, job: Job, number: int) -> None:
        """Do a pass, but for the pieces that are done."""
        names = [
            type(
                job.steps[step],
            ).__name__
            for step in job.now.fits
        ]
        doing = f"fit {', '.join(names)}" if names else "write"
        total = sum(_size(task) for task in self._tasks)
        left = [
            task
            for task in self._tasks
            if not is_done(
                job,
                task,
            )
        ]
        done = total - sum(_size(task) for task in left)
        passes = len(self._passes)
        self._report(Progress(number, passes, doing, done, total))
        for task in self._engine.run(job, left):
            done += _size(task)
            self._report(Progress(number, passes, doing, done, total))

    def _fitted(self, job: Job, number: int) -> str:
        """Merge the partial states of a step; return the digest of its state."""
        step = job.steps[number]
        assert isinstance(step, Fitted)
        paths = [
            partial_path(
                job,
                task,
                number,
            )
            for task in self._tasks
        ]
        self._used.update(paths)
        key = key_of(
            job.codes[number],
            [path.name for path in paths],
        )
        known = job.work / f"{key}.fitted.json"
        self._used.add(known)
        if known.exists():
            digest = read_json(known)["state"]
            if state_path(self._folder, digest).exists():
                self._used.add(state_path(self._folder, digest))
                return digest

        place = f"Preparation.steps[{number}], {type(step).__name__}"
        with saying(place):
            state = arrow_bytes(step.finish(_merged(step, paths)))
        digest = hashlib.sha256(state).hexdigest()
        write_bytes(state_path(self._folder, digest), state)
        write_json(known, {"state": digest})
        self._used.add(state_path(self._folder, digest))
        return digest

    def _finish(self, job: Job) -> None:
        paths = [record_path(job, task) for task in self._tasks]
        self._used.update(paths)
        records = [read_json(path) for path in paths]
        _check_left(job, records)
        example = _example(self._checked, job, self._tasks, records)
        manifests.write_schemas(self._folder, self._checked, example)
        written = manifests.manifest_of(
            self._checked,
            job,
            self._tasks,
            records,
        )
        write_json(self._folder / manifests.NAME, written)
        self._tidy(written)

    def _tidy(self, written: dict[str, Any]) -> None:
        """Remove the files that neither the manifest nor a next run asks for."""
        named = {
            self._folder / file["path"]
            for file in files_of(
                written,
            )
        }
        stale = []
        for name, kept in (
            ("work", self._used),
            (shards.FOLDER, named),
            (quarantine.FOLDER, named),
            (manifests.STATES, named),
        ):
            files = (self._folder / name).rglob("*")
            stale += [path for path in files if path.is_file() and path not in kept]
        _remove(stale)


def _tasks(checked: Checked) -> tuple[Task, ...]:
    """Divide the sources.

    Raises:
      DataError: they have no rows.
    """
    size = checked.preparation.piece_bytes
    tasks = [
        Task(source, number, piece)
        for source, reader in enumerate(checked.readers)
        for number, piece in enumerate(reader.pieces(size))
    ]
    if not tasks:
        raise DataError(
            "the sources have no rows",
            where=", ".join(checked.names),
            remedy="name sources that have some",
        )
    return tuple(tasks)


def _size(task: Task) -> int:
    return max(1, task.piece.stop - task.piece.start)


def _code(step: Step) -> str:
    """Return a hash of a step's arguments, and of the code of a spec's own step."""
    own = ""
    if not type(step).__module__.startswith("lepton_jax."):
        try:
            own = inspect.getsource(type(step))
        except (OSError, TypeError):
            own = type(step).__qualname__  # typed at a prompt: there is no file of it
    return key_of(manifests.plain(step.to_json()), own)


def identities(checked: Checked) -> list[str]:
    """Return a hash of all that the rows of a source depend on besides its content."""
    raw = [
        (
            name,
            str(
                kind,
            ),
        )
        for name, kind in checked.raw.items()
    ]
    hashes = []
    for number, reader in enumerate(checked.readers):
        columns = [
            (
                one.name,
                str(
                    one.type,
                ),
                one.reason,
            )
            for one in checked.columns[number]
        ]
        dialect = manifests.dialect_of(reader)
        versions = (manifests.FORMAT, lepton_jax.__version__, pl.__version__)
        hashes.append(
            key_of(versions, type(reader).__name__, columns, dialect, raw),
        )
    return hashes


def _merged(
    step: Fitted,
    paths: Sequence[Path],
) -> pl.DataFrame:
    """Merge partial states, a few at once, in the order of the pieces."""
    merged = []
    for start in range(0, len(paths), FAN_IN):
        some = [
            read_arrow(
                path,
            )
            for path in paths[start : start + FAN_IN]
        ]
        merged.append(step.merge(some))
    while len(merged) > 1:
        groups = range(0, len(merged), FAN_IN)
        merged = [
            step.merge(
                merged[start : start + FAN_IN],
            )
            for start in groups
        ]
    return merged[0]


@contextmanager
def saying(place: str) -> Iterator[None]:
    """Say in a DataError which step it is of."""
    try:
        yield
    except DataError as error:
        where = f"{place}: {error.where}" if error.where else place
        raise DataError(
            error.what,
            where=where,
            remedy=error.remedy,
        ) from error


# ---- the end ----


def _check_left(
    job: Job,
    records: Sequence[dict[str, Any]],
) -> None:
    """Raise DataError if no row is left."""
    if any(record["shards"] for record in records):
        return
    counts = [record["counts"] for record in records]
    rows = [
        sum(column)
        for column in zip(
            *counts,
            strict=True,
        )
    ]
    if rows[0] == 0:
        raise DataError(
            "no row of the sources could be read",
            where="sources",
            remedy=f"see {quarantine.FOLDER}/ for the reasons",
        )
    emptied = next(
        number
        for number, count in enumerate(
            rows,
        )
        if count == 0
    )
    raise DataError(
        f"no row is left: {rows[emptied - 1]} went in, and none came out",
        where=f"Preparation.steps[{emptied - 1}], "
        f"{type(job.steps[emptied - 1]).__name__}",
        remedy="change its arguments, or look for what its columns hold instead",
    )


def _example(
    checked: Checked,
    job: Job,
    tasks: Sequence[Task],
    records: Sequence[dict[str, Any]],
) -> pl.DataFrame | None:
    """Return the raw values of the targets in the first row that came out.

    Raw rows at prediction have no target, but steps may ask for one.
    """
    targets = [name for name in checked.preparation.targets if name in checked.raw]
    if not targets:
        return None
    for task, record in zip(tasks, records, strict=True):
        for shard in record["shards"]:
            path = Path(job.folder) / shard["path"]
            final = checked.schemas[-1]
            schema = {name: final[name] for name in (SOURCE, ROW, *job.outputs)}
            written = shards.read_shard(path, pl.Schema(schema))
            row = written[ROW][0]
            raw = (
                checked.readers[task.source]
                .read(
                    task.piece,
                )
                .table
            )
            value = raw.filter(
                pl.col(ROW) == row,
            ).select(targets)
            return value.cast({name: checked.raw[name] for name in targets})
    return None


def _unfinished(folder: Path) -> list[Path]:
    return [
        path
        for path in folder.rglob(
            f"*{UNFINISHED}",
        )
        if path.is_file()
    ]


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
        if path.parent.name not in ("work", shards.FOLDER) and path.parent.exists():
            _remove_empty(path.parent)


def _remove_empty(folder: Path) -> None:
    """Remove the folder of a split that there is no longer."""
    if folder.parent.name == shards.FOLDER and not os.listdir(
        folder,
    ):
        folder.rmdir()
