"""Models with the conventions of public repositories, at sizes for tests.

Each class is written for this file, in the manner of the code that its docstring names:
its argument names, its way to switch training on, its streams of random numbers, its
inputs and what it returns. None of them knows the framework that trains it.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

# ---- flax/examples/mnist: NNX, random numbers handed to each call ----


class MnistCNN(nnx.Module):
    """CNN whose dropout has no stream of its own: `rngs` is an argument of the call."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(
            1,
            4,
            kernel_size=(3, 3),
            rngs=rngs,
        )
        self.batch_norm1 = nnx.BatchNorm(4, rngs=rngs)
        self.dropout1 = nnx.Dropout(rate=0.1)
        self.conv2 = nnx.Conv(
            4,
            6,
            kernel_size=(3, 3),
            rngs=rngs,
        )
        self.batch_norm2 = nnx.BatchNorm(6, rngs=rngs)
        self.avg_pool = partial(
            nnx.avg_pool,
            window_shape=(2, 2),
            strides=(2, 2),
        )
        self.linear1 = nnx.Linear(24, 12, rngs=rngs)
        self.dropout2 = nnx.Dropout(rate=0.1)
        self.linear2 = nnx.Linear(12, 10, rngs=rngs)

    def __call__(
        self,
        x,
        rngs: nnx.Rngs | None,
    ):
        x = self.dropout1(self.conv1(x), rngs=rngs)
        x = self.avg_pool(nnx.relu(self.batch_norm1(x)))
        x = self.avg_pool(nnx.relu(self.batch_norm2(self.conv2(x))))
        x = x.reshape(x.shape[0], -1)
        x = nnx.relu(
            self.dropout2(
                self.linear1(x),
                rngs=rngs,
            )
        )
        return self.linear2(x)


# ---- flax/examples/imagenet: Linen, batch norm over a named axis, train=True ----

ModuleDef = Any


class ResNetBlock(nn.Module):
    """Residual block that is handed its kinds of convolution and norm."""

    filters: int
    conv: ModuleDef
    norm: ModuleDef
    act: Callable
    strides: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x):
        y = self.act(self.norm()(self.conv(self.filters, (3, 3), self.strides)(x)))
        y = self.conv(self.filters, (3, 3))(y)
        y = self.norm(scale_init=nn.initializers.zeros_init())(y)
        if x.shape != y.shape:
            x = self.conv(self.filters, (1, 1), self.strides, name="conv_proj")(x)
            x = self.norm(name="norm_proj")(x)
        return self.act(x + y)


class ResNet(nn.Module):
    """ResNet whose batch norm averages over the axis "batch" of a pmap."""

    stage_sizes: Sequence[int]
    block_cls: ModuleDef
    num_classes: int
    num_filters: int = 4
    dtype: Any = jnp.float32
    act: Callable = nn.relu
    conv: ModuleDef = nn.Conv
    axis_name: str | None = "batch"

    @nn.compact
    def __call__(self, x, train: bool = True):
        conv = partial(
            self.conv,
            use_bias=False,
            dtype=self.dtype,
        )
        norm = partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype,
            axis_name=self.axis_name,
        )
        x = conv(self.num_filters, (3, 3), name="conv_init")(x)
        x = nn.relu(norm(name="bn_init")(x))
        x = nn.max_pool(
            x,
            (3, 3),
            strides=(2, 2),
            padding="SAME",
        )
        for i, block_size in enumerate(self.stage_sizes):
            for j in range(block_size):
                x = self.block_cls(
                    self.num_filters * 2**i,
                    strides=(2, 2) if i > 0 and j == 0 else (1, 1),
                    conv=conv,
                    norm=norm,
                    act=self.act,
                )(x)
        x = jnp.mean(x, axis=(1, 2))
        x = nn.Dense(self.num_classes, dtype=self.dtype)(x)
        return jnp.asarray(x, self.dtype)


TinyResNet = partial(
    ResNet,
    stage_sizes=[1, 1],
    block_cls=ResNetBlock,
)


# ---- flax/examples/lm1b: Linen, packed text, mode and names of axes in the config ----


@flax.struct.dataclass
class TransformerConfig:
    """Sizes and mode of a `TransformerLM`; `replace` makes the one for evaluation."""

    vocab_size: int
    emb_dim: int = 16
    num_heads: int = 2
    num_layers: int = 1
    mlp_dim: int = 32
    max_len: int = 16
    dtype: Any = jnp.float32
    dropout_rate: float = 0.1
    attention_dropout_rate: float = 0.1
    deterministic: bool = False
    decode: bool = False
    kernel_init: Callable = nn.initializers.xavier_uniform()
    bias_init: Callable = nn.initializers.normal(stddev=1e-6)

    def kernel(self, *names: str) -> Callable:
        return nn.with_logical_partitioning(self.kernel_init, names)

    def bias(self, *names: str) -> Callable:
        return nn.with_logical_partitioning(self.bias_init, names)


