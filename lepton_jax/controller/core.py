"""A recipe's policies at work inside its train step.

The order within a step, which the conformance suite holds policies to:

1. The gradient is taken under the knobs of the step before (those in `IN_FORWARD`).
2. Signals are measured. Each policy sees them and contributes; `combined` makes the
   knobs of this step.
3. The update is made, or not: accumulated, skipped, restored. Then anchor and average
   follow.
4. The record takes loss, signals, knobs and contributions out. The host derives the
   journal from it.

A small example: a parameter of 1, an update that subtracts 0.1 times the gradient, and
a policy that halves the rate after a loss that is no better than the best one. The loss
stays at 3, so the policy acts in the second step, in time for the update of that step:

>>> from lepton_jax import Recipe, controllers
>>> recipe = Recipe(
...     model=dict,
...     loss=optax.squared_error,
...     optimizer=optax.sgd,
...     learning_rate=0.1,
...     controller=controllers.plateau(every=1, patience=1),
... )
>>> controller = Controller(recipe)
>>> params = {"x": jnp.float32(1)}
>>> optimizer, state = controller.init(params, {})
>>> pieces = Pieces(params, {}, optimizer)
>>> for step in range(2):
...     pieces, state, record = controller.update(
...         step=step,
...         state=state,
...         before=pieces,
...         after={},  # the model has no other variables
...         gradients={"x": jnp.float32(1)},
...         values={"loss": jnp.float32(3)},
...     )
...     print(f"rate {record['learning_rate']:.2f}, x {pieces.params['x']:.2f}")
rate 0.10, x 0.90
rate 0.05, x 0.85
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial, reduce
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import lepton_jax.controller.knobs as knobs_
from lepton_jax.controller.policies.loss_scaling import loss_scaling
from lepton_jax.controller.policy import Policy, chain
from lepton_jax.controller.signals import EARLY, Places, Signals
from lepton_jax.controller.state import ControllerState, Pieces, floats
from lepton_jax.errors import RecipeError, pointing_at_user
from lepton_jax.step import optimizers, precision
from lepton_jax.step.branches import once

if TYPE_CHECKING:
    from lepton_jax.recipe import Recipe

# the knobs that act in the forward pass, and the signals measured there with them
IN_FORWARD = {
    "loss_scale": (),
    "dropout": (),
    "loss_limit": ("loss_kept", "loss_blank", "loss_values"),
    "loss_mark": ("mark_weight", "mark_weight_square", "loss_blank", "loss_values"),
}
# what the host says of the budget: its last step, and the step before its first
BUDGET = ("steps", "begun")
# knobs under which a step's gradient counts for nothing
REFUSING = ("skip", "restore", "restart", "rollback")
# the knobs whose values act in the step after the one that they are of
ACT_LATER = (*IN_FORWARD, "gradient_weight", "interpolation")
# parts of the state that the decisions of a step make, without its update
DECIDED = ("knobs", "contributions", "policies", "halted", "rate")
# signals that are no column of a record: the record's step implies them
UNSHOWN = ("step", "progress", "batch_size")


class Controller:
    """The policies of a recipe, its optimizer and the knobs between them.

    Args:
      recipe: the recipe.

    Attributes:
      policies: all policies; those that the recipe implies come first.
      optimizer: the recipe's `Optimizer`.
      signals: the `Signals` that the policies watch.
      limits: the first policy's limits that are not empty.
      moves: (index of a policy, knob) of each contribution, in their order.
      base: the knobs that have a base, with the recipe's values.
      flags: the knobs without a base.
      records: names of the values that a step records after loss and metrics.
      stride: every how many steps passes over the parameters are made that need not be
        made in each, see `signals.stride`; whoever knows the model's cost sets it.
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.optimizer = optimizers.build(recipe)
        implied = (loss_scaling(),) if recipe.precision == "float16" else ()
        given = chain(*implied, recipe.controller)
        fitted = [policy.fitted(recipe, self.optimizer, policy) for policy in given]
        self.policies = _with_own_names(chain(*fitted))
        self.limits = next((p.limits for p in self.policies if p.limits), {})
        self.moves = [
            (index, knob)
            for index, policy in enumerate(self.policies)
            for knob in policy.moves
        ]
        self._moved = {knob for _, knob in self.moves}
        self.keeps = not self._moved.isdisjoint(("keep_average", "serve_kept"))
        self.stride = 1

        watched = [name for policy in self.policies for name in policy.watches]
        self.signals = Signals(
            watched,
            recipe.metrics,
            recipe.batch_size,
            recipe.micro_batches or 1,
        )
        self.base = self._bases()
        self._check_policies()
        self.flags = sorted(
            knob for knob in self._moved if knobs_.KNOBS[knob].combine == "any"
        )
        self.halts = not self._moved.isdisjoint(("stop", "rollback"))
        self.restores = not self._moved.isdisjoint(("anchor", "restore"))
        self.restarts = "restart" in self._moved
        self.anchored = self.signals.needs_anchor or self.restores or self.restarts

        known = {"loss", *recipe.metrics, *UNSHOWN}
        self.shown = [name for name in dict.fromkeys(watched) if name not in known]
        self._columns = [
            f"{self.policies[index].name}:{knob}" for index, knob in self.moves
        ]
        self.records = [
            *self._visible(),
            *self.shown,
            *self._columns,
        ]

    def _check_policies(self) -> None:
        for _, name in self.moves:
            if name not in self.base and knobs_.KNOBS[name].combine != "any":
                raise RecipeError(
                    f"a policy moves {name}, which the optimizer does not take by that"
                    " name",
                    where="Recipe.optimizer",
                    remedy=(
                        f"give optimizer=functools.partial(optax.adamw, {name}=...), or"
                        " another policy"
                    ),
                )
        if "interpolation" in self._moved and "averaging_decay" not in self._moved:
            raise RecipeError(
                "a policy moves interpolation, but none keeps an average",
                where="Recipe.controller",
                remedy="let a policy move averaging_decay, too",
            )
        if self.keeps and "averaging_decay" not in self._moved:
            raise RecipeError(
                "a policy keeps the best average, but none makes an average",
                where="Recipe.controller",
                remedy="add controllers.averaging()",
            )
        for policy in self.policies:
            if "notice" in policy.moves and not (policy.notices or policy.absolute):
                raise RecipeError(
                    "it moves notice, but has nothing to say",
                    where=policy.name,
                    remedy="give Policy(notices=(Notice(what, remedy), ...))",
                )
            policy.check(self.recipe, self.optimizer)

    def _bases(self) -> dict[str, float]:
        recipe = self.recipe
        own = self.optimizer.base
        wanted = set(self._moved)
        if recipe.learning_rate is not None or "rate" in self.limits:
            wanted.add("learning_rate")
        if recipe.clip_norm is not None:
            wanted.add("clip_norm")
        given = own | {
            "clip_norm": recipe.clip_norm or float("inf"),
            "accumulate": 1.0,
            "dropout": 1.0,
            "averaging_decay": 0.0,
            "interpolation": 0.0,
            "gradient_weight": 1.0,
            "loss_limit": float("inf"),
            "loss_mark": float("inf"),
            "loss_scale": precision.START if recipe.precision == "float16" else 1.0,
        }
        return {name: value for name, value in given.items() if name in wanted}

    def _visible(self) -> list[str]:
        """Return the knobs that are columns of a record."""
        names = [*self.base, *self.flags]
        has_rate = self.recipe.learning_rate is not None
        if has_rate and "learning_rate" not in self.base:
            return ["learning_rate", *names]
        return names

    # ---- state ----

    def init(
        self,
        params: Any,
        variables: Any,
    ) -> tuple[Any, Any]:
        """Return the states of optimizer and controller before the first step.

        The controller's is () where nothing can ever move.
        """
        optimizers.check_parts(self.recipe.optimizer, params)
        optimizer = self.optimizer.init(params)
        if not self.policies and not self.base:
            return optimizer, ()
        neutral = self._neutral()
        flags = dict.fromkeys(self.flags, 0.0)
        fed = {n: _before_measured(n) for n in (*BUDGET, *self.signals.fed)}
        return optimizer, ControllerState(
            base=_as_float32(self.base),
            knobs=_as_float32(self.base | flags),
            contributions=neutral,
            policies=tuple(_as_arrays(p.init()) for p in self.policies),
            signals=self._first_signals(params),
            fed=_as_float32(fed),
            updates=jnp.int32(0),
            halted=jnp.bool_(False),
            rate=jnp.asarray([1, 1, 0], jnp.float32),
            accumulated=self._first_sum(params),
            average=self._first_average(params, variables),
            lag=jnp.float32(1) if "averaging_decay" in self._moved else (),
            kept=self._first_average(params, variables) if self.keeps else (),
            anchor=self._first_anchor(Pieces(params, variables, optimizer)),
        )

    def _neutral(self) -> Any:
        if not self.moves:
            return ()
        neutral = [_neutral(self.policies[p], knob) for p, knob in self.moves]
        return jnp.asarray(neutral, jnp.float32)

    def _first_sum(self, params: Any) -> Any:
        if "accumulate" not in self._moved:
            return ()
        return jax.tree.map(jnp.zeros_like, params), jnp.int32(0)

    def _first_signals(self, params: Any) -> dict[str, Any]:
        signals = self.signals.init(params)
        if self.restarts:
            signals["kept"] = jnp.float32(1)
        return signals

    def _first_average(
        self,
        params: Any,
        variables: Any,
    ) -> Any:
        if "averaging_decay" not in self._moved:
            return ()
        return _copied((params, floats(variables)))

    def _first_anchor(self, pieces: Pieces) -> Any:
        if self.restores:
            return _copied(pieces)
        if self.restarts:
            return _copied(Pieces(pieces.params, pieces.variables, ()))
        if self.anchored:
            return _copied(Pieces(pieces.params, (), ()))
        return ()

    def forward_knobs(self, state: Any) -> dict[str, Any]:
        """Return the knobs that act in the forward pass, of the step before."""
        return {n: state.knobs[n] for n in IN_FORWARD if n in self.base}

    @property
    def measured_forward(self) -> tuple[str, ...]:
        """Signals that the forward pass measures: see `losses.discounted`."""
        signals = [
            signal
            for knob, measured in IN_FORWARD.items()
            if knob in self.base
            for signal in measured
        ]
        return tuple(dict.fromkeys(signals))

    # ---- a step ----

    def update(
        self,
        step: Any,
        state: Any,
        before: Pieces,
        after: Any,
        gradients: Any,
        values: Mapping[str, Any],
        parts: Any = None,
    ) -> tuple[Pieces, Any, dict[str, Any]]:
        """Decide, and make the update of one step.

        Args:
          step: steps done, int32.
          state: the controller's.
          before: parameters, variables and optimizer state.
          after: variables after the forward pass.
          gradients: the batch's mean gradient.
          values: loss, metrics, and the values measured in the forward pass, float32
            scalars.
          parts: see `Signals.measure`.

        Returns:
          The pieces and the controller's state after the step, and the record: values
          by the names in `records`.
        """
        if not self.policies and not self.base:
            update = _Update(
                before,
                after,
                gradients,
                {},
                values["loss"],
            )
            pieces = self._apply(update)
            record = {name: self._scheduled(before, step) for name in self.records}
            return pieces, state, record

        given, due = self._given(step, state, before, values)
        signals, means = self.signals.measure(
            state.signals,
            given,
            before.params,
            gradients,
            self._places(state),
            parts,
            due,
            ~state.halted if self.halts else True,
        )
        decision = self._decided(step, _without_trees(state), signals)

        update = _Update(
            before,
            after,
            gradients,
            decision.knobs | self._unmoved_rate(state, before),
            values["loss"],
            due,
            self.signals.followed(means),
        )
        if self.keeps:
            state, kept = _keeping_average(state, decision.knobs)
            update = update._replace(allowed=kept)
        moved, applied = self._advance(state, update)
        pieces = moved.pop("pieces")
        followed = moved.pop("followed")
        fresh = state._replace(
            fed=state.fed | decision.fed,
            signals={**means, **decision.means, **followed},
            updates=state.updates + applied,
            **decision.kept,
            **moved,
        )
        if self.keeps:
            fresh = _serving_kept(state, fresh, decision.knobs)
        shown = {name: signals[name] for name in self.shown if name in signals}
        return pieces, self._settled(state, fresh, decision), shown | decision.record

    def _places(self, state: ControllerState) -> Places:
        """Return the parameters that signals compare those of the step with."""
        return Places(
            anchor=state.anchor.params if self.anchored else (),
            average=state.average[0] if "interpolation" in state.knobs else (),
        )

    def _given(
        self,
        step: Any,
        state: ControllerState,
        before: Pieces,
        values: Mapping[str, Any],
    ) -> tuple[dict[str, Any], Any]:
        """Return the signals that are known before any is measured.

        Returns:
          They by name; and whether the passes over the parameters are made in this
          step: see `_clock`.
        """
        times = {name: state.fed[name] for name in BUDGET}
        clock, due = self._clock(step, state.updates, times)
        own = {"kept": state.signals["kept"]} if self.restarts else {}
        # where the knobs that go with them are not in the forward pass
        unmeasured = {
            "loss_kept": values["loss"],
            "loss_blank": jnp.nan,
            "loss_values": 1.0,
            "mark_weight": 1.0,
            "mark_weight_square": 1.0,
            "input_rms": jnp.nan,
        }
        measured_by_host = {n: x for n, x in state.fed.items() if n not in BUDGET}
        acting = ("gradient_weight", "interpolation")
        weighted = {name: state.knobs[name] for name in acting if name in state.knobs}
        given = {
            **own,
            **unmeasured,
            **clock,
            "updates": state.updates,
            "batch_size": self.recipe.batch_size,
            **values,
            **measured_by_host,
            "base_rate": self._base_rate(state, before),
            "scheduled_rate": self._schedule(state, before),
            **weighted,
        }
        return given, due if self.stride > 1 else True

    def _clock(
        self,
        step: Any,
        updates: Any,
        times: Mapping[str, Any],
    ) -> tuple[dict[str, Any], Any]:
        """Return the signals that tell the time, and whether passes are due.

        The passes over the parameters are made in each of the first steps, and in the
        last one where it is known.
        """
        end, begun = (times[name] for name in BUDGET)
        step = step - begun
        progress = jnp.where(
            end > begun,
            (step + 1) / (end - begun),
            jnp.nan,
        )
        first = self._begins(updates)
        clock = {
            "step": step,
            "progress": progress,
            "gradient_steps": jnp.where(first, 1.0, float(self.stride)),
        }
        return clock, first | (progress >= 1) | (updates % self.stride == 0)

    def _begins(self, updates: Any) -> Any:
        """Whether these are so few updates that every step is due."""
        return updates < EARLY * self.stride

    def _decided(
        self,
        step: Any,
        state: ControllerState,
        signals: Mapping[str, Any],
    ) -> _Decision:
        """Return the decisions of a step; all that goes in and out is scalars.

        Args:
          step: steps done.
          state: the controller's, without its trees.
          signals: those that were measured.
        """
        smoothed, means = self.signals.smoothed(state.signals, signals)
        signals = {**signals, **smoothed}
        contributions, policies = self._consult(signals, state)
        knobs = self._knobs(state, contributions, signals["base_rate"])
        record = {name: smoothed[name] for name in self.shown if name in smoothed}
        record |= knobs
        record |= dict(zip(self._columns, contributions, strict=True))

        kept = state._replace(
            knobs=knobs,
            contributions=contributions,
            policies=policies,
        )
        restart: Any = False
        if self.restarts:
            restart = (knobs["restart"] > 0) & ~state.halted
            kept = self._begun_anew(step, kept, restart)
        kept = self._with_halt(state, self._with_next_rate(kept))
        fed = {"begun": kept.fed["begun"]} if self.restarts else {}
        return _Decision(
            record,
            knobs,
            {name: getattr(kept, name) for name in DECIDED},
            fed,
            means,
            restart,
        )

    def _consult(
        self,
        signals: Mapping[str, Any],
        state: ControllerState,
    ) -> tuple[Any, tuple]:
        """Return the contributions of all policies, and their states after the step."""
        contributions = []
        states = []
        for policy, policy_state in zip(self.policies, state.policies, strict=True):
            with pointing_at_user(
                f"the policy {policy.name!r}",
                "let update take (signals, state) and return (moves, state)",
                where="Recipe.controller",
                kind=RecipeError,
            ):
                seen = {name: signals[name] for name in policy.watches}
                moves, after = policy.update(seen, policy_state)
                _check_moves(policy, moves)
                states.append(_as_before(after, policy_state, policy.name))
            for knob in policy.moves:
                contribution = moves.get(knob, _neutral(policy, knob))
                contributions.append(jnp.asarray(contribution, jnp.float32))
        if not contributions:
            return state.contributions, tuple(states)
        return jnp.stack(contributions), tuple(states)

    def _knobs(
        self,
        state: ControllerState,
        contributions: Any,
        base_rate: Any,
    ) -> dict[str, Any]:
        knobs = {}
        for name in state.knobs:
            base = state.base.get(name, jnp.float32(0))
            if name == "learning_rate":
                base = base_rate
                if "rate" in self.limits:
                    base = base * state.rate[0]
            own = [
                (self.policies[policy].absolute, contributions[index])
                for index, (policy, knob) in enumerate(self.moves)
                if knob == name
            ]
            combining = [c for is_absolute, c in own if not is_absolute]
            absolute = [c for is_absolute, c in own if is_absolute]
            knobs[name] = knobs_.combined(name, base, combining, absolute)
        return knobs

    # ---- the learning rate ----

    def _base_rate(
        self,
        state: ControllerState,
        before: Pieces,
    ) -> Any:
        """Return the base of the rate; the schedule's value where it is NaN."""
        base = state.base.get("learning_rate", jnp.float32(1))
        if not callable(self.recipe.learning_rate):
            return base
        follows = jnp.isnan(base)
        return jnp.where(
            follows,
            self._scheduled(before, state.updates),
            base,
        )

    def _schedule(
        self,
        state: ControllerState,
        before: Pieces,
    ) -> Any:
        """Return the rate by the recipe's schedule, 0 where it has none."""
        if not callable(self.recipe.learning_rate):
            return 0.0
        return self._scheduled(before, state.updates)

    def _unmoved_rate(
        self,
        state: ControllerState,
        before: Pieces,
    ) -> dict[str, Any]:
        """Return the schedule's own rate for this update.

        It is for an optimizer that reads the schedule by itself; NaN if a person has
        set a rate.
        """
        if not callable(self.recipe.learning_rate):
            return {}
        follows = jnp.isnan(state.base["learning_rate"])
        rate = self._scheduled(before, state.updates)
        return {optimizers.SCHEDULED: jnp.where(follows, rate, jnp.nan)}

    def _scheduled(
        self,
        before: Pieces,
        updates: Any,
    ) -> Any:
        return self.optimizer.scheduled(before.optimizer, before.params, updates)

    def _with_next_rate(self, state: ControllerState) -> ControllerState:
        if "rate" not in self.limits:
            return state
        now, later, growth = state.rate
        factor = jnp.minimum(now + growth, later)
        return state._replace(rate=jnp.stack([factor, later, growth]))

    # ---- a new beginning ----

    def _begun_anew(
        self,
        step: Any,
        kept: ControllerState,
        restart: Any,
    ) -> ControllerState:
        """Return what was decided, which is like before the first step if `restart`.

        A policy that may ask for a restart goes on with what it knows.
        """
        begun = jnp.where(restart, step + 1.0, kept.fed["begun"])
        # knobs of this step that act in the next one
        knobs = {
            name: jnp.where(restart, kept.base[name], x) if name in ACT_LATER else x
            for name, x in kept.knobs.items()
        }
        policies = tuple(
            state
            if "restart" in policy.moves
            else _where(restart, _as_arrays(policy.init()), state)
            for policy, state in zip(self.policies, kept.policies, strict=True)
        )
        return kept._replace(
            fed=kept.fed | {"begun": begun},
            knobs=knobs,
            policies=policies,
        )

    def _with_halt(
        self,
        state: ControllerState,
        kept: ControllerState,
    ) -> ControllerState:
        """Return what was decided, which is what was before in a halted run.

        Steps that were on their way when the run was halted count for nothing.
        """
        if not self.halts:
            return kept
        asked = [kept.knobs[n] > 0 for n in ("stop", "rollback") if n in kept.knobs]
        halted = kept._replace(halted=reduce(jnp.logical_or, asked))
        return _where(state.halted, state, halted)

    def _settled(
        self,
        state: ControllerState,
        fresh: ControllerState,
        decision: _Decision,
    ) -> ControllerState:
        """Return the state with its measurements as the next step finds them.

        Those of a run that begins anew are like before the first step, those of a
        halted one as they were. Trees as large as the parameters stay by themselves.
        """
        if not (self.halts or self.restarts):
            return fresh
        names = [name for name, x in fresh.signals.items() if _is_scalars(x)]
        old = {name: state.signals[name] for name in names}
        new = {name: fresh.signals[name] for name in names}
        signals, updates = self._measurements(
            (old, state.updates),
            (new, fresh.updates),
            decision.restart,
            state.halted,
        )
        return fresh._replace(signals=fresh.signals | signals, updates=updates)

    def _measurements(
        self,
        old: tuple[dict[str, Any], Any],
        new: tuple[dict[str, Any], Any],
        restart: Any,
        halted: Any,
    ) -> tuple[dict[str, Any], Any]:
        """Return the measurements, and the number of updates, after a step."""
        signals, updates = new
        if self.restarts:
            signals = self.signals.begun_anew(signals, restart)
            signals["kept"] = 1.0 - restart
            updates = jnp.where(restart, 0, updates)
        return _where(halted, old, (signals, updates))

    # ---- the update ----

    def _advance(
        self,
        state: ControllerState,
        update: _Update,
    ) -> tuple[dict[str, Any], Any]:
        """Make the update of a step, or not.

        Returns:
          By name, the pieces after the step, the signals that follow an update
          ("followed"), and the parts of the controller's state that follow the pieces;
          and whether there was an update, bool ().
        """
        knobs = update.knobs
        taken = self._taken(state, update)
        begun = _Carried(
            update.before,
            update.followed,
            state.average,
            state.lag,
        )
        moved: dict[str, Any] = {}
        if "accumulate" in knobs:
            carried, applied, total = self._accumulate(state, update, taken, begun)
            moved["accumulated"] = total
        else:
            carried = self._apply_if(state, taken, update, begun)
            applied = jnp.bool_(True) if taken is None else taken

        if self.restarts:
            restart = (knobs["restart"] > 0) & ~state.halted
            carried = once(restart, partial(self._restarted, state.anchor), carried)
            _forget(restart, moved)
        if self.restores:
            back = _restored(state, knobs)
            anchor = state.anchor
            average = (anchor.params, floats(anchor.variables))
            carried = carried._replace(pieces=_where(back, anchor, carried.pieces))
            if state.average != ():
                carried = carried._replace(
                    average=_where(back, average, carried.average),
                    lag=jnp.where(back, 1.0, carried.lag),
                )
            _forget(back, moved)
            renewed = _renewed(state, knobs, back)
            moved["anchor"] = _where(renewed, carried.pieces, state.anchor)
        return moved | carried._asdict(), applied

    def _taken(
        self,
        state: ControllerState,
        update: _Update,
    ) -> Any:
        """Whether this step's gradient counts; None if nothing can refuse it."""
        knobs = update.knobs
        refused = [knobs[n] > 0 for n in REFUSING if n in knobs]
        if self.halts:
            refused.append(state.halted)
        if update.allowed is not None:
            refused.append(~update.allowed)
        return ~reduce(jnp.logical_or, refused) if refused else None

    def _accumulate(
        self,
        state: ControllerState,
        update: _Update,
        taken: Any,
        carried: _Carried,
    ) -> tuple[_Carried, Any, Any]:
        """Add the gradient to the sum; apply it if there are as many as the knob says.

        Returns:
          What an update moves, after this; whether there was one; and the sum and its
          count after it.
        """
        before = carried.pieces
        mean, count = state.accumulated
        whole = jax.tree.map(
            lambda m, g: jnp.where(
                count == 0,
                g,
                m + (g - m) / (count + 1),
            ),
            mean,
            update.gradients,
        )
        whole, count = _where(
            taken,
            (whole, count + 1),
            (mean, count),
        )
        allowed = True if taken is None else taken
        applied = (count >= update.knobs["accumulate"]) & allowed

        waiting = before._replace(variables=update.variables)
        carried = self._apply_if(
            state,
            applied,
            update._replace(gradients=whole),
            carried._replace(pieces=waiting),
        )
        variables = _where(
            taken,
            carried.pieces.variables,
            before.variables,
        )
        pieces = carried.pieces._replace(variables=variables)
        total = whole, jnp.where(applied, 0, count)
        return carried._replace(pieces=pieces), applied, total

    def _apply_if(
        self,
        state: ControllerState,
        taken: Any,
        update: _Update,
        carried: _Carried,
    ) -> _Carried:
        """Apply an update where it is taken; None: it is.

        Where passes over the parameters are not made in each step it is applied in one
        of two ways, see `_applied_lightly`.
        """
        wholly = partial(self._applied, state, update)
        if self.stride == 1:
            if taken is None:
                return wholly(carried)
            # not a select: XLA would fuse it into the update, and round that otherwise
            return once(taken, wholly, carried)
        taken = jnp.bool_(True) if taken is None else taken
        due = self._is_whole(state, update)
        lightly = partial(self._applied_lightly, state, update)
        carried = once(taken & ~due, lightly, carried)
        return once(taken & due, wholly, carried)

    def _is_whole(
        self,
        state: ControllerState,
        update: _Update,
    ) -> Any:
        """Whether what follows an update is brought up to date in this step.

        It is when it is due, where the average becomes the parameters, and where the
        parameters' place between them changes.
        """
        due = jnp.asarray(update.due)
        knobs = update.knobs
        if "averaging_decay" in knobs:
            due |= state.lag * knobs["averaging_decay"] == 0
        if "interpolation" in knobs:
            due |= knobs["interpolation"] != state.knobs["interpolation"]
        return due

    def _applied(
        self,
        state: ControllerState,
        update: _Update,
        now: _Carried,
    ) -> _Carried:
        """Return what an update moves after it, all of it.

        The average is moved by the product of the decays since it last was, so that its
        mean age stays what it is. The parameters y may lie between it, a, and those
        that the optimizer moves, z: y = (1 - b) z + b a for an interpolation of b, so
        z = y + b / (1 - b) * (y - a).
        """
        before = now.pieces
        pieces = self._apply(update._replace(before=before))
        followed = self._followed(update, now, pieces)
        knobs = update.knobs
        if "averaging_decay" not in knobs:
            return now._replace(pieces=pieces, followed=followed)

        # so that the update is rounded as it is without an average
        made = jax.lax.optimization_barrier(pieces.params)
        fast = made
        if "interpolation" in knobs:
            share = state.knobs["interpolation"]
            ratio = share / (1 - share)
            fast = jax.tree.map(
                lambda x, y, a: x + (ratio * (y - a)).astype(x.dtype),
                made,
                before.params,
                now.average[0],
            )
        average = _averaged(
            now.average,
            (fast, floats(pieces.variables)),
            now.lag * knobs["averaging_decay"],
        )
        if "interpolation" in knobs:
            made = _between(
                fast,
                average[0],
                knobs["interpolation"],
            )
        return _Carried(
            pieces._replace(params=made),
            followed,
            average,
            jnp.ones_like(now.lag),
        )

    def _applied_lightly(
        self,
        state: ControllerState,
        update: _Update,
        now: _Carried,
    ) -> _Carried:
        """Return what an update moves after it, with no pass but the optimizer's.

        The average stays for now. Parameters between it and those that the optimizer
        moves then go the same share of their way.
        """
        before = now.pieces
        knobs = update.knobs
        update = update._replace(before=before)
        followed = now.followed
        finish = optimizers.unchanged
        if "cosine" in followed:
            # it is that of successive updates
            pieces = self._apply(update)
            followed = self._followed(update, now, pieces)
        if "interpolation" in knobs:

            def finish(before: Any, after: Any) -> Any:
                return _between(after, before, knobs["interpolation"])

        if "cosine" in followed:
            pieces = pieces._replace(params=finish(before.params, pieces.params))
        else:
            pieces = self._apply(update, finish)
        lag = now.lag
        if "averaging_decay" in knobs:
            lag = lag * knobs["averaging_decay"]
        return _Carried(
            pieces,
            followed,
            now.average,
            lag,
        )

    def _followed(
        self,
        update: _Update,
        now: _Carried,
        after: Pieces,
    ) -> dict[str, Any]:
        """Return the signals that follow an update, after it."""
        return self.signals.updated(
            now.followed,
            now.pieces.params,
            after.params,
            update.knobs.get("learning_rate", jnp.float32(1)),
        )

    def _restarted(self, anchor: Pieces, now: _Carried) -> _Carried:
        """Return what an update moves as it is where the run begins anew."""
        optimizer = jax.tree.map(
            lambda new, old: jnp.asarray(new, old.dtype),
            self.optimizer.init(anchor.params),
            now.pieces.optimizer,
        )
        pieces = Pieces(anchor.params, anchor.variables, optimizer)
        if now.average == ():
            return now._replace(pieces=pieces)
        return _Carried(
            pieces,
            now.followed,
            (anchor.params, floats(anchor.variables)),
            jnp.ones_like(now.lag),
        )

    def _apply(
        self,
        update: _Update,
        finish: Callable[[Any, Any], Any] = optimizers.unchanged,
    ) -> Pieces:
        before = update.before
        with optimizers.updating():
            params, optimizer = self.optimizer.update(
                partial(self._clipped, update.gradients, update.knobs),
                before.optimizer,
                before.params,
                update.knobs,
                update.loss,
                finish,
            )
        return Pieces(params, update.variables, optimizer)

    def _clipped(
        self,
        gradients: Any,
        knobs: Mapping[str, Any],
    ) -> Any:
        if "clip_norm" not in knobs:
            return gradients

        # optax's own formula: below the threshold it is the gradient, to the bit
        def clip(g: Any) -> Any:
            rule = optax.clip_by_global_norm(knobs["clip_norm"])
            return rule.update(g, optax.EmptyState())[0]

        if self.recipe.clip_norm is not None:
            return clip(gradients)
        # plain Optax would not clip: the gradient is left whole, as above
        return jax.lax.cond(
            optax.tree.norm(gradients) < knobs["clip_norm"],
            lambda g: g,
            clip,
            gradients,
        )


