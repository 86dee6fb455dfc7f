"""The end of a run whose evaluations no longer improve, and its best parameters.

A small example: the losses of five evaluations, of which the second is the best.

>>> policy = early_stopping(patience=2)
>>> state = policy.init()
>>> for count, test in enumerate([3, 2, 2.1, 2.2, 1.0], 1):
...     signals = {
...         "evaluations": jnp.float32(count),
...         "evaluation_loss": jnp.float32(test),
...         "progress": jnp.float32(count / 10),
...     }
...     moves, state = policy.update(signals, state)
...     print(moves["keep_average"], moves["serve_kept"], moves["stop"])
1.0 0.0 0.0
1.0 0.0 0.0
0.0 0.0 0.0
0.0 1.0 1.0
1.0 0.0 0.0
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from lepton_jax.controller.policy import Policy, check_range, is_better_lower
from lepton_jax.errors import RecipeError


class Waiting(NamedTuple):
    """State of `early_stopping`.

    Attributes:
      seen: evaluations so far, float32 ().
      best: the best value, float32 (); its sign is such that lower is better.
      waited: evaluations in a row that were no better, int32 ().
    """

    seen: Any
    best: Any
    waited: Any


def early_stopping(
    metric: str = "loss",
    patience: int = 5,
    *,
    rtol: float = 0.0,
    lower: bool | None = None,
) -> Policy:
    """End the run when a metric of the evaluations has stopped improving.

    An evaluation is better than the best one b by

        value < b - rtol * |b|

    where lower is better, and the other way round where it is not. A copy of the
    parameters is kept as each such evaluation found them, running statistics included.
    After `patience` evaluations in a row that are no better, the run ends, and the kept
    copy is what is evaluated, predicted and served with. So it is where the budget ends
    first and the last evaluation before its last step was no better.

    Where another policy averages the parameters (`averaging`, `schedule_free`), the
    average is kept, as it is what is evaluated. Memory: two copies of the parameters,
    one of which is written in each step; where there is an average, one copy more. The
    best checkpoint on disk is a matter of `Recipe.best`. A run that is told to go on
    after its end waits anew.

    References:
      Prechelt 1998, "Early stopping - but when?" (criterion UP).

    Args:
      metric: "loss", or a name in `Recipe.metrics`.
      patience: evaluations; how often there is one says `Recipe.evaluate_every`.
      rtol: share of the best value by which a better one must differ.
      lower: whether lower is better. None: it is for losses, errors, norms and the
        like, by their names.

    Raises:
      RecipeError: an argument is out of range. When the recipe is traced, also where
        there is no such metric; when a run begins, where there is nothing to evaluate
        on.

    Example:
      >>> from lepton_jax import controllers
      >>> controllers.early_stopping("accuracy", patience=3).watches
      ('evaluations', 'evaluation_accuracy', 'progress')
    """
    check_range("early_stopping", 1, math.inf, whole=True, patience=patience)
    check_range("early_stopping", 0, 1, rtol=rtol)
    if not isinstance(metric, str):
        raise RecipeError(
            f"metric is {metric!r}",
            where="controllers.early_stopping",
            remedy='give "loss", or the name of one of Recipe.metrics',
        )
    signal = f"evaluation_{metric.removeprefix('evaluation_')}"
    lower = is_better_lower(signal) if lower is None else lower
    sign = 1.0 if lower else -1.0

    def update(
        signals: Mapping[str, Any], state: Waiting
    ) -> tuple[dict[str, Any], Waiting]:
        fresh = signals["evaluations"] > state.seen
        value = sign * signals[signal]
        better = fresh & _is_better(value, state.best, rtol)
        worse = fresh & ~better
        waited = jnp.where(better, 0, state.waited + worse)

        gives_up = worse & (waited >= patience)
        ends = (signals["progress"] >= 1) & (waited > 0)
        serve = jnp.isfinite(state.best) & (gives_up | ends)
        moves = {
            "averaging_decay": jnp.float32(jnp.nan),
            "keep_average": jnp.where(better, 1.0, 0.0),
            "serve_kept": jnp.where(serve, 1.0, 0.0),
            "stop": jnp.where(gives_up, 1.0, 0.0),
        }
        after = Waiting(
            seen=jnp.where(fresh, signals["evaluations"], state.seen),
            best=jnp.where(better, value, state.best),
            waited=jnp.where(gives_up, 0, jnp.minimum(waited, 2**30)),
        )
        return moves, after

    return Policy(
        "early_stopping",
        _begin,
        update,
        watches=("evaluations", signal, "progress"),
        moves=("averaging_decay", "keep_average", "serve_kept", "stop"),
    )


def _is_better(value: Any, best: Any, rtol: float) -> Any:
    """Whether a value is finite, and lower than the best one by enough."""
    bar = best - rtol * jnp.abs(best)
    bar = jnp.where(jnp.isfinite(best), bar, best)
    return jnp.isfinite(value) & (value < bar)


def _begin() -> Waiting:
    return Waiting(
        seen=jnp.float32(0),
        best=jnp.float32(jnp.inf),
        waited=jnp.int32(0),
    )