def shift_inputs(
    x: jax.Array,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """Tokens one place later, with a zero where a document begins."""
    shifted = jnp.pad(x, ((0, 0), (1, 0)))[:, :-1]
    if segment_ids is not None:
        same = segment_ids == jnp.pad(segment_ids, ((0, 0), (1, 0)))[:, :-1]
        shifted = shifted * same
    return shifted


def sinusoids(max_len: int, width: int) -> jax.Array:
    """Fixed table of positions, shape (1, max_len, width)."""
    position = np.arange(max_len)[:, None]
    rate = np.exp(np.arange(width // 2) * -(np.log(10_000.0) / (width // 2)))
    table = np.concatenate(
        [np.sin(position * rate), np.cos(position * rate)],
        axis=1,
    )
    return jnp.array(table[None].astype(np.float32))


class AddPositionEmbs(nn.Module):
    """Adds a fixed table of positions, by the positions of packed text if given."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, inputs, inputs_positions=None):
        assert inputs.ndim == 3, (
            f"(batch, length, width) expected, not {inputs.ndim} dims"
        )
        table = sinusoids(self.config.max_len, inputs.shape[-1])[:, : inputs.shape[1]]
        if inputs_positions is None:
            return inputs + table
        return inputs + jnp.take(
            table[0],
            inputs_positions,
            axis=0,
        )


class LMBlock(nn.Module):
    """Decoder layer whose dropout follows the config."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, inputs, decoder_mask=None):
        config = self.config
        dropout = partial(
            nn.Dropout, rate=config.dropout_rate, deterministic=config.deterministic
        )
        norm = partial(
            nn.LayerNorm,
            dtype=config.dtype,
            bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("embed",)),
            scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("embed",)),
        )
        x = nn.MultiHeadDotProductAttention(
            num_heads=config.num_heads,
            dtype=config.dtype,
            kernel_init=config.kernel("embed", "kv"),
            bias_init=config.bias("embed"),
            use_bias=False,
            broadcast_dropout=False,
            dropout_rate=config.attention_dropout_rate,
            deterministic=config.deterministic,
            decode=config.decode,
        )(norm()(inputs), mask=decoder_mask)
        x = dropout()(x) + inputs

        y = nn.Dense(
            config.mlp_dim,
            dtype=config.dtype,
            kernel_init=config.kernel("embed", "mlp"),
            bias_init=config.bias("mlp"),
        )(norm()(x))
        y = dropout()(nn.relu(y))
        y = nn.Dense(
            inputs.shape[-1],
            dtype=config.dtype,
            kernel_init=config.kernel("mlp", "embed"),
            bias_init=config.bias("embed"),
        )(y)
        return x + dropout()(y)


class TransformerLM(nn.Module):
    """Language model over packed text that shifts its inputs itself."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        inputs,
        inputs_positions=None,
        inputs_segmentation=None,
    ):
        config = self.config
        mask = nn.combine_masks(
            nn.make_attention_mask(
                inputs > 0,
                inputs > 0,
                dtype=config.dtype,
            ),
            nn.make_causal_mask(inputs, dtype=config.dtype),
        )
        if inputs_segmentation is not None:
            mask = nn.combine_masks(
                mask,
                nn.make_attention_mask(
                    inputs_segmentation,
                    inputs_segmentation,
                    jnp.equal,
                    dtype=config.dtype,
                ),
            )

        y = shift_inputs(inputs.astype("int32"), segment_ids=inputs_segmentation)
        y = nn.Embed(
            num_embeddings=config.vocab_size,
            features=config.emb_dim,
            embedding_init=nn.with_logical_partitioning(
                nn.initializers.normal(stddev=1.0), ("vocab", "embed")
            ),
        )(y)
        y = AddPositionEmbs(config, name="posembed_output")(y, inputs_positions)
        y = nn.Dropout(config.dropout_rate)(y, deterministic=config.deterministic)
        for layer in range(config.num_layers):
            y = LMBlock(config, name=f"encoderdecoderblock_{layer}")(y, mask)
        y = nn.LayerNorm(dtype=config.dtype, name="encoderdecoder_norm")(y)
        logits = nn.Dense(
            config.vocab_size,
            dtype=config.dtype,
            kernel_init=config.kernel("embed", "vocab"),
            bias_init=config.bias("vocab"),
            name="logitdense",
        )(y)
        return logits.astype(config.dtype)


# ---- flax/examples/seq2seq: Linen, a scanned cell that samples, in evaluation too ----


class DecoderLSTMCell(nn.RNNCellBase):
    """LSTM cell that draws a token at each step and is fed with it, or the truth."""

    features: int
    teacher_force: bool
    vocab_size: int

    @nn.compact
    def __call__(self, carry, x):
        lstm_state, last_prediction = carry
        if not self.teacher_force:
            x = last_prediction
        lstm_state, y = nn.LSTMCell(self.features)(lstm_state, x)
        logits = nn.Dense(self.vocab_size)(y)
        token = jax.random.categorical(self.make_rng("lstm"), logits)
        prediction = jax.nn.one_hot(
            token,
            self.vocab_size,
            dtype=jnp.float32,
        )
        return (lstm_state, prediction), (logits, prediction)

    @property
    def num_feature_axes(self) -> int:
        return 1


class Seq2seq(nn.Module):
    """Encoder and decoder; returns (logits, the tokens that were drawn, one-hot)."""

    teacher_force: bool
    hidden_size: int
    vocab_size: int
    eos_id: int = 1

    @nn.compact
    def __call__(self, encoder_inputs, decoder_inputs):
        encoder = nn.RNN(
            nn.LSTMCell(self.hidden_size),
            return_carry=True,
            name="encoder",
        )
        decoder = nn.RNN(
            DecoderLSTMCell(self.hidden_size, self.teacher_force, self.vocab_size),
            split_rngs={"params": False, "lstm": True},
            name="decoder",
        )
        state, _ = encoder(
            encoder_inputs, seq_lengths=self.get_seq_lengths(encoder_inputs)
        )
        logits, predictions = decoder(
            decoder_inputs[:, :-1],
            initial_carry=(state, decoder_inputs[:, 0]),
        )
        return logits, predictions

    def get_seq_lengths(self, inputs):
        return jnp.argmax(
            jnp.argmax(inputs, axis=-1) == self.eos_id,
            axis=-1,
        )


# ---- flax/examples/vae: Linen, setup(), a key as an argument, three outputs ----


class Encoder(nn.Module):
    """Mean and log variance of the latents."""

    latents: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(16, name="fc1")(x))
        return (
            nn.Dense(self.latents, name="fc2_mean")(x),
            nn.Dense(self.latents, name="fc2_logvar")(x),
        )


class Decoder(nn.Module):
    """Logits of the pixels."""

    size: int

    @nn.compact
    def __call__(self, z):
        return nn.Dense(self.size, name="fc2")(nn.relu(nn.Dense(16, name="fc1")(z)))


class VAE(nn.Module):
    """Variational autoencoder that draws its latents whether it is trained or not."""

    size: int
    latents: int = 3

    def setup(self):
        self.encoder = Encoder(self.latents)
        self.decoder = Decoder(self.size)

    def __call__(self, x, z_rng):
        mean, logvar = self.encoder(x)
        noise = jax.random.normal(z_rng, logvar.shape)
        z = mean + noise * jnp.exp(0.5 * logvar)
        return self.decoder(z), mean, logvar

    def generate(self, z):
        return nn.sigmoid(self.decoder(z))


# ---- big_vision/models/vit: Linen, keyword-only train, scan over rematerialized layers


class MlpBlock(nn.Module):
    """Feed-forward layer."""

    mlp_dim: int | None = None
    dropout: float = 0.0
    dtype_mm: str = "float32"

    @nn.compact
    def __call__(self, x, deterministic=True):
        inits = {
            "kernel_init": nn.initializers.xavier_uniform(),
            "bias_init": nn.initializers.normal(stddev=1e-6),
        }
        width = x.shape[-1]
        x = nn.Dense(self.mlp_dim or 4 * width, dtype=self.dtype_mm, **inits)(x)
        x = nn.with_logical_constraint(x, ("act_batch", "act_len", "act_emb"))
        x = nn.Dropout(rate=self.dropout)(nn.gelu(x), deterministic)
        return nn.Dense(width, dtype=self.dtype_mm, **inits)(x)


class Encoder1DBlock(nn.Module):
    """Encoder layer that also returns what it computed on the way, by name."""

    mlp_dim: int | None = None
    num_heads: int = 2
    dropout: float = 0.0
    dtype_mm: str = "float32"

    @nn.compact
    def __call__(self, x, deterministic=True):
        out = {}
        y = nn.LayerNorm()(x)
        y = out["sa"] = nn.MultiHeadDotProductAttention(
            num_heads=self.num_heads,
            kernel_init=nn.initializers.xavier_uniform(),
            deterministic=deterministic,
            dtype=self.dtype_mm,
        )(y, y)
        x = out["+sa"] = x + nn.Dropout(rate=self.dropout)(y, deterministic)
        y = out["mlp"] = MlpBlock(
            mlp_dim=self.mlp_dim,
            dropout=self.dropout,
            dtype_mm=self.dtype_mm,
        )(nn.LayerNorm()(x), deterministic)
        x = out["+mlp"] = x + nn.Dropout(rate=self.dropout)(y, deterministic)
        return x, out


class _ViT(nn.Module):
    """Vision transformer; returns (logits, a dict of dicts of what led to them)."""

    num_classes: int | None = None
    patch_size: Sequence[int] = (4, 4)
    width: int = 12
    depth: int = 2
    mlp_dim: int | None = None
    num_heads: int = 2
    dropout: float = 0.0
    head_zeroinit: bool = True
    remat_policy: str = "nothing_saveable"
    dtype_mm: str = "float32"

    @nn.compact
    def __call__(self, image, *, train=False):
        out = {}
        image = jnp.asarray(image, self.dtype_mm)
        x = out["stem"] = nn.Conv(
            self.width,
            self.patch_size,
            strides=self.patch_size,
            padding="VALID",
            name="embedding",
            dtype=self.dtype_mm,
        )(image)
        n, h, w, c = x.shape
        x = jnp.reshape(x, [n, h * w, c])
        x = out["with_posemb"] = x + self.param(
            "pos_embedding",
            nn.initializers.normal(stddev=1 / np.sqrt(c)),
            (1, h * w, c),
            x.dtype,
        )
        x = nn.Dropout(rate=self.dropout)(x, not train)

        block = nn.remat(
            Encoder1DBlock,
            prevent_cse=False,
            static_argnums=(2,),  # the module counts as 0, deterministic as 2
            policy=getattr(jax.checkpoint_policies, self.remat_policy, None),
        )
        x, scanned = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=self.depth,
        )(
            name="encoderblock",
            dtype_mm=self.dtype_mm,
            mlp_dim=self.mlp_dim,
            num_heads=self.num_heads,
            dropout=self.dropout,
        )(x, not train)
        out["encoder"] = {}
        for layer in range(self.depth):
            out["encoder"][f"block{layer:02d}"] = jax.tree.map(
                lambda o, layer=layer: o[layer], scanned
            )
        x = out["encoded"] = nn.LayerNorm(name="encoder_norm")(x)
        x = out["head_input"] = jnp.mean(x, axis=1)
        out["pre_logits"] = x
        if self.num_classes:
            inits = {"kernel_init": nn.initializers.zeros} if self.head_zeroinit else {}
            x = out["logits"] = nn.Dense(self.num_classes, name="head", **inits)(x)
        return x, out


def ViT(
    num_classes=None,
    *,
    variant=None,
    **kw,
):
    """A vision transformer by the name of its sizes."""
    sizes = {
        "nano": {
            "width": 12,
            "depth": 2,
            "mlp_dim": 24,
            "num_heads": 2,
        }
    }
    return _ViT(num_classes, **{**(sizes[variant] if variant else {}), **kw})


# ---- nanodo: Linen, setup() with a list of rematerialized blocks, a tied head ----


XAVIER = nn.initializers.xavier_uniform()
FAN_IN = nn.initializers.variance_scaling(
    1.0,
    "fan_in",
    "normal",
    out_axis=0,
)


@dataclasses.dataclass
class DoConfig:
    """Sizes of a `TransformerDo`; a plain dataclass, which is not hashable."""

    D: int
    H: int
    L: int
    N: int
    V: int
    F: int
    kernel_init: Callable = XAVIER
    embed_init: Callable = FAN_IN
    dtype: Any = jnp.float32
    fsdp_enabled: bool = True
    remat: bool = False


def fsdp_init(layer_type: str, cfg: DoConfig) -> Callable:
    """The initializer of a layer, with names for the axes along which to split it."""
    init = cfg.embed_init if layer_type == "embedding" else cfg.kernel_init
    if not cfg.fsdp_enabled:
        return init
    axes = {
        "embedding": (None, "data"),
        "attn_in_proj": ("data", None, None),
        "attn_out_proj": (None, None, "data"),
        "mlp_kernel": ("data", None),
    }
    return nn.with_partitioning(init, axes[layer_type])


class CausalAttn(nn.Module):
    """Causal attention whose softmax is float32."""

    cfg: DoConfig

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array):
        cfg = self.cfg
        assert cfg.D % cfg.H == 0, f"D {cfg.D} not divisible by H {cfg.H}"
        Dh = cfg.D // cfg.H
        multilinear = partial(
            nn.DenseGeneral,
            axis=-1,
            features=(cfg.H, Dh),
            kernel_init=fsdp_init("attn_in_proj", cfg),
            use_bias=False,
            dtype=cfg.dtype,
        )
        q_BxLxHxDh = multilinear(name="query")(x_BxLxD) / Dh**0.5
        k_BxLxHxDh = multilinear(name="key")(x_BxLxD)
        v_BxLxHxDh = multilinear(name="value")(x_BxLxD)
        att_BxHxLxL = jnp.einsum("...qhd,...khd->...hqk", q_BxLxHxDh, k_BxLxHxDh)
        att_BxHxLxL = att_BxHxLxL.astype(jnp.float32)
        L = x_BxLxD.shape[1]
        mask_1x1xLxL = jnp.tril(
            jnp.ones(
                (1, 1, L, L),
                dtype=jnp.bool_,
            )
        )
        att_BxHxLxL = jnp.where(
            mask_1x1xLxL,
            att_BxHxLxL,
            jnp.finfo(cfg.dtype).min,
        )
        att_BxHxLxL = jax.nn.softmax(att_BxHxLxL, axis=-1).astype(cfg.dtype)
        out_BxLxHxDh = jnp.einsum("...hqk,...khd->...qhd", att_BxHxLxL, v_BxLxHxDh)
        return nn.DenseGeneral(
            features=cfg.D,
            name="attn_out_proj",
            axis=(-2, -1),
            kernel_init=fsdp_init("attn_out_proj", cfg),
            use_bias=False,
            dtype=cfg.dtype,
        )(out_BxLxHxDh)


class TBlock(nn.Module):
    """Decoder layer with its norms in front."""

    docfg: DoConfig

    @nn.compact
    def __call__(self, in_BxLxD: jax.Array):
        cfg = self.docfg
        norm = partial(
            nn.LayerNorm,
            dtype=cfg.dtype,
            use_bias=False,
        )
        linear = partial(
            nn.Dense,
            kernel_init=fsdp_init("mlp_kernel", cfg),
            use_bias=False,
            dtype=cfg.dtype,
        )
        x_BxLxD = in_BxLxD + CausalAttn(cfg)(norm()(in_BxLxD))
        z_BxLxF = jax.nn.gelu(linear(cfg.F)(norm()(x_BxLxD)))
        return x_BxLxD + linear(cfg.D)(z_BxLxF)


class TransformerDo(nn.Module):
    """Decoder-only transformer whose embedding is its head too."""

    docfg: DoConfig

    def setup(self):
        cfg = self.docfg
        embed = partial(
            nn.Embed,
            features=cfg.D,
            embedding_init=fsdp_init("embedding", cfg),
        )
        self.embed = embed(num_embeddings=cfg.V)
        self.pos_embed = embed(num_embeddings=cfg.L)
        block = nn.remat(TBlock) if cfg.remat else TBlock
        self.blocks = [block(cfg) for _ in range(cfg.N)]
        self.out_ln = nn.LayerNorm(dtype=cfg.dtype, use_bias=False)

    def __call__(self, y_BxL: jax.Array):
        y_BxLxD = self.embed(y_BxL)
        y_BxLxD += self.pos_embed(jnp.arange(0, y_BxL.shape[1])[None, ...])
        for block in self.blocks:
            y_BxLxD = block(y_BxLxD)
        return self.embed.attend(self.out_ln(y_BxLxD).astype(jnp.float32))


# ---- bonsai/models/resnet: NNX, config first, rngs by keyword alone ----


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """Sizes of a `BottleneckResNet`."""

    block_layers: list[int]
    num_classes: int

    @classmethod
    def nano(cls, num_classes: int = 3):
        return cls([1, 1], num_classes=num_classes)


class ConvNorm(nnx.Module):
    """Convolution and batch norm, built for evaluation as pretrained models are."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        stride=1,
        *,
        rngs: nnx.Rngs,
    ):
        self.conv = nnx.Conv(
            inputs,
            outputs,
            kernel_size=(size, size),
            strides=stride,
            padding=size // 2,
            use_bias=False,
            rngs=rngs,
        )
        self.bn = nnx.BatchNorm(
            outputs,
            use_running_average=True,
            rngs=rngs,
        )

    def __call__(self, x):
        return self.bn(self.conv(x))


