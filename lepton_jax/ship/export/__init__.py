"""Exports: a trained model in the form that another runtime takes, and the proof."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path
from typing import Any

from lepton_jax.errors import CheckpointError, ModelError, SettingError, nearest
from lepton_jax.ship.artifact import tracing
from lepton_jax.ship.artifact.artifact import Artifact
from lepton_jax.ship.export.iree import IREE
from lepton_jax.ship.export.onnx import ONNX
from lepton_jax.ship.export.parity import (
    Parity,
    check_rows,
    compare,
    compare_opened,
    write_parity,
)
from lepton_jax.ship.export.stablehlo import Safetensors, StableHLO
from lepton_jax.ship.export.target import (
    SIGNATURE,
    Options,
    Source,
    Target,
    source_of,
)
from lepton_jax.ship.export.tensorflow import LiteRT, SavedModel

__all__ = [
    "LEPTON",
    "TARGETS",
    "Options",
    "Parity",
    "Source",
    "Target",
    "check",
    "compare",
    "compare_opened",
    "export",
    "live_source",
    "source_of",
    "target_of",
]

LEPTON = "lepton"  # the artifact itself
TARGETS: dict[str, Target] = {
    target.name: target
    for target in (StableHLO(), ONNX(), LiteRT(), IREE(), SavedModel(), Safetensors())
}


def target_of(name: str) -> Target:
    """Return a target by its name.

    Raises:
      SettingError: there is none of this name.
    """
    if name not in TARGETS:
        known = (LEPTON, *TARGETS)
        raise SettingError(
            f"there is no target {name!r}{nearest(name, known)}",
            where="command line, --to",
            remedy=f"name one of {', '.join(known)}",
        )
    return TARGETS[name]


def live_source(artifact: Artifact, trainer: Any) -> Source:
    """Return a source into whose code JAX can trace.

    Args:
      artifact: of the trainer.
      trainer: with the model.
    """
    return source_of(artifact, tracing.traced(trainer))


def check(
    target: Target,
    source: Source,
    options: Options,
) -> None:
    """Check that a target can take a model, before work starts.

    Raises:
      ModelError: it can't; or a library that makes it is missing.
    """
    missing = [name for name in target.modules if not _is_there(name)]
    if missing:
        raise ModelError(
            f"--to {target.name} needs {missing[0].partition('.')[0]}, which is not"
            " installed",
            where="command line, --to",
            remedy=f"pip install 'lepton-jax[{target.extra}]' (docs/ship.md)",
        )
    reasons = target.refusals(source, options)
    if reasons:
        raise ModelError(
            f"{target.name} can't take the model: {'; '.join(reasons)}",
            where="command line, --to",
            remedy="take another target: stablehlo takes every model",
        )


def export(
    artifact: Artifact,
    to: str,
    place: str | Path,
    *,
    source: Source | None = None,
    options: Options | None = None,
    python: str | None = None,
    replays: bool = True,
) -> Parity | None:
    """Export a model, and compare what was written with the trainer.

    Args:
      artifact: of the model.
      to: name of a target.
      place: folder to write; an export that stands there is replaced.
      source: what `live_source` returned; None: the program of the artifact.
      options: of the export.
      python: an interpreter that has the target's runtime; None: this one.
      replays: whether the stored rows are replayed.

    Returns:
      The comparison; None: there was none.

    Raises:
      ModelError: the target can't take the model.
      CheckpointError: something else stands at the place.
    """
    target = target_of(to)
    options = options or Options()
    source = source or source_of(artifact)
    place = Path(place)
    _check_free(place)
    check(target, source, options)
    replays = replays and _runs_here(target, options)
    if replays and target.is_program:
        check_rows(artifact)
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=place.parent, prefix=f".{place.name}."
    ) as made:
        folder = Path(made) / "export"
        folder.mkdir()
        target.write(source, folder, options)
        if artifact.serving is not None:
            artifact.serving.save(folder / "serving")
        (folder / "manifest.json").write_text(artifact.manifest.to_json())
        parity = None
        if replays:
            parity = compare(
                artifact,
                target,
                folder,
                python=python,
                source=source,
                options=options,
            )
            write_parity(parity, folder)
        _replace(folder, place)
    return parity


# ---- internals ----


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _runs_here(target: Target, options: Options) -> bool:
    return not isinstance(target, IREE) or options.device == "cpu"


def _check_free(place: Path) -> None:
    if place.exists() and not (place / SIGNATURE).is_file():
        raise CheckpointError(
            "something else than an export stands there",
            where=place,
            remedy="name another folder",
        )


def _replace(folder: Path, place: Path) -> None:
    old = folder.with_name("old")
    if place.exists():
        place.rename(old)
    folder.rename(place)
    shutil.rmtree(old, ignore_errors=True)
