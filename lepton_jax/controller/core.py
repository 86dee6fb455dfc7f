"""A recipe's policies at work inside of its train step.

The order within a step, which the conformance suite holds policies to:

1. The gradient is taken under the knobs of the step before (`IN_FORWARD` act there).
2. Signals are measured; each policy sees them and contributes; `combined` makes the
   knobs of this step.
3. The update is made, or not: accumulated, skipped, restored; then anchor and average
   follow.
4. The record takes loss, signals, knobs and contributions out; the journal is what the
   host reads from it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lepton_jax.controller.knobs as knobs_
from lepton_jax.compat import placed
from lepton_jax.controller.policies.loss_scaling import loss_scaling
from lepton_jax.controller.policy import Policy, chain
from lepton_jax.controller.signals import Signals
from lepton_jax.errors import RecipeError, pointing_at_user
from lepton_jax.step import optimizers, precision

if TYPE_CHECKING:
    from lepton_jax.recipe import Recipe

# the knobs that act in the forward pass, and what is measured there where they are
IN_FORWARD = {
    "loss_scale": (),
    "dropout": (),
    "loss_limit": ("loss_kept", "loss_blank", "loss_values"),
    "loss_mark": ("mark_weight", "mark_weight_square", "loss_blank", "loss_values"),
}
UNSHOWN = ("step", "progress", "batch_size")  # what a record's place says already


class ControllerState(NamedTuple):
    """What the controller keeps between steps.

    Attributes:
      base: the knobs as the recipe or a person set them, float32 (); a learning rate
        that is a schedule is NaN.
      knobs: as they were in the last step.
      contributions: of each (policy, knob) in the last step, float32 (moves,); or ()
        without any.
      policies: the state of each.
      signals: the moving means.
      fed: what the host measured, float32 ().
      updates: of the parameters so far, int32.
      halted: whether a stop or a rollback is asked for; nothing changes until the host
        has seen to it.
      rate: factor of the learning rate, what it grows to and by how much a step,
        float32 (3,): see `slowed`.
      accumulated: (mean gradient, batches in it), or ().
      average: (parameters, variables), averaged; or ().
      anchor: `Pieces`: parameters, and variables and optimizer state where they may be
        restored; or ().
    """

    base: dict[str, Any]
    knobs: dict[str, Any]
    contributions: Any
    policies: tuple
    signals: dict[str, Any]
    fed: dict[str, Any]
    updates: Any
    halted: Any
    rate: Any
    accumulated: Any
    average: Any
    anchor: Any


class Pieces(NamedTuple):
    """What an update changes besides the controller."""

    params: Any
    variables: Any
    optimizer: Any


class Controller:
    """The policies of a recipe, its optimizer and the knobs between them.

    Args:
      recipe: the recipe.

    Attributes:
      policies: all of them, those that the recipe implies first.
      moves: (policy, knob) of each contribution, in their order.
      records: names of the values that a step records after loss and metrics.
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.optimizer = optimizers.build(recipe)
        implied = (loss_scaling(),) if recipe.precision == "float16" else ()
        self.policies = _named(chain(*implied, recipe.controller))
        self.limits = next((p.limits for p in self.policies if p.limits), {})
        self.moves = [
            (p, knob)
            for p in range(len(self.policies))
            for knob in self.policies[p].moves
        ]
        self.metrics = tuple(recipe.metrics)
        watched = [name for p in self.policies for name in p.watches]
        self.signals = Signals(
            watched, self.metrics, recipe.batch_size, recipe.micro_batches or 1
        )
        self.base = self._bases()
        for name in [name for _, name in self.moves]:
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
            policy.check(recipe, self.optimizer)
        self.flags = sorted(
            {knob for _, knob in self.moves if knobs_.KNOBS[knob].combine == "any"}
        )
        self.halts = any(knob in ("stop", "rollback") for _, knob in self.moves)
        self.restores = any(knob in ("anchor", "restore") for _, knob in self.moves)
        self.anchored = self.signals.needs_anchor or self.restores
        self.shown = [
            name
            for name in dict.fromkeys(watched)
            if name not in ("loss", *self.metrics, *UNSHOWN)
        ]
        self.records = [
            *self._visible(),
            *self.shown,
            *(f"{self.policies[p].name}:{k}" for p, k in self.moves),
        ]

    def _bases(self) -> dict[str, float]:
        recipe = self.recipe
        moved = {knob for _, knob in self.moves}
        own = self.optimizer.base
        moved |= {"learning_rate"} & own.keys() if "rate" in self.limits else set()
        base = {
            n: x
            for n, x in own.items()
            if n in moved
            or (n == "learning_rate" and (recipe.learning_rate is not None))
        }
        given = {
            "clip_norm": recipe.clip_norm or float("inf"),
            "accumulate": 1.0,
            "dropout": 1.0,
            "averaging_decay": 0.0,
            "gradient_weight": 1.0,
            "loss_limit": float("inf"),
            "loss_mark": float("inf"),
            "loss_scale": precision.START if recipe.precision == "float16" else 1.0,
        }
        wanted = moved | ({"clip_norm"} if recipe.clip_norm is not None else set())
        return base | {n: x for n, x in given.items() if n in wanted}

    def _visible(self) -> list[str]:
        rate = (
            ["learning_rate"]
            if self.recipe.learning_rate is not None
            and "learning_rate" not in self.base
            else []
        )
        return [*rate, *self.base, *self.flags]

    # ---- state ----

    def init(
        self,
        params: Any,
        variables: Any,
    ) -> tuple[Any, Any]:
        """(optimizer state, controller state) before the first step; the latter is ()
        where nothing can ever move.
        """
        optimizer = self.optimizer.init(params)
        if not self.policies and not self.base:
            return optimizer, ()
        copied = lambda tree: jax.tree.map(jnp.copy, tree)
        moved = {knob for _, knob in self.moves}
        names = [*self.base, *self.flags]
        neutral = (
            jnp.asarray(
                [_neutral(self.policies[p], k) for p, k in self.moves], jnp.float32
            )
            if self.moves
            else ()
        )
        return optimizer, ControllerState(
            base={n: jnp.float32(x) for n, x in self.base.items()},
            knobs={n: jnp.float32(self.base.get(n, 0.0)) for n in names},
            contributions=neutral,
            policies=tuple(jax.tree.map(jnp.asarray, p.init()) for p in self.policies),
            signals=self.signals.init(params),
            fed={
                n: jnp.float32(float("nan") if n.startswith("evaluation_") else 0)
                for n in ("steps", *self.signals.fed)
            },
            updates=jnp.int32(0),
            halted=jnp.bool_(False),
            rate=jnp.asarray([1, 1, 0], jnp.float32),
            accumulated=(
                (jax.tree.map(jnp.zeros_like, params), jnp.int32(0))
                if "accumulate" in moved
                else ()
            ),
            average=(
                copied((params, floats(variables)))
                if "averaging_decay" in moved
                else ()
            ),
            anchor=(
                ()
                if not self.anchored
                else copied(
                    Pieces(params, variables, optimizer)
                    if self.restores
                    else Pieces(params, (), ())
                )
            ),
        )

    def forward_knobs(self, state: Any) -> dict[str, Any]:
        """The knobs that act in the forward pass: of the step before."""
        return {n: state.knobs[n] for n in IN_FORWARD if n in self.base}

    @property
    def measured_forward(self) -> tuple[str, ...]:
        """Signals that the forward pass gives: see `losses.discounted`."""
        return tuple(
            dict.fromkeys(
                signal
                for n, signals in IN_FORWARD.items()
                if n in self.base
                for signal in signals
            )
        )

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
        """One step's decisions and its update.

        Args:
          step: steps done, int32.
          state: the controller's.
          before: parameters, variables and optimizer state.
          after: variables after the forward pass.
          gradients: the batch's mean gradient.
          values: loss and metrics, and what was measured in the forward pass, float32
            scalars.
          parts: see `Signals.measure`.

        Returns:
          The pieces and the controller's state after it, and what is recorded, by the
          names in `records`.
        """
        if not self.policies and not self.base:
            pieces = self._apply(
                before,
                after,
                gradients,
                {},
                values["loss"],
            )
            return (
                pieces,
                state,
                {name: self._scheduled(before, step) for name in self.records},
            )
        steps = state.fed["steps"]
        blind = {
            "loss_kept": values["loss"],
            "loss_blank": jnp.nan,
            "loss_values": 1.0,
            "mark_weight": 1.0,
            "mark_weight_square": 1.0,
        }
        given = blind | {
            "step": step,
            "updates": state.updates,
            "progress": jnp.where(
                steps > 0,
                (step + 1) / steps,
                jnp.nan,
            ),
            "batch_size": self.recipe.batch_size,
            **values,
            **{n: x for n, x in state.fed.items() if n != "steps"},
            "base_rate": self._base_rate(state, before),
            "gradient_weight": state.knobs.get("gradient_weight", jnp.float32(1)),
        }
        signals, smoothed = self.signals.measure(
            state.signals,
            given,
            before.params,
            gradients,
            state.anchor.params if self.anchored else (),
            parts,
        )
        contributions, policies = self._consult(signals, state)
        knobs = self._knobs(state, contributions, before)
        given = knobs | self._unmoved_rate(state, before)
        pieces, more, applied = self._moved(
            state, before, after, gradients, given, values["loss"]
        )
        fresh = state._replace(
            knobs=knobs,
            contributions=contributions,
            policies=policies,
            signals=self.signals.updated(
                smoothed, before.params, pieces.params, applied
            ),
            updates=state.updates + applied,
            **more,
        )
        record = {**knobs, **{n: signals[n] for n in self.shown}}
        record |= dict(
            zip(
                self.records[len(self.records) - len(self.moves) :],
                contributions,
                strict=True,
            )
        )
        if "rate" in self.limits:
            now, later, growth = state.rate
            fresh = fresh._replace(
                rate=jnp.stack(
                    [
                        jnp.minimum(now + growth, later),
                        later,
                        growth,
                    ]
                )
            )
        # steps that were on their way when the run was halted count for nothing
        if self.halts:
            asked = jnp.stack(
                [knobs[n] > 0 for n in ("stop", "rollback") if n in knobs]
            ).any()
            fresh = _where(
                state.halted,
                state,
                fresh._replace(halted=asked),
            )
        return pieces, fresh, record

    def _consult(
        self, signals: Mapping[str, Any], state: ControllerState
    ) -> tuple[Any, tuple]:
        contributions = []
        states = []
        for policy, held in zip(self.policies, state.policies, strict=True):
            with pointing_at_user(
                f"the policy {policy.name!r}",
                "let update take (signals, state) and return (moves, state)",
                where="Recipe.controller",
                kind=RecipeError,
            ):
                seen = {name: signals[name] for name in policy.watches}
                moves, after = policy.update(seen, held)
                surplus = sorted(set(moves) - set(policy.moves))
                if surplus:
                    raise RecipeError(
                        f"it moves {surplus[0]!r}, which is not among its moves",
                        where=policy.name,
                        remedy="name every knob that it moves in Policy.moves",
                    )
                states.append(_as(after, held, policy.name))
            contributions += [
                jnp.asarray(moves.get(k, _neutral(policy, k)), jnp.float32)
                for k in policy.moves
            ]
        return (
            jnp.stack(contributions) if contributions else state.contributions
        ), tuple(states)

    def _base_rate(
        self,
        state: ControllerState,
        before: Pieces,
    ) -> Any:
        base = state.base.get("learning_rate", jnp.float32(1))
        if not callable(self.recipe.learning_rate):
            return base
        return jnp.where(
            jnp.isnan(base),
            self._scheduled(before, state.updates),
            base,
        )

    def _unmoved_rate(
        self,
        state: ControllerState,
        before: Pieces,
    ) -> dict[str, Any]:
        """The schedule's own rate for this update, for an optimizer that reads it by
        itself; NaN if a person has set one.
        """
        if not callable(self.recipe.learning_rate):
            return {}
        followed = jnp.isnan(state.base["learning_rate"])
        return {
            optimizers.SCHEDULED: jnp.where(
                followed,
                self._scheduled(before, state.updates),
                jnp.nan,
            )
        }

    def _knobs(
        self, state: ControllerState, contributions: Any, before: Pieces
    ) -> dict[str, Any]:
        knobs = {}
        for name in state.knobs:
            base = (
                self._base_rate(state, before)
                if name == "learning_rate"
                else state.base.get(name, jnp.float32(0))
            )
            if name == "learning_rate" and "rate" in self.limits:
                base = base * state.rate[0]
            mine = [
                (contributions[i], self.policies[p].absolute)
                for i, (p, k) in enumerate(self.moves)
                if k == name
            ]
            knobs[name] = knobs_.combined(
                name,
                base,
                [c for c, absolute in mine if not absolute],
                [c for c, absolute in mine if absolute],
            )
        return knobs

    def _scheduled(
        self,
        before: Pieces,
        updates: Any,
    ) -> Any:
        return self.optimizer.scheduled(
            before.optimizer,
            before.params,
            updates,
        )

    def _moved(
        self,
        state: ControllerState,
        before: Pieces,
        after: Any,
        gradients: Any,
        knobs: Mapping[str, Any],
        loss: Any,
    ) -> tuple[Pieces, dict[str, Any], Any]:
        """The pieces after the step, what of the controller's state follows them, and
        whether there was an update.
        """
        more: dict[str, Any] = {}
        refused = [knobs[n] > 0 for n in ("skip", "restore", "rollback") if n in knobs]
        refused += [state.halted] if self.halts else []
        taken = ~jnp.stack(refused).any() if refused else None
        if "accumulate" in knobs:
            mean, count = state.accumulated
            whole = jax.tree.map(
                lambda m, g: jnp.where(
                    count == 0,
                    g,
                    m + (g - m) / (count + 1),
                ),
                mean,
                gradients,
            )
            whole, count = _where(
                taken,
                (whole, count + 1),
                (mean, count),
            )
            applied = (count >= knobs["accumulate"]) & (
                True if taken is None else taken
            )
            waiting = Pieces(before.params, after, before.optimizer)
            pieces = jax.lax.cond(
                applied,
                lambda: self._apply(
                    before,
                    after,
                    whole,
                    knobs,
                    loss,
                ),
                lambda: waiting,
            )
            pieces = pieces._replace(
                variables=_where(taken, pieces.variables, before.variables)
            )
            more["accumulated"] = (whole, jnp.where(applied, 0, count))
        # not a select: XLA would fuse it into the update, and round that otherwise
        else:
            applied = jnp.bool_(True) if taken is None else taken
            update = lambda: self._apply(
                before,
                after,
                gradients,
                knobs,
                loss,
            )
            pieces = (
                update()
                if taken is None
                else jax.lax.cond(taken, update, lambda: before)
            )
        if self.restores:
            back = (
                (knobs["restore"] > 0) & ~state.halted
                if "restore" in knobs
                else jnp.bool_(False)
            )
            pieces = _where(back, state.anchor, pieces)
            if "accumulate" in knobs:
                more["accumulated"] = (
                    whole,
                    jnp.where(
                        back,
                        0,
                        more["accumulated"][1],
                    ),
                )
            renewed = (
                (knobs["anchor"] > 0) & ~back & ~state.halted
                if "anchor" in knobs
                else jnp.bool_(False)
            )
            more["anchor"] = _where(renewed, pieces, state.anchor)
        if "averaging_decay" in knobs:
            decay = knobs["averaging_decay"]
            now = (
                pieces.params,
                floats(pieces.variables),
            )
            moving = jax.tree.map(
                lambda a, x: x + (decay * (a - x)).astype(x.dtype),
                state.average,
                now,
            )
            more["average"] = _where(applied, moving, state.average)
            if self.restores:
                more["average"] = _where(
                    back,
                    now,
                    more["average"],
                )
        return pieces, more, applied

    def _apply(
        self,
        before: Pieces,
        after: Any,
        gradients: Any,
        knobs: Mapping[str, Any],
        loss: Any,
    ) -> Pieces:
        with optimizers.updating():
            params, optimizer = self.optimizer.update(
                partial(self._clipped, gradients, knobs),
                before.optimizer,
                before.params,
                knobs,
                loss,
            )
        return Pieces(params, after, optimizer)

    def _clipped(
        self,
        gradients: Any,
        knobs: Mapping[str, Any],
    ) -> Any:
        if "clip_norm" not in knobs:
            return gradients
        # optax's own formula: below the threshold it is the gradient, to the bit
        clip = lambda g: optax.clip_by_global_norm(knobs["clip_norm"]).update(
            g, optax.EmptyState()
        )[0]
        if self.recipe.clip_norm is not None:
            return clip(gradients)
        # plain Optax would not clip: the gradient is left whole, as above
        return jax.lax.cond(
            optax.tree.norm(gradients) < knobs["clip_norm"],
            lambda g: g,
            clip,
            gradients,
        )


