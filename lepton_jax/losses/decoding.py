"""Predictions of a model from its outputs, as its loss implies them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from lepton_jax.losses.classes import (
    weighted_binary_cross_entropy,
    weighted_cross_entropy,
)
from lepton_jax.losses.ensembles import of_members
from lepton_jax.losses.joint import joint_cross_entropy, joint_labels
from lepton_jax.losses.missing import known_values
from lepton_jax.losses.quantities import expected_count, poisson
from lepton_jax.losses.stock import binary_cross_entropy, cross_entropy
from lepton_jax.losses.tasks import summed_tasks


def decoder(loss: Callable) -> Callable[[Any], Any]:
    """Return what `predict` applies to outputs, unless the recipe says otherwise.

    For integer labels it is the most likely one (argmax over the last dim), for binary
    labels 0 or 1, for counts the expected one; for several tasks it is a dict of these.
    Other outputs are left as they are.

    Args:
      loss: the loss that the model is trained with.
    """
    if isinstance(loss, functools.partial):
        return _decoder_of_partial(loss)
    if loss is cross_entropy or loss is weighted_cross_entropy:
        return _most_likely
    if loss is binary_cross_entropy or loss is weighted_binary_cross_entropy:
        return _zero_or_one
    return expected_count if loss is poisson else _as_they_are


# one object for each loss: a program is compiled for each decoder
@functools.lru_cache(maxsize=64)
def _decoder_of_partial(loss: functools.partial) -> Callable[[Any], Any]:
    if loss.func is known_values or loss.func is of_members:
        return decoder(loss.keywords["loss"])
    if loss.func is summed_tasks:
        tasks = loss.keywords["tasks"]
        each = {key: decoder(own) for key, (own, _) in tasks.items()}
        return functools.partial(_by_task, each=each)
    if loss.func is joint_cross_entropy:
        classes = loss.keywords["classes"]
        return functools.partial(joint_labels, classes=classes)
    return decoder(loss.func)


def _by_task(outputs: Any, *, each: Mapping[Any, Callable]) -> Any:
    """Decode the outputs of each task; others are left as they are."""
    if not isinstance(outputs, Mapping):
        return {key: decode(outputs[key]) for key, decode in each.items()}
    return {
        key: each[key](output) if key in each else output
        for key, output in outputs.items()
    }


def _most_likely(outputs: Any) -> Any:
    return jnp.argmax(outputs, axis=-1)


def _zero_or_one(outputs: Any) -> Any:
    return (outputs > 0).astype(jnp.int32)


def _as_they_are(outputs: Any) -> Any:
    return outputs
