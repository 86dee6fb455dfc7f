"""What a preparation has read, done and written, as plain data for its report.

Most of it is in the manifest. The distributions of the raw columns are not: the sources
are read once more for them, a piece at a time.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import polars as pl

from lepton_jax.data.prepare.drift import Drift, drift
from lepton_jax.data.prepare.leaks import Leak, Leaks, leaks_of
from lepton_jax.data.prepare.preparation import RESERVED, Checked, Preparation, check
from lepton_jax.data.prepare.prepared import Prepared
from lepton_jax.data.prepare.profile import Profile, profile
from lepton_jax.data.prepare.serving import Serving
from lepton_jax.data.prepare.shards import read_shard
from lepton_jax.data.prepare.store import write_bytes
from lepton_jax.data.readers.reader import ROW, SOURCE
from lepton_jax.errors import DataError
from lepton_jax.monitor import write_data_report

REPORT = "report.html"
PROFILE = "profile.json"  # of the raw training rows, for later comparisons
TRAIN = "train"
MOST_EXAMPLES = 3  # rows of the training split
MOST_DROPPED = 30  # rows that the report lists
LEARNED_CELLS = 12  # of a state that the report shows
# Columns that are compared in pictures; a table of thousands has no page. Assumption.
MOST_COLUMNS = 120
# Values of a target whose counts are shown for each split. Assumption.
MOST_CLASSES = 12
# Reasons of a step beyond which those that differ in numbers alone are put together.
MOST_REASONS = 8  # assumption
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
PLACE = re.compile(r"\b(\d+):(\d+)\b")  # of a row: its source and its number


def write_preparation_report(
    prepared: Prepared,
    preparation: Preparation,
    *,
    seconds: float | None = None,
    engine: str = "",
    reference: Profile | None = None,
) -> Path:
    """Write the page of a preparation, and the profile of its raw training rows.

    Args:
      prepared: what came out; the files go into its folder.
      preparation: what it was made by: its sources are read once more.
      seconds: time that it took; None: not known.
      engine: what it ran on, in words.
      reference: of earlier training rows, to compare these with.

    Returns:
      The page's path.

    Raises:
      DataError: a source has changed or gone, or a file can't be written.
    """
    raw = raw_profiles(prepared, preparation, reference)
    facts = facts_of(prepared, raw, reference)
    facts |= {"seconds": seconds, "engine": engine}
    facts["examples"] = _examples(prepared, check(preparation))
    write_bytes(
        prepared.folder / PROFILE,
        raw[TRAIN].to_json().encode(),
    )
    return write_data_report(prepared.folder / REPORT, facts)


def raw_profiles(
    prepared: Prepared,
    preparation: Preparation,
    reference: Profile | None = None,
) -> dict[str, Profile]:
    """Return profiles of the raw rows of each split, training first.

    Args:
      prepared: which rows are in which split.
      preparation: its sources are read.
      reference: the profile whose edges are used; None: those of the training split.
    """
    checked = check(preparation)
    like = reference
    profiles = {}
    for split in _ordered(prepared):
        tables = partial(_raw_tables, checked, prepared, split)
        profiles[split] = profile(tables, like)
        like = like or profiles[split]
    return profiles


def prepared_profiles(prepared: Prepared) -> dict[str, Profile]:
    """Return profiles of the prepared rows of each split, training first."""
    like = None
    profiles = {}
    for split in _ordered(prepared):
        tables = partial(_prepared_tables, prepared, split)
        profiles[split] = profile(tables, like)
        like = like or profiles[split]
    return profiles


def facts_of(
    prepared: Prepared,
    raw: dict[str, Profile],
    reference: Profile | None = None,
) -> dict[str, Any]:
    """Return the facts that `monitor.data_page` draws.

    Args:
      prepared: what came out.
      raw: profiles of the raw rows of each split.
      reference: of earlier training rows.
    """
    manifest = prepared.manifest
    moved = _comparisons(raw, reference)
    made = prepared_profiles(prepared)
    return {
        "name": prepared.folder.resolve().name,
        "folder": str(prepared.folder.resolve()),
        "written": time.strftime("%d %B %Y, %H:%M").lstrip("0"),
        "version": version("lepton-jax"),
        "alarms": [
            *_leaks(prepared),
            *_refusals(manifest),
            *_drift_alarms(moved),
        ],
        "sources": manifest["sources"],
        "steps": [
            _step(
                prepared,
                number,
            )
            for number in range(len(manifest["steps"]))
        ],
        "splits": _splits(prepared),
        "drift": [
            _rows_of(
                title,
                rows,
            )
            for title, rows in moved.items()
        ],
        "profiles": [
            _pictures("Columns as they were read", raw),
            _pictures("Columns as they are given to the model", made),
        ],
        "dropped": _dropped(prepared),
        "versions": {
            "lepton-jax": version("lepton-jax"),
            "polars": pl.__version__,
        },
    }


# ---- rows ----


def _ordered(prepared: Prepared) -> list[str]:
    return sorted(
        prepared.splits,
        key=lambda split: (split != TRAIN, split),
    )


def _raw_tables(
    checked: Checked,
    prepared: Prepared,
    split: str,
) -> Iterator[pl.DataFrame]:
    """Yield the raw rows of a split, a piece at a time."""
    keys = prepared.table(
        split,
        traced=True,
    ).select(
        SOURCE,
        ROW,
    )
    size = checked.preparation.piece_bytes
    names = [name for name in checked.raw if name not in (SOURCE, ROW)]
    for number, reader in enumerate(checked.readers):
        own = keys.filter(pl.col(SOURCE) == number).select(ROW)
        for piece in reader.pieces(size):
            table = reader.read(piece).table
            rows = table.join(
                own,
                on=ROW,
                how="semi",
            )
            yield _with_columns(rows, names, checked.raw)


def _with_columns(
    table: pl.DataFrame,
    names: Sequence[str],
    schema: pl.Schema,
) -> pl.DataFrame:
    columns = [
        pl.col(name).cast(schema[name])
        if name in table.columns
        else pl.lit(
            None,
            schema[name],
        ).alias(name)
        for name in names
    ]
    return table.select(columns)


def _prepared_tables(
    prepared: Prepared,
    split: str,
) -> Iterator[pl.DataFrame]:
    for path in prepared.shards(split):
        yield read_shard(
            path,
            prepared.schema,
        ).select(prepared.outputs)


def _examples(
    prepared: Prepared,
    checked: Checked,
) -> list[dict[str, Any]]:
    """Return the first rows of the training split, raw and prepared."""
    first = read_shard(
        prepared.shards(TRAIN)[0],
        prepared.schema,
    ).head(MOST_EXAMPLES)
    if not first.height:
        return []
    number = first[SOURCE][0]
    reader = checked.readers[number]
    piece = _piece_of(
        checked,
        number,
        first[ROW][0],
    )
    raw = reader.read(piece).table
    examples = []
    for after in first.iter_rows(named=True):
        before = raw.filter(pl.col(ROW) == after[ROW])
        if not before.height:
            continue
        examples.append(
            {
                "row": f"{checked.names[number]}:{after[ROW]}",
                "before": _shown(
                    before.row(
                        0,
                        named=True,
                    )
                ),
                "after": _shown(after),
            }
        )
    return examples


def _piece_of(
    checked: Checked,
    source: int,
    row: int,
) -> Any:
    pieces = checked.readers[source].pieces(checked.preparation.piece_bytes)
    before = [piece for piece in pieces if piece.first_row <= row]
    return before[-1]


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row's own columns; bytes as their count."""
    return {
        name: f"{len(value):,} bytes" if isinstance(value, bytes) else value
        for name, value in row.items()
        if not name.startswith(RESERVED)
    }


