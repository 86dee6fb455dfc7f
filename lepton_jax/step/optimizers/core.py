"""From a recipe's optimizer to the one Optax transformation that the step applies, with
knobs for its hyperparameters.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lepton_jax.errors import RecipeError, pointing_at_user
from lepton_jax.step.optimizers.evaluation import check_evaluation
from lepton_jax.step.optimizers.schedule import (
    Reading,
    Readings,
    Scheduled,
    inputs_of,
    skips,
)
from lepton_jax.step.optimizers.transformation import Transformation, is_transformation
from lepton_jax.trees import shapes

if TYPE_CHECKING:
    from lepton_jax.recipe import Recipe

# first moments, by the names that Optax's states have for them
MOMENTS = ("mu", "trace")
MOVES = (
    "reshape",
    "transpose",
    "broadcast_in_dim",
    "convert_element_type",
    "squeeze",
    "neg",
)
# the schedule's value that the knob learning_rate is made of; NaN where a person has
# set it
SCHEDULED = "scheduled_rate"
RATE = jax.ShapeDtypeStruct((), "float32")
AS_SCHEDULE = (
    "use the rate where Optax takes a schedule, e.g. optax.scale_by_learning_rate(rate)"
    " for optax.scale(-rate); -rate, 10 * rate and the like stay schedules"
)
TRIED = 3  # entries in each dim of the parameters that a policy's trial gets; a choice
# `1 - b1` of a traced float32 is not that of a Python float
FORMING = ("b1", "b2", "momentum")


class Switchable(NamedTuple):
    """Several optimizers, of which the knob "optimizer" says which one is at work.

    Attributes:
      makers: functions of the learning rate to Optax transformations.
      carry: whether the one that takes over begins with the first moment of the one
        before, where both have one. All else of its state begins anew.
    """

    makers: tuple[Callable[[Any], optax.GradientTransformation], ...]
    carry: bool = True


def switchable(
    *makers: Callable[[Any], optax.GradientTransformation],
    carry: bool = True,
) -> Switchable:
    """`Recipe.optimizer` as several optimizers; all their states are kept, so memory is
    their sum.

    Args:
      makers: functions of the learning rate, e.g. optax.adamw, lambda rate:
        optax.sgd(10 * rate, momentum=0.9).
      carry: see `Switchable`.
    """
    if len(makers) < 2 or not all(callable(m) for m in makers):
        raise RecipeError(
            f"switchable has {len(makers)} optimizers",
            where="switchable",
            remedy=(
                "give two or more functions of the learning rate, e.g. optax.adamw,"
                " optax.lion"
            ),
        )
    return Switchable(makers, carry)


class Optimizer(NamedTuple):
    """An Optax transformation whose hyperparameters are given anew at each update.

    Attributes:
      base: the knobs that it has, with the recipe's values; a learning rate that is a
        schedule is NaN there.
      init: params to its state.
      update: (gradients, state, params, knobs, value) to (params, state) after the
        update; `gradients` is a function that gives them, so that XLA may fuse what
        makes them with what is made of them; `knobs` maps names to float32 scalars: the
        learning rate must be there if the base has it and it is not 1; others only
        where they may differ from the base. Where the learning rate is a schedule,
        `SCHEDULED` is there too.
      scheduled: (state, params, updates) to the rate that the schedule says for the
        next update, float32; read at the optimizer's own count where it has one, else
        at `updates`, Lepton's.
      trials: functions of this optimizer and of small parameters with the model's own
        names and numbers of dims; `init` calls them, and each raises a RecipeError if
        it can't drive the optimizer.
    """

    base: dict[str, float]
    init: Callable[[Any], Any]
    update: Callable[..., Any]
    scheduled: Callable[[Any, Any, Any], Any]
    trials: list[Callable[[Optimizer, Any], None]]


def build(recipe: Recipe) -> Optimizer:
    """The recipe's optimizer.

    Raises:
      RecipeError: the optimizer is neither an Optax transformation nor a function of
        the learning rate, or the schedule is no function of the step.
    """
    given: Any = recipe.optimizer
    if isinstance(given, Switchable):
        _check_rate(recipe)
        made = _switching(
            [_Maker(make, recipe.learning_rate) for make in given.makers], given.carry
        )
    elif callable(given) and not isinstance(given, optax.MultiSteps):
        _check_rate(recipe)
        made = _Maker(given, recipe.learning_rate).optimizer()
    else:
        made = _finished(given, recipe.learning_rate)
    return made._replace(init=_trying(made, recipe.evaluate_params))


def _finished(given: Any, rate: Any) -> Optimizer:
    """An optimizer that is a transformation already; the knob scales its updates."""
    if rate is not None and is_transformation(given):
        raise RecipeError(
            "learning_rate is given, but the optimizer already has its own",
            where="Recipe.learning_rate",
            remedy=(
                "pass the optimizer as a function, e.g. optimizer=optax.adamw, or drop"
                " learning_rate"
            ),
        )
    whole = Transformation(given)

    def update(
        gradients: Callable[[], Any],
        state: Any,
        params: Any,
        knobs: Mapping[str, Any],
        value: Any,
    ) -> Any:
        return whole.update(
            gradients,
            state,
            params,
            value,
            knobs.get("learning_rate"),
        )

    def scheduled(
        state: Any,
        params: Any,
        updates: Any,
    ) -> Any:
        return jnp.float32(1)

    return Optimizer(
        {"learning_rate": 1.0},
        whole.init,
        update,
        scheduled,
        [],
    )


def _trying(made: Optimizer, evaluate_params: Callable | None) -> Callable[[Any], Any]:
    """The optimizer's `init`, which first lets all else be tried that must fit the
    parameters.
    """

    def init(params: Any) -> Any:
        for trial in made.trials:
            trial(made, _small(params))
        state = made.init(params)
        if evaluate_params is not None:
            check_evaluation(evaluate_params, state, params)
        return state

    return init


def _small(params: Any) -> Any:
    """Zeros in the structure of the parameters, of at most `TRIED` entries in each
    dim.
    """
    with jax.ensure_compile_time_eval():
        return jax.tree.map(
            lambda x: jnp.zeros([min(n, TRIED) for n in x.shape], x.dtype), params
        )


class _Maker:
    """An optimizer as a function of the learning rate; it is made anew in each trace,
    from the knobs' tracers.

    How it is made depends on what it does with the rate, which is found out by tracing
    it on the parameters' shapes:

      number: from a float32 scalar, the knob. A schedule is read at Lepton's count of updates.
      schedule: from the schedule, times what policies make of it. The optimizer reads it at its own count.
      fixed: once, from the recipe's number, since it looks at the number itself or keeps it in its state; the knob scales
        the updates.

    Args:
      make: the function.
      rate: the recipe's learning rate.
    """

    def __init__(self, make: Callable, rate: Any):
        self._make = make
        self._rate = rate
        self._follows = callable(rate)
        self._base = {
            "learning_rate": float("nan") if self._follows else float(rate),
            **_defaults(make),
        }
        self._known: dict[Any, _Manner] = {}
        if not self._follows:
            # what is no optimizer at all is told before the model is traced
            self._whole(rate)

    def optimizer(self) -> Optimizer:
        return Optimizer(
            self._base,
            self.init,
            self.update,
            self.scheduled,
            [],
        )

    def init(self, params: Any) -> Any:
        manner = self._manner(params).name
        if manner == "schedule":
            return self._whole(Scheduled(self._rate)).init(params)
        return self._whole(0.0 if self._follows else self._rate).init(params)

    def update(
        self,
        gradients: Callable[[], Any],
        state: Any,
        params: Any,
        knobs: Mapping[str, Any],
        value: Any,
    ) -> Any:
        manner = self._manner(params)
        mine = {n: x for n, x in knobs.items() if n in self._base}
        if manner.name == "fixed":
            factor = mine["learning_rate"] / jnp.float32(self._rate or 1)
            return self._whole(self._rate).update(
                gradients, state, params, value, factor
            )

        def run(moved: Mapping[str, Any]) -> Any:
            moved = dict(moved)
            rate = moved.pop("learning_rate", self._rate)
            if manner.name == "schedule":
                rate = self._reading(rate, knobs.get(SCHEDULED))
            return self._whole(rate, **moved).update(
                gradients,
                state,
                params,
                value,
            )

        delicate = {*FORMING, *(["learning_rate"] if manner.delicate else [])}
        first = {n: x for n, x in mine.items() if n in delicate}
        if not first:
            return run(mine)
        still = jnp.stack(
            [x == self._resting(n, knobs) for n, x in first.items()]
        ).all()
        return jax.lax.cond(
            still,
            lambda: run({n: x for n, x in mine.items() if n not in first}),
            lambda: run(mine),
        )

    def scheduled(
        self,
        state: Any,
        params: Any,
        updates: Any,
    ) -> Any:
        if not self._follows:
            return jnp.float32(self._rate)
        leaf = self._manner(params).leaf
        count = updates if leaf is None else jax.tree.leaves(state)[leaf]
        return jnp.asarray(self._rate(count), jnp.float32)

    def _whole(
        self,
        rate: Any,
        **moved: Any,
    ) -> Transformation:
        return Transformation(_call(self._make, rate, **moved))

    def _resting(
        self,
        name: str,
        knobs: Mapping[str, Any],
    ) -> Any:
        """Value of a knob that nobody has moved."""
        if name == "learning_rate" and self._follows:
            return knobs.get(SCHEDULED, jnp.float32(jnp.nan))
        return jnp.float32(self._base[name])

    def _reading(
        self,
        rate: Any,
        scheduled: Any,
    ) -> Scheduled:
        """The schedule for one update.

        Args:
          rate: the knob, or the schedule where the knob rests.
          scheduled: the schedule's value that the knob was made of; NaN where a person
            has set a number.
        """
        if callable(rate):
            return Scheduled(rate)
        scheduled = jnp.float32(jnp.nan) if scheduled is None else scheduled
        told = jnp.isnan(scheduled) | ((scheduled == 0) & (rate != 0))
        factor = jnp.where(
            rate == scheduled,
            1,
            rate
            / jnp.where(
                told | (scheduled == 0),
                1,
                scheduled,
            ),
        )
        return Scheduled(
            lambda count: jnp.where(
                told,
                rate,
                self._rate(count) * factor,
            )
        )

    # ---- how it takes the rate ----

    def _manner(self, params: Any) -> _Manner:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
        leaves, structure = jax.tree.flatten(shapes)
        key = (structure, tuple((x.shape, x.dtype) for x in leaves))
        if key not in self._known:
            self._known[key] = (
                self._of_schedule(shapes) if self._follows else self._of_number(shapes)
            )
        return self._known[key]

    def _of_number(self, params: Any) -> _Manner:
        try:
            if self._keeps_rate(params):
                return _Manner("fixed")
            return _Manner("number", delicate=_scaled_further(self._whole, params))
        except RecipeError as error:
            if isinstance(error.__cause__, jax.errors.ConcretizationTypeError):
                return _Manner("fixed")
            raise

    def _of_schedule(self, params: Any) -> _Manner:
        try:
            readings = self._readings(params)
        except RecipeError as error:
            return self._numeric(params, error)
        if all(reading.plain for reading in readings):
            # the counts agree: a number gives the state that checkpoints have always
            # had
            with contextlib.suppress(RecipeError):
                if not self._keeps_rate(params):
                    self._program(params)
                    return _Manner("number")
        counted = [
            reading.leaf
            for reading in readings
            if reading.scales and reading.leaf is not None
        ]
        counted += [reading.leaf for reading in readings if reading.leaf is not None]
        # XLA joins a rate that is always the same with other constants, as in
        # Adafactor; seen in XLA of jax 0.10, by tests/test_optimizers.py. Other rates
        # are left in one program with the gradients, as Optax leaves them
        program = jax.make_jaxpr(self._rate)(jax.ShapeDtypeStruct((), "int32")).jaxpr
        constant = not inputs_of(program, program.outvars[0])
        return _Manner(
            "schedule",
            leaf=counted[0] if counted else None,
            delicate=constant,
        )

    def _numeric(
        self,
        params: Any,
        refused: RecipeError,
    ) -> _Manner:
        """Settle the manner of a function that can't take the schedule: it must take a
        number that is not known yet.
        """
        about_schedule = any(
            Scheduled.__name__ in str(error) for error in (refused, refused.__cause__)
        )
        try:
            program, state = self._program(params)
        except RecipeError as error:
            if not about_schedule:
                raise refused from None
            if isinstance(error.__cause__, jax.errors.ConcretizationTypeError):
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
        return _Manner("number")

    def _readings(self, params: Any) -> list[Reading]:
        state = jax.eval_shape(self._whole(Scheduled(self._rate)).init, params)
        readings = Readings(self._rate)
        whole = self._whole(readings.schedule)

        def update(
            state: Any,
            gradients: Any,
            params: Any,
        ) -> Any:
            return whole.update(
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
        """The jaxpr of an update from (rate, state, gradients, params), and the
        state.
        """
        state = jax.eval_shape(self._whole(0.0).init, params)

        def update(
            rate: Any,
            state: Any,
            gradients: Any,
            params: Any,
        ) -> Any:
            return self._whole(rate).update(
                lambda: gradients, state, params, jnp.float32(0)
            )

        return jax.make_jaxpr(update)(RATE, state, params, params), state

    def _keeps_rate(self, params: Any) -> bool:
        """Whether the first state holds the rate, as that of `optax.inject_hyperparams`
        does.
        """
        program = jax.make_jaxpr(lambda rate, params: self._whole(rate).init(params))(
            RATE, params
        ).jaxpr
        return any(
            program.invars[0] in inputs_of(program, result)
            for result in program.outvars
        )


class _Manner(NamedTuple):
    """The way in which an optimizer takes its learning rate.

    Attributes:
      name: see `_Maker`.
      leaf: of the state that is the count at which the schedule is read, or None.
      delicate: whether an update is to be compiled without the knob, too, where that
        rests.
    """

    name: str
    leaf: int | None = None
    delicate: bool = False


def _switching(makers: list[_Maker], carry: bool) -> Optimizer:
    each = [maker.optimizer() for maker in makers]

    def init(params: Any) -> Any:
        return {"index": jnp.int32(0), "each": tuple(o.init(params) for o in each)}

    base = {n: x for o in reversed(each) for n, x in o.base.items()}

    def update(
        gradients: Callable[[], Any],
        state: Any,
        params: Any,
        knobs: Mapping[str, Any],
        value: Any,
    ) -> Any:
        before = state["index"]
        index = jnp.int32(knobs["optimizer"]) if "optimizer" in knobs else before

        def branch(k: int) -> Callable[[], Any]:
            def run() -> Any:
                old = state["each"]
                fresh = each[k].init(params)
                if carry:
                    fresh = _with_moment(
                        fresh,
                        [_moment(s) for s in old],
                        before,
                    )
                begun = jax.tree.map(
                    lambda n, o: jnp.where(before != k, n, o),
                    fresh,
                    old[k],
                )
                mine = {
                    n: _own(
                        n,
                        x,
                        base[n],
                        each[k].base[n],
                    )
                    for n, x in knobs.items()
                    if n in each[k].base
                }
                if SCHEDULED in knobs:
                    mine[SCHEDULED] = knobs[SCHEDULED]
                moved, after = each[k].update(
                    gradients,
                    begun,
                    params,
                    mine,
                    value,
                )
                return moved, (
                    *old[:k],
                    after,
                    *old[k + 1 :],
                )

            return run

        moved, states = jax.lax.switch(index, [branch(k) for k in range(len(each))])
        return moved, {"index": index, "each": states}

    def scheduled(
        state: Any,
        params: Any,
        updates: Any,
    ) -> Any:
        rates = [
            o.scheduled(s, params, updates)
            for o, s in zip(each, state["each"], strict=True)
        ]
        return jnp.stack(rates)[state["index"]]

    return Optimizer(
        {**base, "optimizer": 0.0},
        init,
        update,
        scheduled,
        [],
    )


def _own(
    name: str,
    knob: Any,
    base: float,
    own: float,
) -> Any:
    """A knob of one of several optimizers, whose own value may be another than the
    base, which is the first's.
    """
    if own == base or name == "learning_rate":
        return knob
    return (
        jnp.where(
            knob == jnp.float32(base),
            own,
            knob,
        )
        if name in FORMING or not base
        else own * (knob / base)
    )


def _moment(state: Any) -> Any:
    """The first moment in an Optax state: a tree of the parameters' structure; None if
    it has none.
    """
    for name in MOMENTS:
        found = optax.tree_utils.tree_get_all_with_path(state, name)
        if len(found) == 1 and jax.tree.leaves(found[0][1]):
            return found[0][1]
    return None


def _with_moment(
    fresh: Any,
    moments: list[Any],
    before: Any,
) -> Any:
    """`fresh` with the first moment of the optimizer number `before`, where it has
    one.
    """
    mine = _moment(fresh)
    if mine is None or all(m is None for m in moments):
        return fresh
    form: Any = jax.tree.structure(mine)
    alike = [mine if m is None or form != jax.tree.structure(m) else m for m in moments]
    chosen = jax.tree.map(
        lambda *xs: jax.lax.select_n(before, *(x.astype(xs[0].dtype) for x in xs)),
        *alike,
    )
    name = next(n for n in MOMENTS if optax.tree_utils.tree_get_all_with_path(fresh, n))
    return optax.tree_utils.tree_set(fresh, **{name: chosen})


def _defaults(make: Any) -> dict[str, float]:
    """The knobs among a function's keyword arguments, with the values that they
    have.
    """
    try:
        parameters = inspect.signature(make).parameters
    except (TypeError, ValueError):
        return {}
    values = {
        n: p.default for n, p in parameters.items() if n in ("weight_decay", *FORMING)
    }
    return {
        n: float(x)
        for n, x in values.items()
        if isinstance(x, int | float) and not isinstance(x, bool)
    }


def _scaled_further(whole: Callable[[Any], Transformation], params: Any) -> bool:
    """Whether the update has another constant factor than the rate: before it, as in
    Muon, or after it, as in Adafactor.

    XLA joins constant factors, but not tracers.
    """

    def run(rate: Any, params: Any) -> Any:
        made = whole(rate)
        return made.updates(params, made.init(params), params, jnp.float32(0))[0]

    jaxpr = jax.make_jaxpr(run)(RATE, params).jaxpr
    return _factors(jaxpr, ["rate"] + [""] * (len(jaxpr.invars) - 1))[1]


def _factors(jaxpr: Any, kinds: list[str]) -> tuple[list[str], bool]:
    """What each result of a jaxpr is, given what its arguments are, and whether the
    rate meets another constant factor.

    The kinds: "constant"; "rate", alone; "scaled", whose last factor is a constant;
    "update", times the rate; "" other.
    """
    known = dict(
        zip(
            jaxpr.invars,
            kinds,
            strict=True,
        )
    )
    of = lambda v: "constant" if hasattr(v, "val") else known.get(v, "constant")
    again = False
    for eqn in jaxpr.eqns:
        into = [of(v) for v in eqn.invars]
        inner = next(
            (
                getattr(p, "jaxpr", p)
                for p in eqn.params.values()
                if hasattr(p, "eqns") or hasattr(p, "jaxpr")
            ),
            None,
        )
        if inner is not None and (len(inner.invars), len(inner.outvars)) == (
            len(eqn.invars),
            len(eqn.outvars),
        ):
            outs, met = _factors(inner, into)
            again |= met
            known.update(
                zip(
                    eqn.outvars,
                    outs,
                    strict=True,
                )
            )
            continue
        product = eqn.primitive.name in ("mul", "div")
        found = set(into)
        literal = any(hasattr(v, "val") for v in eqn.invars)
        again |= product and (
            {"rate", "scaled"} <= found or ("update" in found and not literal)
        )
        if found <= {"constant"}:
            out = "constant"
        elif found <= {"constant", "rate"}:
            out = "rate"
        elif found & {"rate", "update"}:
            out = "update"
        elif (product and "constant" in found) or (
            eqn.primitive.name in MOVES and "scaled" in found
        ):
            out = "scaled"
        else:
            out = ""
        known.update(dict.fromkeys(eqn.outvars, out))
    return [of(v) for v in jaxpr.outvars], again


def updating() -> pointing_at_user:
    """Context in which a fault of an optimizer's update is told as one of the
    recipe's.
    """
    return pointing_at_user(
        "the optimizer's update",
        "give an Optax transformation that needs gradients, parameters and the "
        "loss's value alone",
        where="Recipe.optimizer",
        kind=RecipeError,
    )


def _call(
    make: Callable,
    rate: Any,
    **moved: Any,
) -> Any:
    with pointing_at_user(
        "making the optimizer",
        "let it take the learning rate alone, e.g. optax.adamw, or "
        "lambda rate: optax.sgd(rate, momentum=0.9)",
        where="Recipe.optimizer",
        kind=RecipeError,
    ):
        return functools.partial(make, **moved)(rate)


def _check_rate(recipe: Recipe) -> None:
    rate = recipe.learning_rate
    if rate is None:
        raise RecipeError(
            "optimizer is a function of the learning rate, but no learning rate is"
            " given",
            where="Recipe.learning_rate",
            remedy="set learning_rate to a number or an Optax schedule",
        )
    if not callable(rate):
        return
    with pointing_at_user(
        "the learning rate's schedule",
        "give a function of the step, e.g. optax.cosine_decay_schedule(...)",
        where="Recipe.learning_rate",
        kind=RecipeError,
    ):
        value = jax.eval_shape(rate, jax.ShapeDtypeStruct((), "int32"))
    if getattr(value, "shape", None) != ():
        raise RecipeError(
            f"the learning rate's schedule returned {shapes(value)}",
            where="Recipe.learning_rate",
            remedy="return one number for a step",
        )
