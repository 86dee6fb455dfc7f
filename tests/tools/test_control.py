"""tools/control.py against a run in another process.

Words, exit codes and answers are those that a person sees.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lepton_jax.cli.control import main
from lepton_jax.controller import read_journal
from lepton_jax.monitor import read_events

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "tests" / "recipes" / "stateful.py"


def control(*arguments, capsys):
    """Return exit code, standard output and standard error."""
    code = main(list(map(str, arguments)))
    return code, *capsys.readouterr()


def wait_for(condition, process):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_run_is_steered_from_the_command_line(launch, tmp_path, capsys):
    run = tmp_path / "run"
    process = launch(
        RECIPE,
        "--run-dir",
        run,
        "--steps",
        10_000_000,
        "--save-every",
        10_000_000,
        "--devices",
        1,
    )
    # it compiles; the answer comes when it steps
    wait_for((run / "control" / "run.json").exists, process)
    command = [
        sys.executable,
        ROOT / "tools" / "control.py",
        run,
        "set",
        "learning_rate=3e-4",
    ]
    tool = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False
    )
    assert tool.returncode == 0, tool.stderr
    assert "learning_rate is 0.0003" in tool.stdout, tool.stderr

    code, out, _ = control(run, "status", capsys=capsys)
    assert code == 0
    assert "step " in out
    assert " of 10,000,000" in out
    assert "learning_rate  0.0003" in out

    code, out, _ = control(run, "save", "--json", capsys=capsys)
    saved = json.loads(out)["step"]
    for arguments, fault, remedy in (
        (
            ("set", "learning_rate=-1"),
            "refused: learning_rate can't be '-1'",
            "give a number from 0",
        ),
        (
            ("set", "momentun=1"),
            "did you mean 'momentum'",
            "this run can set learning_rate",
        ),
        (
            ("set", "learning_rate"),
            "'learning_rate' is not of the form KNOB=VALUE",
            "set learning_rate=3e-4",
        ),
        (("pause", "x=1"), "pause takes no values", "write pause alone"),
        (("fly",), "can't 'fly'", "ask for one of set, save"),
    ):
        code, out, err = control(run, *arguments, capsys=capsys)
        assert code == 2, err
        assert fault in err, err
        assert remedy in err, err
        assert not out, err
        assert "Traceback" not in err, err
    assert control(run, "stop", capsys=capsys)[0] == 0
    assert process.wait(timeout=60) == 130
    assert read_events(run)[-1]["status"] == "interrupted"
    assert (run / "checkpoints" / str(saved)).is_dir()

    who = {line["who"] for line in read_journal(run) if line["kind"] == "live"}
    assert len(who) == 1
    assert "@" in who.pop()

    code, _, err = control(run, "status", capsys=capsys)
    assert code == 2
    assert "the run is not at work" in err
    assert f"--resume {run}" in err


def test_of_a_killed_run_it_says_so_at_once(launch, tmp_path, capsys):
    run = tmp_path / "run"
    process = launch(RECIPE, "--run-dir", run, "--steps", 10_000_000, "--devices", 1)
    about = run / "control" / "run.json"
    wait_for(lambda: about.exists() and about.read_text(), process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    began = time.monotonic()
    code, out, err = control(run, "save", "--json", capsys=capsys)
    assert code == 2
    assert f"process {process.pid} on " in err
    assert "has gone" in json.loads(out)["error"]
    assert time.monotonic() - began < 5

    for place, fault in (
        (tmp_path / "nothing", "no such run folder"),
        (tmp_path, "is not at work"),
    ):
        code, _, err = control(place, "save", capsys=capsys)
        assert code == 2
        assert fault in err


def test_help_says_what_there_is(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0

    text = capsys.readouterr().out
    assert all(
        word in text
        for word in (
            "set KNOB=VALUE",
            "save",
            "evaluate",
            "pause, resume",
            "stop",
            "status",
            "--timeout",
        )
    )
