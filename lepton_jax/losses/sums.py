"""Weighted sums of losses and metrics over the samples that count.

A loss or metric is a function (outputs, targets) of batches. It returns one value per
sample, shape (batch, ...); or a pair (values, weights) of that shape for a weighted
mean; or a scalar that is already the batch's mean. A metric with a `finish` may also
return several arrays, shape (batch, ...) each, in a dict or a tuple: each is averaged
over the samples.

A *weighted sum* is the pair (sum, weight) of such values over a batch. Its ratio is the
mean, and the weighted sums of micro-batches or hosts can be added up. A small example:
three samples, the last of which is padding:

>>> from lepton_jax.losses import squared_error
>>> outputs = jnp.array([[1.0], [4.0], [9.0]])
>>> targets = jnp.array([[0.0], [1.0], [0.0]])
>>> valid = jnp.array([True, True, False])
>>> total, weight = weighted_sum(squared_error, outputs, targets, valid)
>>> float(total), float(weight), float(mean(total, weight))
(10.0, 2.0, 5.0)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lepton_jax.augment import first_of, loss_of
from lepton_jax.compat import whole_axes
from lepton_jax.errors import ModelError, pointing_at_user
from lepton_jax.losses.stock import STOCK
from lepton_jax.trees import by_path, is_real, shapes

# ---- weighted sums of one function ----


def weighted_sum(
    function: Callable,
    outputs: Any,
    targets: Any,
    valid: jax.Array | None = None,
    differentiable: bool = False,
    several: bool = False,
) -> tuple[Any, Any]:
    """Return the weighted sum of a loss or metric over a batch.

    A scalar is the mean of its batch already: its weight is 1, or where `valid` is
    given the batch's rows, all of which must be real then.

    Args:
      function: as described at the top of this module.
      outputs: the model's outputs.
      targets: the desired outputs, batch dim first.
      valid: bool (batch,), False where a row is padding; None: every row counts.
      differentiable: whether a value that has no gradient is an error.
      several: whether the function may return several arrays, in a dict or a tuple.
        Then the sums have their structure, and their shapes without the batch dim.

    Raises:
      ModelError: the function fails, or its value is not as described.
    """
    result = values(function, outputs, targets, several)
    if isinstance(result, Several):
        return _column_sums(result.arrays, valid)

    each, weights = result if isinstance(result, tuple) else (result, None)
    if differentiable and not jnp.issubdtype(jnp.result_type(each), jnp.floating):
        raise ModelError(
            f"{_name(function)} returned {_described(each)}, which has no gradient",
            where=_where(function),
            remedy="return a floating-point loss; what counts errors is a metric",
        )
    if jnp.ndim(each) == 0:
        if valid is None:
            return each, 1.0
        rows = valid.sum().astype(jnp.float32)
        return each * rows, rows

    each = _as_float(each)
    if valid is not None:
        each, weights = _without_padding(each, weights, valid)
    if weights is None:
        return each.sum(), float(each.size)
    return (each * weights).sum(), weights.sum()


class Several(NamedTuple):
    """Arrays of shape (batch, ...) that a metric averages one by one."""

    arrays: Any


def values(
    function: Callable,
    outputs: Any,
    targets: Any,
    several: bool = False,
) -> Any:
    """Apply a loss or metric to a batch and check what it returns.

    Returns:
      An array with one value per sample, a pair of them (values, weights), a scalar, or
      `Several` of them where `several` allows it.

    Raises:
      ModelError: the function fails, or returns something else.
    """
    each, weights = _checked(function, outputs, targets, several)
    if isinstance(each, Several):
        return each
    return jnp.asarray(each) if weights is None else (jnp.asarray(each), weights)


def mean(total: Any, weight: Any) -> Any:
    """Return the mean behind a weighted sum, or each mean of a tree of sums."""
    return jax.tree.map(lambda x: x / weight, total)


def _as_float(x: Any) -> jax.Array:
    """Return values in the dtype in which they are summed: at least float32."""
    x = jnp.asarray(x)
    whole = jnp.issubdtype(x.dtype, jnp.bool_) or jnp.issubdtype(x.dtype, jnp.integer)
    # fifty losses of 2,000 are beyond float16
    narrow = is_real(x) and x.dtype.itemsize < 4
    return x.astype(jnp.float32) if whole or narrow else x


def _as_rows(
    valid: jax.Array,
    ndim: int,
) -> jax.Array:
    """Return `valid`, (batch,), in a shape that broadcasts against (batch, ...)."""
    return valid.reshape(valid.shape + (1,) * (ndim - 1))


def _without_padding(
    each: jax.Array,
    weights: Any,
    valid: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Return values and weights that are 0 in padded rows."""
    rows = _as_rows(valid, each.ndim)
    # where, not a product: a padded row may hold NaN
    each = jnp.where(rows, each, 0)
    if weights is None:
        weights = jnp.ones_like(each)
    return each, jnp.where(rows, weights, 0)


