"""What a step measures for its policies; only what some policy watches is computed.

Noise scale: McCandlish et al. 2018, "An Empirical Model of Large-Batch Training",
appendix A. B_simple = tr(S) / |G|^2, in samples, where |G|^2 is the squared norm of the
true gradient and tr(S) the variance of one sample's; both come from the squared norms
of two estimates of the gradient with different numbers of samples, and are smoothed
before the division.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lepton_jax.errors import RecipeError, nearest
from lepton_jax.trees import by_path

SIGNALS = {
    "step": "steps done before this one",
    "updates": "updates of the parameters done before this step",
    "progress": (
        "this step's share of the run: (step + 1) / steps of the run; NaN where they"
        " are not known"
    ),
    "batch_size": "samples of a step",
    "loss": "mean loss of this step's batch",
    "loss_kept": "the same, weighted as the gradient is (see the knob loss_limit)",
    "loss_blank": (
        "loss of outputs that are all zero, for one sample: log(classes) for a"
        " cross-entropy"
    ),
    "loss_values": "values of the loss in a sample: 1, or its tokens",
    "mark_weight": (
        "mean of sigmoid(loss_mark - l) over the losses l of this step's samples"
    ),
    "mark_weight_square": "mean of its square",
    "loss_mean": "moving mean of the losses of the steps before this one",
    "loss_variance": "moving variance of them",
    "loss_trend": (
        "by how much a step changes the loss: difference of a quick and a slow moving"
        " mean over their lag"
    ),
    "gradient_norm": (
        "global norm of this step's gradient; gradient_norm/PREFIX: of the parameters"
        " whose path begins so"
    ),
    "parameter_norm": "global norm of the parameters; parameter_norm/PREFIX likewise",
    "update_norm": "global norm of the last update",
    "cosine": "cosine between the last two updates; it keeps a copy of one",
    "noise_scale": (
        "gradient noise scale in samples, from the micro-batches, or, where there is"
        " one, from gradients of successive steps (then it keeps a moving mean of them)"
    ),
    "distance": "norm of parameters minus anchor",
    "gradient_dot_distance": (
        "inner product of the gradient with anchor minus parameters"
    ),
    "gradient_sum_norm": (
        "sum of the absolute entries of s, where s = 0.9995 s + gradient_weight *"
        " gradient; it keeps s"
    ),
    "parameter_rms": "root mean square of the parameters' entries",
    "base_rate": (
        "the learning rate's base: what the recipe says, or a person set since"
    ),
    "finite": "1 if the gradient is finite, else 0",
    "evaluations": "evaluations so far",
    "seconds": "time since the run (or its resumption) began, at the last report",
    "price": (
        "what that time cost, in the currency of the catalogue; 0 where the price is"
        " not known"
    ),
    "data_wait": (
        "share of the time that was spent waiting for data, at the last report"
    ),
}
FED = ("evaluations", "seconds", "price", "data_wait")
# of the gradients' sum: the square root of Adam's usual b2, as in Prodigy
MEMORY = 0.9995
# decays of the moving means
QUICK = 0.9
SLOW = 0.98
NOISE = 0.95


class Smoothed(NamedTuple):
    """Moving means without their correction for the start: float32 (), and how many
    losses went in.
    """

    quick: Any
    slow: Any
    squares: Any
    count: Any


class Noise(NamedTuple):
    """Moving means of |G|^2 and tr(S), and of the gradient where there are no
    micro-batches.
    """

    squared: Any
    variance: Any
    gradient: Any
    count: Any


def known(name: str, metrics: Iterable[str]) -> str:
    """`name`, if it is a signal of a recipe with these metrics."""
    evaluated = [f"evaluation_{m}" for m in ("loss", *metrics)]
    names = [*SIGNALS, *metrics, *evaluated]
    if name not in names and not name.startswith(("gradient_norm/", "parameter_norm/")):
        raise RecipeError(
            f"there is no signal {name!r}{nearest(name, names)}",
            where="Policy.watches",
            remedy=f"the signals are {', '.join(names)}",
        )
    return name


class Signals:
    """The measurements of one recipe's policies.

    Args:
      watched: names of signals.
      metrics: the recipe's.
      batch_size, micro_batches: samples of a step, and in how many parts they come.
    """

    def __init__(
        self,
        watched: Iterable[str],
        metrics: Iterable[str],
        batch_size: int,
        micro_batches: int,
    ):
        self.metrics = tuple(metrics)
        self.watched = tuple(
            dict.fromkeys(known(name, self.metrics) for name in watched)
        )
        self.batch_size = batch_size
        self.micro_batches = micro_batches
        self.by_micro_batch = "noise_scale" in self.watched and micro_batches > 1
        self.needs_anchor = bool(
            {"distance", "gradient_dot_distance"} & set(self.watched)
        )
        self.fed = tuple(
            n for n in self.watched if n in FED or n.startswith("evaluation_")
        )

    def init(self, params: Any) -> dict[str, Any]:
        """The state of the moving means."""
        state: dict[str, Any] = {}
        zero = lambda: jnp.float32(0)
        if {"loss_mean", "loss_variance", "loss_trend"} & set(self.watched):
            state["loss"] = Smoothed(
                zero(),
                zero(),
                zero(),
                jnp.int32(0),
            )
        if "noise_scale" in self.watched:
            state["noise"] = Noise(
                zero(),
                zero(),
                () if self.by_micro_batch else jax.tree.map(jnp.zeros_like, params),
                jnp.int32(0),
            )
        if {"update_norm", "cosine"} & set(self.watched):
            state["update_norm"] = zero()
        if "gradient_sum_norm" in self.watched:
            state["gradient_sum"] = jax.tree.map(jnp.zeros_like, params)
        if "cosine" in self.watched:
            state |= {"cosine": zero(), "update": jax.tree.map(jnp.zeros_like, params)}
        return state

    def measure(
        self,
        state: dict[str, Any],
        given: Mapping[str, Any],
        params: Any,
        gradients: Any,
        anchor: Any,
        parts: Any,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The signals of a step, and the state after it.

        Args:
          given: "step", "updates", "progress", "loss", the metrics and what the host
            fed.
          gradients: the mean gradient of the batch.
          anchor: parameters, or ().
          parts: mean squared norm of the micro-batches' gradients, where
            `by_micro_batch`.
        """
        after = dict(state)
        values = {name: jnp.asarray(x, jnp.float32) for name, x in given.items()}
        for name in {*self.watched, "gradient_norm"} if self._norm else self.watched:
            kind, _, prefix = name.partition("/")
            if kind in ("gradient_norm", "parameter_norm"):
                values[name] = norm(
                    gradients if kind == "gradient_norm" else params, prefix
                )
        if "finite" in self.watched:
            values["finite"] = jnp.isfinite(values["gradient_norm"]).astype(jnp.float32)
        if "loss" in state:
            more, after["loss"] = _smooth(state["loss"], values["loss"])
            values |= more
        if "noise" in state:
            values["noise_scale"], after["noise"] = self._noise(
                state["noise"], gradients, values["gradient_norm"] ** 2, parts
            )
        if "parameter_rms" in self.watched:
            values["parameter_rms"] = (
                norm(params) / sum(x.size for x in jax.tree.leaves(params)) ** 0.5
            )
        if "gradient_sum" in state:
            weight = values.get("gradient_weight", 1.0)
            total = jax.tree.map(
                lambda s, g: MEMORY * s + (weight * g).astype(s.dtype),
                state["gradient_sum"],
                gradients,
            )
            values["gradient_sum_norm"] = sum(
                (jnp.abs(x).astype(jnp.float32).sum() for x in jax.tree.leaves(total)),
                jnp.float32(0),
            )
            usable = jnp.isfinite(values["gradient_sum_norm"])
            after["gradient_sum"] = jax.tree.map(
                lambda n, o: jnp.where(usable, n, o),
                total,
                state["gradient_sum"],
            )
        if self.needs_anchor:
            away = jax.tree.map(
                jnp.subtract,
                anchor,
                params,
            )
            values |= {
                "distance": norm(away),
                "gradient_dot_distance": dot(gradients, away),
            }
        values |= {
            name: state[name] for name in ("update_norm", "cosine") if name in state
        }
        return values, after

    def updated(
        self,
        state: dict[str, Any],
        before: Any,
        after: Any,
        applied: Any,
    ) -> dict[str, Any]:
        """The state after parameters went from `before` to `after`, which they did if
        `applied`.
        """
        if "update_norm" not in state:
            return state
        updates = jax.tree.map(
            jnp.subtract,
            after,
            before,
        )
        size = norm(updates)
        fresh = {"update_norm": size}
        if "cosine" in state:
            fresh |= {
                "cosine": (
                    dot(updates, state["update"])
                    / jnp.maximum(size * norm(state["update"]), 1e-30)
                ),
                "update": updates,
            }
        return {
            **state,
            **jax.tree.map(
                lambda n, o: jnp.where(applied, n, o),
                fresh,
                {k: state[k] for k in fresh},
            ),
        }

    @property
    def _norm(self) -> bool:
        return bool({"finite", "noise_scale"} & set(self.watched))

    def _noise(
        self,
        state: Noise,
        gradients: Any,
        big: Any,
        parts: Any,
    ) -> tuple[Any, Noise]:
        size = self.batch_size
        first = state.count == 0
        if self.by_micro_batch:
            small = size / self.micro_batches
            squared = (size * big - small * parts) / (size - small)
            variance = (parts - big) / (1 / small - 1 / size)
            mean: Any = ()
        # the mean of earlier gradients has other samples' noise: its product with this
        # one has none
        else:
            past = 1 - NOISE ** state.count.astype(jnp.float32)
            squared = dot(gradients, state.gradient) / jnp.maximum(past, 1e-6)
            variance = size * (big - squared)
            mean = jax.tree.map(
                lambda m, g: NOISE * m + (1 - NOISE) * g,
                state.gradient,
                gradients,
            )
            squared, variance = (jnp.where(first, 0.0, x) for x in (squared, variance))
        fresh = Noise(
            NOISE * state.squared + (1 - NOISE) * squared,
            NOISE * state.variance + (1 - NOISE) * variance,
            mean,
            state.count + 1,
        )
        usable = jnp.isfinite(big) & (parts is None or jnp.isfinite(parts))
        after = jax.tree.map(
            lambda n, o: jnp.where(usable, n, o),
            fresh,
            state,
        )
        return jnp.maximum(after.variance, 0) / jnp.maximum(after.squared, 1e-30), after


