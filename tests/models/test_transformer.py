from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lepton_jax import models
from lepton_jax.models.transformer import rotary

pytestmark = pytest.mark.usefixtures("quick_compilation")


def parameters(model) -> int:
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


LM = {
    "vocab": 13,
    "dim": 16,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
}


@pytest.mark.parametrize(
    "build",
    [
        partial(models.TransformerLM, **LM),
        partial(
            models.TransformerLM,
            **LM,
            tied=True,
            loop="scan",
        ),
        partial(
            models.MoELM,
            **LM,
            experts=4,
            capacity=2.0,
        ),
        partial(
            models.MoELM,
            **LM,
            experts=4,
            chosen=1,
            capacity=0.5,
        ),
    ],
)
def test_a_token_never_sees_the_ones_after_it(build):
    model = build(rngs=nnx.Rngs(0))
    tokens = jax.random.randint(
        jax.random.key(0),
        (1, 8),
        0,
        13,
    )
    out = model(tokens)
    changed = model(tokens.at[0, 5].set((tokens[0, 5] + 1) % 13))
    np.testing.assert_allclose(
        out[:, :5],
        changed[:, :5],
        atol=1e-6,
    )
    assert (jnp.abs(out - changed)[0, 5:].max(axis=-1) > 1e-4).all()


def test_rotary_positions_tell_order_apart_but_only_by_distance():
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

    def turn(x):
        repeated = jnp.broadcast_to(x, (1, 12, 1, 8))
        return rotary(repeated, 10_000.0)[0, :, 0]

    scores = turn(query) @ turn(key).T
    np.testing.assert_allclose(
        scores[1:, 1:],
        scores[:-1, :-1],
        atol=1e-5,
    )
    assert abs(scores[0, 1] - scores[1, 0]) > 1e-3
    np.testing.assert_allclose(turn(key)[0], key[0, 0, 0])


def test_transformer_parameters_and_impossible_heads():
    model = models.TransformerLM(
        50,
        dim=64,
        layers=1,
        heads=8,
        kv_heads=4,
        hidden=172,
        tied=True,
        rngs=nnx.Rngs(0),
    )
    assert (
        parameters(model) == 50 * 64 + 64 * (64 + 32 + 32 + 64) + 3 * 64 * 172 + 3 * 64
    )
    for heads, kv_heads in ((3, 3), (4, 3)):
        with pytest.raises(ValueError, match="heads"):
            models.TransformerLM(
                50,
                dim=64,
                layers=1,
                heads=heads,
                kv_heads=kv_heads,
                rngs=nnx.Rngs(0),
            )


def stacked(looped: dict) -> dict:
    """The parameters of an unrolled model as those of a scanned one."""
    blocks = [looped["blocks"][i] for i in range(len(looped["blocks"]))]
    return looped | {"blocks": jax.tree.map(lambda *layers: jnp.stack(layers), *blocks)}


MODELS = {
    "dense": lambda loop: models.TransformerLM(
        13,
        dim=16,
        layers=3,
        heads=4,
        kv_heads=2,
        loop=loop,
        rngs=nnx.Rngs(0),
    ),
    "experts": lambda loop: models.MoELM(
        13,
        dim=16,
        layers=3,
        heads=4,
        kv_heads=2,
        experts=4,
        loop=loop,
        rngs=nnx.Rngs(0),
    ),
}


@pytest.mark.parametrize(
    "build",
    MODELS.values(),
    ids=MODELS,
)
def test_a_scan_over_the_layers_computes_what_the_unrolled_loop_does(build):
    looped = build("unrolled")
    scanned = build("scan")
    tokens = jax.random.randint(
        jax.random.key(0),
        (2, 8),
        0,
        13,
    )

    def loss(model, params):
        graph, state = nnx.split(model)
        nnx.replace_by_pure_dict(state, params)
        return jnp.square(nnx.merge(graph, state)(tokens)).mean()

    params = nnx.to_pure_dict(nnx.state(looped))
    value, gradient = jax.jit(jax.value_and_grad(lambda p: loss(looped, p)))(params)
    other, others = jax.jit(jax.value_and_grad(lambda p: loss(scanned, p)))(
        stacked(params)
    )
    np.testing.assert_allclose(value, other, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a,
            b,
            rtol=1e-3,
            atol=1e-6,
        ),
        stacked(gradient),
        others,
    )


