"""Muon whose matrices are divided over devices."""

from __future__ import annotations

import doctest
from functools import partial

import jax
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import lepton_jax as lepton
from lepton_jax.planner.estimate.cost import Cost
from lepton_jax.planner.program import named
from lepton_jax.planner.search import build
from lepton_jax.step import optimizers
from lepton_jax.step.optimizers import orthogonal

SHAPES = {"up": (3, 4, 6), "down": (3, 6, 4), "out": (4, 4), "odd": (5, 2)}


@pytest.fixture(autouse=True, scope="module")
def compiled_quickly(quick_compilation):
    """Spend no time on fast programs."""


def kernels(seed):
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    pairs = zip(keys, SHAPES.items(), strict=True)
    return {name: jax.random.normal(key, shape) for key, (name, shape) in pairs}


def steps(optimizer, count=2):
    params = kernels(0)
    state = optimizer.init(params)
    for step in range(count):
        updates, state = optimizer.update(kernels(step + 1), state, params)
        params = optax.apply_updates(params, updates)
    return params


def dims(params):
    return jax.tree.map(
        lambda x: optax.contrib.MuonDimensionNumbers(x.ndim - 2, x.ndim - 1), params
    )


def test_the_examples_of_muon_hold():
    assert doctest.testmod(orthogonal).failed == 0


@pytest.mark.parametrize("rms", (None, 0.2))
def test_updates_are_those_of_optax(rms):
    ours = optimizers.muon(0.1, weight_decay=0.3, consistent_rms=rms)
    theirs = optax.contrib.muon(
        0.1,
        weight_decay=0.3,
        consistent_rms=rms,
        muon_weight_dimension_numbers=dims,
    )

    found, known = (jax.jit(lambda own=own: steps(own))() for own in (ours, theirs))

    for name, x in known.items():
        np.testing.assert_allclose(found[name], x, rtol=2e-4, atol=2e-5)


def test_each_device_orthogonalizes_matrices_of_its_own():
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"))
    plain = kernels(0)
    spec = NamedSharding(mesh, PartitionSpec(None, None))
    split = jax.tree.map(lambda x: jax.device_put(x, spec), plain)

    def divided(updates):
        with optimizers.divided_over(mesh):
            return orthogonal.orthogonalized(updates)

    compiled = jax.jit(divided).lower(split).compile()
    flops = compiled.cost_analysis()["flops"]
    whole = jax.jit(orthogonal.orthogonalized).lower(plain).compile()

    assert flops < 0.6 * whole.cost_analysis()["flops"]
    for mine, known in zip(
        jax.tree.leaves(divided(split)),
        jax.tree.leaves(orthogonal.orthogonalized(plain)),
        strict=True,
    ):
        np.testing.assert_allclose(mine, known, rtol=1e-4, atol=1e-5)


def test_a_plan_prices_the_matrices_and_their_exchange(monkeypatch):
    monkeypatch.setattr(named, "SMALL", 0)  # small arrays are split, too
    tokens = jax.ShapeDtypeStruct((16, 32), "int32")
    muon = partial(optimizers.muon, consistent_rms=0.2)

    def planned(own):
        recipe = lepton.Recipe(
            model=partial(
                lepton.models.TransformerLM, vocab=64, dim=64, layers=2, heads=2
            ),
            loss=lepton.losses.cross_entropy,
            optimizer=own,
            learning_rate=0.01,
            batch_size=16,
        )
        trace = lepton.trace(recipe, tokens, tokens)
        topology = lepton.topology("v5e:2x2")
        assignment = build.by_hand(trace.on(topology), (4,), {"batch": 1}, 1)
        names = named.Names(trace.on(topology).gradient("none"), trace.arguments)
        return Cost(trace.on(topology), names, topology).estimate(assignment, True)

    plain = planned(optax.adamw)
    ours = planned(optimizers.by_part({"blocks/*/kernel": muon}, default=optax.adamw))

    # 8 of (64, 64), and 6 of (64, 192), on four devices: 2 of each
    square, wide = 2 * 64**3, 2 * 64 * 64 * 192
    flops = 5 * 2 * (3 * square + 2 * wide + square)
    assert ours.flops - plain.flops == flops
    assert any(kind == "all-to-all" for kind, _ in ours.moves)
    assert not any(kind == "all-to-all" for kind, _ in plain.moves)
