"""Language models on TPUs whose layers are stages of a pipeline.

They are judged apart (`planner-memory --stages`), as the `long` programs are.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import lepton_jax as lepton
from lepton_jax import models
from tools.bench.families.case import Case, shape
from tools.bench.families.draw import Draw
from tools.bench.families.long import CLIPPED, OPTIMIZERS

TOPOLOGIES = (
    "v5e:2x2",
    "v5e:4x4",
    "v6e:2x2",
    "v6e:4x4",
    "v5p:2x2x1",
    "v5p:2x2x2",
    "v5p:4x4x4",
)
# Shares of draws (assumption: what people train).
CHUNKED = 0.2
WITH_REMAT = 0.4


def case(draw: Draw) -> Case:
    """Draw a model, its stages, and the micro-batches in flight."""
    where = draw.choice(TOPOLOGIES)
    devices = lepton.topology(where).devices
    count = draw.choice([n for n in (2, 4, 8) if n <= devices])
    chunks = 2 if draw.random() < CHUNKED else 1
    in_flight = count * draw.choice((2, 4, 8))
    head = draw.choice((64, 128, 128))
    kv_heads = draw.choice((2, 4, 8))
    heads = kv_heads * draw.choice((1, 2, 4))
    dim = heads * head
    vocab = draw.width(4_000, 64_000)
    length = draw.choice((512, 1024, 2048, 4096, 8192))
    model = partial(
        models.TransformerLM,
        vocab,
        dim=dim,
        layers=count * chunks * draw.randint(1, 4),
        heads=heads,
        kv_heads=kv_heads,
        hidden=draw.width(2 * dim, 4 * dim),
        loop="scan",
    )
    fixed: dict[str, Any] = {"stages": (count, in_flight, chunks)}
    if draw.random() < WITH_REMAT:
        fixed["remat"] = draw.choice(("dots", "full", "keep attention"))
    return Case(
        model,
        shape(length),
        shape(length),
        optimizer=draw.choice(OPTIMIZERS)(),
        clip_norm=1.0 if draw.random() < CLIPPED else None,
        fixed=fixed,
        unit=in_flight * (devices // count),
        ids=vocab,
        on=(where,),
    )
