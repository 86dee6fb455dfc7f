"""Serves the average that evaluations found best.

An average of the parameters is kept when an evaluation finds it better than all before.
If the last evaluation of a run is worse than that, the kept one is served. A small
example: the losses of four evaluations, the last one at the end of the run:

>>> policy = best_average()
>>> state = policy.init()
>>> for count, test in enumerate([3, 2, 2.1, 2.2], 1):
...     signals = {
...         "loss": jnp.float32(1),
...         "progress": jnp.float32(count / 4),
...         "evaluations": jnp.float32(count),
...         "evaluation_loss": jnp.float32(test),
...     }
...     moves, state = policy.update(signals, state)
...     print(moves["keep_average"], moves["serve_kept"])
1.0 0.0
1.0 0.0
0.0 0.0
0.0 1.0
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from lepton_jax.controller.policy import Notice, Policy, check_range

NOTICE = Notice(
    "the model overfits: the average at which its evaluation was best is served",
    "give more data, a smaller model or more regularization, or train for fewer steps",
)


class Watch(NamedTuple):
    """State of `best_average`.

    Attributes:
      seen: evaluations so far, float32 ().
      total: sum of the training losses since the last one, float32 ().
      count: the number of them, float32 ().
      best: the lowest loss of an evaluation, float32 ().
      trained: mean training loss before it, float32 ().
      worse: evaluations in a row that were worse, int32 ().
      told: whether a person was told that the model overfits, bool ().
      kept: whether an average was kept, bool ().
      served: whether the kept average is served, bool ().
    """

    seen: Any
    total: Any
    count: Any
    best: Any
    trained: Any
    worse: Any
    told: Any
    kept: Any
    served: Any


def best_average(
    patience: int = 2,
    margin: float = 0.03,
    gap: float = 0.7,
    quiet: float = 0.1,
) -> Policy:
    """Serve the average of the parameters at which an evaluation was best.

    A copy of it is kept then, and served from the last step of the budget on if the
    last evaluation before it was worse. The average is that of another policy, such as
    `schedule_free` or `averaging`, and moves little from one evaluation to the next.
    Memory: a copy of the parameters.

    A person is told that the model overfits when `patience` evaluations in a row were
    no better than the best one, the last of them was worse by more than `margin` of its
    loss, and yet the training loss between the last two evaluations was below that
    before the best one, and below `gap` times that of the evaluation. So neither faults
    of the data, which raise the training loss too, nor the noise of a high rate are
    taken for it. A run whose budget is not known serves the kept average from there on.
    A run without evaluations is left alone.

    References:
      Prechelt 1998, "Early stopping - but when?" (criteria GL and UP).

    Args:
      patience: evaluations.
      margin: share of the best evaluation's loss.
      gap: share of the last evaluation's loss. Without it a linear regression on 442
        samples was said to overfit at 1.3 times the loss that it ended with.
      quiet: share of the run whose evaluations do not count, as the rate is still being
        found.

    Raises:
      RecipeError: an argument is out of range. When the recipe is traced, also where no
        policy makes an average.

    Example:
      >>> from lepton_jax import controllers
      >>> controllers.best_average().moves
      ('averaging_decay', 'keep_average', 'serve_kept', 'notice')
    """
    check_range("best_average", 0, 1, quiet=quiet)
    check_range("best_average", 1, math.inf, whole=True, patience=patience)
    check_range("best_average", 0, math.inf, margin=margin, gap=gap)

    def update(
        signals: Mapping[str, Any], state: Watch
    ) -> tuple[dict[str, Any], Watch]:
        after = _watched(signals, state, quiet)
        overfits = _is_rising(signals, after, patience, margin)
        overfits &= _has_left_behind(signals, state, gap)
        told = state.told | overfits

        # what the last evaluation found, which may be some steps ago
        kept_is_better = state.kept & (after.worse > 0)
        ends = signals["progress"] >= 1
        endless = ~jnp.isfinite(signals["progress"])
        serve = ~state.served & kept_is_better & (ends | (endless & told))
        served = state.served | serve
        is_best = _is_fresh(signals, state) & (after.worse == 0) & ~served
        is_best &= ~(signals["progress"] <= quiet)
        kept = state.kept | is_best
        after = after._replace(told=told, served=served, kept=kept)
        moves = {
            "averaging_decay": jnp.where(served, 1.0, jnp.nan),
            "keep_average": jnp.where(is_best, 1.0, 0.0),
            "serve_kept": jnp.where(serve, 1.0, 0.0),
            "notice": jnp.where(told & ~state.told, 1.0, 0.0),
        }
        return moves, after

    return Policy(
        "best_average",
        _begin,
        update,
        watches=("loss", "evaluations", "evaluation_loss", "progress"),
        moves=("averaging_decay", "keep_average", "serve_kept", "notice"),
        notices=(NOTICE,),
    )


def _begin() -> Watch:
    return Watch(
        seen=jnp.float32(0),
        total=jnp.float32(0),
        count=jnp.float32(0),
        best=jnp.float32(jnp.inf),
        trained=jnp.float32(jnp.inf),
        worse=jnp.int32(0),
        told=jnp.bool_(False),
        kept=jnp.bool_(False),
        served=jnp.bool_(False),
    )


def _watched(
    signals: Mapping[str, Any],
    state: Watch,
    quiet: float,
) -> Watch:
    """Return the state with one more step, and its evaluation if it is a new one."""
    evaluation = signals["evaluation_loss"]
    fresh = _is_fresh(signals, state)
    young = signals["progress"] <= quiet
    better = fresh & ((evaluation < state.best) | young)
    worse = jnp.where(better, 0, state.worse + fresh)

    usable = jnp.isfinite(signals["loss"])
    loss = jnp.where(usable, signals["loss"], 0.0)
    return Watch(
        seen=jnp.where(fresh, signals["evaluations"], state.seen),
        total=jnp.where(fresh, 0.0, state.total) + loss,
        count=jnp.where(fresh, 0.0, state.count) + usable,
        best=jnp.where(better, evaluation, state.best),
        trained=jnp.where(better, _mean_loss(state), state.trained),
        worse=jnp.minimum(worse, 2**30),
        told=state.told,
        kept=state.kept,
        served=state.served,
    )


def _is_fresh(signals: Mapping[str, Any], state: Watch) -> Any:
    is_new = signals["evaluations"] > state.seen
    return is_new & jnp.isfinite(signals["evaluation_loss"])


def _mean_loss(state: Watch) -> Any:
    """Return the mean training loss since the last evaluation."""
    return state.total / jnp.maximum(state.count, 1.0)


def _is_rising(
    signals: Mapping[str, Any],
    after: Watch,
    patience: int,
    margin: float,
) -> Any:
    """Whether the evaluations have been worse than the best one for long enough."""
    limit = after.best + margin * jnp.abs(after.best)
    return (after.worse >= patience) & (signals["evaluation_loss"] > limit)


def _has_left_behind(
    signals: Mapping[str, Any],
    state: Watch,
    gap: float,
) -> Any:
    """Whether this evaluation is new, and the training loss fell far below it."""
    evaluation = signals["evaluation_loss"]
    mean = _mean_loss(state)
    fell = (mean < state.trained) & (mean < gap * evaluation)
    return _is_fresh(signals, state) & fell & (evaluation > 0)
