"""The one place that knows where versions of JAX and Flax differ, or what they hide.

JAX is 0.10 on Python 3.11, and 0.12 on 3.12 and later.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

# These have no public names. `ad_util` adds gradients up, `compiler` decides which
# process writes to the compilation cache, `distributed` holds the key-value store of
# jax.distributed, `effects` knows the effects that keep their order, `mlir` writes a
# program as bytes, and `source_info_util` gives an equation its place in the user's
# code again.
from jax._src import ad_util, compiler, distributed, effects, source_info_util
from jax._src.interpreters import mlir
from jax.experimental.layout import Layout, with_layout_constraint
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.sharding import AxisType, Mesh
from jaxlib import _jax  # for the address of a process's CPU devices

__all__ = [
    "HOST_MEMORY",
    "ClosedJaxpr",
    "Jaxpr",
    "Literal",
    "add_any",
    "at_source",
    "cache_hits",
    "compile_request",
    "coordination",
    "found_at",
    "jit_on",
    "jit_where",
    "keep_executables",
    "make_mesh",
    "noting_sow",
    "on_host",
    "ordered_effect",
    "placed",
    "row_major",
    "scan_counts",
    "source_line",
    "splash_gradient",
    "static_text",
    "whole_axes",
    "without_paths",
    "without_proxies",
]


# what JAX calls the part of a host's memory that devices read and write by themselves
HOST_MEMORY = "pinned_host"


def on_host(aval: Any) -> bool:
    """Whether a traced array lies in the host's memory."""
    return getattr(aval, "memory_space", None) == jax.memory.Space.Host


def row_major(x: Any) -> Any:
    """Return an array that XLA lays out with its last dim innermost."""
    layout = Layout(tuple(range(x.ndim)))
    return with_layout_constraint(x, layout) if x.ndim > 1 else x


def make_mesh(
    axes: dict[str, int],
    devices: Any,
) -> Mesh:
    """Return a mesh whose axes XLA's partitioner fills in.

    JAX's own default from 0.12 on, Explicit, refuses models without annotations.

    Args:
      axes: name to size, outermost first.
      devices: as many as the sizes' product.
    """
    shape = tuple(axes.values())
    return Mesh(
        np.asarray(devices).reshape(shape),
        tuple(axes),
        axis_types=(AxisType.Auto,) * len(shape),
    )


