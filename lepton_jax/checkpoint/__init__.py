"""States on disk: the durable tier, the fast local tier, and their adoption."""

from lepton_jax.checkpoint.durable import Checkpoints

__all__ = ["Checkpoints"]
