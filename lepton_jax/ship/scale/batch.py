"""Predictions of many rows: each row once, whatever is killed meanwhile.

    people.csv                       predictions/
      bytes 0 to 16 MiB        ->      part-00000.parquet     by any worker
      bytes 16 to 32 MiB       ->      part-00001.parquet     by any other
      ...                              plan.json              what is to be done
                                       done.json              once all of it is

The data is divided before anything starts, and the division depends on the data alone.
A part is written under another name and then given its own, so it is there whole or not
at all; a worker that is killed leaves nothing that counts, and a part that two workers
made is the same twice. Whoever runs the command again goes on where it was.

A row that can't be predicted, such as one with a text where a number belongs, has a
null for a prediction and the reason next to it: rows neither vanish nor stop the rest.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from lepton_jax.data import readers
from lepton_jax.data.prepare.store import (
    UNFINISHED,
    checksum,
    read_json,
    replacing,
    write_json,
)
from lepton_jax.data.readers.counted import CountedReader
from lepton_jax.data.readers.reader import ROW, Piece, Reader
from lepton_jax.errors import (
    CheckpointError,
    DataError,
    LeptonError,
    SettingError,
)
from lepton_jax.ship.artifact.artifact import Artifact
from lepton_jax.ship.artifact.manifest import NAME

PLAN = "plan.json"
DONE = "done.json"
FORMAT = 1  # of the plan

# Columns that every row of a part has.
FILE = "file"
NUMBER = "row"
PREDICTION = "prediction"
ERROR = "error"

PIECE_BYTES = 16 * 2**20  # of the data that a part is made of; assumption
# Rows of a part that may be refused before the whole part is: then it is the data, or
# the command, that is wrong. Assumption.
MOST_REFUSED = 0.5
FEWEST = 16  # rows below which that share says nothing; assumption


@dataclass(frozen=True)
class Request:
    """A job: files to predict, and where the predictions go.

    Attributes:
      artifact: its path, as every worker sees it.
      data: paths, globs or folders, likewise.
      out: folder of the parts, likewise.
      keep: columns of the data that are copied next to the predictions.
      outputs: whether the model's own outputs are written, too.
      piece_bytes: of the data that a part is made of.
    """

    artifact: str
    data: tuple[str, ...]
    out: str
    keep: tuple[str, ...] = ()
    outputs: bool = False
    piece_bytes: int = PIECE_BYTES


@dataclass(frozen=True)
class Part:
    """A part of the predictions.

    Attributes:
      number: from 0.
      piece: of the data.
      first: number of its file's first row in all data.
    """

    number: int
    piece: Piece
    first: int

    @property
    def name(self) -> str:
        """The file that it is written to."""
        return f"part-{self.number:05d}.parquet"


@dataclass(frozen=True)
class Job:
    """A request, divided; what a worker needs besides a part's number.

    Attributes:
      request: what is to be predicted.
      reader: of the data.
      parts: in their order.
      key: of the artifact's content.
    """

    request: Request
    reader: Reader
    parts: tuple[Part, ...]
    key: str

    def path(self, part: Part) -> Path:
        """Return where a part is written to."""
        return Path(self.request.out) / part.name

    def left(self) -> list[Part]:
        """Return the parts that are not there."""
        return [part for part in self.parts if not self.path(part).exists()]


@dataclass(frozen=True)
class Summary:
    """Counts of a finished job.

    Attributes:
      rows: predicted or refused, in all parts.
      refused: rows with an error in place of a prediction.
      parts: files.
      folder: of these.
      reasons: the first errors, by how many rows have them.
    """

    rows: int
    refused: int
    parts: int
    folder: str
    reasons: Mapping[str, int] = field(default_factory=dict)


def plan(request: Request) -> Job:
    """Divide a request, and write down how; an earlier plan must be the same.

    Args:
      request: what is to be predicted.

    Raises:
      DataError: the data can't be read, or is empty.
      SettingError: the folder holds predictions of something else.
      CheckpointError: the artifact can't be opened.
    """
    key = _key(request.artifact)
    artifact = opened(request.artifact, key)
    dialect = {} if artifact.serving is None else dict(artifact.serving.reading)
    reader = readers.reader_of(list(request.data), **dialect)
    columns = [column.name for column in reader.columns()]
    _check_kept(request.keep, columns)
    pieces = reader.pieces(request.piece_bytes)
    firsts: dict[str, int] = {}
    parts = []
    for number, piece in enumerate(pieces):
        first = firsts.setdefault(piece.path, piece.first_row)
        parts.append(Part(number, piece, first))
    if not parts:
        raise DataError(
            "there is no row",
            where=", ".join(request.data),
            remedy="name files with rows",
        )
    job = Job(request, reader, tuple(parts), key)
    _write_plan(job)
    return job


def predict_part(job: Job, part: Part) -> int:
    """Write a part, unless it is there; return its rows.

    Args:
      job: the request, divided.
      part: one of its parts.

    Raises:
      DataError: the data or the artifact has changed, or most rows of the part can't
        be predicted.
    """
    path = job.path(part)
    if path.exists():
        return _rows_of(path)
    artifact = opened(job.request.artifact, job.key)
    rows = job.reader.read(part.piece)
    table = rows.table
    numbers = table[ROW].cast(pl.Int64) - part.first
    raw = table.drop(ROW)
    answers = Answers.of(artifact, raw, job.request.outputs)
    made = pl.DataFrame(
        [
            pl.Series(FILE, [part.piece.path] * table.height, pl.String),
            numbers.alias(NUMBER),
            *(raw[name] for name in job.request.keep),
            *answers.columns,
            pl.Series(ERROR, answers.errors, pl.String),
        ]
    )
    made = _with_unread(made, part, rows.refused)
    with replacing(path) as draft:
        made.write_parquet(draft)
        _flush(draft)
    return made.height


def _with_unread(
    made: pl.DataFrame,
    part: Part,
    notes: pl.DataFrame,
) -> pl.DataFrame:
    """Return rows with those that the reader could not read, in their places."""
    unread = notes.filter(pl.col("action") == "dropped")
    if not unread.height:
        return made
    lost = unread.select(
        pl.lit(part.piece.path).alias(FILE),
        (pl.col(ROW).cast(pl.Int64) - part.first).alias(NUMBER),
        pl.col("reason").alias(ERROR),
    )
    return pl.concat([made, lost], how="diagonal_relaxed").sort(NUMBER)


def finish(job: Job) -> Summary:
    """Check that every row is there once, and write so.

    Args:
      job: of which all parts are there.

    Raises:
      DataError: a part is missing, or holds other rows than it should.
    """
    rows = 0
    reasons: dict[str, int] = {}
    for part in job.parts:
        rows += _check_part(job, part)
        errors = pl.read_parquet(job.path(part), columns=[ERROR])[ERROR]
        for reason in errors.drop_nulls():
            reasons[reason] = reasons.get(reason, 0) + 1
    out = Path(job.request.out)
    for draft in out.glob(f"*{UNFINISHED}"):
        draft.unlink(missing_ok=True)
    summary = Summary(
        rows=rows,
        refused=sum(reasons.values()),
        parts=len(job.parts),
        folder=str(out),
        reasons=reasons,
    )
    write_json(out / DONE, asdict(summary))
    return summary


@lru_cache(maxsize=1)
def opened(artifact: str, key: str) -> Artifact:
    """Return an artifact; a worker opens and compiles it once for all its parts.

    Args:
      artifact: its path.
      key: of the content that the plan was made for.

    Raises:
      DataError: another one lies there by now.
      CheckpointError: it can't be opened.
    """
    if _key(artifact) != key:
        raise DataError(
            "another artifact lies there than the one that the plan was made for",
            where=artifact,
            remedy="put it back, or predict into another folder: --out DIR",
        )
    return Artifact.open(artifact)


# ---- predicting ----


@dataclass(frozen=True)
class Answers:
    """Predictions of some rows.

    Attributes:
      columns: a value a row; null where there is an error.
      errors: why a row has none; None: it has.
    """

    columns: list[pl.Series]
    errors: list[str | None]

    @classmethod
    def of(
        cls,
        artifact: Artifact,
        raw: pl.DataFrame,
        outputs: bool,
    ) -> Answers:
        """Predict rows.

        Args:
          artifact: the model.
          raw: the rows.
          outputs: whether the model's own outputs are wanted, too.

        Raises:
          DataError: most rows can't be predicted.
        """
        errors: list[str | None] = [None] * raw.height
        found: list[tuple[int, dict[str, Any]]] = []
        limit = max(FEWEST, int(raw.height * MOST_REFUSED))
        refused = 0
        for start, rows, outcome in _attempts(artifact, raw, outputs):
            if not isinstance(outcome, LeptonError):
                found.append((start, outcome))
                continue
            refused += rows
            if refused > limit or refused == raw.height:
                raise outcome
            errors[start] = outcome.what
        return cls(_columns(found, raw.height), errors)


Outcome = dict[str, Any] | LeptonError


def _attempts(
    artifact: Artifact,
    raw: pl.DataFrame,
    outputs: bool,
) -> Iterator[tuple[int, int, Outcome]]:
    """Yield (first row, rows, values or error) of ranges that cover all rows.

    A range with a row that can't be predicted is halved until that row stands alone:
    of n rows with one bad one, 2 log2(n) more calls.
    """
    ranges = [(0, raw.height)] if raw.height else []
    while ranges:
        start, count = ranges.pop()
        try:
            values = _values(artifact, raw.slice(start, count), outputs)
        except DataError as error:
            if count == 1:
                yield start, count, error
                continue
            half = count // 2
            ranges.append((start + half, count - half))
            ranges.append((start, half))
        else:
            yield start, count, values


def _values(
    artifact: Artifact,
    raw: pl.DataFrame,
    outputs: bool,
) -> dict[str, Any]:
    """Return a list or an array of values of rows for each column of the answer."""
    given = raw if artifact.serving is not None else _arrays(artifact, raw)
    if artifact.serving is not None and artifact.manifest.labels:
        predictions = artifact.predict(given, words=True)
    else:
        predictions = artifact.predict(given)
    named = predictions if isinstance(predictions, Mapping) else {"": predictions}
    values = {
        f"{PREDICTION}.{path}" if path else PREDICTION: each
        for path, each in named.items()
    }
    if outputs:
        arrays = artifact.prepare(given) if artifact.serving is not None else given
        made = artifact.run(arrays)
        values |= {
            name: each for name, each in made.items() if not name.startswith(PREDICTION)
        }
    return values


def _arrays(artifact: Artifact, raw: pl.DataFrame) -> dict[str, np.ndarray]:
    """Return columns as the input arrays of a model that takes no raw rows.

    Raises:
      DataError: a column is missing.
    """
    names = [tensor.name for tensor in artifact.inputs]
    if len(names) == 1 and names[0] not in raw.columns:
        return {names[0]: _only(artifact, raw)}
    missing = [name for name in names if name not in raw.columns]
    if missing:
        raise DataError(
            f"the data has no column {missing[0]!r}",
            where="--data",
            remedy=f"give a .npz file with the arrays {', '.join(names)}",
        )
    return {name: raw[name].to_numpy() for name in names}


def _only(artifact: Artifact, raw: pl.DataFrame) -> np.ndarray:
    """Return all columns as a model's only input array."""
    shape = artifact.inputs[0].shape[1:]
    if len(raw.columns) == 1:
        return raw[raw.columns[0]].to_numpy().reshape(raw.height, *shape)
    return raw.to_numpy().reshape(raw.height, *shape)


