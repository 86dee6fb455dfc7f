"""The local engine: threads over pieces.

Polars lets go of Python's lock while it computes and has threads of its own, so that a
few pieces at once keep all processors busy: one is read or written while another is
computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from lepton_jax.data.prepare.engines.engine import Engine
from lepton_jax.data.prepare.pieces import Job, Task, processors, run_piece
from lepton_jax.errors import DataError

# Bytes of memory that a piece takes while it is worked on, for each byte of its source:
# its text, its columns, those after the steps, and the shard that is written
# (assumption).
MEMORY_PER_BYTE = 8


class Local(Engine):
    """Threads of this process.

    Args:
      workers: pieces that are worked on at once; None: as many as processors.
      memory: bytes that they may take together.
      piece_bytes: of a source, at most.

    Raises:
      DataError: there is less than one worker.
    """

    def __init__(self, workers: int | None, memory: int, piece_bytes: int):
        if workers is not None and workers < 1:
            raise DataError(
                f"{workers} workers can't do anything",
                where="workers",
                remedy="give 1 or more, or leave it out: one for each processor",
            )
        at_once = max(1, memory // (piece_bytes * MEMORY_PER_BYTE))
        self._workers = min(workers or processors(), at_once)

    def run(self, job: Job, tasks: Sequence[Task]) -> Iterator[Task]:
        with ThreadPoolExecutor(self._workers, "prepare") as pool:
            under_way = {pool.submit(run_piece, job, task): task for task in tasks}
            try:
                while under_way:
                    done, _ = wait(under_way, return_when=FIRST_COMPLETED)
                    for future in done:
                        task = under_way.pop(future)
                        future.result()
                        yield task
            finally:
                _cancel(list(under_way))

    def close(self) -> None:
        """Do nothing: the threads end with each pass."""


def _cancel(futures: Sequence[Future]) -> None:
    """Keep what has not begun from beginning."""
    for future in futures:
        future.cancel()
