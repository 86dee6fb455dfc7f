"""The command `lepton`: its help, its interruption and its errors."""

import signal
import subprocess
import sys

import pytest

import lepton_jax
from lepton_jax.cli import COMMANDS, INTERRUPTED, main
from lepton_jax.cli.settings import program


def test_without_a_command_it_shows_its_usage(capsys):
    assert main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert all(name in printed.err for name in COMMANDS)


def test_help_is_no_mistake(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert all(name in printed.out for name in COMMANDS)


def test_an_unknown_command_names_the_nearest(capsys):
    assert main(["lanch", "recipe.py"]) == 2
    error = capsys.readouterr().err
    assert "error: there is no command 'lanch'; did you mean 'launch'?" in error


@pytest.mark.parametrize("name", ["launch", "control"])
def test_a_mistake_in_a_command_is_exit_code_2(name, capsys):
    assert main([name, "--nonsense"]) == 2
    error = capsys.readouterr().err
    assert "error: " in error
    assert "remedy: " in error


@pytest.mark.parametrize(
    ("script", "called"),
    [
        ("/usr/bin/lepton", "lepton launch"),
        ("/x/lepton_jax/__main__.py", "python -m lepton_jax launch"),
        ("tools/launch.py", "launch.py"),
    ],
)
def test_a_command_calls_itself_as_it_was_started(script, called, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script])
    assert program("launch") == called


@pytest.mark.parametrize("seconds", [0.1, 0.4, 0.8])
def test_interrupted_while_it_is_loaded_a_command_says_so_in_one_line(seconds):
    code = (
        "import os, sys, threading\n"
        "from lepton_jax.cli import main\n"
        f"interrupt = os.kill, (os.getpid(), {int(signal.SIGINT)})\n"
        f"threading.Timer({seconds}, *interrupt).start()\n"
        "sys.exit(main(['predict', 'a.lepton', '--data', 'x', '--out', 'y']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == INTERRUPTED
    assert done.stderr == "interrupted\n"


def test_help_does_not_wait_for_jax():
    code = (
        "import sys; from lepton_jax.cli import main; main(['--help'])\n"
        "sys.exit('jax' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=False
    )
    assert done.returncode == 0
    assert done.stdout.startswith(b"usage: ")


@pytest.mark.parametrize("first", ["generation.filters", "planner.search", "step"])
def test_public_names_are_the_same_whatever_is_imported_first(first):
    # an import binds the names of packages, which must not hide a function's
    code = (
        f"import lepton_jax.{first}\n"
        "import lepton_jax as lepton\n"
        "from lepton_jax import api\n"
        "assert lepton.planner.rule and lepton.generation.Sampling\n"
        "for name in lepton.__all__: assert getattr(lepton, name) is getattr(api, name)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == 0


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'Trainr'"):
        lepton_jax.Trainr  # noqa: B018
    assert {"Trainer", "generate", "__version__"} <= set(dir(lepton_jax))
