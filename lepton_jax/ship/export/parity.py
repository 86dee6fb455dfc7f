"""Parity: an exported model against the trainer, on stored rows, in its own runtime.

    rows  raw  largest difference  labels differ  first layer  accuracy of both
    200   yes  2.4e-07             0              none         0.984, 0.984

The rows go through the preparation in the artifact, and then, in a process of its own,
through the target's runtime alone (`replay.py`).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lepton_jax.errors import DataError, LeptonError, ModelError
from lepton_jax.ship.artifact.artifact import Artifact
from lepton_jax.ship.artifact.signature import PREDICTION
from lepton_jax.ship.export import probing, replay
from lepton_jax.ship.export.target import SIGNATURE, Options, Source, Target
from lepton_jax.step.precision import dtype_of

# Largest difference, relative to a row's largest output, or to 1, by the precision that
# the model computes in. Of the low ones: four times their last place, for a runtime
# may round between two operations where XLA does not. Assumption.
TOLERANCE = 1e-5
TOLERANCES = {"float32": TOLERANCE, "bfloat16": 2.0**-6, "float16": 2.0**-9}
SECONDS = 600.0  # that a replay may take; assumption
PARITY = "parity.json"


@dataclass(frozen=True)
class Parity:
    """A comparison of an exported model with the trainer's outputs.

    Attributes:
      target: its name.
      rows: compared.
      are_raw: whether they were raw, and went through the preparation.
      refused: rows that both the trainer and the artifact refuse.
      difference: largest difference of a floating-point output.
      scaled: the same, relative to the row's largest output, or to 1.
      labels: rows of which a whole-number prediction differs.
      worst: name of the output with the largest difference.
      departs: the first layer that differs by more than the tolerance; "none"; or why
        it is not known.
      metrics: by name, on the stored held-out rows: of the trainer, and of the target.
      runtime: that ran it.
      tolerance: that `passes` is judged by.
    """

    target: str
    rows: int
    are_raw: bool
    refused: int
    difference: float
    scaled: float
    labels: int
    worst: str
    departs: str = "none"
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)
    runtime: str = ""
    tolerance: float = TOLERANCE

    @property
    def passes(self) -> bool:
        """Whether no output differs by more than the tolerance, and no label."""
        return self.scaled <= self.tolerance and not self.labels

    def to_fields(self) -> dict[str, Any]:
        """Return the comparison as plain data."""
        return {**asdict(self), "passes": self.passes}

    def __str__(self) -> str:
        kind = "raw rows" if self.are_raw else "rows"
        verdict = "equal" if self.passes else "NOT equal"
        lines = [
            f"{self.target}: {verdict} to the trainer within {self.tolerance:g}",
            f"  {self.rows} {kind}, {self.refused} refused by both",
            f"  largest difference {self.difference:.2g} ({self.worst}), relative"
            f" {self.scaled:.2g}; {self.labels} labels differ",
            f"  first layer that departs: {self.departs}",
        ]
        lines += [
            f"  {name} on held-out rows: trainer {left:.6g}, {self.target} {right:.6g}"
            for name, (left, right) in self.metrics.items()
        ]
        return "\n".join(lines)


def compare(
    artifact: Artifact,
    target: Target,
    folder: Path,
    *,
    python: str | None = None,
    source: Source | None = None,
    options: Options | None = None,
) -> Parity:
    """Replay an artifact's stored rows with an exported model, and compare.

    Args:
      artifact: with the rows.
      target: of the export.
      folder: that was written.
      python: an interpreter that has the target's runtime; None: this one.
      source: a live one, to look for the first layer that departs; None: it is not
        looked for.
      options: of the export.

    Raises:
      DataError: the artifact has no stored rows, or prepares one that the trainer
        refuses.
      ModelError: the runtime fails.
    """
    if not target.is_program:
        return _of_weights(artifact, target, folder, python)
    check_rows(artifact)
    refused = _check_refused(artifact)
    inputs = _inputs(artifact)
    found = replayed(folder, inputs, python)
    parity = _told(
        artifact,
        target.name,
        target.runtime,
        refused,
        found,
    )
    if parity.passes:
        return parity
    departs = _departs(source, target, inputs, python, options)
    return replace(parity, departs=departs)


def compare_opened(artifact: Artifact) -> Parity | None:
    """Compare an artifact that was opened with the trainer's outputs on its rows.

    Args:
      artifact: an opened one.

    Returns:
      The comparison; None: it has no stored rows.

    Raises:
      DataError: it predicts a row that the trainer refuses.
    """
    if not len(artifact.stored):
        return None
    refused = _check_refused(artifact)
    found = artifact.run(_inputs(artifact))
    return _told(artifact, "lepton", "Lepton", refused, found)


def check_rows(artifact: Artifact) -> None:
    """Check that an artifact has rows to replay.

    Raises:
      DataError: it has none.
    """
    if not len(artifact.stored):
        raise DataError(
            "there are no stored rows to compare with the trainer",
            where=artifact.folder,
            remedy="export the run, whose recipe has the data; or give --no-replay",
        )


def compared(
    target: str,
    expected: Mapping[str, np.ndarray],
    found: Mapping[str, np.ndarray],
) -> Parity:
    """Compare outputs by name.

    Args:
      target: name of the one that gave `found`.
      expected: the trainer's.
      found: the other's.
    """
    worst = ""
    scaled = -1.0
    difference = 0.0
    wrong: Any = np.zeros(1, bool)
    for name, leaf in expected.items():
        if leaf.dtype.kind in "iub":
            if name.partition(".")[0] == PREDICTION:
                unequal = (
                    (leaf != found[name])
                    .reshape(
                        len(leaf),
                        -1,
                    )
                    .any(axis=1)
                )
                wrong = wrong | unequal
            continue
        gap = _largest(leaf, found[name])
        if gap > scaled:
            worst = name
            scaled = gap
            difference = _absolute(leaf, found[name])
    return Parity(
        target=target,
        rows=len(next(iter(expected.values()))),
        are_raw=False,
        refused=0,
        difference=difference,
        scaled=max(scaled, 0.0),
        labels=int(np.sum(wrong)),
        worst=worst,
    )


def replayed(
    folder: Path,
    inputs: Mapping[str, np.ndarray],
    python: str | None = None,
) -> dict[str, np.ndarray]:
    """Return the outputs of an exported model, run in a process of its own.

    Args:
      folder: that was written.
      inputs: by the signature's names.
      python: an interpreter that has the target's runtime; None: this one.

    Raises:
      ModelError: the runtime fails.
    """
    with tempfile.TemporaryDirectory() as place:
        given = Path(place) / "inputs.npz"
        got = Path(place) / "outputs.npz"
        np.savez(given, **dict(inputs))  # type: ignore[arg-type]
        # -I: neither this folder nor PYTHONPATH may lend it a library
        command = [python or sys.executable, "-I", replay.__file__]
        try:
            done = subprocess.run(
                [*command, str(folder), str(given), str(got)],
                capture_output=True,
                text=True,
                timeout=SECONDS,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise _not_run(folder, str(error)) from error
        if done.returncode:
            raise _not_run(folder, _last_line(done.stderr))
        with np.load(got, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}


def write_parity(parity: Parity, folder: Path) -> None:
    """Write the comparison next to the exported model."""
    (folder / PARITY).write_text(
        json.dumps(
            parity.to_fields(),
            indent=1,
        )
        + "\n"
    )


# ---- internals ----


def _inputs(artifact: Artifact) -> dict[str, np.ndarray]:
    """Return the inputs of the stored rows, as the artifact prepares raw ones."""
    stored = artifact.stored
    return stored.inputs if stored.rows is None else artifact.prepare(stored.rows)


def _told(
    artifact: Artifact,
    target: str,
    runtime: str,
    refused: int,
    found: Mapping[str, np.ndarray],
) -> Parity:
    """Return the comparison of outputs with those that an artifact has stored."""
    precision = artifact.manifest.recipe.get("precision", "float32")
    return replace(
        compared(target, artifact.stored.outputs, found),
        are_raw=artifact.stored.rows is not None,
        refused=refused,
        metrics=_metrics(artifact, found),
        runtime=runtime,
        tolerance=TOLERANCES.get(dtype_of(precision).name, TOLERANCE),
    )


def _largest(
    expected: np.ndarray,
    found: np.ndarray,
) -> float:
    """Return the largest difference of a row, relative to its largest output or 1.

    A row far off, whose outputs are large, must not hide differences of others.
    """
    if expected.shape != found.shape:
        return float("inf")
    return float(
        probing.row_differences(
            expected,
            found,
        ).max(initial=0.0)
    )


def _check_refused(artifact: Artifact) -> int:
    """Return how many stored rows the artifact refuses, as the trainer did.

    Raises:
      DataError: it predicts one that the trainer refuses.
    """
    rows = artifact.stored.refused
    if rows is None:
        return 0
    for number in range(rows.height):
        try:
            artifact.predict(rows.slice(number, 1))
        except LeptonError:
            continue
        raise DataError(
            f"the artifact predicts refused row {number}, and the trainer does not",
            where=artifact.folder,
            remedy="export again from checkpoint and recipe: lepton export RUN",
        )
    return int(rows.height)


def _metrics(
    artifact: Artifact,
    found: Mapping[str, np.ndarray],
) -> dict[str, tuple[float, float]]:
    """Return each metric on the held-out rows, of the trainer and of the target."""
    expected = artifact.measure(artifact.stored.outputs)
    other = artifact.measure(found)
    return {name: (value, other[name]) for name, value in expected.items()}


def _departs(
    source: Source | None,
    target: Target,
    inputs: Mapping[str, np.ndarray],
    python: str | None,
    options: Options | None,
) -> str:
    """Return the first layer in which the target departs from JAX."""
    if source is None or not source.is_live:
        return "not known: the model's code is not at hand"
    size = (
        target.batch_of(
            source,
            options or Options(),
        )
        or 1
    )
    batch = replay.rows_of(
        dict(inputs),
        0,
        size,
    )
    layers = probing.layers_of(source, size)
    expected = layers.run(source.weights, batch)
    with tempfile.TemporaryDirectory() as place:
        fixed = Options(
            size,
            (options or Options()).device,
        )
        try:
            target.write(layers, Path(place), fixed)
            found = replayed(Path(place), batch, python)
        except LeptonError as error:
            return f"not known: {error.what}"
    arrays = {
        tensor.name: np.asarray(expected[tensor.name]) for tensor in layers.outputs
    }
    first = probing.first_departure(arrays, found, TOLERANCE)
    return first or "none of the layers by itself"


def _absolute(expected: np.ndarray, found: np.ndarray) -> float:
    """Return the largest difference of two numbers; NaN does not count."""
    if expected.shape != found.shape:
        return float("inf")
    with np.errstate(invalid="ignore"):  # infinity from infinity
        gaps = np.abs(np.asarray(expected, np.float64) - found)
    return float(np.where(np.isnan(gaps), 0.0, gaps).max(initial=0.0))


def _of_weights(
    artifact: Artifact,
    target: Target,
    folder: Path,
    python: str | None,
) -> Parity:
    """Compare the weights bit by bit: such a file holds no program."""
    found = replayed(folder, {}, python)
    expected = artifact.weights
    assert set(found) == set(expected), "the file holds other weights"
    gaps = {
        path: probing.scaled_difference(array, found[path])
        for path, array in expected.items()
    }
    worst = max(gaps, key=gaps.__getitem__)
    same = all(
        found[path].tobytes() == array.tobytes() for path, array in expected.items()
    )
    return Parity(
        target=target.name,
        rows=0,
        are_raw=False,
        refused=0,
        difference=0.0 if same else gaps[worst],
        scaled=0.0
        if same
        else max(
            gaps[worst],
            2 * TOLERANCE,
        ),
        labels=0,
        worst=worst,
        departs=f"no program; {len(expected)} arrays bit by bit",
        runtime=target.runtime,
    )


def _not_run(folder: Path, why: str) -> ModelError:
    return ModelError(
        f"the exported model can't be run: {why}",
        where=folder / SIGNATURE,
        remedy="give an interpreter that has the target's runtime: --python PATH",
    )


def _last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1] if lines else "it gave no reason"
