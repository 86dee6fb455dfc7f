"""The work on one piece: what every engine calls, wherever it runs.

A `Job` is a pass; a `Task` is a piece. `run_piece` reads the piece, applies the steps
whose states are known, and then either takes partial states or writes the shards:

    pass 1   raw -> FillMissing's partial                        work/KEY.arrow
    pass 2   raw -> fill -> Standardize's partial                work/KEY.arrow
    pass 3   raw -> fill -> standardize -> shards, notes         work/KEY.json

Where making the rows anew would take longer than reading them back, a pass leaves the
rows that it has made for the next one.
"""

from __future__ import annotations

import functools
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from lepton_jax.data.prepare.passes import Pass, fitting_rows
from lepton_jax.data.prepare.preparation import RESERVED
from lepton_jax.data.prepare.quarantine import write_quarantine
from lepton_jax.data.prepare.shards import write_shards
from lepton_jax.data.prepare.step import SPLIT, Fitted, Outcome, Step
from lepton_jax.data.prepare.store import (
    key_of,
    leave_arrow,
    read_arrow,
    read_json,
    write_arrow,
    write_json,
)
from lepton_jax.data.readers.reader import NOTES, ROW, SOURCE, Piece, Reader

# Columns of the notes of a piece: NOTES, and which step each is of; -1: the reader.
STEP = f"{RESERVED}step"
PIECE_NOTES = pl.Schema({STEP: pl.Int32(), **NOTES})
READER = -1

# Bytes a second at which rows are left for the next pass and read back, both together
# (assumption: half of what a plain disk writes).
SPILL_BYTES_PER_SECOND = 250e6


@dataclass(frozen=True)
class Job:
    """A pass, as every worker gets it.

    Attributes:
      folder: of the preparation.
      steps: all steps.
      codes: a hash of each step's arguments and code.
      states: the digest of each step's state; None: not known, or none.
      schemas: columns before each step, and after the last one.
      readers: of the sources.
      identities: a hash of each reader's columns and dialect.
      now: the pass.
      outputs: columns that are written.
      output: format of the shards.
    """

    folder: str
    steps: tuple[Step, ...]
    codes: tuple[str, ...]
    states: tuple[str | None, ...]
    schemas: tuple[pl.Schema, ...]
    readers: tuple[Reader, ...]
    identities: tuple[str, ...]
    now: Pass
    outputs: tuple[str, ...]
    output: str

    @property
    def work(self) -> Path:
        """Folder of what is kept between passes and between runs."""
        return Path(self.folder) / "work"


class Task(NamedTuple):
    """A piece of a source.

    Attributes:
      source: number of the source.
      number: of the piece in its source.
      piece: where it is.
    """

    source: int
    number: int
    piece: Piece


@dataclass
class Content:
    """The rows of a piece after some steps.

    Attributes:
      stop: number of steps that were applied.
      table: the rows.
      notes: of these steps and the reader, with the columns PIECE_NOTES.
      counts: rows before each step, and after the last one.
      raw: the rows as they were read; None: they were not read in this pass.
      missing: missing cells of each column as it was read, without those against its
        type.
      against: cells of each column that became missing since they are not of its type.
      refused: number of rows that could not be read.
      seconds: time that making the rows took; 0: they were read back.
    """

    stop: int
    table: pl.DataFrame
    notes: list[pl.DataFrame]
    counts: list[int]
    raw: pl.DataFrame | None
    missing: dict[str, int]
    against: dict[str, int]
    refused: int
    seconds: float = field(default=0.0)


# ---- keys ----


def content_key(job: Job, task: Task, stop: int) -> str:
    """Return the key of the rows of a piece after the first `stop` steps."""
    return key_of(
        job.identities[task.source],
        task.source,
        task.piece.digest,
        task.piece.first_row,
        job.codes[:stop],
        job.states[:stop],
    )


def partial_path(job: Job, task: Task, step: int) -> Path:
    """Return the file of a piece's partial state."""
    before = content_key(job, task, job.now.settled)
    applied = [job.codes[number] for number in job.now.applied if number < step]
    key = key_of(before, "partial", applied, job.codes[step])
    return job.work / f"{key}.partial.arrow"


