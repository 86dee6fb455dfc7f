"""Policies that watch a run from inside its step and change its strategy there.

A policy is two pure functions, `chain` joins several of them, and `Recipe.controller`
takes them. The package can be imported as `lepton_jax.controllers`.
"""

from lepton_jax.controller.conformance import Conformance, conformance
from lepton_jax.controller.core import Controller
from lepton_jax.controller.journal import read_journal
from lepton_jax.controller.knobs import KNOBS, Knob, settable
from lepton_jax.controller.policies.adaptive import adaptive
from lepton_jax.controller.policies.adjustable import adjustable
from lepton_jax.controller.policies.averaging import averaging
from lepton_jax.controller.policies.batch_growth import batch_growth
from lepton_jax.controller.policies.best_average import best_average
from lepton_jax.controller.policies.clipping import clip_by_history
from lepton_jax.controller.policies.decay import decay
from lepton_jax.controller.policies.early_stopping import early_stopping
from lepton_jax.controller.policies.first_steps import first_steps
from lepton_jax.controller.policies.guard import guard
from lepton_jax.controller.policies.label_noise import label_noise
from lepton_jax.controller.policies.learning_free import learning_free
from lepton_jax.controller.policies.loss_scaling import loss_scaling
from lepton_jax.controller.policies.plateau import plateau
from lepton_jax.controller.policies.schedule_free import schedule_free
from lepton_jax.controller.policies.switch import switch_optimizer
from lepton_jax.controller.policies.target import until
from lepton_jax.controller.policies.warmup import warmup
from lepton_jax.controller.policy import Notice, Policy, chain
from lepton_jax.controller.replay import replay
from lepton_jax.controller.signals import SIGNALS, norm, stride
from lepton_jax.controller.state import (
    ControllerState,
    Pieces,
    select_weights,
    set_base,
    with_measurements,
    with_rate_factor,
    without_halt,
)
from lepton_jax.step.optimizers import switchable

__all__ = [
    "KNOBS",
    "SIGNALS",
    "Conformance",
    "Controller",
    "ControllerState",
    "Knob",
    "Notice",
    "Pieces",
    "Policy",
    "adaptive",
    "adjustable",
    "averaging",
    "batch_growth",
    "best_average",
    "chain",
    "clip_by_history",
    "conformance",
    "decay",
    "early_stopping",
    "first_steps",
    "guard",
    "label_noise",
    "learning_free",
    "loss_scaling",
    "norm",
    "plateau",
    "read_journal",
    "replay",
    "schedule_free",
    "select_weights",
    "set_base",
    "settable",
    "stride",
    "switch_optimizer",
    "switchable",
    "until",
    "warmup",
    "with_measurements",
    "with_rate_factor",
    "without_halt",
]
