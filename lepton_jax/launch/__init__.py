"""Running a recipe from a command line."""

from lepton_jax.launch.cli import main

__all__ = ["main"]
