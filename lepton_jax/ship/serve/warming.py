"""A model made ready: each size compiled, timed, and compared with the trainer.

A model that is not warm would answer its first requests after a compilation of
seconds, so it is not called ready before all of its sizes have run. What they return
for the artifact's stored rows is compared with what the trainer returned.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lepton_jax.errors import ModelError
from lepton_jax.ship.serve.batcher import Program, filled
from lepton_jax.ship.serve.ladder import Ladder

# Largest difference from the trainer's outputs, of an output's largest size: float32
# sums in another order, which is what the exports are held to as well. Half-width
# floats keep 8 or 11 bits.
FULL = 1e-5
HALF = 2e-2
# Share of whole numbers, such as classes, that may differ from the trainer's: two
# nearly equal logits may change places (assumption).
TIES = 0.02

TIMED = 20  # runs of a size, of which the quickest counts (assumption)
LONG = 0.2  # seconds after which a size is not timed again (assumption)
# Share by which rows a second must grow from a size to its double, or else the ladder
# ends: a larger batch would only make its requests wait (assumption).
LEAST_GAIN = 0.05
TRIES = 2  # sizes that must not pay before the ladder ends
LARGEST = 128  # rows of a batch, unless asked for otherwise (assumption)


class StoppedError(Exception):
    """The server ends before the model is warm."""


@dataclass(frozen=True)
class Warm:
    """A model that is ready.

    Attributes:
      programs: by compiled size.
      ladder: of these sizes.
      together: whether rows of several requests may share a batch.
      difference: largest difference from the trainer's outputs, as a share of an
        output's largest size; None: no rows are stored.
      rows: that were compared, for each size.
    """

    programs: Mapping[int, Program]
    ladder: Ladder
    together: bool
    difference: float | None
    rows: int


def warm(
    artifact: Any,
    sizes: Sequence[int] = (),
    is_stopped: Callable[[], bool] = lambda: False,
) -> Warm:
    """Compile, time and prove a model.

    Args:
      artifact: the `Artifact`.
      sizes: to compile; empty: doubling, for as long as it pays.
      is_stopped: whether the server ends meanwhile.

    Raises:
      ModelError: a size can't be compiled, or returns something else than the trainer.
      StoppedError: the server ends.
    """
    if artifact.manifest.meeting is not None:
        return _warm_as_trained(artifact, is_stopped)
    stored = _Stored(artifact)
    programs: dict[int, Program] = {}
    seconds: dict[int, float] = {}
    is_given = bool(sizes)
    for size in sorted(set(sizes)) if is_given else artifact.sizes:
        if is_stopped():
            raise StoppedError
        program = artifact.compiled(size)
        seconds[size] = _time(program, stored.inputs(size))
        stored.prove(program, size)
        programs[size] = program
        if not is_given and not _pays(seconds):
            break
    return Warm(
        programs,
        Ladder(seconds),
        True,
        stored.difference,
        stored.rows,
    )


# ---- internals ----


class _Stored:
    """Rows to run, and what the trainer returned for them."""

    def __init__(self, artifact: Any):
        self._artifact = artifact
        self._inputs = artifact.stored.inputs
        self._outputs = artifact.stored.outputs
        self.rows = len(artifact.stored)
        self.difference: float | None = None

    def inputs(self, size: int) -> dict[str, np.ndarray]:
        """Return a batch: stored rows, or zeros where there are none."""
        if not self.rows:
            return {
                tensor.name: np.zeros((size, *tensor.shape[1:]), tensor.dtype)
                for tensor in self._artifact.inputs
            }
        return {name: filled([a[:size]], size) for name, a in self._inputs.items()}

    def prove(self, program: Program, size: int) -> None:
        """Compare what a size returns for all stored rows with the trainer's outputs.

        Raises:
          ModelError: they differ.
        """
        for start in range(0, self.rows, size):
            rows = slice(start, start + size)
            batch = {name: filled([a[rows]], size) for name, a in self._inputs.items()}
            outputs = program(batch)
            for name, expected in self._outputs.items():
                whole = np.asarray(outputs[name])
                got = whole[: len(expected[rows])]
                self._compare(name, got, expected, rows, size)

    def _compare(
        self,
        name: str,
        got: np.ndarray,
        expected: np.ndarray,
        rows: slice,
        size: int,
    ) -> None:
        difference, bound = difference_of(got, expected[rows], expected)
        if difference > bound:
            raise ModelError(
                f"in batches of {size} the model's {name} differ by {difference:.2g}"
                f" from the trainer's, and at most {bound:.2g} is rounding",
                where=self._artifact,
                remedy="export the run again on this kind of device, or serve it on"
                " the one that it was trained on",
            )
        if np.asarray(expected).dtype.kind not in "iub":
            self.difference = max(self.difference or 0.0, difference)


def difference_of(
    got: np.ndarray,
    expected: np.ndarray,
    scale: np.ndarray,
) -> tuple[float, float]:
    """Return how far outputs are from those expected, and how far they may be.

    Args:
      got: outputs.
      expected: outputs.
      scale: outputs whose largest size the difference is a share of.

    Returns:
      The largest difference, and its bound. Of whole numbers it is the share of those
      that differ.
    """
    got = np.asarray(got)
    if expected.dtype.kind in "iub" or expected.dtype == object:
        # one of a few may always
        return np.count_nonzero(got != expected) / scale.size, max(TIES, 1 / scale.size)
    bound = HALF if got.dtype.itemsize <= 2 else FULL
    wide = np.asarray(expected, np.float64)
    close = np.nan_to_num(np.abs(np.asarray(got, np.float64) - wide))
    same_holes = np.array_equal(np.isnan(got), np.isnan(expected))
    largest = np.nan_to_num(np.abs(np.asarray(scale, np.float64))).max(initial=1.0)
    return float(close.max(initial=0.0) / largest) if same_holes else np.inf, bound


def _time(program: Program, inputs: Mapping[str, np.ndarray]) -> float:
    """Return the seconds of a run; the first, which may still set up, is left out."""
    program(inputs)
    best = np.inf
    end = time.perf_counter() + LONG
    for _ in range(TIMED):
        began = time.perf_counter()
        program(inputs)
        now = time.perf_counter()
        best = min(best, now - began)
        if now > end:
            break
    return best


def _pays(seconds: Mapping[int, float]) -> bool:
    """Whether one of the last two sizes does more rows a second than all before.

    One that does not may have been measured while the machine had something else to do.
    """
    rates = [size / seconds[size] for size in seconds]
    if len(rates) <= TRIES:
        return True
    return max(rates[-TRIES:]) > max(rates[:-TRIES]) * (1 + LEAST_GAIN)


class AnySize(dict[int, Program]):
    """Programs of an artifact that are compiled when they are first asked for."""

    def __init__(self, artifact: Any):
        super().__init__()
        self._artifact = artifact

    def __missing__(self, size: int) -> Program:
        self[size] = self._artifact.compiled(size)
        return self[size]


class AsTrained(Ladder):
    """Sizes of a model whose rows meet: each request has a batch of its own size.

    Args:
      seconds: of a run of one row, and of the recipe's batch.
    """

    def around(self, rows: int) -> int:
        """Return the rows: a batch that is filled up predicts something else."""
        return rows

    def is_quick(self, size: int, seconds: float) -> bool:
        """Whether a size takes no longer; one that is not compiled yet does."""
        return self.seconds.get(size, np.inf) <= seconds


def _warm_as_trained(artifact: Any, is_stopped: Callable[[], bool]) -> Warm:
    """Make a model ready in which the rows of a batch meet.

    Sizes between are compiled when they are first asked for.
    """
    stored = _Stored(artifact)
    programs = AnySize(artifact)
    seconds = {}
    for size in sorted({1, artifact.manifest.batch_size}):
        if is_stopped():
            raise StoppedError
        seconds[size] = _time(programs[size], stored.inputs(size))
    return Warm(programs, AsTrained(seconds), False, None, 0)
