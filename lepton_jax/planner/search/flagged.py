"""XLA's flags for a plan: those of its backend, less what its program rules out."""

from __future__ import annotations

import os
from typing import Any

from lepton_jax.hardware import Topology
from lepton_jax.planner.assignment import Assignment, expert_groups
from lepton_jax.planner.program.named import Names
from lepton_jax.planner.rewrite.own import OWN_OPERATIONS
from lepton_jax.planner.xla import flags


def flags_for(
    topology: Topology,
    names: Names,
    assignment: Assignment,
) -> dict[str, Any]:
    """Return the flags that are good for an assignment on a backend.

    Args:
      topology: where it runs.
      names: named axes of the program.
      assignment: how it is split.
    """
    chosen = flags.chosen(topology.platform, topology.devices, os.environ)
    if _sums_of_experts(names, assignment):
        chosen.pop(flags.FUSES_SCATTERS, None)
    return chosen


def _sums_of_experts(names: Names, assignment: Assignment) -> bool:
    """Whether operations with a rule add up what split experts make of tokens."""
    operations = names.graph.operations()
    if not any(op.name in OWN_OPERATIONS for op in operations):
        return False
    return any(assignment.masks[group] for group in expert_groups(names))
