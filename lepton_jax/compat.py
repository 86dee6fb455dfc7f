"""The one place that knows where JAX versions differ (0.10 on Python 3.11, 0.12 on 3.12
and later), or what it hides.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax._src import (  # no public names
    compiler,  # for who writes to the compilation cache
    distributed,  # for the key-value store of jax.distributed
    effects,  # to tell the effects that keep their order
    source_info_util,  # to give an equation its place in the user's code again
)
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.sharding import AxisType, Mesh
from jaxlib import _jax  # for the address of a process's CPU devices

__all__ = [
    "ClosedJaxpr",
    "Jaxpr",
    "Literal",
    "at_source",
    "cache_hits",
    "coordination",
    "found_at",
    "jit_on",
    "jit_where",
    "keep_executables",
    "make_mesh",
    "noting_sow",
    "ordered_effect",
    "placed",
    "scan_counts",
    "source_line",
    "whole_axes",
    "without_proxies",
]


def make_mesh(axes: dict[str, int], devices: Any) -> Mesh:
    """A mesh whose axes XLA's partitioner fills in; from 0.12 on JAX's default,
    Explicit, refuses un-annotated models.
    """
    shape = tuple(axes.values())
    return Mesh(
        np.asarray(devices).reshape(shape),
        tuple(axes),
        axis_types=(AxisType.Auto,) * len(shape),
    )


@contextlib.contextmanager
def without_proxies() -> Iterator[None]:
    """No proxy in the environment while it is open: gRPC would look for JAX's
    coordinator through it, and wait for ever.
    """
    hidden = {
        name: os.environ.pop(name)
        for name in list(os.environ)
        if name.lower().endswith("_proxy")
    }
    try:
        yield
    finally:
        os.environ.update(hidden)


_GLOO = _jax.make_gloo_tcp_collectives


def found_at(address: str | None) -> None:
    """Let other processes find this one's CPU devices at an address; to be called
    before JAX is first used.

    Gloo takes what the machine's own name stands for, which in many containers is
    nothing, and on Debian 127.0.1.1.

    Args:
      address: numerical; None leaves it to Gloo.
    """
    _jax.make_gloo_tcp_collectives = (
        _GLOO if address is None else functools.partial(_GLOO, hostname=address)
    )


def coordination() -> Any:
    """The client of the key-value store that the processes of `jax.distributed` share;
    None in a process alone.
    """
    return distributed.global_state.client


def keep_executables(folder: Any) -> None:
    """Let JAX's persistent compilation cache be in a folder, unless the user has named
    another; to be called before compiling.

    JAX lets only process 0 write to it. That serves all where they compile to the same
    key; but the key of a program for CPUs holds which process it is for: there every
    process writes its own.
    """
    if not jax.config.values["jax_compilation_cache_dir"]:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if (
        distributed.global_state.process_id
        and jax.default_backend() == "cpu"
        and compiler._cache_write is _WRITE
    ):
        compiler._cache_write = _write_as_process_0  # type: ignore[assignment]


_WRITE = compiler._cache_write


def _write_as_process_0(*args: Any) -> None:
    own = distributed.global_state.process_id
    distributed.global_state.process_id = 0
    try:
        _WRITE(*args)
    finally:
        distributed.global_state.process_id = own


_hits = 0


def cache_hits() -> int:
    """How many executables this process has read from JAX's persistent compilation
    cache.
    """
    return _hits


def _count(event: str, **_: Any) -> None:
    global _hits
    _hits += event == "/jax/compilation_cache/cache_hits"


jax.monitoring.register_event_listener(_count)


def placed(value: Any, sharding: Any) -> jax.Array:
    """A host's array on devices, some of which may be other processes'; all of these
    hold the same value.

    `jax.device_put` would do so too, but first lets the devices compare what the
    processes hold.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    value = np.asarray(value)
    return jax.make_array_from_callback(
        value.shape, sharding, lambda index: value[index]
    )


@contextlib.contextmanager
def at_source(eqn: Any, callers: tuple) -> Iterator[None]:
    """What is bound inside keeps the equation's source line, its name stack below those
    of the calls around it.
    """
    names = source_info_util.current_name_stack()
    for outer in (*callers, eqn):
        names = names + outer.source_info.name_stack
    traceback = _innermost(eqn, callers).source_info.traceback
    with source_info_util.user_context(traceback, name_stack=names), eqn.ctx.manager:
        yield


def source_line(eqn: Any, callers: tuple = ()) -> str:
    """ "file.py:12 (function)" of the user's line that an equation stems from; of its
    innermost caller that has one.
    """
    return source_info_util.summarize(_innermost(eqn, callers).source_info)


def _innermost(eqn: Any, callers: tuple) -> Any:
    """What JAX traces once and calls again, such as jnp.take, knows no line of the
    user's; its call does.
    """
    for one in (eqn, *reversed(callers)):
        if source_info_util.user_frame(one.source_info.traceback) is not None:
            return one
    return eqn


