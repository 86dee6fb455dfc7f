"""The engine of a cluster: Ray Data over pieces.

Its tasks call the same function as the threads of the local engine. Every node must see
the sources and the folder of the preparation under the same paths.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from lepton_jax.data.extras import needs
from lepton_jax.data.prepare.engines.engine import Engine
from lepton_jax.data.prepare.pieces import Job, Task, run_piece
from lepton_jax.errors import DataError, LeptonError

PURPOSE = "preparing data with engine 'ray'"


class RayData(Engine):
    """Tasks of a Ray cluster.

    Attributes:
      nodes: identifiers of the nodes that have worked.

    Args:
      address: of a cluster; None: a fresh one on this machine.
      workers: processors of a fresh cluster; None: all. On a cluster that is there
        already it decides itself.

    Raises:
      DataError: Ray is not installed, or there is no cluster at the address.
    """

    def __init__(self, address: str | None = None, workers: int | None = None):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray Data's threads import it at the same time, and fail where one finds the
        # other's half of it.
        needs("aiohttp", extra="ray", purpose=PURPOSE)
        self._ray: Any = needs("ray", extra="ray", purpose=PURPOSE)
        self._data: Any = needs("ray.data", extra="ray", purpose=PURPOSE)
        self.nodes: set[str] = set()
        self._is_own = not self._ray.is_initialized()
        if self._is_own:
            self._connect(address, workers)

    def _connect(self, address: str | None, workers: int | None) -> None:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if address is None:
            options |= {"num_cpus": workers, "include_dashboard": False}
        try:
            self._ray.init(address=address or "local", **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise _unreachable(address, error) from error

    def run(self, job: Job, tasks: Sequence[Task]) -> Iterator[Task]:
        context = self._data.DataContext.get_current()
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        _carry_own_classes(self._ray, job)
        shared = self._ray.put(job)
        items = [{"number": number} for number in range(len(tasks))]
        blocks = len(items)
        rows = self._data.from_items(items, override_num_blocks=blocks)

        by_number = list(tasks)

        def work(item: dict[str, Any]) -> dict[str, Any]:
            import ray

            task = by_number[item["number"]]
            done = {**item, "node": ray.get_runtime_context().get_node_id()}
            try:
                run_piece(ray.get(shared), task)
            except LeptonError as error:
                return {**done, "error": [error.what, error.where, error.remedy]}
            return {**done, "error": None}

        for done in rows.map(work).iter_rows():
            if done["error"] is not None:
                raise _told(done["error"])
            self.nodes.add(done["node"])
            yield by_number[done["number"]]

    def close(self) -> None:
        if self._is_own:
            self._ray.shutdown()


def _told(words: Sequence[Any]) -> LeptonError:
    what, where, remedy = words
    return DataError(what, where=where, remedy=remedy)


def _unreachable(address: str | None, error: Exception) -> LeptonError:
    return DataError(
        f"no Ray cluster can be reached: {str(error).partition(chr(10))[0]}",
        where=address or "a fresh cluster on this machine",
        remedy="see `ray status` on its head node, and give its address as HOST:PORT",
    )


def _carry_own_classes(ray: Any, job: Job) -> None:
    """Let classes of a spec's file, which workers can't import, travel with the job."""
    for value in (*job.steps, *job.readers):
        module = sys.modules.get(type(value).__module__)
        if module is None or module.__name__.startswith("lepton_jax."):
            continue
        ray.cloudpickle.register_pickle_by_value(module)
