"""Lepton-JAX: a plain Flax module in, an adaptive training run on any mesh out.

The public names are loaded when the first of them is asked for: JAX, Flax and Orbax
take seconds, for which neither `lepton --help` nor Ctrl-C should wait.
"""

from importlib import import_module as _import_module
from importlib.metadata import version as _version
from importlib.util import find_spec as _find_spec
from typing import TYPE_CHECKING as _TYPE_CHECKING

from lepton_jax.heap import keep_freed_memory as _keep_freed_memory

if _TYPE_CHECKING:
    from lepton_jax.api import *

__version__ = _version("lepton-jax")

_keep_freed_memory()  # before XLA starts its threads

__all__ = [
    "Artifact",
    "CheckpointError",
    "CrossValidation",
    "DataError",
    "DivergedError",
    "History",
    "LeptonError",
    "ModelError",
    "Plan",
    "PlanError",
    "Program",
    "Recipe",
    "RecipeError",
    "SettingError",
    "State",
    "Topology",
    "Trace",
    "Trainer",
    "adapt",
    "augment",
    "baselines",
    "controllers",
    "cross_validate",
    "data",
    "generate",
    "hardware",
    "hub",
    "losses",
    "metrics",
    "models",
    "monitor",
    "optimizers",
    "plan",
    "topology",
    "trace",
]


def __getattr__(name: str) -> object:
    """Return a module of this package, or the value of a public name, loading it.

    Raises:
      AttributeError: there is no such name.
    """
    # before the public names, since their own modules import one another like that
    if not name.startswith("_") and _find_spec(f"lepton_jax.{name}"):
        return _import_module(f"lepton_jax.{name}")
    if name in __all__:
        api = _import_module("lepton_jax.api")
        globals().update({public: getattr(api, public) for public in __all__})
        return globals()[name]
    raise AttributeError(f"module 'lepton_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the names that an editor or a notebook offers."""
    return sorted({*globals(), *__all__})