class Bottleneck(nnx.Module):
    """Residual block; `downsample` is a module or None."""

    def __init__(
        self,
        inputs,
        outputs,
        stride=1,
        downsample=None,
        *,
        rngs: nnx.Rngs,
    ):
        self.part0 = ConvNorm(
            inputs,
            outputs,
            1,
            rngs=rngs,
        )
        self.part1 = ConvNorm(
            outputs,
            outputs,
            3,
            stride,
            rngs=rngs,
        )
        self.part2 = ConvNorm(
            outputs,
            outputs * 2,
            1,
            rngs=rngs,
        )
        self.downsample = downsample

    def __call__(self, x):
        identity = x
        x = nnx.relu(self.part0(x))
        x = nnx.relu(self.part1(x))
        x = self.part2(x)
        if self.downsample is not None:
            identity = self.downsample(identity)
        return nnx.relu(x + identity)


class BottleneckResNet(nnx.Module):
    """ResNet of groups of blocks in `nnx.List`s."""

    def __init__(
        self,
        cfg: ResNetConfig,
        *,
        rngs: nnx.Rngs,
    ):
        self.stem = ConvNorm(3, 4, 3, 2, rngs=rngs)
        self.groups = nnx.List()
        inputs = 4
        for index, blocks in enumerate(cfg.block_layers):
            outputs = 3 * 2**index
            group = nnx.List()
            for block in range(blocks):
                stride = 2 if index and not block else 1
                downsample = None
                if stride != 1 or inputs != outputs * 2:
                    downsample = ConvNorm(
                        inputs,
                        outputs * 2,
                        1,
                        stride,
                        rngs=rngs,
                    )
                group.append(
                    Bottleneck(
                        inputs,
                        outputs,
                        stride,
                        downsample,
                        rngs=rngs,
                    )
                )
                inputs = outputs * 2
            self.groups.append(group)
        self.pool = partial(lambda x: x.mean(axis=(1, 2)))
        self.fc = nnx.Linear(
            inputs,
            cfg.num_classes,
            rngs=rngs,
        )

    def __call__(self, x):
        x = nnx.relu(self.stem(x))
        for group in self.groups:
            for block in group:
                x = block(x)
        return self.fc(self.pool(x))


