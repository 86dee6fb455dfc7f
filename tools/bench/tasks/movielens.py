"""MovieLens ratings: two towers."""

from functools import partial
from pathlib import Path

from lepton_jax import losses
from lepton_jax.data import Arrays
from lepton_jax.models import TwoTower
from tools.bench import controller_tasks as tasks


def task(data: Path) -> tasks.Task:
    """Return the task."""
    users, items, stars = tasks.ratings(data)
    samples = Arrays({"user": users, "item": items}, stars)
    parts = tasks.three(samples, 0.02, 0.04)
    model = partial(
        TwoTower,
        int(users.max()) + 1,
        int(items.max()) + 1,
        dim=16,
        hidden=(32,),
        width=16,
        center=float(parts[0].targets.mean()),
    )
    return tasks.task_of(model, parts, 600, 256, loss=losses.squared_error)
