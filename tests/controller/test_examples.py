"""The examples in the docstrings of policies, losses and steps run as written."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import lepton_jax.controller
import lepton_jax.step

# run elsewhere, or without an example
SKIPPED = {"lepton_jax.controller.live"}


def modules():
    names = ["lepton_jax.losses", "lepton_jax.metrics"]
    for package in (lepton_jax.controller, lepton_jax.step):
        inner = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        names += [info.name for info in inner]
    return sorted(set(names) - SKIPPED)


@pytest.mark.parametrize("name", modules())
def test_the_examples_run_as_written(name):
    module = importlib.import_module(name)

    results = doctest.testmod(module)

    assert results.failed == 0


def test_every_policy_has_an_example():
    finder = doctest.DocTestFinder(exclude_empty=True)
    package = lepton_jax.controller.policies
    for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        module = importlib.import_module(info.name)
        policies = [
            function
            for name, function in inspect.getmembers(module, inspect.isfunction)
            if function.__module__ == info.name
            and name in lepton_jax.controller.__all__
        ]
        for policy in policies:
            assert any(test.examples for test in finder.find(policy)), policy
