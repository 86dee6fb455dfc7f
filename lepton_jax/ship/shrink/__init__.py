"""Smaller models."""

from lepton_jax.ship.shrink.quantization import KINDS, aware, quantize

__all__ = ["KINDS", "aware", "quantize"]
