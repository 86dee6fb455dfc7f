"""Losses of models with several outputs: one for each task, and their sum.

Outputs and targets are dicts (or tuples), and a task is one of their keys:

>>> import jax.numpy as jnp
>>> from lepton_jax.losses import cross_entropy, squared_error
>>> loss = sum_of({"age": (squared_error, 1.0), "sex": (cross_entropy, 0.5)})
>>> outputs = {"age": jnp.array([30.0, 41.0]), "sex": jnp.zeros((2, 2))}
>>> targets = {"age": jnp.array([31.0, 41.0]), "sex": jnp.array([0, 1])}
>>> print(loss(outputs, targets))
[1.3465736 0.3465736]
>>> sorted(implied_metrics(loss))
['age_loss', 'sex_loss']
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lepton_jax.errors import ModelError, RecipeError, nearest
from lepton_jax.losses.missing import known, known_values
from lepton_jax.losses.sums import values

WHERE = "losses.sum_of"


def sum_of(tasks: Mapping[Any, Any]) -> Callable:
    """Return the weighted sum of the losses of several tasks.

    Of one sample it is the sum over tasks of weight times loss, where the loss of a
    task with several values a sample is their mean; values of weight 0, such as missing
    targets, count as 0. So a task whose targets are often missing weighs as much less.

    Each task's own loss, over the targets that are there, is a metric of the recipe
    without further ado: "age_loss" of the task "age"; with `without_missing`, the share
    of targets that are there is "age_known".

    Args:
      tasks: key of outputs and targets to a loss, or to (loss, weight); without a
        weight it is 1.

    Raises:
      RecipeError: there is no task, or one is neither.
    """
    made: dict[Any, tuple[Callable, float]] = {}
    for key, given in dict(tasks).items():
        pair = given if isinstance(given, tuple | list) else (given, 1.0)
        _check_task(key, pair)
        made[key] = (pair[0], float(pair[1]))
    if not made:
        raise RecipeError(
            "there are no tasks",
            where=WHERE,
            remedy='give e.g. sum_of({"age": (losses.squared_error, 1.0)})',
        )
    return functools.partial(summed_tasks, tasks=made)


def summed_tasks(
    outputs: Any,
    targets: Any,
    *,
    tasks: Mapping[Any, tuple[Callable, float]],
) -> jax.Array:
    """Return the weighted sum of the tasks' losses, (batch,); see `sum_of`."""
    total: Any = 0.0
    for key, (loss, weight) in tasks.items():
        result = task_values(outputs, targets, key=key, loss=loss)
        each, weights = result if isinstance(result, tuple) else (result, 1.0)
        each = each * weights
        if each.ndim > 1:
            others = tuple(range(1, each.ndim))
            each = each.mean(axis=others)
        batch = len(jax.tree.leaves(targets)[0])
        total = total + weight * jnp.broadcast_to(each, (batch,))
    return total


def task_values(
    outputs: Any,
    targets: Any,
    *,
    key: Any,
    loss: Callable,
) -> Any:
    """Return what the loss of one task returns for its outputs and targets.

    Raises:
      ModelError: the model has no such output, the data no such target, or the loss
        fails.
    """
    return values(loss, *task_parts(outputs, targets, key))


def task_parts(outputs: Any, targets: Any, key: Any) -> tuple[Any, Any]:
    """Return the outputs and the targets of one task.

    Raises:
      ModelError: the model has no such output, or the data no such target.
    """
    own = _part(outputs, key, "the model's outputs", "Recipe.model")
    wanted = _part(targets, key, "the targets", "Recipe.train")
    return own, wanted


def task_known(outputs: Any, targets: Any, *, key: Any) -> jax.Array:
    """Return 1.0 for each target of a task that is there, else 0.0."""
    return known(outputs, _part(targets, key, "the targets", "Recipe.train"))


def implied_metrics(loss: Any) -> dict[str, Callable]:
    """Return the metrics that a loss brings along: its tasks', and shares of targets.

    Args:
      loss: any.
    """
    if not isinstance(loss, functools.partial):
        return {}
    if loss.func is known_values:
        return {"known": known}
    if loss.func is not summed_tasks:
        return {}
    metrics: dict[str, Callable] = {}
    for key, (own, _) in loss.keywords["tasks"].items():
        metrics[f"{key}_loss"] = functools.partial(task_values, key=key, loss=own)
        if isinstance(own, functools.partial) and own.func is known_values:
            metrics[f"{key}_known"] = functools.partial(task_known, key=key)
    return metrics


def is_implied(metric: Any) -> bool:
    """Whether a metric came along with a loss."""
    function = getattr(metric, "func", None)
    return metric is known or function in (task_values, task_known)


# ---- internals ----


def _check_task(key: Any, pair: Any) -> None:
    is_pair = len(pair) == 2 and callable(pair[0])
    weight: Any = pair[1] if is_pair else None
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if is_number and math.isfinite(weight) and weight >= 0:
        return
    raise RecipeError(
        f"the task {key!r} is {pair!r}",
        where=WHERE,
        remedy="give a loss, or a pair (loss, weight of at least 0)",
    )


def _part(tree: Any, key: Any, what: str, where: str) -> Any:
    """Return the part of a task.

    Raises:
      ModelError: there is none.
    """
    try:
        return tree[key]
    except (KeyError, IndexError, TypeError):
        pass
    names = [str(name) for name in tree] if isinstance(tree, Mapping) else []
    listed = ", ".join(names) or "one array alone"
    raise ModelError(
        f"{what} have no {key!r}, which is a task of the loss"
        f"{nearest(str(key), names)}",
        where=where,
        remedy=f"name tasks as they are named there: {listed}",
    )
