"""recipe.json and plan.json: what a run, or a saved model, was made from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import jax

from lepton_jax.controller import select_weights
from lepton_jax.errors import CheckpointError, writing_remedy
from lepton_jax.recipe import Recipe
from lepton_jax.step.state import State
from lepton_jax.train.named_parts import named_parts, parts_of
from lepton_jax.train.program import Program
from lepton_jax.train.raw_inputs import save_preparation

RECIPE = "recipe.json"
PLAN = "plan.json"
SERVED = "served"  # folder of the weights to serve with, where others were trained


def describe(
    folder: Path,
    program: Program,
    source: Mapping[str, Any],
    preparation: Any = None,
) -> None:
    """Write recipe.json and plan.json, and how the inputs were prepared.

    Args:
      folder: made if it is missing.
      program: of the run, or the model.
      source: where the recipe came from.
      preparation: of the model's inputs; None: there is none.

    Raises:
      CheckpointError: the folder can't be written.
    """
    content = {
        **source,
        "model": program.trace.functional.name,
        "code": named_parts(program.recipe),
        "fields": _plain_fields(program.recipe),
        "batch": {
            "inputs": jax.tree.map(_shape, program.trace.inputs),
            "targets": jax.tree.map(_shape, program.trace.targets),
        },
    }
    text = json.dumps(content, indent=1)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECIPE).write_text(text)
        (folder / PLAN).write_text(program.plan.to_json())
        save_preparation(preparation, folder)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise CheckpointError(
            f"the run folder can't be written: {error}",
            where=folder,
            remedy=f"{writing_remedy(error)}, or name another folder",
        ) from error


def read_shapes(folder: Path) -> tuple[Any, Any]:
    """Return shapes and dtypes of a batch's inputs and targets, from recipe.json.

    Raises:
      CheckpointError: it can't be read.
    """
    try:
        batch = json.loads((folder / RECIPE).read_text())["batch"]
        shapes = jax.tree.map(_read_shape, batch, is_leaf=_is_shape)
        return shapes["inputs"], shapes["targets"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"recipe.json can't be read: {error}",
            where=folder,
            remedy="name the folder of a run or of a saved model",
        ) from error


def read_parts(folder: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a recipe with which a saved model can predict.

    Args:
      folder: of the saved model, or of a run.
      given: fields that somebody gives; they go before those of the folder.

    Raises:
      CheckpointError: they can't be read.
      ModelError: a part was defined outside of Lepton, and is not given.
    """
    try:
        content = json.loads((folder / RECIPE).read_text())["code"]
        return parts_of(content, given)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"recipe.json does not say how the model is made: {error}",
            where=folder,
            remedy="load it with its recipe: Trainer(recipe).load(folder)",
        ) from error


def is_a_saved_model(folder: Path) -> bool:
    """Whether a folder holds a saved model, and no run."""
    is_described = (folder / RECIPE).exists()
    is_run = (folder / "events.jsonl").exists()
    return is_described and not is_run


def served_state(state: State, recipe: Recipe) -> State | None:
    """Return a state that holds the weights to serve with, and no optimizer.

    Returns:
      None if the state's own parameters are those weights.
    """
    params, variables = select_weights(state, recipe)
    if params is state.params and variables is state.variables:
        return None
    return replace(
        state,
        params=params,
        variables=variables,
        optimizer=(),
        controller=(),
    )


def replace_folder(
    folder: Path,
    fresh: Path,
    old: Path,
) -> None:
    """Put a fresh folder in the place of another one.

    Args:
      folder: the place.
      fresh: is moved there.
      old: where the one that stands there waits until that is done.
    """
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _plain_fields(recipe: Recipe) -> dict[str, Any]:
    names = [field.name for field in fields(Recipe)]
    values = {name: getattr(recipe, name) for name in names}
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, int | float | str | None)
    }


def _shape(leaf: Any) -> dict[str, Any]:
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def _is_shape(content: Any) -> bool:
    return set(content) == {"shape", "dtype"}


def _read_shape(content: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(content["shape"], content["dtype"])
