"""One learning rate for models of all widths (maximal update parametrization).

Yang et al. 2022, "Tensor Programs V: Tuning Large Neural Networks via Zero-Shot
Hyperparameter Transfer", arXiv 2203.03466, table 3. A rate that was found for a narrow
model, the base, is the best one of a wider model, too, if with r times the width

                       standard deviation   rate (Adam)
    input, vectors     as in the base       as in the base
    hidden kernels     1 / sqrt(r)          1 / r
    output kernels     1 / r                1 / r

Which is which, the shapes tell: what grows in its last dim alone is fed by something of
a fixed size, what grows in another one alone is an output, what grows in both is
hidden. So the model says nothing of it.

    >>> wide = {"embed": (50, 64), "up": (64, 256), "head": (64, 50)}
    >>> base = {"embed": (50, 16), "up": (16, 64), "head": (16, 50)}
    >>> for path, growth in kinds(wide, base).items():
    ...     print(path, growth.fan_in, growth.fan_out, growth.rate(optax.adam))
    embed 1.0 4.0 1.0
    up 4.0 4.0 0.25
    head 4.0 1.0 0.25
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from lepton_jax.adapt.low_rank import made
from lepton_jax.errors import RecipeError
from lepton_jax.recipe import Recipe
from lepton_jax.trees import by_path

WHERE = "adapt.by_width"
# Optimizers whose updates have one size for each number, whatever the gradient's.
ADAMS = ("adam", "adamw", "nadam", "nadamw", "amsgrad", "adamax", "lion")
MUON = "muon"


class Growth(NamedTuple):
    """The growth of a parameter over the base model's.

    Attributes:
      fan_in: times the numbers that each of its outputs is summed from.
      fan_out: times its outputs.
    """

    fan_in: float
    fan_out: float

    @property
    def deviation(self) -> float:
        """Factor of the standard deviation at the start."""
        if self.fan_out == 1:  # an output, or as wide as in the base
            return 1 / self.fan_in
        return 1 / math.sqrt(self.fan_in)

    def rate(self, optimizer: Any) -> float:
        """Return the factor of an optimizer's updates."""
        name, settings = _named(optimizer)
        if name != MUON:
            return 1 / self.fan_in
        # Muon scales by the square root of outputs over inputs itself; or, with
        # consistent_rms, by that of the longer side.
        is_consistent = settings.get("consistent_rms") is not None
        if not is_consistent or self.fan_in == 1:
            return 1.0
        longer = max(self.fan_in, self.fan_out)
        ratio = self.fan_out / self.fan_in
        return math.sqrt(ratio / longer)


def by_width(recipe: Recipe, base: Any) -> Recipe:
    """Return a recipe whose learning rate is that of a narrower model.

    Initial parameters are scaled, and the updates of each parameter. Weight decay goes
    with the rate. A head of attention should be as wide as in the base: scores are
    divided by the square root of its width, which is not changed here.

    Args:
      recipe: of the wide model, an NNX factory. The optimizer is a function of the
        learning rate: one of `ADAMS`, Muon, a `functools.partial` of these, or
        `optimizers.by_part` of them.
      base: a factory of the same model in the width for which the rate was found. It is
        made once, on the host.

    Raises:
      RecipeError: the models differ in more than width, nothing is wider, no output
        kernel is (a tied head is an input and an output at once), or the optimizer is
        another one.

    Example:
      >>> import lepton_jax as lepton
      >>> wide, narrow = (
      ...     functools.partial(lepton.models.MLP, (4, width, width, 2))
      ...     for width in (64, 16)
      ... )
      >>> recipe = lepton.Recipe(
      ...     model=wide,
      ...     loss=lepton.losses.cross_entropy,
      ...     optimizer=optax.adamw,
      ...     learning_rate=1e-2,
      ... )
      >>> by_width(recipe, narrow).learning_rate
      0.01
    """
    own = _params_of(recipe.model)
    narrow = _made_params(base)
    growth = kinds(_shapes(own), _shapes(narrow))
    _check(growth)
    deviations = {
        path: float(np.std(x)) * growth[path].deviation
        for path, x in narrow.items()
        if np.std(x) > 0
    }
    factory = functools.partial(scaled, recipe.model, deviations=deviations)
    return recipe.with_(
        model=factory,
        optimizer=_transferred(recipe.optimizer, growth),
    )


def kinds(
    own: Mapping[str, tuple[int, ...]],
    base: Mapping[str, tuple[int, ...]],
) -> dict[str, Growth]:
    """Return how much wider each parameter is.

    Args:
      own: path to shape.
      base: likewise, of the narrower model.

    Raises:
      RecipeError: there are other parameters, or they have other dims.
    """
    if own.keys() != base.keys():
        path = min(own.keys() ^ base.keys())
        raise RecipeError(
            f"only one of the models has the parameter {path!r}",
            where=WHERE,
            remedy="let them differ in their width alone",
        )
    growth = {}
    for path, shape in own.items():
        growth[path] = _growth(path, shape, base[path])
    return growth