# ---- internals ----


class _Decision(NamedTuple):
    """The decisions of a step.

    Attributes:
      record: knobs, contributions and the signals that are made for the policies, by
        name.
      knobs: the knobs of this step.
      kept: the parts `DECIDED` of the controller's state after the step.
      fed: the values of the host that the step changes.
      means: moving means after the step.
      restart: whether the run begins anew.
    """

    record: dict[str, Any]
    knobs: dict[str, Any]
    kept: dict[str, Any]
    fed: dict[str, Any]
    means: dict[str, Any]
    restart: Any


class _Update(NamedTuple):
    """The ingredients of an update.

    Attributes:
      before: parameters, variables and optimizer state.
      variables: variables after the forward pass.
      gradients: the mean gradient.
      knobs: the knobs by name.
      loss: the batch's loss.
      due: whether the passes over the parameters are made that are not made in each
        step.
      followed: the signals that follow an update, before it.
      allowed: whether it may be made, bool (); None: it may.
    """

    before: Pieces
    variables: Any
    gradients: Any
    knobs: Mapping[str, Any]
    loss: Any
    due: Any = True
    followed: Any = ()
    allowed: Any = None


class _Carried(NamedTuple):
    """The parts that an update moves, by their names in `ControllerState` if there.

    Attributes:
      pieces: parameters, variables and optimizer state.
      followed: the signals that follow an update.
      average: the average, or ().
      lag: product of the decays that it lacks, or ().
    """

    pieces: Pieces
    followed: Any
    average: Any
    lag: Any


