"""The decorator that tells the planner how an operation of one's own may be split."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from lepton_jax.errors import ModelError
from lepton_jax.planner.rewrite import notation
from lepton_jax.planner.rewrite.notation import Names
from lepton_jax.planner.rewrite.own import Count, Own, Rule, called, shape_of

Counts = Count | tuple[Count, Count] | None


def rule(
    dims: str,
    *,
    whole: str = "",
    summed: str = "",
    saves: str | None = None,
    flops: Counts = None,
    bytes: Counts = None,
    workspace: str | None = None,
    keep: bool = True,
) -> Callable[[Callable], Callable]:
    """Tell the planner how an operation of one's own may be split over devices.

    Stands above a function of arrays (positional) and options (by keyword, hashable)
    that returns an array or a tuple of them. It need not run under the planner. See
    docs/kernels.md.

    A function with an option `interpret` is told False on TPUs and GPUs, and True
    elsewhere, where kernels of `pallas` run interpreted; one with an option `platform`
    is told "tpu", "cuda", "rocm" or "" for any other.

    Args:
      dims: names of the dims of operands and results, "batch width, width -> batch
        width". A name is the same thing wherever it stands, and may be split; `_` has
        no name; `...` stands for any leading dims.
      whole: names of dims that a device needs whole, "width".
      summed: names of dims that are added up: where one of them is split, results that
        lack it are the sums of all devices' results. Other dims that a result lacks
        are whole.
      saves: dims of each array that the forward pass keeps for the backward pass,
        operands and results apart, as in `dims`. None: the backward pass runs the
        forward pass again, if it keeps any.
      flops: FLOP of the whole operation, from the shapes of its operands
        (`jax.ShapeDtypeStruct`); two functions: forward and backward. One alone: its
        gradient has twice as many. None: the products that the function traces, those
        of kernels times their grid, or their `cost_estimate`.
      bytes: bytes that it reads and writes; one function or two. None: operands and
        results once.
      workspace: dims of arrays that it needs while it runs, forward or backward, as in
        `dims`; extents are those of the operands, the dtype is that of the first
        result.
      keep: whether the rematerialization `dots` keeps what it computes.

    Returns:
      A decorator.

    Raises:
      ModelError: a text can't be read, or names a dim that `dims` has not.
    """
    known = notation.parse(dims)
    partly = known.names
    stated = {"whole": frozenset(whole.split()), "summed": frozenset(summed.split())}
    kept = None if saves is None else notation.arrays_of(saves)
    scratch = () if workspace is None else notation.arrays_of(workspace)
    places = {**stated, "saves": _all_names(kept or ())}
    places["workspace"] = _all_names(scratch)
    for place, names in places.items():
        for unknown in sorted(names - partly):
            raise ModelError(
                f"{place} names {unknown!r}, which {dims!r} has not",
                where="lepton.planner.rule",
                remedy=f"it has {', '.join(sorted(partly))}",
            )

    def decorate(function: Callable) -> Callable:
        has = functools.partial(_has_option, function)
        own = Rule(
            name=str(getattr(function, "__name__", "operation")),
            function=function,
            notation=known,
            whole=stated["whole"],
            summed=stated["summed"],
            saves=kept,
            flops=_both(flops),
            bytes=_both(bytes),
            workspace=scratch,
            kept=keep,
            told=frozenset(filter(has, ("interpret", "platform"))),
        )

        @functools.wraps(function)
        def ruled(*arrays: Any, **options: Any) -> Any:
            return _call(own, arrays, options)

        return ruled

    return decorate


# ---- internals ----


def _both(counts: Counts) -> tuple[Count | None, Count | None]:
    return counts if isinstance(counts, tuple) else (counts, None)


def _all_names(arrays: Sequence[Names]) -> frozenset[str]:
    names = {name for own in arrays for name in own}
    return frozenset(names - {notation.UNNAMED})


def _has_option(function: Callable, name: str) -> bool:
    try:
        return name in inspect.signature(function).parameters
    except ValueError:  # a function of C has no signature
        return False


def _call(own: Rule, arrays: Sequence[Any], options: dict[str, Any]) -> Any:
    arrays = tuple(map(jnp.asarray, arrays))
    call = Own(own, tuple(sorted(options.items())), tuple(map(shape_of, arrays)))
    try:
        hash(call)
    except TypeError:
        raise ModelError(
            f"an option of {own.name!r} is no hashable value",
            where="lepton.planner.rule",
            remedy="give arrays by position, and plain values by keyword",
        ) from None
    return called(call, *arrays)