def scaled(model: Any, *, deviations: Mapping[str, float], rngs: nnx.Rngs) -> Any:
    """Return a model whose initial parameters have given standard deviations.

    Args:
      model: an NNX factory.
      deviations: by path.
      rngs: for the model.
    """
    module = made(model, rngs)
    state = nnx.state(module, nnx.Param)
    for path, variable in nnx.to_flat_state(state):
        deviation = deviations.get(_name(path))
        if deviation is not None:
            x = variable[...]
            factor = deviation / jnp.std(x)
            variable[...] = x * factor.astype(x.dtype)
    nnx.update(module, state)
    return module


# ---- internals ----


def _growth(path: str, own: tuple[int, ...], base: tuple[int, ...]) -> Growth:
    if len(own) != len(base):
        raise RecipeError(
            f"the parameter {path!r} has shape {own}, and {base} in the base",
            where=WHERE,
            remedy="let the models differ in their width alone",
        )
    ratios = [mine / theirs for mine, theirs in zip(own, base, strict=True)]
    grown = [dim for dim, ratio in enumerate(ratios) if ratio != 1]
    if not grown:
        return Growth(1.0, 1.0)
    last = len(own) - 1
    *inputs, output = grown
    is_output_kernel = not inputs and output != last
    if is_output_kernel and own[last] > 1:
        return Growth(ratios[output], 1.0)
    fan_in = math.prod([1.0, *(ratios[dim] for dim in inputs)])
    return Growth(fan_in, ratios[output])


def _check(growth: Mapping[str, Growth]) -> None:
    grown = [each for each in growth.values() if each != Growth(1.0, 1.0)]
    if not grown:
        raise RecipeError(
            "the base is as wide as the model",
            where=WHERE,
            remedy="give a narrower model, or leave it out",
        )
    if all(each.fan_in == 1 or each.fan_out != 1 for each in grown):
        raise RecipeError(
            "no parameter is an output alone: each that grows has outputs that do",
            where=WHERE,
            remedy="give the head a kernel of its own (tied=False)",
        )


def _name(path: tuple[Any, ...]) -> str:
    """Return a parameter's path as the trace has it."""
    return "/".join(map(str, path))


def _params_of(model: Any) -> dict[str, Any]:
    """Return the shapes of a model's parameters by path."""
    return jax.eval_shape(lambda: _params(model))


def _made_params(model: Any) -> dict[str, np.ndarray]:
    make = functools.partial(_params, model)
    params = jax.jit(make)()
    return {path: np.asarray(x) for path, x in params.items()}


def _params(model: Any) -> dict[str, Any]:
    module = made(model, nnx.Rngs(0))
    state = nnx.state(module, nnx.Param)
    params = nnx.to_flat_state(state)
    return {_name(path): variable[...] for path, variable in params}


def _shapes(params: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {path: x.shape for path, x in params.items()}


def _named(optimizer: Any) -> tuple[str, Mapping[str, Any]]:
    """Return an optimizer's name, and the settings that it was given."""
    settings: Mapping[str, Any] = {}
    while isinstance(optimizer, functools.partial):
        settings = {**optimizer.keywords, **settings}
        optimizer = optimizer.func
    return getattr(optimizer, "__name__", str(optimizer)), settings


def _transferred(optimizer: Any, growth: Mapping[str, Growth]) -> Any:
    """Return an optimizer whose updates are scaled by the parameters' growth."""
    parts = getattr(optimizer, "parts", None)
    if parts is not None:
        changed = [_part(part, growth) for part in parts]
        return type(optimizer)(tuple(changed))
    name, _ = _named(optimizer)
    is_known = name in (*ADAMS, MUON)
    if not is_known or not callable(optimizer):
        raise RecipeError(
            f"nothing is known of the rates of {name!r} in other widths",
            where=WHERE,
            remedy=f"use one of {', '.join((*ADAMS, MUON))}, as a function of the rate",
        )
    factors = {path: each.rate(optimizer) for path, each in growth.items()}
    return _scaling(optimizer, factors)


def _part(part: Any, growth: Mapping[str, Growth]) -> Any:
    if part.is_frozen:
        return part
    given = _transferred(part.given, growth)
    return part._replace(given=given)


def _scaling(optimizer: Any, factors: Mapping[str, float]) -> Callable:
    """Return a function of the rate whose transformation scales updates by path."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        paths = list(by_path(updates))
        leaves, structure = jax.tree.flatten(updates)
        pairs = zip(paths, leaves, strict=True)
        # policies try an optimizer on a parameter of their own
        changed = [leaf * factors.get(path, 1.0) for path, leaf in pairs]
        return jax.tree.unflatten(structure, changed), state

    def init(params: Any) -> Any:
        return optax.EmptyState()

    scale = optax.GradientTransformation(init, update)

    def make(learning_rate: Any, *args: Any, **settings: Any) -> Any:
        inner = optimizer(learning_rate, *args, **settings)
        return optax.chain(inner, scale)

    # what looks for knobs, such as weight_decay, or for Muon, finds the optimizer
    make.__wrapped__ = optimizer  # type: ignore[attr-defined]
    return make
