"""A run that is killed at any moment and resumed equals one left alone, to the bit."""

import json
import os
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import lepton_jax as lepton
from lepton_jax.checkpoint.durable import Checkpoints
from lepton_jax.monitor import read_events

RECIPE = Path(__file__).parent / "recipes" / "stateful.py"
STEPS = 400


def losses(folder: Path) -> np.ndarray:
    """Return the loss of each step.

    Where a resumed run repeated steps, the later record must equal the earlier one.
    """
    found: dict[int, float] = {}
    for event in read_events(folder / "events.jsonl"):
        if event["kind"] == "steps":
            for step, loss in enumerate(event["records"]["loss"], event["first"]):
                assert found.setdefault(step, loss) == loss, (
                    f"step {step} was {found[step]}, repeated it is {loss}"
                )
    return np.array([found[step] for step in range(1, STEPS + 1)])


def final_state(folder: Path) -> dict[str, np.ndarray]:
    manager = Checkpoints(folder / "checkpoints")._open()
    assert Checkpoints(folder / "checkpoints").steps()[-1] == STEPS
    return jax.tree.map(np.asarray, manager.restore(STEPS)["state"])


def finish(process) -> dict:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def kill_when(process, condition) -> None:
    """SIGKILL as soon as the condition holds."""
    deadline = time.monotonic() + 100
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    lepton.Trainer(_recipe(), devices=1, run_dir=folder).fit()
    return losses(folder), final_state(folder)


def _recipe(**settings):
    from lepton_jax.cli.settings import load

    return load(RECIPE)(**settings)


def _reached(folder: Path, step: int) -> bool:
    try:
        return f'"step":{step},' in (folder / "events.jsonl").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(20, marks=pytest.mark.slow),
        pytest.param(140, marks=pytest.mark.slow),
        300,
        "write",
    ],
)
def test_killed_and_resumed_is_bitwise_the_same(moment, undisturbed, launch, tmp_path):
    folder = tmp_path / "run"
    rng = np.random.default_rng(0 if moment == "write" else moment)
    killed = launch(
        RECIPE,
        "--run-dir",
        folder,
        "--steps",
        STEPS,
        "--devices",
        1,
    )
    if moment == "write":
        # Orbax writes into a folder with a temporary name; the kill lands while the
        # second one is there
        def writing():
            return bool(Checkpoints(folder / "checkpoints").steps()) and any(
                "tmp" in p.name for p in (folder / "checkpoints").glob("*")
            )

        kill_when(killed, writing)
    else:
        kill_when(killed, lambda: _reached(folder, moment))
        time.sleep(rng.uniform(0, 0.05))
    committed = Checkpoints(folder / "checkpoints").steps()
    assert not committed or committed[-1] < STEPS, (
        "the kill came too late to prove anything"
    )
    summary = finish(
        launch(
            "--resume",
            folder,
            "--devices",
            1,
            "--json",
        )
    )
    assert summary["steps"] == STEPS
    assert summary["compilations"] == 1
    resumed = [
        e["step"] for e in read_events(folder / "events.jsonl") if e["kind"] == "start"
    ][1]
    assert resumed == (committed[-1] if committed else 0)
    expected, state = undisturbed
    np.testing.assert_array_equal(losses(folder), expected)
    found = final_state(folder)
    assert found.keys() == state.keys()
    for name in state:
        np.testing.assert_array_equal(
            found[name],
            state[name],
            err_msg=name,
        )


@pytest.mark.parametrize(
    "change",
    [
        {"precision": "float16"},
        {"precision": "bfloat16"},
        {"steps_per_call": 7},
        {"shuffle": False},
    ],
)
def test_stopped_anywhere_and_loaded_goes_on_to_the_same_bits(change, tmp_path):
    recipe = _recipe(steps=60).with_(
        test=None, evaluate_every=None, save_every=13, **change
    )
    whole = lepton.Trainer(recipe, devices=1)
    expected = whole.fit()["loss"]
    part = lepton.Trainer(
        recipe,
        devices=1,
        run_dir=tmp_path / "run",
    )
    part.fit(steps=31)
    for step in (26, 31):
        rest = lepton.Trainer(recipe, devices=1).load(
            tmp_path / "run",
            step=step,
        )
        np.testing.assert_array_equal(rest.fit()["loss"], expected[step:])
        for a, b in zip(
            jax.tree.leaves(rest.state.params),
            jax.tree.leaves(whole.state.params),
            strict=True,
        ):
            np.testing.assert_array_equal(a, b)


def test_resumed_on_other_devices_consumes_the_same_samples(tmp_path):
    recipe = _recipe(steps=60).with_(
        test=None, evaluate_every=None, micro_batches=1, save_every=20
    )
    expected = lepton.Trainer(recipe, devices=1).fit()["loss"]
    lepton.Trainer(recipe, devices=1, run_dir=tmp_path / "run").fit(steps=20)
    moved = lepton.Trainer(recipe, devices=8, run_dir=tmp_path / "run").resume()
    np.testing.assert_allclose(
        moved.fit()["loss"],
        expected[20:],
        rtol=1e-5,
    )
    assert all(
        len(x.sharding.device_set) == 8 for x in jax.tree.leaves(moved.state.params)
    )