@contextlib.contextmanager
def without_proxies() -> Iterator[None]:
    """Hide proxies from the environment while the context is open.

    gRPC would look for JAX's coordinator through a proxy, and wait forever.
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
    """Let other processes find this one's CPU devices at an address.

    It must be called before JAX is first used. Gloo by itself resolves the machine's
    own name, which in many containers gives nothing, and on Debian 127.0.1.1.

    Args:
      address: numerical; None leaves it to Gloo.
    """
    make = _GLOO
    if address is not None:
        make = functools.partial(_GLOO, hostname=address)
    _jax.make_gloo_tcp_collectives = make


def coordination() -> Any:
    """Return the client of the key-value store that `jax.distributed` processes share.

    Returns:
      The client; None in a process alone.
    """
    return distributed.global_state.client


def keep_executables(folder: Any) -> None:
    """Put JAX's persistent compilation cache into a folder.

    It must be called before anything is compiled, and does nothing if the user has
    named a folder.

    JAX lets only process 0 write to the cache. That serves all processes where they
    compile to the same key. The key of a program for CPUs, however, holds the process
    that it is for: there every process writes its own.
    """
    if not jax.config.values["jax_compilation_cache_dir"]:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

    not_first = bool(distributed.global_state.process_id)
    untouched = compiler._cache_write is _WRITE
    if not_first and untouched and jax.default_backend() == "cpu":
        compiler._cache_write = _write_as_process_0  # type: ignore[assignment]


_WRITE = compiler._cache_write


def _write_as_process_0(*args: Any) -> None:
    own = distributed.global_state.process_id
    distributed.global_state.process_id = 0
    try:
        _WRITE(*args)
    finally:
        distributed.global_state.process_id = own


DYNAMIC = "tensor<?"  # type of an array whose first extent is not known yet

_hits = 0


def cache_hits() -> int:
    """Return how many executables this process has read from the compilation cache."""
    return _hits


def _count_hit(event: str, **_: Any) -> None:
    global _hits
    if event == "/jax/compilation_cache/cache_hits":
        _hits += 1


jax.monitoring.register_event_listener(_count_hit)


@contextlib.contextmanager
def without_paths() -> Iterator[None]:
    """Leave the folders of source files out of programs that are lowered meanwhile.

    A program that somebody else opens need not tell how its maker's disk looks.
    """
    settings = {
        "jax_hlo_source_file_canonicalization_regex": ".*/",
        "jax_traceback_in_locations_limit": 1,
    }
    before = {name: jax.config.values[name] for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def static_text(lowered: Any) -> str:
    """Return a lowered program as MLIR text without dynamic shapes.

    A program of `jax.export` that is called keeps its symbolic extents until it is
    compiled, also where the shapes of the arguments are known.

    Args:
      lowered: of arguments whose shapes are known.
    """
    module = lowered.compiler_ir("stablehlo")
    if DYNAMIC in module.operation.get_asm(large_elements_limit=0):
        module = mlir.refine_polymorphic_shapes(module)
    return module.operation.get_asm(large_elements_limit=None)


class _Taken(Exception):
    """A request to the compiler was taken instead of being served."""


def compile_request(lowered: Any) -> tuple[bytes, bytes]:
    """Return what compiling a lowered program would hand to XLA.

    Args:
      lowered: a program that was not compiled yet.

    Returns:
      The program as MLIR bytecode; XLA's compile options as a serialized protocol
      buffer.
    """
    taken: list[tuple[bytes, bytes]] = []

    def take(
        backend: Any,
        computation: Any,
        devices: Any,
        options: Any,
        *_: Any,
    ) -> Any:
        module = mlir.module_to_bytecode(computation)
        taken.append((module, options.SerializeAsString()))
        raise _Taken

    original = compiler.compile_or_get_cached
    compiler.compile_or_get_cached = take  # type: ignore[assignment]
    try:
        lowered.compile()
    except _Taken:
        pass
    finally:
        compiler.compile_or_get_cached = original
    (request,) = taken
    return request


def placed(
    value: Any,
    sharding: Any,
) -> jax.Array:
    """Put a host's array on devices, some of which may belong to other processes.

    All of these processes must hold the same value. `jax.device_put` would put it there
    too, but it first lets the devices compare the values of the processes.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    value = np.asarray(value)
    return jax.make_array_from_callback(
        value.shape, sharding, lambda index: value[index]
    )


@contextlib.contextmanager
def at_source(
    eqn: Any,
    callers: tuple,
) -> Iterator[None]:
    """Give equations that are bound in the context the source line of another one.

    Args:
      eqn: the other equation; its name stack is put below those of the calls.
      callers: the calls around it, outermost first.
    """
    names = source_info_util.current_name_stack()
    for outer in (*callers, eqn):
        names = names + outer.source_info.name_stack
    traceback = _innermost(eqn, callers).source_info.traceback
    with source_info_util.user_context(traceback, name_stack=names), eqn.ctx.manager:
        yield


def source_line(
    eqn: Any,
    callers: tuple = (),
) -> str:
    """Return the user's line that an equation stems from.

    Args:
      eqn: the equation.
      callers: the calls around it, outermost first.

    Returns:
      "file.py:12 (function)", of the innermost one of them that has such a line.
    """
    return source_info_util.summarize(_innermost(eqn, callers).source_info)


def _innermost(eqn: Any, callers: tuple) -> Any:
    """Return an equation, or the innermost of its callers, that has a user's line.

    A function that JAX traces once and calls again, such as jnp.take, knows no line of
    the user's; its call does.
    """
    for candidate in (eqn, *reversed(callers)):
        traceback = candidate.source_info.traceback
        if source_info_util.user_frame(traceback) is not None:
            return candidate
    return eqn


def ordered_effect(jaxpr: Jaxpr) -> Any | None:
    """Return the first equation with an effect that keeps its order.

    An ordered print is one, for instance. JAX compiles none of them for several
    devices. An equation that calls others gives the first inside of it.
    """
    for eqn in jaxpr.eqns:
        if effects.ordered_effects.filter_in(eqn.effects):
            for parameter in eqn.params.values():
                inner = _ordered_effect_within(parameter)
                if inner is not None:
                    return inner
            return eqn
    return None


