"""The zoo's TransformerLM in PyTorch, which `lm.py` runs as a process of its own.

    python tools/bench/torch_lm.py '{"vocab": 256, ..., "device": "cpu"}'

The first line out says what runs, as JSON; it comes when everything is compiled. Then
each line in is a number of steps, and is answered by a line with the last loss and the
peak of allocated bytes (null on a CPU). It ends with its input.

It is PyTorch as its users would have it: `torch.compile` over model and loss,
`scaled_dot_product_attention`, fused AdamW, float32 parameters under autocast for
bfloat16. Nothing of Lepton or JAX is imported, so another interpreter, with another
PyTorch, can run it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WARM_UP = 3  # steps, in which everything is compiled
EPSILON = 1e-5  # of RMSNorm, as in the zoo's model
# Compilers, of which torch.compile needs one.
COMPILERS = {"cpu": ("g++", "clang++", "c++"), "cuda": ("gcc", "clang", "cc")}


class RMSNorm(nn.Module):
    """Normalization by the root mean square, in float32."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Scale (..., dim); the dtype stays."""
        wide = x.float()
        square = (wide * wide).mean(-1, keepdim=True)
        scaled = wide * torch.rsqrt(square + EPSILON) * self.weight
        return scaled.to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped heads, fused."""

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int,
    ):
        super().__init__()
        self.head = dim // heads
        self.grouped = heads != kv_heads
        self.query = linear(dim, dim)
        self.out = linear(dim, dim)
        self.key = linear(dim, kv_heads * self.head)
        self.value = linear(dim, kv_heads * self.head)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
    ) -> Tensor:
        """Mix (batch, length, dim) over the positions."""
        batch, length, _ = x.shape

        def by_head(y: Tensor) -> Tensor:
            return y.view(batch, length, -1, self.head).transpose(1, 2)

        query = rotated(by_head(self.query(x)), cos, sin)
        key = rotated(by_head(self.key(x)), cos, sin)
        value = by_head(self.value(x))
        grouped = {"enable_gqa": True} if self.grouped else {}
        mixed = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, **grouped
        )
        return self.out(mixed.transpose(1, 2).reshape(batch, length, -1))


class Block(nn.Module):
    """A layer: attention and a SwiGLU, each behind a normalization."""

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int,
        hidden: int,
    ):
        super().__init__()
        self.attention_norm = RMSNorm(dim)
        self.feed_forward_norm = RMSNorm(dim)
        self.attention = Attention(dim, heads, kv_heads)
        self.gate = linear(dim, hidden)
        self.up = linear(dim, hidden)
        self.down = linear(hidden, dim)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
    ) -> Tensor:
        """Map (batch, length, dim) to the same shape."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        y = self.feed_forward_norm(x)
        hidden = F.silu(self.gate(y)) * self.up(y)
        return x + self.down(hidden)


class LM(nn.Module):
    """The model and its loss."""

    def __init__(self, spec: dict[str, Any]):
        super().__init__()
        dim = spec["dim"]
        half = dim // spec["heads"] // 2
        self.dtype = getattr(torch, spec["precision"])
        self.embed = nn.Embedding(spec["vocab"], dim)
        nn.init.normal_(self.embed.weight, std=dim**-0.5)
        self.blocks = nn.ModuleList(
            Block(dim, spec["heads"], spec["kv_heads"], spec["hidden"])
            for _ in range(spec["layers"])
        )
        self.norm = RMSNorm(dim)
        self.head = linear(dim, spec["vocab"])
        if spec["tied"]:
            self.head.weight = self.embed.weight
        frequencies = spec["theta"] ** (-torch.arange(half) / half)
        angles = torch.arange(spec["length"])[:, None] * frequencies
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor,
    ) -> Tensor:
        """Map tokens and those that follow, both (batch, length), to the mean loss."""
        # autocast alone would leave the residual stream in float32
        x = self.embed(tokens).to(self.dtype)
        for block in self.blocks:
            x = block(x, self.cos.to(x.dtype), self.sin.to(x.dtype))
        logits = self.head(self.norm(x)).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def linear(
    inputs: int,
    outputs: int,
) -> nn.Linear:
    """Return a projection without a bias, initialized as in the zoo's model."""
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=inputs**-0.5)
    return layer


def rotated(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> Tensor:
    """Turn the pairs (x[i], x[i + d/2]) of (..., length, d) by their angles."""
    left, right = x.chunk(2, -1)
    turned_left = left * cos - right * sin
    turned_right = right * cos + left * sin
    return torch.cat([turned_left, turned_right], -1)


class Training:
    """Model, optimizer and resident random tokens."""

    def __init__(self, spec: dict[str, Any]):
        torch.manual_seed(0)
        self.device = spec["device"]
        self.batch = spec["batch"]
        if self.device == "cuda":
            # TF32, which XLA takes by default
            torch.set_float32_matmul_precision("high")
        shape = (spec["samples"], spec["length"] + 1)
        with torch.device(self.device):
            self.model = LM(spec)
            self.text = torch.randint(spec["vocab"], shape)
        compilers = [os.environ.get("CXX", ""), *COMPILERS[self.device]]
        self.compiled = any(name and shutil.which(name) for name in compilers)
        self.loss: Any = torch.compile(self.model) if self.compiled else self.model
        self.low = spec["precision"] != "float32"
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            spec["learning_rate"],
            (0.9, spec["b2"]),
            weight_decay=spec["weight_decay"],
            fused=True,
        )
        self.clip_norm = spec["clip_norm"]

    def step(self) -> Tensor:
        """Train one step on a random batch; return its loss, on the device."""
        drawn = torch.randint(len(self.text), (self.batch,), device=self.device)
        rows = self.text[drawn]
        with torch.autocast(self.device, torch.bfloat16, enabled=self.low):
            loss = self.loss(rows[:, :-1], rows[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def run(self, steps: int) -> dict[str, Any]:
        """Train some steps, and wait for the device."""
        for _ in range(steps):
            loss = self.step()
        peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else None
        return {"loss": float(loss), "peak": peak}


def main() -> None:
    """Answer the lines of standard input."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever compilers print goes to the error stream

    training = Training(json.loads(sys.argv[1]))
    training.run(WARM_UP)
    about = {
        "torch": torch.__version__,
        "compiled": training.compiled,
        "parameters": sum(p.numel() for p in training.parameters),
    }
    print(json.dumps(about), file=answers)
    for line in sys.stdin:
        print(json.dumps(training.run(int(line))), file=answers)


if __name__ == "__main__":
    main()
