"""Where the parts of a batch prediction are made: in this process, or on a Ray cluster.

Both call `predict_part`, and make the same files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

from lepton_jax.errors import DataError, LeptonError
from lepton_jax.ship.extras import needs
from lepton_jax.ship.scale.batch import Job, Part, predict_part

PURPOSE = "predicting on a Ray cluster"
# Tasks that are handed out and not done, for each core of the cluster: one that works,
# and one that waits. Assumption.
AHEAD = 2
FOREVER = -1  # as often as a task's node dies

Engine = Callable[[Job], Iterator[tuple[Part, int]]]


def run_here(job: Job) -> Iterator[tuple[Part, int]]:
    """Make the parts that are missing, one after the other; yield each with its rows.

    Raises:
      DataError: see `predict_part`.
    """
    for part in job.left():
        yield part, predict_part(job, part)


def on_ray(
    address: str | None,
    cpus: int = 1,
    gpus: float = 0,
) -> Engine:
    """Return an engine of tasks of a Ray cluster.

    Every node must see the artifact, the data and the folder of the parts under the
    same paths. A task whose node or process dies is done again elsewhere.

    Args:
      address: of the cluster; None: a fresh one on this machine.
      cpus: of a task.
      gpus: of a task.
    """

    def run(job: Job) -> Iterator[tuple[Part, int]]:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray: Any = needs("ray", extra="ray", purpose=PURPOSE)
        is_own = not ray.is_initialized()
        if is_own:
            _connect(ray, address)
        try:
            yield from _run(ray, job, cpus, gpus)
        finally:
            if is_own:
                ray.shutdown()

    return run


# ---- internals ----


def _connect(ray: Any, address: str | None) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        options["include_dashboard"] = False
    try:
        ray.init(address=address or "local", **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise DataError(
            f"no Ray cluster can be reached: {str(error).partition(chr(10))[0]}",
            where=address or "a fresh cluster on this machine",
            remedy="see `ray status` on its head node, and give its address: HOST:PORT",
        ) from error


def _run(
    ray: Any,
    job: Job,
    cpus: int,
    gpus: float,
) -> Iterator[tuple[Part, int]]:
    shared = ray.put(job)
    task = ray.remote(max_retries=FOREVER, num_cpus=cpus, num_gpus=gpus)(_work)
    waiting = job.left()[::-1]
    under_way: dict[Any, Part] = {}
    while waiting or under_way:
        cores = ray.cluster_resources().get("CPU", 1)
        most = max(AHEAD, int(AHEAD * cores / max(1, cpus)))
        while waiting and len(under_way) < most:
            part = waiting.pop()
            under_way[task.remote(shared, part.number)] = part
        done, _ = ray.wait(list(under_way), num_returns=1)
        for reference in done:
            part = under_way.pop(reference)
            rows, error = _outcome(ray, reference)
            if error is not None:
                what, where, remedy = error
                raise DataError(what, where=where, remedy=remedy)
            yield part, rows


def _work(job: Job, number: int) -> tuple[int, tuple[str, str | None, str] | None]:
    """Make a part; return its rows, and the words of an error."""
    try:
        return predict_part(job, job.parts[number]), None
    except LeptonError as error:
        return 0, (error.what, error.where, error.remedy)


def _outcome(ray: Any, reference: Any) -> tuple[int, Any]:
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        raise DataError(
            f"a task failed on the cluster: {str(error).strip().splitlines()[-1]}",
            where="Ray",
            remedy=(
                "see its log on the node (`ray logs`), and run the same command again:"
                " it goes on"
            ),
        ) from error
