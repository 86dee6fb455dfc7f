"""Our policies keep the laws; policies that break one are caught, law by law."""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lepton_jax import RecipeError, controllers

pytestmark = pytest.mark.usefixtures("quick_compilation")

Policy = controllers.Policy
conformance = controllers.conformance

OURS = {
    "warmup": controllers.warmup,
    "warmup to its bound": functools.partial(controllers.warmup, 50, tolerance=None),
    "plateau": controllers.plateau,
    "plateau of evaluations": functools.partial(
        controllers.plateau, "evaluation_accuracy"
    ),
    "decay": controllers.decay,
    "decay by trend": functools.partial(controllers.decay, start="trend", patience=10),
    "first_steps": controllers.first_steps,
    "guard": controllers.guard,
    "guard that clips": functools.partial(controllers.guard, "clip", patience=5),
    "batch_growth": functools.partial(controllers.batch_growth, patience=5),
    "switch_optimizer": functools.partial(controllers.switch_optimizer, patience=5),
    "switch_optimizer at": functools.partial(controllers.switch_optimizer, at=0.5),
    "averaging": controllers.averaging,
    "averaging a share": functools.partial(controllers.averaging, start=0.5, share=0.1),
    "until": functools.partial(
        controllers.until, evaluation_accuracy=0.99, loss=0.1, seconds=60
    ),
    "early_stopping": controllers.early_stopping,
    "early_stopping by a metric": functools.partial(
        controllers.early_stopping, "accuracy", 2, rtol=0.01
    ),
    "adjustable": functools.partial(
        controllers.adjustable, "learning_rate", "b1", "dropout"
    ),
    "clip_by_history": controllers.clip_by_history,
    "loss_scaling": controllers.loss_scaling,
    "adaptive": controllers.adaptive,
    "label_noise": controllers.label_noise,
    "label_noise that refuses": functools.partial(
        controllers.label_noise, 0.2, budget=3, window=50
    ),
}


@pytest.mark.parametrize("name", OURS)
def test_ours_keep_the_laws(name):
    report = conformance(OURS[name](), steps=100, runs=False)
    assert [law for law, _ in report.kept] == ["declared", "pure", "stable", "in range"]


def test_ours_keep_the_laws_together_in_small_runs_on_all_devices():
    report = conformance(
        controllers.warmup(5),
        controllers.first_steps(),
        controllers.guard("clip"),
        controllers.label_noise(),
        controllers.batch_growth(patience=2),
        controllers.averaging(),
        controllers.plateau(every=1, patience=1),
        steps=20,
    )

    assert [law for law, _ in report.kept] == [
        "declared",
        "pure",
        "stable",
        "in range",
        "trains",
        "resumes",
        "off",
    ]
    assert "guard" in str(report)
    assert f"{jax.device_count()} devices" in str(report)


def policy(
    update,
    init=lambda: jnp.float32(0),
    watches=("loss",),
    moves=("learning_rate",),
    name="broken",
):
    return Policy(name, init, update, watches, moves)


def counting(signals, state, calls=[]):  # noqa: B006
    calls.append(None)
    return {"learning_rate": jnp.float32(1 / len(calls))}, state


def drawing(signals, state):
    return {"learning_rate": np.float32(np.random.random())}, state


def printing(signals, state):
    return {"learning_rate": 1.0 if float(signals["loss"]) > 1 else 0.5}, state


def writing(signals, state):
    signals["loss"] = 0.0
    return {}, state


BROKEN = {
    "declared": [
        policy(lambda s, n: ({"learning_rate": s["gradient_norm"]}, n)),
        policy(lambda s, n: ({"clip_norm": 1.0}, n)),
        policy(lambda s, n: n),
        policy(lambda s, n: ({}, n), moves=("rate",)),
        policy(lambda s, n: ({}, n), name="a:b"),
        policy(lambda s, n: ({}, n), moves=("stop", "stop")),
    ],
    "pure": [policy(counting), policy(drawing), policy(writing), policy(printing)],
    "stable": [
        policy(lambda s, n: ({}, n > 0)),
        policy(lambda s, n: ({}, (n, n))),
        policy(lambda s, n: ({}, n[None])),
        policy(lambda s, n: ({}, n), init=lambda: jnp.zeros(3)),
    ],
    "in range": [
        policy(lambda s, n: ({"learning_rate": s["loss"]}, n)),
        policy(lambda s, n: ({"learning_rate": -1.0}, n)),
        policy(lambda s, n: ({"accumulate": 0.0}, n), moves=("accumulate",)),
        policy(lambda s, n: ({"b1": jnp.abs(s["loss"])}, n), moves=("b1",)),
        policy(lambda s, n: ({"clip_norm": s["loss"]}, n), moves=("clip_norm",)),
        policy(lambda s, n: ({"stop": s["loss"]}, n), moves=("stop",)),
    ],
    "trains": [policy(lambda s, n: ({"learning_rate": 1e30}, n))],
}


@pytest.mark.parametrize(
    ("law", "broken"), [(law, p) for law, policies in BROKEN.items() for p in policies]
)
def test_a_broken_law_is_named(law, broken):
    with pytest.raises(RecipeError, match=f"^{law}: ") as caught:
        conformance(broken, steps=50, runs=law == "trains")

    assert broken.name in str(caught.value)
    assert caught.value.remedy


def test_a_decision_that_a_checkpoint_does_not_hold_breaks_resumes(monkeypatch):
    """The suite finds a core that forgets a policy's state.

    It checks the run, not only the policy.
    """
    module = sys.modules[conformance.__module__]

    class Forgetful(module.Checkpoints):
        def restore(self, step, template):
            state, record = super().restore(step, template)
            forgotten = jax.tree.map(jnp.zeros_like, state.controller.policies)
            controller = state.controller._replace(policies=forgotten)
            return dataclasses.replace(state, controller=controller), record

    monkeypatch.setattr(module, "Checkpoints", Forgetful)
    slowing = policy(lambda s, n: ({"learning_rate": 1 / (1 + n)}, n + 1))
    with pytest.raises(RecipeError, match=r"^resumes: "):
        conformance(slowing, steps=20)
