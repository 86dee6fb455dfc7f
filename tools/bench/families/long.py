"""Language models over long sequences on TPUs, whose attention is one operation.

They are judged apart (`planner-memory --long`): the other families were split before
there was such an operation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import optax

import lepton_jax as lepton
from lepton_jax import models
from tools.bench.families.case import Case, shape
from tools.bench.families.draw import Draw

TOPOLOGIES = (
    "v5e:2x2",
    "v5e:4x4",
    "v5e:8x8",
    "v6e:2x2",
    "v6e:4x4",
    "v6e:8x8",
    "v5p:2x2x1",
    "v5p:2x2x2",
    "v5p:4x4x4",
    "v4:2x2x4",
)
OPTIMIZERS: tuple[Callable[[], Any], ...] = (
    lambda: optax.adamw(1e-3),
    lambda: optax.adamw(1e-3),
    lambda: optax.lion(1e-4),
    lambda: optax.adafactor(1e-3),
    lambda: optax.contrib.muon(1e-3),
)
# Shares of draws (assumption: what people train).
UNROLLED = 0.2
MIXTURES = 0.15
DECODERS = 0.3
CLIPPED = 0.5
PINNED = 0.2


def case(draw: Draw) -> Case:
    """Draw a model, its length, and where it trains."""
    kv_heads = draw.choice((1, 2, 4, 8))
    heads = kv_heads * draw.choice((1, 2, 3, 4, 7))
    head = draw.choice((64, 128, 128, 256))
    dim = heads * head if draw.random() < PINNED else draw.width(512, 6144)
    dim = max(256, dim // 128 * 128)
    unrolled = draw.random() < UNROLLED
    layers = draw.randint(2, 4) if unrolled else draw.randint(4, 48)
    length = draw.choice((512, 1024, 2048, 4096, 8192, 16384))
    vocab = draw.width(16_000, 160_000)
    sizes = {
        "dim": dim,
        "layers": layers,
        "heads": heads,
        "kv_heads": kv_heads,
        "hidden": draw.width(2 * dim, 4 * dim),
        "loop": "unrolled" if unrolled else "scan",
    }
    return Case(
        _model(draw, vocab, sizes, head),
        shape(length),
        shape(length),
        optimizer=draw.choice(OPTIMIZERS)(),
        clip_norm=1.0 if draw.random() < CLIPPED else None,
        loss=draw.choice(
            (lepton.losses.cross_entropy, lepton.losses.padded_cross_entropy)
        ),
        fixed=_fixed(draw),
        ids=vocab,
        on=TOPOLOGIES,
    )


# ---- internals ----


def _model(
    draw: Draw,
    vocab: int,
    sizes: dict[str, Any],
    head: int,
) -> Callable[..., Any]:
    """Draw the kind of model: Llama, a mixture, or one of `models.DecoderLM`."""
    sizes = sizes | {"tied": draw.random() < PINNED}
    layers = sizes["layers"]
    if draw.random() < DECODERS:
        kind = models.DecoderShape(
            vocab=vocab,
            head=head,
            query_key_norm=draw.random() < UNROLLED,
            windows=draw.choice(((), (), (1024,) * layers)),
            **sizes,
        )
        return partial(models.DecoderLM, kind)

    # heads of these models are as wide as the model over their number
    sizes["dim"] = sizes["heads"] * head
    if draw.random() < MIXTURES:
        sizes |= {"experts": draw.choice((4, 8, 16)), "layers": min(layers, 12)}
        return partial(models.MoELM, vocab, **sizes)
    return partial(models.TransformerLM, vocab, **sizes)


def _fixed(draw: Draw) -> dict[str, Any]:
    """Draw what a user asks of the planner; mostly nothing."""
    if draw.random() < PINNED:
        return {"remat": draw.choice(("dots", "full", "keep attention"))}
    return {}
