"""Structured pruning: channels are taken out of the weights, which become smaller.

The channels to go are those whose removal changes the loss least, to first order: that
change is the sum over a channel's weights of weight times gradient (Molchanov et al.
2019, "Importance Estimation for Neural Network Pruning", section 3.1). It is squared
and summed over batches of training rows.

A module without the channels computes what the whole one does with zeros in their
place; that is checked on a batch for each cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lepton_jax import losses
from lepton_jax.data import Arrays
from lepton_jax.errors import ModelError, SettingError, nearest
from lepton_jax.ship.shrink.calls import called, preprocessed, some_inputs
from lepton_jax.ship.shrink.channels import Channels, Place, channels_of
from lepton_jax.ship.shrink.measuring import ROWS as ROWS_TIMED
from lepton_jax.ship.shrink.measuring import latencies_of
from lepton_jax.ship.shrink.packed import name_of
from lepton_jax.ship.shrink.quantization import nnx_module
from lepton_jax.trees import is_real, matches

# Training rows by which channels are judged, and those of a batch. Assumption: more
# change the order of few channels.
ROWS = 1024
BATCH = 128
SEED = 0  # of the rows that are drawn, and of the batch that a cut is checked on
FEW = 4  # rows that a cut is checked on

# Groups that are timed without one of them, at most: each is a compilation.
MOST_GROUPS = 16
# Share of the time with all groups cut below which one is left whole. Assumption: less
# is noise.
CLEARLY = 0.9

# Largest difference of a cut module from the whole one with zeros, as a share of the
# largest output: float32 adds up other terms in another order.
TOLERANCE = 1e-3


def channels(trainer: Any) -> list[Channels]:
    """Return the channels of a trained model that can be cut.

    Args:
      trainer: with the model, an NNX module.

    Raises:
      ModelError: it is none, or is quantized.
    """
    return channels_of(nnx_module(trainer), some_inputs(trainer))


def cut(
    trainer: Any,
    share: float = 0.5,
    *,
    only: Sequence[str] = ("*",),
    **changes: Any,
) -> Any:
    """Return a trainer with a copy of the model that has fewer channels.

    Of each of the groups of channels the least important ones go. Then train it for a
    while, which brings most of the lost metric back:

    >>> small = shrink.cut(trainer, 0.5, learning_rate=1e-3)  # doctest: +SKIP
    >>> small.fit(epochs=2)  # doctest: +SKIP

    Args:
      trainer: with the trained model, an NNX module.
      share: of the channels that go, from 0 to below 1.
      only: patterns of names of groups (see `channels`).
      **changes: fields of the recipe for what is trained afterwards.

    Returns:
      A `Trainer`; its `cut` says how many channels of which group are left.

    Raises:
      SettingError: the share is none, or a pattern matches no group.
      ModelError: nothing can be cut.
    """
    if not 0 <= share < 1:
        raise SettingError(
            f"a share of {share!r} of the channels is to go",
            where="share",
            remedy="give a share from 0 to below 1, such as 0.5",
        )
    module = nnx_module(trainer)
    groups = _chosen(channels_of(module, some_inputs(trainer)), only, module)
    importance = importances(trainer, module, groups)
    kept = {}
    for group in groups:
        count = group.size - int(share * group.size)
        order = np.argsort(-importance[group.name], kind="stable")
        kept[group.name] = np.sort(order[:count])
    smaller = without(module, groups, kept)
    check_cut(trainer, module, smaller, groups, kept)
    return trainer.with_module(smaller, **changes)


def quicker(
    trainer: Any,
    share: float = 0.5,
    rows: int = ROWS_TIMED,
) -> list[str]:
    """Return the names of the groups that are worth a cut on this device.

    A group is left out where the model with it whole is quicker than with it cut: XLA
    has other algorithms for other sizes. On a CPU (jax 0.10.2) a convolution of a grey
    picture with 16 filters takes five times as long as one with 32.

    Args:
      trainer: with the trained model, an NNX module.
      share: of the channels that go.
      rows: of the batch that is timed.

    Raises:
      ModelError: nothing can be cut.
    """
    module = nnx_module(trainer)
    groups = _chosen(
        channels_of(module, some_inputs(trainer)),
        ("*",),
        module,
    )
    if len(groups) > MOST_GROUPS:
        return [group.name for group in groups]

    def timed(own: Sequence[Channels]) -> Any:
        kept = {
            group.name: np.arange(group.size - int(share * group.size)) for group in own
        }
        return trainer.with_module(without(module, own, kept))

    models = [timed(groups)]
    models += [timed([other for other in groups if other is not g]) for g in groups]
    whole_cut, *without_one = latencies_of(models, rows)
    names = []
    for group, milliseconds in zip(groups, without_one, strict=True):
        if milliseconds > CLEARLY * whole_cut:
            names.append(group.name)
    return names or [group.name for group in groups]


def importances(
    trainer: Any,
    module: nnx.Module,
    groups: Sequence[Channels],
) -> dict[str, np.ndarray]:
    """Return how much the loss would change without each channel, by group.

    Without training rows in memory it is the squared norm of the channel's weights.

    Args:
      trainer: with the recipe and its data.
      module: the model.
      groups: of its channels.

    Returns:
      A vector for each group, of at least 0, larger for the more important.
    """
    train = trainer.recipe.train
    graph, params, *others = nnx.split(module, nnx.Param, ...)
    if not isinstance(train, Arrays):
        squares = jax.tree.map(jnp.square, _by_name(params))
        return {group.name: np.sqrt(_sums(squares, group)) for group in groups}

    def loss(
        params: Any,
        inputs: Any,
        targets: Any,
    ) -> jax.Array:
        whole = nnx.merge(graph, params, *others, copy=True)
        outputs = called(whole, preprocessed(trainer, inputs))
        total, weight = losses.measure(trainer.recipe, outputs, targets)["loss"]
        return total / weight

    gradient = jax.jit(jax.grad(loss))
    total = {group.name: np.zeros(group.size) for group in groups}
    for inputs, targets in _batches(train):
        slopes = gradient(params, inputs, targets)
        products = jax.tree.map(jnp.multiply, _by_name(params), _by_name(slopes))
        for group in groups:
            total[group.name] += _sums(products, group) ** 2
    return total


def without(
    module: nnx.Module,
    groups: Sequence[Channels],
    kept: Mapping[str, np.ndarray],
) -> nnx.Module:
    """Return a copy of a module with some of its channels.

    Args:
      module: the model.
      groups: of channels.
      kept: numbers of the channels that stay, ascending, by the group's name.
    """
    smaller = nnx.clone(module)
    for path, variable in nnx.to_flat_state(nnx.state(smaller)):
        name = name_of(path)
        value = variable.get_value()
        for group in groups:
            for place in group.places:
                if place.path == name:
                    value = _taken(value, group, place, kept[group.name])
        if value.shape != variable.get_value().shape:
            variable_at(smaller, path).set_value(value)
    for _, node in nnx.iter_modules(smaller):
        _tell_sizes(node)
    return smaller


def zeroed(
    module: nnx.Module,
    groups: Sequence[Channels],
    kept: Mapping[str, np.ndarray],
) -> nnx.Module:
    """Return a copy of a module with zeros in place of some of its channels."""
    copy = nnx.clone(module)
    for path, variable in nnx.to_flat_state(nnx.state(copy, nnx.Param)):
        value = variable.get_value()
        for group in groups:
            stays = np.isin(np.arange(group.size), kept[group.name])
            for place in group.places:
                if place.path == name_of(path):
                    value = value * mask_of(value.shape, place, jnp.asarray(stays))
        variable_at(copy, path).set_value(value)
    return copy


def check_cut(
    trainer: Any,
    module: nnx.Module,
    smaller: nnx.Module,
    groups: Sequence[Channels],
    kept: Mapping[str, np.ndarray],
) -> None:
    """Check that a cut module computes what the whole one does with zeros.

    Raises:
      ModelError: it does not, or can't be called.
    """
    inputs = _random_inputs(trainer)
    names = ", ".join(group.name for group in groups)
    remedy = f"cut some of the groups alone: only=[...] of {names}"
    try:
        outputs = called(smaller, inputs)
    except Exception as error:  # of the model's code, which may know its sizes
        raise ModelError(
            f"the model can't be called with fewer channels: {error}",
            where=type(module).__name__,
            remedy=remedy,
        ) from error
    expected = called(zeroed(module, groups, kept), inputs)
    made = jax.tree.leaves(outputs)
    wanted = jax.tree.leaves(expected)
    for one, other in zip(made, wanted, strict=True):
        largest = float(jnp.abs(other).max()) + 1e-6
        if float(jnp.abs(one - other).max()) > TOLERANCE * largest:
            raise ModelError(
                "with fewer channels the model computes something else than with zeros"
                " in their place",
                where=type(module).__name__,
                remedy=remedy,
            )


def mask_of(
    shape: Sequence[int],
    place: Place,
    stays: jax.Array,
) -> jax.Array:
    """Return a mask of channels, to multiply a weight of a shape with.

    Args:
      shape: of the weight.
      place: where its channels are.
      stays: bool (channels,).
    """
    spread = jnp.repeat(stays, place.inner)
    along = jnp.tile(spread, place.outer)
    dims = [1] * len(shape)
    dims[place.dim] = -1
    return along.reshape(dims)


def variable_at(
    module: Any,
    path: Sequence[Any],
) -> Any:
    """Return the variable at a path of a module."""
    node = module
    for key in path:
        node = node[key] if isinstance(key, int) else getattr(node, str(key))
    return node


# ---- internals ----


def _chosen(
    groups: Sequence[Channels],
    only: Sequence[str],
    module: nnx.Module,
) -> list[Channels]:
    if not groups:
        raise ModelError(
            "no channels can be cut: each is an input, an output, or meets the others"
            " in a norm or a loop",
            where=type(module).__name__,
            remedy="quantize the model instead",
        )
    names = [group.name for group in groups]
    for pattern in only:
        if not any(matches(name, pattern) for name in names):
            raise SettingError(
                f"no group of channels matches {pattern!r}{nearest(pattern, names)}",
                where="only",
                remedy=f"the groups are {', '.join(names)}",
            )
    return [
        group
        for group in groups
        if any(matches(group.name, pattern) for pattern in only)
    ]


def _batches(train: Arrays) -> list[tuple[Any, Any]]:
    rng = np.random.default_rng(SEED)
    count = min(ROWS, len(train))
    rows = rng.permutation(len(train))[:count]
    size = min(BATCH, count)
    starts = range(0, count - size + 1, size)
    return [train.take(rows[start : start + size]) for start in starts]


def _by_name(params: Any) -> dict[str, jax.Array]:
    flat = nnx.to_flat_state(params)
    return {name_of(path): variable.get_value() for path, variable in flat}


def _sums(
    arrays: Mapping[str, Any],
    group: Channels,
) -> np.ndarray:
    """Return the sum over each channel's entries, (channels,)."""
    total = np.zeros(group.size)
    for place in group.places:
        if place.path in arrays:
            array = np.asarray(arrays[place.path], np.float64)
            rows = np.moveaxis(array, place.dim, 0)
            parts = rows.reshape(place.outer, group.size, -1)
            total += parts.sum(axis=(0, 2))
    return total


