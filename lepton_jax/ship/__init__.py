"""From a trained model to what predicts without its code: artifacts and exports."""

from lepton_jax.ship.artifact import Artifact

__all__ = ["Artifact"]
