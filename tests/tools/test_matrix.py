"""Forms of a step put through events; the whole matrix is a command."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tools.faults import cells, matrix
from tools.faults.forms import FORMS
from tools.faults.promises import apart


@pytest.fixture(autouse=True, scope="module")
def compiled_quickly(quick_compilation):
    """Spend no time on fast programs."""


# An event for each form, and a form for each event that needs no other processes.
HERE = [
    ("stages", "goes on, same devices"),
    ("ring", "goes on, half of them"),
    ("experts", "controller"),
    ("fp8", "poisoned batch"),
    ("int8", "goes on, same devices"),
    ("muon", "goes on, half of them"),
]
ON_HOSTS = [
    ("ring", "host lost"),
    ("stages", "host comes back"),
    ("experts", "killed, checkpoint torn"),
    ("fp8", "SIGTERM"),
]


@pytest.mark.parametrize(("form", "event"), HERE + ON_HOSTS)
def test_a_form_survives_an_event(form, event, tmp_path):
    outcome = cells.CELLS[event](form, tmp_path / form / "own")

    assert outcome.kept, outcome.wrong


def test_a_cell_that_is_done_is_not_repeated(tmp_path, monkeypatch, capsys):
    done = []

    def cell(name, folder):
        done.append(name)
        return cells.compared([1.0, 2.0], [1.0, 2.0 + len(done)], 0.1)

    monkeypatch.setattr(cells, "CELLS", {"an event": cell})
    options = ["--form", "ring", "plain", "--event", "an event", "--folder"]
    file = tmp_path / "matrix.json"

    codes = [
        matrix.main([*options, str(tmp_path), "--json", str(file)]) for _ in range(2)
    ]

    assert codes == [1, 1]
    assert done == ["ring", "plain"]
    assert "0 of 2 as they should be, 0 not run" in capsys.readouterr().out
    assert [row["form"] for row in json.loads(file.read_text())["cells"]] == done


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--form", "rings"], "'rings' is not known; did you mean 'ring'"),
        (["--event", "host"], "'host' is not known"),
    ],
)
def test_a_name_that_is_not_known_is_a_mistake(options, says, capsys):
    assert matrix.main(options) == 2
    said = capsys.readouterr().err
    assert says in said
    assert "remedy: use some of" in said


def test_losses_that_differ_or_are_missing_are_said():
    assert cells.compared([1.0, 2.0], [1.0, 2.0], 0.0).kept
    assert not cells.compared([1.0, np.nextafter(2.0, 3.0)], [1.0, 2.0], 0.0).kept
    assert not cells.compared([1.0], [1.0, 2.0], 1.0).kept
    assert not cells.compared([1.0, float("nan")], [1.0, 2.0], 1.0).kept
    assert apart([2.0, 4.5], [2.0, 4.0]) == 0.125


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_every_form_has_a_mesh_for_some_devices(devices):
    for form in FORMS.values():
        assert np.prod([*form.mesh(devices).values()]) == devices
