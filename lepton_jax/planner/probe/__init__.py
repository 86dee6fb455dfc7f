"""XLA's account of a planned step, without waiting for its code.

child       a process that compiles a program until it is stopped
early       starts it, and stops it once XLA has placed the program's arrays
kept        what XLA said of a program, kept from one process to the next
probing     the figures of a plan
"""

from lepton_jax.planner.probe.kept import users_folder
from lepton_jax.planner.probe.probing import Probe, probe

__all__ = ["Probe", "probe", "users_folder"]
