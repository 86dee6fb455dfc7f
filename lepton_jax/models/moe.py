"""A decoder-only language model whose feed-forward layers are mixtures of experts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from lepton_jax.models.transformer import Decoder, usual_hidden


class Experts(nnx.Module):
    """SwiGLU experts, a few of which a router chooses for each token.

    See Shazeer et al. 2017, "Outrageously Large Neural Networks"; the experts are
    computed as dense products over slots (Lepikhin et al. 2020, "GShard", algorithm 1).

    Tokens are dealt with in groups. In a group each expert has ceil(chosen * group *
    capacity / experts) slots, but never more than a group has tokens. They fill up in
    the order of the tokens, all first choices before all second ones; a token that
    finds no slot gets nothing from that expert. Say that four tokens choose among two
    experts with three slots each, and that their first choices are A, A, B, A: then A
    is full, B has two slots left, and of the second choices B, B, A, B the first two
    find one. So if slots are short, later tokens' first choices can cost a token its
    second one; only chosen=1 and capacity >= experts / chosen are strictly causal.

    Without a capacity no token is dropped: tokens are sorted by their expert, and each
    expert multiplies those that came to it (Gale et al. 2022, "MegaBlocks").

    Args:
      dim: width of the inputs and outputs.
      hidden: width of an expert.
      experts: how many there are.
      chosen: experts that a token goes to.
      capacity: slots, as a multiple of those that an even distribution would take;
        None: no token is dropped, and there are no groups.
      group: tokens of a group, at most; a sequence that is not longer is one group.
      rngs: stream `params`.

    Raises:
      ValueError: a token can't go to so few experts, or capacity or group are not
        positive.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        experts: int,
        *,
        chosen: int = 2,
        capacity: float | None = 1.25,
        group: int = 1024,
        rngs: nnx.Rngs,
    ):
        if not 1 <= chosen <= experts:
            raise ValueError(f"a token can't go to {chosen} of {experts} experts")
        if (capacity is not None and not capacity > 0) or group < 1:
            raise ValueError(
                f"capacity is {capacity} and group {group}; both must be positive"
            )
        self.experts = experts
        self.chosen = chosen
        self.capacity = capacity
        self.group = group
        # float32 whatever the inputs are: rounded scores send tokens to other experts
        # (Fedus et al. 2021, section 2.4)
        self.router = nnx.Linear(
            dim,
            experts,
            use_bias=False,
            dtype=jnp.float32,
            rngs=rngs,
        )
        init = nnx.initializers.lecun_normal(batch_axis=0)
        self.gate = nnx.Param(init(rngs.params(), (experts, dim, hidden)))
        self.up = nnx.Param(init(rngs.params(), (experts, dim, hidden)))
        self.down = nnx.Param(init(rngs.params(), (experts, hidden, dim)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, length, dim) to the same shape."""
        batch, length, dim = x.shape
        if self.capacity is None:
            experts, gates = self.choose(x)
            kernels = (self.gate[...], self.up[...], self.down[...])
            return chosen_experts(x, experts, gates, *kernels)
        group = min(self.group, length)
        if length % group:
            raise ValueError(
                f"a length of {length} is no multiple of the group of {group} tokens"
            )
        x = x.reshape(batch, length // group, group, dim)
        dispatch, combine = self.route(x)

        # b: batch, g: group, s: token of a group, e: expert, c: slot, d: dim, h: hidden
        slots = jnp.einsum("bgsec,bgsd->ebgcd", dispatch, x)
        gate = jnp.einsum("ebgcd,edh->ebgch", slots, self.gate[...])
        up = jnp.einsum("ebgcd,edh->ebgch", slots, self.up[...])
        hidden = nnx.silu(gate) * up
        outputs = jnp.einsum("ebgch,ehd->ebgcd", hidden, self.down[...])
        tokens = jnp.einsum("bgsec,ebgcd->bgsd", combine, outputs)
        return tokens.reshape(batch, length, dim)

    def choose(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the experts of each token and their gates, (..., chosen).

        A gate is the router's probability, for more than one choice over the sum of the
        chosen ones'.
        """
        probabilities = jax.nn.softmax(self.router(x))
        left = probabilities
        experts = []
        gates = []
        # not top_k: XLA's partitioner (jax 0.10) gathers all tokens for it
        for _ in range(self.chosen):
            expert = left.argmax(-1)
            choice = jax.nn.one_hot(expert, self.experts, dtype=left.dtype)
            experts.append(expert)
            gates.append((probabilities * choice).sum(-1))
            left = jnp.where(choice > 0, -1.0, left)
        weights = jnp.stack(gates, axis=-1)
        if self.chosen > 1:
            weights = weights / weights.sum(-1, keepdims=True)
        return jnp.stack(experts, axis=-1), weights

    def route(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Decide which tokens go to which slots.

        Args:
          x: inputs (b, g, s, dim).

        Returns:
          (dispatch, combine), both (b, g, s, experts, slots). `dispatch` is 1 where a
          token takes a slot; `combine` is its gate there: the router's probability, for
          more than one choice over the sum of the chosen ones'.
        """
        assert self.capacity is not None
        tokens = x.shape[2]
        even = self.chosen * tokens * self.capacity / self.experts
        slots = min(tokens, math.ceil(even))
        probabilities = jax.nn.softmax(self.router(x))

        left = probabilities
        taken = jnp.zeros((*x.shape[:2], 1, self.experts), jnp.int32)
        places = []
        gates = []
        for _ in range(self.chosen):
            expert = left.argmax(-1)
            choice = jax.nn.one_hot(
                expert,
                self.experts,
                dtype=jnp.int32,
            )
            # a token's slot: the choices of the same expert by the tokens before it
            before = jnp.cumsum(choice, axis=2) - choice + taken
            slot = (before * choice).sum(-1)
            # one_hot gives zeros for a slot beyond the last: such a token is dropped
            spot = jax.nn.one_hot(
                slot,
                slots,
                dtype=x.dtype,
            )
            places.append(choice.astype(x.dtype)[..., None] * spot[..., None, :])
            gates.append((probabilities * choice).sum(-1)[..., None, None])

            taken = taken + choice.sum(2, keepdims=True)
            left = jnp.where(choice > 0, -1.0, left)

        if self.chosen > 1:
            total = sum(gates[1:], gates[0])
            gates = [gate / total for gate in gates]
        weighted = [
            place * gate.astype(x.dtype)
            for place, gate in zip(places, gates, strict=True)
        ]
        dispatch = sum(places[1:], places[0])
        combine = sum(weighted[1:], weighted[0])
        return dispatch, combine


def grouped_experts(
    x: jax.Array,
    experts: jax.Array,
    gates: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    numbers: jax.Array,
    product: Callable[..., jax.Array] = jax.lax.ragged_dot,
) -> jax.Array:
    """Return what some of the experts add to each token; no token is dropped.

    Tokens are sorted by expert, so that each kernel meets its tokens in one run of
    rows. Rows of experts that are not among these come last, and add nothing.

    Args:
      x: (..., dim).
      experts: int32 (..., chosen), the experts of each token.
      gates: (..., chosen), their weights.
      gate: (count, dim, hidden), kernels of the experts.
      up: likewise.
      down: (count, hidden, dim).
      numbers: (count,), the numbers of these experts, one after the other.
      product: of rows (n, k) with the kernels (count, k, m) of groups of rows, of some
        sizes (count,).
    """
    tokens = x.reshape(-1, x.shape[-1])
    count = gate.shape[0]
    own = experts.reshape(-1) - numbers[0]
    own = jnp.where((own >= 0) & (own < count), own, count)
    order = jnp.argsort(own, stable=True)
    sizes = jnp.bincount(own, length=count + 1)[:count].astype(jnp.int32)
    is_mine = (jnp.arange(order.size) < sizes.sum())[:, None]
    token = order // experts.shape[-1]

    rows = jnp.where(is_mine, tokens[token], 0)
    hidden = nnx.silu(product(rows, gate, sizes)) * product(rows, up, sizes)
    outputs = product(hidden, down, sizes)
    weight = gates.reshape(-1)[order][:, None].astype(outputs.dtype)
    outputs = jnp.where(is_mine, outputs * weight, 0)
    return jnp.zeros_like(tokens).at[token].add(outputs).reshape(x.shape)


@jax.jit
def chosen_experts(
    x: jax.Array,
    experts: jax.Array,
    gates: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
) -> jax.Array:
    """Return what all experts add to each token; see `grouped_experts`."""
    numbers = jnp.arange(gate.shape[0])
    return grouped_experts(x, experts, gates, gate, up, down, numbers)


class MoELM(Decoder):
    """`TransformerLM` with a mixture of experts in place of each feed-forward layer.

    No balancing loss is added: a loss sees a model's outputs only. Watch the share of
    dropped tokens in long runs.

    Args:
      vocab: as in `TransformerLM`; also dim, layers, heads, kv_heads, tied, theta,
        loop, query_key_norm and rngs.
      hidden: width of an expert. None: 8/3 of dim, rounded up to a multiple of 64.
      experts: as in `Experts`; also chosen, capacity and group.
    """

    def __init__(
        self,
        vocab: int,
        *,
        dim: int,
        layers: int,
        heads: int,
        kv_heads: int | None = None,
        hidden: int | None = None,
        experts: int = 8,
        chosen: int = 2,
        capacity: float | None = 1.25,
        group: int = 1024,
        tied: bool = False,
        theta: float = 10_000.0,
        loop: Literal["unrolled", "scan"] = "unrolled",
        query_key_norm: bool = False,
        rngs: nnx.Rngs,
    ):
        width = usual_hidden(dim) if hidden is None else hidden

        def feed_forward(rngs: nnx.Rngs) -> Experts:
            return Experts(
                dim,
                width,
                experts,
                chosen=chosen,
                capacity=capacity,
                group=group,
                rngs=rngs,
            )

        super().__init__(
            vocab,
            dim=dim,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            tied=tied,
            theta=theta,
            loop=loop,
            query_key_norm=query_key_norm,
            feed_forward=feed_forward,
            rngs=rngs,
        )
