"""Cats and dogs with the network of recipes/cats_dogs.py in PyTorch.

    python benchmarks/peers/cats_dogs_torch.py cats_dogs_600.tar

Model, augmentation, schedule and budget are those of the recipe; the folds are as many,
but other ones.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
import time
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from _torch_images import Training, coloured, cropped, trained
from PIL import Image
from torch import nn
from torch.nn import functional as F

ENLARGED = 1.22  # whole images outside of training, by those in it
MARGIN = 1.5  # stored images are larger by this than what the model sees


def main() -> None:
    """Train on each fold, and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("archive", type=Path)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--only", type=int, nargs="*")
    parser.add_argument("--split-seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)

    x, y = _read(asked.archive, round(asked.size * MARGIN))
    folds = _folds(y, asked.folds, asked.split_seed)
    scores = {}
    start = time.perf_counter()
    for fold in asked.only or range(asked.folds):
        is_test = torch.from_numpy(folds == fold)
        torch.manual_seed(fold)
        model = _fitted(asked, x[~is_test], y[~is_test])
        scores[fold] = _accuracy(model, x[is_test], y[is_test], asked.size)
        print(f"fold {fold}: {scores[fold]:.4f}", flush=True)
    seconds = (time.perf_counter() - start) / len(scores)
    result = {"accuracy": float(np.mean(list(scores.values()))), "folds": scores}
    print(json.dumps(result | {"seconds_a_fold": seconds, "torch": torch.__version__}))


def _fitted(asked: argparse.Namespace, x: torch.Tensor, y: torch.Tensor) -> nn.Module:
    settings = Training(
        epochs=asked.epochs,
        batch_size=32,
        learning_rate=3e-3,
        weight_decay=0.05,
        mixup=0.2,
        average=0.99,
    )

    def change(images: torch.Tensor) -> torch.Tensor:
        size = (asked.size, asked.size)
        images = cropped(images, size, (0.35, 1.0), mirror=True)
        return coloured(images, 0.3)

    return trained(_network(asked.width), x, y, change, settings)


def _network(width: int) -> nn.Module:
    """Return four convolutions with batch norm and pools, means and logits."""
    layers: list[nn.Module] = []
    channels = 3
    for number in range(4):
        features = width * 2**number
        step = 2 if number == 0 else 1
        layers += [
            nn.Conv2d(channels, features, 3, step, padding=1, bias=False),
            nn.BatchNorm2d(features),
            nn.ReLU(),
        ]
        if number < 3:
            layers.append(nn.MaxPool2d(2))
        channels = features
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1))
    return nn.Sequential(*layers, *head, nn.Linear(channels, 2))


def _accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor, size: int) -> float:
    side = round(ENLARGED * size)
    x = F.interpolate(x.float() / 255, (side, side), mode="bilinear", antialias=True)
    with torch.no_grad():
        logits = model(x) + model(x.flip(3))
    return (logits.argmax(1) == y).float().mean().item()


def _folds(labels: torch.Tensor, count: int, seed: int) -> np.ndarray:
    """Deal the images of each class to the folds at random."""
    generator = np.random.default_rng(seed)
    folds = np.zeros(len(labels), int)
    for label in labels.unique():
        rows = np.flatnonzero(labels.numpy() == int(label))
        generator.shuffle(rows)
        folds[rows] = np.arange(len(rows)) % count
    return folds


def _read(archive: Path, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    images = []
    names = []
    with tarfile.open(archive) as files:
        for member in sorted(files.getmembers(), key=lambda member: member.name):
            if not member.name.lower().endswith(".jpg"):
                continue
            content = files.extractfile(member).read()
            image = Image.open(io.BytesIO(content)).convert("RGB")
            image = image.resize((side, side), Image.Resampling.BILINEAR)
            images.append(np.asarray(image))
            names.append(PurePosixPath(member.name).parent.name)
    _, labels = np.unique(names, return_inverse=True)
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return pixels, torch.from_numpy(labels)


if __name__ == "__main__":
    main()
