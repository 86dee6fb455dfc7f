"""Rows that an artifact keeps with what the trainer made of them.

Whoever runs the model elsewhere can replay them and compare. They are held-out rows
where there are some, and of raw rows a part is awkward on purpose (see `awkward`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lepton_jax.errors import DataError
from lepton_jax.ship.artifact.awkward import awkward_rows
from lepton_jax.ship.artifact.signature import (
    OUTPUTS,
    PREDICTION,
    named,
    named_inputs,
)
from lepton_jax.ship.artifact.tensors import read_tensors, write_tensors
from lepton_jax.train.judged import samples_of

ROWS = "rows.arrow"
REFUSED = "refused.arrow"
ARRAYS = "arrays.safetensors"
AWKWARD = 0.25  # share of the stored raw rows that are made awkward; assumption
PARTS = ("inputs", "outputs", "targets")


@dataclass(frozen=True, eq=False)
class Stored:
    """Rows with the trainer's outputs.

    Attributes:
      rows: raw rows, a Polars table; None: the model takes arrays alone, or the raw
        rows are not known.
      inputs: the program's inputs of these rows, by name.
      outputs: the trainer's outputs and predictions of them, by the signature's names.
      targets: of the held-out ones, which come first, by path; {}: not known.
      refused: raw rows that the trainer refuses to predict; None: there are none.
    """

    rows: Any = None
    inputs: dict[str, np.ndarray] = field(default_factory=dict)
    outputs: dict[str, np.ndarray] = field(default_factory=dict)
    targets: dict[str, np.ndarray] = field(default_factory=dict)
    refused: Any = None

    def __len__(self) -> int:
        return len(
            next(
                iter(self.inputs.values()),
                (),
            )
        )

    @property
    def held_out(self) -> int:
        """Count of the first rows, which come from the test data and have targets."""
        return len(
            next(
                iter(self.targets.values()),
                (),
            )
        )

    def save(self, folder: Path) -> None:
        """Write the rows into a folder, which is made."""
        folder.mkdir(parents=True)
        arrays = {
            f"{part}/{name}": array
            for part in PARTS
            for name, array in getattr(
                self,
                part,
            ).items()
        }
        write_tensors(folder / ARRAYS, arrays)
        for file, rows in ((ROWS, self.rows), (REFUSED, self.refused)):
            if rows is not None:
                (folder / file).write_bytes(_arrow(rows))

    @classmethod
    def load(cls, folder: Path) -> Stored:
        """Read what `save` has written."""
        parts: dict[str, dict[str, np.ndarray]] = {part: {} for part in PARTS}
        for path, array in read_tensors(folder / ARRAYS).items():
            part, _, name = path.partition("/")
            parts[part][name] = array
        return cls(
            rows=_read_arrow(folder / ROWS),
            refused=_read_arrow(folder / REFUSED),
            **parts,
        )


def stored_rows(
    trainer: Any,
    rows: Any,
    names: Mapping[str, Any],
) -> Stored:
    """Return some of a trainer's rows with its outputs on them.

    Args:
      trainer: one that has a model.
      rows: at most; or a Polars table of raw rows.
      names: of the outputs that are wanted.
    """
    if not isinstance(rows, int):
        return _with_raw(trainer, rows, None, names)
    most = rows
    data = trainer.recipe.test
    if data is None:
        data = trainer.recipe.train
    if data is None or most < 1:
        return Stored()
    program = trainer.program
    samples = samples_of(program, data, most)
    raw = _raw(trainer, samples)
    if raw is None:
        outputs = _outputs(trainer, samples.inputs, names)
        return Stored(
            inputs=_arrays(samples.inputs),
            outputs=outputs,
            targets=_by_target(samples.targets),
        )
    return _with_raw(trainer, raw, samples.targets, names)


# ---- internals ----


def _with_raw(
    trainer: Any,
    raw: Any,
    targets: Any,
    names: Mapping[str, Any],
) -> Stored:
    """Return raw rows, of which the last ones are awkward, with the outputs."""
    count = max(
        1,
        raw.height - int(raw.height * AWKWARD),
    )
    known = _by_target(targets)
    ordinary = raw.head(count)
    good, bad = _told_apart(
        trainer,
        awkward_rows(ordinary, raw.height - count),
    )
    rows = ordinary.vstack(good).rechunk()
    inputs = trainer.preparation.arrays(rows)
    return Stored(
        rows=rows,
        inputs=_arrays(inputs),
        outputs=_outputs(trainer, rows, names),
        targets={path: leaf[:count] for path, leaf in known.items()},
        refused=bad if bad.height else None,
    )


def _told_apart(
    trainer: Any,
    rows: Any,
) -> tuple[Any, Any]:
    """Return the rows that the trainer predicts, and those that it refuses."""
    if not rows.height or _takes(trainer, rows):
        return rows, rows.head(0)
    takes = [
        _takes(
            trainer,
            rows.slice(number, 1),
        )
        for number in range(rows.height)
    ]
    taken = np.asarray(takes)
    return rows.filter(taken), rows.filter(~taken)


def _takes(trainer: Any, rows: Any) -> bool:
    try:
        trainer.predict(rows)
    except DataError:  # a step drops it, or the outputs would hold NaN
        return False
    return True


def _raw(trainer: Any, samples: Any) -> Any:
    """Return the raw rows of samples, with the columns that matter; None: not known."""
    serving = trainer.preparation
    if serving is None or samples.read_raw is None:
        return None
    try:
        rows = samples.raw()
    except DataError:  # its sources are not at hand; a note says so
        return None
    targets = set(serving.prepared.targets)
    names = [name for name in rows.columns if name in serving.needed]
    return rows.select(name for name in names if name not in targets)


def _outputs(
    trainer: Any,
    inputs: Any,
    names: Mapping[str, Any],
) -> dict[str, np.ndarray]:
    outputs = named(
        trainer.predict(inputs, decode=_as_they_are),
        OUTPUTS,
    )
    decoded = named(trainer.predict(inputs), PREDICTION)
    both = outputs | decoded
    return {name: np.asarray(both[name]) for name in names if name in both}


def _as_they_are(outputs: Any) -> Any:
    return outputs


def _arrays(inputs: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in named_inputs(inputs).items()}


def _by_target(targets: Any) -> dict[str, np.ndarray]:
    if targets is None:
        return {}
    return {
        name: np.asarray(leaf)
        for name, leaf in named(
            targets,
            "targets",
        ).items()
    }


def _arrow(rows: Any) -> bytes:
    from lepton_jax.data.prepare.store import arrow_bytes  # needs an extra

    return arrow_bytes(rows)


def _read_arrow(path: Path) -> Any:
    if not path.is_file():
        return None
    from lepton_jax.data.prepare.store import read_arrow  # needs an extra

    return read_arrow(path)
