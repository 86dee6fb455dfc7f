"""A state read from a checkpoint, and made to fit the recipe that goes on with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from lepton_jax.checkpoint.adoption import Adoption, adopt, changed_values
from lepton_jax.checkpoint.durable import Checkpoints
from lepton_jax.compat import placed
from lepton_jax.controller import with_rate_factor
from lepton_jax.step.state import State
from lepton_jax.train.program import Program
from lepton_jax.trees import by_path

BASE = "controller/base/"
KNOBS = "controller/knobs/"
# The knob that acts in the forward pass before the controller has combined it anew.
EARLY_KNOB = "controller/knobs/dropout"
RATE = "controller/base/learning_rate"


class Restored(NamedTuple):
    """A state as the recipe goes on with it.

    Attributes:
      state: of arrays, laid out as planned.
      record: what the checkpoint holds next to the state.
      knobs: the bases of knobs that are not the checkpoint's but the recipe's, by name;
        NaN: the learning rate follows its schedule.
      notes: what was not taken over or is otherwise now, a sentence each.
    """

    state: State
    record: dict[str, Any]
    knobs: dict[str, float]
    notes: tuple[str, ...]


class Reader:
    """Reads checkpoints for a program whose recipe may differ from that of the
    checkpoint.

    Args:
      program: for which the states are read.
      asked: names of knobs that a person has named just now: their values in the recipe
        replace even what somebody set while the run went on.
      set_live: names of knobs that somebody set while the run went on, for checkpoints
        that do not remember what their recipe said.
    """

    def __init__(
        self,
        program: Program,
        asked: Collection[str] = (),
        set_live: Collection[str] = (),
    ):
        self.program = program
        self._asked = frozenset(asked)
        self._set_live = frozenset(set_live)

    def template(self) -> State:
        """The state as shapes, laid out as planned."""
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(
                x.shape,
                x.dtype,
                sharding=s,
            ),
            self.program.trace.state,
            self.program.state_sharding,
        )

    def read(
        self,
        checkpoints: Checkpoints,
        step: int,
    ) -> Restored:
        """Read one step.

        Raises:
          CheckpointError: it is damaged, or parameters or variables do not fit.
        """
        choice = _Choice(self.program)
        state, record = checkpoints.restore(
            step,
            self.template(),
            choice,
        )
        return self.settle(step, state, record, choice.adoption)

    def read_latest(
        self,
        checkpoints: Checkpoints,
        on_damaged: Callable[[int, str], None],
    ) -> tuple[int, Restored]:
        """Read the newest step that is not damaged; see
        `Checkpoints.restore_latest`.
        """
        choice = _Choice(self.program)
        step, state, record = checkpoints.restore_latest(
            self.template(), on_damaged, choice
        )
        return step, self.settle(
            step,
            state,
            record,
            choice.adoption,
        )

    def settle(
        self,
        step: int,
        state: State,
        record: Mapping[str, Any],
        adoption: Adoption | None = None,
    ) -> Restored:
        """Complete a state whose missing leaves are shapes, and apply the recipe's
        values.

        Args:
          step: of the state.
          state: as read.
          record: what the checkpoint holds next to it.
          adoption: what it took over; None: all.
        """
        state = self._completed(step, state)
        sources = None if adoption is None else adoption.sources
        state, changes = self._as_the_recipe_says(state, record, sources)
        record = dict(record)
        if RATE in changes and _has_rate(state):
            # the number that is asked for, whatever rollbacks made of the one before
            state = with_rate_factor(state, 1.0)
            record["slow"] = None

        notes = []
        if adoption is not None and str(adoption):
            notes.append(f"state of step {step}, {adoption}")
        notes += self._changes_in_words(changes)
        if self._schedule_changed(record) and RATE not in changes:
            updates = int(np.asarray(state.controller.updates))
            notes.append(
                "the learning rate's schedule is another than the checkpoint's; it is "
                f"read from update {updates} on"
            )
        bases = {
            path.removeprefix(BASE): value
            for path, (value, _) in changes.items()
            if path.startswith(BASE)
        }
        if self._schedule_changed(record):
            bases.setdefault("learning_rate", math.nan)
        return Restored(state, record, bases, tuple(notes))

    # ---- internals ----

    def _completed(
        self,
        step: int,
        state: State,
    ) -> State:
        leaves = by_path(state)
        missing = [
            path
            for path, leaf in leaves.items()
            if isinstance(leaf, jax.ShapeDtypeStruct)
        ]
        if not missing:
            return state
        fresh = self.program.begun(
            state.params,
            state.variables,
            missing,
        )
        updates = "controller/updates"
        if updates in fresh:
            # no controller was there: each step was one update
            fresh[updates] = placed(np.int32(step), fresh[updates].sharding)
        return _with_leaves(state, fresh)

    def _as_the_recipe_says(
        self,
        state: State,
        record: Mapping[str, Any],
        sources: Mapping[str, str] | None,
    ) -> tuple[State, dict[str, tuple[float, float]]]:
        """The state with changed values, and (new, old) of each by path."""
        now = {
            path: value
            for path, value in self.program.recipe_values().items()
            if (not path.startswith(KNOBS) or path == EARLY_KNOB)
            and (sources is None or path in sources)
        }
        leaves = by_path(state)
        scalars = {path: leaves[path] for path in now if path in leaves}
        saved = {k: float(x) for k, x in jax.device_get(scalars).items()}

        then = (record.get("given") or {}).get("values")
        if then is not None:
            again = {f"{BASE}{name}" for name in self._asked}
            again |= {RATE} if self._schedule_changed(record) else set()
            places = {path: (sources or {}).get(path, path) for path in now}
            then = {
                path: then[place]
                for path, place in places.items()
                if place in then and path not in again
            }
        live = [f"{BASE}{name}" for name in self._set_live - self._asked]

        changes = changed_values(now, then, saved, live)
        fresh = {
            path: placed(np.asarray(x, leaves[path].dtype), leaves[path].sharding)
            for path, x in changes.items()
        }
        pairs = {path: (value, saved[path]) for path, value in changes.items()}
        return _with_leaves(state, fresh), pairs

    def _schedule_changed(self, record: Mapping[str, Any]) -> bool:
        then = (record.get("given") or {}).get("schedule")
        now = self.program.given()["schedule"]
        if then is None or now is None:
            return False
        return not np.array_equal(then, now, equal_nan=True)

    def _changes_in_words(
        self, changes: Mapping[str, tuple[float, float]]
    ) -> Iterable[str]:
        for path, (new, old) in changes.items():
            if path == EARLY_KNOB:
                continue
            name = path.removeprefix(BASE).removeprefix("optimizer/")
            before = "its schedule" if math.isnan(old) else f"{old:g}"
            if math.isnan(new):
                yield (
                    f"{name} follows the recipe's schedule; the checkpoint had {before}"
                )
            else:
                yield (
                    f"{name} is {new:g}, as the recipe says; the checkpoint had"
                    f" {before}"
                )


class _Choice:
    """The sources of a checkpoint's leaves for a program; remembers what it decided."""

    def __init__(self, program: Program):
        self.program = program
        self.adoption: Adoption | None = None

    def __call__(
        self,
        record: dict[str, Any],
        stored: list[str],
        fits: Callable[[str, str], bool],
    ) -> dict[str, str]:
        policies = self.program.given()["policies"]
        before = (record.get("given") or {}).get("policies")
        state = self.program.trace.state
        self.adoption = adopt(
            state,
            stored,
            fits,
            policies,
            before,
        )
        return self.adoption.sources


def _with_leaves(state: State, fresh: Mapping[str, Any]) -> State:
    if not fresh:
        return state
    leaves = [fresh.get(path, leaf) for path, leaf in by_path(state).items()]
    return jax.tree.unflatten(jax.tree.structure(state), leaves)


def _has_rate(state: State) -> bool:
    """Whether there is a controller, whose rate rollbacks may have lowered."""
    return hasattr(state.controller, "rate")
