"""Advice where nothing fits: the nearest change that works.

A plan that was chosen because it is simple says what is faster.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import optax
import pytest

import lepton_jax as lepton
from lepton_jax import models
from lepton_jax.planner import planning, rewrite
from lepton_jax.planner.search import limits
from lepton_jax.planner.show.text import head

TOKENS = jax.ShapeDtypeStruct((1, 256), jnp.int32)
LABEL = jax.ShapeDtypeStruct((1,), jnp.int32)


def on(name, memory):
    """Return a topology whose devices have this number of bytes."""
    whole = lepton.topology(name)
    return dataclasses.replace(
        whole,
        chip=dataclasses.replace(whole.chip, memory=memory),
    )


def numbers(*shape):
    return jax.ShapeDtypeStruct((1, *shape), jnp.float32)


def images(batch_size, **fields):
    return recipe(
        functools.partial(models.CNN, 10),
        (numbers(28, 28, 1), LABEL),
        batch_size,
        fields,
    )


def wide(batch_size, **fields):
    return recipe(
        functools.partial(models.MLP, (1_000_000, 10)),
        (numbers(1_000_000), LABEL),
        batch_size,
        fields,
    )


@pytest.fixture(autouse=True)
def as_traced():
    """Plan the programs as JAX traces them: the sizes of the cases are theirs."""
    with rewrite.only():
        yield


def language(batch_size, **fields):
    model = functools.partial(
        models.TransformerLM,
        512,
        dim=64,
        layers=2,
        heads=4,
    )
    return recipe(model, (TOKENS, TOKENS), batch_size, fields)


def surely_fits(trace, topology):
    try:
        return planning.plan(trace, topology).fits == "yes"
    except lepton.PlanError:
        return False


def recipe(model, shapes, batch_size, fields):
    made = lepton.Recipe(
        model=model,
        loss=lepton.losses.cross_entropy,
        optimizer=optax.adam(1e-3),
        batch_size=batch_size,
        **fields,
    )
    return lepton.trace(made, *shapes)


# model, batch size, fields of the recipe, topology, and the step between sizes: on one
# device any size will do; on several a multiple
CASES = {
    "images on one device": (
        images,
        50,
        {},
        on("cpu:1", 30e6),
        1,
    ),
    "images on eight": (
        images,
        256,
        {},
        on("cpu:8", 160e6),
        8,
    ),
    "wide rows": (
        wide,
        65_536,
        {},
        lepton.topology("v5e:2x2"),
        4,
    ),
    "an odd batch of images": (
        images,
        42,
        {},
        on("cpu:1", 20e6),
        1,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_batch_size_that_is_advised_fits_and_the_next_does_not(case, monkeypatch):
    monkeypatch.setattr(limits, "DOUBLINGS", 0)
    model, rows, fields, topology, step = CASES[case]
    with pytest.raises(lepton.PlanError) as caught:
        planning.plan(model(rows, **fields), topology)
    advised = int(re.search(r"a batch_size of (\d+)", caught.value.remedy)[1])

    assert advised % step == 0
    assert advised < rows

    assert surely_fits(model(advised, **fields), topology)

    assert advised > rows / 20, "the case has something to look for"

    if advised + step < rows:
        assert not surely_fits(model(advised + step, **fields), topology)


def test_a_batch_size_that_only_may_fit_is_advised_in_these_words(monkeypatch):
    monkeypatch.setattr(limits, "DOUBLINGS", 0)
    device = on("cpu:1", 7e6)
    with pytest.raises(lepton.PlanError) as caught:
        planning.plan(images(42), device)
    remedy = caught.value.remedy
    advised = int(
        re.fullmatch(r"use a batch_size of (\d+): then it may fit", remedy)[1]
    )

    assert planning.plan(images(advised), device).fits == "may not"
    assert not surely_fits(images(1), device)

    with pytest.raises(lepton.PlanError):
        planning.plan(images(advised + 1), device)


def test_a_larger_topology_that_only_may_do_is_advised_in_these_words(monkeypatch):
    monkeypatch.setattr(limits, "DOUBLINGS", 1)
    trace = recipe(
        functools.partial(models.MLP, (2048, 2048, 10)),
        (numbers(2048), LABEL),
        8,
        {},
    )
    # the upper bound of a GPU's peak is at least 64 MiB
    with pytest.raises(lepton.PlanError, match="use h200:4: then it may fit"):
        planning.plan(trace, on("h200:2", 25e6))


def test_micro_batches_that_are_asked_for_are_the_first_to_change():
    with pytest.raises(
        lepton.PlanError, match="let the planner choose micro_batches: then it fits"
    ):
        planning.plan(language(256, micro_batches=2), on("h200:2", 150e6))
    plan = planning.plan(language(256), on("h200:2", 150e6))
    assert plan.fits == "yes"
    assert plan.micro_batches > 2


def test_micro_batches_that_free_little_are_not_offered(monkeypatch):
    monkeypatch.setattr(limits, "DOUBLINGS", 0)
    trace = recipe(
        functools.partial(models.MLP, (1024, 1024, 10)),
        (numbers(1024), LABEL),
        1024,
        {},
    )
    with pytest.raises(lepton.PlanError) as caught:
        planning.plan(trace, on("h200:1", 2e6))
    parts = int(re.search(r"remat \w+, ([\d,]+) micro-batch", caught.value.what)[1])
    leanest = float(re.search(r"holds ([\d.]+) MiB", caught.value.what)[1])
    most = (
        planning.plan(
            trace,
            lepton.topology("h200:1"),
            remat="full",
            micro_batches=1024,
        ).peak
        / 2**20
    )

    assert parts < 128
    assert leanest < 1.03 * most


def test_micro_batches_that_free_nothing_are_one():
    with pytest.raises(lepton.PlanError, match=r"remat none, 1 micro-batch\) holds"):
        planning.plan(images(128), on("cpu:1", 2e6))


def test_a_faster_rival_is_not_called_slower_and_the_plan_not_the_best():
    trace = recipe(
        functools.partial(models.MLP, (784, 2048, 10)),
        (numbers(784), LABEL),
        16,
        {},
    )
    plan = planning.plan(trace, lepton.topology("h200:8"))
    faster = [
        r
        for r in plan.rivals
        if r.seconds < plan.step_seconds * 0.999
        and not r.loses.startswith("does not fit")
    ]

    assert faster, "the case has a rival that is faster by microseconds"

    for rival in faster:
        share = plan.step_seconds / rival.seconds - 1
        assert rival.loses.startswith(f"{share:.1%} faster, by ")
        assert rival.loses.endswith("µs; less simple")

    assert "best in time" not in " ".join(head(plan))
    assert "the simplest of the fastest" in head(plan)[0]
    assert "faster, by" in str(plan)
    assert "dispatching" in plan.reasons["the simplest"]


def test_a_plan_that_is_the_fastest_says_so():
    plan = planning.plan(language(64), lepton.topology("h200:8"))

    assert all(r.seconds >= plan.step_seconds * 0.999 for r in plan.rivals)
    assert "the best in time" in head(plan)[0]
    assert "the simplest" not in plan.reasons
