"""Policies that watch a run from inside its step and change its strategy there.

A policy is two pure functions; `chain` puts several together; `Recipe.controller` takes them. Importable as
`lepton_jax.controllers`.
"""

from lepton_jax.controller.core import Controller, ControllerState, Pieces, fed, released, served, set_base
from lepton_jax.controller.knobs import KNOBS, Knob, settable
from lepton_jax.controller.loss_scaling import loss_scaling
from lepton_jax.controller.policy import Policy, chain
from lepton_jax.controller.signals import SIGNALS, norm
from lepton_jax.optimizers import switchable

__all__ = [
    "KNOBS", "SIGNALS", "Controller", "ControllerState", "Knob", "Pieces", "Policy", "chain", "fed", "loss_scaling", "norm",
    "released", "served", "set_base", "settable", "switchable",
]
