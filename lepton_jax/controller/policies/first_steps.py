"""Faults in the first steps, before anything is usual.

What is usual can be learned from batches only, and the first ones may be the faulty
ones. So the first steps are judged in retrospect. A small example: the inputs of the
first three batches are random and of size 5, all others have the size 1.

>>> policy = first_steps()
>>> state = policy.init()
>>> for step, size in enumerate([5.0, 5.1, 4.9] + [1.0] * 6):
...     signals = {
...         "input_rms": jnp.float32(size),
...         "gradient_norm": jnp.float32(1),
...         "loss": jnp.float32(2),
...     }
...     moves, state = policy.update(signals, state)
...     print(step, *(knob for knob in ("skip", "restart") if moves[knob]))
0
1
2
3 skip
4 skip
5 skip
6 skip
7 skip restart
8

The fourth batch is unlike those before it, so it is held back, and so are those that
are like it. Five of them in a row are more than chance: one of the two kinds is wrong.
Whichever it is, the run begins anew with the second kind. If that was the wrong one,
the first kind comes back, and the run begins anew once more.

The size of the inputs does not depend on what the model has learned, so it tells kinds
of batches apart however steep the loss is. Where it doesn't, as with wrong targets, a
sudden fall of loss and gradient does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lepton_jax.controller.policy import Notice, Policy, check_range

# batches of another kind in a row after which the run begins anew: after fewer than
# `SHORT` batches of the first kind, and after more; then more than a burst of 20 has,
# as it costs less to wait for its end. Assumption
FEW = 5
MANY = 25
SHORT = 25
# the same after a single batch
FEWEST = 3
# deviations by which a batch is of another kind, once there are many; and what is added
# to them divided by the number of batches that the deviation is known from; assumption
DEVIATIONS = 6.0
UNSURE = 30.0
# least difference of log(input_rms) between two kinds, and the same while fewer than
# `KNOWN` batches tell the deviation; assumption
LEAST = 0.05
LEAST_AT_FIRST = math.log(8)
KNOWN = 3
# factor by which the gradient's norm falls from one step to the next where targets were
# wrong before, and the loss with it; assumption
FALL = 10.0
FALL_OF_LOSS = 4.0
# steps in a row at the very beginning that are not finite and cost the run its start
LOST = 3
HUGE = 1e30
TINY = 1e-30
NOTICE = Notice(
    "the first batches are unlike those that follow, so the run has begun anew",
    "look at the data's first batches",
)


class Kind(NamedTuple):
    """The usual values of one kind of batches, float32 () but for the count.

    Attributes:
      inputs: mean of log(input_rms).
      variance: its variance.
      norm: mean of log(gradient_norm).
      spread: its variance.
      loss: mean of the loss.
      count: batches, int32 ().
    """

    inputs: Any
    variance: Any
    norm: Any
    spread: Any
    loss: Any
    count: Any


class FirstSteps(NamedTuple):
    """State of `first_steps`.

    Attributes:
      home: the kind of the batches that are learned from.
      other: the kind of the latest batches in a row that are unlike it.
      by_norm: whether these were told apart by their gradients, bool ().
      last: log(gradient_norm) of the last batch, float32 ().
      lost: steps without a finite number before the first one with it, int32 ().
      left: steps in which to look, int32 ().
      used: restarts so far, int32 ().
    """

    home: Kind
    other: Kind
    by_norm: Any
    last: Any
    lost: Any
    left: Any
    used: Any


def first_steps(
    window: int = 60,
    *,
    restarts: int = 3,
) -> Policy:
    """Begin anew where the first batches turn out to be unlike those that follow.

    With x = log(input_rms), its mean m and deviation s over the n batches so far:

        unlike = |x - m| > (6 + 30 / n) s + 0.05

    A batch is also unlike those before it if the gradient's norm falls to a tenth,
    and by as many deviations, and the loss to a quarter from one step to the next. Such
    batches are held back. After 5 of them in a row (25, if there were more than 25
    batches before) the run begins anew: the knob `restart`. It does so, too, with the
    first finite batch after at least 3 that were not finite.

    References:
      Page 1954, "Continuous inspection schemes", for changes that last.

    Args:
      window: steps from the beginning, also from a new one, in which to look.
      restarts: the greatest number of new beginnings.

    Raises:
      RecipeError: an argument is out of range.

    Example:
      >>> from lepton_jax import controllers
      >>> controllers.first_steps().moves
      ('skip', 'restart', 'notice')
    """
    check_range("first_steps", 1, 2**30, whole=True, window=window)
    check_range("first_steps", 0, 2**20, whole=True, restarts=restarts)
    return Policy(
        "first_steps",
        partial(_begin, window),
        partial(_update, window=window, restarts=restarts),
        watches=("input_rms", "gradient_norm", "loss"),
        moves=("skip", "restart", "notice"),
        notices=(NOTICE,),
    )


def _begin(window: int) -> FirstSteps:
    return FirstSteps(
        home=_none(),
        other=_none(),
        by_norm=jnp.bool_(False),
        last=jnp.float32(0),
        lost=jnp.int32(0),
        left=jnp.int32(window),
        used=jnp.int32(0),
    )


def _none() -> Kind:
    zero = jnp.float32(0)
    return Kind(zero, zero, zero, zero, zero, jnp.int32(0))


def _update(
    signals: Mapping[str, Any],
    state: FirstSteps,
    window: int,
    restarts: int,
) -> tuple[dict[str, Any], FirstSteps]:
    batch = _kind_of(signals)
    finite = batch.count > 0
    looking = (state.left > 0) & (state.used < restarts)

    by_inputs = _is_unlike(state.home, batch)
    by_norm = _has_fallen(state, batch)
    unlike = looking & finite & (state.home.count > 0) & (by_inputs | by_norm)
    other = _where(
        unlike,
        _joined(_where(_is_alike(state, batch), state.other, _none()), batch),
        _where(finite, _none(), state.other),
    )

    recovered = looking & finite & (state.home.count == 0) & (state.lost >= LOST)
    begins = (unlike & (other.count >= _enough(state.home.count))) | recovered
    home = _where(finite & ~unlike, _joined(state.home, batch), state.home)
    after = FirstSteps(
        home=_where(begins, _where(recovered, _none(), other), home),
        other=_where(begins, _none(), other),
        by_norm=unlike & by_norm & ~begins,
        last=jnp.where(finite, batch.norm, state.last),
        lost=jnp.where(begins | finite, 0, state.lost + (state.home.count == 0)),
        left=jnp.where(begins, window, jnp.maximum(state.left - 1, 0)),
        used=state.used + begins,
    )
    return {"skip": unlike, "restart": begins, "notice": begins}, after


def _kind_of(signals: Mapping[str, Any]) -> Kind:
    """Return the kind that one batch makes; its count is 0 if it is not finite."""
    norm = signals["gradient_norm"]
    loss = signals["loss"]
    usable = jnp.isfinite(norm) & jnp.isfinite(loss)
    usable &= (jnp.abs(loss) < HUGE) & (norm < HUGE)
    # inputs that can't be measured are all alike
    inputs = _log(signals["input_rms"])
    return Kind(
        inputs=inputs,
        variance=jnp.float32(0),
        norm=_log(norm),
        spread=jnp.float32(0),
        loss=jnp.where(usable, loss, 0.0),
        count=usable.astype(jnp.int32),
    )


def _log(size: Any) -> Any:
    known = jnp.nan_to_num(size, nan=1.0, posinf=HUGE, neginf=TINY)
    return jnp.log(jnp.clip(known, TINY, HUGE))


def _joined(kind: Kind, batch: Kind) -> Kind:
    """Return a kind with one more batch."""
    count = kind.count + 1
    share = 1 / count.astype(jnp.float32)
    away = batch.inputs - kind.inputs
    off = batch.norm - kind.norm
    return Kind(
        inputs=kind.inputs + share * away,
        variance=(1 - share) * (kind.variance + share * away**2),
        norm=kind.norm + share * off,
        spread=(1 - share) * (kind.spread + share * off**2),
        loss=kind.loss + share * (batch.loss - kind.loss),
        count=jnp.minimum(count, 2**30),
    )


def _is_unlike(home: Kind, batch: Kind) -> Any:
    """Whether a batch's inputs are of another size than usual."""
    deviations = _deviations(home.variance, home.count)
    least = jnp.where(home.count < KNOWN, LEAST_AT_FIRST, LEAST)
    return jnp.abs(batch.inputs - home.inputs) > deviations + least


