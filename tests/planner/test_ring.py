"""Attention around a ring of devices: its values, its gradients, and who chooses it."""

from __future__ import annotations

import doctest
import json
import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import lepton_jax as lepton
from lepton_jax import losses, models
from lepton_jax.compat import make_mesh
from lepton_jax.errors import PlanError
from lepton_jax.planner import Plan
from lepton_jax.planner.program import around, named
from lepton_jax.planner.rewrite import attention, forms, ring
from lepton_jax.planner.search import build
from lepton_jax.train.program import Program
from lepton_jax.verify.comparison import verify

RTOL = 1e-5  # of results and gradients in float32
SCALE = 0.3


@pytest.fixture(autouse=True, scope="module")
def compiled_quickly(quick_compilation):
    """Spend no time on fast programs."""


@pytest.mark.parametrize("module", (ring, around), ids=lambda m: m.__name__)
def test_the_examples_of_rings_hold(module):
    assert doctest.testmod(module).failed == 0


# ---- values ----


def arrays(length, heads, key_heads, dtype=jnp.float32, width=4, batch=2):
    shapes = [(batch, length, n, width) for n in (heads, key_heads, key_heads, heads)]
    seeds = jax.random.split(jax.random.key(0), 4)
    pairs = zip(seeds, shapes, strict=True)
    return [jax.random.normal(seed, shape, dtype) for seed, shape in pairs]


def plain(query, key, value, cotangent, how, segments):
    """Return attention and its gradients, by JAX's own."""
    mask = None
    if segments is not None:
        mask = models.transformer.same_segment(segments)

    def attend(query, key, value):
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            mask=mask,
            is_causal=how.causal,
            scale=how.scale,
            local_window_size=None if how.behind is None else (how.behind, 0),
        )

    out, pull = jax.vjp(attend, query, key, value)
    return [out, *pull(cotangent)]


def around_a_ring(query, key, value, cotangent, how, segments, devices):
    """Return the same from several devices, each with a part of the sequence."""
    mesh = make_mesh({"sequence": devices}, jax.devices()[:devices])
    given = ring.Ring(("sequence",), devices)
    more = () if segments is None else (segments,)

    def run(query, key, value, cotangent, *more):
        arrays = (query, key, value)
        out, sums = ring.forward(*arrays, *more, how=how, ring=given)
        operands = (*arrays, out, sums, cotangent, *more)
        return [out, *ring.backward(*operands, how=how, ring=given)]

    spec = P(None, "sequence")
    return jax.jit(
        jax.shard_map(
            run,
            mesh=mesh,
            in_specs=(spec,) * (4 + len(more)),
            out_specs=spec,
            check_vma=False,
        )
    )(query, key, value, cotangent, *more)


