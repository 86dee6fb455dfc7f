"""What a run executes on: chips, how many, and the mesh made of them."""

from lepton_jax.hardware.chips import CHIPS, Chip
from lepton_jax.hardware.topology import Topology, here, topology

__all__ = ["CHIPS", "Chip", "Topology", "here", "topology"]
