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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Run = Callable[..., Any]


class OneCpu(NamedTuple):
    """What is known of a step that runs on one device, a CPU.

    Attributes:
      run: called with a function of scalars and its arguments; returns its result.
      is_short: whether a step is so short that starting an operation counts in it.
    """

    run: Run
    is_short: bool


_one_cpu: ContextVar[OneCpu | None] = ContextVar("one_cpu", default=None)


@contextmanager
def on_one_cpu(known: OneCpu) -> Iterator[None]:
    """Let what is traced meanwhile be for one device, a CPU."""
    token = _one_cpu.set(known)
    try:
        yield
    finally:
        _one_cpu.reset(token)


def is_short_on_one_cpu() -> bool:
    """Whether what is traced now is a short step for one device, a CPU."""
    known = _one_cpu.get()
    return known is not None and known.is_short


def of_scalars(
    function: Callable[..., Any],
    *arguments: Any,
) -> Any:
    """Return what a function makes of scalars, computed as is quick on the device."""
    known = _one_cpu.get()
    return known.run(function, *arguments) if known else function(*arguments)


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