def _column_sums(
    arrays: Any,
    valid: jax.Array | None,
) -> tuple[Any, Any]:
    """Return the sums of arrays over the batch dim, and the number of rows."""

    def total(x: Any) -> jax.Array:
        x = _as_float(x)
        if valid is not None:
            x = jnp.where(
                _as_rows(valid, x.ndim),
                x,
                0,
            )
        return x.sum(axis=0)

    rows = len(jax.tree.leaves(arrays)[0]) if valid is None else valid.sum()
    return jax.tree.map(total, arrays), jnp.float32(rows)


# ---- weighted sums of a step ----


def discounted(
    function: Callable,
    outputs: Any,
    targets: Any,
    knobs: Mapping[str, Any],
) -> dict[str, tuple[Any, Any]]:
    """Measure the signals of the knobs `loss_limit` and `loss_mark` over a batch.

    A sample whose loss is l has the weight sigmoid(limit - l), constant for the
    gradient; it is 1 where the limit is infinite. Of a loss per token, each token is a
    sample.

    Args:
      function: the loss, as in `weighted_sum`. One that is a scalar is taken sample by
        sample.
      outputs: the model's outputs.
      targets: the desired outputs.
      knobs: values of knobs by name.

    Returns:
      Weighted sums by the names of the signals. With "loss_limit" there is "loss_kept",
      the discounted loss, which is differentiated in place of the plain one; with
      "loss_mark", "mark_weight" and "mark_weight_square"; with either, "loss_blank" and
      "loss_values" (see `controllers.SIGNALS`).
    """
    if knobs.keys().isdisjoint(("loss_limit", "loss_mark")):
        return {}
    each, weights, scalar = _by_value(function, outputs, targets)
    constant = jax.lax.stop_gradient(each)
    sums = {
        "loss_blank": (_blank_loss(function, outputs, targets), jnp.float32(1)),
        "loss_values": (jnp.float32(each.size), jnp.float32(each.shape[0])),
    }
    if "loss_limit" in knobs:
        limit = knobs["loss_limit"]
        sums["loss_kept"] = _discounted_sum(each, weights, scalar, limit, constant)
    if "loss_mark" in knobs:
        share = jax.nn.sigmoid(knobs["loss_mark"] - constant)
        sums["mark_weight"] = ((share * weights).sum(), weights.sum())
        sums["mark_weight_square"] = ((share**2 * weights).sum(), weights.sum())
    return sums


def _discounted_sum(
    each: jax.Array,
    weights: jax.Array,
    scalar: Any,
    limit: Any,
    constant: jax.Array,
) -> tuple[Any, Any]:
    """Return the weighted sum of losses that are discounted above a limit.

    Args:
      each: the losses.
      weights: their weights.
      scalar: the batch's own mean, if the loss is a scalar; else None.
      limit: the knob `loss_limit`.
      constant: the losses without a gradient.
    """
    unlimited = limit == jnp.inf
    discount = jnp.where(
        unlimited,
        0,
        jax.nn.sigmoid(constant - limit),
    )
    whole = 1.0 if scalar is not None else weights.sum()
    missing = (discount * weights).sum()
    kept = (each * (1 - discount) * weights).sum()
    # the batch's own mean, to the bit, where nothing is discounted
    if scalar is not None:
        kept = jnp.where(limit == jnp.inf, scalar, kept)
    # the weight of all samples, not of those that count: the gradient is that of a
    # likelihood. The product is there because XLA would fold a constant to other bits
    return kept, whole + 0 * missing