# ---- bonsai's language models: NNX, no cache in training, dict outputs ----


@dataclasses.dataclass(frozen=True)
class GemmaConfig:
    """Sizes of a `Gemma`, and the dtype of its attention."""

    num_layers: int = 1
    vocab_size: int = 16
    emb_dim: int = 8
    mlp_dim: int = 16
    num_heads: int = 2
    num_kv_heads: int = 1
    head_dim: int = 4
    norm_eps: float = 1e-6
    rope_theta: int = 10_000
    dtype: Any = jnp.bfloat16


class GemmaRMSNorm(nnx.Module):
    """Norm in float32 whose scale is 1 + a parameter."""

    def __init__(
        self,
        dim: int,
        eps: float,
        *,
        rngs: nnx.Rngs,
    ):
        self.scale = nnx.Param(nnx.initializers.zeros_init()(rngs.params(), dim))
        self.norm_eps = eps

    def __call__(self, x):
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(
            jnp.square(x32).mean(-1, keepdims=True) + self.norm_eps
        )
        return (x32 * (1.0 + self.scale[...])).astype(x.dtype)


def rope(
    x: jax.Array,
    positions: jax.Array,
    theta: int,
) -> jax.Array:
    """Rotate (batch, time, heads, dim) by positions (batch, time)."""
    half = x.shape[-1] // 2
    rate = 1.0 / theta ** (jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.einsum(
        "BT,k->BTk",
        positions.astype(jnp.float32),
        rate,
        precision=jax.lax.Precision.HIGHEST,
    )
    sin = jnp.sin(angle)[:, :, None]
    cos = jnp.cos(angle)[:, :, None]
    left = x[..., :half]
    right = x[..., half:]
    return jnp.concatenate(
        [left * cos - right * sin, right * cos + left * sin],
        axis=-1,
    )


class GemmaAttention(nnx.Module):
    """Attention with grouped heads; scores and their sums in the config's dtype."""

    def __init__(
        self,
        cfg: GemmaConfig,
        *,
        rngs: nnx.Rngs,
    ):
        self.cfg = cfg
        heads = cfg.num_heads
        kv = cfg.num_kv_heads
        dim = cfg.head_dim
        self.q_proj = nnx.Einsum(
            "BTD,DNH->BTNH",
            (cfg.emb_dim, heads, dim),
            rngs=rngs,
        )
        self.k_proj = nnx.Einsum(
            "BSD,DKH->BSKH",
            (cfg.emb_dim, kv, dim),
            rngs=rngs,
        )
        self.v_proj = nnx.Einsum(
            "BSD,DKH->BSKH",
            (cfg.emb_dim, kv, dim),
            rngs=rngs,
        )
        self.o_proj = nnx.Einsum(
            "BTNH,NHD->BTD",
            (heads, dim, cfg.emb_dim),
            rngs=rngs,
        )
        self.q_norm = nnx.RMSNorm(
            dim,
            epsilon=cfg.norm_eps,
            rngs=rngs,
        )
        self.k_norm = nnx.RMSNorm(
            dim,
            epsilon=cfg.norm_eps,
            rngs=rngs,
        )
        self.scale = dim**-0.5

    @jax.named_scope("attention")
    def __call__(self, x, cache, positions, mask):
        cfg = self.cfg
        q = rope(self.q_norm(self.q_proj(x)), positions, cfg.rope_theta).astype(
            cfg.dtype
        )
        k = rope(self.k_norm(self.k_proj(x)), positions, cfg.rope_theta).astype(
            cfg.dtype
        )
        v = self.v_proj(x).astype(cfg.dtype)
        if cache is not None:
            raise NotImplementedError("the test model is only trained")
        b, t, n, h = q.shape
        q = q.reshape(
            b,
            t,
            cfg.num_kv_heads,
            n // cfg.num_kv_heads,
            h,
        )
        scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k) * self.scale
        scores = jnp.where(
            mask[:, None, None],
            scores,
            jnp.finfo(cfg.dtype).min,
        )
        weights = jax.nn.softmax(scores.astype(jnp.float32), axis=-1).astype(cfg.dtype)
        out = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v).reshape(b, t, n, h)
        return self.o_proj(out.astype(x.dtype))