def compare(given, how, devices, segments=None, rtol=RTOL):
    expected = plain(*given, how, segments)
    found = around_a_ring(*given, how, segments, devices)
    for a, b in zip(expected, found, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(b, a, rtol=0, atol=rtol * np.abs(a).max())


@settings(max_examples=3, deadline=None)
@given(
    devices=st.sampled_from((2, 3, 5, 8)),
    local=st.integers(1, 9),
    groups=st.sampled_from((1, 3)),
    key_heads=st.sampled_from((1, 2)),
    kind=st.sampled_from(("causal", "window", "all")),
    behind=st.integers(1, 30),
    packed=st.booleans(),
)
def test_a_ring_computes_attention_of_odd_shapes(
    devices, local, groups, key_heads, kind, behind, packed
):
    length = devices * local
    how = attention.How(
        kind != "all", SCALE, "blocks", behind if kind == "window" else None
    )
    segments = None
    if packed:
        starts = np.random.default_rng(length).integers(0, 5, (2, length)) == 0
        segments = jnp.cumsum(jnp.asarray(starts), 1)
    given = arrays(length, groups * key_heads, key_heads)

    compare(given, how, devices, segments)


def test_bfloat16_around_a_ring_differs_within_its_rounding():
    how = attention.How(True, SCALE, "blocks")

    compare(arrays(24, 4, 2, jnp.bfloat16), how, 4, rtol=2**-6)


def test_the_kernel_for_tpus_goes_around_with_a_window():
    how = attention.How(True, SCALE, "splash-interpreted", 130)
    segments = jnp.arange(256)[None] // 100

    compare(arrays(256, 2, 1, width=64, batch=1), how, 2, segments)


def test_all_devices_of_a_causal_ring_have_as_much_work_as_half_of_all_scores():
    how = attention.How(True, SCALE, "blocks")
    for devices in (2, 4, 16):
        work = ring.work(how, 512, devices)
        products = sum(
            count * length**2 * (0.5 if kind.causal else 1)
            for kind, length, count in work
        )

        assert products == (512 * devices) ** 2 / 2 / devices


def test_a_window_makes_as_many_steps_as_it_reaches():
    how = attention.How(True, SCALE, "blocks", behind=100)

    assert [ring.steps(how, local, 8) for local in (200, 100, 99, 10)] == [1, 1, 2, 7]


# ---- in a plan ----

BATCH = 2
LENGTH = 24


@pytest.fixture
def short_attention(monkeypatch):
    """Let attention count as long from a few tokens on, and split small arrays."""
    monkeypatch.setattr(forms, "LEAST_LENGTH", {"cpu": 4, "tpu": 4, "gpu": 4})
    monkeypatch.setattr(named, "SMALL", 0)


def batch():
    x = np.random.default_rng(0).integers(0, 32, (BATCH, LENGTH + 1), dtype=np.int32)
    return x[:, :-1], x[:, 1:]


def language():
    arguments = {"vocab": 32, "dim": 32, "layers": 1, "heads": 4, "kv_heads": 2}
    recipe = lepton.Recipe(
        model=partial(models.TransformerLM, **arguments),
        loss=losses.cross_entropy,
        optimizer=optax.sgd(0.5),
        batch_size=BATCH,
        steps_per_call=1,
    )
    return lepton.trace(recipe, *batch())


def trained(trace, plan):
    """Return the losses of two steps on the same batch."""
    devices = jax.devices()[: math.prod(plan.mesh.values())]
    program = Program(trace, plan, devices)
    state = program.init(0)
    values = []
    for _ in range(2):
        given = jax.device_put(batch(), program.block_sharding)
        state, records = program.train(state, given, 0, 1)
        values.append(float(records[0, 0]))
    return values


def test_steps_with_a_ring_are_those_of_one_device(short_attention):
    trace = language()
    plans = [
        lepton.plan(trace, lepton.topology("cpu:4"), mesh={"sequence": 4}),
        lepton.plan(
            trace,
            lepton.topology("cpu:4"),
            mesh={"sequence": 2, "sequence2": 2},
            context="all-to-all",
        ),
    ]
    assignment = build.by_hand(trace, (1,), {}, 0)
    alone = build.fixed(trace, lepton.topology("cpu:1"), assignment)
    expected = trained(trace, alone)

    # two heads can't be exchanged over four devices, and over two they can
    assert [plan.context for plan in plans] == ["ring", "all-to-all"]
    for plan in plans:
        np.testing.assert_allclose(trained(trace, plan), expected, rtol=RTOL)


def test_the_compiled_step_passes_on_what_was_planned(short_attention):
    trace = language()
    plan = lepton.plan(trace, lepton.topology("cpu:4"), mesh={"sequence": 4})
    kinds = {collective.kind for collective in plan.collectives}

    found = verify(trace, plan)

    assert {"collective-permute", "permutation"} <= kinds
    assert not found.unexpected
    assert not found.absent


def test_the_way_of_attention_is_kept_and_can_be_asked_for(short_attention):
    trace = language()
    where = lepton.topology("cpu:2")

    def asked(**more):
        return lepton.plan(trace, where, mesh={"sequence": 2}, **more)

    plan = asked(context="ring")
    plain = lepton.plan(trace, where, mesh={"data": 2})

    assert Plan.from_json(plan.to_json()).context == "ring"
    assert "with all-to-all a step would take" in plan.reasons["context ring"]
    assert asked(context="all-to-all").context == "all-to-all"
    assert plain.context == ""
    assert not any(reason.startswith("context") for reason in plain.reasons)
    with pytest.raises(PlanError, match="did you mean 'ring'"):
        asked(context="rings")


def test_a_plan_that_knows_no_ring_still_opens(short_attention):
    plan = lepton.plan(language(), lepton.topology("cpu:2"), mesh={"sequence": 2})
    data = json.loads(plan.to_json())
    del data["context"], data["flags"]

    assert Plan.from_json(json.dumps(data)) == replace(plan, context="", flags={})


def long_sequences():
    """Return a trace of attention over 32,768 tokens."""
    arguments = models.transformer_size("8b") | {"loop": "scan", "layers": 1}
    token = jax.ShapeDtypeStruct((1, 32768), jnp.int32)
    recipe = lepton.Recipe(
        model=partial(models.TransformerLM, **arguments),
        loss=losses.cross_entropy,
        optimizer=optax.sgd(0.1),
        batch_size=8,
        precision="bfloat16",
    )
    return lepton.trace(recipe, token, token)


def test_on_tpus_the_faster_way_is_chosen():
    where = lepton.topology("v5p:2x2x2")
    mesh = {"data": 2, "sequence": 4}
    trace = long_sequences()
    chosen = lepton.plan(trace, where, mesh=mesh)
    seconds = {
        way: lepton.plan(trace, where, mesh=mesh, context=way).step_seconds
        for way in ("all-to-all", "ring")
    }

    assert chosen.step_seconds == min(seconds.values())
    assert seconds[chosen.context] == chosen.step_seconds
