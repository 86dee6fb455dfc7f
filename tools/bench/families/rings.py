"""Language models on TPUs whose keys and values go around a ring of devices.

They are judged apart (`planner-memory --rings`), as the `long` programs are.
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
WINDOWED = 0.15
WITH_REMAT = 0.3


def case(draw: Draw) -> Case:
    """Draw a model, a length, and a mesh with an axis for the sequence."""
    where = draw.choice(TOPOLOGIES)
    devices = lepton.topology(where).devices
    sequence = draw.choice([n for n in (2, 4, 8, 16) if n <= devices])
    head = draw.choice((64, 128, 128))
    kv_heads = draw.choice((1, 2, 4, 8))
    heads = kv_heads * draw.choice((1, 2, 4))
    layers = draw.randint(2, 24)
    vocab = draw.width(4_000, 64_000)
    length = draw.choice((4096, 8192, 16384, 32768))
    windows = (1024,) * layers if draw.random() < WINDOWED else ()
    kind = models.DecoderShape(
        vocab=vocab,
        dim=heads * head,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head=head,
        hidden=draw.width(2 * heads * head, 4 * heads * head),
        windows=windows,
        loop="scan",
    )
    mesh = {"fsdp": devices // sequence, "sequence": sequence}
    fixed: dict[str, Any] = {
        "mesh": {axis: size for axis, size in mesh.items() if size > 1},
        "context": "ring",
    }
    if draw.random() < WITH_REMAT:
        fixed["remat"] = draw.choice(("dots", "full", "keep attention"))
    return Case(
        partial(models.DecoderLM, kind),
        shape(length),
        shape(length),
        optimizer=draw.choice(OPTIMIZERS)(),
        clip_norm=1.0 if draw.random() < CLIPPED else None,
        fixed=fixed,
        ids=vocab,
        on=(where,),
    )
