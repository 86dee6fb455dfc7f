"""The command `lepton`: its three commands, its help and its errors."""

import sys

import pytest

from lepton_jax.cli import COMMANDS, main
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