def served(
    state: Any,
    recipe: Recipe | None = None,
) -> tuple[Any, Any]:
    """Give the weights to evaluate, predict and serve with; training goes on from the
    state's own.

    Args:
      state: a `State`.
      recipe: whose `evaluate_params` says which weights these are; without it: the
        averages of a policy where they are kept, else what the optimizer's state
        implies (see `optimizers.evaluated`).

    Returns:
      Parameters and variables, like those of the state.

    Raises:
      RecipeError: `evaluate_params` can't be used.
    """
    given = None if recipe is None else recipe.evaluate_params
    params = state.params
    variables = state.variables
    averaged = (
        isinstance(state.controller, ControllerState) and state.controller.average != ()
    )

    if averaged:
        mean, means = state.controller.average
        variables = jax.tree.map(
            lambda old, new: old if new is None else new,
            variables,
            means,
            is_leaf=lambda x: x is None,
        )
    if averaged and given is None:
        return mean, variables
    return optimizers.evaluated(given, state.optimizer, params), variables


def floats(tree: Any) -> Any:
    """The floating-point and complex leaves of a tree; None in the place of others."""
    return jax.tree.map(
        lambda x: x if jnp.issubdtype(x.dtype, jnp.inexact) else None, tree
    )


def fed(state: Any, **values: float) -> Any:
    """A `State` to whose controller the host told what it measured; names that nobody
    watches are dropped.
    """
    return _written(state, "fed", values)


