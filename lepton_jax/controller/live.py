"""What a person may ask of a run that is under way.

A request reaches the run through its mailbox (`lepton_jax.hosts.mailbox`) as plain
data. Here it is read and checked; the loop performs it between two steps
(`lepton_jax.train.requests`). Nothing here drives the loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lepton_jax.controller.core import Controller
from lepton_jax.controller.knobs import settable
from lepton_jax.controller.state import set_base, with_rate_factor
from lepton_jax.errors import SettingError, nearest

REQUESTS = ("set", "save", "evaluate", "pause", "resume", "stop", "status")


@dataclass(frozen=True)
class Request:
    """A person's request.

    Attributes:
      action: one of `REQUESTS`; anything else is refused when it is performed.
      settings: knob to the text of its value, for "set".
      who: {"who": user and host, "pid": process} of the person, as events and journal
        note it.
    """

    action: Any
    settings: Mapping[str, Any] = field(default_factory=dict)
    who: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(
        cls,
        content: Mapping[str, Any],
    ) -> Request:
        """Read what a client has put into the mailbox."""
        person = {
            "who": str(content.get("who", "?")),
            "pid": content.get("pid"),
        }
        return cls(
            content.get("do"),
            content.get("settings") or {},
            person,
        )

    def check(self) -> None:
        """Check that a run can do this.

        Raises:
          SettingError: it can't.
        """
        if self.action not in REQUESTS:
            raise SettingError(
                f"a run can't {self.action!r}{nearest(str(self.action), REQUESTS)}",
                where="control",
                remedy=f"ask for one of {', '.join(REQUESTS)}",
            )


def requested_bases(
    request: Request,
    controller: Controller,
) -> dict[str, float]:
    """Return the knobs' new bases that a request to "set" asks for, checked.

    Raises:
      SettingError: nothing is asked for, or the run can't set one of them; then none of
        them is to be set.
    """
    if not request.settings:
        raise SettingError(
            "nothing is given to set",
            where="control",
            remedy="write e.g. set learning_rate=3e-4",
        )
    bases = {
        name: settable(name, str(text), controller.base)
        for name, text in request.settings.items()
    }
    makers = getattr(controller.recipe.optimizer, "makers", ())
    if bases.get("optimizer", 0) >= max(len(makers), 1):
        raise SettingError(
            f"optimizer can't be {bases['optimizer']:g}: there are {len(makers)}",
            where="optimizer",
            remedy=f"give a number from 0 to {len(makers) - 1}",
        )
    return bases


def with_bases(
    state: Any,
    bases: Mapping[str, float],
) -> Any:
    """Return a `State` whose knobs have the bases that a person asked for."""
    state = set_base(state, **bases)
    if "learning_rate" in bases:
        # The person gets the number asked for, whatever rollbacks made of the rate
        # before.
        state = with_rate_factor(state, 1.0)
    return state


def setting_in_words(
    name: str,
    value: float,
    movers: Sequence[str],
) -> str:
    """Describe a knob's new base.

    Args:
      name: the knob.
      value: its base.
      movers: policies that contribute to the knob.
    """
    limit = f", as far as {' and '.join(movers)} let it" if movers else ""
    return f"{name} is {value:g}{limit}"
