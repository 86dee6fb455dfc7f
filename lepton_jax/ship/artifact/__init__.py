"""The artifact: a trained model with all that it needs to predict.

    digits.lepton/
      manifest.json         what it is, its signature, versions, checksums
      program.stablehlo     (weights, inputs) -> outputs, for any batch size
      weights.safetensors   the arrays that the program takes
      serving/              fitted steps from raw rows to inputs: JSON and Arrow
      stored/               rows with the trainer's outputs, to compare with

Nothing of it runs code when it is opened, and it needs neither the recipe nor the
model's class.
"""

from lepton_jax.ship.artifact.artifact import Artifact
from lepton_jax.ship.artifact.compiled import BatchProgram
from lepton_jax.ship.artifact.manifest import Manifest
from lepton_jax.ship.artifact.signature import Column, Tensor
from lepton_jax.ship.artifact.stored import Stored

__all__ = ["Artifact", "BatchProgram", "Column", "Manifest", "Stored", "Tensor"]
