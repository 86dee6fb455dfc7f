"""Losses, which are Optax's, and their averages over samples that count.

A loss or metric is a function (outputs, targets) of batches. It returns one value per
sample, shape (batch, ...); or a pair (values, weights) of that shape for a weighted
mean; or a scalar that is already the batch's mean. A metric with a `finish` may also
return several arrays, shape (batch, ...) each, in a dict or a tuple: each is averaged
over the samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lepton_jax.compat import whole_axes
from lepton_jax.errors import ModelError, pointing_at_user
from lepton_jax.trees import by_path, shapes

cross_entropy = optax.softmax_cross_entropy_with_integer_labels
binary_cross_entropy = optax.sigmoid_binary_cross_entropy
squared_error = optax.squared_error
huber = optax.huber_loss
STOCK = {
    cross_entropy: "cross_entropy",
    binary_cross_entropy: "binary_cross_entropy",
    squared_error: "squared_error",
    huber: "huber",
}


def totals(
    function: Callable,
    outputs: Any,
    targets: Any,
    valid: jax.Array | None = None,
    differentiable: bool = False,
    several: bool = False,
) -> tuple[Any, Any]:
    """Sum of a loss or metric over a batch, and the weight that the sum stands for.

    Their ratio is the mean. A scalar is the mean of its batch already: its weight is 1,
    or where `valid` is given the batch's rows, all of which must be real then.

    Args:
      function: as described at the top of this module.
      outputs: the model's outputs.
      targets: what the samples should give, batch dim first.
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
        rows = 1.0 if valid is None else valid.sum().astype(jnp.float32)
        return (each, rows) if valid is None else (each * rows, rows)

    each = _as_float(each)
    if valid is not None:
        rows = valid.reshape(valid.shape + (1,) * (each.ndim - 1))
        # where, not a product: a padded row may hold NaN
        each = jnp.where(rows, each, 0)
        weights = jnp.where(
            rows,
            jnp.ones_like(each) if weights is None else weights,
            0,
        )
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
    """The mean of each sum of `totals`."""
    return jax.tree.map(lambda x: x / weight, total)


def _as_float(x: Any) -> jax.Array:
    """Values in the dtype in which they are summed: at least float32."""
    x = jnp.asarray(x)
    whole = jnp.issubdtype(x.dtype, jnp.bool_) or jnp.issubdtype(x.dtype, jnp.integer)
    # fifty losses of 2,000 are beyond float16
    narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4
    return x.astype(jnp.float32) if whole or narrow else x


def _column_sums(arrays: Any, valid: jax.Array | None) -> tuple[Any, Any]:
    def total(x: Any) -> jax.Array:
        x = _as_float(x)
        if valid is not None:
            x = jnp.where(
                valid.reshape(valid.shape + (1,) * (x.ndim - 1)),
                x,
                0,
            )
        return x.sum(axis=0)

    rows = len(jax.tree.leaves(arrays)[0]) if valid is None else valid.sum()
    return jax.tree.map(total, arrays), jnp.float32(rows)


def discounted(
    function: Callable,
    outputs: Any,
    targets: Any,
    knobs: Mapping[str, Any],
) -> dict[str, tuple[Any, Any]]:
    """What the knobs `loss_limit` and `loss_mark` make of a batch: (sum, weight) pairs
    by the names of the signals.

    A sample whose loss is l has the weight sigmoid(limit - l), constant for the
    gradient; it is 1 where the limit is infinite. Of a loss per token, each token is a
    sample.

    Args:
      function, outputs, targets: as of `totals`. A loss that is a scalar is taken
        sample by sample.
      knobs: with "loss_limit", there is "loss_kept", the weighted loss, which is what
        the gradient is taken of; with "loss_mark", "mark_weight" and
        "mark_weight_square"; with either, "loss_blank" and "loss_values" (see
        `controllers.SIGNALS`).
    """
    if not {"loss_limit", "loss_mark"} & knobs.keys():
        return {}
    values, weights = _checked(function, outputs, targets)
    scalar = values if jnp.ndim(values) == 0 else None
    if scalar is not None:
        values = _by_sample(function, outputs, targets)
        # so that a micro-batch weighs 1, as in `totals`
        weights = jnp.full_like(values, 1 / values.size)
    values = _as_float(values)
    weights = jnp.ones_like(values) if weights is None else weights
    constant = jax.lax.stop_gradient(values)
    found = {}
    # of one sample; not zeros, which XLA would fold, at length
    zeros = jax.tree.map(lambda x: 0 * (x[:1] if jnp.ndim(x) else x), outputs)
    first = jax.tree.map(lambda x: x[:1], targets)
    found["loss_blank"] = (
        jax.lax.stop_gradient(jnp.mean(_checked(function, zeros, first)[0])),
        jnp.float32(1),
    )
    found["loss_values"] = jnp.float32(values.size), jnp.float32(values.shape[0])
    if "loss_limit" in knobs:
        limit = knobs["loss_limit"]
        less = jnp.where(
            limit == jnp.inf,
            0,
            jax.nn.sigmoid(constant - limit),
        )
        whole = 1.0 if scalar is not None else weights.sum()
        missing = (less * weights).sum()
        kept = (values * (1 - less) * weights).sum()
        # the batch's own mean, to the bit, where nothing is discounted
        if scalar is not None:
            kept = jnp.where(
                limit == jnp.inf,
                scalar,
                kept,
            )
        # of all samples, not of those that count: the gradient is that of a likelihood.
        # XLA would fold a constant to other bits
        found["loss_kept"] = kept, whole + 0 * missing
    if "loss_mark" in knobs:
        share = jax.nn.sigmoid(knobs["loss_mark"] - constant)
        found["mark_weight"] = (share * weights).sum(), weights.sum()
        found["mark_weight_square"] = (share**2 * weights).sum(), weights.sum()
    return found


