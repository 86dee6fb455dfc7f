"""The model zoo: plain Flax NNX, one architecture a file."""

from lepton_jax.models.bag_of_words import BagOfWords
from lepton_jax.models.cnn import CNN
from lepton_jax.models.ft_transformer import FTTransformer
from lepton_jax.models.logistic import Logistic
from lepton_jax.models.lstm import LSTM
from lepton_jax.models.mlp import MLP
from lepton_jax.models.moe import MoELM
from lepton_jax.models.tabm import (
    TabM,
    mean_of_outputs,
    mean_of_probabilities,
    mean_of_rates,
)
from lepton_jax.models.tabular import TabularMLP
from lepton_jax.models.tabular_front import TabularFront
from lepton_jax.models.tabular_resnet import TabularResNet
from lepton_jax.models.transformer import TransformerLM, transformer_size
from lepton_jax.models.two_tower import TwoTower

__all__ = [
    "CNN",
    "LSTM",
    "MLP",
    "BagOfWords",
    "FTTransformer",
    "Logistic",
    "MoELM",
    "TabM",
    "TabularFront",
    "TabularMLP",
    "TabularResNet",
    "TransformerLM",
    "TwoTower",
    "mean_of_outputs",
    "mean_of_probabilities",
    "mean_of_rates",
    "transformer_size",
]
