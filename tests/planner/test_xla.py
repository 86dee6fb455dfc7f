"""The worked examples in the docstrings of the model of XLA, and its figures."""

import doctest
import re

import pytest

from lepton_jax.planner.estimate import memory
from lepton_jax.planner.search import bounds
from lepton_jax.planner.xla import fusion, heap, schedule
from lepton_jax.planner.xla.figures import FIGURES


@pytest.mark.parametrize(
    "module",
    [fusion, schedule, heap, memory, bounds],
    ids=lambda module: module.__name__.rpartition(".")[2],
)
def test_the_examples_of_a_module_hold(module):
    failed, tried = doctest.testmod(module)

    assert tried > 0
    assert failed == 0


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_has_a_unit_and_says_where_it_is_from(name):
    figure = FIGURES[name]

    assert figure.unit
    assert re.match(
        r"assumption|fitted by `|found by |the chip table|Pallas", figure.source
    )
