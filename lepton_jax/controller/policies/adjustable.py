"""Knobs for a person to set while a run goes on."""

from __future__ import annotations

from lepton_jax.controller.knobs import KNOBS, known
from lepton_jax.controller.policy import Policy
from lepton_jax.errors import RecipeError


def adjustable(*knobs: str) -> Policy:
    """Moves nothing; declares knobs, so that they are there to be set (`set_base`,
    `tools/control.py RUN set ...`).

    Raises:
      RecipeError: no such knob, or one that nobody sets, such as "skip".
    """
    for name in knobs:
        if KNOBS[known(name, "controllers.adjustable")].combine == "any":
            raise RecipeError(
                f"{name} is a signal to the step, which has no value to set",
                where="controllers.adjustable",
                remedy=(
                    "name some of"
                    f" {', '.join(n for n, k in KNOBS.items() if k.combine != 'any')}"
                ),
            )
    return Policy(
        "adjustable",
        lambda: (),
        lambda signals, state: ({}, state),
        moves=tuple(dict.fromkeys(knobs)),
    )