def _is_scalars(tree: Any) -> bool:
    return all(x.ndim == 0 for x in jax.tree.leaves(tree))


def _without_trees(state: ControllerState) -> ControllerState:
    """Return the scalars of a state."""
    signals = {name: x for name, x in state.signals.items() if _is_scalars(x)}
    return state._replace(
        signals=signals,
        accumulated=(),
        average=(),
        lag=(),
        kept=(),
        anchor=(),
    )


def _forget(condition: Any, moved: dict[str, Any]) -> None:
    """Let the accumulated sum be empty where a condition holds."""
    if "accumulated" in moved:
        gradient, count = moved["accumulated"]
        moved["accumulated"] = (gradient, jnp.where(condition, 0, count))


def _restored(
    state: ControllerState,
    knobs: Mapping[str, Any],
) -> Any:
    """Whether the pieces become those of the anchor."""
    if "restore" not in knobs:
        return jnp.bool_(False)
    return (knobs["restore"] > 0) & ~state.halted


def _renewed(
    state: ControllerState,
    knobs: Mapping[str, Any],
    back: Any,
) -> Any:
    """Whether the anchor becomes a copy of the pieces."""
    if "anchor" not in knobs:
        return jnp.bool_(False)
    return (knobs["anchor"] > 0) & ~back & ~state.halted


