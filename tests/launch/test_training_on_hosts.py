"""Training by several processes on this machine.

It is the same run as one process makes, on any hosts that go on with it.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import lepton_jax as lepton
from lepton_jax.monitor import read_events, read_samples
from tools.faults import recipe as faults_recipe

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "tools" / "faults" / "recipe.py"


def launch(folder, *arguments, faults=None, within=()):
    """Run the launcher to its end."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    if faults is not None:
        (folder / "faults.json").write_text(json.dumps(faults))
        environment["LEPTON_FAULTS"] = str(folder / "faults.json")
    command = [
        *within,
        sys.executable,
        ROOT / "tools" / "launch.py",
        RECIPE,
        *map(str, arguments),
    ]
    return subprocess.run(
        command,
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def losses(run):
    found = {}
    for event in read_events(run):
        if event["kind"] == "steps":
            found |= zip(
                range(event["first"], event["last"] + 1),
                event["records"]["loss"],
                strict=True,
            )
    return np.array([found[step] for step in sorted(found)])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Return the undisturbed run of one process with eight devices."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    lepton.Trainer(
        faults_recipe.recipe(steps=40), run_dir=folder, trace_samples=True
    ).fit()
    return folder


def test_two_hosts_train_what_one_does(alone, tmp_path):
    done = launch(
        tmp_path,
        "--hosts",
        "local:2",
        "--devices",
        2,
        "--run-dir",
        "run",
        "--trace-samples",
        "--steps",
        40,
        "--json",
    )
    assert done.returncode == 0, done.stderr

    run = tmp_path / "run"
    assert read_samples(run) == read_samples(alone)

    np.testing.assert_allclose(losses(run), losses(alone), rtol=2e-6)
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["steps"] == 40
    assert summary["compilations"] == 1
    assert summary["status"] == "finished"

    events = read_events(run)
    assert [e["kind"] for e in events].count("start") == 1
    assert (run / "report.html").exists()
    assert [e["devices"] for e in events if e["kind"] == "start"] == [4]


# What a plan may say of how a step is computed; see tests/test_forms.py.
FORMS = {
    "kept": {"remat": "keep 0,2 and 1,4 in 2"},
    "fused": {"remat": "keep attention,0", "attention": "blocks", "loss_pieces": 2},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_form_of_a_step_survives_the_loss_of_a_host(form, tmp_path):
    """Two hosts with two devices each; one is killed, and both go on."""
    steps = 16
    alone = faults_recipe.recipe(steps=steps, layers=4)
    trainer = lepton.Trainer(alone, devices=1, run_dir=tmp_path / "alone")
    plan = trainer.plan("cpu:4", mesh={"data": 2, "tensor": 2})
    dataclasses.replace(plan, **FORMS[form]).save(tmp_path / "plan.json")
    trainer.fit()

    done = launch(
        tmp_path,
        *("--hosts", "local:2", "--devices", 2, "--layers", 4, "--steps", steps),
        *("--plan", "plan.json", "--run-dir", "run", "--restarts", 1),
        faults=[{"kind": "kill", "host": 1, "phase": "steps", "step": 13}],
    )
    assert done.returncode == 0, done.stderr
    events = read_events(tmp_path / "run")
    assert [e["kind"] for e in events].count("start") == 2
    together, single = losses(tmp_path / "run"), losses(tmp_path / "alone")
    np.testing.assert_allclose(together, single, rtol=1e-5)


@pytest.mark.slow
def test_the_samples_do_not_depend_on_the_hosts(alone, tmp_path):
    """Data are filtered, mixed and packed while the hosts change.

    Four hosts, then three, two, and four again; eight devices, six, four, eight.
    """
    arguments = ["--run-dir", "run", "--go-on", "--trace-samples"]
    for hosts, steps in ((4, 10), (3, 20), (2, 30), (4, 40)):
        done = launch(
            tmp_path,
            "--hosts",
            f"local:{hosts}",
            "--devices",
            2,
            "--steps",
            steps,
            *arguments,
        )
        assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    assert read_samples(run) == read_samples(alone)

    np.testing.assert_allclose(losses(run), losses(alone), rtol=1e-5)
    assert [e["devices"] for e in read_events(run) if e["kind"] == "start"] == [
        8,
        6,
        4,
        8,
    ]


def test_a_host_that_differs_is_refused_before_the_first_step(tmp_path):
    done = launch(
        tmp_path,
        "--hosts",
        "local:2",
        "--run-dir",
        "run",
        faults=[{"kind": "program", "host": 1, "phase": "never"}],
    )
    assert done.returncode == 2, done.stderr
    assert "host 1 differs from host 0 in the train step, first in line" in done.stderr
    assert "remedy:" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))


