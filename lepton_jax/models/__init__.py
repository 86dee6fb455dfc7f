"""The model zoo: plain Flax NNX, one architecture a file."""

from lepton_jax.models.bag_of_words import BagOfWords
from lepton_jax.models.cnn import CNN
from lepton_jax.models.convnext import ConvNeXt, convnext_size
from lepton_jax.models.logistic import Logistic
from lepton_jax.models.lstm import LSTM
from lepton_jax.models.mlp import MLP
from lepton_jax.models.moe import MoELM
from lepton_jax.models.resnet import ResNet, resnet_size
from lepton_jax.models.tabular import TabularMLP
from lepton_jax.models.transformer import TransformerLM, transformer_size
from lepton_jax.models.two_tower import TwoTower
from lepton_jax.models.vit import ViT, vit_size

__all__ = [
    "CNN",
    "LSTM",
    "MLP",
    "BagOfWords",
    "ConvNeXt",
    "Logistic",
    "MoELM",
    "ResNet",
    "TabularMLP",
    "TransformerLM",
    "TwoTower",
    "ViT",
    "convnext_size",
    "resnet_size",
    "transformer_size",
    "vit_size",
]
