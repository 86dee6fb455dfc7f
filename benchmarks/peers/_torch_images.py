"""What the PyTorch scripts on images have in common: augmentation and training.

This is no script itself: a name that begins with an underscore says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

WARMUP = 0.1  # share of the steps in which the learning rate rises


@dataclass(frozen=True)
class Training:
    """Settings of a run.

    Attributes:
      epochs: passes over the images.
      batch_size: images per step.
      learning_rate: of AdamW at its peak; it falls as a cosine to zero.
      weight_decay: of the weights that are no biases or scales.
      smoothing: of the labels.
      mixup: alpha of the Beta distribution; 0: none.
      average: decay of the moving average that is evaluated; None: none.
      seed: of everything.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    smoothing: float = 0.0
    mixup: float = 0.0
    average: float | None = None
    seed: int = 0


def trained(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    change: Callable[[torch.Tensor], torch.Tensor],
    settings: Training,
) -> nn.Module:
    """Train a model, and return it, or its moving average.

    Args:
      model: images (batch, channels, height, width) to logits.
      images: uint8 (n, channels, height, width).
      labels: int64 (n,).
      change: the augmentation of images from 0 to 1.
      settings: of the run.
    """
    classes = int(labels.max()) + 1
    steps = math.ceil(len(images) / settings.batch_size) * settings.epochs
    optimizer = torch.optim.AdamW(_groups(model, settings.weight_decay), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: settings.learning_rate * _rate(step, steps)
    )
    averaged = None
    if settings.average is not None:
        averaged = torch.optim.swa_utils.AveragedModel(
            model,
            avg_fn=_averaging(settings.average),
            use_buffers=False,
        )
    model.train()
    for _ in range(settings.epochs):
        order = torch.randperm(len(images))
        for rows in order.split(settings.batch_size):
            x = change(images[rows].float() / 255)
            y = F.one_hot(labels[rows], classes).float()
            x, y = _mixed(x, y, settings.mixup)
            y = y * (1 - settings.smoothing) + settings.smoothing / classes
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if averaged is not None:
                averaged.update_parameters(model)
    if averaged is None:
        return model.eval()
    # statistics of batch norm are the model's own
    for own, other in zip(averaged.module.buffers(), model.buffers(), strict=True):
        own.copy_(other)
    return averaged.module.eval()


def moved(
    images: torch.Tensor,
    size: tuple[int, int],
    degrees: float = 0.0,
    shift: float = 0.0,
    zoom: tuple[float, float] = (1.0, 1.0),
) -> torch.Tensor:
    """Turn, move and zoom images about their middle; black comes in from outside."""
    count = len(images)
    angle = _between(count, -degrees, degrees) * math.pi / 180
    factor = torch.exp(-_between(count, math.log(zoom[0]), math.log(zoom[1])))
    # a grid's width is 2
    down = _between(count, -2 * shift, 2 * shift)
    right = _between(count, -2 * shift, 2 * shift)
    cos = torch.cos(angle) * factor
    sin = torch.sin(angle) * factor
    rows = [torch.stack([cos, -sin, right], 1), torch.stack([sin, cos, down], 1)]
    shape = [count, images.shape[1], *size]
    grid = F.affine_grid(torch.stack(rows, 1), shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def cropped(
    images: torch.Tensor,
    size: tuple[int, int],
    scale: tuple[float, float],
    mirror: bool,
) -> torch.Tensor:
    """Cut out random rectangles, scale them to one size, and mirror half of them."""
    count = len(images)
    root = torch.sqrt(_between(count, *scale))
    stretch = torch.exp(_between(count, math.log(3 / 4), math.log(4 / 3)) / 2)
    tall = (root / stretch).clamp(max=1)
    wide = (root * stretch).clamp(max=1)
    down = _between(count, -1, 1) * (1 - tall)
    right = _between(count, -1, 1) * (1 - wide)
    if mirror:
        wide = wide * torch.sign(torch.rand(count) - 0.5)
    zero = torch.zeros(count)
    rows = [torch.stack([wide, zero, right], 1), torch.stack([zero, tall, down], 1)]
    shape = [count, images.shape[1], *size]
    grid = F.affine_grid(torch.stack(rows, 1), shape, align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def coloured(images: torch.Tensor, strength: float) -> torch.Tensor:
    """Change brightness, contrast and saturation."""
    shape = (len(images), 1, 1, 1)
    images = images * torch.empty(shape).uniform_(1 - strength, 1 + strength)
    for dims in ((1, 2, 3), (1,)):
        mean = images.mean(dims, keepdim=True)
        factor = torch.empty(shape).uniform_(1 - strength, 1 + strength)
        images = mean + factor * (images - mean)
    return images.clamp(0, 1)


# ---- internals ----


def _between(count: int, low: float, high: float) -> torch.Tensor:
    return low + torch.rand(count) * (high - low)


def _mixed(
    x: torch.Tensor, y: torch.Tensor, alpha: float
) -> tuple[torch.Tensor, torch.Tensor]:
    if not alpha:
        return x, y
    share = torch.distributions.Beta(alpha, alpha).sample((len(x), 1))
    order = torch.randperm(len(x))
    y = share * y + (1 - share) * y[order]
    share = share[:, :, None, None]
    return share * x + (1 - share) * x[order], y


def _rate(step: int, steps: int) -> float:
    rise = max(round(WARMUP * steps), 1)
    if step < rise:
        return step / rise
    return (1 + math.cos(math.pi * (step - rise) / max(steps - rise, 1))) / 2


def _groups(model: nn.Module, decay: float) -> list[dict]:
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return [
        {"params": weights, "weight_decay": decay},
        {"params": others, "weight_decay": 0.0},
    ]


def _averaging(decay: float) -> Callable:
    def average(old: torch.Tensor, new: torch.Tensor, count: torch.Tensor):
        # the ramp of lepton_jax.controllers.averaging
        ramp = (1 + int(count)) / (10 + int(count))
        return torch.lerp(new, old, min(decay, ramp))

    return average
