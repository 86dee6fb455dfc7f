"""A state read from a checkpoint, and made to fit the recipe that goes on with it.

Example: a run began with a learning rate of 0.1, and a person set 0.05 while it went
on. The rate then depends on what the recipe says now:

    recipe now                                rate    because
    0.1                                       0.05    the recipe has not changed
    0.2                                       0.2     the recipe has changed
    0.1, asked for as --learning-rate 0.1     0.1     a person wants it
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from lepton_jax.checkpoint.adoption import (
    REPLACEABLE,
    Adoption,
    Fresh,
    adopt,
    adopt_weights,
    changed_values,
)
from lepton_jax.checkpoint.durable import Checkpoints
from lepton_jax.compat import placed
from lepton_jax.controller import with_rate_factor
from lepton_jax.step.state import State
from lepton_jax.train.program import Program
from lepton_jax.train.run_record import RunRecord
from lepton_jax.trees import by_path, with_leaves

# Paths in a state: of parameters, and of the knobs' bases and their values.
PARAMS = "params/"
BASE = "controller/base/"
KNOBS = "controller/knobs/"
# The knob that acts in the forward pass before the controller has combined it anew.
EARLY_KNOB = "controller/knobs/dropout"
RATE = "controller/base/learning_rate"


class Change(NamedTuple):
    """A number of the state that the recipe replaces."""

    new: float
    old: float


class Restored(NamedTuple):
    """A state as the recipe goes on with it.

    Attributes:
      state: arrays, laid out as planned.
      record: what the checkpoint holds next to the state.
      bases: of the knobs for which the recipe's value replaces the checkpoint's, by
        name; NaN: the learning rate follows its schedule.
      resets_rate: whether the learning rate is the recipe's, whatever rollbacks made of
        the one before.
      notes: what was not taken over or is otherwise now, a sentence each.
    """

    state: State
    record: RunRecord
    bases: dict[str, float]
    resets_rate: bool
    notes: tuple[str, ...]


class Reader:
    """Reads checkpoints for a program whose recipe may differ from theirs.

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
        """Return the state as shapes, laid out as planned."""

        def shape(
            leaf: Any,
            sharding: Any,
        ) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return jax.tree.map(
            shape, self.program.trace.state, self.program.state_sharding
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
        """Read the newest step that is not damaged.

        See `Checkpoints.restore_latest`.
        """
        choice = _Choice(self.program)
        step, state, record = checkpoints.restore_latest(
            self.template(), on_damaged, choice
        )
        return step, self.settle(step, state, record, choice.adoption)

    def begin_with(
        self,
        checkpoints: Checkpoints,
        step: int | None,
        fresh: Fresh,
        on_damaged: Callable[[int, str], None],
    ) -> tuple[State, str]:
        """Return the first state of a run that begins with a checkpoint's weights.

        Args:
          checkpoints: among which is the one.
          step: which one; None: the newest that can be read.
          fresh: parameters and variables that begin anew, as the recipe's seed says.
          on_damaged: see `Checkpoints.restore_latest`.

        Returns:
          The state, and what begins anew, in words; "" where nothing does.

        Raises:
          CheckpointError: it is damaged, or what does not begin anew does not fit.
        """
        choice = _Weights(self.program, fresh)
        if step is None:
            _, state, _ = checkpoints.restore_latest(
                self.template(), on_damaged, choice, fresh
            )
        else:
            state, _ = checkpoints.restore(
                step,
                self.template(),
                choice,
                fresh,
            )
        leaves = by_path(self.program.init(self.program.recipe.seed))
        for path, leaf in by_path(state).items():
            if path in choice.adoption.sources:
                leaves[path] = leaf
        weighed = _with_leaves(state, leaves)

        # copies of the parameters that optimizer and policies keep
        rest = [path for path in leaves if path.startswith(REPLACEABLE)]
        begun = self.program.begun(weighed.params, weighed.variables, rest)
        return _with_leaves(weighed, begun), str(choice.adoption)

    def begin_with_weights(
        self,
        read: Callable[[dict[str, Any]], Mapping[str, jax.Array]],
    ) -> State:
        """Return the first state of a run that begins with weights from elsewhere.

        Args:
          read: shapes of all parameters by path, with dtype and sharding, to the
            parameters; those that it leaves out begin as the recipe's seed says.
        """
        wanted = {
            path.removeprefix(PARAMS): leaf
            for path, leaf in by_path(self.template()).items()
            if path.startswith(PARAMS)
        }
        return self.program.init_with(self.program.recipe.seed, read(wanted))

    def settle(
        self,
        step: int,
        state: State,
        content: Mapping[str, Any],
        adoption: Adoption | None = None,
    ) -> Restored:
        """Complete a state whose missing leaves are shapes, and apply the recipe.

        Args:
          step: of the state.
          state: as read.
          content: the checkpoint's record, as read.
          adoption: the parts that were taken over; None: all.
        """
        record = RunRecord.from_json(content)
        state = self._completed(step, state)
        changes = self._changes(state, record, adoption)
        state = _with_values(state, changes)
        resets_rate = RATE in changes and _has_rate(state)
        if resets_rate:
            state = with_rate_factor(state, 1.0)

        bases = {
            path.removeprefix(BASE): change.new
            for path, change in changes.items()
            if path.startswith(BASE)
        }
        if self._schedule_changed(record):
            bases.setdefault("learning_rate", math.nan)
        notes = tuple(
            self._notes(
                step,
                state,
                record,
                adoption,
                changes,
            )
        )
        return Restored(state, record, bases, resets_rate, notes)

    # ---- internals ----

    def _completed(
        self,
        step: int,
        state: State,
    ) -> State:
        """Return the state with the recipe's first values for leaves not restored."""
        missing = [
            path
            for path, leaf in by_path(state).items()
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
            # The checkpoint has no controller, so each step was one update.
            sharding = fresh[updates].sharding
            fresh[updates] = placed(np.int32(step), sharding)
        return _with_leaves(state, fresh)

    def _changes(
        self,
        state: State,
        record: RunRecord,
        adoption: Adoption | None,
    ) -> dict[str, Change]:
        """Return the numbers of a state that the recipe replaces, by path."""
        sources = None if adoption is None else adoption.sources
        now = self._recipe_values(sources)
        leaves = by_path(state)
        scalars = {path: leaves[path] for path in now if path in leaves}
        on_host = jax.device_get(scalars)
        saved = {path: float(value) for path, value in on_host.items()}
        live = [f"{BASE}{name}" for name in self._set_live - self._asked]
        then = self._values_then(record, now, sources)
        changed = changed_values(now, then, saved, live)
        return {path: Change(value, saved[path]) for path, value in changed.items()}

    def _recipe_values(self, sources: Mapping[str, str] | None) -> dict[str, float]:
        """Return the recipe's numbers for the leaves that were taken over."""
        return {
            path: value
            for path, value in self.program.recipe_values().items()
            if (not path.startswith(KNOBS) or path == EARLY_KNOB)
            and (sources is None or path in sources)
        }

    def _values_then(
        self,
        record: RunRecord,
        now: Mapping[str, float],
        sources: Mapping[str, str] | None,
    ) -> dict[str, float] | None:
        """Return the numbers of the checkpoint's own recipe; None: not known.

        Those that are to be replaced in any case are left out.
        """
        values = (record.given or {}).get("values")
        if values is None:
            return None
        replaced = {f"{BASE}{name}" for name in self._asked}
        if self._schedule_changed(record):
            replaced.add(RATE)
        moved = sources or {}
        places = {path: moved.get(path, path) for path in now}
        return {
            path: values[place]
            for path, place in places.items()
            if place in values and path not in replaced
        }

    def _schedule_changed(self, record: RunRecord) -> bool:
        then = (record.given or {}).get("schedule")
        now = self.program.given()["schedule"]
        if then is None or now is None:
            return False
        return not np.array_equal(then, now, equal_nan=True)

    def _notes(
        self,
        step: int,
        state: State,
        record: RunRecord,
        adoption: Adoption | None,
        changes: Mapping[str, Change],
    ) -> Iterator[str]:
        """Yield a sentence for each thing that a person would not expect."""
        if adoption is not None and str(adoption):
            yield f"state of step {step}, {adoption}"
        for path, change in changes.items():
            if path != EARLY_KNOB:
                name = path.removeprefix(BASE).removeprefix("optimizer/")
                yield _change_in_words(name, change)
        if self._schedule_changed(record) and RATE not in changes:
            updates = int(np.asarray(state.controller.updates))
            yield (
                "the learning rate's schedule is another than the checkpoint's; it is "
                f"read from update {updates} on"
            )


class _Choice:
    """The sources of a checkpoint's leaves for a program.

    Attributes:
      adoption: the decision, once it was asked for.
    """

    def __init__(self, program: Program):
        self.program = program
        self.adoption: Adoption | None = None

    def __call__(
        self,
        content: dict[str, Any],
        stored: list[str],
        fits: Callable[[str, str], bool],
    ) -> dict[str, str]:
        policies = self.program.given()["policies"]
        before = (content.get("given") or {}).get("policies")
        state = self.program.trace.state
        self.adoption = adopt(state, stored, fits, policies, before)
        return self.adoption.sources


class _Weights:
    """The sources of parameters and variables, for a run that begins with them.

    Attributes:
      adoption: the decision, once it was asked for.
    """

    def __init__(self, program: Program, fresh: Fresh):
        self.program = program
        self.fresh = fresh
        self.adoption = Adoption()

    def __call__(
        self,
        content: dict[str, Any],
        stored: list[str],
        fits: Callable[[str, str], bool],
    ) -> dict[str, str]:
        self.adoption = adopt_weights(self.program.trace.state, stored, self.fresh)
        return self.adoption.sources


def _change_in_words(name: str, change: Change) -> str:
    before = "its schedule" if math.isnan(change.old) else f"{change.old:g}"
    if math.isnan(change.new):
        return f"{name} follows the recipe's schedule; the checkpoint had {before}"
    return f"{name} is {change.new:g}, as the recipe says; the checkpoint had {before}"


def _with_values(
    state: State,
    changes: Mapping[str, Change],
) -> State:
    leaves = by_path(state)
    fresh = {}
    for path, change in changes.items():
        leaf = leaves[path]
        value = np.asarray(change.new, leaf.dtype)
        fresh[path] = placed(value, leaf.sharding)
    return _with_leaves(state, fresh)


def _with_leaves(
    state: State,
    fresh: Mapping[str, Any],
) -> State:
    if not fresh:
        return state
    old = by_path(state)
    leaves = [fresh.get(path, leaf) for path, leaf in old.items()]
    return with_leaves(state, leaves)


def _has_rate(state: State) -> bool:
    """Whether there is a controller, whose rate rollbacks may have lowered."""
    return hasattr(state.controller, "rate")
