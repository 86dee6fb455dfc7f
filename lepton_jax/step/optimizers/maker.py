"""An optimizer as a function of the learning rate.

The function is called anew in each trace, with the knobs' tracers. There are three ways
("manners") to do so, and tracing it on the parameters' shapes tells which one fits:

- number: it gets a float32 scalar, the knob. A schedule is read at Lepton's count of
  updates. Example: `optax.adamw`.
- schedule: it gets the schedule, times a factor where policies move the rate. The
  optimizer reads it at its own count. Example: `optax.MultiSteps(optax.sgd(rate), 4)`,
  whose count moves once in four steps.
- fixed: it gets the recipe's number once, since it looks at the number itself or keeps
  it in its state. The knob scales the updates. Example:
  `optax.inject_hyperparams(optax.sgd)(rate)`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lepton_jax.errors import RecipeError, pointing_at_user
from lepton_jax.step.branches import either
from lepton_jax.step.optimizers.factors import has_another_factor
from lepton_jax.step.optimizers.optimizer import (
    FORMING,
    SCHEDULED,
    Optimizer,
    unchanged,
)
from lepton_jax.step.optimizers.schedule import (
    Reading,
    Readings,
    Scheduled,
    inputs_of,
    skips,
)
from lepton_jax.step.optimizers.transformation import Transformation

RATE = jax.ShapeDtypeStruct((), "float32")
COUNT = jax.ShapeDtypeStruct((), "int32")
AS_SCHEDULE = (
    "use the rate where Optax takes a schedule, e.g. optax.scale_by_learning_rate(rate)"
    " for optax.scale(-rate); -rate, 10 * rate and the like stay schedules"
)


class Manner(NamedTuple):
    """The way in which an optimizer takes its learning rate.

    Attributes:
      name: "number", "schedule" or "fixed".
      leaf: index, among the leaves of the state, of the count at which the schedule is
        read; or None.
      delicate: whether the update is compiled a second time without the knob, for when
        the knob rests, since XLA would round it otherwise.
    """

    name: str
    leaf: int | None = None
    delicate: bool = False


class Maker:
    """An optimizer as a function of the learning rate.

    Args:
      make: the function.
      rate: the recipe's learning rate.
    """

    def __init__(self, make: Callable, rate: Any):
        self._make = make
        self._rate = rate
        self._follows = callable(rate)
        base_rate = float("nan") if self._follows else float(rate)
        self._base = {"learning_rate": base_rate, **defaults(make)}
        self._known: dict[Any, Manner] = {}
        if not self._follows:
            # a thing that is no optimizer at all is told before the model is traced
            self._made(rate)

    def optimizer(self) -> Optimizer:
        """Return it in the form in which a train step applies it."""
        return Optimizer(
            self._base,
            self.init,
            self.update,
            self.scheduled,
            [],
        )

    def init(self, params: Any) -> Any:
        """Return the state before the first update."""
        if self._manner(params).name == "schedule":
            return self._made(Scheduled(self._rate)).init(params)
        return self._made(0.0 if self._follows else self._rate).init(params)

    def update(
        self,
        gradients: Callable[[], Any],
        state: Any,
        params: Any,
        knobs: Mapping[str, Any],
        value: Any,
        finish: Callable[[Any, Any], Any] = unchanged,
    ) -> Any:
        """Make one update; see `Optimizer.update`."""
        manner = self._manner(params)
        own = {n: x for n, x in knobs.items() if n in self._base}
        if manner.name == "fixed":
            factor = own["learning_rate"] / jnp.float32(self._rate or 1)
            made = self._made(self._rate)
            after, state = made.update(gradients, state, params, value, factor)
            return finish(params, after), state

        def run(moved: Mapping[str, Any], now: tuple[Any, Any]) -> tuple[Any, Any]:
            made = self._made_from(moved, manner, knobs.get(SCHEDULED))
            before, held = now
            after, held = made.update(gradients, held, before, value)
            return finish(before, after), held

        delicate = {*FORMING}
        if manner.delicate:
            delicate.add("learning_rate")
        first = {n: x for n, x in own.items() if n in delicate}
        if not first:
            return run(own, (params, state))
        resting = [x == self._resting(n, knobs) for n, x in first.items()]
        others = {n: x for n, x in own.items() if n not in first}
        return either(
            jnp.stack(resting).all(),
            functools.partial(run, others),
            functools.partial(run, own),
            (params, state),
        )

    def scheduled(
        self,
        state: Any,
        params: Any,
        updates: Any,
    ) -> Any:
        """Return the schedule's rate; see `Optimizer.scheduled`."""
        if not self._follows:
            return jnp.float32(self._rate)
        leaf = self._manner(params).leaf
        count = updates if leaf is None else jax.tree.leaves(state)[leaf]
        return jnp.asarray(self._rate(count), jnp.float32)

    # ---- making it ----

    def _made(
        self,
        rate: Any,
        **options: Any,
    ) -> Transformation:
        with pointing_at_user(
            "making the optimizer",
            "let it take the learning rate alone, e.g. optax.adamw, or "
            "lambda rate: optax.sgd(rate, momentum=0.9)",
            where="Recipe.optimizer",
            kind=RecipeError,
        ):
            given = functools.partial(self._make, **options)(rate)
        return Transformation(given)

    def _made_from(
        self,
        moved: Mapping[str, Any],
        manner: Manner,
        scheduled: Any,
    ) -> Transformation:
        """Make the optimizer from knobs."""
        options = dict(moved)
        rate = options.pop("learning_rate", self._rate)
        if manner.name == "schedule":
            rate = self._reading(rate, scheduled)
        return self._made(rate, **options)

    def _resting(
        self,
        name: str,
        knobs: Mapping[str, Any],
    ) -> Any:
        """Return the value of a knob that nobody has moved."""
        if name == "learning_rate" and self._follows:
            return knobs.get(SCHEDULED, jnp.float32(jnp.nan))
        return jnp.float32(self._base[name])

    def _reading(
        self,
        rate: Any,
        scheduled: Any,
    ) -> Scheduled:
        """Return the schedule for one update.

        Args:
          rate: the knob, or the schedule where the knob rests.
          scheduled: the schedule's value behind the knob; NaN where a person has set a
            number.
        """
        if callable(rate):
            return Scheduled(rate)
        scheduled = jnp.float32(jnp.nan) if scheduled is None else scheduled
        is_set = jnp.isnan(scheduled) | ((scheduled == 0) & (rate != 0))
        unmoved = rate == scheduled
        divisor = jnp.where(
            is_set | (scheduled == 0),
            1,
            scheduled,
        )
        factor = jnp.where(unmoved, 1, rate / divisor)

        def read(count: Any) -> Any:
            return jnp.where(
                is_set,
                rate,
                self._rate(count) * factor,
            )

        return Scheduled(read)

    # ---- finding out the manner ----

    def _manner(self, params: Any) -> Manner:
        """Return the manner for parameters of these shapes, found out once."""
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
        leaves, structure = jax.tree.flatten(shapes)
        key = (structure, tuple((x.shape, x.dtype) for x in leaves))
        if key not in self._known:
            find = self._manner_of_schedule if self._follows else self._manner_of_number
            self._known[key] = find(shapes)
        return self._known[key]

    def _manner_of_number(self, params: Any) -> Manner:
        try:
            if self._keeps_rate(params):
                return Manner("fixed")
            delicate = has_another_factor(self._first_updates, params)
        except RecipeError as error:
            if _needs_value(error):
                return Manner("fixed")
            raise
        return Manner("number", delicate=delicate)

    def _manner_of_schedule(self, params: Any) -> Manner:
        try:
            readings = self._readings(params)
        except RecipeError as error:
            return self._manner_without_schedule(params, error)
        if all(reading.plain for reading in readings):
            # the counts agree: a number gives the state that checkpoints have always
            # had
            with contextlib.suppress(RecipeError):
                if not self._keeps_rate(params):
                    self._program(params)
                    return Manner("number")
        # XLA joins a rate that is always the same with other constants, as in
        # Adafactor; seen in XLA of jax 0.10, by tests/test_optimizers.py. Other rates
        # are left in one program with the gradients, as Optax leaves them
        program = jax.make_jaxpr(self._rate)(COUNT).jaxpr
        constant = not inputs_of(program, program.outvars[0])
        return Manner("schedule", leaf=_leaf_of_count(readings), delicate=constant)

    def _manner_without_schedule(
        self,
        params: Any,
        refused: RecipeError,
    ) -> Manner:
        """Return the manner of a function that can't take the schedule.

        It must take a number that is not known yet.
        """
        texts = (str(refused), str(refused.__cause__))
        about_schedule = any(Scheduled.__name__ in text for text in texts)
        try:
            program, state = self._program(params)
        except RecipeError as error:
            if not about_schedule:
                raise refused from None
            if _needs_value(error):
                raise RecipeError(
                    "the learning rate is a schedule, but the optimizer looks at it as"
                    " at a number",
                    where=error.where,
                    remedy=f"{AS_SCHEDULE}; or give a number as learning_rate",
                ) from None
            raise
        if skips(program, state, rate=0):
            raise RecipeError(
                "the learning rate is a schedule, but the optimizer uses it as a number"
                " inside of a wrapper that counts updates by itself",
                where=refused.where,
                remedy=AS_SCHEDULE,
            )
        return Manner("number")

    def _readings(self, params: Any) -> list[Reading]:
        """List where the update reads the schedule."""
        state = jax.eval_shape(self._made(Scheduled(self._rate)).init, params)
        readings = Readings(self._rate)
        made = self._made(readings.schedule)

        def update(
            state: Any,
            gradients: Any,
            params: Any,
        ) -> Any:
            return made.update(
                lambda: gradients,
                state,
                params,
                jnp.float32(0),
            )

        program = jax.make_jaxpr(update)(state, params, params)
        return readings.of(
            program,
            state,
            after=len(jax.tree.leaves(params)),
        )

    def _program(self, params: Any) -> tuple[Any, Any]:
        """Return the jaxpr of an update, and the state.

        The jaxpr's inputs are rate, state, gradients and parameters.
        """
        state = jax.eval_shape(self._made(0.0).init, params)

        def update(
            rate: Any,
            state: Any,
            gradients: Any,
            params: Any,
        ) -> Any:
            made = self._made(rate)
            return made.update(
                lambda: gradients,
                state,
                params,
                jnp.float32(0),
            )

        return jax.make_jaxpr(update)(RATE, state, params, params), state

    def _keeps_rate(self, params: Any) -> bool:
        """Whether the first state holds the rate, as in `optax.inject_hyperparams`."""

        def init(rate: Any, params: Any) -> Any:
            return self._made(rate).init(params)

        program = jax.make_jaxpr(init)(RATE, params).jaxpr
        rate = program.invars[0]
        return any(rate in inputs_of(program, result) for result in program.outvars)

    def _first_updates(
        self,
        rate: Any,
        params: Any,
    ) -> Any:
        """Return the updates by gradients that are the parameters."""
        made = self._made(rate)
        updates, _ = made.updates(
            params,
            made.init(params),
            params,
            jnp.float32(0),
        )
        return updates


def _needs_value(error: RecipeError) -> bool:
    """Whether an optimizer failed because a number was not known yet."""
    return isinstance(error.__cause__, jax.errors.ConcretizationTypeError)


def _leaf_of_count(readings: list[Reading]) -> int | None:
    """Return the count at which the rate of the updates is read, or any other count."""
    counted = [reading for reading in readings if reading.leaf is not None]
    scaling = [reading for reading in counted if reading.scales]
    return next((reading.leaf for reading in [*scaling, *counted]), None)


def defaults(make: Any) -> dict[str, float]:
    """Return the knobs among a function's keyword arguments, with their defaults."""
    try:
        parameters = inspect.signature(make).parameters
    except (TypeError, ValueError):
        return {}
    knobs = {}
    for name, parameter in parameters.items():
        default = parameter.default
        is_number = isinstance(default, int | float) and not isinstance(default, bool)
        if name in ("weight_decay", *FORMING) and is_number:
            knobs[name] = float(default)
    return knobs