def _keeping_average(
    state: ControllerState,
    knobs: Mapping[str, Any],
) -> tuple[ControllerState, Any]:
    """Return a state that has followed `keep_average`, before the step's update.

    What is kept is the average as the last evaluation found it.

    Returns:
      The state; and True, which XLA does not know. An update under this condition can't
      come earlier, so it may overwrite the average, which otherwise would be copied in
      each step.
    """
    keep = (knobs.get("keep_average", 0.0) > 0) & ~state.halted
    kept, times = once(
        keep,
        lambda now: (state.average, now[1] + 1),
        (state.kept, jnp.int32(0)),
    )
    return state._replace(kept=kept), times < 2


def _serving_kept(
    before: ControllerState,
    fresh: ControllerState,
    knobs: Mapping[str, Any],
) -> ControllerState:
    """Return a state that has followed `serve_kept`, after the step's update."""
    serve = (knobs.get("serve_kept", 0.0) > 0) & ~before.halted
    return fresh._replace(average=once(serve, lambda _: fresh.kept, fresh.average))


def _averaged(
    average: Any,
    now: Any,
    decay: Any,
) -> Any:
    """Return a moving average after one more value."""
    return jax.tree.map(
        lambda a, x: x + (decay * (a - x)).astype(x.dtype),
        average,
        now,
    )