@pytest.mark.slow
def test_a_request_is_obeyed_by_all_hosts_at_one_step(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    options = ["--hosts", "local:2", "--run-dir", "run", "--steps", "99999"]
    command = [sys.executable, ROOT / "tools" / "launch.py", RECIPE, *options]
    run = tmp_path / "run"
    control = [sys.executable, ROOT / "tools" / "control.py"]
    with subprocess.Popen(
        command,
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as process:
        try:
            until = time.monotonic() + 120
            while not any(
                e["kind"] == "steps"
                for e in (read_events(run) if (run / "events.jsonl").exists() else ())
            ):
                assert process.poll() is None, process.stderr.read()
                assert time.monotonic() < until, process.stderr.read()
                time.sleep(0.2)
            for request in (
                ["set", "learning_rate=0.02"],
                ["pause"],
                ["resume"],
                ["stop"],
            ):
                done = subprocess.run(
                    [*control, run, *request],
                    env=environment,
                    capture_output=True,
                    text=True,
                    timeout=100,
                    check=False,
                )
                assert done.returncode == 0, done.stderr
            assert process.wait(100) == 130
        finally:
            process.kill()
    events = read_events(run)
    assert [e["do"] for e in events if e["kind"] == "control"] == [
        "set",
        "pause",
        "resume",
        "stop",
    ]

    rates = {
        rate
        for e in events
        if e["kind"] == "steps"
        for rate in e["records"].get("learning_rate", [])
    }
    assert rates == {np.float32(0.01).item(), np.float32(0.02).item()}

    end = (
        events[-1]
        if events[-1]["kind"] == "end"
        else next(e for e in reversed(events) if e["kind"] == "end")
    )
    assert (run / "checkpoints" / str(end["step"])).is_dir()
    assert end["status"] == "interrupted"


@pytest.mark.parametrize("host", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_sigterm_to_any_host_stops_all_at_one_step_and_saves(host, tmp_path):
    faults = [{"kind": "sigterm-worker", "host": host, "phase": "steps", "step": 17}]
    done = launch(
        tmp_path,
        "--hosts",
        "local:2",
        "--run-dir",
        "run",
        "--steps",
        100000,
        faults=faults,
    )
    assert done.returncode == 130, done.stderr

    saved = max(
        int(path.name)
        for path in (tmp_path / "run" / "checkpoints").iterdir()
        if path.name.isdigit()
    )
    assert saved >= 17
    assert saved == max(
        e["step"] for e in read_events(tmp_path / "run") if e["kind"] == "save"
    )


def test_sigterm_to_one_host_that_still_plans_ends_all(tmp_path):
    began = time.monotonic()
    faults = [{"kind": "sigterm-worker", "host": 1, "phase": "plan", "step": 0}]
    done = launch(
        tmp_path, "--hosts", "local:2", "--run-dir", "run", "--go-on", faults=faults
    )
    assert done.returncode == 130, done.stderr
    assert "[host 1] interrupted" in done.stderr, done.stderr
    assert time.monotonic() - began < 60, "JAX waits for minutes"


def test_a_proxy_and_a_machine_without_a_name_are_no_hindrance(tmp_path, monkeypatch):
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    within = ["unshare", "--uts", "sh", "-c", 'hostname no-such-host; exec "$@"', "sh"]
    if (
        shutil.which("unshare") is None
        or subprocess.run(
            [*within, "true"], capture_output=True, check=False
        ).returncode
    ):
        within = []  # not permitted here: the proxy alone
    done = launch(
        tmp_path, "--hosts", "local:2", "--run-dir", "run", "--steps", 2, within=within
    )
    assert done.returncode == 0, done.stderr
    assert "proxy" not in done.stderr, done.stderr


@pytest.mark.parametrize("named", [pytest.param(False, marks=pytest.mark.slow), True])
def test_after_a_restart_nothing_is_compiled(named, tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    cache = tmp_path / "run" / "cache"
    if named:
        cache = tmp_path / "named"
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
    for steps in (10, 20):
        assert (
            launch(
                tmp_path,
                "--hosts",
                "local:2",
                "--run-dir",
                "run",
                "--go-on",
                "--steps",
                steps,
            ).returncode
            == 0
        )
    events = read_events(tmp_path / "run")
    second = max(i for i, event in enumerate(events) if event["kind"] == "start")
    first, again = (
        [e["cached"] for e in part if e["kind"] == "compile"]
        for part in (events[:second], events[second:])
    )
    assert first == [[False, False]] * 3
    assert again == [[True, True]] * 2
    assert cache.is_dir()
    assert jax.process_count() == 1