def _deviations(variance: Any, count: Any) -> Any:
    """Return the distance from a mean that is no chance."""
    known = jnp.maximum(count, 1).astype(jnp.float32)
    return (DEVIATIONS + UNSURE / known) * jnp.sqrt(variance)


def _has_fallen(state: FirstSteps, batch: Kind) -> Any:
    """Whether gradient and loss have fallen at once, and are still as low."""
    home = state.home
    least = jnp.maximum(math.log(FALL), _deviations(home.spread, home.count))
    low = (home.norm - batch.norm > least) & (home.loss > 0)
    low &= batch.loss < home.loss / FALL_OF_LOSS
    at_once = state.last - batch.norm > math.log(FALL)
    return low & (at_once | state.by_norm)


def _is_alike(state: FirstSteps, batch: Kind) -> Any:
    """Whether a batch is nearer to the other kind's than to the usual inputs."""
    near = jnp.abs(batch.inputs - state.other.inputs)
    far = jnp.abs(batch.inputs - state.home.inputs)
    return state.by_norm | (2 * near < far)


def _enough(count: Any) -> Any:
    """Return the batches in a row after which the other kind is no chance."""
    few = jnp.where(count == 1, FEWEST, FEW)
    return jnp.where(count > SHORT, MANY, few)


def _where(condition: Any, new: Any, old: Any) -> Any:
    """Return `new` where a condition holds, else `old`; both are trees."""
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)
