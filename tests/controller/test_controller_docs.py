"""docs/controller.md says what the code says, and its examples run as written."""

import inspect
import re
import sys
from pathlib import Path

import pytest
from flax import nnx

from lepton_jax import controllers

KNOBS = controllers.KNOBS
SIGNALS = controllers.SIGNALS
TEXT = (Path(__file__).resolve().parents[2] / "docs" / "controller.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.out = nnx.Linear(12, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(x)


def table(header):
    """The cells of each row under a table's header."""
    rows = TEXT.split(f"| {header} |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    return [
        [cell.strip().strip("`") for cell in row.strip("| ").split(" | ")]
        for row in rows
    ]


def test_the_tables_are_the_codes():
    assert table("signal | what it is") == [list(row) for row in SIGNALS.items()]
    assert table("knob | contributions combine by | what it is") == [
        [n, k.combine, k.meaning] for n, k in KNOBS.items()
    ]

    laws = sys.modules[controllers.conformance.__module__].LAWS

    assert table("law | what must hold") == [list(row) for row in laws.items()]


def test_every_policy_is_in_the_table_with_the_knobs_that_it_moves():
    made = {n: getattr(controllers, n) for n in controllers.__all__}
    policies = {
        n
        for n, f in made.items()
        if inspect.isfunction(f) and f.__annotations__.get("return") == "Policy"
    }
    rows = {name: moves for name, moves, _ in table("policy | moves | what it does")}

    assert set(rows) == policies - {"replay"}

    for name, moves in rows.items():
        policy = made[name](loss=1.0) if name == "until" else made[name]()
        assert moves == (", ".join(policy.moves) or "what it is told")


def test_the_examples_run_as_written(blobs):
    names = {"Net": Net, "train": blobs, "test": blobs}
    for block in BLOCKS:
        exec(compile(block, "docs/controller.md", "exec"), names)

    assert names["history"]["loss"][-1] < names["history"]["loss"][0]
    assert "calm:learning_rate" in names["history"].names


def test_a_policy_of_ones_own_takes_20_lines_or_fewer():
    own = next(block for block in BLOCKS if "def update" in block)
    assert len(own.strip().splitlines()) <= 20


@pytest.mark.parametrize("name", re.findall(r"controllers\.(\w+)", TEXT))
def test_what_it_names_is_there(name):
    assert hasattr(controllers, name)
