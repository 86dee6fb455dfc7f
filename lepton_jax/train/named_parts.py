"""The parts of a recipe that a prediction needs, by name.

A saved model that was made of public functions alone can be opened again without the
file of its recipe:

    partial(lepton.models.MLP, (64, 10), dropout=0.1)
      -> {"partial": {"name": "lepton_jax.models:MLP"},
          "arguments": {"tuple": [{"tuple": [64, 10]}]},
          "keywords": {"dict": {"dropout": 0.1}}}
    lepton.augment.Flip(share=0.5)
      -> {"made": "lepton_jax.augment:Flip", "keywords": {"dict": {"share": 0.5, ...}}}

Names are looked up in Lepton and in the libraries that it stands on, and nowhere else:
opening a folder never imports a module that the folder chose.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import importlib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from lepton_jax.errors import CheckpointError, ModelError
from lepton_jax.recipe import Recipe

# Packages whose functions may be named.
KNOWN = ("lepton_jax", "optax", "flax", "jax")
# Their modules that hold public names, tried before the module that defines a name: a
# definition may move from one release to the next.
PUBLIC = (
    "lepton_jax.models",
    "lepton_jax.losses",
    "lepton_jax.metrics",
    "lepton_jax.data",
    "lepton_jax.augment",
    "optax",
    "flax.nnx",
    "flax.linen",
    "jax.numpy",
    "jax.nn",
)
# Fields of a recipe on which a prediction depends.
FIELDS = (
    "model",
    "loss",
    "preprocess",
    "decode",
    "train_argument",
    "precision",
    "batch_size",
    "name",
)
PLAIN = (int, float, str, bool, type(None))


def named_parts(recipe: Recipe) -> dict[str, Any]:
    """Return what a prediction needs of a recipe, as plain data.

    Returns:
      "parts": fields by name; "unnamed": {field: what it is} of those that no name
        stands for, such as a function in a notebook; "metrics": those with names.
    """
    parts = {}
    unnamed = {}
    for field in FIELDS:
        value = getattr(recipe, field)
        try:
            parts[field] = _named(value)
        except _UnnamedError as error:
            unnamed[field] = str(error)

    metrics = {}
    for name, metric in recipe.metrics.items():
        try:
            metrics[name] = _named(metric)
        except _UnnamedError:
            continue  # a prediction does not need it
    return {"parts": parts, "unnamed": unnamed, "metrics": metrics}


def parts_of(
    content: Mapping[str, Any],
    given: Mapping[str, Any],
) -> dict[str, Any]:
    """Return fields of a recipe from what `named_parts` has returned.

    Args:
      content: the plain data.
      given: fields that somebody gives; they go before those of the folder.

    Raises:
      CheckpointError: a name can't be found here.
      ModelError: a part has no name, and is not given.
    """
    missing = [field for field in content["unnamed"] if field not in given]
    if missing:
        what = ", ".join(f"{field} ({content['unnamed'][field]})" for field in missing)
        examples = ", ".join(f"{field}=..." for field in missing)
        raise ModelError(
            f"the model can't be made without its code: {what}",
            where="Trainer.open",
            remedy=f"import it and pass Trainer.open(folder, {examples})",
        )
    wanted = {k: v for k, v in content["parts"].items() if k not in given}
    parts = {field: _found(value) for field, value in wanted.items()}
    metrics = {name: _found(value) for name, value in content["metrics"].items()}
    return {"metrics": metrics, **parts, **given}


# ---- internals ----


class _UnnamedError(Exception):
    """A value for which no name stands."""


def _named(value: Any) -> Any:
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, tuple | list):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_named(part) for part in value]}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return {
            "array": base64.b64encode(value.tobytes()).decode(),
            "dtype": value.dtype.str,
            "shape": list(value.shape),
        }
    if isinstance(value, Mapping):
        return {"dict": {_key(key): _named(part) for key, part in value.items()}}
    if isinstance(value, functools.partial):
        return {
            "partial": _named(value.func),
            "arguments": _named(value.args),
            "keywords": _named(value.keywords),
        }
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kept = {part.name: getattr(value, part.name) for part in fields(value)}
        return {"made": _name(type(value)), "keywords": _named(kept)}
    return {"name": _name(value)}


def _key(key: Any) -> str:
    if not isinstance(key, str):
        raise _UnnamedError(f"a dict with the key {key!r}")
    return key


def _name(value: Any) -> str:
    """Return the name of a public function or class.

    Raises:
      _UnnamedError: it has none, or it is not of one of the packages KNOWN.
    """
    own = getattr(value, "__qualname__", None) or ""
    module = getattr(value, "__module__", None) or ""
    described = f"{module}.{own}" if own else type(value).__name__
    if module.partition(".")[0] not in KNOWN or "<" in own or not own:
        raise _UnnamedError(described)
    for place in (*PUBLIC, module):
        if _looked_up(place, own) is value:
            return f"{place}:{own}"
    raise _UnnamedError(described)


def _looked_up(module: str, name: str) -> Any:
    try:
        value = importlib.import_module(module)
        for part in name.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError):
        return None
    return value


def _found(content: Any) -> Any:
    if not isinstance(content, dict):
        return content
    match content:
        case {"tuple": parts}:
            return tuple(_found(part) for part in parts)
        case {"list": parts}:
            return [_found(part) for part in parts]
        case {"array": code, "dtype": dtype, "shape": shape}:
            values = np.frombuffer(base64.b64decode(code), dtype)
            return values.reshape(shape)
        case {"dict": parts}:
            return {key: _found(part) for key, part in parts.items()}
        case {"partial": function, "arguments": arguments, "keywords": keywords}:
            return functools.partial(
                _found(function), *_found(arguments), **_found(keywords)
            )
        case {"made": name, "keywords": keywords}:
            return _of_name(name)(**_found(keywords))
        case {"name": name}:
            return _of_name(name)
    raise _unreadable(str(content))


def _of_name(name: str) -> Any:
    module, _, own = name.partition(":")
    is_known = module.partition(".")[0] in KNOWN
    value = _looked_up(module, own) if is_known else None
    if value is None:
        raise _unreadable(name)
    return value


def _unreadable(name: str) -> CheckpointError:
    return CheckpointError(
        f"the saved model names {name}, which is not here",
        where="recipe.json",
        remedy=(
            "install the versions that it was saved with, or load it with its recipe:"
            " Trainer(recipe).load(folder)"
        ),
    )
