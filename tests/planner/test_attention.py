"""Attention as an operation of its own, against JAX's plain attention."""

from __future__ import annotations

import doctest
import functools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lepton_jax as lepton
from lepton_jax import losses, models
from lepton_jax.planner.program import named
from lepton_jax.planner.rewrite import attention, forms, softmax
from lepton_jax.planner.search import build
from lepton_jax.train.program import Program

RTOL = 1e-5  # of results and gradients in float32


@pytest.fixture(autouse=True, scope="module")
def compiled_quickly(quick_compilation):
    """Spend no time on fast programs."""


@pytest.mark.parametrize("module", (attention, softmax), ids=lambda m: m.__name__)
def test_the_examples_of_attention_hold(module):
    assert doctest.testmod(module).failed == 0


# ---- kernels ----


def arrays(batch, length, heads, key_heads, width, dtype=jnp.float32, keys=None):
    shapes = [
        (batch, length, heads, width),
        (batch, keys or length, key_heads, width),
        (batch, keys or length, key_heads, width),
        (batch, length, heads, width),
    ]
    seeds = jax.random.split(jax.random.key(0), 4)
    pairs = zip(seeds, shapes, strict=True)
    return [jax.random.normal(seed, shape, dtype) for seed, shape in pairs]


def plain(query, key, value, causal):
    return jax.nn.dot_product_attention(query, key, value, is_causal=causal)


def with_gradients(function, query, key, value, cotangent):
    out, pull = jax.vjp(function, query, key, value)
    return [out, *pull(cotangent)]


def assert_close(left, right, rtol=RTOL):
    for a, b in zip(left, right, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(a).max())


def compare(kernel, given, causal=True, rtol=RTOL, behind=None, segments=None):
    width = given[0].shape[-1]
    how = attention.How(causal, 1 / math.sqrt(width), kernel, behind)

    def known(query, key, value):
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            mask=None
            if segments is None
            else models.transformer.same_segment(segments),
            is_causal=causal,
            local_window_size=None if behind is None else (behind, 0),
        )

    def found(query, key, value):
        return attention.attend(query, key, value, how, segments)

    assert_close(with_gradients(known, *given), with_gradients(found, *given), rtol)


@settings(max_examples=4, deadline=None)
@given(
    length=st.integers(1, 40),
    group=st.integers(1, 3),
    width=st.sampled_from([2, 5, 8]),
    causal=st.booleans(),
)
def test_blocks_compute_attention_of_odd_shapes(length, group, width, causal):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "BLOCK_ROWS", 7)
        compare("blocks", arrays(2, length, 2 * group, 2, width), causal)