def _by_value(
    function: Callable,
    outputs: Any,
    targets: Any,
) -> tuple[jax.Array, jax.Array, Any]:
    """Return each value of a loss, its weight, and the loss if it is a scalar."""
    each, weights = _checked(function, outputs, targets)
    scalar = each if jnp.ndim(each) == 0 else None
    if scalar is not None:
        each = _by_sample(function, outputs, targets)
        # so that a micro-batch weighs 1, as in `weighted_sum`
        weights = jnp.full_like(each, 1 / each.size)
    each = _as_float(each)
    return each, jnp.ones_like(each) if weights is None else weights, scalar


def _blank_loss(
    function: Callable,
    outputs: Any,
    targets: Any,
) -> jax.Array:
    """Return the loss of one sample under outputs that are all zero."""

    def zeros_of_first(x: Any) -> Any:
        first = x[:1] if jnp.ndim(x) else x
        # not zeros: XLA would fold them, which takes long
        return 0 * first

    zeros = jax.tree.map(zeros_of_first, outputs)
    first = jax.tree.map(lambda x: x[:1], targets)
    loss, weights = _checked(function, zeros, first)
    weights = jnp.ones_like(loss) if weights is None else weights
    blank = jnp.sum(loss * weights) / jnp.sum(weights)
    return jax.lax.stop_gradient(blank)


def with_auxiliary(
    sums: dict[str, tuple[Any, Any]],
    weights: Mapping[str, float],
    sown: Mapping[str, Any],
) -> dict[str, tuple[Any, Any]]:
    """Add the values that the model sowed to the mean loss of a batch.

    Over micro-batches the sums are added up: the auxiliary terms are then averaged with
    the weights that the micro-batches' losses have, which is their mean where each
    holds as many samples that count.

    Args:
      sums: weighted sums by name, as `measure` and `discounted` return them.
      weights: `Recipe.auxiliary`.
      sown: values by the same names; of each array the mean counts.

    Returns:
      The weighted sums, those of the losses with the auxiliary terms.
    """
    if not weights:
        return sums
    total = jnp.float32(0)
    for name, weight in weights.items():
        leaves = jax.tree.leaves(sown[name])
        means = [jnp.mean(jnp.asarray(x, jnp.float32)) for x in leaves]
        total = total + weight * sum(means)
    added = {}
    for name in ("loss", "loss_kept"):
        if name in sums:
            value, samples = sums[name]
            value = value + total * jax.lax.stop_gradient(samples)
            added[name] = (value, samples)
    return sums | added


def measure(
    recipe: Any,
    outputs: Any,
    targets: Any,
    valid: jax.Array | None = None,
    without: Sequence[str] = (),
) -> dict[str, tuple[Any, Any]]:
    """Measure the recipe's loss and metrics over a batch.

    Args:
      recipe: the loss and the metrics.
      outputs: the model's outputs.
      targets: the desired outputs. Where samples were mixed (`augment.Mixed`), the loss
        is mixed as they are, and metrics see each sample's own target.
      valid: as in `weighted_sum`.
      without: metrics that are left out.

    Returns:
      The weighted sum of the loss, under "loss", and of each metric under its name.

    Raises:
      ModelError: the outputs have no gradient; a function fails or returns something
        else than it may; a metric's `finish` gives no number.
    """
    if not jnp.issubdtype(jnp.result_type(*jax.tree.leaves(outputs)), jnp.inexact):
        raise ModelError(
            f"the model returned {shapes(outputs)}, which has no gradient",
            where="Recipe.model",
            remedy=(
                "return floating-point outputs, e.g. logits instead of the labels"
                " chosen by them"
            ),
        )
    loss = weighted_sum(
        loss_of(recipe.loss, targets),
        outputs,
        targets,
        valid,
        differentiable=True,
    )
    sums = {"loss": loss}
    targets = first_of(targets)
    for name, metric in recipe.metrics.items():
        if name in without:
            continue
        function, several = sums_of(metric)
        sums[name] = weighted_sum(
            function,
            outputs,
            targets,
            valid,
            several=several,
        )
        _check_finish(name, metric, sums[name])
    return sums


# ---- metrics ----


def sums_of(metric: Any) -> tuple[Callable, bool]:
    """Return a metric's averaged function, and whether it may give several arrays."""
    return getattr(metric, "values", metric), hasattr(metric, "finish")


