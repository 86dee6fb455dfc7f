"""Shapes of models, and of the parameters of shapes."""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import nnx

from lepton_jax.errors import ModelError
from lepton_jax.models import DecoderLM, DecoderShape, Rotary, TransformerLM
from lepton_jax.trees import by_path


def shape_of(module: Any) -> DecoderShape:
    """Return the shape of a model.

    Raises:
      ModelError: it is no decoder that a published family is like.
    """
    if isinstance(module, DecoderLM):
        return module.shape
    if type(module) is TransformerLM:
        return _shape_of_transformer(module)
    raise ModelError(
        f"a {type(module).__name__} has no place among published models",
        where="lepton_jax.hub",
        remedy="train a DecoderLM or a TransformerLM of lepton_jax.models",
    )


def parameter_shapes(shape: DecoderShape) -> dict[str, Any]:
    """Return the parameters' shapes by path, those of each layer on its own."""
    # All layers have the same parameters, so one is made.
    windows = shape.windows[:1]
    one = dataclasses.replace(shape, layers=1, windows=windows, loop="unrolled")
    module = nnx.eval_shape(lambda: DecoderLM(one, rngs=nnx.Rngs(0)))
    leaves = by_path(nnx.to_pure_dict(nnx.state(module)))
    first = "blocks/0/"
    params = {}
    for path, leaf in leaves.items():
        if not path.startswith(first):
            params[path] = leaf
            continue
        rest = path.removeprefix(first)
        for layer in range(shape.layers):
            params[f"blocks/{layer}/{rest}"] = leaf
    return params


# ---- internals ----


def _shape_of_transformer(module: TransformerLM) -> DecoderShape:
    stacked = module.loop == "scan"
    block = module.blocks if stacked else module.blocks[0]
    gate = block.feed_forward.gate.kernel
    return DecoderShape(
        vocab=module.embed.num_embeddings,
        dim=module.embed.features,
        layers=module.layers,
        heads=block.attention.heads,
        kv_heads=block.attention.kv_heads,
        hidden=gate.shape[-1],
        epsilon=module.norm.epsilon,
        rotary=Rotary(block.attention.theta),
        tied=module.head is None,
        query_key_norm=block.attention.query_norm is not None,
        loop="scan" if stacked else "unrolled",
    )
