"""From a recipe's optimizer to the one Optax transformation that the step applies, with knobs for its hyperparameters."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lepton_jax.errors import RecipeError, pointing_at_user
from lepton_jax.state import shapes

if TYPE_CHECKING:
    from lepton_jax.recipe import Recipe

MOMENTS = ("mu", "trace")  # first moments, by the names that Optax's states have for them
MOVES = ("reshape", "transpose", "broadcast_in_dim", "convert_element_type", "squeeze", "neg")
FORMING = ("b1", "b2", "momentum")  # `1 - b1` of a traced float32 is not that of a Python float


class Switchable(NamedTuple):
    """Several optimizers, of which the knob "optimizer" says which one is at work.

    Attributes:
      makers: functions of the learning rate to Optax transformations.
      carry: whether the one that takes over begins with the first moment of the one before, where both have one. All else
        of its state begins anew.
    """

    makers: tuple[Callable[[Any], optax.GradientTransformation], ...]
    carry: bool = True


def switchable(*makers: Callable[[Any], optax.GradientTransformation], carry: bool = True) -> Switchable:
    """`Recipe.optimizer` as several optimizers; all their states are kept, so memory is their sum.

    Args:
      makers: functions of the learning rate, e.g. optax.adamw, lambda rate: optax.sgd(10 * rate, momentum=0.9).
      carry: see `Switchable`.
    """
    if len(makers) < 2 or not all(callable(m) for m in makers):
        raise RecipeError(f"switchable has {len(makers)} optimizers", where="switchable",
                          remedy="give two or more functions of the learning rate, e.g. optax.adamw, optax.lion")
    return Switchable(makers, carry)


class Optimizer(NamedTuple):
    """An Optax transformation whose hyperparameters are given anew at each update.

    Attributes:
      base: the knobs that it has, with the recipe's values; a learning rate that is a schedule is NaN there.
      init: params to its state.
      update: (gradients, state, params, knobs, value) to (params, state) after the update; `knobs` maps names to float32
        scalars: the learning rate must be there if the base has it and it is not 1; others only where they may differ from
        the base.
    """

    base: dict[str, float]
    init: Callable[[Any], Any]
    update: Callable[..., Any]


def build(recipe: Recipe) -> Optimizer:
    """The recipe's optimizer.

    Raises:
      RecipeError: the optimizer is neither an Optax transformation nor a function of the learning rate, or the
        schedule is no function of the step.
    """
    given: Any = recipe.optimizer
    if isinstance(given, Switchable):
        return _switching(recipe, given)
    if not callable(given):
        if recipe.learning_rate is not None and isinstance(given, optax.GradientTransformation):
            raise RecipeError("learning_rate is given, but the optimizer already has its own", where="Recipe.learning_rate",
                              remedy="pass the optimizer as a function, e.g. optimizer=optax.adamw, or drop learning_rate")
        whole = _checked(given)
        return Optimizer({"learning_rate": 1.0}, whole.init, _scaled(whole))
    _check_rate(recipe)
    return _made(given, recipe.learning_rate)


def _made(make: Callable, rate: Any) -> Optimizer:
    """An optimizer made anew in each trace, from the knobs' tracers."""
    plain = _checked(_call(make, 0.0 if callable(rate) else rate))
    base = {"learning_rate": float("nan") if callable(rate) else float(rate), **_defaults(make)}
    if not _takes_tracers(make):  # it looks at the rate itself: the knob scales what comes out, a schedule stays as it is
        fixed = _checked(_call(make, rate))
        if callable(rate):
            return Optimizer({}, fixed.init, lambda g, s, p, knobs, value: _applied(fixed, g, s, p, value))
        scaled, factor = _scaled(fixed), 1 / jnp.float32(rate or 1)
        return Optimizer(base, fixed.init, lambda g, s, p, knobs, value: scaled(
            g, s, p, {"learning_rate": knobs["learning_rate"] * factor}, value))

    delicate = {*FORMING, *({"learning_rate"} if not callable(rate) and _scaled_further(make) else set())}

    def update(gradients: Any, state: Any, params: Any, knobs: Mapping[str, Any], value: Any) -> Any:
        mine = {n: x for n, x in knobs.items() if n in base}

        def run(moved: Mapping[str, Any]) -> Any:
            moved = {"learning_rate": rate, **moved}
            return _applied(_checked(_call(make, moved.pop("learning_rate"), **moved)), gradients, state, params, value)

        first = {n: x for n, x in mine.items() if n in delicate}
        if not first:
            return run(mine)
        still = jnp.stack([x == jnp.float32(base[n]) for n, x in first.items()]).all()
        return jax.lax.cond(still, lambda: run({n: x for n, x in mine.items() if n not in first}), lambda: run(mine))

    return Optimizer(base, plain.init, update)