class GemmaLayer(nnx.Module):
    """Decoder layer."""

    def __init__(
        self,
        cfg: GemmaConfig,
        *,
        rngs: nnx.Rngs,
    ):
        self.input_layernorm = GemmaRMSNorm(
            cfg.emb_dim,
            cfg.norm_eps,
            rngs=rngs,
        )
        self.attn = GemmaAttention(cfg, rngs=rngs)
        self.post_attention_layernorm = GemmaRMSNorm(
            cfg.emb_dim, cfg.norm_eps, rngs=rngs
        )
        linear = partial(
            nnx.Linear,
            use_bias=False,
            rngs=rngs,
        )
        self.gate_proj = linear(cfg.emb_dim, cfg.mlp_dim)
        self.up_proj = linear(cfg.emb_dim, cfg.mlp_dim)
        self.down_proj = linear(cfg.mlp_dim, cfg.emb_dim)

    def __call__(self, x, cache, positions, mask):
        x = x + self.attn(
            self.input_layernorm(x),
            cache,
            positions,
            mask,
        )
        y = self.post_attention_layernorm(x)
        return x + self.down_proj(nnx.gelu(self.gate_proj(y)) * self.up_proj(y))


class Gemma(nnx.Module):
    """Language model that takes a cache to generate with, and returns it."""

    def __init__(
        self,
        cfg: GemmaConfig,
        *,
        rngs: nnx.Rngs,
    ):
        self.config = cfg
        self.embedder = nnx.Embed(
            cfg.vocab_size,
            cfg.emb_dim,
            rngs=rngs,
        )
        self.layers = nnx.List(
            [GemmaLayer(cfg, rngs=rngs) for _ in range(cfg.num_layers)]
        )
        self.final_norm = GemmaRMSNorm(
            cfg.emb_dim,
            cfg.norm_eps,
            rngs=rngs,
        )

    def __call__(
        self,
        tokens,
        *,
        segment_ids=None,
        cache=None,
        output_hidden_states: bool = False,
    ):
        x = self.embedder(tokens) * jnp.sqrt(float(self.config.emb_dim))
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        positions = jnp.cumsum(segment_ids != 0, axis=-1) - 1
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
        mask = same & jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))
        hidden_states = [x] if output_hidden_states else None
        for i, layer in enumerate(self.layers):
            x = layer(
                x,
                None if cache is None else cache[i],
                positions,
                mask,
            )
            if hidden_states is not None:
                hidden_states.append(x)
        logits = self.embedder.attend(self.final_norm(x))
        return {"logits": logits, "cache": cache, "hidden_states": hidden_states}


# ---- recurrentgemma/jax: Linen, linear recurrences, caches as named tuples ----


class TemporalBlockType(enum.Enum):
    """Kinds of layer that mix over time."""

    ATTENTION = enum.auto()
    RECURRENT = enum.auto()


class GriffinConfig(NamedTuple):
    """Sizes of a `Griffin`."""

    vocab_size: int
    width: int
    mlp_expanded_width: int
    num_heads: int
    block_types: tuple[TemporalBlockType, ...]
    attention_window_size: int
    logits_soft_cap: float = 30.0


class RecurrentBlockCache(NamedTuple):
    """State of a recurrent block after a prompt."""

    rg_lru_state: jax.Array
    conv1d_state: jax.Array


class AttentionBlockCache(NamedTuple):
    """Keys, values and count of tokens after a prompt."""

    keys: jax.Array
    values: jax.Array
    num_tokens: jax.Array


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def sqrt_bound_derivative(x, max_gradient):
    """Square root with a bound on its gradient."""
    return jnp.sqrt(x)


def _sqrt_forward(x, max_gradient):
    return jnp.sqrt(x), (x,)


def _sqrt_backward(max_gradient, residuals, gradient):
    clipped = jnp.maximum(residuals[0], 1 / (4 * max_gradient**2))
    return (gradient / (2 * jnp.sqrt(clipped)),)


sqrt_bound_derivative.defvjp(_sqrt_forward, _sqrt_backward)


class GriffinRMSNorm(nn.Module):
    """Norm whose scale is 1 + a parameter."""

    width: int
    eps: float = 1e-6

    def setup(self):
        self.scale = self.param(
            "scale",
            nn.initializers.zeros_init(),
            [self.width],
        )

    def __call__(self, x):
        return (
            x
            * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + self.eps)
            * (1 + self.scale)
        )


class BlockDiagonalLinear(nn.Module):
    """Linear layer of independent blocks."""

    width: int
    num_blocks: int

    def setup(self):
        size = self.width // self.num_blocks
        self.w = self.param(
            "w",
            nn.initializers.lecun_normal(),
            [self.num_blocks, size, size],
        )
        self.b = self.param(
            "b",
            nn.initializers.zeros_init(),
            [self.num_blocks, size],
        )

    def __call__(self, x):
        parts = x.reshape(
            *x.shape[:-1],
            self.num_blocks,
            -1,
        )
        return (jnp.einsum("...hi,hij->...hj", parts, self.w) + self.b).reshape(x.shape)


def _a_param_init(key, shape, dtype=jnp.float32):
    radius = jax.random.uniform(
        key,
        shape,
        dtype,
        0.9**2 + 1e-8,
        0.999**2,
    )
    return jnp.log(jnp.expm1(-0.5 * jnp.log(radius)))


class RGLRU(nn.Module):
    """Gated linear recurrence as a scan; a document begins at position 0."""

    width: int
    num_heads: int

    def setup(self):
        self.a_param = self.param(
            "a_param",
            _a_param_init,
            [self.width],
        )
        self.input_gate = BlockDiagonalLinear(self.width, self.num_heads)
        self.a_gate = BlockDiagonalLinear(self.width, self.num_heads)

    def __call__(
        self,
        x,
        segment_pos,
        cache=None,
        return_cache=True,
    ):
        assert segment_pos.shape == x.shape[:2]
        gate_x = jax.nn.sigmoid(self.input_gate(x))
        gate_a = jax.nn.sigmoid(self.a_gate(x))
        log_a = -8.0 * gate_a * jax.nn.softplus(self.a_param)
        reset = (segment_pos == 0).astype(x.dtype)[..., None]
        root = sqrt_bound_derivative(1 - jnp.exp(2 * log_a), 1000.0)
        inputs = x * gate_x * (reset + (1 - reset) * root)
        a = jnp.exp(log_a) * (1 - reset)

        def combine(left, right):
            return left[0] * right[0], left[1] * right[0] + right[1]

        if cache is not None:
            inputs = inputs.at[:, 0].add(a[:, 0] * cache)
        _, y = jax.lax.associative_scan(
            combine,
            (a, inputs),
            axis=1,
        )
        return y, (y[:, -1] if return_cache else None)