def _dropped(prepared: Prepared) -> list[dict[str, Any]]:
    notes = prepared.quarantine()
    if not notes.height:
        return []
    action = pl.col(f"{RESERVED}action")
    rows = notes.filter(action == "dropped").head(MOST_DROPPED)
    names = [source["name"] for source in prepared.manifest["sources"]]
    steps = [
        "the reader",
        *map(
            _name,
            prepared.manifest["steps"],
        ),
    ]
    return [
        _dropped_row(
            row,
            names,
            steps,
        )
        for row in rows.iter_rows(named=True)
    ]


def _dropped_row(
    row: dict[str, Any],
    names: Sequence[str],
    steps: Sequence[str],
) -> dict[str, Any]:
    partner = row[f"{RESERVED}partner_row"]
    source = row[f"{RESERVED}partner_source"]
    raw = _shown(row)
    return {
        "row": f"{names[row[SOURCE]]}:{row[ROW]}",
        "step": steps[row[f"{RESERVED}step"] + 1],
        "reason": row[f"{RESERVED}reason"],
        "partner": "" if partner is None else f"{_of(names, source)}:{partner}",
        "before": row[f"{RESERVED}before"]
        or ", ".join(
            map(
                str,
                raw.values(),
            )
        ),
    }


def _of(
    names: Sequence[str],
    source: int | None,
) -> str:
    return "existing" if source is None else names[source]


# ---- steps and splits ----


def _name(entry: dict[str, Any]) -> str:
    return str(entry["arguments"]["step"])


def _step(
    prepared: Prepared,
    number: int,
) -> dict[str, Any]:
    entry = prepared.manifest["steps"][number]
    arguments = {k: v for k, v in entry["arguments"].items() if k != "step"}
    return {
        "step": _name(entry),
        "arguments": arguments,
        "rows_in": entry["in"],
        "rows_out": entry["out"],
        "changed": entry["changed"],
        "flagged": entry["flagged"],
        "reasons": _reasons(entry["reasons"]),
        "learned": _learned(prepared, number),
    }


