"""A deep equilibrium model (Bai et al. 2019) whose iteration has a fixed length."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from tools.bench.families.case import Case, shape
from tools.bench.families.draw import Draw


class Equilibrium(nnx.Module):
    """One layer with the input injected, applied again and again; then the logits."""

    def __init__(
        self,
        size: int,
        dim: int,
        classes: int,
        turns: int,
        loop: bool,
        *,
        rngs: nnx.Rngs,
    ):
        self.turns = turns
        self.loop = loop
        self.inject = nnx.Linear(size, dim, rngs=rngs)
        self.up = nnx.Linear(dim, dim, rngs=rngs)
        self.down = nnx.Linear(
            dim,
            dim,
            use_bias=False,
            rngs=rngs,
        )
        self.norm = nnx.LayerNorm(dim, rngs=rngs)
        self.out = nnx.Linear(dim, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, size) to logits (batch, classes)."""
        injected = self.inject(x)
        state = jnp.zeros_like(injected)
        if self.loop:
            weights = nnx.state(self)
            graph = nnx.graphdef(self)

            def body(
                state: jax.Array,
                _: None,
            ) -> tuple[jax.Array, None]:
                return nnx.merge(graph, weights)._turn(state, injected), None

            state, _ = jax.lax.scan(
                body,
                state,
                None,
                self.turns,
            )
        else:
            for _ in range(self.turns):
                state = self._turn(state, injected)
        return self.out(state)

    def _turn(
        self,
        state: jax.Array,
        injected: jax.Array,
    ) -> jax.Array:
        mixed = self.down(nnx.relu(self.up(state))) + injected
        return self.norm(nnx.tanh(mixed)) + 0.5 * state


def case(draw: Draw) -> Case:
    """Draw the width, the turns, and whether they are a loop."""
    size = draw.width(128, 2048)
    model = partial(
        Equilibrium,
        size,
        draw.width(256, 3072),
        draw.classes(),
        draw.randint(3, 10),
        draw.random() < 0.4,
    )
    return Case(
        model,
        shape(size, dtype=jnp.float32),
        shape(),
        **draw.rest(),
    )
