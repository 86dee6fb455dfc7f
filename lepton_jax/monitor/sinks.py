"""Places to which events go in addition to the journal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lepton_jax.errors import LeptonError, writing_remedy
from lepton_jax.monitor.events import Event


class TensorBoard:
    """A writer of scalars for TensorBoard.

    They are `train/<record>` at each step, `evaluation/<metric>`, `time/step_seconds`
    (mean over a window) and `time/data_wait` (share of that window, 0 to 1).

    Args:
      folder: for the event files; made if missing.

    Raises:
      LeptonError: tensorboardX is not installed.
    """

    def __init__(self, folder: Path):
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise LeptonError(
                "TensorBoard's writer, tensorboardX, is not installed",
                where="TensorBoard",
                remedy="pip install 'lepton-jax[tensorboard]'",
            ) from error
        # tensorboardX takes "gs:..." and "s3:..." at the beginning of a path for
        # buckets
        self._folder = Path(folder).absolute()
        self._make = SummaryWriter
        self._writer: Any = None

    def event(self, event: Event) -> None:
        """Write the scalars of one event."""
        kind = event.get("kind")
        if kind == "start" and self._writer is None:
            # A resumed run repeats steps: TensorBoard is told to forget what earlier
            # files say of them.
            step = event.get("step") or 0
            self._open(purge_step=step + 1 if step else None)
        elif kind == "steps":
            self._steps(event)
        elif kind == "evaluation":
            step = event.get("step")
            time = event.get("time")
            for name, value in (event.get("metrics") or {}).items():
                self._scalar(f"evaluation/{name}", value, step, time)

    def close(self) -> None:
        """Write out what is held back."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _open(self, **options: Any) -> None:
        try:
            self._writer = self._make(logdir=str(self._folder), **options)
        except OSError as error:
            raise LeptonError(
                f"TensorBoard's files can't be written: {error.strerror or error}",
                where=self._folder,
                remedy=f"{writing_remedy(error)}, or leave out --tensorboard",
            ) from error

    def _steps(self, event: Event) -> None:
        first = event.get("first")
        last = event.get("last")
        if first is None or last is None:
            return

        time = event.get("time")
        for name, values in (event.get("records") or {}).items():
            for step, value in enumerate(values, first):
                self._scalar(f"train/{name}", value, step, time)

        seconds = event.get("seconds")
        if seconds:
            steps = last - first + 1
            data_share = (event.get("data_wait") or 0) / seconds
            self._scalar("time/step_seconds", seconds / steps, last, time)
            self._scalar("time/data_wait", data_share, last, time)

    def _scalar(
        self,
        name: str,
        value: Any,
        step: int | None,
        time: float | None,
    ) -> None:
        if not isinstance(value, int | float):
            return
        if self._writer is None:
            self._open()
        self._writer.add_scalar(name, value, step, walltime=time)