def record_path(job: Job, task: Task) -> Path:
    """Return the file that says which shards a piece has given."""
    return job.work / f"{record_key(job, task)}.json"


def record_key(job: Job, task: Task) -> str:
    """Return the key of a piece's shards."""
    before = content_key(job, task, len(job.steps))
    return key_of(before, job.outputs, job.output, task.number)


def is_done(job: Job, task: Task) -> bool:
    """Whether all that a pass makes of a piece is there already."""
    if job.now.fits:
        return all(partial_path(job, task, step).exists() for step in job.now.fits)
    path = record_path(job, task)
    if not path.exists():
        return False
    record = read_json(path)
    files = [*record["shards"], *record["quarantine"]]
    return all(_is_whole(Path(job.folder) / file["path"], file) for file in files)


def _is_whole(path: Path, file: dict[str, Any]) -> bool:
    return path.exists() and path.stat().st_size == file["bytes"]


# ---- the work ----


def run_piece(job: Job, task: Task) -> None:
    """Do what a pass has to do on a piece, unless it is done."""
    if is_done(job, task):
        return
    content = content_of(job, task)
    if job.now.fits:
        _fit(job, task, content)
        _leave(job, task, content)
    else:
        _write(job, task, content)


def content_of(job: Job, task: Task) -> Content:
    """Return the rows of a piece after the steps whose states are known."""
    stop = job.now.settled
    began = time.perf_counter()
    content = _left(job, task)
    was_left = content is not None
    if content is None:
        content = _read(job, task)
    for number in range(content.stop, stop):
        apply_step(job, content, number)
    content.seconds = 0.0 if was_left else time.perf_counter() - began
    return content


def _read(job: Job, task: Task) -> Content:
    """Read a piece; its rows have the columns of all sources together."""
    rows = job.readers[task.source].read(task.piece)
    number = pl.lit(task.source, dtype=pl.UInt32)
    table = fit_columns(rows.table.with_columns(number.alias(SOURCE)), job.schemas[0])
    notes = _numbered(rows.refused.with_columns(number.alias(SOURCE)), READER)
    against = _against(rows.refused)
    missing = rows.table.drop(ROW).null_count().row(0, named=True)
    for name, cells in against.items():
        missing[name] -= cells
    return Content(
        stop=0,
        table=table,
        notes=[notes],
        counts=[table.height],
        raw=table,
        missing=missing,
        against=against,
        refused=rows.refused["column"].null_count(),
    )


def _against(refused: pl.DataFrame) -> dict[str, int]:
    """Return how many cells of each column a reader has made missing."""
    columns = refused["column"].drop_nulls()
    return dict(columns.value_counts(sort=True).iter_rows())


def fit_columns(table: pl.DataFrame, schema: pl.Schema) -> pl.DataFrame:
    """Return a table with just these columns; what it lacks is missing."""
    columns = [
        pl.col(name).cast(kind) if name in table.columns else pl.lit(None, kind)
        for name, kind in schema.items()
    ]
    named = [column.alias(name) for column, name in zip(columns, schema, strict=True)]
    return table.select(named)


def apply_step(job: Job, content: Content, number: int) -> None:
    """Apply a step to the rows, and keep its notes."""
    step = job.steps[number]
    state = state_of(job.folder, job.states[number])
    table, notes = collected(step.run(content.table.lazy(), state))
    content.table = table
    if notes is not None and notes.height:
        content.notes.append(_numbered(notes, number))
    content.counts.append(table.height)
    content.stop = number + 1


def collected(outcome: Outcome) -> tuple[pl.DataFrame, pl.DataFrame | None]:
    """Compute what a step makes of rows, its notes along with the rows.

    The streaming engine does not fix the order of rows; this one does.
    """
    if outcome.notes is None:
        return outcome.table.collect(engine="in-memory"), None
    table, notes = pl.collect_all([outcome.table, outcome.notes], engine="in-memory")
    return table, notes


def _numbered(notes: pl.DataFrame, step: int) -> pl.DataFrame:
    """Return notes with the columns PIECE_NOTES."""
    number = pl.lit(step, dtype=pl.Int32)
    return fit_columns(notes.with_columns(number.alias(STEP)), PIECE_NOTES)


