"""Pruning while a model trains: transformations of Optax that set weights to zero.

    recipe.with_(optimizer=shrink.pruning(
        optax.adamw,
        shrink.magnitude(shrink.rising(0.8, begin=200, end=1000)),
    ))

Each is the last transformation of a chain: it makes updates after which the weights
that are pruned are exactly zero, and zero they stay. A mask is chosen anew every
`every` steps, as the schedule asks for more zeros.

    magnitude      the smallest numbers of each weight
    n_of_m         the smallest m - n of each m inputs
    channels_off   whole channels, which `cut` then takes out

Zeros among other numbers save neither time nor memory: XLA multiplies with them as with
all numbers, on each of its backends, and the file is as large as before. That holds of
n of m, too: the sparse units of a GPU are not used by XLA. What saves is `channels_off`
with `cut`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lepton_jax.errors import SettingError
from lepton_jax.ship.shrink.channels import Channels, Place
from lepton_jax.ship.shrink.cutting import mask_of
from lepton_jax.trees import by_path, path_of, with_leaves

# Steps between choices of a mask. Assumption: as Zhu and Gupta 2017 (100 to 1,000).
EVERY = 100

# Weights with fewer dims, such as biases and scales, are not pruned.
LEAST_DIMS = 2

SAVES_NOTHING = (
    "zeros save nothing: XLA multiplies with them on each backend, and they are stored"
)

Schedule = Callable[[Any], Any]


class MaskState(NamedTuple):
    """State of a pruning.

    Attributes:
      updates: how many there were.
      masks: Boolean, in the shapes of the parameters; a scalar where none is pruned.
    """

    updates: jax.Array
    masks: Any


def rising(
    share: float,
    *,
    begin: int = 0,
    end: int,
    first: float = 0.0,
) -> Schedule:
    """Return a schedule of the share of zeros, fast at first and slow in the end.

    s(t) = share + (first - share) (1 - (t - begin) / (end - begin))^3: Zhu and Gupta
    2017, "To prune, or not to prune", equation 1.

    >>> schedule = rising(0.8, begin=100, end=300)
    >>> [round(float(schedule(step)), 3) for step in (0, 100, 200, 300, 400)]
    [0.0, 0.0, 0.7, 0.8, 0.8]

    Args:
      share: of zeros in the end, from 0 to below 1.
      begin: the step at which it begins to rise.
      end: the step from which on it stays.
      first: the share up to `begin`.

    Raises:
      SettingError: a share is none, or the end is not after the beginning.
    """
    if not 0 <= first <= share < 1:
        raise SettingError(
            f"the share of zeros goes from {first!r} to {share!r}",
            where="share",
            remedy="let 0 <= first <= share < 1",
        )
    if not 0 <= begin < end:
        raise SettingError(
            f"the share of zeros rises from step {begin!r} to step {end!r}",
            where="end",
            remedy="let 0 <= begin < end",
        )

    def schedule(step: Any) -> Any:
        passed = jnp.clip((step - begin) / (end - begin), 0.0, 1.0)
        return share + (first - share) * (1 - passed) ** 3

    return schedule


def pruning(
    make: Callable[..., optax.GradientTransformation],
    prune: optax.GradientTransformation,
    **settings: Any,
) -> Callable[[Any], optax.GradientTransformation]:
    """Return an optimizer, a function of the learning rate, that prunes.

    Args:
      make: an optimizer as a function of the rate, such as `optax.adamw`.
      prune: `magnitude(...)`, `n_of_m(...)` or `channels_off(...)`.
      **settings: of `make`.
    """
    return partial(_chained, make=partial(make, **settings), prune=prune)


def magnitude(
    share: float | Schedule,
    *,
    every: int = EVERY,
) -> optax.GradientTransformation:
    """Return a transformation that zeroes the smallest numbers of each weight.

    Args:
      share: of zeros in each weight of two dims or more, or its schedule.
      every: steps between choices.
    """
    schedule = _schedule(share)

    def choose(
        path: str,
        value: jax.Array,
        count: jax.Array,
    ) -> jax.Array:
        zeros = jnp.floor(schedule(count) * value.size).astype(jnp.int32)
        ranks = _ranks(jnp.abs(value).reshape(-1))
        return ranks.reshape(value.shape) >= zeros

    return _masking(choose, every)


def n_of_m(
    n: int = 2,
    m: int = 4,
    *,
    every: int = EVERY,
) -> Any:
    """Return a transformation that leaves n of each m inputs of an output.

    It saves nothing where no backend runs such weights, and XLA has none.

    Args:
      n: numbers that stay.
      m: of so many, a divisor of a weight's inputs; others are left whole.
      every: steps between choices.

    Raises:
      SettingError: n is not from 1 to below m.
    """
    if not 1 <= n < m:
        raise SettingError(
            f"{n!r} of {m!r} numbers are to stay",
            where="n",
            remedy="let 1 <= n < m, such as 2 of 4",
        )

    def choose(
        path: str,
        value: jax.Array,
        count: jax.Array,
    ) -> jax.Array:
        inputs = value.shape[-2]
        if inputs % m:
            return jnp.ones(value.shape, bool)
        by_output = jnp.swapaxes(jnp.abs(value), -1, -2)
        stays = _ranks(by_output.reshape(-1, m)) >= m - n
        outputs = (*value.shape[:-2], value.shape[-1], inputs)
        return jnp.swapaxes(stays.reshape(outputs), -1, -2)

    return _masking(choose, every)


def channels_off(
    groups: Sequence[Channels],
    share: float | Schedule,
    *,
    every: int = EVERY,
) -> optax.GradientTransformation:
    """Return a transformation that zeroes the weakest channels, all weights of each.

    Weak is a channel with a small norm of its weights, each weight's norms divided by
    their mean (Li et al. 2017, "Pruning Filters for Efficient ConvNets", for groups).

    Args:
      groups: of channels, as `channels(trainer)` returns them.
      share: of the channels of each group, or its schedule.
      every: steps between choices.
    """
    schedule = _schedule(share)

    def update(
        updates: Any,
        state: MaskState,
        params: Any = None,
    ) -> Any:
        _check_params(params)

        def fresh() -> Any:
            return _channel_masks(groups, params, schedule(state.updates))

        return _masked(updates, state, params, fresh, every)

    def init(params: Any) -> MaskState:
        return MaskState(jnp.int32(0), jax.tree.map(_all_stay, params))

    return optax.GradientTransformation(init, update)


def zeros(trainer: Any) -> dict[str, float]:
    """Return the share of zeros in each weight of two dims or more, by path."""
    params = by_path(trainer.state.params)
    return {
        path: float(np.mean(np.asarray(value) == 0))
        for path, value in params.items()
        if value.ndim >= LEAST_DIMS
    }


# ---- internals ----


def _chained(
    rate: Any,
    *,
    make: Callable[..., Any],
    prune: optax.GradientTransformation,
) -> optax.GradientTransformation:
    return optax.chain(make(rate), prune)


def _schedule(share: float | Schedule) -> Schedule:
    if callable(share):
        return share
    if not 0 <= share < 1:
        raise SettingError(
            f"a share of {share!r} is to become zero",
            where="share",
            remedy="give a share from 0 to below 1, or rising(...)",
        )
    return optax.constant_schedule(share)


def _masking(
    choose: Callable[[str, jax.Array, jax.Array], jax.Array],
    every: int,
) -> optax.GradientTransformation:
    """Return a transformation with a mask for each weight by itself."""

    def init(params: Any) -> MaskState:
        return MaskState(jnp.int32(0), jax.tree.map(_all_stay, params))

    def update(
        updates: Any,
        state: MaskState,
        params: Any = None,
    ) -> Any:
        _check_params(params)

        def chosen(
            path: Any,
            value: jax.Array,
        ) -> jax.Array:
            if value.ndim < LEAST_DIMS:
                return _all_stay(value)
            return choose(path_of(path), value, state.updates)

        def fresh() -> Any:
            return jax.tree_util.tree_map_with_path(chosen, params)

        return _masked(updates, state, params, fresh, every)

    return optax.GradientTransformation(init, update)


def _masked(
    updates: Any,
    state: MaskState,
    params: Any,
    fresh: Callable[[], Any],
    every: int,
) -> tuple[Any, MaskState]:
    """Return updates after which what is pruned is zero, and the state."""
    is_due = state.updates % every == 0
    masks = jax.lax.cond(is_due, fresh, lambda: state.masks)

    def pruned(
        update: jax.Array,
        mask: jax.Array,
        value: jax.Array,
    ) -> jax.Array:
        return jnp.where(mask, update, -value.astype(update.dtype))

    made = jax.tree.map(pruned, updates, masks, params)
    return made, MaskState(state.updates + 1, masks)


def _all_stay(value: jax.Array) -> jax.Array:
    shape = value.shape if value.ndim >= LEAST_DIMS else ()
    return jnp.ones(shape, bool)


def _ranks(values: jax.Array) -> jax.Array:
    """Return the rank of each number along the last dim, 0 for the smallest."""
    order = jnp.argsort(values, axis=-1)
    return jnp.argsort(order, axis=-1)


def _channel_masks(
    groups: Sequence[Channels],
    params: Any,
    share: jax.Array,
) -> Any:
    weights = by_path(params)
    masks = {path: _all_stay(value) for path, value in weights.items()}
    for group in groups:
        gone = jnp.floor(share * group.size).astype(jnp.int32)
        stays = _ranks(_strength(group, weights)) >= gone
        for place in group.places:
            value: Any = weights.get(place.path)
            if _has_channels(value, group, place):
                own = mask_of(value.shape, place, stays)
                masks[place.path] = masks[place.path] & own
    leaves = [masks[path] for path in weights]
    return with_leaves(params, leaves)


def _strength(
    group: Channels,
    weights: Any,
) -> jax.Array:
    total = jnp.zeros(group.size)
    for place in group.places:
        value = weights.get(place.path)
        if not _has_channels(value, group, place):
            continue
        rows = jnp.moveaxis(value, place.dim, 0)
        parts = rows.reshape(place.outer, group.size, -1)
        norms = jnp.sqrt(jnp.sum(parts**2, axis=(0, 2)))
        total += norms / (jnp.mean(norms) + jnp.finfo(norms.dtype).tiny)
    return total


def _has_channels(
    value: Any,
    group: Channels,
    place: Place,
) -> bool:
    """Whether a weight has the channels: a trial's, of few entries, has not."""
    if value is None or value.ndim < LEAST_DIMS:
        return False
    return value.shape[place.dim] == place.outer * group.size * place.inner


def _check_params(params: Any) -> None:
    if params is None:
        raise ValueError(optax.NO_PARAMS_MSG)