def _ordered_effect_within(parameter: Any) -> Any | None:
    """Return the first such equation of the jaxprs in a parameter of an equation."""
    several = isinstance(parameter, tuple | list)
    for candidate in parameter if several else (parameter,):
        jaxpr = getattr(candidate, "jaxpr", candidate)
        if isinstance(jaxpr, Jaxpr):
            eqn = ordered_effect(jaxpr)
            if eqn is not None:
                return eqn
    return None


def add_any(x: Any, y: Any) -> Any:
    """Add two parts of a gradient, as JAX's own backward passes do."""
    return ad_util.add_jaxvals(x, y)


def scan_counts(
    eqn: Any,
) -> tuple[int, int]:
    """Return the number of a scan's constants, and of its carried operands."""
    if "num_carry" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carried, _ = eqn.params["ft_in"].unpack()
    return len(list(consts)), len(list(carried))


def splash_gradient(
    kernel: Any,
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    cotangent: Any,
    sums: Any,
    segments: Any = None,
) -> tuple[Any, Any, Any]:
    """Run the backward pass of splash attention, which has no public name.

    Args:
      kernel: a `SplashAttentionKernel`, not of a mask that is an array.
      query: (heads, length, width).
      key: likewise, of its own number of heads.
      value: likewise.
      out: what the forward pass returned.
      cotangent: of that.
      sums: logarithms of the sums, (heads, length).
      segments: `SegmentIds`, if the forward pass had them.

    Returns:
      The gradients by query, key and value.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )

    options = kernel.kwargs
    masks = (kernel.dq_mask_info, kernel.dkv_mask_info)
    gradients = kernels._splash_attention_bwd(
        False,
        options["mask_value"],
        options["is_mqa"],
        options["block_sizes"],
        None,
        options["mask_function"],
        options["attn_logits_soft_cap"],
        options["interpret"],
        (query, key, value, segments, None, out, sums, *masks),
        cotangent,
    )
    return gradients[3:6]


def jit_on(
    devices: Any,
    function: Callable,
    flags: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Return a function jitted with the compiler options that its devices need.

    XLA's CPU backend starts collectives that don't depend on each other in any order,
    on as many threads as there are cores. With several virtual devices they can wait
    for each other forever (seen on jax 0.10 and two cores).

    Args:
      devices: the devices on which it will run.
      function: as `jax.jit` takes it.
      flags: more of XLA's options.
      options: for `jax.jit`.
    """
    devices = list(devices)
    compiler_options = dict(flags or {})
    if len(devices) > 1 and devices[0].platform == "cpu":
        compiler_options["xla_cpu_enable_concurrency_optimized_scheduler"] = False
    return jax.jit(function, compiler_options=compiler_options or None, **options)


def jit_where(function: Callable) -> Callable:
    """Return a function jitted for the devices of its arguments (see `jit_on`).

    Args:
      function: of pytrees of arrays.
    """
    jitted: dict[frozenset, Any] = {}

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        devices = frozenset(jax.tree.leaves(args)[0].sharding.device_set)
        if devices not in jitted:
            jitted[devices] = jit_on(devices, function)
        return jitted[devices](*args)

    return call


def eagerly(function: Callable[[], Any]) -> Any:
    """Run a function of concrete arrays and return its result.

    It is also for a place where a program is being traced. There JAX would trace the
    functions under `jax.jit` that it calls, also under `ensure_compile_time_eval`. A
    trace belongs to its thread, so the function runs in another one.
    """
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(function).result()


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
    """Return the axis name that JAX (0.10, 0.12) misses; None for another error."""
    match = re.search(r"unbound axis name: ([^\s.]+)", str(error))
    return match[1] if match else None


def _with_axes(
    function: Callable,
    names: list[str],
) -> Callable:
    """Return a function in which each name is an axis of one element."""
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
        # As far as JAX knows, the results differ along the axes, e.g. of `axis_index`.
        first = (0,) * len(names)
        return jax.tree.map(lambda x: x[first], bound(0)(*args))

    return call


@contextlib.contextmanager
def noting_sow(
    kind: type,
    note: Callable,
) -> Iterator[None]:
    """Note each call of `sow` while the context is open.

    Neither Linen nor NNX says which variables were sown, and which the module keeps as
    its state. Flax's own function still runs. NNX warns that it is deprecated outside
    of `nnx.capture`; the user does not make this call, so the warning is hidden.

    Args:
      kind: `linen.Module` or `nnx.Module`.
      note: called with (module, collection or variable type, name) of each.
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