def _reasons(entries: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Return how many notes have each reason; those that differ in numbers are one."""
    many = len(entries) > MOST_REASONS
    reasons: dict[str, int] = {}
    for entry in entries:
        text = entry["reason"] or entry["action"]
        if many:
            text = NUMBER.sub("…", text)
        reasons[text] = (
            reasons.get(
                text,
                0,
            )
            + entry["rows"]
        )
    return reasons


def _learned(
    prepared: Prepared,
    number: int,
) -> str | None:
    """Return the beginning of a state, as text."""
    if prepared.manifest["steps"][number]["fits_on"] != TRAIN:
        return None  # which rows there are is no news
    state = prepared.steps[number].state
    if state is None or not state.height:
        return None
    rows = [
        " ".join(_figure(value) for value in row)
        for row in state.head(
            LEARNED_CELLS
            // max(
                1,
                state.width,
            )
        ).iter_rows()
    ]
    left = state.height - len(rows)
    more = f"; and {left:,} more" if left else ""
    return f"{', '.join(state.columns)}: {'; '.join(rows)}{more}"


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _splits(prepared: Prepared) -> list[dict[str, Any]]:
    words = Serving(prepared, "").words
    splits = []
    for name in _ordered(prepared):
        entry = prepared.manifest["splits"][name]
        target: dict[str, int] = {}
        if len(prepared.targets) == 1:
            top = entry["statistics"][prepared.targets[0]]["top"] or []
            target = dict(top) if len(top) <= MOST_CLASSES else {}
        named = {
            _word(
                words,
                value,
            ): rows
            for value, rows in sorted(target.items())
        }
        splits.append({"name": name, "rows": entry["rows"], "target": named})
    return splits


def _word(
    words: Sequence[str],
    value: str,
) -> str:
    return words[int(value)] if words else value


# ---- comparisons ----


def _comparisons(
    raw: dict[str, Profile],
    reference: Profile | None,
) -> dict[str, list[Drift]]:
    """Return how far tables have moved from each other, by the comparison's title."""
    train = raw[TRAIN]
    moved = {
        f"{TRAIN} and {split}": drift(train, other)
        for split, other in raw.items()
        if split != TRAIN
    }
    if reference is not None:
        moved[f"the saved reference and {TRAIN}"] = drift(reference, train)
    return moved


def _rows_of(
    title: str,
    rows: Sequence[Drift],
) -> dict[str, Any]:
    return {"title": title, "rows": [asdict(row) for row in rows]}


def _drift_alarms(moved: dict[str, list[Drift]]) -> list[dict[str, Any]]:
    alarms = []
    for title, rows in moved.items():
        names = [row.column for row in rows if row.verdict == "large"]
        if names:
            alarms.append(
                {
                    "level": "warning",
                    "what": f"{title} differ in {', '.join(names)}",
                    "details": (
                        "The population stability index is above 0.25: what was"
                        " learned from the one may not hold for the other."
                    ),
                }
            )
    return alarms


def _leaks(prepared: Prepared) -> list[dict[str, Any]]:
    """Return what the splits know of each other, where a step has looked for it."""
    return [
        {
            "level": "error",
            "what": leak.what,
            "details": f"{leak.count:,} found, a share of {leak.share:.1%}",
            "examples": [
                _place(
                    prepared,
                    text,
                )
                for text in leak.examples
            ],
        }
        for leak in leaks_in(prepared)
    ]


def leaks_in(prepared: Prepared) -> list[Leak]:
    """Return the alarms of a preparation with the step `Leaks`; [] without it."""
    return [
        leak
        for one in prepared.steps
        if isinstance(
            one.step,
            Leaks,
        )
        and one.state is not None
        for leak in leaks_of(one.state)
    ]


def _place(prepared: Prepared, text: str) -> str:
    """Return "0:17 and 1:3" with the names of the sources."""
    names = [source["name"] for source in prepared.manifest["sources"]]

    def named(match: re.Match[str]) -> str:
        return f"{names[int(match[1])]}:{match[2]}"

    return PLACE.sub(named, text)


def _refusals(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "level": "warning",
            "what": f"{reason['rows']:,} rows could not be read: {reason['reason']}",
            "details": "The quarantine table holds their text.",
        }
        for reason in manifest["quarantine"]["refused"]
    ]


def _pictures(
    title: str,
    profiles: dict[str, Profile],
) -> dict[str, Any]:
    columns = list(profiles[TRAIN].columns)
    note = ""
    if len(columns) > MOST_COLUMNS:
        note = f"{len(columns) - MOST_COLUMNS:,} more columns are left out."
    tables = {}
    for name, one in profiles.items():
        content = asdict(one)
        kept = columns[:MOST_COLUMNS]
        content["columns"] = {column: content["columns"][column] for column in kept}
        tables[name] = content
    return {"title": title, "note": note, "tables": tables}


def read_profile(path: str | Path) -> Profile:
    """Return a saved profile: of a preparation's folder, or the file itself.

    Raises:
      DataError: there is none.
    """
    file = Path(path)
    if file.is_dir():
        file = file / PROFILE
    try:
        return Profile.from_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"the profile can't be read: {error.strerror}",
            where=file,
            remedy="name a folder that lepton prepare --report has written",
        ) from error
