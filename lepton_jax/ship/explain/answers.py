"""Explanations as plain data: what a server answers when it is asked for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lepton_jax.errors import SettingError, nearest
from lepton_jax.ship.explain import gradients, neighbours, occlusion, rollout

METHODS: dict[str, Callable[..., Any]] = {
    gradients.METHOD: gradients.integrated_gradients,
    occlusion.METHOD: occlusion.occlusion,
    rollout.METHOD: rollout.attention_rollout,
    neighbours.METHOD: neighbours.nearest_examples,
}
# Those that ask the model alone, so that an artifact will do.
OF_ARTIFACTS = (occlusion.METHOD, neighbours.METHOD)
# Those that explain one of the outputs.
OF_OUTPUTS = (gradients.METHOD, occlusion.METHOD)

DEFAULT = occlusion.METHOD


def explain(
    model: Any,
    inputs: Any,
    method: str = DEFAULT,
    *,
    target: Any = None,
) -> dict[str, Any]:
    """Return an explanation of rows as plain data, ready for JSON.

    Args:
      model: a `Trainer`, or an `Artifact` ("occlusion" and "nearest_examples").
      inputs: rows: an array, a dict of arrays by name, or raw rows.
      method: "integrated_gradients", "occlusion", "attention_rollout" or
        "nearest_examples".
      target: number of the output to explain; None: the largest. Not of all methods.

    Returns:
      "method", and by it "attributions" of each input, "tokens", or "numbers" of
      training rows; lists have a row for each of the rows.

    Raises:
      SettingError: there is no such method, or it explains no single output.
      DataError, ModelError: as the method says.
    """
    if method not in METHODS:
        raise SettingError(
            f"there is no explanation {method!r}{nearest(str(method), METHODS)}",
            where="method",
            remedy=f"use one of {', '.join(METHODS)}",
        )
    if target is None:
        return METHODS[method](model, inputs).to_fields()
    if method not in OF_OUTPUTS:
        raise SettingError(
            f"{method} explains no single output, but target is {target!r}",
            where="target",
            remedy=f"leave it out, or use {' or '.join(OF_OUTPUTS)}",
        )
    return METHODS[method](model, inputs, target=target).to_fields()