def _columns(
    found: Sequence[tuple[int, dict[str, Any]]],
    height: int,
) -> list[pl.Series]:
    """Return columns of values, in the order of the rows, null where there is none."""
    if not found:
        return []
    columns = []
    for name in found[0][1]:
        parts = []
        row = 0
        for start, values in sorted(found, key=lambda each: each[0]):
            series = _series(name, values[name])
            parts.append(_nulls(series, start - row))
            parts.append(series)
            row = start + len(series)
        parts.append(_nulls(parts[-1], height - row))
        columns.append(pl.concat(parts))
    return columns


def _series(name: str, values: Any) -> pl.Series:
    if isinstance(values, np.ndarray):
        if values.dtype.kind == "V" or values.dtype == np.float16:
            values = values.astype(np.float32)  # bfloat16: Arrow has none
        return pl.Series(name, values)
    return pl.Series(name, list(values), strict=False)


def _nulls(like: pl.Series, count: int) -> pl.Series:
    return pl.Series(like.name, [None] * count, like.dtype)


# ---- the plan ----


def _write_plan(job: Job) -> None:
    """Write the plan, or check the one that is there."""
    out = Path(job.request.out)
    content = {
        "format": FORMAT,
        "artifact": job.key,
        "keep": list(job.request.keep),
        "outputs": job.request.outputs,
        "parts": [
            {"name": part.name, "first": part.first, **asdict(part.piece)}
            for part in job.parts
        ],
    }
    path = out / PLAN
    if not path.exists():
        if out.exists() and any(out.iterdir()):
            raise SettingError(
                "the folder holds other files, and no plan",
                where=out,
                remedy="name another folder: --out DIR",
            )
        write_json(path, content)
        return
    try:
        before = read_json(path)
    except ValueError as error:
        raise SettingError(
            f"{PLAN} is damaged: {error}",
            where=path,
            remedy="name another folder: --out DIR",
        ) from error
    if before != content:
        what = [key for key in content if before.get(key) != content[key]]
        raise SettingError(
            f"the folder holds predictions of something else: {', '.join(what)} differ",
            where=out,
            remedy="name another folder: --out DIR, or go on with the same command",
        )


