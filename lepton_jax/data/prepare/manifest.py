"""The manifest: all that a preparation has done, as plain JSON.

There is nothing in it that two runs over the same sources would not share: no time, no
folder, no number of workers. `format` grows when a reader of an older format would
misunderstand it.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from lepton_jax.data.prepare.passes import describe, plan_passes
from lepton_jax.data.prepare.pieces import READER, Job, Task, state_path
from lepton_jax.data.prepare.preparation import Checked
from lepton_jax.data.prepare.statistics import add
from lepton_jax.data.prepare.step import Fitted
from lepton_jax.data.prepare.store import checksum, key_of, write_arrow
from lepton_jax.data.readers.reader import ROW, SOURCE, Column, Reader

FORMAT = 1
NAME = "manifest.json"
STATES = "states"  # folder
RAW = f"{STATES}/raw.arrow"
SCHEMA = f"{STATES}/schema.arrow"
SHARD_KEYS = ("split", "path", "rows", "bytes", "sha256")
ACTIONS = ("dropped", "changed", "flagged")


def plain(value: Any) -> Any:
    """Return a value as data that JSON holds."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {
            str(
                key,
            ): plain(inner)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        ordered = sorted(value) if isinstance(value, set | frozenset) else value
        return [plain(inner) for inner in ordered]
    if value is None or isinstance(
        value,
        str | int | float | bool,
    ):
        return value
    return str(value)


def dialect_of(reader: Reader) -> Any:
    """Return how a reader reads its source, in words; None: there is one way."""
    described = getattr(reader, "described", None)
    return None if described is None else plain(described())


