"""Events that each form of a step is put through, and how far its losses come apart.

Some happen to a run on virtual devices of this process, the others to runs of real
processes on this machine.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lepton_jax as lepton
from lepton_jax.monitor import read_events
from lepton_jax.planner import Plan
from tools.faults.forms import FORMS
from tools.faults.kinds import CHECKPOINTS, STEPS, Fault, Stage
from tools.faults.promises import apart
from tools.faults.recipe import LENGTH, TOKENS
from tools.faults.trial import Trial, reference

DEVICES = 8  # virtual ones, of a run in this process
FEWER = 4
HALF = 4  # steps to a checkpoint of a run in this process, and from it to the end
POISONED = 3  # the step of a poisoned batch
POISON = TOKENS - 1  # a target that has no loss
HOSTS = 2
DEVICES_OF_A_HOST = 2
GRACE = 2  # seconds that the others wait for a host that was lost
# Seconds after which it is started again, when the others train without it, and for
# which they pause in the middle, so that it finds them there (by trial).
BACK = 6.0
PAUSE = 8.0
NEVER = 1e9


@dataclass(frozen=True)
class Outcome:
    """Outcome of one event in one form.

    Attributes:
      kept: whether all is as it should be.
      apart: the largest relative difference of losses from the run that they are held
        against; None: there were none.
      bound: what it may be; 0: the losses are the same to the bit.
      wrong: what is not as it should be; "": nothing.
      devices: of each attempt, where hosts failed.
    """

    kept: bool
    apart: float | None
    bound: float
    wrong: str = ""
    devices: tuple[int, ...] = ()


def compared(found: Any, expected: Any, bound: float) -> Outcome:
    """Return the outcome of losses that should be those of another run."""
    if len(found) != len(expected):
        wrong = f"{len(found)} steps were trained, not {len(expected)}"
        return Outcome(False, None, bound, wrong)
    away = apart(found, expected)
    wrong = f"the losses differ by {away:.2g}" if not away <= bound else ""
    return Outcome(not wrong, away, bound, wrong)


# ---- in this process ----


def same_devices(name: str, folder: Path) -> Outcome:
    """Stop after half of the steps, and go on on the same devices."""
    return compared(_gone_on(name, folder, DEVICES), _whole(name)[HALF:], 0.0)


def fewer_devices(name: str, folder: Path) -> Outcome:
    """Stop after half of the steps, and go on on half of the devices."""
    found = _gone_on(name, folder, FEWER)
    return compared(found, _whole(name)[HALF:], FORMS[name].rounding)


def steered(name: str, folder: Path) -> Outcome:
    """Let a controller steer; compare with data parallel.

    It has to make updates: two runs that skip each step are alike, too. What is
    measured depends on how many parts a batch has: they are as many.
    """
    form = FORMS[name]
    recipe = _recipe(name, steered=True)
    plan = form.plan_of(recipe, DEVICES)
    parts = math.prod(plan.mesh[axis] for axis in plan.batch_axes)
    trainer = lepton.Trainer(recipe, devices=1)
    plain = trainer.plan(f"cpu:{parts}", mesh={"data": parts})
    found = lepton.Trainer(recipe, devices=plan.devices, plan=plan).fit()
    if found["updates"][-1] < HALF:
        made = f"{found['updates'][-1]:g} updates in {2 * HALF} steps"
        return Outcome(False, None, form.rounding, made)
    return compared(np.asarray(found["loss"]), _fit(recipe, plain), form.rounding)


def poisoned(name: str, folder: Path) -> Outcome:
    """Train on a batch that has no loss, which a guard skips; compare with one device.

    Parameters that the batch had spoiled would show in the next loss.
    """
    form = FORMS[name]
    recipe = _recipe(name).with_(
        train=_spoiled(name),
        loss=_poisonous,
        controller=lepton.controllers.guard(),
        shuffle=False,
    )
    found = _fit(recipe, form.plan_of(recipe, DEVICES))
    without = [step for step in range(2 * HALF) if step != POISONED - 1]
    if not np.isnan(found[POISONED - 1]):
        return Outcome(False, None, form.rounding, "the poisoned batch has a loss")
    return compared(found[without], _fit(recipe, None)[without], form.rounding)


def _recipe(name: str, steered: bool = False) -> lepton.Recipe:
    recipe = FORMS[name].recipe(steps=2 * HALF, steered=steered)
    return recipe.with_(test=None, evaluate_every=None, save_every=HALF)


def _spoiled(name: str) -> tuple[Any, Any]:
    """Return samples, one of which has a target without a loss."""
    batch = FORMS[name].recipe().batch_size
    length = FORMS[name].settings.get("length", LENGTH)
    shape = (2 * HALF * batch, length + 1)
    rows = np.random.default_rng(5).integers(0, POISON, shape, np.int32)
    rows[(POISONED - 1) * batch + 1, -1] = POISON
    return rows[:, :-1], rows[:, 1:]


def _poisonous(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    loss = lepton.losses.cross_entropy(outputs, targets)
    return jnp.where(targets == POISON, jnp.nan, loss)


def _fit(recipe: lepton.Recipe, plan: Plan | None, **options: Any) -> np.ndarray:
    """Return the losses of a run under a plan; None: on one device."""
    devices = 1 if plan is None else plan.devices
    trainer = lepton.Trainer(recipe, devices=devices, plan=plan, **options)
    return np.asarray(trainer.fit()["loss"])


@functools.cache
def _whole(name: str) -> np.ndarray:
    """Return the losses of a run that nothing happens to."""
    recipe = _recipe(name)
    return _fit(recipe, FORMS[name].plan_of(recipe, DEVICES))


def _gone_on(name: str, folder: Path, devices: int) -> np.ndarray:
    """Return the losses after a stop, on another number of devices, perhaps."""
    recipe = _recipe(name)
    plan = FORMS[name].plan_of(recipe, DEVICES)
    first = lepton.Trainer(recipe, devices=DEVICES, plan=plan, run_dir=folder)
    first.fit(steps=HALF)
    then = FORMS[name].plan_of(recipe, devices)
    again = lepton.Trainer(recipe, devices=devices, plan=then, run_dir=folder)
    return np.asarray(again.resume().fit()["loss"])


# ---- on hosts ----


def two_hosts(name: str, folder: Path) -> Outcome:
    """Train on two hosts; compare with as many devices of this process, same plan."""
    options = _options(name, folder)
    together = reference(folder.parent, HOSTS, DEVICES_OF_A_HOST, options)
    form = FORMS[name]
    recipe = form.recipe(steps=STEPS).with_(test=None, evaluate_every=None)
    alone = _fit(recipe, form.plan_of(recipe, HOSTS * DEVICES_OF_A_HOST))
    return compared(together.losses, alone, form.rounding)


def _stage(kind: str, host: int, step: int, phase: str = "steps", **more: Any) -> Stage:
    return {"kind": kind, "host": host, "phase": phase, "step": step, **more}


LOST = (_stage("supervisor", 1, CHECKPOINTS + 3),)
PAUSED = (_stage("pause", 0, STEPS // 2, generation=2, seconds=PAUSE),)
WITHOUT = ("--grace", str(GRACE), "--least-hosts", str(HOSTS - 1))
LEFT = "went on with what is left"
FAULTS = {
    "SIGTERM": Fault(
        "SIGTERM", "interrupted, then goes on", (_stage("sigterm-worker", 1, 27),)
    ),
    "killed, checkpoint torn": Fault(
        "killed, checkpoint torn",
        "recovered",
        (
            _stage("kill", 1, 3 * CHECKPOINTS + 3),
            _stage("damage", 0, 0, "plan", how="half", generation=2),
        ),
    ),
    "host lost": Fault(
        "host lost", LEFT, LOST, options=WITHOUT, apart=True, again=NEVER
    ),
    "host comes back": Fault(
        "host back", LEFT, LOST + PAUSED, options=WITHOUT, apart=True, again=BACK
    ),
}


def on_hosts(fault: Fault, name: str, folder: Path) -> Outcome:
    """Let a fault happen to a run on two hosts; compare with one that has none."""
    options = _options(name, folder)
    expected = reference(folder.parent, HOSTS, DEVICES_OF_A_HOST, options)
    rounding = FORMS[name].rounding
    trial = Trial(folder, HOSTS, DEVICES_OF_A_HOST, fault, options, rounding)
    wrong = trial.run(expected)["wrong"] or ""
    assert trial.last is not None
    devices = _devices(folder / "run")
    if fault.again == BACK and not wrong and devices[-1] != devices[0]:
        wrong = "the host that came back took no part"
    away = apart(trial.last.losses, expected.losses)
    bound = rounding if fault.promise == LEFT else 0.0
    return Outcome(not wrong, away, bound, wrong, devices)


def _devices(run: Path) -> tuple[int, ...]:
    """Return the devices of each attempt of a run."""
    return tuple(e["devices"] for e in read_events(run) if e["kind"] == "start")


def _options(name: str, folder: Path) -> list[str]:
    return FORMS[name].options(folder.parent, HOSTS * DEVICES_OF_A_HOST)


# Cells of the matrix by event; each takes the name of a form and a folder of its own,
# which lies in one for all events of the form.
CELLS: dict[str, Callable[[str, Path], Outcome]] = {
    "goes on, same devices": same_devices,
    "goes on, half of them": fewer_devices,
    "controller": steered,
    "poisoned batch": poisoned,
    "two hosts": two_hosts,
    **{event: functools.partial(on_hosts, fault) for event, fault in FAULTS.items()},
}
