"""Mixtures of experts that drop no token, on TPUs.

They are judged apart (`planner-memory --dropless`), as the `long` programs are. Half of
them are asked to have axes for FSDP and for the experts, since the planner by itself
mostly takes FSDP alone.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import lepton_jax as lepton
from lepton_jax import models
from tools.bench.families.case import Case, shape
from tools.bench.families.draw import Draw
from tools.bench.families.long import OPTIMIZERS

TOPOLOGIES = (
    "v5e:2x2",
    "v5e:4x4",
    "v6e:2x2",
    "v6e:4x4",
    "v6e:8x8",
    "v5p:2x2x1",
    "v5p:2x2x2",
    "v5p:4x4x4",
)
# Shares of draws (assumption: what people train, and what the planner may choose).
UNROLLED = 0.15
WITH_AXES = 0.5
CLIPPED = 0.5
WITH_REMAT = 0.3


def case(draw: Draw) -> Case:
    """Draw experts, widths, a length, and a mesh."""
    where = draw.choice(TOPOLOGIES)
    experts = draw.choice((4, 8, 16, 32))
    head = draw.choice((64, 128, 128))
    kv_heads = draw.choice((2, 4, 8))
    heads = kv_heads * draw.choice((1, 2, 4))
    dim = heads * head
    unrolled = draw.random() < UNROLLED
    vocab = draw.width(4_000, 64_000)
    length = draw.choice((512, 1024, 2048, 4096, 8192))
    model = partial(
        models.MoELM,
        vocab,
        dim=dim,
        heads=heads,
        kv_heads=kv_heads,
        hidden=draw.width(dim // 2, 4 * dim),
        layers=draw.randint(1, 3) if unrolled else draw.randint(2, 16),
        experts=experts,
        chosen=draw.choice((1, 2, 2, 4)),
        capacity=None,
        tied=draw.random() < UNROLLED,
        loop="unrolled" if unrolled else "scan",
    )
    return Case(
        model,
        shape(length),
        shape(length),
        optimizer=draw.choice(OPTIMIZERS[:-1])(),
        clip_norm=1.0 if draw.random() < CLIPPED else None,
        loss=draw.choice(
            (lepton.losses.cross_entropy, lepton.losses.padded_cross_entropy)
        ),
        fixed=_fixed(draw, where, experts),
        ids=vocab,
        on=(where,),
    )


# ---- internals ----


def _fixed(draw: Draw, where: str, experts: int) -> dict[str, Any]:
    """Draw what a user asks of the planner: mostly axes."""
    fixed: dict[str, Any] = {}
    if draw.random() < WITH_REMAT:
        fixed["remat"] = draw.choice(("dots", "full", "keep attention"))
    if draw.random() >= WITH_AXES:
        return fixed
    devices = lepton.topology(where).devices
    most = min(devices, experts)
    ways = [n for n in (2, 4, 8, 16) if n <= most]
    expert = draw.choice(ways)
    mesh = {"fsdp": devices // expert, "expert": expert}
    fixed["mesh"] = {axis: size for axis, size in mesh.items() if size > 1}
    return fixed
