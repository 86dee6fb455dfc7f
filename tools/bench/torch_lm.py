"""The rival of `tools.bench lm`, which runs it as a process of its own: the zoo's
TransformerLM in PyTorch, trained on request.

    python tools/bench/torch_lm.py '{"vocab": 256, "dim": 160, ..., "batch": 8, "precision": "float32", "device": "cpu"}'

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
# of which torch.compile needs one
COMPILERS = {"cpu": ("g++", "clang++", "c++"), "cuda": ("gcc", "clang", "cc")}


class RMSNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (
            wide
            * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + 1e-5)
            * self.weight
        ).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped heads, in PyTorch's fused
    form.
    """

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
        self.key, self.value = (
            linear(dim, kv_heads * self.head),
            linear(dim, kv_heads * self.head),
        )

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
    ) -> Tensor:
        batch, length, _ = x.shape
        query, key, value = (
            layer(x).view(batch, length, -1, self.head).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        query = rotated(query, cos, sin)
        key = rotated(key, cos, sin)
        grouped = {"enable_gqa": True} if self.grouped else {}
        mixed = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, **grouped
        )
        return self.out(mixed.transpose(1, 2).reshape(batch, length, -1))


class Block(nn.Module):
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
        x = x + self.attention(
            self.attention_norm(x),
            cos,
            sin,
        )
        y = self.feed_forward_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class LM(nn.Module):
    """Tokens and those that follow, both (batch, length), to the mean loss."""

    def __init__(self, spec: dict[str, Any]):
        super().__init__()
        dim = spec["dim"]
        half = spec["dim"] // spec["heads"] // 2
        self.dtype = getattr(torch, spec["precision"])
        self.embed = nn.Embedding(spec["vocab"], dim)
        nn.init.normal_(self.embed.weight, std=dim**-0.5)
        self.blocks = nn.ModuleList(
            Block(
                dim,
                spec["heads"],
                spec["kv_heads"],
                spec["hidden"],
            )
            for _ in range(spec["layers"])
        )
        self.norm = RMSNorm(dim)
        self.head = linear(dim, spec["vocab"])
        if spec["tied"]:
            self.head.weight = self.embed.weight
        angles = torch.arange(spec["length"])[:, None] * spec["theta"] ** (
            -torch.arange(half) / half
        )
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor,
    ) -> Tensor:
        # autocast alone would leave the residual stream in float32
        x = self.embed(tokens).to(self.dtype)
        for block in self.blocks:
            x = block(
                x,
                self.cos.to(x.dtype),
                self.sin.to(x.dtype),
            )
        return F.cross_entropy(
            self.head(self.norm(x)).float().flatten(0, 1), targets.flatten()
        )


def linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=inputs**-0.5)
    return layer


def rotated(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> Tensor:
    """The pairs (x[i], x[i + d/2]) of (..., length, d), turned."""
    left, right = x.chunk(2, -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


class Training:
    """Model, optimizer and resident random tokens; `run` takes steps and waits for the
    device.
    """

    def __init__(self, spec: dict[str, Any]):
        torch.manual_seed(0)
        self.device = spec["device"]
        self.batch = spec["batch"]
        if self.device == "cuda":
            # TF32, which XLA takes by default
            torch.set_float32_matmul_precision("high")
        with torch.device(self.device):
            self.model = LM(spec)
            self.text = torch.randint(
                spec["vocab"], (spec["samples"], spec["length"] + 1)
            )
        self.compiled = any(
            shutil.which(name)
            for name in (os.environ.get("CXX", ""), *COMPILERS[self.device])
            if name
        )
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
        rows = self.text[
            torch.randint(len(self.text), (self.batch,), device=self.device)
        ]
        with torch.autocast(
            self.device,
            torch.bfloat16,
            enabled=self.low,
        ):
            loss = self.loss(rows[:, :-1], rows[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def run(self, steps: int) -> dict[str, Any]:
        for _ in range(steps):
            loss = self.step()
        return {
            "loss": float(loss),
            "peak": (
                torch.cuda.max_memory_allocated() if self.device == "cuda" else None
            ),
        }


def main() -> None:
    answers = os.fdopen(
        os.dup(1),
        "w",
        buffering=1,
    )
    os.dup2(2, 1)  # whatever compilers print goes to the error stream
    training = Training(json.loads(sys.argv[1]))
    training.run(WARM_UP)
    print(
        json.dumps(
            {
                "torch": torch.__version__,
                "compiled": training.compiled,
                "parameters": sum(p.numel() for p in training.parameters),
            }
        ),
        file=answers,
    )
    for line in sys.stdin:
        print(
            json.dumps(training.run(int(line))),
            file=answers,
        )


if __name__ == "__main__":
    main()
