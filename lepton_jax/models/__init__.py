"""The model zoo: plain Flax NNX, one architecture a file."""

from lepton_jax.models.cnn import CNN
from lepton_jax.models.logistic import Logistic
from lepton_jax.models.mlp import MLP
from lepton_jax.models.tabular import TabularMLP
from lepton_jax.models.transformer import TransformerLM

__all__ = ["CNN", "MLP", "Logistic", "TabularMLP", "TransformerLM"]