def _check_finish(
    name: str,
    metric: Any,
    sums: tuple[Any, Any],
) -> None:
    """Check that a metric makes one number of its means."""
    close = getattr(metric, "finish", None)
    if close is None:
        return
    with pointing_at_user(
        f"finish of the metric {name!r}",
        "let it take what `values` returns, averaged over samples",
        where=_where(close),
    ):
        result = jax.eval_shape(lambda pair: close(mean(*pair)), sums)
    leaves = jax.tree.leaves(result)
    scalar = len(leaves) == 1 and leaves[0].shape == ()
    if not scalar or jnp.issubdtype(leaves[0].dtype, jnp.complexfloating):
        raise ModelError(
            f"finish of the metric {name!r} returned {shapes(result)}; a metric is one"
            " number",
            where=_where(close),
            remedy="return a scalar; for a confusion matrix or a curve, use predict",
        )


def finish(
    recipe: Any,
    name: str,
    mean: Any,
) -> Any:
    """Finish a metric from its mean, or its means; a loss is its mean."""
    close = getattr(recipe.metrics.get(name), "finish", None)
    return mean if close is None else close(mean)


# ---- checks of a function's values ----


def _checked(
    function: Callable,
    outputs: Any,
    targets: Any,
    several: bool = False,
) -> tuple[Any, Any]:
    """Return (values, weights or None) of a function.

    Raises:
      ModelError: they are not as described at the top of this module.
    """
    name = _name(function)
    where = _where(function)
    batch = _batch_size(outputs, targets)
    given = f"outputs {shapes(outputs)} and targets {shapes(targets)}"
    remedy = _remedy(function, outputs)
    with pointing_at_user(f"{name} of {given}", remedy, where=where):
        result = whole_axes(function)(outputs, targets)

    pair = _is_pair(result)
    if several and not pair and isinstance(result, dict | tuple | list):
        return _several(result, batch, name, where), None

    each, weights = result if pair else (result, None)
    if not _are_numbers(each, weights):
        sums = "; several sums need a lepton_jax.metrics.Metric(values, finish)"
        raise ModelError(
            f"{name} returned {_described(result)}",
            where=where,
            remedy=(
                "return real numbers: an array, or a pair of arrays of one shape"
                f" (values, weights){'' if several else sums}"
            ),
        )
    by_sample = jnp.shape(each)[:1] == (batch,)
    scalar_mean = jnp.ndim(each) == 0 and weights is None
    if not by_sample and not scalar_mean:
        raise ModelError(
            f"{name} returned shape {jnp.shape(each)} for a batch of {batch} samples",
            where=where,
            remedy="return one value per sample, batch dim first, or a scalar mean",
        )
    if _is_crossed(each, outputs, targets):
        raise ModelError(
            f"{name} returned shape {each.shape}: it set each output against each"
            f" target, of {given}",
            where=where,
            remedy=(
                "give outputs and targets one shape, e.g. return x[:, 0] or pass y[:,"
                " None]"
            ),
        )
    return each, weights


def _remedy(function: Callable, outputs: Any) -> str:
    if isinstance(outputs, jax.Array):
        return "give targets, or a model, of the shapes and dtypes that it takes"
    name = _name(function)
    short = next((n for stock, n in STOCK.items() if stock is function), name)
    return (
        f"the model returns {_structure(outputs)}: choose what the function takes,"
        f" e.g. lambda outputs, targets: {short}({_likeliest(outputs)}, targets)"
    )


def _is_pair(result: Any) -> bool:
    """Whether a result is a pair (values, weights); a named tuple is several arrays."""
    if not isinstance(result, tuple) or hasattr(result, "_fields"):
        return False
    return len(result) == 2


def _are_numbers(each: Any, weights: Any) -> bool:
    if weights is None:
        return _is_real(each)
    if not _is_real(each) or not _is_real(weights):
        return False
    return jnp.shape(each) == jnp.shape(weights)


