"""The model zoo: plain Flax NNX, one architecture a file."""

from lepton_jax.models.averaged_views import averaged_views, mirrored, unchanged
from lepton_jax.models.bag_of_words import BagOfWords
from lepton_jax.models.cnn import CNN
from lepton_jax.models.convnext import ConvNeXt, convnext_size
from lepton_jax.models.dcn import DCN
from lepton_jax.models.decoder import DecoderLM, DecoderShape, Rotary
from lepton_jax.models.diffusion import Diffusion
from lepton_jax.models.dlrm import DLRM
from lepton_jax.models.ensemble import Ensemble
from lepton_jax.models.fm import FactorizationMachine
from lepton_jax.models.ft_transformer import FTTransformer
from lepton_jax.models.gan import GAN
from lepton_jax.models.gru import GRU
from lepton_jax.models.logistic import Logistic
from lepton_jax.models.lstm import LSTM
from lepton_jax.models.mf import MatrixFactorization
from lepton_jax.models.mlp import MLP
from lepton_jax.models.moe import MoELM
from lepton_jax.models.ngrams import NgramLinear, WithNgrams, mean_by_shares
from lepton_jax.models.resnet import ResNet, resnet_size
from lepton_jax.models.retrieval import Retrieval, best_items
from lepton_jax.models.tabm import (
    TabM,
    mean_of_outputs,
    mean_of_probabilities,
    mean_of_rates,
)
from lepton_jax.models.tabular import TabularMLP
from lepton_jax.models.tabular_front import TabularFront
from lepton_jax.models.tabular_resnet import TabularResNet
from lepton_jax.models.text_cnn import TextCNN
from lepton_jax.models.text_encoder import TextEncoder
from lepton_jax.models.transformer import TransformerLM, transformer_size
from lepton_jax.models.two_tower import TwoTower
from lepton_jax.models.vae import VAE
from lepton_jax.models.vit import ViT, vit_size
from lepton_jax.models.wide_deep import WideDeep

__all__ = [
    "CNN",
    "DCN",
    "DLRM",
    "GAN",
    "GRU",
    "LSTM",
    "MLP",
    "VAE",
    "BagOfWords",
    "ConvNeXt",
    "DecoderLM",
    "DecoderShape",
    "Diffusion",
    "Ensemble",
    "FTTransformer",
    "FactorizationMachine",
    "Logistic",
    "MatrixFactorization",
    "MoELM",
    "NgramLinear",
    "ResNet",
    "Retrieval",
    "Rotary",
    "TabM",
    "TabularFront",
    "TabularMLP",
    "TabularResNet",
    "TextCNN",
    "TextEncoder",
    "TransformerLM",
    "TwoTower",
    "ViT",
    "WideDeep",
    "WithNgrams",
    "averaged_views",
    "best_items",
    "convnext_size",
    "mean_by_shares",
    "mean_of_outputs",
    "mean_of_probabilities",
    "mean_of_rates",
    "mirrored",
    "resnet_size",
    "transformer_size",
    "unchanged",
    "vit_size",
]