def norm(tree: Any, prefix: str = "") -> jax.Array:
    """Global norm of the leaves whose path begins with `prefix`, float32 ()."""
    leaves = [x for path, x in by_path(tree).items() if path.startswith(prefix)]
    if not leaves:
        raise RecipeError(
            f"no parameter's path begins with {prefix!r}",
            where="Policy.watches",
            remedy=f"the parameters are {', '.join(by_path(tree))}",
        )
    return jnp.sqrt(
        sum(jnp.sum(jnp.square(part)) for x in leaves for part in _parts(x))
    )


def dot(left: Any, right: Any) -> jax.Array:
    """Inner product of two trees, float32 ()."""

    def product(a: Any, b: Any) -> Any:
        pairs = zip(
            _parts(a),
            _parts(b),
            strict=True,
        )
        return sum(jnp.sum(x * y) for x, y in pairs)

    return sum(jax.tree.leaves(jax.tree.map(product, left, right)), jnp.float32(0))


def _parts(x: jax.Array) -> tuple[jax.Array, ...]:
    """An array as float32; a complex one as two, since it is a pair of real numbers."""
    if jnp.iscomplexobj(x):
        return x.real.astype(jnp.float32), x.imag.astype(jnp.float32)
    return (x.astype(jnp.float32),)


def _smooth(state: Smoothed, loss: Any) -> tuple[dict[str, Any], Smoothed]:
    count = state.count.astype(jnp.float32)
    past = lambda decay, x: x / jnp.maximum(1 - decay**count, 1e-6)
    quick = past(QUICK, state.quick)
    slow = past(SLOW, state.slow)
    squares = past(SLOW, state.squares)
    some = state.count > 0
    values = {
        "loss_mean": jnp.where(some, slow, loss),
        "loss_variance": jnp.where(
            some,
            jnp.maximum(squares - slow**2, 0),
            0.0,
        ),
        "loss_trend": jnp.where(
            some,
            (quick - slow) / (1 / (1 - SLOW) - 1 / (1 - QUICK)),
            0.0,
        ),
    }
    fresh = Smoothed(
        QUICK * state.quick + (1 - QUICK) * loss,
        SLOW * state.slow + (1 - SLOW) * loss,
        SLOW * state.squares + (1 - SLOW) * loss**2,
        state.count + 1,
    )
    return values, jax.tree.map(
        lambda n, o: jnp.where(
            jnp.isfinite(loss),
            n,
            o,
        ),
        fresh,
        state,
    )
