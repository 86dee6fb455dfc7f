"""The probe of a plan: XLA's account of its step, as soon as XLA has one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax

from lepton_jax.planner import ahead
from lepton_jax.planner.estimate.feeding import size
from lepton_jax.planner.plans import Plan
from lepton_jax.planner.probe import early, kept
from lepton_jax.planner.probe.kept import Account
from lepton_jax.planner.program.trace import Trace

# What a TPU may still need in addition to the arrays that have their place: a share of
# them, and bytes for the program's code and for the chip's own memory, which XLA counts
# in the figure that it ends with. Assumptions. Measured for the 8B model of
# `recipes/lm.py` on v5p:4x4x4: 45.55 GB placed, 45.40 GB in the end, 0.06 GB of code.
# What is placed has gaps between arrays, which the last figure leaves out: programs
# dcn/1 and two_tower/0 of `tools/bench/families` have 12 % and 2 % of them.
MARGIN = 0.01
ON_CHIP = 2**27

Lower = Callable[[Trace, Plan], jax.stages.Lowered]


@dataclass(frozen=True)
class Probe:
    """XLA's account of a planned step.

    Attributes:
      plan: the plan that was probed.
      predicted: bytes of the peak by the plan.
      memory: XLA's account; None if it refuses the program.
      peak: bytes that a device holds at the most; for a refused program those that XLA
        names in its message, None if it names none.
      bound: bytes that the peak does not exceed in 97 % of cases; likewise.
      seconds: that the probe took.
      whole: whether the step was compiled to its end.
      remembered: whether XLA's account was kept from an earlier probe.
      error: why XLA refuses the program.
    """

    plan: Plan
    predicted: float
    memory: ahead.Memory | None
    peak: float | None
    bound: float | None
    seconds: float
    whole: bool
    remembered: bool
    error: ahead.TooLarge | None = None

    @property
    def fits(self) -> bool:
        """Whether the bound fits the memory that the plan was made for."""
        if self.memory is None or self.bound is None:
            return False
        return self.bound <= self.plan.memory

    @property
    def how(self) -> str:
        """The source of the figures, in words."""
        if self.remembered:
            return "XLA's account of an earlier probe"
        if self.whole:
            return "XLA's account of the compiled step"
        return "XLA's account of the step once it had placed the arrays"

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the plan as plain data."""
        return {
            "plan": self.plan.name,
            "mesh": self.plan.mesh,
            "topology": self.plan.topology,
            "fits": self.fits,
            "limit": self.plan.memory,
            "predicted": self.predicted,
            "peak": self.peak,
            "bound": self.bound,
            "xla": None if self.memory is None else asdict(self.memory),
            "memory_error": self.error and self.error.what,
            "whole": self.whole,
            "remembered": self.remembered,
            "seconds": self.seconds,
        }

    def __str__(self) -> str:
        plan = self.plan
        title = f"{_name(plan)}: probed for {plan.topology} in {self.seconds:.1f} s"
        if self.error is not None:
            return f"{title}\nit does not fit: {self.error.what}"
        verdict = "fits" if self.fits else "DOES NOT FIT"
        return (
            f"{title} ({self.how})\n{size(self.peak or 0)} at the peak, predicted"
            f" {size(self.predicted)}: {verdict} in {size(plan.memory)}"
        )


def probe(
    trace: Trace,
    plan: Plan,
    lower: Lower,
    devices: Any,
    *,
    cache: Path | None = None,
    whole: bool = False,
) -> Probe:
    """Let XLA say what memory a planned step takes.

    Args:
      trace: of the recipe.
      plan: for it.
      lower: lowers the train step of a trace and its plan.
      devices: those that it is lowered for, in the mesh's order.
      cache: a folder of accounts that are known already; None: none is kept.
      whole: whether to compile the step to its end.

    Raises:
      PlanError: XLA can't compile the step.
    """
    start = time.perf_counter()
    devices = list(getattr(devices, "flat", devices))
    whole = whole or not _tells(devices)
    lowered = lower(trace, plan)
    account = None
    file = None
    if cache is not None:
        file = kept.file_of(lowered, devices, cache, whole)
        account = kept.read(file)
    remembered = account is not None
    if account is None:
        account = _asked(lowered, devices, whole)
        if file is not None:
            kept.write(file, account)
    return _probe(plan, account, time.perf_counter() - start, remembered)


# ---- internals ----


def _name(plan: Plan) -> str:
    plural = "es" if plan.micro_batches > 1 else ""
    mesh = " x ".join(f"{name}={count}" for name, count in plan.mesh.items())
    return (
        f"{plan.name}, mesh {mesh}, remat {plan.remat}, {plan.micro_batches}"
        f" micro-batch{plural}"
    )


def _tells(devices: list[Any]) -> bool:
    """Whether another process can compile for some devices, which says its places.

    On a host with TPUs it can't: they belong to this process.
    """
    is_described = ahead.description(devices) is not None
    return devices[0].platform == "cpu" or is_described


def _asked(
    lowered: jax.stages.Lowered,
    devices: list[Any],
    whole: bool,
) -> Account:
    """Ask XLA for its account of a program."""
    try:
        if whole:
            _, memory = ahead.compile_for(lowered)
        else:
            memory = early.memory(lowered, devices)
    except ahead.TooLarge as error:
        return Account(None, error.message, whole)
    return Account(memory, None, whole)


def _probe(
    plan: Plan,
    account: Account,
    seconds: float,
    remembered: bool,
) -> Probe:
    memory = account.memory
    error = None
    peak = None
    if memory is not None:
        peak = float(memory.peak)
    elif account.error is not None:
        error = ahead.too_large(account.error)
        peak = error.needed if error is not None else None
    return Probe(
        plan=plan,
        predicted=plan.peak,
        memory=memory,
        peak=peak,
        bound=_bound(plan, account, peak),
        seconds=seconds,
        whole=account.whole,
        remembered=remembered,
        error=error,
    )


def _bound(
    plan: Plan,
    account: Account,
    peak: float | None,
) -> float | None:
    """Return what a peak does not exceed in the end."""
    is_final = (
        account.whole or account.memory is None or plan.topology.startswith("cpu")
    )
    if peak is None or is_final:
        return peak
    return peak * (1 + MARGIN) + ON_CHIP
