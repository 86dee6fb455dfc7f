"""Which collectives and copies to the host run beside products, by XLA's schedule.

The text of a scheduled module has its instructions in the order in which a device runs
them. A collective runs beside products in one of three forms:

    all-gather-start ... products ... all-gather-done     a pair, with products between
    async_collective_fusion(product, all-gather)          one kernel of both (TPU)
    collective-permute of a product's name                a product taken in pieces

Copies to the host's memory (memory space 5) and back are always such pairs.

All others are waited for. What the pieces of time are, the text does not say: a product
between start and done may be shorter than what runs beside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from lepton_jax.verify.collectives import CollectiveFound
from lepton_jax.verify.hlo_module import Module
from lepton_jax.verify.hlo_text import Computation, Instruction

# custom calls that are kernels (Mosaic on TPUs), which compute products
KERNEL = "tpu_custom_call"
# the host's memory, in a layout
HOST = re.compile(r"\{[^}]*S\(5\)\}")
TO_HOST = "to the host"
FROM_HOST = "from the host"


@dataclass(frozen=True)
class Scheduled:
    """Collectives of one kind in a step, or copies between a device and its host.

    Attributes:
      kind: such as "all-gather"; `TO_HOST` or `FROM_HOST`.
      count: runs of them in a step.
      beside: runs of those with products beside them.
      bytes: that a device sends in a step.
      bytes_beside: of those with products beside them.
    """

    kind: str
    count: int = 0
    beside: int = 0
    bytes: float = 0.0
    bytes_beside: float = 0.0


def schedule(text: str) -> list[Scheduled]:
    """Return what a scheduled module sends by kind, most bytes first.

    Args:
      text: of the module, as `Compiled.as_text` gives it.
    """
    module = Module(text)
    times, _ = module.times()
    fused = _channels_in_kernels(module, times)
    found: dict[str, Scheduled] = {}
    for name, runs in times.items():
        paired = _pairs_with_products(module, name)
        for collective in module.collectives(name, runs):
            is_beside = (
                collective.windowed
                or collective.name in paired
                or collective.channel in fused
                or _starts_beside(module, collective)
            )
            one = replace(collective, times=runs)
            _add(found, one.kind, runs, one.sent, is_beside)
        for kind, copy, size in _host_copies(module.computations[name]):
            _add(found, kind, runs, runs * size, copy in paired)
    return sorted(found.values(), key=lambda kind: -kind.bytes)


# ---- internals ----


def _add(
    found: dict[str, Scheduled],
    kind: str,
    runs: int,
    sent: float,
    is_beside: bool,
) -> None:
    """Count what is sent in all runs of a step."""
    before = found.get(kind, Scheduled(kind))
    found[kind] = Scheduled(
        kind,
        before.count + runs,
        before.beside + runs * is_beside,
        before.bytes + sent,
        before.bytes_beside + sent * is_beside,
    )


def _host_copies(computation: Computation) -> Iterator[tuple[str, str, int]]:
    """Yield direction, name and bytes of each copy between a device and its host."""
    for copy in computation.instructions.values():
        if not copy.opcode.endswith("-start") or not HOST.search(copy.shape):
            continue
        # a slice, and the stack that it is written to or read from
        arrays = [leaf.bytes for leaf in copy.leaves if leaf.dims]
        is_update = "dynamic-update-slice" in copy.name
        yield TO_HOST if is_update else FROM_HOST, copy.name, min(arrays)


def _channels_in_kernels(module: Module, times: dict[str, int]) -> set[str]:
    """Return the channels of collectives that share a fusion with a product."""
    channels = set()
    for name in times:
        caller = module.callers.get(name)
        if caller is None or caller.opcode != "fusion":
            continue
        if not _has_product(module, name):
            continue
        for instruction in module.computations[name].instructions.values():
            channel = instruction.get("channel_id")
            if channel:
                channels.add(channel)
    return channels


def _starts_beside(module: Module, collective: CollectiveFound) -> bool:
    """Whether an asynchronous computation of a collective has products beside it."""
    caller = module.callers.get(collective.computation)
    if caller is None or caller.opcode != "async-start":
        return False
    return any(
        caller.name in _pairs_with_products(module, name)
        for name, computation in module.computations.items()
        if computation.instructions.get(caller.name) is caller
    )


def _pairs_with_products(module: Module, name: str) -> set[str]:
    """Return the starts in a computation that have products before their ends."""
    computation = module.computations[name]
    begun: dict[str, bool] = {}
    paired = set()
    for instruction in computation.instructions.values():
        if instruction.opcode.endswith("-start"):
            begun[instruction.name] = False
        elif instruction.opcode.endswith("-done"):
            start = _start_of(computation, instruction, begun)
            if begun.pop(start, False):
                paired.add(start)
        elif _computes(module, name, instruction):
            begun = dict.fromkeys(begun, True)
    return paired


def _start_of(
    computation: Computation,
    done: Instruction,
    begun: dict[str, bool],
) -> str:
    """Return the start of a pair, which the end may reach through other steps."""
    pending = list(done.operands)
    while pending:
        name = pending.pop()
        if name in begun:
            return name
        step = computation.instructions.get(name)
        if step is not None and step.opcode.endswith("-update"):
            pending += step.operands
    return ""


def _computes(module: Module, name: str, instruction: Instruction) -> bool:
    """Whether an instruction, or what it runs, computes a product."""
    if KERNEL in instruction.attributes:
        return True
    called = [callee for _, callee in instruction.called()]
    if any(_has_product(module, callee) for callee in called):
        return True
    return module.flops_of(name, instruction) > 0


def _has_product(module: Module, name: str) -> bool:
    return module.flops(name) > 0 or any(_kernels(module, name))


def _kernels(module: Module, name: str) -> Iterator[bool]:
    for instruction in module.computations[name].instructions.values():
        yield KERNEL in instruction.attributes
        for _, callee in instruction.called():
            yield from _kernels(module, callee)
