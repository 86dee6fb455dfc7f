"""A trained model by the folder that it is in: of a run, a saved model, an artifact."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lepton_jax.cli import launch, settings
from lepton_jax.errors import CheckpointError, SettingError
from lepton_jax.ship import Artifact
from lepton_jax.ship.artifact.manifest import NAME
from lepton_jax.trainer import Trainer

RECIPE = "recipe.json"
ZIP = ".zip"


def is_artifact(place: Path) -> bool:
    """Whether a place holds an artifact, and no run."""
    is_file = place.is_file() and place.suffix == ZIP
    return is_file or (place / NAME).is_file()


def artifact_of(place: str | Path, **made: Any) -> Artifact:
    """Return the artifact at a place, or make one of the run or saved model there.

    Args:
      place: of an artifact, a run, or a saved model.
      **made: arguments of `Artifact.of`, where one is made.

    Raises:
      LeptonError: nothing of the kind is there, or it can't be read.
    """
    place = Path(place)
    if is_artifact(place):
        return Artifact.open(place)
    return Artifact.of(trainer_of(place), **made)


def trainer_of(
    place: str | Path,
    recipe: Path | None = None,
    step: int | None = None,
    devices: int | None = None,
) -> Trainer:
    """Return the trainer of a run, or of a saved model, with its weights.

    The recipe is made anew from its file and the run's settings, so that its data are
    at hand. A saved model whose recipe has no file is opened without.

    Args:
      place: folder of the run, or of the saved model.
      recipe: where the recipe's file is now; None: where it was.
      step: of the checkpoint; None: the latest.
      devices: how many of the live ones to use; None: one, or all where the recipe has
        no file.

    Raises:
      LeptonError: nothing of the kind is there, or it can't be read.
    """
    place = Path(place)
    run = _described(place)
    file = recipe or run.get("file")
    if file is None and not (place / "events.jsonl").exists():
        return Trainer.open(place, devices=devices)
    if file is None or not Path(file).is_file():
        raise SettingError(
            f"the recipe of the run is gone: there is no file {file}",
            where=place / RECIPE,
            remedy="say where it is now: --recipe RECIPE.py",
        )
    function = settings.load(Path(file))
    parser = argparse.ArgumentParser(add_help=False)
    settings.add(parser, function)
    chosen = launch._typed(
        parser,
        run.get("settings", {}),
        place / RECIPE,
    )
    made = settings.call(function, chosen)
    if made.name == "run":
        made = made.with_(name=Path(file).stem)
    source = {
        "file": str(file),
        "settings": run.get(
            "settings",
            {},
        ),
    }
    return Trainer(
        made,
        devices=devices or 1,
        source=source,
    ).load(
        place,
        step,
    )


# ---- internals ----


def _described(place: Path) -> dict[str, Any]:
    """Return recipe.json of a run or a saved model.

    Raises:
      CheckpointError: there is none.
    """
    if not (place / RECIPE).is_file():
        raise CheckpointError(
            "there is no run, no saved model and no artifact",
            where=place,
            remedy="name the folder of one of these, e.g. runs/digits_cnn-...",
        )
    return launch._resumed(str(place))
