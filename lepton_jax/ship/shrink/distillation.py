"""Distillation: a small model learns what a large one answers.

The loss of a row is

    (1 - weight) * own loss  +  weight * T^2 * KL(teacher / T  ||  student / T)

of the softmax of the outputs over a temperature T, whose square keeps the gradient's
size (Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2). Of
outputs that are quantities, in place of the second term, it is half the squared
distance.

The teacher is asked once for each row, before training, and its answers travel with the
targets: they are shuffled, split and checkpointed as these are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_jax import losses
from lepton_jax.data import Arrays, settled
from lepton_jax.errors import DataError, ModelError, SettingError
from lepton_jax.recipe import Recipe

TARGET = "target"  # keys of the targets of a recipe that is distilled
TEACHER = "teacher"

# Hinton et al. 2015 found 2.5 to 4 best for small students (section 3).
TEMPERATURE = 4.0
WEIGHT = 0.9  # of the teacher's part; assumption: its answers say more than labels
ROWS = 1024  # that the teacher is asked for at once, where it is no artifact

# Losses of outputs that are logits of classes.
CLASSES = (losses.cross_entropy, losses.weighted_cross_entropy)


def distilled(
    recipe: Recipe,
    teacher: Any,
    *,
    temperature: float = TEMPERATURE,
    weight: float = WEIGHT,
) -> Recipe:
    """Return a recipe whose model learns from a teacher.

    Metrics and predictions are those of the recipe; its loss, in training and in
    evaluation, is the distillation's.

    >>> teacher = lepton.Artifact.open("large.lepton")  # doctest: +SKIP
    >>> small = shrink.distilled(digits(width=4), teacher)  # doctest: +SKIP
    >>> lepton.Trainer(small).fit()  # doctest: +SKIP

    Args:
      recipe: of the student, with training rows in memory.
      teacher: an `Artifact`, a `Trainer`, or a function of a batch of inputs to
        outputs, of the same inputs and of outputs like the student's.
      temperature: above 0.
      weight: of the teacher's part, from 0 to 1.

    Raises:
      SettingError: a temperature or a weight that can't be.
      DataError: the training rows are not arrays in memory.
      ModelError: the teacher does not take the rows, or returns no single array.
    """
    if not temperature > 0 or not 0 <= weight <= 1:
        raise SettingError(
            f"temperature {temperature!r}, weight {weight!r}",
            where="distilled",
            remedy="give a temperature above 0 and a weight from 0 to 1",
        )
    train = _in_memory(recipe.train)
    test = _in_memory(recipe.test)
    if train is None:
        raise DataError(
            "the teacher can't be asked: the training rows are not arrays in memory",
            where="Recipe.train",
            remedy="give train as (inputs, targets), or as lepton_jax.data.Arrays",
        )
    ask = _asking(teacher)
    changes: dict[str, Any] = {"train": _with_answers(train, ask)}
    if test is not None:
        changes["test"] = _with_answers(test, ask)
    elif recipe.test is not None:
        raise DataError(
            "the teacher can't be asked: the test rows are not arrays in memory",
            where="Recipe.test",
            remedy="give test as (inputs, targets), or leave it out",
        )
    loss = partial(
        distillation_loss,
        loss=recipe.loss,
        temperature=temperature,
        weight=weight,
        classes=_are_classes(recipe.loss),
    )
    return recipe.with_(
        **changes,
        loss=loss,
        metrics={name: _of_target(metric) for name, metric in recipe.metrics.items()},
        decode=recipe.decode or losses.decoder(recipe.loss),
    )


def distillation_loss(
    outputs: jax.Array,
    targets: Mapping[str, Any],
    *,
    loss: Callable[..., Any],
    temperature: float = TEMPERATURE,
    weight: float = WEIGHT,
    classes: bool = True,
) -> Any:
    """Return the loss of each row of a student, (batch,).

    Args:
      outputs: of the student: logits (batch, classes), or quantities (batch, ...).
      targets: "target" as the own loss takes it, and "teacher", the teacher's outputs.
      loss: the own one, (outputs, target) to one value a row.
      temperature: of the softmax.
      weight: of the teacher's part.
      classes: whether the outputs are logits.

    Source: Hinton et al. 2015, section 2.
    """
    own = _row_values(loss(outputs, targets[TARGET]))
    answers = targets[TEACHER]
    if classes:
        student = jax.nn.log_softmax(outputs / temperature)
        wanted = jax.nn.log_softmax(answers / temperature)
        apart = jnp.sum(jnp.exp(wanted) * (wanted - student), axis=-1)
        followed = temperature**2 * _row_values(apart)
    else:
        followed = _row_values((outputs - answers) ** 2 / 2)
    return (1 - weight) * own + weight * followed


# ---- internals ----


def _in_memory(data: Any) -> Arrays | None:
    """Return data that are arrays in memory; None: there are none."""
    if data is None:
        return None
    data = settled(data)
    return data if isinstance(data, Arrays) else None


def _row_values(values: Any) -> jax.Array:
    """Return a value a row; a loss of weighted values or of the batch is refused."""
    if isinstance(values, tuple) or jnp.ndim(values) == 0:
        raise ModelError(
            "the loss gives no single value a row",
            where="Recipe.loss",
            remedy="distil with a loss that returns one value a sample",
        )
    return values.reshape(values.shape[0], -1).mean(axis=1)


def _are_classes(loss: Any) -> bool:
    while isinstance(loss, partial):
        loss = loss.func
    return loss in CLASSES


def _of_target(metric: Any) -> Any:
    if hasattr(metric, "values"):
        changed = partial(_on_target, metric=metric.values)
        return type(metric)(changed, metric.finish)
    return partial(_on_target, metric=metric)


def _on_target(
    outputs: Any,
    targets: Any,
    *,
    metric: Callable[..., Any],
) -> Any:
    return metric(outputs, targets[TARGET])


def _with_answers(
    data: Arrays,
    ask: Callable[[Any], Any],
) -> Arrays:
    answers = ask(data.inputs)
    if not hasattr(answers, "shape") or len(answers) != len(data):
        raise ModelError(
            "the teacher returns no array with one row a sample",
            where="teacher",
            remedy="distil from a model with one output",
        )
    targets = {TARGET: data.targets, TEACHER: np.asarray(answers)}
    return Arrays(data.inputs, targets)


def _asking(teacher: Any) -> Callable[[Any], Any]:
    """Return a function of all inputs to the teacher's outputs."""
    if hasattr(teacher, "manifest"):  # an artifact
        return partial(_of_artifact, teacher)
    if hasattr(teacher, "predict"):  # a trainer
        return partial(teacher.predict, decode=_as_they_are)
    return partial(_in_parts, teacher)


def _of_artifact(
    artifact: Any,
    inputs: Any,
) -> Any:
    outputs = artifact.run(inputs)
    if "outputs" not in outputs:
        names = ", ".join(outputs)
        raise ModelError(
            f"the teacher has several outputs: {names}",
            where="teacher",
            remedy="distil from a model with one output",
        )
    return outputs["outputs"]


def _in_parts(
    function: Callable[[Any], Any],
    inputs: Any,
) -> np.ndarray:
    rows = len(jax.tree.leaves(inputs)[0])
    parts = []
    for start in range(0, rows, ROWS):
        part = jax.tree.map(lambda x, at=start: x[at : at + ROWS], inputs)
        parts.append(np.asarray(function(part)))
    return np.concatenate(parts)


def _as_they_are(outputs: Any) -> Any:
    return outputs