def manifest_of(
    checked: Checked,
    job: Job,
    tasks: Sequence[Task],
    records: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Return the manifest of a preparation whose pieces are all done.

    Args:
      checked: the preparation.
      job: its last pass.
      tasks: all pieces.
      records: of the pieces, in the same order.
    """
    final = checked.schemas[-1]
    return {
        "format": FORMAT,
        "sources": _sources(checked, tasks, records),
        "passes": describe(
            checked.steps,
            plan_passes(checked.steps, checked.schemas),
        ),
        "steps": _steps(job, records),
        "raw": _file(Path(job.folder), RAW),
        "inputs": [
            name for name in checked.outputs if name not in checked.preparation.targets
        ],
        "target": plain(checked.preparation.target),
        "output": job.output,
        "columns": _file(Path(job.folder), SCHEMA),
        "schema": [
            {
                "name": name,
                "type": str(
                    final[name],
                ),
            }
            for name in job.outputs
        ],
        "splits": _splits(records, job.outputs),
        "shards": _shards(records),
        "quarantine": _quarantine(records),
    }


def _sources(
    checked: Checked,
    tasks: Sequence[Task],
    records: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    sources = []
    for number, name in enumerate(checked.names):
        reader = checked.readers[number]
        own = [record for record in records if record["source"] == number]
        digests = [task.piece.digest for task in tasks if task.source == number]
        sources.append(
            {
                "name": name,
                "reader": type(reader).__name__,
                "of": reader.name,
                "digest": key_of(digests),
                "pieces": len(own),
                "rows": sum(record["counts"][0] for record in own),
                "refused": sum(record["refused"] for record in own),
                "dialect": dialect_of(reader),
                "columns": [
                    _column(
                        one,
                        own,
                    )
                    for one in checked.columns[number]
                ],
            }
        )
    return sources


def _column(
    column: Column,
    records: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    return {
        "name": column.name,
        "type": str(column.type),
        "reason": column.reason,
        "against": _cells(records, "against", column.name),
        "examples": list(column.examples),
        "missing": _cells(records, "missing", column.name),
    }


def _cells(
    records: Sequence[dict[str, Any]],
    which: str,
    column: str,
) -> int:
    return sum(
        record[which].get(
            column,
            0,
        )
        for record in records
    )


def _steps(
    job: Job,
    records: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    steps = []
    for number, step in enumerate(job.steps):
        reasons = _reasons(records, number)
        counts = dict.fromkeys(ACTIONS, 0)
        for reason in reasons:
            counts[reason["action"]] += reason["rows"]
        steps.append(
            {
                "arguments": plain(step.to_json()),
                "serves": step.serves,
                "fits_on": step.fits_on if isinstance(step, Fitted) else None,
                "in": sum(record["counts"][number] for record in records),
                "out": sum(record["counts"][number + 1] for record in records),
                **counts,
                "reasons": reasons,
                "state": _state(job, number),
            }
        )
    return steps


def _reasons(
    records: Sequence[dict[str, Any]],
    step: int,
) -> list[dict[str, Any]]:
    """Return how many notes of a step there are for each action and reason."""
    total: dict[tuple[str, str], int] = {}
    for record in records:
        for note in record["notes"]:
            if note["step"] == step:
                key = (note["action"], note["reason"])
                total[key] = (
                    total.get(
                        key,
                        0,
                    )
                    + note["rows"]
                )
    return [
        {"action": action, "reason": reason, "rows": rows}
        for (action, reason), rows in sorted(total.items())
    ]


def _state(
    job: Job,
    number: int,
) -> dict[str, Any] | None:
    """Copy a state to the folder that stays, and return its entry."""
    digest = job.states[number]
    if digest is None:
        return None
    name = f"{STATES}/{number:02}-{type(job.steps[number]).__name__}.arrow"
    path = Path(job.folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or checksum(path) != digest:
        draft = path.with_name(f"{path.name}.unfinished")
        shutil.copyfile(state_path(job.folder, digest), draft)
        draft.replace(path)
    return _file(Path(job.folder), name)


def _file(
    folder: Path,
    name: str,
) -> dict[str, Any]:
    path = folder / name
    return {
        "path": name,
        "bytes": path.stat().st_size,
        "sha256": checksum(
            path,
        ),
    }


def write_schemas(
    folder: Path,
    checked: Checked,
    example: pl.DataFrame | None,
) -> None:
    """Write the types of the columns of raw rows and of shards, as tables.

    Args:
      folder: of the preparation.
      checked: the preparation.
      example: a raw row that was not dropped, of which the target's value is all that
        is there; it is the one row of the first table.
    """
    final = checked.schemas[-1]
    columns = {name: final[name] for name in (SOURCE, ROW, *checked.outputs)}
    write_arrow(folder / SCHEMA, pl.DataFrame(schema=columns))
    table = pl.DataFrame(schema=checked.raw)
    if example is not None:
        table = pl.concat([table, example], how="diagonal")
    write_arrow(folder / RAW, table)


def _shards(
    records: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Return the entries of all shards: training first, in the order of the rows."""
    entries = []
    for record in records:
        for shard in record["shards"]:
            entry = {key: shard[key] for key in SHARD_KEYS}
            entry["source"] = record["source"]
            entry["piece"] = record["piece"]
            entries.append(entry)
    return sorted(entries, key=_by_split)


def _by_split(
    shard: dict[str, Any],
) -> tuple[bool, str]:
    return shard["split"] != "train", shard["split"]


def _splits(
    records: Sequence[dict[str, Any]],
    outputs: Sequence[str],
) -> dict[str, dict[str, Any]]:
    shards = [shard for record in records for shard in record["shards"]]
    by_name: dict[str, list[dict[str, Any]]] = {}
    for shard in sorted(shards, key=_by_split):
        by_name.setdefault(shard["split"], []).append(shard)
    return {
        name: _split(
            shards,
            outputs,
        )
        for name, shards in by_name.items()
    }


def _split(
    shards: Sequence[dict[str, Any]],
    outputs: Sequence[str],
) -> dict[str, Any]:
    pieces = [shard["statistics"] for shard in shards]
    return {
        "rows": sum(shard["rows"] for shard in shards),
        "bytes": sum(shard["bytes"] for shard in shards),
        "statistics": {
            name: add(
                [piece[name] for piece in pieces],
            )
            for name in outputs
        },
    }


def _quarantine(
    records: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    files = [file for record in records for file in record["quarantine"]]
    return {
        "rows": sum(file["rows"] for file in files),
        "refused": _reasons(records, READER),
        "files": files,
    }
