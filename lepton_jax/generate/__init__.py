"""Text from a language model: sampling with a cache, streams and stop strings."""

from lepton_jax.generate.codec import Characters
from lepton_jax.generate.filters import Sampling, candidates
from lepton_jax.generate.generating import Generated, Piece, generate

__all__ = [
    "Characters",
    "Generated",
    "Piece",
    "Sampling",
    "candidates",
    "generate",
]
