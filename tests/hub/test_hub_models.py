"""Tiny random checkpoints against a reference in float64 NumPy."""

import math

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

import lepton_jax as lepton
from lepton_jax.hub.keys import Keys
from lepton_jax.hub.positions import described, rotary_of
from tools.hub import checkpoints, reference
from tools.hub.mutants import mutants

pytestmark = pytest.mark.usefixtures("quick_compilation")

BAR = 1e-4  # of a logit, in float32
CASES = 1  # of a family; `python -m tools.hub cross` has all
# Faults that a reader of checkpoints may have; `python -m tools.hub faults` has more.
FAULTS = {
    "pairs of neighbours in queries alone",
    "turned the other way",
    "query and key swapped",
    "gate and up swapped",
    "scaling dropped",
    "window one longer",
    "window one shorter",
}


def error_of(module, tokens, right):
    logits = np.asarray(module(jnp.asarray(tokens)[None])[0], np.float64)
    return np.abs(logits - right).max()


@pytest.mark.parametrize("family", checkpoints.AXES)
def test_logits_are_those_of_the_reference(family, tmp_path):
    for number, case in enumerate(checkpoints.covering(family)[-CASES:]):
        folder = tmp_path / str(number)
        config, tensors = checkpoints.write(case, folder)
        tokens = checkpoints.tokens_of()
        right = reference.logits(config, tensors, tokens)
        module = lepton.hub.open(folder).module()
        assert error_of(module, tokens, right) < BAR, case


def test_faults_are_caught(tmp_path):
    flags = {"scaling": "llama3", "schema": "rope_type", "groups": 4, "windows": "all"}
    case = checkpoints.Case("mistral", flags)
    config, tensors = checkpoints.write(case, tmp_path)
    tokens = checkpoints.tokens_of()
    right = reference.logits(config, tensors, tokens)
    caught = {}
    for name, mutant in mutants(lepton.hub.open(tmp_path).module()):
        if name in FAULTS:
            caught[name] = error_of(mutant, tokens, right)
    assert caught.keys() == FAULTS
    assert min(caught.values()) > 1000 * BAR


def test_the_cases_have_each_value_of_each_axis():
    for family, axes in checkpoints.AXES.items():
        chosen = checkpoints.covering(family)
        for name, values in axes.items():
            assert {case.flags[name] for case in chosen} == set(values)
        assert {case.tied for case in chosen} == set(checkpoints.TIED)


@hypothesis.given(
    name=strategies.sampled_from(list(checkpoints.SCALINGS)),
    schema=strategies.sampled_from(checkpoints.ROPES["schema"]),
    size=strategies.integers(2, 64).map(lambda half: 2 * half),
    theta=strategies.floats(50.0, 1e7),
    factor=strategies.floats(1.0, 64.0),
    original=strategies.integers(32, 8192),
)
def test_frequencies_are_those_of_the_reference_in_both_schemas(
    name, schema, size, theta, factor, original
):
    kind = name.partition(",")[0]
    scaling = dict(checkpoints.SCALINGS[name])
    if kind != "default":
        scaling["factor"] = factor
    if "original_max_position_embeddings" in scaling:
        scaling["original_max_position_embeddings"] = original
    config = {"model_type": "llama", "head_dim": size}
    config["max_position_embeddings"] = original
    if schema == "rope_parameters":
        config[schema] = {"rope_type": kind, "rope_theta": theta, **scaling}
    else:
        config["rope_theta"] = theta
        config["rope_scaling"] = {schema: kind, **scaling}

    keys = Keys(config, "config.json")
    rotary = rotary_of(keys)
    angles, amplitude = reference._angles(config, 2, 0)
    np.testing.assert_allclose(rotary.frequencies(size), angles[1], rtol=1e-9)
    assert math.isclose(rotary.amplitude, amplitude)
    again = {"rope_parameters": described(rotary), "max_position_embeddings": original}
    assert rotary_of(Keys(again, "again")) == rotary