def _several(
    result: Any,
    batch: int,
    name: str,
    where: str,
) -> Several:
    leaves = by_path(result)
    for path, leaf in leaves.items():
        if not _is_real(leaf) or jnp.shape(leaf)[:1] != (batch,):
            raise ModelError(
                f"{name} returned {_described(leaf)} as {path!r} for a batch of {batch}"
                " samples",
                where=where,
                remedy=(
                    "return real arrays with the batch dim first; finish gets their"
                    " means"
                ),
            )
    if not leaves:
        raise ModelError(
            f"{name} returned {result!r}",
            where=where,
            remedy="return at least one array",
        )
    return Several(result)


def _by_sample(
    function: Callable,
    outputs: Any,
    targets: Any,
) -> jax.Array:
    """Apply a function of a batch to each of its samples alone.

    Args:
      function: (outputs, targets) to a scalar.
      outputs: the model's; scalars among them go to each sample.
      targets: batch dim first.
    """
    leaves, form = jax.tree.flatten(outputs)
    batched = [jnp.ndim(x) > 0 for x in leaves]

    def of_sample(
        row: list[Any],
        target: Any,
    ) -> Any:
        pairs = zip(row, batched, strict=True)
        one = [x[None] if is_batched else x for x, is_batched in pairs]
        targets = jax.tree.map(lambda x: x[None], target)
        return whole_axes(function)(jax.tree.unflatten(form, one), targets)

    axes = [0 if is_batched else None for is_batched in batched]
    return jax.vmap(of_sample, in_axes=(axes, 0))(leaves, targets)


def _batch_size(outputs: Any, targets: Any) -> int:
    """Return the size of the batch dim; among the outputs there may be scalars."""
    leaves = jax.tree.leaves((targets, outputs))
    return next(x.shape[0] for x in leaves if jnp.ndim(x))


def _structure(outputs: Any) -> str:
    """Describe a tree by its arrays' dtypes and shapes: {"logits": float32[8, 3]}."""
    if isinstance(outputs, dict):
        parts = [f'"{name}": {_structure(x)}' for name, x in outputs.items()]
        return "{" + ", ".join(parts) + "}"
    if isinstance(outputs, tuple | list):
        names = getattr(outputs, "_fields", ())
        parts = [_structure(x) for x in outputs]
        if names:
            parts = [f"{n}={x}" for n, x in zip(names, parts, strict=True)]
        return "(" + ", ".join(parts) + ")"
    return _described(outputs) if outputs is not None else "None"


def _likeliest(outputs: Any) -> str:
    """Return an expression for the likeliest of several outputs.

    It is the first one of real numbers whose name speaks of logits, or else the first
    one of real numbers.
    """
    candidates = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(outputs)[0]:
        if jnp.ndim(leaf) and is_real(leaf):
            key = jax.tree_util.keystr(path).replace("'", '"')
            candidates.append(f"outputs{key}")
    logits = [text for text in candidates if "logit" in text]
    return next(iter([*logits, *candidates]), "outputs[0]")


def _is_crossed(
    values: Any,
    outputs: Any,
    targets: Any,
) -> bool:
    """Whether both outputs and targets were broadcast.

    For example, (batch, 1) against (batch,) gives (batch, batch).
    """
    if not isinstance(outputs, jax.Array) or not isinstance(targets, jax.Array):
        return False
    if jnp.shape(values) in ((), (1, 1)):
        return False
    try:
        both = jnp.broadcast_shapes(outputs.shape, targets.shape)
    except ValueError:
        return False
    return values.shape == both and both not in (outputs.shape, targets.shape)


def _is_real(x: Any) -> bool:
    kinds = jax.Array | np.ndarray | np.generic | float | int
    return isinstance(x, kinds) and not jnp.iscomplexobj(x)


# ---- words for messages ----


def _described(x: Any) -> str:
    if isinstance(x, tuple):
        return f"({', '.join(map(_described, x))})"
    if hasattr(x, "dtype"):
        return f"{x.dtype}{list(x.shape)}"
    return f"a {type(x).__name__}"


def _bare(function: Any) -> Any:
    """Return the function within a `functools.partial`."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _name(function: Callable) -> str:
    function = _bare(function)
    return getattr(function, "__name__", type(function).__name__)


def _where(function: Callable) -> str:
    function = _bare(function)
    code = getattr(function, "__code__", None)
    name = _name(function)
    return f"{name}, {code.co_filename}:{code.co_firstlineno}" if code else name