def with_auxiliary(
    sums: dict[str, tuple[Any, Any]],
    weights: Mapping[str, float],
    sown: Mapping[str, Any],
) -> dict[str, tuple[Any, Any]]:
    """The sums of a batch, with what the model sowed added to its mean loss.

    Over micro-batches the sums are added up: the auxiliary terms are then averaged with
    the weights that the micro-batches' losses have, which is their mean where each
    holds as many samples that count.

    Args:
      sums: (sum, weight) pairs by name, as of `measure` and `discounted`.
      weights: `Recipe.auxiliary`.
      sown: values by the same names; of each array the mean counts.
    """
    if not weights:
        return sums
    total = jnp.float32(0)
    for name, weight in weights.items():
        values = jax.tree.leaves(sown[name])
        means = [jnp.mean(jnp.asarray(x, jnp.float32)) for x in values]
        total = total + weight * sum(means)
    added = {}
    for name in ("loss", "loss_kept"):
        if name in sums:
            value, samples = sums[name]
            added[name] = value + total * jax.lax.stop_gradient(samples), samples
    return sums | added


def measure(
    recipe: Any,
    outputs: Any,
    targets: Any,
    valid: jax.Array | None = None,
    without: Sequence[str] = (),
) -> dict[str, tuple[Any, Any]]:
    """(sum, weight) of the recipe's loss, under "loss", and of each metric, over a
    batch.

    Args:
      recipe: whose loss and metrics.
      outputs, targets, valid: as of `totals`.
      without: metrics that are left out.

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
    found = {
        "loss": totals(
            recipe.loss,
            outputs,
            targets,
            valid,
            differentiable=True,
        )
    }
    for name, metric in recipe.metrics.items():
        if name in without:
            continue
        function, several = sums_of(metric)
        found[name] = totals(
            function,
            outputs,
            targets,
            valid,
            several=several,
        )
        _check_finish(name, metric, found[name])
    return found


def sums_of(metric: Any) -> tuple[Callable, bool]:
    """The function that a metric averages, and whether it may return several arrays."""
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
    if (
        len(leaves) != 1
        or leaves[0].shape != ()
        or jnp.issubdtype(leaves[0].dtype, jnp.complexfloating)
    ):
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
    return getattr(recipe.metrics.get(name), "finish", lambda x: x)(mean)


def decoder(loss: Callable) -> Callable[[Any], Any]:
    """What `predict` makes of the outputs of a model trained with `loss`, unless the
    recipe says otherwise.

    Integer labels come back as the most likely one (argmax over the last dim), binary
    labels as 0 or 1; otherwise the outputs as they are.
    """
    return (
        _most_likely
        if loss is cross_entropy
        else _zero_or_one
        if loss is binary_cross_entropy
        else _as_they_are
    )


def _most_likely(outputs: Any) -> Any:
    return jnp.argmax(outputs, axis=-1)


def _zero_or_one(outputs: Any) -> Any:
    return (outputs > 0).astype(jnp.int32)


def _as_they_are(outputs: Any) -> Any:
    return outputs


def _checked(
    function: Callable,
    outputs: Any,
    targets: Any,
    several: bool = False,
) -> tuple[Any, Any]:
    """(values, weights or None) that a function gives, if they are as described
    above.
    """
    name = _name(function)
    where = _where(function)
    batch = _samples(outputs, targets)
    given = f"outputs {shapes(outputs)} and targets {shapes(targets)}"
    remedy = "give targets, or a model, of the shapes and dtypes that it takes"
    if not isinstance(outputs, jax.Array):
        short = next((n for f, n in STOCK.items() if f is function), name)
        chosen = _chosen(outputs)
        remedy = (
            f"the model returns {_structure(outputs)}: choose what the function takes,"
            f" e.g. lambda outputs, targets: {short}({chosen}, targets)"
        )
    with pointing_at_user(f"{name} of {given}", remedy, where=where):
        result = whole_axes(function)(outputs, targets)

    pair = (
        isinstance(result, tuple)
        and len(result) == 2
        and not hasattr(result, "_fields")
    )
    if several and not pair and isinstance(result, dict | tuple | list):
        return _several(result, batch, name, where), None

    each, weights = result if pair else (result, None)
    if not _real(each) or (
        weights is not None
        and (not _real(weights) or jnp.shape(each) != jnp.shape(weights))
    ):
        sums = (
            ""
            if several
            else "; several sums need a lepton_jax.metrics.Metric(values, finish)"
        )
        raise ModelError(
            f"{name} returned {_described(result)}",
            where=where,
            remedy=(
                "return real numbers: an array, or a pair of arrays of one shape"
                f" (values, weights){sums}"
            ),
        )
    if jnp.shape(each)[:1] != (batch,) and (jnp.ndim(each) or weights is not None):
        raise ModelError(
            f"{name} returned shape {jnp.shape(each)} for a batch of {batch} samples",
            where=where,
            remedy="return one value per sample, batch dim first, or a scalar mean",
        )
    if _crossed(each, outputs, targets):
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


def _several(
    result: Any,
    batch: int,
    name: str,
    where: str,
) -> Several:
    leaves = by_path(result)
    for path, leaf in leaves.items():
        if not _real(leaf) or jnp.shape(leaf)[:1] != (batch,):
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
    """The value of a function of a batch for each of its samples alone.

    Args:
      function: (outputs, targets) to a scalar.
      outputs: the model's; scalars among them go to each sample.
      targets: batch dim first.
    """

    leaves, form = jax.tree.flatten(outputs)
    batched = [jnp.ndim(x) > 0 for x in leaves]

    def each(row: list[Any], target: Any) -> Any:
        one = [x[None] if b else x for x, b in zip(row, batched, strict=True)]
        return whole_axes(function)(
            jax.tree.unflatten(form, one), jax.tree.map(lambda x: x[None], target)
        )

    axes = [0 if b else None for b in batched]
    return jax.vmap(each, in_axes=(axes, 0))(leaves, targets)


def _samples(outputs: Any, targets: Any) -> int:
    """Size of the batch dim; among the outputs there may be scalars."""
    leaves = [x for x in jax.tree.leaves((targets, outputs)) if jnp.ndim(x)]
    return leaves[0].shape[0]


def _structure(outputs: Any) -> str:
    """A tree with its arrays' dtypes and shapes: {"logits": float32[8, 3]}."""
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