def _between(
    fast: Any,
    average: Any,
    share: Any,
) -> Any:
    """Return the point at a share of the way from `fast` to `average`."""
    return jax.tree.map(
        lambda z, a: z + (share * (a - z)).astype(z.dtype),
        fast,
        average,
    )


def _neutral(policy: Policy, knob: str) -> float:
    return float("nan") if policy.absolute else knobs_.neutral(knob)


def _before_measured(name: str) -> float:
    """Return the value of a signal that the host measures, before it has done so."""
    return float("nan") if name.startswith("evaluation_") else 0.0


def _with_own_names(policies: tuple[Policy, ...]) -> tuple[Policy, ...]:
    """Give each policy a name of its own: a second "plateau" is "plateau_2"."""
    named: list[Policy] = []
    seen: list[str] = []
    for policy in policies:
        seen.append(policy.name)
        count = seen.count(policy.name)
        name = policy.name if count == 1 else f"{policy.name}_{count}"
        named.append(policy._replace(name=name))
    return tuple(named)


def _as_float32(values: Mapping[str, float]) -> dict[str, Any]:
    return {name: jnp.float32(x) for name, x in values.items()}


def _copied(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


def _as_arrays(tree: Any) -> Any:
    return jax.tree.map(jnp.asarray, tree)


def _where(
    condition: Any,
    new: Any,
    old: Any,
) -> Any:
    """Return `new` where the condition holds, or where there is none."""
    if condition is None:
        return new
    return jax.tree.map(
        lambda n, o: jnp.where(condition, n, o),
        new,
        old,
    )


def _check_moves(
    policy: Policy,
    moves: Mapping[str, Any],
) -> None:
    surplus = sorted(set(moves) - set(policy.moves))
    if surplus:
        raise RecipeError(
            f"it moves {surplus[0]!r}, which is not among its moves",
            where=policy.name,
            remedy="name every knob that it moves in Policy.moves",
        )


def _as_before(
    after: Any,
    before: Any,
    name: str,
) -> Any:
    """Return a policy's state with the dtypes that it had.

    Raises:
      RecipeError: its structure or a shape has changed.
    """
    old: Any = jax.tree.structure(before)
    new = jax.tree.structure(after)
    if old != new:
        raise RecipeError(
            f"its state changed from {old} to {new}",
            where=name,
            remedy="return a state of the form that init made",
        )

    def cast(b: Any, a: Any) -> Any:
        if jnp.shape(a) != b.shape:
            raise RecipeError(
                f"a part of its state changed from shape {b.shape} to {jnp.shape(a)}",
                where=name,
                remedy="return a state of the shapes that init made",
            )
        return jnp.asarray(a, b.dtype)

    return jax.tree.map(cast, before, after)