def _key(artifact: str) -> str:
    """Return a hash of an artifact: its manifest holds the checksums of its files.

    Raises:
      CheckpointError: there is none.
    """
    path = Path(artifact)
    file = path / NAME if path.is_dir() else path
    try:
        return checksum(file)
    except OSError as error:
        raise CheckpointError(
            f"the artifact can't be read: {error.strerror or error}",
            where=file,
            remedy="name one that `lepton export` has written",
        ) from error


def _check_kept(keep: Sequence[str], columns: Sequence[str]) -> None:
    taken = (FILE, NUMBER, PREDICTION, ERROR)
    for name in keep:
        if name not in columns:
            raise SettingError(
                f"--keep names {name!r}, which the data has not",
                where="command line, --keep",
                remedy=f"name some of {', '.join(columns)}",
            )
        if name in taken:
            raise SettingError(
                f"--keep names {name!r}, as the predictions have a column of that name",
                where="command line, --keep",
                remedy="rename it in the data, or leave it out",
            )


def _check_part(job: Job, part: Part) -> int:
    """Return the rows of a part.

    Raises:
      DataError: it is missing, or does not hold its rows, each once.
    """
    path = job.path(part)
    if not path.exists():
        raise DataError(
            f"{part.name} is missing",
            where=job.request.out,
            remedy="run the same command again: it makes what is missing",
        )
    found = pl.read_parquet(path, columns=[NUMBER])[NUMBER].to_numpy()
    first = part.piece.first_row - part.first
    rows = _rows_of_part(job, part)
    if rows is None:
        rows = len(found)
    is_whole = np.array_equal(found, np.arange(first, first + rows))
    if not is_whole:
        raise DataError(
            f"{part.name} does not hold its rows, each once",
            where=job.request.out,
            remedy="delete the file and run the same command again",
        )
    return len(found)


def _rows_of_part(job: Job, part: Part) -> int | None:
    """Return how many rows a part must have; None: its reader can't tell."""
    following = part.number + 1
    if following < len(job.parts):
        until = job.parts[following].piece.first_row
    elif isinstance(job.reader, CountedReader):
        until = job.reader.count()
    else:
        return None
    return until - part.piece.first_row


def _rows_of(path: Path) -> int:
    return int(pl.scan_parquet(path).select(pl.len()).collect().item())


def _flush(path: Path) -> None:
    """Have a file's bytes on the disk before it gets its name."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