def _chosen(outputs: Any) -> str:
    """The likeliest of several outputs, as an expression: the first one of real numbers
    whose name speaks of logits, or else the first one."""
    found = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(outputs)[0]:
        if jnp.ndim(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating):
            found.append("outputs" + jax.tree_util.keystr(path).replace("'", '"'))
    logits = [text for text in found if "logit" in text]
    return [*logits, *found, "outputs[0]"][0]


def _crossed(
    values: Any,
    outputs: Any,
    targets: Any,
) -> bool:
    """Whether both outputs and targets were broadcast, as (batch, 1) against (batch,)
    is to (batch, batch).
    """
    if (
        not isinstance(outputs, jax.Array)
        or not isinstance(targets, jax.Array)
        or jnp.shape(values) in ((), (1, 1))
    ):
        return False
    try:
        both = jnp.broadcast_shapes(outputs.shape, targets.shape)
    except ValueError:
        return False
    return values.shape == both and both not in (outputs.shape, targets.shape)


def _real(x: Any) -> bool:
    return isinstance(
        x, jax.Array | np.ndarray | np.generic | float | int
    ) and not jnp.iscomplexobj(x)


def _described(x: Any) -> str:
    if isinstance(x, tuple):
        return f"({', '.join(map(_described, x))})"
    return (
        f"{x.dtype}{list(x.shape)}" if hasattr(x, "dtype") else f"a {type(x).__name__}"
    )


def _name(function: Callable) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _where(function: Callable) -> str:
    code = getattr(function, "__code__", None)
    return _name(function) + (
        f", {code.co_filename}:{code.co_firstlineno}" if code else ""
    )
