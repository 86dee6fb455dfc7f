"""TabM: an ensemble of multi-layer perceptrons for tables, as one model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lepton_jax.models.tabular_front import Scaled, TabularFront, dropout_of

KINDS = ("full", "mini")


def mean_of_probabilities(
    outputs: jax.Array,
    classes: Sequence[int] | None = None,
) -> jax.Array:
    """Return the logarithm of the members' mean probabilities.

    Args:
      outputs: logits (batch, members, classes); of several labels, one after the other.
      classes: count of each label's classes; None: there is one label.

    Returns:
      Logits (batch, classes).
    """
    counts = classes or (outputs.shape[-1],)
    ends = list(itertools.accumulate(counts))[:-1]
    logs = [
        jax.nn.log_softmax(part, axis=-1) for part in jnp.split(outputs, ends, axis=-1)
    ]
    together = jnp.concatenate(logs, axis=-1)
    return jax.nn.logsumexp(together, axis=1) - jnp.log(outputs.shape[1])


def mean_of_rates(outputs: jax.Array) -> jax.Array:
    """Return the logarithm of the members' mean rates.

    Args:
      outputs: logarithms of rates, (batch, members, ...).

    Returns:
      Logarithms of rates, (batch, ...).
    """
    members = outputs.shape[1]
    return jax.nn.logsumexp(outputs, axis=1) - jnp.log(members)


def mean_of_outputs(outputs: jax.Array) -> jax.Array:
    """Return the mean of the members' outputs (batch, members, ...)."""
    return outputs.mean(axis=1)


class TabM(nnx.Module):
    """An ensemble of MLPs that share their weights and differ by adapters.

    A member multiplies inputs and outputs of a shared layer by vectors of its own
    (Wen et al. 2020, "BatchEnsemble", section 3); "mini" keeps only the vector of the
    first layer's inputs. The last layer is each member's own (Gorishniy et al. 2024,
    "TabM: Advancing Tabular Deep Learning with Parameter-Efficient Ensembling", section
    3.3). All members see the same batch, and are computed as one product per layer:

        full   h_m = ((x * r_m) W) * s_m + b_m      r_m of the first layer is random,
        mini   h_m = (x * r_m) W + b                other r_m and s_m begin at one

    In training, the outputs are those of each member, and the loss is to be a mean of
    the members' losses (`lepton_jax.losses.of_members`). Outside of it `merge` gives
    one output a row.

    Args:
      outputs: number of outputs; None for one without a dim of its own.
      members: count of members.
      kind: one of KINDS.
      hidden: widths of the hidden layers.
      dropout: share of the hidden units that are dropped in training.
      merge: the members' outputs to one: (batch, members, ...) to (batch, ...).
      center: the outputs are center + spread * the last layer's, so that a quantity far
        from 0 and 1 can be learned in its own unit; a number, or one for each output.
      spread: see `center`.
      front: arguments of `TabularFront`: edges, sizes, and kind of numbers.
      rngs: streams `params` and, with dropout, `dropout`.

    Raises:
      ValueError: there are neither numbers nor categories, edges do not ascend, there
        is no member, the kind is not known, or the dropout is no share.
    """

    def __init__(
        self,
        outputs: int | None,
        *,
        members: int = 32,
        kind: str = "mini",
        hidden: Sequence[int] = (256, 256),
        dropout: float = 0.0,
        merge: Callable[[jax.Array], jax.Array] = mean_of_probabilities,
        center: float | Sequence[float] = 0.0,
        spread: float | Sequence[float] = 1.0,
        front: dict[str, Any],
        rngs: nnx.Rngs,
    ):
        if kind not in KINDS:
            raise ValueError(f"{kind!r} is no kind of TabM; use one of {KINDS}")
        if members < 1:
            raise ValueError(f"members is {members}; it must be at least 1")
        self.deterministic = False
        self.merge = merge
        self.front = TabularFront(**front, rngs=rngs)
        self.scaled = Scaled(outputs, center, spread)
        adapter = _first_adapter(
            rngs.params(),
            members,
            self.front,
        )
        self.adapter = nnx.Param(adapter)

        widths = (self.front.width, *hidden)
        pairs = list(itertools.pairwise(widths))
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in pairs])
        self.adapters = nnx.List(
            [
                _Adapters(members, inputs, width, number > 0)
                if kind == "full"
                else None
                for number, (inputs, width) in enumerate(pairs)
            ]
        )
        self.dropout = dropout_of(dropout, rngs)
        self.last = _OwnLinear(
            members,
            widths[-1],
            self.scaled.width,
            rngs,
        )

    def __call__(
        self,
        numbers: jax.Array | None = None,
        categories: jax.Array | None = None,
    ) -> jax.Array:
        """Map rows of a table to outputs.

        Args:
          numbers: float32 (batch, a), NaN where missing.
          categories: int32 (batch, c).

        Returns:
          (batch, members, outputs) in training, else (batch, outputs); without the last
          dim if `outputs` is None.
        """
        x = self.front(numbers, categories)
        x = x[:, None] * self.adapter[...]
        for layer, adapters in zip(self.layers, self.adapters, strict=True):
            shared = layer(x) if adapters is None else adapters(layer, x)
            x = nnx.relu(shared)
            if self.dropout is not None:
                x = self.dropout(x)
        outputs = self.scaled(self.last(x))
        return self.merge(outputs) if self.deterministic else outputs


# ---- internals ----


def _first_adapter(
    key: jax.Array,
    members: int,
    front: TabularFront,
) -> jax.Array:
    """Return factors (members, features), from a normal distribution.

    The features of a column have one factor at first, so that an embedding stays in
    its own direction (Gorishniy et al. 2024, appendix D.8).
    """
    factors = jax.random.normal(key, (members, len(front.widths)))
    columns = [
        column for column, width in enumerate(front.widths) for _ in range(width)
    ]
    return factors[:, jnp.asarray(columns)]


class _Adapters(nnx.Module):
    """The members' own factors and biases around a shared layer.

    Args:
      members: count of members.
      inputs: width of the layer's inputs.
      outputs: width of its outputs.
      scales_inputs: whether the inputs have factors; those of the first layer do
        already.
    """

    def __init__(
        self,
        members: int,
        inputs: int,
        outputs: int,
        scales_inputs: bool,
    ):
        ones = jnp.ones((members, inputs))
        self.before = nnx.Param(ones) if scales_inputs else None
        self.after = nnx.Param(jnp.ones((members, outputs)))
        self.bias = nnx.Param(jnp.zeros((members, outputs)))

    def __call__(
        self,
        layer: nnx.Linear,
        x: jax.Array,
    ) -> jax.Array:
        """Map (batch, members, inputs) to (batch, members, outputs)."""
        if self.before is not None:
            x *= self.before[...]
        return layer(x) * self.after[...] + self.bias[...]


class _OwnLinear(nnx.Module):
    """A linear layer of each member's own."""

    def __init__(
        self,
        members: int,
        inputs: int,
        outputs: int,
        rngs: nnx.Rngs,
    ):
        init = nnx.initializers.lecun_normal(batch_axis=0)
        shape = (members, inputs, outputs)
        self.kernel = nnx.Param(init(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros((members, outputs)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, members, inputs) to (batch, members, outputs)."""
        outputs = jnp.einsum(
            "bmi,mio->bmo",
            x,
            self.kernel[...],
        )
        return outputs + self.bias[...]
