"""Training speed of PyTorch: see `_speed.py` and `python -m tools.bench peers`.

A loop as its users write it: a permutation an epoch, rows taken by indices, a fused
optimizer. The form is "eager" or "compiled", model and loss by `torch.compile`. Images
are tried with channels first and last, and the faster layout is taken.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _speed import arrays, serve
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools" / "bench"))

TRIED = 4  # steps with each layout of images


def mlp(widths: list[int]) -> nn.Sequential:
    """Return linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class CNN(nn.Module):
    """The zoo's CNN: 32-64-64 channels of 3x3, and a dense layer."""

    def __init__(self, spec: dict[str, Any]):
        super().__init__()
        pooled = (nn.ReLU(), nn.MaxPool2d(2))
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            *pooled,
            nn.Conv2d(32, 64, 3, padding=1),
            *pooled,
            nn.Conv2d(64, 64, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            *mlp([7 * 7 * 64, 64, 10]),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map images (batch, 1, 28, 28) to logits."""
        return self.layers(x)


class LSTM(nn.Module):
    """Embedding, LSTM, the mean over the words, and logits."""

    def __init__(self, spec: dict[str, Any]):
        super().__init__()
        self.embed = nn.Embedding(spec["vocab"], spec["dim"])
        self.lstm = nn.LSTM(spec["dim"], spec["hidden"], batch_first=True)
        self.out = nn.Linear(spec["hidden"], 2)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (batch, length) to logits."""
        present = (tokens != 0).unsqueeze(-1)
        states, _ = self.lstm(self.embed(tokens))
        return self.out((states * present).sum(1) / present.sum(1))


class Encoder(nn.Module):
    """A Transformer encoder with learned positions, and logits."""

    def __init__(self, spec: dict[str, Any]):
        super().__init__()
        dim = spec["dim"]
        self.embed = nn.Embedding(spec["vocab"], dim)
        self.places = nn.Parameter(torch.randn(spec["length"], dim))
        layers = [
            nn.TransformerEncoderLayer(
                dim,
                spec["heads"],
                4 * dim,
                dropout=0.0,
                activation=nn.GELU("tanh"),
                batch_first=True,
                norm_first=True,
            )
            for _ in range(spec["layers"])
        ]
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (batch, length) to logits."""
        absent = tokens == 0
        x = self.embed(tokens) + self.places
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=absent)
        present = (~absent).unsqueeze(-1)
        return self.out((self.norm(x) * present).sum(1) / present.sum(1))


class TwoTower(nn.Module):
    """The product of a user's and an item's vector."""

    def __init__(self, spec: dict[str, Any]):
        super().__init__()
        dim = spec["dim"]
        self.users = nn.Embedding(spec["users"], dim)
        self.items = nn.Embedding(spec["items"], dim)
        self.user_tower = mlp([dim, 128, 64])
        self.item_tower = mlp([dim, 128, 64])

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        """Map users and items (batch,) to scores."""
        user_vector = self.user_tower(self.users(user))
        item_vector = self.item_tower(self.items(item))
        return (user_vector * item_vector).sum(-1)


class Table(nn.Module):
    """Piecewise-linear codes of numbers, embeddings of categories, and an MLP."""

    def __init__(self, spec: dict[str, Any]):
        super().__init__()
        edges = torch.tensor(spec["edges"])
        self.register_buffer("low", edges[:, :-1])
        self.register_buffer("width", edges[:, 1:] - edges[:, :-1])
        bins = edges.shape[1] - 1
        least = torch.zeros(bins)
        least[0] = -torch.inf
        most = torch.ones(bins)
        most[-1] = torch.inf
        self.register_buffer("least", least)
        self.register_buffer("most", most)
        sizes = torch.tensor(spec["sizes"])
        self.register_buffer("starts", sizes.cumsum(0) - sizes)
        self.embed = nn.Embedding(int(sizes.sum()), spec["embedding"])
        inputs = len(edges) * (bins + 1) + len(sizes) * spec["embedding"]
        self.layers = mlp([inputs, 256, 128, 2])

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        """Map rows of numbers and categories to logits."""
        absent = numbers.isnan().unsqueeze(-1)
        codes = (numbers.unsqueeze(-1) - self.low) / self.width
        codes = codes.clamp(self.least, self.most).masked_fill(absent, 0.0)
        codes = torch.cat([codes, absent.to(codes.dtype)], -1)
        embedded = self.embed(categories + self.starts)
        return self.layers(torch.cat([codes.flatten(1), embedded.flatten(1)], 1))


MODELS = {
    "mlp": lambda spec: mlp([784, 128, 10]),
    "cnn": CNN,
    "lstm": LSTM,
    "encoder": Encoder,
    "two_tower": TwoTower,
    "table_mlp": Table,
}


class Training:
    """A case in training."""

    def __init__(self, spec: dict[str, Any]):
        torch.manual_seed(0)
        inputs, targets = arrays(spec["file"])
        self.batch = spec["batch"]
        self.inputs = [torch.from_numpy(x) for x in inputs]
        self.targets = torch.from_numpy(targets)
        if self.targets.dtype == torch.int32:
            self.targets = self.targets.long()
        is_language = spec.get("model") == "lm"
        if is_language:
            from torch_lm import LM

            self.loss: Any = LM(spec)
            self.model: nn.Module = self.loss
        else:
            self.model = MODELS[spec["case"]](spec)
            self.loss = self._loss
        if spec["form"] == "compiled":
            self.loss = torch.compile(self.loss)
        optimizer = torch.optim.AdamW if is_language else torch.optim.Adam
        self.optimizer = optimizer(self.model.parameters(), 1e-3, fused=True)
        self.batches = self._batches()

    def _loss(self, *arguments: Tensor) -> Tensor:
        *inputs, targets = arguments
        outputs = self.model(*inputs)
        if targets.is_floating_point():
            return F.mse_loss(outputs, targets)
        return F.cross_entropy(outputs, targets)

    def _batches(self) -> Any:
        while True:
            order = torch.randperm(len(self.targets)).split(self.batch)
            for rows in order:
                if len(rows) == self.batch:
                    yield [x[rows] for x in (*self.inputs, self.targets)]

    def run(self, steps: int) -> float:
        """Train some steps; return the last loss."""
        for _ in range(steps):
            loss = self.loss(*next(self.batches))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return float(loss)

    def choose_layout(self) -> str:
        """Take the faster layout of images; return its name."""
        images = self.inputs[0].permute(0, 3, 1, 2)
        seconds = {}
        layouts = {
            "channels first": torch.contiguous_format,
            "channels last": torch.channels_last,
        }
        for name, layout in layouts.items():
            self._lay_out(images, layout)
            self.run(TRIED)
            began = time.perf_counter()
            self.run(TRIED)
            seconds[name] = time.perf_counter() - began
        best = min(seconds, key=lambda name: seconds[name])
        self._lay_out(images, layouts[best])
        return best

    def _lay_out(self, images: Tensor, layout: torch.memory_format) -> None:
        self.inputs[0] = images.contiguous(memory_format=layout)
        self.model.to(memory_format=layout)


def make(spec: dict[str, Any]) -> tuple[Callable[[int], float], dict[str, Any]]:
    """Return what trains a case, and what is said of it."""
    training = Training(spec)
    about = {
        "version": torch.__version__,
        "parameters": sum(p.numel() for p in training.model.parameters()),
    }
    if spec["case"] == "cnn":
        about["layout"] = training.choose_layout()
    return training.run, about


if __name__ == "__main__":
    serve(make)