class Conv1D(nn.Module):
    """Causal convolution over a few steps, a channel at a time."""

    width: int
    temporal_width: int = 3

    def setup(self):
        init = nn.initializers.variance_scaling(0.01, "fan_in", "normal")
        self.w = self.param(
            "w",
            init,
            [self.temporal_width, self.width],
        )
        self.b = self.param(
            "b",
            nn.initializers.zeros_init(),
            [self.width],
        )

    def __call__(
        self,
        x,
        segment_pos,
        cache=None,
        return_cache=True,
    ):
        y = self.b
        for shift in range(self.temporal_width):
            moved = jnp.pad(x, ((0, 0), (shift, 0), (0, 0)))[:, : x.shape[1]]
            inside = (segment_pos >= shift)[..., None]
            y = (
                y
                + jnp.where(inside, moved, 0) * self.w[self.temporal_width - 1 - shift]
            )
        return y, (x[:, 1 - self.temporal_width :] if return_cache else None)


class RecurrentBlock(nn.Module):
    """Two branches, one of them recurrent, and their product."""

    width: int
    num_heads: int

    def setup(self):
        self.linear_y = nn.Dense(self.width)
        self.linear_x = nn.Dense(self.width)
        self.linear_out = nn.Dense(self.width)
        self.conv_1d = Conv1D(self.width)
        self.rg_lru = RGLRU(self.width, self.num_heads)

    def __call__(
        self,
        x,
        segment_pos,
        cache=None,
        return_cache=True,
    ):
        y = jax.nn.gelu(self.linear_y(x))
        x = self.linear_x(x)
        x, conv1d_state = self.conv_1d(
            x,
            segment_pos,
            None,
            return_cache,
        )
        x, rg_lru_state = self.rg_lru(
            x,
            segment_pos,
            None,
            return_cache,
        )
        x = self.linear_out(x * y)
        if not return_cache:
            return x, None
        return x, RecurrentBlockCache(rg_lru_state, conv1d_state)


class LocalAttentionBlock(nn.Module):
    """Attention within a window, one head of keys and values for all queries."""

    width: int
    num_heads: int
    window_size: int

    def setup(self):
        self.proj_q = nn.Dense(self.width, use_bias=False)
        self.proj_k = nn.Dense(
            self.width // self.num_heads,
            use_bias=False,
        )
        self.proj_v = nn.Dense(
            self.width // self.num_heads,
            use_bias=False,
        )
        self.proj_final = nn.Dense(self.width)

    def __call__(
        self,
        x,
        segment_pos,
        cache=None,
        return_cache=True,
    ):
        b, t, _ = x.shape
        queries = self.proj_q(x).reshape(
            b,
            t,
            self.num_heads,
            -1,
        )
        keys = self.proj_k(x)
        values = self.proj_v(x)
        segment = jnp.cumsum(segment_pos == 0, axis=-1)
        apart = jnp.arange(t)[:, None] - jnp.arange(t)[None]
        near = (apart >= 0) & (apart < self.window_size)
        mask = (segment[:, :, None] == segment[:, None, :]) & near
        scores = jnp.einsum("bthd,bsd->bhts", queries, keys) / np.sqrt(keys.shape[-1])
        scores = jnp.where(
            mask[:, None],
            scores,
            -2.3819763e38,
        )
        weights = jax.nn.softmax(scores, axis=-1)
        out = jnp.einsum("bhts,bsd->bthd", weights, values).reshape(b, t, -1)
        out = self.proj_final(out)
        if not return_cache:
            return out, None
        last = slice(-self.window_size, None)
        return out, AttentionBlockCache(
            keys[:, last],
            values[:, last],
            segment_pos[:, -1] + 1,
        )


class ResidualBlock(nn.Module):
    """A block that mixes over time, and one that does not."""

    config: GriffinConfig
    temporal_block_type: TemporalBlockType

    def setup(self):
        config = self.config
        self.temporal_pre_norm = GriffinRMSNorm(config.width)
        if self.temporal_block_type is TemporalBlockType.RECURRENT:
            self.recurrent_block = RecurrentBlock(config.width, config.num_heads)
        else:
            self.attention_block = LocalAttentionBlock(
                config.width, config.num_heads, config.attention_window_size
            )
        self.channel_pre_norm = GriffinRMSNorm(config.width)
        self.ffw_up = nn.Dense(2 * config.mlp_expanded_width)
        self.ffw_down = nn.Dense(config.width)

    @property
    def temporal_block(self):
        if self.temporal_block_type is TemporalBlockType.RECURRENT:
            return self.recurrent_block
        return self.attention_block

    def __call__(
        self,
        x,
        segment_pos,
        cache=None,
        return_cache=True,
    ):
        y = self.temporal_pre_norm(x)
        y, cache = self.temporal_block(
            y,
            segment_pos,
            cache,
            return_cache,
        )
        x = x + y
        gate, up = jnp.split(
            self.ffw_up(self.channel_pre_norm(x)),
            2,
            axis=-1,
        )
        return x + self.ffw_down(jax.nn.gelu(gate) * up), cache


class Griffin(nn.Module):
    """Language model; returns (logits, caches by the names of the blocks)."""

    config: GriffinConfig
    gradient_checkpointing: bool = True

    def setup(self):
        config = self.config
        self.embedder = nn.Embed(config.vocab_size, config.width)
        block_class = ResidualBlock
        if self.gradient_checkpointing:
            block_class = nn.remat(block_class, static_argnums=4)  # return_cache
        self.blocks = [
            block_class(name=f"blocks.{i}", config=config, temporal_block_type=kind)
            for i, kind in enumerate(config.block_types)
        ]
        self.final_norm = GriffinRMSNorm(config.width)

    def __call__(
        self,
        tokens,
        segment_pos,
        cache=None,
        return_logits: bool = True,
        return_cache: bool = True,
    ):
        if not return_logits and not return_cache:
            return None, None
        x = self.embedder(tokens) * np.sqrt(self.config.width).astype(np.float32)
        new_cache = {}
        for i, block in enumerate(self.blocks):
            name = f"blocks.{i}"
            x, new_cache[name] = block(
                x,
                segment_pos,
                None if cache is None else cache[name],
                return_cache,
            )
        if not return_logits:
            return None, new_cache
        logits = self.embedder.attend(self.final_norm(x))
        cap = self.config.logits_soft_cap
        if cap:
            logits = jnp.tanh(logits / cap) * cap
        return logits, (new_cache if return_cache else None)


