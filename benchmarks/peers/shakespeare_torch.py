"""Tiny Shakespeare with the network of `tools.bench shakespeare` in PyTorch.

    python benchmarks/peers/shakespeare_torch.py input.txt --folder DIR --rate 2e-3
    python benchmarks/peers/shakespeare_torch.py input.txt --folder DIR --tune

Model, rows, batch, dropout and number of tokens are those of the benchmark; the
optimizer is AdamW with nanoGPT's betas and weight decay, and its rate warms up and
falls as a cosine to a fiftieth. With `--tune` the last tenth of what is learned judges
short runs at several rates, and the validation text is not looked at.

A run is kept in DIR and goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools" / "bench"))
from torch_lm import LM

LENGTH = 256
BATCH = 32
SAVE_EVERY = 50  # steps
TEST_SHARE = 0.1
FLOOR = 0.02  # of the peak rate, at the end
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
TUNING_TOKENS = 2e6
SIZES = {"dim": 256, "layers": 4, "heads": 4, "kv_heads": 4, "hidden": 640}
SPEC = {
    **SIZES,
    "length": LENGTH,
    "precision": "float32",
    "tied": True,
    "theta": 10_000.0,
}


class DropoutLM(LM):
    """The language model with dropout after the embedding and each block's parts."""

    def __init__(self, vocab: int, dropout: float):
        super().__init__(SPEC | {"vocab": vocab})
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Map tokens and those that follow, both (batch, length), to the mean loss."""
        x = self.dropout(self.embed(tokens))
        for block in self.blocks:
            normed = block.attention_norm(x)
            x = x + self.dropout(block.attention(normed, self.cos, self.sin))
            normed = block.feed_forward_norm(x)
            hidden = F.silu(block.gate(normed)) * block.up(normed)
            x = x + self.dropout(block.down(hidden))
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Run:
    """A run that is kept in a folder.

    Args:
      folder: of the run; what is there is gone on with.
      learned, judged: tokens to train on, and to validate with.
      asked: arguments of the command line, and the size of the vocabulary.
      rate: at its peak.
      tokens: to learn.
    """

    def __init__(
        self,
        folder: Path,
        learned: Tensor,
        judged: Tensor,
        asked: argparse.Namespace,
        rate: float,
        tokens: float,
    ):
        torch.manual_seed(0)
        first = _rows(learned)
        second = _rows(learned[LENGTH // 2 :])
        self.rows = [torch.cat(pair) for pair in zip(first, second, strict=True)]
        self.judged = _rows(judged)
        self.rate = rate
        self.steps = round(tokens / (BATCH * LENGTH))
        self.model = DropoutLM(asked.vocab, asked.dropout)
        self.loss: Any = torch.compile(self.model)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), rate, (0.9, 0.99), weight_decay=0.1, fused=True
        )
        self.file = folder / f"{rate:g}-{self.steps}.pt"
        folder.mkdir(parents=True, exist_ok=True)
        self.step = 0
        if self.file.exists():
            self._go_on()

    def train(self, until: float) -> float:
        """Train as far as the time goes; return the loss on what judges."""
        while self.step < self.steps and time.monotonic() < until:
            began = time.monotonic()
            last = min(self.step + SAVE_EVERY, self.steps)
            made = last - self.step
            for _ in range(made):
                self._update()
                self.step += 1
            self._save()
            each = (time.monotonic() - began) / made
            print(f"step {self.step} of {self.steps}, {each:.2f} s a step", flush=True)
        return self._validate()

    def _update(self) -> None:
        # an order an epoch, which a run that goes on finds again
        each = len(self.rows[0]) // BATCH
        epoch, place = divmod(self.step, each)
        order = np.random.default_rng(epoch).permutation(len(self.rows[0]))
        chosen = order[place * BATCH : (place + 1) * BATCH]
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * _share(self.step, self.steps)
        self.model.train()
        self.loss(*(part[chosen] for part in self.rows)).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _validate(self) -> float:
        self.model.eval()
        with torch.no_grad():
            parts = zip(*(part.split(BATCH) for part in self.judged), strict=True)
            sums = [float(self.model(x, y)) * len(x) for x, y in parts]
        return sum(sums) / len(self.judged[0])

    def _save(self) -> None:
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
        }
        torch.save(state, self.file.with_suffix(".new"))
        self.file.with_suffix(".new").replace(self.file)

    def _go_on(self) -> None:
        state = torch.load(self.file)
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])


def main() -> None:
    """Train or tune, and print one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("text", type=Path)
    add("--folder", type=Path, required=True, help="of the runs")
    add("--rate", type=float, default=1e-3, help="at its peak")
    add("--tune", action="store_true", help="try the rates")
    add("--tokens", type=float, default=20e6, help="to learn")
    add("--dropout", type=float, default=0.1)
    add("--minutes", type=float, default=math.inf, help="train no longer")
    asked = parser.parse_args()

    until = time.monotonic() + 60 * asked.minutes
    letters = list(asked.text.read_text())
    tokens = torch.from_numpy(np.unique(letters, return_inverse=True)[1])
    asked.vocab = int(tokens.max()) + 1
    learned, judged = _cut(tokens)
    if asked.tune:
        losses = {}
        for rate in RATES:
            run = Run(asked.folder, *_cut(learned), asked, rate, TUNING_TOKENS)
            losses[f"{rate:g}"] = run.train(until)
        print(json.dumps({"held_out_loss": losses}))
        return

    run = Run(asked.folder, learned, judged, asked, asked.rate, asked.tokens)
    loss = run.train(until)
    result = {
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "rate": asked.rate,
        "tokens": run.step * BATCH * LENGTH,
        "finished": run.step == run.steps,
        "validation_loss": loss,
        "torch": torch.__version__,
    }
    print(json.dumps(result))


# ---- internals ----


def _cut(tokens: Tensor) -> tuple[Tensor, Tensor]:
    cut = round((1 - TEST_SHARE) * len(tokens))
    return tokens[:cut], tokens[cut:]


def _rows(tokens: Tensor) -> tuple[Tensor, Tensor]:
    count = (len(tokens) - 1) // LENGTH
    inputs = tokens[: count * LENGTH].reshape(count, LENGTH)
    targets = tokens[1 : count * LENGTH + 1].reshape(count, LENGTH)
    return inputs, targets


def _share(step: int, steps: int) -> float:
    """Return the share of the peak rate at a step."""
    rise = max(steps // 20, 1)
    if step < rise:
        return step / rise
    fallen = (1 + math.cos(math.pi * (step - rise) / (steps - rise))) / 2
    return FLOOR + (1 - FLOOR) * fallen


if __name__ == "__main__":
    main()