@pytest.mark.parametrize(
    "build",
    MODELS.values(),
    ids=MODELS,
)
def test_the_scan_carries_the_residual_stream_only_and_layers_start_different(build):
    model = build("scan")
    graph, state = nnx.split(model)
    jaxpr = jax.make_jaxpr(lambda s, tokens: nnx.merge(graph, s)(tokens))(
        state, jnp.zeros((2, 8), int)
    )
    scans = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    layers = jax.tree.leaves(nnx.state(model.blocks))
    assert len(scans) == 1
    assert len(scans[0].invars) == 1 + len(layers)
    assert len(scans[0].outvars) == 1
    assert all(x.shape[0] == 3 for x in layers)
    kernels = model.blocks.attention.query.kernel[...]
    assert all((kernels[i] != kernels[j]).any() for i, j in ((0, 1), (1, 2)))
    assert len(jax.tree.leaves(state)) == len(
        jax.tree.leaves(nnx.state(model, nnx.Param))
    ), "nothing but parameters"


def test_every_parameter_has_a_gradient():
    for build in MODELS.values():
        model = build("scan")
        tokens = jax.random.randint(
            jax.random.key(0),
            (4, 8),
            0,
            13,
        )
        weights = jax.random.normal(jax.random.key(1), (4, 8, 13))
        gradient = nnx.jit(nnx.grad(lambda m, t=tokens, w=weights: (m(t) * w).sum()))(
            model
        )
        for path, leaf in nnx.to_flat_state(gradient):
            assert (leaf[...] != 0).any(), path


@pytest.mark.parametrize(
    ("size", "billions"),
    [
        ("1m", 0.0009944),
        ("10m", 0.01072),
        ("124m", 0.1236),
        ("1b", 1.236),
        ("8b", 8.030),
        ("70b", 70.55),
        ("405b", 405.9),
    ],
)
def test_sizes_have_their_parameters(size, billions):
    arguments = models.transformer_size(size)
    model = nnx.eval_shape(
        lambda: models.TransformerLM(
            **arguments,
            loop="scan",
            rngs=nnx.Rngs(0),
        )
    )
    assert parameters(model) / 1e9 == pytest.approx(billions, rel=1e-3)


def test_an_unknown_size_or_loop_is_refused():
    with pytest.raises(ValueError, match="'7b' is none of 1m"):
        models.transformer_size("7b")
    with pytest.raises(ValueError, match="'scan'"):
        models.TransformerLM(
            5,
            dim=8,
            layers=1,
            heads=2,
            loop="rolled",
            rngs=nnx.Rngs(0),
        )


@pytest.mark.parametrize("loop", ["unrolled", "scan"])
def test_a_cache_gives_the_logits_of_the_whole_row_at_once(loop):
    model = models.TransformerLM(**LM, loop=loop, rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(0), (2, 8), 0, 13)
    whole = model(tokens)

    cache = model.empty_cache(2, 9)
    first, cache = model(tokens[:, :5], cache=cache)
    # the second row is as if its prompt had had three tokens only
    filled = jnp.array([5, 3])
    cache = tuple(layer | {"filled": filled} for layer in cache)
    rows = jnp.arange(2)
    pieces = []
    for step in range(3):
        token = tokens[rows, filled + step][:, None]
        logits, cache = model(token, cache=cache)
        pieces.append(logits[:, 0])

    later = jnp.stack(pieces, axis=1)
    np.testing.assert_allclose(first, whole[:, :5], atol=1e-5)
    np.testing.assert_allclose(later[0], whole[0, 5:8], atol=1e-5)
    np.testing.assert_allclose(later[1], whole[1, 3:6], atol=1e-5)
    assert list(cache[1]["filled"]) == [8, 6]


def test_a_segment_is_as_a_row_of_its_own():
    model = models.TransformerLM(**LM, rngs=nnx.Rngs(0))
    left, right = jax.random.randint(jax.random.key(0), (2, 1, 4), 0, 13)
    packed = model(
        jnp.concatenate([left, right], axis=1),
        segments=jnp.array([[0, 0, 0, 0, 1, 1, 1, 1]]),
        positions=jnp.array([[0, 1, 2, 3, 0, 1, 2, 3]]),
    )
    np.testing.assert_allclose(packed[:, :4], model(left), atol=1e-5)
    np.testing.assert_allclose(packed[:, 4:], model(right), atol=1e-5)


@pytest.mark.parametrize("loop", ("unrolled", "scan"))
def test_normed_queries_and_keys_do_not_grow_with_their_kernels(loop):
    shape = {"dim": 16, "layers": 1, "heads": 2, "query_key_norm": True, "loop": loop}
    net = models.TransformerLM(5, **shape, rngs=nnx.Rngs(0))
    tokens = jnp.arange(4)[None]
    before = net(tokens)

    block = net.blocks if loop == "scan" else net.blocks[0]
    block.attention.query.kernel[...] *= 100

    np.testing.assert_allclose(net(tokens), before, atol=2e-3)