def _scaled(whole: optax.GradientTransformationExtraArgs) -> Callable:
    """Updates of a finished transformation times the knob: for all of Optax's, the same as a scaled learning rate."""
    def update(gradients: Any, state: Any, params: Any, knobs: Mapping[str, Any], value: Any) -> Any:
        factor = knobs.get("learning_rate")
        return _applied(whole, gradients, state, params, value, factor)

    return update


def _applied(whole: optax.GradientTransformationExtraArgs, gradients: Any, state: Any, params: Any, value: Any,
             factor: Any = None) -> tuple[Any, Any]:
    updates, state = whole.update(gradients, state, params, value=value)
    if factor is not None:
        updates = jax.tree.map(lambda u: u * factor.astype(u.dtype), updates)
    return optax.apply_updates(params, updates), state


def _switching(recipe: Recipe, given: Switchable) -> Optimizer:
    _check_rate(recipe)
    each = [_made(make, recipe.learning_rate) for make in given.makers]

    def init(params: Any) -> Any:
        return {"index": jnp.int32(0), "each": tuple(o.init(params) for o in each)}

    base = {n: x for o in reversed(each) for n, x in o.base.items()}

    def update(gradients: Any, state: Any, params: Any, knobs: Mapping[str, Any], value: Any) -> Any:
        before = state["index"]
        index = jnp.int32(knobs["optimizer"]) if "optimizer" in knobs else before

        def branch(k: int) -> Callable[[], Any]:
            def run() -> Any:
                old = state["each"]
                fresh = each[k].init(params)
                if given.carry:
                    fresh = _with_moment(fresh, [_moment(s) for s in old], before)
                begun = jax.tree.map(lambda n, o: jnp.where(before != k, n, o), fresh, old[k])
                mine = {n: _own(n, x, base[n], each[k].base[n]) for n, x in knobs.items() if n in each[k].base}
                moved, after = each[k].update(gradients, begun, params, mine, value)
                return moved, (*old[:k], after, *old[k + 1:])
            return run

        moved, states = jax.lax.switch(index, [branch(k) for k in range(len(each))])
        return moved, {"index": index, "each": states}

    return Optimizer({**base, "optimizer": 0.0}, init, update)


def _own(name: str, knob: Any, base: float, own: float) -> Any:
    """A knob of one of several optimizers, whose own value may be another than the base, which is the first's."""
    if own == base or name == "learning_rate":
        return knob
    return jnp.where(knob == jnp.float32(base), own, knob) if name in FORMING or not base else own * (knob / base)


def _moment(state: Any) -> Any:
    """The first moment in an Optax state: a tree of the parameters' structure; None if it has none."""
    for name in MOMENTS:
        found = optax.tree_utils.tree_get_all_with_path(state, name)
        if len(found) == 1 and jax.tree.leaves(found[0][1]):
            return found[0][1]
    return None


def _with_moment(fresh: Any, moments: list[Any], before: Any) -> Any:
    """`fresh` with the first moment of the optimizer number `before`, where it has one."""
    mine = _moment(fresh)
    if mine is None or all(m is None for m in moments):
        return fresh
    form: Any = jax.tree.structure(mine)
    alike = [mine if m is None or form != jax.tree.structure(m) else m for m in moments]
    chosen = jax.tree.map(lambda *xs: jax.lax.select_n(before, *(x.astype(xs[0].dtype) for x in xs)), *alike)
    name = next(n for n in MOMENTS if optax.tree_utils.tree_get_all_with_path(fresh, n))
    return optax.tree_utils.tree_set(fresh, **{name: chosen})


def _defaults(make: Any) -> dict[str, float]:
    """The knobs among a function's keyword arguments, with the values that they have."""
    try:
        parameters = inspect.signature(make).parameters
    except (TypeError, ValueError):
        return {}
    values = {n: p.default for n, p in parameters.items() if n in ("weight_decay", *FORMING)}
    return {n: float(x) for n, x in values.items() if isinstance(x, int | float) and not isinstance(x, bool)}


