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

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import lepton_jax.controller.knobs as knobs_
from lepton_jax.controller.branches import once
from lepton_jax.controller.policies.loss_scaling import loss_scaling
from lepton_jax.controller.policy import Policy, chain
from lepton_jax.controller.signals import EARLY, Signals
from lepton_jax.controller.state import ControllerState, Pieces, floats
from lepton_jax.errors import RecipeError, pointing_at_user
from lepton_jax.step import optimizers, precision

if TYPE_CHECKING:
    from lepton_jax.recipe import Recipe

# the knobs that act in the forward pass, and the signals measured there with them
IN_FORWARD = {
    "loss_scale": (),
    "dropout": (),
    "loss_limit": ("loss_kept", "loss_blank", "loss_values"),
    "loss_mark": ("mark_weight", "mark_weight_square", "loss_blank", "loss_values"),
}
# parts of the state with trees as large as the parameters
LARGE = ("signals", "accumulated", "average", "anchor")
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
        self.policies = _with_own_names(chain(*implied, recipe.controller))
        self.limits = next((p.limits for p in self.policies if p.limits), {})
        self.moves = [
            (index, knob)
            for index, policy in enumerate(self.policies)
            for knob in policy.moves
        ]
        self._moved = {knob for _, knob in self.moves}
        self.stride = 1

        watched = [name for policy in self.policies for name in policy.watches]
        self.signals = Signals(
            watched, recipe.metrics, recipe.batch_size, recipe.micro_batches or 1
        )
        self.base = self._bases()
        self._check_policies()
        self.flags = sorted(
            knob for knob in self._moved if knobs_.KNOBS[knob].combine == "any"
        )
        self.halts = not self._moved.isdisjoint(("stop", "rollback"))
        self.restores = not self._moved.isdisjoint(("anchor", "restore"))
        self.anchored = self.signals.needs_anchor or self.restores

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
        for policy in self.policies:
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
        optimizer = self.optimizer.init(params)
        if not self.policies and not self.base:
            return optimizer, ()
        neutral = self._neutral()
        flags = dict.fromkeys(self.flags, 0.0)
        fed = {n: _before_measured(n) for n in ("steps", *self.signals.fed)}
        return optimizer, ControllerState(
            base=_as_float32(self.base),
            knobs=_as_float32(self.base | flags),
            contributions=neutral,
            policies=tuple(_as_arrays(p.init()) for p in self.policies),
            signals=self.signals.init(params),
            fed=_as_float32(fed),
            updates=jnp.int32(0),
            halted=jnp.bool_(False),
            rate=jnp.asarray([1, 1, 0], jnp.float32),
            accumulated=self._first_sum(params),
            average=self._first_average(params, variables),
            lag=jnp.float32(1) if "averaging_decay" in self._moved else (),
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

        given = self._given(step, state, before, values)
        due = self._is_due(given)
        signals, means = self.signals.measure(
            state.signals,
            given,
            before.params,
            gradients,
            state.anchor.params if self.anchored else (),
            parts,
            due,
            ~state.halted if self.halts else True,
        )
        contributions, policies = self._consult(signals, state)
        knobs = self._knobs(state, contributions, before)

        update = _Update(
            before,
            after,
            gradients,
            knobs | self._unmoved_rate(state, before),
            values["loss"],
            due,
            self.signals.followed(means),
        )
        pieces, followed, applied, moved = self._advance(state, update)
        fresh = state._replace(
            knobs=knobs,
            contributions=contributions,
            policies=policies,
            signals=means | followed,
            updates=state.updates + applied,
            **moved,
        )
        record = {**knobs, **{name: signals[name] for name in self.shown}}
        record |= dict(zip(self._columns, contributions, strict=True))
        fresh = self._with_next_rate(state, fresh)
        return pieces, self._with_halt(state, fresh), record

    def _given(
        self,
        step: Any,
        state: ControllerState,
        before: Pieces,
        values: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Return the signals that are known before any is measured."""
        steps = state.fed["steps"]
        progress = jnp.where(
            steps > 0,
            (step + 1) / steps,
            jnp.nan,
        )
        # where the knobs that go with them are not in the forward pass
        unmeasured = {
            "loss_kept": values["loss"],
            "loss_blank": jnp.nan,
            "loss_values": 1.0,
            "mark_weight": 1.0,
            "mark_weight_square": 1.0,
        }
        measured_by_host = {n: x for n, x in state.fed.items() if n != "steps"}
        weight = "gradient_weight"
        weighted = {weight: state.knobs[weight]} if weight in state.knobs else {}
        return {
            **unmeasured,
            "step": step,
            "updates": state.updates,
            "progress": progress,
            "batch_size": self.recipe.batch_size,
            **values,
            **measured_by_host,
            "base_rate": self._base_rate(state, before),
            **weighted,
        }

    def _is_due(self, given: Mapping[str, Any]) -> Any:
        """Whether the passes over the parameters are made in this step.

        They are made in each of the first steps, and in the last one where it is known.
        """
        if self.stride == 1:
            return True
        step = given["step"]
        begins = step < EARLY * self.stride
        ends = given["progress"] >= 1
        return begins | ends | (step % self.stride == 0)

    def _consult(
        self, signals: Mapping[str, Any], state: ControllerState
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
        self, state: ControllerState, contributions: Any, before: Pieces
    ) -> dict[str, Any]:
        knobs = {}
        for name in state.knobs:
            base = state.base.get(name, jnp.float32(0))
            if name == "learning_rate":
                base = self._base_rate(state, before)
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

    def _with_next_rate(
        self, state: ControllerState, fresh: ControllerState
    ) -> ControllerState:
        if "rate" not in self.limits:
            return fresh
        now, later, growth = state.rate
        factor = jnp.minimum(now + growth, later)
        return fresh._replace(rate=jnp.stack([factor, later, growth]))

    # ---- the update ----

    def _with_halt(
        self, state: ControllerState, fresh: ControllerState
    ) -> ControllerState:
        """Return the state after a step, which is the one before in a halted run.

        Steps that were on their way when the run was halted count for nothing.
        """
        if not self.halts:
            return fresh
        asked = [fresh.knobs[n] > 0 for n in ("stop", "rollback") if n in fresh.knobs]
        halted = fresh._replace(halted=jnp.stack(asked).any())
        # trees as large as the parameters are not selected: they stay by themselves
        selected = [name for name in ControllerState._fields if name not in LARGE]
        chosen = {
            name: _where(state.halted, getattr(state, name), getattr(halted, name))
            for name in selected
        }
        signals = jax.tree.map(
            lambda old, new: new if new.ndim else jnp.where(state.halted, old, new),
            state.signals,
            fresh.signals,
        )
        return halted._replace(signals=signals, **chosen)

    def _advance(
        self,
        state: ControllerState,
        update: _Update,
    ) -> tuple[Pieces, Any, Any, dict[str, Any]]:
        """Make the update of a step, or not.

        Returns:
          The pieces after the step; the signals that follow an update; whether there
          was one, bool (); and the parts of the controller's state that follow the
          pieces, by name.
        """
        knobs = update.knobs
        taken = self._taken(state, knobs)
        moved: dict[str, Any] = {}
        if "accumulate" in knobs:
            made, applied, total = self._accumulate(state, update, taken)
            moved["accumulated"] = total
        else:
            waiting = update.before, update.followed
            made = self._apply_if(taken, update, waiting)
            applied = jnp.bool_(True) if taken is None else taken
        pieces, followed = made

        back = None
        if self.restores:
            back = _restored(state, knobs)
            pieces = _where(back, state.anchor, pieces)
            if "accumulate" in knobs:
                gradient, count = moved["accumulated"]
                moved["accumulated"] = (gradient, jnp.where(back, 0, count))
            renewed = _renewed(state, knobs, back)
            moved["anchor"] = _where(renewed, pieces, state.anchor)

        if "averaging_decay" in knobs:
            moved |= self._average(state, update, pieces, applied, back)
        return pieces, followed, applied, moved

    def _average(
        self,
        state: ControllerState,
        update: _Update,
        pieces: Pieces,
        applied: Any,
        back: Any,
    ) -> dict[str, Any]:
        """Return the moving average, and the decay that it still lacks, after a step.

        Where it is not moved in each step it is moved by the product of the decays, so
        that its mean age stays what it is.

        Args:
          state: the controller's.
          update: the update.
          pieces: the pieces after it.
          applied: whether it was made.
          back: whether they are those of the anchor; None if they can't be.
        """
        now = (pieces.params, floats(pieces.variables))
        decay = update.knobs["averaging_decay"]
        lag = jnp.where(applied, state.lag * decay, state.lag)
        # a product of 0: the average is the parameters
        moving = applied & (update.due | (lag == 0))

        if self.stride == 1:
            average = _averaged(state.average, now, lag)
            average = _where(moving, average, state.average)
        else:
            average = once(
                moving,
                lambda average: _averaged(average, now, lag),
                state.average,
            )
        lag = jnp.where(moving, 1.0, lag)
        if back is None:
            return {"average": average, "lag": lag}
        return {
            "average": _where(back, now, average),
            "lag": jnp.where(back, 1.0, lag),
        }

    def _taken(
        self,
        state: ControllerState,
        knobs: Mapping[str, Any],
    ) -> Any:
        """Whether this step's gradient counts; None if nothing can refuse it."""
        refused = [knobs[n] > 0 for n in ("skip", "restore", "rollback") if n in knobs]
        if self.halts:
            refused.append(state.halted)
        return ~jnp.stack(refused).any() if refused else None

    def _accumulate(
        self, state: ControllerState, update: _Update, taken: Any
    ) -> tuple[Any, Any, Any]:
        """Add the gradient to the sum; apply it if there are as many as the knob says.

        Returns:
          The pieces and the signals that follow an update; whether there was one; and
          the sum and its count after it.
        """
        before = update.before
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

        waiting = Pieces(before.params, update.variables, before.optimizer)
        pieces, followed = self._apply_if(
            applied,
            update._replace(gradients=whole),
            (waiting, update.followed),
        )
        variables = _where(taken, pieces.variables, before.variables)
        pieces = pieces._replace(variables=variables)
        return (pieces, followed), applied, (whole, jnp.where(applied, 0, count))

    def _apply_if(
        self,
        taken: Any,
        update: _Update,
        waiting: Any,
    ) -> tuple[Pieces, Any]:
        """Apply an update, or return the pieces and signals of none.

        Args:
          taken: whether it is applied; None: it is.
          update: the update.
          waiting: what is returned otherwise.

        Returns:
          The pieces, and the signals that follow an update.
        """

        def apply(now: tuple[Pieces, Any]) -> tuple[Pieces, Any]:
            before, followed = now
            return self._apply(update._replace(before=before)), followed

        def measure(now: tuple[Pieces, Any]) -> tuple[Pieces, Any]:
            before, followed = now
            pieces, _ = apply(now)
            return pieces, self.signals.updated(followed, before.params, pieces.params)

        now = update.before, update.followed
        # a cosine is one of successive updates
        always = self.stride == 1 or "cosine" in update.followed
        if always or not update.followed:
            if taken is None:
                return measure(now)
            if self.stride > 1:
                return once(taken, measure, waiting)
            # not a select: XLA would fuse it into the update, and round that otherwise
            return jax.lax.cond(
                taken,
                lambda: measure(now),
                lambda: waiting,
            )
        taken = jnp.bool_(True) if taken is None else taken
        made = once(taken & ~update.due, apply, waiting)
        return once(taken & update.due, measure, made)

    def _apply(self, update: _Update) -> Pieces:
        before = update.before
        with optimizers.updating():
            params, optimizer = self.optimizer.update(
                partial(self._clipped, update.gradients, update.knobs),
                before.optimizer,
                before.params,
                update.knobs,
                update.loss,
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
    """

    before: Pieces
    variables: Any
    gradients: Any
    knobs: Mapping[str, Any]
    loss: Any
    due: Any = True
    followed: Any = ()


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
