"""Llama: Lepton's own model, scanned or unrolled, with odd head counts."""

from __future__ import annotations

from functools import partial

from lepton_jax import models
from tools.bench.families.case import Case, shape
from tools.bench.families.draw import Draw


def case(draw: Draw) -> Case:
    """Draw heads, groups, widths, layers, and whether they are a loop."""
    groups = draw.choice((1, 1, 2, 3, 4, 5))
    kv_heads = draw.choice((1, 2, 3, 4))
    heads = groups * kv_heads
    head = max(
        4,
        int(draw.choice((32, 64, 128)) * draw.scale),
    )
    dim = heads * head
    loop = draw.choice(("scan", "scan", "unrolled"))
    length = draw.length(128, 2048)
    model = partial(
        models.TransformerLM,
        draw.vocabulary(),
        dim=dim,
        layers=draw.randint(4, 24) if loop == "scan" else draw.randint(1, 3),
        heads=heads,
        kv_heads=kv_heads,
        hidden=draw.width(2 * dim, 4 * dim),
        tied=draw.random() < 0.3,
        loop=loop,
    )
    return Case(
        model,
        shape(length),
        shape(length),
        ids=model.args[0],
        **draw.rest(),
    )