def _takes_tracers(make: Callable) -> bool:
    try:
        jax.eval_shape(lambda rate: _call(make, rate).init(jnp.zeros(())), jax.ShapeDtypeStruct((), jnp.float32))
    except (jax.errors.ConcretizationTypeError, RecipeError):
        return False
    return True


def _scaled_further(make: Callable) -> bool:
    """Whether the update has another constant factor than the rate: before it, as in Muon, or after it, as in Adafactor.

    XLA joins constant factors, but not tracers.
    """
    params = {"kernel": jnp.zeros((4, 2)), "bias": jnp.zeros(2)}

    def run(rate: Any, params: Any) -> Any:
        whole = _checked(_call(make, rate))
        with updating():
            return whole.update(params, whole.init(params), params, value=jnp.float32(0))[0]

    jaxpr = jax.make_jaxpr(run)(jnp.float32(1), params).jaxpr
    return _factors(jaxpr, ["rate"] + [""] * (len(jaxpr.invars) - 1))[1]


def _factors(jaxpr: Any, kinds: list[str]) -> tuple[list[str], bool]:
    """What each result of a jaxpr is, given what its arguments are, and whether the rate meets another constant factor.

    The kinds: "constant"; "rate", alone; "scaled", whose last factor is a constant; "update", times the rate; "" other.
    """
    known = dict(zip(jaxpr.invars, kinds, strict=True))
    of = lambda v: "constant" if hasattr(v, "val") else known.get(v, "constant")  # noqa: E731  (what is closed over is, too)
    again = False
    for eqn in jaxpr.eqns:
        into = [of(v) for v in eqn.invars]
        inner = next((getattr(p, "jaxpr", p) for p in eqn.params.values() if hasattr(p, "eqns") or hasattr(p, "jaxpr")), None)
        if inner is not None and (len(inner.invars), len(inner.outvars)) == (len(eqn.invars), len(eqn.outvars)):
            outs, met = _factors(inner, into)
            again |= met
            known.update(zip(eqn.outvars, outs, strict=True))
            continue
        product, found = eqn.primitive.name in ("mul", "div"), set(into)
        literal = any(hasattr(v, "val") for v in eqn.invars)
        again |= product and ({"rate", "scaled"} <= found or ("update" in found and not literal))
        if found <= {"constant"}:
            out = "constant"
        elif found <= {"constant", "rate"}:
            out = "rate"
        elif found & {"rate", "update"}:
            out = "update"
        elif (product and "constant" in found) or (eqn.primitive.name in MOVES and "scaled" in found):
            out = "scaled"
        else:
            out = ""
        known.update(dict.fromkeys(eqn.outvars, out))
    return [of(v) for v in jaxpr.outvars], again


def updating() -> pointing_at_user:
    """Context in which a fault of an optimizer's update is told as one of the recipe's."""
    return pointing_at_user("the optimizer's update", "give an Optax transformation that needs gradients, parameters and the "
                            "loss's value alone", where="Recipe.optimizer", kind=RecipeError)


def _call(make: Callable, rate: Any, **moved: Any) -> Any:
    with pointing_at_user("making the optimizer", "let it take the learning rate alone, e.g. optax.adamw, or "
                          "lambda rate: optax.sgd(rate, momentum=0.9)", where="Recipe.optimizer", kind=RecipeError):
        return functools.partial(make, **moved)(rate)


def _checked(optimizer: Any) -> optax.GradientTransformationExtraArgs:
    if not isinstance(optimizer, optax.GradientTransformation):
        raise RecipeError(f"optimizer is a {type(optimizer).__name__}, not an Optax transformation",
                          where="Recipe.optimizer", remedy="give e.g. optimizer=optax.adamw, learning_rate=1e-3")
    return optax.with_extra_args_support(optimizer)


def _check_rate(recipe: Recipe) -> None:
    rate = recipe.learning_rate
    if rate is None:
        raise RecipeError("optimizer is a function of the learning rate, but no learning rate is given",
                          where="Recipe.learning_rate", remedy="set learning_rate to a number or an Optax schedule")
    if not callable(rate):
        return
    with pointing_at_user("the learning rate's schedule", "give a function of the step, e.g. "
                          "optax.cosine_decay_schedule(...)", where="Recipe.learning_rate", kind=RecipeError):
        value = jax.eval_shape(rate, jax.ShapeDtypeStruct((), "int32"))
    if getattr(value, "shape", None) != ():
        raise RecipeError(f"the learning rate's schedule returned {shapes(value)}", where="Recipe.learning_rate",
                          remedy="return one number for a step")
