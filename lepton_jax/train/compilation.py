"""The account of what was compiled, how long it took, and why.

JAX runs a jitted function's Python body only while it traces, so a body that calls
`CompilationLog.trace` says that a compilation is under way:

    log.call("train", step, batch)     the body runs: compiled, 1st time
    log.call("train", step, batch)     it does not run: nothing compiled
    log.call("train", step, longer)    the body runs: compiled, 2nd time; changed:
                                       "inputs: float32[8] to float32[9]"
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from lepton_jax.compat import cache_hits
from lepton_jax.errors import pointing_at_user
from lepton_jax.hosts import agreement, phase
from lepton_jax.trees import by_path


@dataclass(frozen=True)
class Compilation:
    """One compilation of one of the programs.

    Attributes:
      program: its name, "train", "evaluate", "predict" or "init".
      count: 1 for the program's first.
      seconds: tracing, compilation and the first call.
      changed: why there is a later one, in words; None for the first.
      cached: by host, whether the executable came from JAX's compilation cache.
    """

    program: str
    count: int
    seconds: float
    changed: str | None
    cached: list[bool]


class CompilationLog:
    """Calls programs, and notes which of the calls compiled.

    Args:
      on_compile: called after each compilation.
      waits: whether a call returns only when the devices are done. Programs that wait
        for each other's collectives can use up the threads that XLA's virtual CPU
        devices share.

    Attributes:
      compilations: so far.
    """

    def __init__(
        self,
        on_compile: Callable[[Compilation], None],
        waits: bool,
    ):
        self.compilations: list[Compilation] = []
        self._on_compile = on_compile
        self._waits = waits
        self._traces = 0
        self._lowered = ""
        self._signatures: dict[str, list[dict[str, str]]] = {}

    def trace(
        self,
        program: str,
        batch: Any,
    ) -> None:
        """Note a trace; a program calls this while it is traced, and only then."""
        signature = {
            path or "value": f"{leaf.dtype}{list(leaf.shape)}"
            for path, leaf in by_path(batch).items()
        }
        self._signatures.setdefault(program, []).append(signature)
        self._traces += 1
        phase.reached(phase="compile")

    def lower(
        self,
        program: str,
        lower: Callable[[], Any],
    ) -> Any:
        """Lower a program before its first call.

        That call compiles what is traced here, and is the one that is noted.
        """
        traces = self._traces
        before = phase.where().phase
        lowered = lower()
        if self._traces != traces:
            self._traces = traces
            self._lowered = program
            phase.reached(phase=before)
        return lowered

    def call(
        self,
        program: str,
        function: Callable,
        *args: Any,
    ) -> Any:
        """Call a program, and note whether it was compiled for that.

        Raises:
          ModelError: the user's code in it fails, or there is no memory for it.
        """
        traces = self._traces
        began = time.perf_counter()
        before = phase.where().phase
        hits = cache_hits()
        is_lowered = program == self._lowered
        if is_lowered:
            self._lowered = ""
            phase.reached(phase="compile")
        with pointing_at_user(
            f"the {program} program",
            "fix the line that is named, if one is; where memory is short, "
            "lower batch_size or raise micro_batches",
            where=f"program {program!r}",
        ):
            result = function(*args)
            is_compiled = is_lowered or self._traces != traces
            if is_compiled:
                phase.reached(phase=before)
            if self._waits:
                jax.block_until_ready(result)
        if is_compiled:
            cached = agreement.every(lambda: cache_hits() > hits)
            self._note(program, time.perf_counter() - began, cached)
        return result

    def _note(
        self,
        program: str,
        seconds: float,
        cached: list[bool],
    ) -> None:
        signatures = self._signatures[program]
        changed = None
        if len(signatures) > 1:
            changed = _difference(*signatures[-2:])
        compilation = Compilation(program, len(signatures), seconds, changed, cached)
        self.compilations.append(compilation)
        self._on_compile(compilation)


def _difference(
    old: dict[str, str],
    new: dict[str, str],
) -> str:
    """Say how the arguments of two calls differ."""
    parts = [
        f"{path or 'inputs'}: {old.get(path, 'absent')} to {new.get(path, 'absent')}"
        for path in old | new
        if old.get(path) != new.get(path)
    ]
    return ", ".join(parts) or "another function or layout with the same shapes"
