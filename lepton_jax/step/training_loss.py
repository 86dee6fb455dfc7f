"""The training loss: the function that a train step differentiates.

Three things are easily mixed up, so each has one word in this library. A *weighted sum*
is the (sum, weight) pair that a loss or a metric returns for a batch. The *training
loss* is the scalar made of one of these pairs, the one that is differentiated. The
*objective* is what the planner minimizes in its search; it has no part in a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from lepton_jax import losses
from lepton_jax.augment import Augmented, loss_of
from lepton_jax.errors import pointing_at_user
from lepton_jax.recipe import Recipe
from lepton_jax.step import optimizers
from lepton_jax.step.module import Functional, forward_sowing
from lepton_jax.trees import by_path

# the arguments of a training loss, in their order
ARGUMENTS = ("params", "variables", "key", "inputs", "targets", "knobs")


def training_loss(
    recipe: Recipe,
    module: Functional,
    micro_batches: int,
) -> Callable:
    """Return the function that a train step differentiates.

    Args:
      recipe: the loss, the metrics and the weights of auxiliary losses.
      module: the recipe's model as pure functions.
      micro_batches: the number of parts in which a step takes its batch.

    Returns:
      A function of `ARGUMENTS`. From one micro-batch it computes its mean loss, or its
      summed loss if there are several micro-batches, times the knob "loss_scale" if
      there is one. Its auxiliary result holds the weighted sums of the loss, of the
      metrics and of `losses.discounted`, and the variables after the micro-batch.
    """

    def training(
        params: Any,
        variables: Any,
        key: Any,
        inputs: Any,
        targets: Any,
        knobs: Any,
    ) -> tuple[Any, tuple]:
        params = optimizers.without_frozen(recipe.optimizer, params)
        outputs, after, sown = forward_sowing(
            recipe,
            module,
            params,
            variables,
            inputs,
            key,
            True,
            knobs.get("dropout"),
        )
        sums = losses.measure(recipe, outputs, targets)
        loss = loss_of(recipe.loss, targets)
        sums |= losses.discounted(loss, outputs, targets, knobs)
        sums = losses.with_auxiliary(sums, recipe.auxiliary, sown)

        total, weight = differentiated_sum(sums)
        value = total / weight if micro_batches == 1 else total
        if "loss_scale" in knobs:
            value = value * knobs["loss_scale"]
        return value, (sums, after)

    return training


def training_gradient(
    recipe: Recipe,
    module: Functional,
    micro_batches: int,
    around: Callable[[Callable], Callable] = lambda loss: loss,
) -> Callable:
    """Return the gradient of the training loss, after the recipe's augmentation.

    Args:
      recipe: as in `training_loss`.
      module: likewise.
      micro_batches: likewise.
      around: what is made of the loss before it is differentiated.

    Returns:
      A function of `ARGUMENTS` to (gradient, auxiliary result of the loss). Its key is
      what `augment.step_key` returns. Further arguments go to the loss.
    """
    loss = training_loss(prepared(recipe), module, micro_batches)
    gradient = jax.grad(around(loss), has_aux=True)
    if not isinstance(recipe.preprocess, Augmented):
        return gradient

    def augmented(
        params: Any,
        variables: Any,
        key: Any,
        inputs: Any,
        targets: Any,
        knobs: Any,
        *more: Any,
    ) -> Any:
        batch = changed(recipe, key, (inputs, targets), micro_batches)
        return gradient(params, variables, key.model, *batch, knobs, *more)

    return augmented


def whole_loss(
    recipe: Recipe,
    module: Functional,
    micro_batches: int,
) -> Callable:
    """Return the training loss of a batch that is not augmented yet.

    Args:
      recipe: as in `training_loss`.
      module: likewise.
      micro_batches: likewise.

    Returns:
      A function like `training_loss`. Its key is what `augment.step_key` returns.
    """
    loss = training_loss(prepared(recipe), module, micro_batches)
    if not isinstance(recipe.preprocess, Augmented):
        return loss

    def augmented(
        params: Any,
        variables: Any,
        key: Any,
        inputs: Any,
        targets: Any,
        knobs: Any,
    ) -> tuple[Any, tuple]:
        batch = changed(recipe, key, (inputs, targets), micro_batches)
        return loss(params, variables, key.model, *batch, knobs)

    return augmented


def prepared(recipe: Recipe) -> Recipe:
    """Return a recipe for samples that its augmentation has prepared already."""
    if not isinstance(recipe.preprocess, Augmented):
        return recipe
    return recipe.with_(preprocess=None)


def changed(
    recipe: Recipe,
    key: Any,
    batch: tuple[Any, Any],
    micro_batches: int,
) -> tuple[Any, Any]:
    """Return a micro-batch after the recipe's augmentation.

    Args:
      recipe: one that augments.
      key: an `augment.StepKey`.
      batch: inputs and targets.
      micro_batches: the number of parts of a step's batch.

    Raises:
      LeptonError: the augmentation fails on samples of this kind.
    """
    augmentation = recipe.preprocess
    assert isinstance(augmentation, Augmented)
    with pointing_at_user("augmenting a batch"):
        return augmentation.train(key.batch, *batch, key.part, micro_batches)


def differentiated_sum(
    sums: Mapping[str, tuple[Any, Any]],
) -> tuple[Any, Any]:
    """Select the weighted sum to differentiate.

    Args:
      sums: (sum, weight) pairs by name, as `losses.with_auxiliary` returns them.

    Returns:
      The pair of the discounted loss if there is one, else that of the plain loss.
    """
    return sums.get("loss_kept", sums["loss"])


def argument_paths(
    names: tuple[str, ...],
    args: tuple,
) -> list[str]:
    """Return the path of each leaf of some arguments, such as "params/blocks/0/kernel".

    Args:
      names: a name for each argument; the path of each of its leaves begins with it.
      args: pytrees.
    """
    paths: list[str] = []
    for name, arg in zip(names, args, strict=False):
        paths += by_path({name: arg})
    return paths
