"""Lepton-JAX: a plain Flax module in, an adaptive training run on any mesh out."""

from importlib.metadata import version as _version

from lepton_jax import (
    adapt,
    augment,
    baselines,
    data,
    hardware,
    hub,
    losses,
    metrics,
    models,
    monitor,
)
from lepton_jax import controller as controllers
from lepton_jax.cross_validation import CrossValidation, cross_validate
from lepton_jax.errors import (
    CheckpointError,
    DataError,
    DivergedError,
    LeptonError,
    ModelError,
    PlanError,
    RecipeError,
    SettingError,
)
from lepton_jax.generate import generate
from lepton_jax.hardware import Topology, topology
from lepton_jax.heap import keep_freed_memory as _keep_freed_memory
from lepton_jax.planner import Plan, Trace, plan, trace
from lepton_jax.recipe import Recipe
from lepton_jax.ship import Artifact
from lepton_jax.step import optimizers
from lepton_jax.step.state import State
from lepton_jax.train.history import History
from lepton_jax.train.program import Program
from lepton_jax.trainer import Trainer

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
