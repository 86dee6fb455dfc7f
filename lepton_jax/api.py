"""The public names, which `lepton_jax` offers as its own when one is asked for."""

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
from lepton_jax.generation import generate
from lepton_jax.hardware import Topology, topology
from lepton_jax.planner import Plan, Trace, plan, trace
from lepton_jax.recipe import Recipe
from lepton_jax.ship import Artifact
from lepton_jax.step import optimizers
from lepton_jax.step.state import State
from lepton_jax.train.history import History
from lepton_jax.train.program import Program
from lepton_jax.trainer import Trainer
