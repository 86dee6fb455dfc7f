"""Policies that watch a run from inside its step: two pure functions and their state, chained.

A policy sees the step's signals and keeps a state, which is part of `State` and of every checkpoint.
"""

from lepton_jax.controller.policy import Policy, chain

__all__ = ["Policy", "chain"]