def state_path(folder: str | Path, digest: str) -> Path:
    """Return the file of a state of this digest."""
    return Path(folder) / "work" / f"{digest}.state.arrow"


def state_of(folder: str, digest: str | None) -> pl.DataFrame | None:
    """Return a fitted state; None: the step has none."""
    return None if digest is None else _state(state_path(folder, digest))


# The name of a state's file is a hash of its content: it is the same whenever it is
# read. As many as a preparation is likely to have (assumption).
@functools.lru_cache(maxsize=64)
def _state(path: Path) -> pl.DataFrame:
    return read_arrow(path)


def forget_states() -> None:
    """Free the memory of the states that were read."""
    _state.cache_clear()


def _fit(job: Job, task: Task, content: Content) -> None:
    """Take the partial states of a pass."""
    table = content.table.lazy()
    for number in range(job.now.settled, max(job.now.fits) + 1):
        step = job.steps[number]
        if number in job.now.applied:
            table = step.run(table, None).table
        if number not in job.now.fits:
            continue
        assert isinstance(step, Fitted)
        rows = fitting_rows(step, table, SPLIT in job.schemas[number])
        partial = step.partial(rows).collect(engine="in-memory")
        write_arrow(partial_path(job, task, number), partial)


# ---- what is left for the next pass ----


def left_paths(job: Job, task: Task, stop: int) -> dict[str, Path]:
    """Return the files of the rows that are left after `stop` steps."""
    key = content_key(job, task, stop)
    return {
        "rows": job.work / f"{key}.rows.arrow",
        "notes": job.work / f"{key}.notes.arrow",
        "counts": job.work / f"{key}.counts.json",
    }


def _leave(job: Job, task: Task, content: Content) -> None:
    """Leave the rows for the next pass, if that is cheaper than making them anew."""
    if content.seconds == 0.0:
        return
    if content.seconds < content.table.estimated_size() / SPILL_BYTES_PER_SECOND:
        return
    paths = left_paths(job, task, content.stop)
    counts = {
        "counts": content.counts,
        "missing": content.missing,
        "against": content.against,
        "refused": content.refused,
    }
    write_json(paths["counts"], counts)
    leave_arrow(paths["notes"], pl.concat(content.notes))
    # the last one: where it is, the others are
    leave_arrow(paths["rows"], content.table)


def _left(job: Job, task: Task) -> Content | None:
    """Return the rows that an earlier pass has left, after the most steps."""
    for stop in range(job.now.settled, -1, -1):
        paths = left_paths(job, task, stop)
        if not paths["rows"].exists():
            continue
        counted = read_json(paths["counts"])
        return Content(
            stop=stop,
            table=read_arrow(paths["rows"]),
            notes=[read_arrow(paths["notes"])],
            counts=counted["counts"],
            raw=None,
            missing=counted["missing"],
            against=counted["against"],
            refused=counted["refused"],
        )
    return None


# ---- shards ----


def _write(job: Job, task: Task, content: Content) -> None:
    """Write a piece's shards and notes, and then the record that says so."""
    notes = pl.concat(content.notes)
    name = f"{task.source:03}-{task.number:05}-{record_key(job, task)[:16]}"
    shards = write_shards(
        Path(job.folder), name, content.table, job.outputs, job.output
    )
    quarantine = []
    if notes.height:
        raw = content.raw
        if raw is None:
            raw = _read(job, task).table
        quarantine.append(write_quarantine(Path(job.folder), name, notes, raw))
    record = {
        "source": task.source,
        "piece": task.number,
        "counts": content.counts,
        "missing": content.missing,
        "against": content.against,
        "refused": content.refused,
        "notes": counted_notes(notes),
        "shards": shards,
        "quarantine": quarantine,
    }
    write_json(record_path(job, task), record)


def counted_notes(notes: pl.DataFrame) -> list[dict[str, Any]]:
    """Return how many notes there are of each step, action and reason."""
    by = [STEP, "action", "reason"]
    counted = notes.group_by(by).len("rows").sort(by)
    return counted.rename({STEP: "step"}).to_dicts()


def processors() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0))
