"""The signals: the numbers that a step measures for its policies.

Only signals that some policy watches are computed.

The noise scale is the number of samples at which half of the benefit of each sample is
left: B = tr(S) / |G|^2, where |G|^2 is the squared norm of the true gradient and tr(S)
the variance of one sample's gradient (McCandlish et al. 2018, "An Empirical Model of
Large-Batch Training", appendix A). Neither is known, but the squared norm of the mean
gradient of b samples is |G|^2 + tr(S) / b on average. Two batch sizes give both, as in
this example: a batch of b = 64 samples in 4 micro-batches of m = 16, with |G|^2 = 2 and
tr(S) = 32.

>>> big = 2 + 32 / 64  # squared norm of the batch's gradient, on average
>>> small = 2 + 32 / 16  # mean squared norm of the micro-batches' gradients
>>> signals = Signals(["noise_scale"], [], batch_size=64, micro_batches=4)
>>> squared, variance = signals._noise_of_parts(big, small)
>>> squared, variance, variance / squared
(2.0, 32.0, 16.0)

Both estimates are noisy, and are smoothed before the division. Where there is one
micro-batch alone, |G|^2 comes from the product of successive steps' gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lepton_jax.errors import RecipeError, nearest
from lepton_jax.step.branches import is_short_on_one_cpu, once
from lepton_jax.trees import by_path

SIGNALS = {
    "step": "steps of the budget done before this one (see docs/runs.md)",
    "updates": "updates of the parameters done before this step",
    "progress": (
        "this step's share of the budget: (step + 1) / its steps; NaN where they are"
        " not known"
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
    "update_norm": (
        "global norm of the last update that was measured: each, or where a step is"
        " short one of 2 to 16"
    ),
    "update_worth": (
        "root mean square of its entries per unit of its learning rate: 1 for Adam at"
        " first; NaN before the first update, or with a rate of 0"
    ),
    "cosine": "cosine between the last two updates; it keeps a copy of one",
    "noise_scale": (
        "gradient noise scale in samples, from the micro-batches, or, where there is"
        " one, from gradients of successive steps (then it keeps a moving mean of them)"
    ),
    "distance": "norm of parameters minus anchor",
    "gradient_dot_distance": (
        "inner product of the gradient with anchor minus parameters; NaN as"
        " gradient_sum_norm is"
    ),
    "gradient_dot_way": (
        "inner product of the gradient with anchor minus the parameters that the"
        " optimizer moves, which without interpolation are all; NaN as"
        " gradient_sum_norm is"
    ),
    "gradient_sum_norm": (
        "sum of the absolute entries of s, where s = 0.9995 s + gradient_weight *"
        " gradient; it keeps s; NaN where gradient_weight is 0, or where a policy moves"
        " it and the step is not measured, see gradient_steps"
    ),
    "gradient_steps": (
        "steps for which this step's gradient counts in gradient_sum_norm, where a"
        " policy moves gradient_weight: 1, or where a step is short up to 16, of which"
        " one is measured"
    ),
    "parameter_rms": (
        "root mean square of the parameters' entries, when last measured, as"
        " update_norm is"
    ),
    "input_rms": (
        "root mean square of some 4,096 entries of this step's inputs; NaN where they"
        " hold no numbers"
    ),
    "base_rate": (
        "the learning rate's base: what the recipe says, or a person set since"
    ),
    "scheduled_rate": "what the recipe's schedule says of it; 0 where there is none",
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
# decay of the gradients' sum: the square root of Adam's usual b2, as in Prodigy
MEMORY = 0.9995
# decays of the moving means of the loss; assumption
QUICK = 0.9
SLOW = 0.98
# decay of the moving means behind the noise scale; assumption
NOISE = 0.95
# by how many steps a moving mean with decay d lags behind a line: 1 / (1 - d). The
# slow mean lags behind the quick one by the difference of both
LAG = 1 / (1 - SLOW) - 1 / (1 - QUICK)
# entries of a block; in a short step on one CPU an inner product is a sum of blocks
BLOCK = 1024
# the least divisor of a norm, and of a correction for the start at 0
TINY = 1e-30
CORRECTED = 1e-6
# entries of the inputs that the signal input_rms takes: its standard error is then
# about 1 %; assumption
SAMPLED = 4096
# the signal that the program measures on the inputs, which the controller doesn't see
INPUTS = "input_rms"
# the signals that need a norm of the gradient, whether it is watched or not
FROM_NORM = frozenset(("finite", "noise_scale", "gradient_sum_norm"))
# the signals that need an anchor
FROM_ANCHOR = frozenset(("distance", "gradient_dot_distance", "gradient_dot_way"))


# the signals that follow an update
FROM_UPDATE = ("update_norm", "update_worth", "cosine")
# FLOPs of a step for each parameter and each sample that it meets: a multiplication and
# an addition forwards, and twice as many backwards
FLOPS = 6
# samples that each parameter meets in a step, at which a few more passes over the
# parameters are a hundredth of the step; CPU time of MLPs at batches of 16 and 128
MANY = 1024
# the longest stride
LONGEST = 16
# strides at the start of a run in which every step is measured: the first averages are
# short; assumption
EARLY = 16


def stride(flops: float, parameters: int) -> int:
    """Return every how many steps passes over the parameters are made.

    Such a pass costs nothing where each parameter meets many samples in a step, as in
    convolutions, language models and large batches. Where it meets few, the norm of the
    update and the moving average of the parameters are taken every so many steps. The
    stride depends on model and batch alone: a run is the same on any device.

    Args:
      flops: those of a train step; 0 where they are not known.
      parameters: their number.

    Returns:
      A power of 2, from 1 to `LONGEST`.

    Example:
      >>> [stride(6 * 1000 * met, 1000) for met in (16, 100, 128, 300)]
      [16, 16, 8, 4]
    """
    if not flops:
        return 1
    met = flops / (FLOPS * max(parameters, 1))
    doublings = math.ceil(math.log2(MANY / met)) if met < MANY else 0
    return min(2**doublings, LONGEST)


class Smoothed(NamedTuple):
    """Moving means of the loss, not corrected for their start at 0, float32 ().

    Attributes:
      quick: the quick mean.
      slow: the slow mean.
      squares: the slow mean of the squared loss.
      count: losses that went in, int32 ().
    """

    quick: Any
    slow: Any
    squares: Any
    count: Any


class Noise(NamedTuple):
    """Moving means behind the noise scale.

    Attributes:
      squared: mean of |G|^2, float32 ().
      variance: mean of tr(S), float32 ().
      gradient: mean of the gradient where there are no micro-batches, else ().
      count: steps that went in, int32 ().
    """

    squared: Any
    variance: Any
    gradient: Any
    count: Any


def known(
    name: str,
    metrics: Iterable[str],
) -> str:
    """Return `name` if it is a signal of a recipe with these metrics.

    Raises:
      RecipeError: there is no such signal.
    """
    evaluated = [f"evaluation_{m}" for m in ("loss", *metrics)]
    names = [*SIGNALS, *metrics, *evaluated]
    if name not in names and not name.startswith(("gradient_norm/", "parameter_norm/")):
        raise RecipeError(
            f"there is no signal {name!r}{nearest(name, names)}",
            where="Policy.watches",
            remedy=f"the signals are {', '.join(names)}",
        )
    return name


class Places(NamedTuple):
    """Parameters that those of a step are compared with.

    Attributes:
      anchor: those of the anchor, or ().
      average: their average, where they lie between it and those that the optimizer
        moves, at the share "interpolation"; else ().
    """

    anchor: Any = ()
    average: Any = ()


class Signals:
    """The measurements of one recipe's policies.

    Args:
      watched: names of signals.
      metrics: names of the recipe's metrics.
      batch_size: samples of a step.
      micro_batches: the number of parts in which a step takes them.

    Attributes:
      watched: the names of the signals, each once.
      by_micro_batch: whether the noise scale comes from micro-batches.
      needs_anchor: whether a signal needs an anchor.
      fed: the watched signals that the host measures.
    """

    def __init__(
        self,
        watched: Iterable[str],
        metrics: Iterable[str],
        batch_size: int,
        micro_batches: int,
    ):
        self.metrics = tuple(metrics)
        checked = [known(name, self.metrics) for name in watched]
        self.watched = tuple(dict.fromkeys(checked))
        self.batch_size = batch_size
        self.micro_batches = micro_batches
        self.by_micro_batch = "noise_scale" in self.watched and micro_batches > 1
        self.needs_anchor = not FROM_ANCHOR.isdisjoint(self.watched)
        self.fed = tuple(
            name
            for name in self.watched
            if name in FED or name.startswith("evaluation_")
        )

    def init(self, params: Any) -> dict[str, Any]:
        """Return the state of the moving means before the first step."""

        def zero() -> Any:
            return jnp.float32(0)

        def zeros() -> Any:
            return jax.tree.map(jnp.zeros_like, params)

        state: dict[str, Any] = {}
        if self._watches("loss_mean", "loss_variance", "loss_trend"):
            state["loss"] = Smoothed(
                zero(),
                zero(),
                zero(),
                jnp.int32(0),
            )
        if self._watches("noise_scale"):
            gradient = () if self.by_micro_batch else zeros()
            state["noise"] = Noise(
                zero(),
                zero(),
                gradient,
                jnp.int32(0),
            )
        if self._watches("update_norm", "cosine", "update_worth"):
            state["update_norm"] = zero()
        if self._watches("update_worth"):
            state["update_worth"] = jnp.float32(jnp.nan)
        if self._watches("parameter_rms"):
            state["parameter_rms"] = zero()
        if self._watches("gradient_sum_norm"):
            state["gradient_sum"] = zeros()
        if self._watches("cosine"):
            state["cosine"] = zero()
            state["update"] = zeros()
        return state

    def measure(
        self,
        state: dict[str, Any],
        given: Mapping[str, Any],
        params: Any,
        gradients: Any,
        places: Places,
        parts: Any,
        due: Any = True,
        live: Any = True,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Measure the signals of a step.

        Args:
          state: the state of the moving means before it.
          given: "step", "updates", "progress", "loss", the metrics, the values that the
            host measured, and "gradient_weight" where a policy may move it.
          params: the parameters before the update.
          gradients: the mean gradient of the batch.
          places: parameters to compare with.
          parts: mean squared norm of the micro-batches' gradients, where
            `by_micro_batch`; else None.
          due: whether what is measured every `stride` steps is, in this one.
          live: whether the step counts. Where it does not, trees of the size of the
            parameters stay as they are in the state.

        Returns:
          The signals, and the state after the step but for its update (see `updated`).
        """
        after = dict(state)
        values = {name: jnp.asarray(x, jnp.float32) for name, x in given.items()}
        values |= self._norms(params, gradients)
        if "noise" in state:
            values["noise_scale"], after["noise"] = self._noise(
                state["noise"],
                gradients,
                values["gradient_norm"] ** 2,
                parts,
                given.get("kept", 1.0),
                live,
            )
        if "parameter_rms" in state:
            size = sum(x.size for x in jax.tree.leaves(params))
            after["parameter_rms"] = values["parameter_rms"] = _if(
                due,
                lambda: norm(params) / size**0.5,
                lambda: state["parameter_rms"],
            )
        if self.needs_anchor or "gradient_sum" in state:
            way, total = self._way(
                state,
                values,
                params,
                gradients,
                places,
                due,
                live,
            )
            values |= way
            after |= total
        for name in FROM_UPDATE:
            if name in state:
                values[name] = state[name]
        return values, after

    def smoothed(
        self,
        state: dict[str, Any],
        values: Mapping[str, Any],
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the signals that are made of others, and the means behind them."""
        made: dict[str, Any] = {}
        after = {}
        if "finite" in self.watched:
            made["finite"] = jnp.isfinite(values["gradient_norm"]).astype(jnp.float32)
        if "loss" in state:
            smoothed, after["loss"] = _smooth(state["loss"], values["loss"])
            made |= smoothed
        return made, after

    def _way(
        self,
        state: dict[str, Any],
        values: Mapping[str, Any],
        params: Any,
        gradients: Any,
        places: Places,
        due: Any,
        live: Any,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Measure the gradients' sum and the way from the anchor.

        Args:
          state: see `measure`, as for the others.
          values: the signals so far.
          params: the parameters.
          gradients: the gradient.
          places: parameters to compare with.
          due: whether the step is measured where a policy moves the gradient's weight.
          live: whether the sum may change.

        Returns:
          The signals, NaN where the gradient's weight is 0 or it is not measured, and
          the part of the state that is the sum.
        """
        weight = values.get("gradient_weight")
        sums = {n: state[n] for n in ("gradient_sum",) if n in state}

        def measure(
            now: tuple[dict[str, Any], dict[str, Any]],
        ) -> tuple[dict[str, Any], dict[str, Any]]:
            _, after = now
            way = {}
            if self.needs_anchor:
                away = jax.tree.map(jnp.subtract, places.anchor, params)
                way["distance"] = norm(away)
                way["gradient_dot_distance"] = dot(gradients, away)
            if "gradient_dot_way" in self.watched:
                way["gradient_dot_way"] = way["gradient_dot_distance"]
                if places.average != ():
                    share = values["interpolation"]
                    beyond = jax.tree.map(jnp.subtract, params, places.average)
                    further = share / (1 - share) * dot(gradients, beyond)
                    way["gradient_dot_way"] -= further
            if sums:
                usable = jnp.isfinite(values["gradient_norm"]) & live
                factor, decay = _factors(values)
                total, added = _gradient_sum(
                    after["gradient_sum"], gradients, factor, usable, decay
                )
                way["gradient_sum_norm"] = total
                after = {"gradient_sum": added}
            return way, after

        if weight is None:
            return measure(({}, sums))
        shapes, _ = jax.eval_shape(measure, ({}, sums))
        unknown = {name: jnp.float32(jnp.nan) for name in shapes}
        return once((weight != 0) & due, measure, (unknown, sums))

    def followed(self, state: dict[str, Any]) -> dict[str, Any]:
        """Select the part of the state that follows an update (see `updated`)."""
        return {n: state[n] for n in (*FROM_UPDATE, "update") if n in state}

    def updated(
        self,
        followed: dict[str, Any],
        before: Any,
        after: Any,
        rate: Any = 1.0,
    ) -> dict[str, Any]:
        """Return the part of the state that follows an update, after one.

        Args:
          followed: this part before it, see `followed`.
          before: the parameters before the update.
          after: the parameters after it.
          rate: its learning rate.
        """
        if not followed:
            return followed
        # so that the update is rounded as it is without signals
        before, after = jax.lax.optimization_barrier((before, after))
        updates = jax.tree.map(jnp.subtract, after, before)
        size = norm(updates)
        fresh = {"update_norm": size}
        if "update_worth" in followed:
            entries = sum(x.size for x in jax.tree.leaves(before))
            worth = size / (rate * entries**0.5)
            fresh["update_worth"] = jnp.where(rate > 0, worth, jnp.nan)
        if "cosine" in followed:
            product = dot(updates, followed["update"])
            sizes = size * norm(followed["update"])
            fresh["cosine"] = product / jnp.maximum(sizes, TINY)
            fresh["update"] = updates
        return fresh

    def begun_anew(
        self,
        state: dict[str, Any],
        restart: Any,
    ) -> dict[str, Any]:
        """Return the state with its scalars as before the first step, if `restart`.

        The trees are left as they are: in the next step they count for nothing, by
        the value "kept" of `measure`, which costs no pass over the memory.
        """

        def reset(x: Any) -> Any:
            return jnp.where(restart, 0, x) if jnp.ndim(x) == 0 else x

        reset_all = jax.tree.map(reset, state)
        if "update_worth" in state:
            worth = jnp.where(restart, jnp.nan, state["update_worth"])
            reset_all["update_worth"] = worth
        return reset_all

    def _watches(self, *names: str) -> bool:
        return any(name in self.watched for name in names)

    def _norms(
        self,
        params: Any,
        gradients: Any,
    ) -> dict[str, Any]:
        """Return the global norms that are watched or needed."""
        names = [*self.watched]
        if not FROM_NORM.isdisjoint(names):
            names.append("gradient_norm")
        trees = {"gradient_norm": gradients, "parameter_norm": params}
        norms = {}
        # in one order in every process: a program must be the same on all hosts
        for name in dict.fromkeys(names):
            kind, _, prefix = name.partition("/")
            if kind in trees:
                norms[name] = norm(trees[kind], prefix)
        return norms

    def _noise(
        self,
        state: Noise,
        gradients: Any,
        big: Any,
        parts: Any,
        kept: Any,
        live: Any,
    ) -> tuple[Any, Noise]:
        """Return the noise scale and the moving means after this step.

        Args:
          state: the moving means before it.
          gradients: the mean gradient of the batch.
          big: its squared norm.
          parts: the mean squared norm of the micro-batches' gradients, or None.
          kept: factor of the mean gradient so far: 0 in the first step after a restart.
          live: whether the means may change.
        """
        first = state.count == 0
        mean: Any = ()
        if self.by_micro_batch:
            squared, variance = self._noise_of_parts(big, parts)
        else:
            squared, variance = self._noise_of_steps(state, gradients, big)
            decay = NOISE * kept
            mean = jax.tree.map(
                lambda m, g: decay * m + (1 - NOISE) * g,
                state.gradient,
                gradients,
            )
            squared = jnp.where(first, 0.0, squared)
            variance = jnp.where(first, 0.0, variance)
        fresh = Noise(
            squared=NOISE * state.squared + (1 - NOISE) * squared,
            variance=NOISE * state.variance + (1 - NOISE) * variance,
            gradient=mean,
            count=state.count + 1,
        )
        usable = live & jnp.isfinite(big) & (parts is None or jnp.isfinite(parts))
        after = _where(usable, fresh, state)
        trace = jnp.maximum(after.variance, 0)
        return trace / jnp.maximum(after.squared, TINY), after

    def _noise_of_parts(
        self,
        big: Any,
        small: Any,
    ) -> tuple[Any, Any]:
        """Estimate |G|^2 and tr(S) from a batch and its micro-batches."""
        b = self.batch_size
        m = b / self.micro_batches
        squared = (b * big - m * small) / (b - m)
        variance = (small - big) / (1 / m - 1 / b)
        return squared, variance

    def _noise_of_steps(
        self,
        state: Noise,
        gradients: Any,
        big: Any,
    ) -> tuple[Any, Any]:
        """Estimate |G|^2 and tr(S) from gradients of successive steps.

        The mean of earlier gradients has other samples' noise, so its product with
        this gradient has none.
        """
        past = 1 - NOISE ** state.count.astype(jnp.float32)
        squared = dot(gradients, state.gradient) / jnp.maximum(past, CORRECTED)
        variance = self.batch_size * (big - squared)
        return squared, variance


def input_rms(inputs: Any) -> jax.Array:
    """Return the root mean square of some entries of a batch's inputs, float32 ().

    With several arrays it is the geometric mean of theirs. Each sample gives as many
    evenly spaced entries as make `SAMPLED` in all, at least one.

    Args:
      inputs: arrays (samples, ...); those that are no numbers are left out.
    """
    logs = []
    for x in jax.tree.leaves(inputs):
        if not jnp.issubdtype(x.dtype, jnp.number) or not x.size:
            continue
        rows = x.reshape(len(x), -1)
        # by columns: the samples may lie on several devices
        stride = max(1, rows.size // SAMPLED)
        for part in _parts(rows[:, ::stride]):
            logs.append(jnp.log(jnp.mean(jnp.square(part)) + TINY) / 2)
    if not logs:
        return jnp.float32(jnp.nan)
    return jnp.exp(jnp.stack(logs).mean())


def norm(
    tree: Any,
    prefix: str = "",
) -> jax.Array:
    """Return the global norm of the leaves whose path begins with `prefix`, float32 ().

    Raises:
      RecipeError: there are none.
    """
    leaves = [x for path, x in by_path(tree).items() if path.startswith(prefix)]
    if not leaves:
        raise RecipeError(
            f"no parameter's path begins with {prefix!r}",
            where="Policy.watches",
            remedy=f"the parameters are {', '.join(by_path(tree))}",
        )
    parts = (part for leaf in leaves for part in _parts(leaf))
    return jnp.sqrt(sum(_product(part, part) for part in parts))


def dot(
    left: Any,
    right: Any,
) -> jax.Array:
    """Return the inner product of two trees, float32 ()."""

    def product(a: Any, b: Any) -> Any:
        pairs = zip(
            _parts(a),
            _parts(b),
            strict=True,
        )
        return sum(_product(x, y) for x, y in pairs)

    products = jax.tree.map(product, left, right)
    return sum(jax.tree.leaves(products), jnp.float32(0))


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the inner product of two float32 arrays, float32 ().

    In a short step on one CPU it is a loop over blocks. XLA's own sum goes by windows
    and wakes other threads for it, and it stores a square of the gradient that the
    optimizer takes, too: 50 us instead of 20 for 784 x 128 entries (jax 0.10.2).
    """
    if not is_short_on_one_cpu() or a.size < 2 * BLOCK:
        return jnp.sum(a * b)
    # The barrier comes before any reshape. With one of a reshaped array, jaxlib 0.10.2
    # read other memory, and the norm of a Transformer's gradient was not finite.
    a, b = jax.lax.optimization_barrier((a, b))
    a = a.reshape(-1)
    b = b.reshape(-1)
    blocks = a.size // BLOCK

    def add(number: Any, sums: Any) -> Any:
        at = (number * BLOCK,)
        x = jax.lax.dynamic_slice(a, at, (BLOCK,))
        y = jax.lax.dynamic_slice(b, at, (BLOCK,))
        return sums + x * y

    zeros = jnp.zeros(BLOCK)
    sums = jax.lax.fori_loop(0, blocks, add, zeros)
    rest = slice(blocks * BLOCK, None)
    return jnp.sum(sums) + jnp.sum(a[rest] * b[rest])


def _parts(x: jax.Array) -> tuple[jax.Array, ...]:
    """Return an array as float32; a complex one as two, its real and imaginary part."""
    if jnp.iscomplexobj(x):
        return x.real.astype(jnp.float32), x.imag.astype(jnp.float32)
    return (x.astype(jnp.float32),)


def _where(
    condition: Any,
    new: Any,
    old: Any,
) -> Any:
    """Return `new` where a condition holds, else `old`; both are trees."""
    return jax.tree.map(
        lambda n, o: jnp.where(condition, n, o),
        new,
        old,
    )


def _if(
    condition: Any,
    new: Any,
    old: Any,
) -> Any:
    """Compute `new()` where a condition holds, else `old()`.

    A condition that is known when the step is traced costs nothing in it.
    """
    if isinstance(condition, bool):
        return new() if condition else old()
    return jax.lax.cond(condition, new, old)


def _factors(values: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the factor of a gradient in the sum of them, and that of the sum."""
    decay = MEMORY * values.get("kept", 1.0)
    weight = values.get("gradient_weight")
    if weight is None:
        return 1.0, decay
    steps = values["gradient_steps"]
    return weight * steps, decay * MEMORY ** (steps - 1)


def _gradient_sum(
    before: Any,
    gradients: Any,
    weight: Any,
    usable: Any,
    decay: Any = MEMORY,
) -> tuple[Any, Any]:
    """Add a gradient to the sum s of gradients, if it is usable.

    Returns:
      The sum of the absolute entries of s, and s; NaN and s without the gradient if it
      is not usable.
    """
    after = jax.tree.map(
        lambda s, g: jnp.where(usable, decay * s + (weight * g).astype(s.dtype), s),
        before,
        gradients,
    )
    sizes = [jnp.abs(x).astype(jnp.float32).sum() for x in jax.tree.leaves(after)]
    total = sum(sizes, jnp.float32(0))
    return jnp.where(usable, total, jnp.nan), after


def _smooth(
    state: Smoothed,
    loss: Any,
) -> tuple[dict[str, Any], Smoothed]:
    """Return the signals of the losses before this step, and the means after it."""
    count = state.count.astype(jnp.float32)

    def corrected(decay: float, mean: Any) -> Any:
        return mean / jnp.maximum(1 - decay**count, CORRECTED)

    quick = corrected(QUICK, state.quick)
    slow = corrected(SLOW, state.slow)
    squares = corrected(SLOW, state.squares)
    some = state.count > 0
    mean = jnp.where(some, slow, loss)
    variance = jnp.maximum(squares - slow**2, 0)
    variance = jnp.where(some, variance, 0.0)
    trend = jnp.where(
        some,
        (quick - slow) / LAG,
        0.0,
    )
    values = {"loss_mean": mean, "loss_variance": variance, "loss_trend": trend}
    return values, _entered(state, loss)


def _entered(state: Smoothed, loss: Any) -> Smoothed:
    """Return the means after one more loss, if it is finite."""
    fresh = Smoothed(
        quick=QUICK * state.quick + (1 - QUICK) * loss,
        slow=SLOW * state.slow + (1 - SLOW) * loss,
        squares=SLOW * state.squares + (1 - SLOW) * loss**2,
        count=state.count + 1,
    )
    return jax.tree.map(
        lambda new, old: jnp.where(jnp.isfinite(loss), new, old),
        fresh,
        state,
    )
