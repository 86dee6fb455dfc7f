"""Work that a step does or leaves, decided in the step.

A conditional in XLA gives its results new buffers on the CPU: where nothing is done,
trees are copied, and where something is, they are not updated in place. A loop that is
run once or never has neither fault. On other devices, which would ask the loop's
condition twice, it is a conditional.

>>> [float(once(jnp.bool_(due), lambda x: 2 * x, jnp.float32(3))) for due in (0, 1)]
[3.0, 6.0]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp

_is_short: ContextVar[bool] = ContextVar("is_short_on_one_cpu", default=False)


@contextmanager
def on_one_cpu(is_short: bool) -> Iterator[None]:
    """Say whether what is traced meanwhile is a short step for one device, a CPU.

    Short is a step in which it counts to start an operation.
    """
    token = _is_short.set(is_short)
    try:
        yield
    finally:
        _is_short.reset(token)


def is_short_on_one_cpu() -> bool:
    """Whether what is traced now is a short step for one device, a CPU."""
    return _is_short.get()


def once(
    condition: Any,
    step: Callable[[Any], Any],
    carry: Any,
) -> Any:
    """Return `step(carry)` where a condition holds, else `carry`, a pytree."""

    def as_loop(condition: Any, carry: Any) -> Any:
        def body(state: tuple[Any, Any]) -> tuple[Any, Any]:
            return jnp.bool_(False), step(state[1])

        _, after = jax.lax.while_loop(lambda s: s[0], body, (condition, carry))
        return after

    def as_conditional(condition: Any, carry: Any) -> Any:
        return jax.lax.cond(
            condition,
            step,
            lambda x: x,
            carry,
        )

    return jax.lax.platform_dependent(
        condition,
        carry,
        cpu=as_loop,
        default=as_conditional,
    )


def either(
    condition: Any,
    first: Callable[[Any], Any],
    second: Callable[[Any], Any],
    carry: Any,
) -> Any:
    """Return `first(carry)` where a condition holds, else `second(carry)`."""

    def as_loops(condition: Any, carry: Any) -> Any:
        carry = once(condition, first, carry)
        return once(~condition, second, carry)

    def as_conditional(condition: Any, carry: Any) -> Any:
        return jax.lax.cond(condition, first, second, carry)

    return jax.lax.platform_dependent(
        condition,
        carry,
        cpu=as_loops,
        default=as_conditional,
    )
