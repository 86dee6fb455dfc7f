"""Samples mixed in pairs, and their targets with them.

A sample's partner is a fixed row of its batch. Batches are shuffled, so this is as
random as any other choice, and it needs no row of another device:

    rows of a batch of 8   0 1 2 3 4 5 6 7
    partners, stride 2     2 3 0 1 6 7 4 5

The mixed sample is share * own + (1 - share) * partner. Its loss is share *
loss(own target) + (1 - share) * loss(partner's target), which is the loss of soft
targets where the loss is a cross-entropy, and is defined for every other loss too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lepton_jax.augment.draws import (
    by_row,
    check_images,
    check_least,
    check_share,
    uniform,
)
from lepton_jax.augment.erasing import rectangle
from lepton_jax.errors import ModelError, RecipeError

# Values of a beta distribution that are drawn from, equally likely. Assumption: a
# share's steps of a thousandth do not matter.
QUANTILES = 1024


class Mixed(NamedTuple):
    """Targets of mixed samples.

    Attributes:
      first: each sample's own target.
      second: its partner's.
      share: of the own sample, float32 (batch,).
    """

    first: Any
    second: Any
    share: jax.Array


def first_of(targets: Any) -> Any:
    """Return targets as metrics see them: of mixed samples, their own."""
    return targets.first if isinstance(targets, Mixed) else targets


def loss_of(
    loss: Callable,
    targets: Any,
) -> Callable:
    """Return a loss for some targets; another one if they are mixed.

    Args:
      loss: (outputs, targets) to values (batch, ...), or (values, weights).
      targets: as they will be handed to it.
    """
    if not isinstance(targets, Mixed):
        return loss

    @functools.wraps(loss)
    def mixed(
        outputs: Any,
        targets: Mixed,
    ) -> Any:
        own, own_weights = _checked(loss, outputs, targets.first)
        other, other_weights = _checked(loss, outputs, targets.second)
        share = by_row(targets.share, own.ndim)
        if own_weights is None:
            return share * own + (1 - share) * other
        own_weights = share * own_weights
        other_weights = (1 - share) * other_weights
        weights = own_weights + other_weights
        total = own * own_weights + other * other_weights
        return total / jnp.where(weights > 0, weights, 1), weights

    return mixed


def swapped(
    tree: Any,
    stride: int,
) -> Any:
    """Return the rows of arrays (batch, ...) in the places of their partners."""

    def swap(x: jax.Array) -> jax.Array:
        pairs = x.reshape(-1, 2, stride, *x.shape[1:])
        return jnp.flip(pairs, 1).reshape(x.shape)

    return jax.tree.map(swap, tree)


def stride_of(
    rows: int,
    parts: int = 1,
) -> int:
    """Return the distance of partners in a micro-batch.

    In the whole batch it is the largest power of two whose double divides the batch and
    is at most its square root. So partners lie on one device, and in one micro-batch,
    unless there are very many. With a number of micro-batches that does not divide it,
    neighbours in a micro-batch are partners.

    Args:
      rows: of the micro-batch.
      parts: the number of micro-batches.

    Raises:
      RecipeError: the number of rows is odd.
    """
    if rows % 2:
        raise RecipeError(
            f"{rows} samples do not go in pairs",
            where="augment.mixing",
            remedy="let the batch, or each micro-batch, have an even number of samples",
        )
    batch = rows * parts
    double = 2
    while batch % (2 * double) == 0 and 2 * double <= math.sqrt(batch):
        double *= 2
    stride = double // 2
    return stride // parts if stride % parts == 0 else 1


@dataclass(frozen=True)
class Mixup:
    """Mix samples (Zhang et al. 2018, "mixup: Beyond Empirical Risk Minimization").

    Each pair's share is drawn from Beta(alpha, alpha), for each of the two by itself.
    The inputs may have any shape.

    Attributes:
      alpha: near 0 most samples stay nearly as they are; at 1 all shares are alike.
      share: of the samples that are mixed.
    """

    alpha: float = 0.2
    share: float = 1.0

    mixes = True

    def __post_init__(self) -> None:
        check_least("Mixup", 1e-3, alpha=self.alpha)
        check_share("Mixup", share=self.share)

    def __call__(
        self,
        keys: jax.Array,
        inputs: Any,
        targets: Any,
        stride: int = 1,
    ) -> tuple[Any, Mixed]:
        own = _shares(keys, self.alpha, self.share)

        def mix(x: jax.Array) -> jax.Array:
            share = by_row(own, x.ndim).astype(x.dtype)
            return share * x + (1 - share) * swapped(x, stride)

        return jax.tree.map(mix, inputs), _mixed(targets, own, stride)


@dataclass(frozen=True)
class Cutmix:
    """Put a rectangle of the partner into each image (Yun et al. 2019, "CutMix").

    Attributes:
      alpha: of the Beta(alpha, alpha) from which the share of the own image is drawn.
      share: of the images that are changed.
    """

    alpha: float = 1.0
    share: float = 1.0

    mixes = True

    def __post_init__(self) -> None:
        check_least("Cutmix", 1e-3, alpha=self.alpha)
        check_share("Cutmix", share=self.share)

    def __call__(
        self,
        keys: jax.Array,
        images: jax.Array,
        targets: Any,
        stride: int = 1,
    ) -> tuple[jax.Array, Mixed]:
        check_images("Cutmix", images)
        height, width = images.shape[1:3]
        side = jnp.sqrt(1 - _shares(keys, self.alpha, self.share))
        *_, down, right = uniform(keys, 4)
        top = down * height - side * height / 2
        left = right * width - side * width / 2
        ends = (top + side * height, left + side * width)
        mask = rectangle(images, (top, left), ends)
        own = 1 - mask.mean((1, 2, 3), dtype=jnp.float32)
        mixed = jnp.where(mask, swapped(images, stride), images)
        return mixed, _mixed(targets, own, stride)


# ---- internals ----


def _shares(
    keys: jax.Array,
    alpha: float,
    share: float,
) -> jax.Array:
    """Draw the shares of the own samples, float32 (batch,); 1: it is not mixed."""
    draw, is_mixed, *_ = uniform(keys, 4)
    own = draw
    if alpha != 1:
        from scipy import stats  # takes half a second, and few use it

        middles = (np.arange(QUANTILES) + 0.5) / QUANTILES
        table = jnp.asarray(stats.beta.ppf(middles, alpha, alpha), jnp.float32)
        place = (draw * QUANTILES).astype(jnp.int32)
        own = table.at[place].get(mode="clip")
    return jnp.where(is_mixed < share, own, 1)


def _mixed(
    targets: Any,
    own: jax.Array,
    stride: int,
) -> Mixed:
    """Return targets that are mixed as the inputs are, perhaps for a second time.

    A sample that was mixed with its partner before still has parts of these two alone.
    """
    if not isinstance(targets, Mixed):
        return Mixed(targets, swapped(targets, stride), own)
    partners = 1 - swapped(targets.share, stride)
    share = own * targets.share + (1 - own) * partners
    return Mixed(targets.first, targets.second, share)


def _checked(
    loss: Callable,
    outputs: Any,
    targets: Any,
) -> tuple[Any, Any]:
    """Return values and weights (or None) of a loss with one value per sample."""
    result = loss(outputs, targets)
    is_pair = isinstance(result, tuple) and len(result) == 2
    values, weights = result if is_pair else (result, None)
    if jnp.ndim(values) == 0:
        raise ModelError(
            "the loss gives one number for a batch, which mixed samples can't share",
            where="Recipe.loss",
            remedy="return one value per sample, or leave Mixup and Cutmix out",
        )
    return jnp.asarray(values), weights
