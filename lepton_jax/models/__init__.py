"""The model zoo: plain Flax NNX, one architecture a file."""

from lepton_jax.models.bag_of_words import BagOfWords
from lepton_jax.models.cnn import CNN
from lepton_jax.models.dcn import DCN
from lepton_jax.models.dlrm import DLRM
from lepton_jax.models.fm import FactorizationMachine
from lepton_jax.models.logistic import Logistic
from lepton_jax.models.lstm import LSTM
from lepton_jax.models.mf import MatrixFactorization
from lepton_jax.models.mlp import MLP
from lepton_jax.models.moe import MoELM
from lepton_jax.models.retrieval import Retrieval
from lepton_jax.models.tabular import TabularMLP
from lepton_jax.models.transformer import TransformerLM, transformer_size
from lepton_jax.models.two_tower import TwoTower

__all__ = [
    "CNN",
    "DCN",
    "DLRM",
    "LSTM",
    "MLP",
    "BagOfWords",
    "FactorizationMachine",
    "Logistic",
    "MatrixFactorization",
    "MoELM",
    "Retrieval",
    "TabularMLP",
    "TransformerLM",
    "TwoTower",
    "transformer_size",
]
