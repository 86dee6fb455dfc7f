"""An artifact made of a trainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax import export

from lepton_jax.errors import DataError, ModelError
from lepton_jax.ship.artifact import columns, measuring, tracing
from lepton_jax.ship.artifact.manifest import Manifest, made_now
from lepton_jax.ship.artifact.signature import ANY
from lepton_jax.ship.artifact.stored import Stored, stored_rows

INPUTS = "inputs"  # first part of the paths of a program's limits


class Parts(NamedTuple):
    """The parts of an artifact.

    Attributes:
      manifest: without the checksums of files.
      programs: the model's programs, serialized, by the rows of a batch; -1: any.
      measure: the program of its loss and metrics, likewise; b"": there is none.
      weights: by path.
      serving: the way from raw rows to inputs; None: there is none.
      profile: of the training rows after the steps; None: there is none.
      stored: rows with the trainer's outputs.
      training: what the rows of training looked like, as JSON; None: not known.
    """

    manifest: Manifest
    programs: dict[int, bytes]
    measure: bytes
    weights: dict[str, np.ndarray]
    serving: Any
    profile: Any
    stored: Stored
    training: str | None = None


def parts_of(
    trainer: Any,
    name: str | None,
    version: str,
    rows: Any,
) -> Parts:
    """Return the parts of the artifact of a trainer's model.

    Args:
      trainer: one that has a model.
      name: of the model; None: the recipe's.
      version: of the model.
      rows: that are stored, at most; or a table of them.

    Raises:
      ModelError: there is no model, or it can't be exported.
    """
    if trainer.program is None:
        raise ModelError(
            "the trainer has no model yet",
            where="Artifact.of",
            remedy="call fit, load or resume first",
        )
    model = tracing.traced(trainer)
    programs = tracing.programs_of(model, trainer.recipe.batch_size)
    wanted = {tensor.name: tensor for tensor in model.outputs}
    stored = stored_rows(trainer, rows, wanted)
    held_out = stored.held_out
    metrics, fault = measuring.exported_metrics(trainer, model, held_out)
    serving = trainer.preparation
    training, unwatched = _training(trainer)
    manifest = Manifest(
        name=name or trainer.recipe.name,
        version=version,
        made=made_now(programs.platforms),
        inputs=tracing.signature_of(model.inputs),
        outputs=model.outputs,
        columns=columns.columns_of(serving, stored.rows),
        labels=_labels(serving),
        metrics=_metrics(trainer),
        recipe=_recipe(trainer),
        step=int(trainer.step),
        limits=_limits(trainer),
        meeting=model.meeting,
        draws=model.draws,
        batch_size=trainer.recipe.batch_size,
        sizes=tuple(size for size in programs.by_size if size != ANY),
        notes=(
            *model.left_out,
            *programs.notes,
            *filter(None, [fault]),
            *unwatched,
            *_notes(trainer, stored, rows),
        ),
    )
    profile = None if serving is None else serving.training_profile()
    return Parts(
        manifest,
        {size: _bytes(program) for size, program in programs.by_size.items()},
        b"" if metrics is None else _bytes(metrics),
        model.weights,
        serving,
        profile,
        stored,
        training,
    )


def deserialized(content: bytes) -> export.Exported:
    """Return a program.

    Raises:
      Exception: it is damaged, or of a version of JAX that is too old or too new: of
        flatbuffers, or of JAX.
    """
    program = export.deserialize(bytearray(content))
    program.mlir_module()  # an older JAX fails now, and not when it compiles
    return program


# ---- internals ----


def _training(trainer: Any) -> tuple[str | None, list[str]]:
    """Return what the rows of training looked like, or a note why it is not known."""
    if find_spec("polars") is None:
        return None, ["drift can't be watched: polars is not installed"]
    # only here: a model of arrays alone does not need the library for tables
    from lepton_jax.ship.watch.reference import training_rows

    try:
        known = training_rows(trainer)
    except DataError as error:
        return None, [f"drift can't be watched: {error.what}"]
    if known is None:
        return None, ["drift can't be watched: the rows of training are not at hand"]
    return known.to_json(), []


def _bytes(program: export.Exported) -> bytes:
    return bytes(program.serialize())


def _labels(serving: Any) -> tuple[Any, ...]:
    return tuple(getattr(serving, "words", ()))


def _metrics(trainer: Any) -> dict[str, float]:
    """Return loss and metrics on the recipe's test data; {}: it has none."""
    if trainer.recipe.test is None:
        return {}
    measured = trainer.evaluate()
    names = ["loss", *trainer.recipe.metrics]
    return dict(
        zip(
            names,
            map(float, measured),
            strict=True,
        )
    )


def _recipe(trainer: Any) -> dict[str, Any]:
    """Return where the model came from, in plain data."""
    source: Mapping[str, Any] = trainer._source
    return {
        "name": trainer.recipe.name,
        "file": source.get("file"),
        "settings": dict(
            source.get(
                "settings",
                {},
            )
        ),
        "model": trainer.program.trace.functional.name,
        "precision": trainer.recipe.precision,
        "run": None if trainer.run_dir is None else str(Path(trainer.run_dir)),
    }


def _limits(trainer: Any) -> tuple[dict[str, Any], ...]:
    """Return the limits of the inputs' whole numbers, in plain data."""
    return tuple(
        asdict(limit)
        for limit in trainer.program.limits
        if limit.path.partition("/")[0] == INPUTS
    )


def _notes(
    trainer: Any,
    stored: Stored,
    rows: Any,
) -> list[str]:
    """Return what could not be had, and why."""
    notes = []
    is_asked = not isinstance(rows, int) or rows > 0
    if not len(stored) and is_asked:
        notes.append("no rows are stored: the recipe has no data at hand")
    if trainer.preparation is not None and len(stored) and stored.rows is None:
        notes.append("the stored rows are arrays: their raw rows are not at hand")
    if trainer.recipe.test is None:
        notes.append("there are no metrics: the recipe has no test data")
    if trainer.preparation is None:
        notes.append("it takes arrays alone: the recipe has no preparation of raw rows")
    return notes