# ---- flax/examples/ogbg_molpcba: Linen, a batch of graphs as one graph ----


class GraphsTuple(NamedTuple):
    """Graphs one after the other: nodes, edges and what says where each graph ends."""

    nodes: Any
    edges: Any
    receivers: Any
    senders: Any
    globals: Any
    n_node: Any
    n_edge: Any


class GraphMLP(nn.Module):
    """Layers whose dropout follows an attribute."""

    feature_sizes: Sequence[int]
    dropout_rate: float = 0
    deterministic: bool = True

    @nn.compact
    def __call__(self, x):
        for size in self.feature_sizes:
            x = nn.relu(nn.Dense(features=size)(x))
            x = nn.Dropout(rate=self.dropout_rate, deterministic=self.deterministic)(x)
        return x


class GraphNet(nn.Module):
    """Rounds of messages along edges; returns graphs whose globals are logits."""

    latent_size: int
    num_mlp_layers: int
    message_passing_steps: int
    output_globals_size: int
    dropout_rate: float = 0
    deterministic: bool = True

    @nn.compact
    def __call__(self, graphs: GraphsTuple) -> GraphsTuple:
        count = graphs.n_node.shape[0]
        nodes_in_all = graphs.nodes.shape[0]
        edges_in_all = graphs.edges.shape[0]
        graph_of_node = jnp.repeat(
            jnp.arange(count), graphs.n_node, total_repeat_length=nodes_in_all
        )
        graph_of_edge = jnp.repeat(
            jnp.arange(count), graphs.n_edge, total_repeat_length=edges_in_all
        )
        nodes = nn.Dense(self.latent_size, name="embed_nodes")(graphs.nodes)
        edges = nn.Dense(self.latent_size, name="embed_edges")(graphs.edges)
        glob = nn.Dense(self.latent_size, name="embed_globals")(graphs.globals)
        mlp = partial(
            GraphMLP,
            [self.latent_size] * self.num_mlp_layers,
            dropout_rate=self.dropout_rate,
            deterministic=self.deterministic,
        )
        for _ in range(self.message_passing_steps):
            at_edges = [
                edges,
                nodes[graphs.senders],
                nodes[graphs.receivers],
            ]
            at_edges.append(glob[graph_of_edge])
            edges = edges + mlp()(jnp.concatenate(at_edges, axis=-1))
            sent = jax.ops.segment_sum(
                edges,
                graphs.senders,
                nodes_in_all,
            )
            received = jax.ops.segment_sum(
                edges,
                graphs.receivers,
                nodes_in_all,
            )
            at_nodes = [nodes, sent, received, glob[graph_of_node]]
            nodes = nodes + mlp()(jnp.concatenate(at_nodes, axis=-1))
            pooled_nodes = jax.ops.segment_sum(nodes, graph_of_node, count)
            pooled_edges = jax.ops.segment_sum(edges, graph_of_edge, count)
            at_globals = [glob, pooled_nodes, pooled_edges]
            glob = glob + mlp()(jnp.concatenate(at_globals, axis=-1))
            nodes = nn.LayerNorm()(nodes)
            edges = nn.LayerNorm()(edges)
            glob = nn.LayerNorm()(glob)
        logits = nn.Dense(self.output_globals_size, name="decode_globals")(glob)
        return graphs._replace(
            nodes=nodes,
            edges=edges,
            globals=logits,
        )


# ---- jaxnerf: Linen, rays, a coarse and a fine level, a list of tuples ----


def posenc(x: jax.Array, degree: int) -> jax.Array:
    """Coordinates, with their sines and cosines at `degree` frequencies."""
    scaled = x[..., None, :] * 2.0 ** jnp.arange(degree)[:, None]
    scaled = scaled.reshape(*x.shape[:-1], -1)
    waves = jnp.sin(
        jnp.concatenate(
            [scaled, scaled + 0.5 * jnp.pi],
            axis=-1,
        )
    )
    return jnp.concatenate([x, waves], axis=-1)


def along_rays(
    z_vals: jax.Array,
    origins: jax.Array,
    directions: jax.Array,
) -> jax.Array:
    """Points (batch, samples, 3) at distances (batch, samples) from the origins."""
    return origins[:, None, :] + z_vals[..., None] * directions[:, None, :]


def volumetric_rendering(rgb, sigma, z_vals, directions, white_bkgd):
    """Color, inverse distance, opacity and weight of each sample of a ray."""
    steps = jnp.concatenate(
        [z_vals[:, 1:] - z_vals[:, :-1], jnp.full_like(z_vals[:, :1], 1e10)],
        axis=-1,
    )
    steps = steps * jnp.linalg.norm(
        directions,
        axis=-1,
        keepdims=True,
    )
    alpha = 1.0 - jnp.exp(-sigma[..., 0] * steps)
    through = jnp.cumprod(
        1.0 - alpha[:, :-1] + 1e-10,
        axis=-1,
    )
    through = jnp.concatenate(
        [jnp.ones_like(alpha[:, :1]), through],
        axis=-1,
    )
    weights = alpha * through
    color = (weights[..., None] * rgb).sum(axis=-2)
    depth = (weights * z_vals).sum(axis=-1)
    acc = weights.sum(axis=-1)
    disp = acc / jnp.maximum(depth, 1e-10)
    if white_bkgd:
        color = color + (1.0 - acc[:, None])
    return color, disp, acc, weights


class RadianceMLP(nn.Module):
    """Color and density at points, the color by the direction of view too."""

    net_depth: int = 2
    net_width: int = 16
    skip_layer: int = 2

    @nn.compact
    def __call__(self, x, condition=None):
        dense = partial(nn.Dense, kernel_init=nn.initializers.glorot_uniform())
        inputs = x
        for i in range(self.net_depth):
            x = nn.relu(dense(self.net_width)(x))
            if i % self.skip_layer == 0 and i > 0:
                x = jnp.concatenate([x, inputs], axis=-1)
        raw_sigma = dense(1)(x)
        if condition is not None:
            condition = jnp.tile(condition[:, None, :], (1, x.shape[1], 1))
            x = jnp.concatenate(
                [dense(self.net_width)(x), condition],
                axis=-1,
            )
            x = nn.relu(dense(self.net_width)(x))
        return dense(3)(x), raw_sigma


