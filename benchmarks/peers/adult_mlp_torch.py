"""UCI Adult with a multi-layer perceptron in PyTorch: what recipes/csv_mlp.py trains.

    python benchmarks/peers/adult_mlp_torch.py FOLDER

FOLDER holds adult.data.gz and adult.test.gz. Numbers are coded by their quantile bins
(Gorishniy et al. 2022), categories by embeddings; layers, dropout, AdamW, batch, rate
and passes are the recipe's. It prints one line of JSON: accuracy on the test file and
seconds of training, the median of three seeds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

NAMES = [f"column_{number}" for number in range(1, 16)]
LABEL = "column_15"
SEEDS = (0, 1, 2)
BINS = 48
EMBEDDING = 8
HIDDEN = (256, 128)
DROPOUT = 0.3
BATCH = 128
EPOCHS = 20
RATE = 1e-3
WEIGHT_DECAY = 1e-4
WARMUP = 0.1


class Net(nn.Module):
    """An MLP on codes of numbers and embeddings of categories."""

    def __init__(self, codes: int, sizes: list[int]):
        super().__init__()
        starts = np.cumsum([0, *sizes[:-1]])
        self.register_buffer("starts", torch.as_tensor(starts))
        self.embed = nn.Embedding(sum(sizes), EMBEDDING)
        widths = (codes + EMBEDDING * len(sizes), *HIDDEN)
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(DROPOUT)]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], 2))

    def forward(self, codes: torch.Tensor, categories: torch.Tensor) -> torch.Tensor:
        embedded = self.embed(categories + self.starts).flatten(1)
        return self.layers(torch.cat([codes, embedded], dim=1))


def main() -> None:
    """Train with each seed, test and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    train = _read(folder / "adult.data.gz", skip=0)
    test = _read(folder / "adult.test.gz", skip=1)
    parts = _arrays(train, train)
    tested = _arrays(test, train)
    scores = []
    seconds = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        start = time.perf_counter()
        net = _trained(parts)
        seconds.append(time.perf_counter() - start)
        net.eval()
        with torch.no_grad():
            given = net(tested[0], tested[1]).argmax(1)
        scores.append(float((given == tested[2]).float().mean()))
    record = {
        "model": "MLP in PyTorch",
        "accuracy": statistics.median(scores),
        "scores": scores,
        "seconds": round(statistics.median(seconds), 1),
        "samples_per_s": round(EPOCHS * len(train) / statistics.median(seconds)),
    }
    print(json.dumps(record))


def _trained(parts: tuple[torch.Tensor, ...]) -> Net:
    codes, categories, labels = parts
    sizes = (categories.max(0).values + 1).tolist()
    net = Net(codes.shape[1], sizes)
    total = EPOCHS * len(labels) // BATCH
    optimizer = torch.optim.AdamW(
        net.parameters(),
        lr=RATE,
        weight_decay=WEIGHT_DECAY,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        RATE,
        total_steps=total + EPOCHS,
        pct_start=WARMUP,
        div_factor=1e4,
    )
    loss_of = nn.CrossEntropyLoss()
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(labels)).split(BATCH):
            optimizer.zero_grad()
            outputs = net(codes[rows], categories[rows])
            loss_of(outputs, labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return net


def _read(path: Path, skip: int) -> pd.DataFrame:
    return pd.read_csv(
        path,
        names=NAMES,
        skiprows=skip,
        na_values="?",
        skipinitialspace=True,
    )


def _arrays(table: pd.DataFrame, train: pd.DataFrame) -> tuple[torch.Tensor, ...]:
    codes = []
    categories = []
    for name in NAMES[:-1]:
        if pd.api.types.is_numeric_dtype(train[name]):
            known = train[name].to_numpy(np.float64)
            codes.append(_codes(table[name].to_numpy(np.float64), known))
            continue
        words = sorted(train[name].dropna().unique())
        kind = pd.CategoricalDtype(words)
        # -1, which is missing or not known, becomes 0
        categories.append(table[name].astype(kind).cat.codes.to_numpy() + 1)
    labels = (table[LABEL].str.rstrip(".") == ">50K").to_numpy()
    return (
        torch.as_tensor(np.concatenate(codes, axis=1), dtype=torch.float32),
        torch.as_tensor(np.stack(categories, axis=1), dtype=torch.int64),
        torch.as_tensor(labels, dtype=torch.int64),
    )


def _codes(numbers: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Return the piecewise-linear codes of numbers."""
    edges = np.unique(np.quantile(known, np.linspace(0, 1, BINS + 1)))
    position = (numbers[:, None] - edges[:-1]) / np.diff(edges)
    return np.clip(position, 0, 1)


if __name__ == "__main__":
    main()
