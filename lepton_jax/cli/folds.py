"""`launch RECIPE.py --folds K`: a run for each fold, one after the other.

A recipe takes part by two settings, `folds: int | None = None` and `fold: int = 0`.
With `--fold` only that one is trained, as any other run.
"""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lepton_jax.cross_validation import CrossValidation
from lepton_jax.errors import CheckpointError, SettingError, writing_remedy

FOLDS = "folds"
FOLD = "fold"


def wanted(function: Callable[..., Any], chosen: Mapping[str, Any]) -> bool:
    """Whether a command line asks for all folds of a recipe."""
    knows_both = {FOLDS, FOLD} <= set(inspect.signature(function).parameters)
    return knows_both and chosen.get(FOLDS) is not None and FOLD not in chosen


def check_known(arguments: Sequence[str], function: Callable[..., Any]) -> None:
    """Check that a recipe has folds where they are asked for.

    Raises:
      SettingError: it has none.
    """
    parameters = inspect.signature(function).parameters
    flags = {word.partition("=")[0] for word in arguments}
    for name in (FOLDS, FOLD):
        if f"--{name}" in flags and name not in parameters:
            raise SettingError(
                "the recipe has no folds",
                where=f"command line, --{name}",
                remedy=(
                    "leave it out, or let the recipe take the settings folds and fold"
                    " and split its data by them: Split(folds=folds, fold=fold)"
                ),
            )


def check(options: argparse.Namespace, chosen: Mapping[str, Any]) -> int:
    """Return the count of folds.

    Raises:
      SettingError: an option does not go with several folds.
    """
    if options.local_dir is not None:
        raise SettingError(
            "--local-dir is given with all folds",
            where="command line, --local-dir",
            remedy="leave it out, or train one fold by --fold",
        )
    return int(chosen[FOLDS])


def describe(folder: Path, source: Mapping[str, Any]) -> None:
    """Write recipe.json, by which `--resume` finds the recipe and its settings.

    Raises:
      CheckpointError: it can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.json").write_text(
            json.dumps(
                source,
                indent=1,
            )
        )
    except OSError as error:
        raise CheckpointError(
            f"the folder of the folds can't be written: {error.strerror or error}",
            where=folder,
            remedy=f"{writing_remedy(error)}, or name another folder",
        ) from error


def summary(done: CrossValidation, seconds: float) -> dict[str, Any]:
    """Return the object that `--json` prints."""
    return {
        "run_dir": str(done.folder),
        "status": "finished" if done.finished else "interrupted",
        "folds": len(done.results),
        "seconds": seconds,
        "metrics": {name: one.mean for name, one in done.metrics.items()},
        "intervals": {name: list(one.interval) for name, one in done.metrics.items()},
    }