class NerfModel(nn.Module):
    """Radiance field; returns a (rgb, disp, acc) for the coarse and the fine level."""

    num_coarse_samples: int = 6
    num_fine_samples: int = 4
    near: float = 1.0
    far: float = 3.0
    noise_std: float | None = None
    white_bkgd: bool = True
    deg_point: int = 2
    deg_view: int = 1

    @nn.compact
    def __call__(
        self,
        origins,
        directions,
        viewdirs=None,
        randomized=False,
    ):
        batch = origins.shape[0]
        z_vals = jnp.linspace(
            self.near,
            self.far,
            self.num_coarse_samples,
        )
        z_vals = jnp.broadcast_to(z_vals, (batch, self.num_coarse_samples))
        if randomized:
            middle = 0.5 * (z_vals[:, 1:] + z_vals[:, :-1])
            upper = jnp.concatenate(
                [middle, z_vals[:, -1:]],
                axis=-1,
            )
            lower = jnp.concatenate(
                [z_vals[:, :1], middle],
                axis=-1,
            )
            share = jax.random.uniform(self.make_rng("coarse"), z_vals.shape)
            z_vals = lower + (upper - lower) * share
        condition = None
        if viewdirs is not None:
            norms = jnp.linalg.norm(
                viewdirs,
                axis=-1,
                keepdims=True,
            )
            condition = posenc(viewdirs / norms, self.deg_view)

        ret = []
        levels = [("coarse", 0), ("fine", self.num_fine_samples)]
        weights = None
        for name, more in levels:
            if more:
                z_vals = self._finer(z_vals, weights, more, randomized)
            points = posenc(along_rays(z_vals, origins, directions), self.deg_point)
            raw_rgb, raw_sigma = RadianceMLP(name=f"{name}_mlp")(points, condition)
            if self.noise_std is not None and randomized:
                noise = jax.random.normal(self.make_rng(name), raw_sigma.shape)
                raw_sigma = raw_sigma + self.noise_std * noise
            *level, weights = volumetric_rendering(
                nn.sigmoid(raw_rgb),
                nn.relu(raw_sigma),
                z_vals,
                directions,
                self.white_bkgd,
            )
            ret.append(tuple(level))
        return ret

    def _finer(self, z_vals, weights, more, randomized):
        """More samples where the coarse level saw something, in order of distance."""
        bins = 0.5 * (z_vals[:, 1:] + z_vals[:, :-1])
        pdf = weights[:, 1:-1] + 1e-2
        pdf = pdf / pdf.sum(-1, keepdims=True)
        cdf = jnp.pad(jnp.cumsum(pdf, axis=-1), ((0, 0), (1, 0)))
        share = jnp.broadcast_to(
            jnp.linspace(0.05, 0.95, more), (z_vals.shape[0], more)
        )
        if randomized:
            jitter = jax.random.uniform(self.make_rng("fine"), share.shape)
            share = share + 0.05 * (jitter - 0.5)
        drawn = jax.vmap(jnp.interp)(share, cdf, bins)
        return jnp.sort(
            jnp.concatenate(
                [z_vals, jax.lax.stop_gradient(drawn)],
                axis=-1,
            ),
            axis=-1,
        )


# ---- score_sde/models/ddpm: Linen, time embedding, group norm, skip connections ----


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    """Sizes of a `ScoreUNet`."""

    nf: int = 4
    ch_mult: tuple[int, ...] = (1, 2)
    attn_resolutions: tuple[int, ...] = (4,)
    dropout: float = 0.1
    conditional: bool = True


def default_init(scale: float = 1.0) -> Callable:
    scale = 1e-10 if scale == 0 else scale
    return nn.initializers.variance_scaling(scale, "fan_avg", "uniform")


def conv3x3(
    x,
    out_ch: int,
    stride: int = 1,
    init_scale: float = 1.0,
    name=None,
):
    """A convolution that becomes a submodule of the module that calls this."""
    return nn.Conv(
        out_ch,
        (3, 3),
        strides=(stride, stride),
        padding="SAME",
        kernel_init=default_init(init_scale),
        name=name,
    )(x)


def timestep_embedding(timesteps: jax.Array, dim: int) -> jax.Array:
    assert timesteps.ndim == 1
    half = dim // 2
    rate = jnp.exp(jnp.arange(half) * -(jnp.log(10_000.0) / max(half - 1, 1)))
    angle = timesteps.astype(jnp.float32)[:, None] * rate[None]
    return jnp.concatenate(
        [jnp.sin(angle), jnp.cos(angle)],
        axis=1,
    )


class ResnetBlockDDPM(nn.Module):
    """Residual block that is told the time."""

    act: Callable
    normalize: Callable
    out_ch: int | None = None
    dropout: float = 0.1

    @nn.compact
    def __call__(
        self,
        x,
        temb=None,
        train=True,
    ):
        out_ch = self.out_ch or x.shape[-1]
        h = conv3x3(self.act(self.normalize()(x)), out_ch)
        if temb is not None:
            shift = nn.Dense(out_ch, kernel_init=default_init())(self.act(temb))
            h = h + shift[:, None, None, :]
        h = self.act(self.normalize()(h))
        h = nn.Dropout(self.dropout)(h, deterministic=not train)
        h = conv3x3(h, out_ch, init_scale=0.1)
        if x.shape[-1] != out_ch:
            x = nn.Dense(out_ch, kernel_init=default_init())(x)
        return x + h


class AttnBlock(nn.Module):
    """Self-attention over the pixels."""

    normalize: Callable

    @nn.compact
    def __call__(self, x):
        b, h, w, c = x.shape
        y = self.normalize()(x)
        dense = partial(
            nn.Dense,
            c,
            kernel_init=default_init(),
        )
        q = dense()(y)
        k = dense()(y)
        v = dense()(y)
        scores = jnp.einsum("bhwc,bHWc->bhwHW", q, k) * c**-0.5
        scores = jax.nn.softmax(
            scores.reshape(b, h, w, h * w),
            axis=-1,
        )
        y = jnp.einsum(
            "bhwHW,bHWc->bhwc",
            scores.reshape(b, h, w, h, w),
            v,
        )
        return x + nn.Dense(c, kernel_init=default_init(0.1))(y)


class ScoreUNet(nn.Module):
    """U-Net that estimates the noise in `x` at the times `labels`."""

    config: ScoreConfig

    @nn.compact
    def __call__(self, x, labels, train=True):
        config = self.config
        act = nn.swish
        normalize = partial(nn.GroupNorm, num_groups=2)
        resnet_block = partial(
            ResnetBlockDDPM, act=act, normalize=normalize, dropout=config.dropout
        )
        temb = None
        if config.conditional:
            temb = timestep_embedding(labels, config.nf)
            temb = nn.Dense(config.nf * 4, kernel_init=default_init())(temb)
            temb = nn.Dense(config.nf * 4, kernel_init=default_init())(act(temb))

        h = conv3x3(x, config.nf)
        hs = []
        for level, mult in enumerate(config.ch_mult):
            if level != 0:
                h = conv3x3(
                    h,
                    h.shape[-1],
                    stride=2,
                )
            h = resnet_block(out_ch=config.nf * mult)(h, temb, train)
            if h.shape[1] in config.attn_resolutions:
                h = AttnBlock(normalize)(h)
            hs.append(h)

        h = resnet_block()(h, temb, train)
        for level, mult in reversed(list(enumerate(config.ch_mult))):
            h = jnp.concatenate([h, hs.pop()], axis=-1)
            h = resnet_block(out_ch=config.nf * mult)(h, temb, train)
            if level != 0:
                b, height, width, c = h.shape
                h = jax.image.resize(
                    h,
                    (b, 2 * height, 2 * width, c),
                    method="nearest",
                )
                h = conv3x3(h, c)
        assert not hs
        return conv3x3(
            act(normalize()(h)),
            x.shape[-1],
            init_scale=0.1,
        )