def _taken(
    value: jax.Array,
    group: Channels,
    place: Place,
    kept: np.ndarray,
) -> jax.Array:
    """Return a weight with some of its channels.

    The extent along its dim may be smaller already by another group.
    """
    shape = value.shape
    before = shape[: place.dim]
    after = shape[place.dim + 1 :]
    inner = place.inner
    outer = shape[place.dim] // (group.size * inner)
    split = value.reshape(*before, outer, group.size, inner, *after)
    chosen = jnp.take(split, jnp.asarray(kept), axis=place.dim + 1)
    return chosen.reshape(*before, -1, *after)


def _random_inputs(trainer: Any) -> Any:
    """Return a small batch: rows of the training data, or noise."""
    train = trainer.recipe.train
    if isinstance(train, Arrays):
        first = np.arange(min(FEW, len(train)))
        inputs, _ = train.take(first)
        return preprocessed(trainer, jax.tree.map(jnp.asarray, inputs))
    rng = np.random.default_rng(SEED)

    def noise(x: jax.Array) -> jax.Array:
        if not is_real(x):
            return x
        return jnp.asarray(rng.normal(size=x.shape), x.dtype)

    return jax.tree.map(noise, some_inputs(trainer, FEW))


def _tell_sizes(node: nnx.Module) -> None:
    """Set the attributes by which a layer of Flax knows its sizes."""
    kernel = getattr(node, "kernel", None)
    if isinstance(node, nnx.Conv | nnx.ConvTranspose) and kernel is not None:
        node.kernel_shape = tuple(kernel.shape)
        node.in_features = kernel.shape[-2] * getattr(node, "feature_group_count", 1)
        node.out_features = kernel.shape[-1]
    elif isinstance(node, nnx.Linear) and kernel is not None:
        node.in_features, node.out_features = kernel.shape
    elif isinstance(node, nnx.BatchNorm | nnx.LayerNorm | nnx.RMSNorm):
        vectors = (getattr(node, name, None) for name in ("scale", "bias", "mean"))
        known = [vector for vector in vectors if vector is not None]
        if known:
            node.num_features = known[0].shape[0]
    elif isinstance(node, nnx.Embed):
        node.num_embeddings, node.features = node.embedding.shape
