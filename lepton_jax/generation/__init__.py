"""Text from a language model, by sampling with a cache; and how probable texts are."""

from lepton_jax.generation.codec import Characters
from lepton_jax.generation.filters import Sampling, candidates
from lepton_jax.generation.generating import Generated, Piece, generate
from lepton_jax.generation.judging import (
    Choices,
    Perplexity,
    Question,
    multiple_choice,
    perplexity,
)

__all__ = [
    "Characters",
    "Choices",
    "Generated",
    "Perplexity",
    "Piece",
    "Question",
    "Sampling",
    "candidates",
    "generate",
    "multiple_choice",
    "perplexity",
]