@pytest.mark.parametrize("behind", (1, 3, 20, 500))
def test_blocks_see_as_far_as_a_window_reaches(behind, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK_ROWS", 7)

    compare("blocks", arrays(1, 30, 2, 1, 4), behind=behind)


@pytest.mark.parametrize("causal", (True, False))
def test_blocks_keep_segments_apart(causal, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK_ROWS", 7)
    segments = jnp.sort(jax.random.randint(jax.random.key(1), (2, 30), 0, 4))

    compare("blocks", arrays(2, 30, 4, 2, 4), causal, segments=segments)


def test_the_kernel_for_tpus_has_windows_and_segments():
    segments = jnp.repeat(jnp.arange(3), 50)[None]

    compare(
        "splash-interpreted",
        arrays(1, 150, 2, 1, 16),
        behind=40,
        segments=segments,
    )


def test_blocks_attend_to_keys_of_another_length():
    compare("blocks", arrays(1, 130, 2, 2, 4, keys=9), causal=False)


def test_many_blocks_become_larger_ones():
    how = attention.How(True, 1.0, "blocks")

    assert len(list(how.blocks(8192, 8192))) == attention.MOST_BLOCKS


@pytest.mark.parametrize("length", (128, 150))
def test_the_kernel_for_tpus_computes_attention(length):
    compare("splash-interpreted", arrays(1, length, 2, 1, 16))


def test_a_plan_for_tpus_computes_in_blocks_elsewhere():
    compare("splash", arrays(1, 20, 2, 1, 8))


def test_bfloat16_attention_differs_within_its_rounding():
    given = arrays(1, 140, 2, 2, 16, jnp.bfloat16)

    compare("blocks", given, rtol=2**-6)


# ---- recognition ----


def found_in(function, *args):
    program = softmax.opened(jax.make_jaxpr(function)(*args))
    return softmax.find_all(program)


def test_attention_is_found_with_its_scale_and_its_mask():
    query, key, value, _ = arrays(1, 6, 4, 2, 8)

    for causal in (True, False):
        [found] = found_in(partial(plain, causal=causal), query, key, value)

        assert found.causal == causal
        assert found.scale == pytest.approx(1 / math.sqrt(8))


def test_windows_and_segments_are_found():
    query, key, value, _ = arrays(2, 6, 4, 2, 8)
    segments = jnp.arange(12).reshape(2, 6) // 4

    def packed(q, k, v, segments):
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            mask=models.transformer.same_segment(segments),
            is_causal=True,
            local_window_size=(3, 0),
        )

    def in_a_loop(q, k, v, segments):
        def layer(x, _):
            return packed(x, k, v, segments), None

        return jax.lax.scan(layer, q, None, length=2)[0]

    for function in (packed, in_a_loop):
        [found] = found_in(function, query, key, value, segments)
        faster = softmax.fused(function, "blocks")
        given = (query, key, value, segments)

        how = found.how("blocks")
        assert how == attention.How(True, pytest.approx(8**-0.5), "blocks", behind=3)
        assert found.segments is not None
        assert_close([function(*given)], [faster(*given)])


def test_what_differs_in_one_operation_is_not_taken_for_attention():
    query, key, value, _ = arrays(1, 6, 2, 2, 8)
    attend = jax.nn.dot_product_attention

    def ahead(q, k, v):
        return attend(q, k, v, local_window_size=2)

    def masked(q, k, v):
        return attend(q, k, v, mask=(q > 0)[:, :, :, :6].swapaxes(1, 2))

    def biased(q, k, v):
        return attend(q, k, v, bias=q[:, :, :, :6].swapaxes(1, 2))

    for other in (ahead, masked, biased):
        assert found_in(other, query, key, value) == []


def test_attention_in_a_loop_is_replaced():
    model = partial(models.TransformerLM, 16, dim=8, layers=2, heads=2, loop="scan")

    def loss(params, tokens):
        from flax import nnx

        graph, _ = nnx.split(nnx.eval_shape(lambda: model(rngs=nnx.Rngs(0))))
        return nnx.merge(graph, params)(tokens).sum()

    from flax import nnx

    params = nnx.state(model(rngs=nnx.Rngs(0)))
    tokens = jnp.arange(12).reshape(2, 6) % 16
    faster = softmax.fused(loss, "blocks")

    assert "fused_attention" in str(jax.make_jaxpr(faster)(params, tokens))
    np.testing.assert_allclose(loss(params, tokens), faster(params, tokens), rtol=RTOL)


# ---- in a plan ----

BATCH = 8
LENGTH = 16
STEPS = 2


@pytest.fixture
def short_attention(monkeypatch):
    """Let attention count as long from a few tokens on, and split small arrays."""
    monkeypatch.setattr(forms, "LEAST_LENGTH", {"cpu": 4, "tpu": 4, "gpu": 4})
    monkeypatch.setattr(attention, "BLOCK_ROWS", 5)
    monkeypatch.setattr(named, "SMALL", 0)


class Packed(models.TransformerLM):
    """A language model of packed documents, each of which begins with token 0."""

    def __call__(self, tokens):
        return super().__call__(tokens, segments=jnp.cumsum(tokens == 0, axis=1))


def language(model=models.TransformerLM, **more):
    arguments = {"vocab": 32, "dim": 32, "layers": 1, "heads": 8, "kv_heads": 4}
    recipe = lepton.Recipe(
        model=partial(model, **arguments),
        loss=losses.cross_entropy,
        optimizer=optax.sgd(0.5),
        batch_size=BATCH,
        steps_per_call=1,
        **more,
    )
    return lepton.trace(recipe, *(x[0] for x in batches()))


def batches():
    shape = (STEPS, BATCH, LENGTH + 1)
    x = np.random.default_rng(0).integers(0, 32, shape, dtype=np.int32)
    return x[..., :-1], x[..., 1:]


def trained(trace, plan):
    """Return the losses of the steps under a plan."""
    devices = jax.devices()[: math.prod(plan.mesh.values())]
    program = Program(trace, plan, devices)
    state = program.init(0)
    values = []
    for step in range(STEPS):
        batch = jax.tree.map(lambda x, step=step: x[step], batches())
        batch = jax.device_put(batch, program.block_sharding)
        state, records = program.train(state, batch, 0, 1)
        values.append(float(records[0, 0]))
    return values


@functools.cache
def plain_losses(model=models.TransformerLM):
    """Return the losses on one device, with the model's own attention."""
    trace = language(model)
    assignment = build.by_hand(trace, (1,), {}, 0)
    return trained(trace, build.fixed(trace, lepton.topology("cpu:1"), assignment))


def by_axis(trace, sizes, masks):
    """Return a plan for eight devices whose named axes are split as the masks say."""
    trace = trace.on(lepton.topology("cpu:8"))
    assignment = build.by_hand(trace, sizes, masks, 0)
    return build.fixed(trace, lepton.topology("cpu:8"), assignment)


@pytest.mark.parametrize(
    ("sizes", "split"),
    [
        ((8,), {"batch": 1}),
        ((2, 4), {"batch": 1, "heads": 2}),
        ((2, 4), {"batch": 1, "length": 2}),
        ((2, 2, 2), {"batch": 1, "heads": 2, "length": 4}),
        ((8,), {"heads": 1}),
    ],
    ids=["samples", "heads", "length", "all", "more than key heads"],
)
def test_blocks_on_eight_devices_train_as_plain_attention(
    short_attention, sizes, split
):
    trace = language()
    names = named.Names(trace.gradient("none"), trace.arguments)
    known_names = [group.name for group in names.groups]
    masks = {}
    for what, mask in split.items():
        masks[axis_of(what, known_names)] = mask
    plan = by_axis(trace, sizes, masks)

    assert plan.attention == "blocks"
    np.testing.assert_allclose(trained(trace, plan), plain_losses(), rtol=RTOL)


def test_packed_documents_on_eight_devices_train_as_on_one(short_attention):
    trace = language(Packed)
    plan = lepton.plan(trace, lepton.topology("cpu:8"), mesh={"data": 2, "tensor": 4})

    assert plan.attention == "blocks"
    np.testing.assert_allclose(trained(trace, plan), plain_losses(Packed), rtol=RTOL)


def axis_of(what, names):
    ends = {"batch": "batch", "length": "inputs.1", "heads": "attention/key.1"}
    return next(name for name in names if name.endswith(ends[what]))


def test_attention_to_all_keys_stays_plain_on_a_cpu(short_attention):
    def loss(x):
        return plain(x, x, x, causal=False).sum()

    x = jnp.ones((2, 16, 2, 4))
    program = jax.make_jaxpr(loss)(x)

    assert forms.forms_for(program, lambda: program, "cpu", 1, 1).attention == ""
    assert forms.forms_for(program, lambda: program, "gpu", 1, 1).attention == ""


def test_rematerialization_keeps_the_result_of_attention(short_attention):
    trace = language().on(lepton.topology("cpu:1"))

    def count(remat):
        names = [op.name for op in trace.gradient(remat).operations()]
        return names.count("fused_attention")

    assert (count("none"), count("dots")) == (1, 1)


def test_long_attention_on_tpus_is_planned_with_its_kernel():
    arguments = models.transformer_size("8b") | {"loop": "scan", "layers": 2}
    token = jax.ShapeDtypeStruct((1, 8192), jnp.int32)
    recipe = lepton.Recipe(
        model=partial(models.TransformerLM, **arguments),
        loss=losses.cross_entropy,
        optimizer=optax.adamw(1e-4),
        batch_size=64,
        precision="bfloat16",
    )
    trace = lepton.trace(recipe, token, token)
    where = lepton.topology("v5p:2x2x2")
    asked = {"mesh": {"fsdp": 8}, "remat": "dots", "micro_batches": 8}
    plan = lepton.plan(trace, where, **asked)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forms, "LEAST_LENGTH", {})
        without = lepton.plan(trace, where, **asked)

    assert (plan.attention, without.attention) == ("splash", "")
    assert plan.peak < 0.7 * without.peak
    assert plan.step_seconds < 0.7 * without.step_seconds
    assert "attention splash" in str(plan)
