"""MNIST with the network of recipes/mnist_cnn.py in PyTorch.

    python benchmarks/peers/mnist_cnn_torch.py FOLDER --seeds 0 1 2

FOLDER holds the four idx .gz files. Model, augmentation, schedule and budget are those
of the recipe.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from _torch_images import Training, moved, trained
from torch import nn

SIDE = 28


def main() -> None:
    """Train once with each seed, and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)

    x, y = _read(asked.folder, "train")
    x_test, y_test = _read(asked.folder, "t10k")
    change = partial(moved, size=(SIDE, SIDE), degrees=10, shift=2 / SIDE)
    change = partial(change, zoom=(0.9, 1.1))
    scores = []
    start = time.perf_counter()
    for seed in asked.seeds:
        torch.manual_seed(seed)
        settings = Training(asked.epochs, 128, 3e-3, 1e-4, seed=seed)
        model = trained(_network(), x, y, change, settings)
        with torch.no_grad():
            parts = [model(part.float() / 255) for part in x_test.split(1000)]
        hits = torch.cat(parts).argmax(1) == y_test
        scores.append(hits.float().mean().item())
    seconds = (time.perf_counter() - start) / len(scores)
    result = {"test_accuracy": statistics.median(scores), "scores": scores}
    print(json.dumps(result | {"seconds_a_run": seconds, "torch": torch.__version__}))


def _network() -> nn.Module:
    """Return the recipe's model: 32-64-64 convolutions and 64 dense units."""
    layers: list[nn.Module] = []
    channels = 1
    for number, width in enumerate((32, 64, 64)):
        layers += [
            nn.Conv2d(channels, width, 3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        if number < 2:
            layers.append(nn.MaxPool2d(2))
        channels = width
    return nn.Sequential(
        *layers,
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(9 * 64, 64),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(64, 10),
    )


def _read(folder: Path, part: str) -> tuple[torch.Tensor, torch.Tensor]:
    arrays = []
    for name, offset in (("images-idx3", 16), ("labels-idx1", 8)):
        content = gzip.decompress((folder / f"{part}-{name}-ubyte.gz").read_bytes())
        values = np.frombuffer(content, np.uint8, offset=offset).copy()
        arrays.append(torch.from_numpy(values))
    images, labels = arrays
    return images.reshape(-1, 1, SIDE, SIDE), labels.long()


if __name__ == "__main__":
    main()
