"""Knobs for a person to set while a run goes on."""

from __future__ import annotations

from lepton_jax.controller.knobs import KNOBS, known
from lepton_jax.controller.policy import Policy
from lepton_jax.errors import RecipeError


def adjustable(*knobs: str) -> Policy:
    """Declare knobs that a person may set; move none of them.

    A knob that no policy declares is not in the compiled step, so it can't be set while
    the run goes on (`set_base`, `tools/control.py RUN set ...`).

    Args:
      *knobs: names of knobs.

    Raises:
      RecipeError: there is no such knob, or it has no value to set, such as "skip".

    Example:
      >>> from lepton_jax import controllers
      >>> controllers.adjustable("learning_rate", "clip_norm").moves
      ('learning_rate', 'clip_norm')
    """
    for name in knobs:
        if KNOBS[known(name, "controllers.adjustable")].combine == "any":
            settable = [n for n, knob in KNOBS.items() if knob.combine != "any"]
            raise RecipeError(
                f"{name} is a signal to the step, which has no value to set",
                where="controllers.adjustable",
                remedy=f"name some of {', '.join(settable)}",
            )
    return Policy(
        "adjustable",
        lambda: (),
        lambda signals, state: ({}, state),
        moves=tuple(dict.fromkeys(knobs)),
    )