def ordered_effect(jaxpr: Jaxpr) -> Any | None:
    """The first equation with an effect that keeps its order, such as an ordered print.

    JAX compiles none of them for several devices. An equation that calls others gives
    the first inside of it.
    """
    for eqn in jaxpr.eqns:
        if not effects.ordered_effects.filter_in(eqn.effects):
            continue
        inner = (_ordered_within(value) for value in eqn.params.values())
        return next((found for found in inner if found is not None), eqn)
    return None


def _ordered_within(value: Any) -> Any | None:
    """The first such equation of the jaxprs in a parameter of an equation."""
    for sub in value if isinstance(value, tuple | list) else (value,):
        jaxpr = getattr(sub, "jaxpr", sub)
        if isinstance(jaxpr, Jaxpr):
            found = ordered_effect(jaxpr)
            if found is not None:
                return found
    return None


def scan_counts(eqn: Any) -> tuple[int, int]:
    """How many of a scan's operands are constants of its body, and how many are
    carried.
    """
    if "num_carry" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carried, _ = eqn.params["ft_in"].unpack()
    return len(list(consts)), len(list(carried))


def jit_on(
    devices: Any,
    function: Callable,
    **options: Any,
) -> Any:
    """`jax.jit` with what XLA must be told of the devices.

    Its CPU backend starts collectives that don't depend on each other in any order, on
    as many threads as there are cores: with several virtual devices they can wait for
    each other for ever (seen on jax 0.10 and two cores).
    """
    devices = list(devices)
    several = len(devices) > 1 and devices[0].platform == "cpu"
    return jax.jit(
        function,
        compiler_options=(
            {"xla_cpu_enable_concurrency_optimized_scheduler": False}
            if several
            else None
        ),
        **options,
    )


def jit_where(function: Callable) -> Callable:
    """`function` of pytrees of arrays, jitted for the devices on which they lie (see
    `jit_on`).
    """
    jitted: dict[frozenset, Any] = {}

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        devices = frozenset(jax.tree.leaves(args)[0].sharding.device_set)
        if devices not in jitted:
            jitted[devices] = jit_on(devices, function)
        return jitted[devices](*args)

    return call


def whole_axes(function: Callable) -> Callable:
    """Let a function of arrays use axis names, e.g. in `jax.lax.pmean(x, "batch")`.

    Under `jit` each function sees the whole batch, on however many devices it lies. So
    an axis of one element is bound to each name: over it, a sum is the value itself.
    Names are learned from JAX's errors, so that a function without any costs nothing.

    Args:
      function: of pytrees of arrays, to a pytree of arrays.
    """

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        names: list[str] = []
        while True:
            try:
                return _with_axes(function, names)(*args)
            except NameError as error:
                name = _unbound_axis(error)
                if name is None or name in names:
                    raise
                names.append(name)

    return call


def _unbound_axis(error: NameError) -> str | None:
    """The axis name that JAX (0.10, 0.12) complains about; None for another error."""
    found = re.search(r"unbound axis name: ([^\s.]+)", str(error))
    return found[1] if found else None


def _with_axes(function: Callable, names: list[str]) -> Callable:
    if not names:
        return function

    def bound(out_axes: int | None) -> Callable:
        run = function
        for name in names:
            run = jax.vmap(
                run,
                in_axes=None,
                out_axes=out_axes,
                axis_name=name,
                axis_size=1,
            )
        return run

    def call(*args: Any) -> Any:
        try:
            return bound(None)(*args)
        except ValueError as error:
            if "out_axes is None" not in str(error):
                raise
        # e.g. of `axis_index`: the results differ along the axis, as far as JAX knows
        first = tuple(0 for _ in names)
        return jax.tree.map(lambda x: x[first], bound(0)(*args))

    return call


@contextlib.contextmanager
def noting_sow(kind: type, note: Callable) -> Iterator[None]:
    """Tell of each call of `sow`, as long as it is open.

    Neither Linen nor NNX says which variables were sown, rather than kept by the
    module as its state. Flax's own function still runs; that NNX deprecates it outside
    of `nnx.capture` is not for the user to hear, who does not make the call.

    Args:
      kind: `linen.Module` or `nnx.Module`.
      note: told (module, collection or variable type, name) of each.
    """
    original: Any = kind.sow  # type: ignore[attr-defined]
    may_be_off = "capture_noop" in inspect.signature(original).parameters

    def sow(
        self: Any,
        where: Any,
        name: str,
        *args: Any,
        **options: Any,
    ) -> Any:
        note(self, where, name)
        if may_be_off:  # from Flax 0.12.12 on a setting turns it off
            options.setdefault("capture_noop", False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return original(self, where, name, *args, **options)

    kind.sow = sow  # type: ignore[attr-defined]
    try:
        yield
    finally:
        kind.sow = original  # type: ignore[attr-defined]
