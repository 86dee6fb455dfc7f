"""The content of a checkpoint next to the arrays: a run's place and its past.

A checkpoint of a run holds, as JSON:

    position   {"samples", "grain", "stream", "seed", "of"}: of the next sample
    plan       the plan's JSON
    journal    lines of controller.jsonl that belong to the run's past
    rollbacks  how often the run went back, and from where
    stopped    why a policy stopped it, or null
    given      the recipe's part in the state (`Program.given`)

A saved model holds only position, plan, rollbacks and given: it is no run to resume.
Older checkpoints may lack any of these but the position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lepton_jax.data import epoch_samples
from lepton_jax.recipe import Recipe

ORDER = ("seed", "of")


@dataclass(frozen=True)
class Position:
    """A place between two samples of the training data.

    Attributes:
      feed: the data loader's own state, in plain data; "samples" of it counts those
        consumed so far.
      order: {"seed": of the shuffling, None without it; "of": samples in an epoch},
        without which a position means nothing; empty before there is any data.
    """

    feed: Mapping[str, Any] = field(
        default_factory=lambda: {"samples": 0, "grain": None}
    )
    order: Mapping[str, Any] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        """Samples consumed before this one."""
        return self.feed["samples"]

    @classmethod
    def from_json(
        cls,
        content: Mapping[str, Any],
    ) -> Position:
        """Read the position from a checkpoint's record."""
        feed = {name: value for name, value in content.items() if name not in ORDER}
        order = {name: content[name] for name in ORDER if name in content}
        return cls(feed, order)

    def to_json(self) -> dict[str, Any]:
        """Return plain data, from which `from_json` makes the same position."""
        return {**self.feed, **self.order}


def order_of(
    recipe: Recipe,
    train: Any,
) -> dict[str, Any]:
    """Return the order in which a recipe reads its training data; see `Position`."""
    seed = recipe.seed if recipe.shuffle else None
    return {"seed": seed, "of": epoch_samples(train)}


@dataclass(frozen=True)
class RunRecord:
    """A run's past, as a checkpoint holds it.

    Attributes:
      position: where the data goes on.
      plan: the plan's JSON; None: not known.
      journal: lines of the journal that belong to the run's past; None: those of steps
        that have been done.
      rollbacks: {"count", "used", "tried"} of `recovery.Rollbacks`; None: there were
        none.
      stopped: why a policy stopped the run; None: none did.
      given: the recipe's part in the state (`Program.given`); None: not known.
      slow: arguments of `controller.with_rate_factor` after a rollback that the state
        in the checkpoint does not know of; None: there was none. Only `rollback.json`
        has it.
    """

    position: Position = field(default_factory=Position)
    plan: str | None = None
    journal: int | None = 0
    rollbacks: Mapping[str, Any] | None = None
    stopped: str | None = None
    given: Mapping[str, Any] | None = None
    slow: tuple[float, float, int] | None = None

    @classmethod
    def from_json(
        cls,
        content: Mapping[str, Any],
    ) -> RunRecord:
        """Read a checkpoint's record, of a run or of a saved model."""
        slow = content.get("slow")
        return cls(
            position=Position.from_json(content["position"]),
            plan=content.get("plan"),
            journal=content.get("journal"),
            rollbacks=content.get("rollbacks"),
            stopped=content.get("stopped"),
            given=content.get("given"),
            slow=None if slow is None else tuple(slow),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the record of a run's checkpoint."""
        return {
            "position": self.position.to_json(),
            "plan": self.plan,
            **self.past_to_json(),
        }

    def past_to_json(self) -> dict[str, Any]:
        """Return what a rollback must not forget."""
        return {
            "journal": self.journal,
            "rollbacks": self.rollbacks,
            "stopped": self.stopped,
            "given": self.given,
        }

    def model_to_json(self) -> dict[str, Any]:
        """Return the record of a saved model."""
        return {
            "position": self.position.to_json(),
            "plan": self.plan,
            "rollbacks": self.rollbacks,
            "given": self.given,
        }