def set_base(state: Any, **values: float) -> Any:
    """A `State` whose knobs have other bases."""
    return _written(state, "base", values)


def slowed(
    state: Any,
    factor: float,
    later: float | None = None,
    steps: int = 1,
) -> Any:
    """A `State` whose learning rate is `factor` times its base, and grows to `later`
    times it over so many steps.
    """
    held = state.controller
    later = factor if later is None else later
    rate = np.array([factor, later, (later - factor) / steps], np.float32)
    return _replaced(state, held._replace(rate=placed(rate, held.rate.sharding)))


def released(state: Any) -> Any:
    """A `State` that goes on after the host saw to a stop or a rollback."""
    held = state.controller
    return _replaced(
        state, held._replace(halted=placed(np.bool_(False), held.halted.sharding))
    )


def _written(
    state: Any,
    part: str,
    values: Mapping[str, float],
) -> Any:
    held = state.controller
    if not isinstance(held, ControllerState):
        return state
    old = getattr(held, part)
    fresh = {
        n: placed(np.float32(x), old[n].sharding) for n, x in values.items() if n in old
    }
    return _replaced(state, held._replace(**{part: old | fresh})) if fresh else state


def _neutral(policy: Policy, knob: str) -> float:
    return float("nan") if policy.absolute else knobs_.neutral(knob)


def _named(policies: tuple[Policy, ...]) -> tuple[Policy, ...]:
    """The policies under names of their own: a second "plateau" is "plateau_2"."""
    named: list[Policy] = []
    for policy in policies:
        count = 1 + [p.name for p in policies[: len(named)]].count(policy.name)
        named.append(
            policy._replace(name=f"{policy.name}_{count}") if count > 1 else policy
        )
    return tuple(named)


def _replaced(state: Any, controller: ControllerState) -> Any:
    return dataclasses.replace(state, controller=controller)


def _where(
    condition: Any,
    new: Any,
    old: Any,
) -> Any:
    """`new` where the condition holds, or where there is none."""
    return (
        new
        if condition is None
        else jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)
    )


def _as(
    after: Any,
    before: Any,
    name: str,
) -> Any:
    """A policy's state with the dtypes that it had, or an error that says what
    changed.
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
