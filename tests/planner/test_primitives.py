"""Models made of one primitive each, planned and trained on one device and eight."""

import functools
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from jax.experimental import io_callback

import lepton_jax as lepton
from lepton_jax.planner import planning
from lepton_jax.planner.program import named
from lepton_jax.planner.search import build as search
from lepton_jax.train.program import Program

pytestmark = pytest.mark.usefixtures("quick_compilation")

CPU = lepton.topology("cpu:8")
ONE = lepton.topology("cpu:1")
TPU = lepton.topology("v5e:2x2")
BATCH = 16
WIDTH = 16
HIDDEN = 32


def squares(x):
    """Return positive definite matrices (16, 4, 4) from (16, 32).

    Their eigenvalues are far from each other.
    """
    a = x.reshape(BATCH, 8, 4)
    return jnp.einsum("bij,bik->bjk", a, a) / 8 + jnp.diag(jnp.arange(1.0, 5.0))


def summed(y):
    """Return a number for each sample, (16, 1)."""
    return jnp.real(y).reshape(BATCH, -1).mean(1, keepdims=True)


def constant(function):
    """Return an operation that has no gradient, cut off from it."""
    return lambda x, w: function(lax.stop_gradient(x), lax.stop_gradient(w))


def with_own_rule(double):
    function = jax.custom_vjp(double)
    function.defvjp(
        lambda x: (double(x), None),
        lambda _, g: (2 * g,),
    )
    return function


@jax.custom_jvp
def own_sine(x):
    return jnp.sin(x)


own_sine.defjvp(
    lambda primals, tangents: (own_sine(*primals), tangents[0] * jnp.cos(primals[0]))
)


def printed(x):
    jax.debug.callback(lambda mean: None, x.mean())
    return jnp.tanh(x)


def cells(x, w):
    """A linear recurrence by pairs, as in state space models."""

    def join(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    gates = jax.nn.sigmoid(x).reshape(BATCH, 8, 4)
    values = x.reshape(BATCH, 8, 4)
    return lax.associative_scan(join, (gates, values), axis=1)[1].reshape(BATCH, HIDDEN)


def root(x, w):
    def solve(f, start):
        return lax.fori_loop(
            0,
            20,
            lambda _, y: y - f(y) / 4,
            start,
        )

    return lax.custom_root(
        lambda y: y**3 + y - x,
        jnp.zeros_like(x),
        solve,
        lambda g, y: y / g(jnp.ones_like(y)),
    )


def kernel(w, *shape):
    return w.reshape(-1)[: math.prod(shape)].reshape(shape)


NWC = ("NWC", "WIO", "NWC")
conv = functools.partial(
    lax.conv_general_dilated,
    window_strides=(1,),
    padding="SAME",
    dimension_numbers=NWC,
)
KEY = 3

# (16, 32), and the kernel (16, 32), to what adds to (16, 32)
FAMILIES = {
    "effects": {
        "debug_callback": lambda x, w: printed(x),
        "debug_callback in a scan": lambda x, w: lax.scan(
            lambda c, _: (printed(c), None),
            x,
            length=2,
        )[0],
        "debug_callback in a while": lambda x, w: lax.fori_loop(
            0, 2, lambda _, c: printed(c), x
        ),
        "debug_callback in a cond": lambda x, w: lax.cond(
            w[0, 0] > 9,
            printed,
            jnp.sin,
            x,
        ),
        "debug_callback in a checkpoint": lambda x, w: jax.checkpoint(printed)(x),
        "io_callback": constant(
            lambda x, w: io_callback(
                lambda x: np.float32(x.mean()),
                jax.ShapeDtypeStruct((), jnp.float32),
                x,
            )
        ),
        "io_callback without a result": lambda x, w: (
            io_callback(
                lambda x: None,
                None,
                lax.stop_gradient(x),
            ),
            x,
        )[1],
        "pure_callback": constant(
            lambda x, w: jax.pure_callback(
                lambda x: np.asarray(x) * 2,
                jax.ShapeDtypeStruct(x.shape, x.dtype),
                x,
            )
        ),
        "after_all": lambda x, w: (lax.after_all(lax.create_token()), x)[1],
    },
    "nothing in it": {
        "concatenate": lambda x, w: jnp.concatenate([x, x[:, :0]], 1),
        "dot over none": lambda x, w: x[:, :0] @ jnp.zeros((0, HIDDEN)),
        "dot of no rows": lambda x, w: (x[:0] @ w.T).sum(),
        "reduction": lambda x, w: x[:, :0].sum(1, keepdims=True),
        "reshape": lambda x, w: x[:, :0].reshape(BATCH, 0, 3).sum(),
        "lookup": lambda x, w: x[:, jnp.zeros((0,), jnp.int32)].sum(),
        "convolution": (
            lambda x, w: conv(x[:0].reshape(0, 8, 4), kernel(w, 2, 4, 4)).sum()
        ),
        "sort": lambda x, w: jnp.sort(x[:, :0], 1).sum(),
        "loop": lambda x, w: lax.scan(lambda c, row: (c * row, None), x, w[:0])[0],
        "loop without steps": lambda x, w: lax.fori_loop(
            0,
            0,
            lambda _, c: c * 2,
            x,
        ),
    },
    "calls": {
        "custom_jvp": lambda x, w: own_sine(x),
        "custom_vjp": lambda x, w: with_own_rule(lambda x: 2 * x)(x),
        "jit in jit": lambda x, w: jax.jit(lambda x: jax.jit(jnp.sin)(x) * 2)(x),
        "checkpoint with a policy": lambda x, w: jax.checkpoint(
            lambda x: jnp.sin(x @ w.T) @ w,
            policy=jax.checkpoint_policies.dots_saveable,
        )(x),
        "platform_dependent": lambda x, w: lax.platform_dependent(
            x, cpu=jnp.sin, default=jnp.sin
        ),
        "custom_root": root,
        "custom_linear_solve": lambda x, w: lax.custom_linear_solve(
            lambda v: 2 * v,
            x,
            lambda _, b: b / 2,
            symmetric=True,
        ),
        "conjugate gradients": lambda x, w: jax.scipy.sparse.linalg.cg(
            lambda v: 3 * v + v @ w.T @ w,
            x,
            maxiter=3,
        )[0],
        "sequential_vmap": lambda x, w: jax.vmap(
            jax.custom_batching.sequential_vmap(lambda row: row * 2)
        )(lax.stop_gradient(x)),
        "gradient in it": lambda x, w: jax.grad(
            lambda x: (jnp.sin(x @ w.T) ** 2).sum()
        )(x),
        "optimization_barrier": lambda x, w: sum(lax.optimization_barrier((x, x * 2))),
    },
    "loops": {
        "associative_scan": cells,
        "scan, unrolled": lambda x, w: lax.scan(
            lambda c, row: (jnp.tanh(c * row), None),
            x,
            w,
            unroll=4,
        )[0],
        "scan, reversed": lambda x, w: lax.scan(
            lambda c, row: (jnp.tanh(c * row), c.sum()),
            x,
            w,
            reverse=True,
        )[0],
        "scan without stacks": lambda x, w: lax.scan(
            lambda c, _: (jnp.sin(c), None),
            x,
            length=3,
        )[0],
        "while": constant(
            lambda x, w: lax.while_loop(
                lambda c: jnp.abs(c).max() > 0.1,
                lambda c: c / 2,
                x,
            )
        ),
        "while that never runs": constant(
            lambda x, w: lax.while_loop(
                lambda c: c[0] < 0,
                lambda c: (1, c[1] * 2),
                (0, x),
            )[1]
        ),
        "switch": lambda x, w: lax.switch(
            jnp.int32(w[0, 0] > 9),
            [jnp.sin, jnp.cos],
            x,
        ),
        "cond of each sample": lambda x, w: jax.vmap(
            lambda row: lax.cond(
                row[0] > 0,
                jnp.sin,
                jnp.cos,
                row,
            )
        )(x),
        "map over features": lambda x, w: lax.map(jnp.sin, x.T).T,
    },
    "linear algebra": {
        "cholesky": lambda x, w: summed(jnp.linalg.cholesky(squares(x))),
        "eigh": lambda x, w: summed(jnp.linalg.eigh(squares(x))[0]),
        "svd": lambda x, w: summed(jnp.linalg.svd(squares(x))[1]),
        "qr": lambda x, w: summed(jnp.linalg.qr(squares(x))[1]),
        "inverse": lambda x, w: summed(jnp.linalg.inv(squares(x))),
        "determinant": lambda x, w: summed(jnp.linalg.slogdet(squares(x))[1]),
        "triangular_solve": lambda x, w: summed(
            lax.linalg.triangular_solve(
                jnp.linalg.cholesky(squares(x)),
                x.reshape(BATCH, 4, 8),
                left_side=True,
                lower=True,
            )
        ),
        "tridiagonal_solve": constant(
            lambda x, w: summed(
                lax.linalg.tridiagonal_solve(
                    x[:, :8] / 9,
                    3 + x[:, :8],
                    x[:, :8] / 9,
                    x[:, :8, None],
                )
            )
        ),
    },
    "transforms": {
        "fft": lambda x, w: jnp.fft.ifft(jnp.fft.fft(x) * (1 + x[:, :1])).real,
        "fft of two dims": lambda x, w: summed(
            jnp.abs(jnp.fft.rfft2(x.reshape(BATCH, 4, 8)))
        ),
        "fft over the samples": lambda x, w: jnp.abs(jnp.fft.fft(x, axis=0)) / BATCH,
        "cumsum": lambda x, w: jnp.cumsum(x, 1) / HIDDEN,
        "cumsum over the samples": lambda x, w: jnp.cumsum(x, 0) / BATCH,
        "cumprod": lambda x, w: jnp.cumprod(x, 1),
        "cummax": lambda x, w: lax.cummax(x, 1),
        "cumlogsumexp": lambda x, w: lax.cumlogsumexp(x, 1),
    },
    "order": {
        "top_k": lambda x, w: summed(lax.top_k(x, 4)[0]),
        "top_k over the samples": lambda x, w: lax.top_k(x.T, 4)[0].mean(1),
        "approx_top_k": lambda x, w: summed(lax.approx_max_k(x, 4)[0]),
        "sort of two": lambda x, w: lax.sort((x, jnp.sin(3 * x)), num_keys=1)[1],
        "sort of samples": lambda x, w: lax.sort((x, 2 * x), num_keys=1, dimension=0)[
            1
        ],
        "order of samples": lambda x, w: x[jnp.argsort(x[:, 0])],
        "argmax": lambda x, w: jnp.argmax(x, 1)[:, None] / HIDDEN,
        "counts": lambda x, w: jnp.bincount(jnp.argmax(x, 1), length=HIDDEN) / BATCH,
        "nonzero": lambda x, w: jnp.nonzero(x[:, 0] > 0, size=4)[0].sum() / BATCH,
        "segment_max": lambda x, w: jax.ops.segment_max(x, jnp.arange(BATCH) % 4, 4)[
            jnp.arange(BATCH) % 4
        ],
    },
    "convolutions": {
        "groups of the batch": (
            lambda x, w: conv(
                x.reshape(BATCH, 8, 4),
                kernel(w, 2, 4, 8),
                batch_group_count=4,
            ).mean()
        ),
        "by channel": (
            lambda x, w: conv(
                x.reshape(BATCH, 8, 4),
                kernel(w, 2, 1, 4),
                feature_group_count=4,
            ).reshape(BATCH, HIDDEN)
        ),
        "transposed": lambda x, w: summed(
            lax.conv_transpose(
                x.reshape(BATCH, 8, 4),
                kernel(w, 2, 4, 4),
                (2,),
                "SAME",
            )
        ),
        "pooling": lambda x, w: summed(
            nnx.max_pool(
                x.reshape(BATCH, 8, 4),
                (2,),
                strides=(2,),
            )
        ),
        "windows": lambda x, w: summed(
            lax.reduce_window(
                x,
                0.0,
                lax.add,
                (1, 4),
                (1, 4),
                "VALID",
            )
        ),
        "ragged_dot": lambda x, w: summed(
            lax.ragged_dot(
                x,
                kernel(w, 2, 16, 16).repeat(2, 1),
                jnp.int32([6, 10]),
            )
        ),
        "attention": (
            lambda x, w: jax.nn.dot_product_attention(
                *[x.reshape(BATCH, 4, 2, 4)] * 3
            ).reshape(BATCH, HIDDEN)
        ),
    },
    "numbers": {
        "rng_bit_generator": (
            lambda x, w: (
                lax.rng_bit_generator(jnp.zeros(4, jnp.uint32), (BATCH, HIDDEN))[1]
                / 2.0**32
            )
        ),
        "keys of samples": (
            lambda x, w: (
                x
                * jax.vmap(lambda key: jax.random.uniform(key, (HIDDEN,)))(
                    jax.random.split(jax.random.key(KEY), BATCH)
                )
            )
        ),
        "permutation": lambda x, w: jax.random.permutation(jax.random.key(KEY), w)[0],
        "complex": lambda x, w: jnp.abs(lax.complex(x, 2 * x) + 1),
        "bitcast": constant(
            lambda x, w: summed(
                lax.bitcast_convert_type((x > 0).astype(jnp.float32), jnp.uint8) / 256
            )
        ),
        "reduce": constant(
            lambda x, w: (
                lax.reduce(x, 0.0, lambda a, b: a + 1.0 * b, (1,))[:, None] / HIDDEN
            )
        ),
        "float8": constant(
            lambda x, w: (x > 0).astype(jnp.float8_e4m3fn).astype(jnp.float32)
        ),
        "population_count": constant(
            lambda x, w: lax.population_count(jnp.int32(x > 0)) / 2
        ),
        "scatter_apply": constant(lambda x, w: x.at[:, :3].apply(jnp.sin)),
        "scatter-mul": lambda x, w: x.at[jnp.array([1, 2])].multiply(2.0),
        "dynamic_update_slice": lambda x, w: lax.dynamic_update_slice(
            x,
            2 * x[:, :4],
            (0, jnp.int32(w[0, 0] > 9)),
        ),
    },
}
ALONE = {
    f"{family}, {name}": f
    for family in ("effects", "nothing in it")
    for name, f in FAMILIES[family].items()
}


class Sum(nnx.Module):
    """Two layers, and between them the sum of operations."""

    def __init__(self, operations, rngs):
        self.first = nnx.Linear(
            WIDTH,
            HIDDEN,
            rngs=rngs,
        )
        self.last = nnx.Linear(HIDDEN, 8, rngs=rngs)
        self.operations = operations

    def __call__(self, x):
        x = jnp.tanh(self.first(x))
        each = [f(x, self.first.kernel[...]) for f in self.operations]
        return self.last(x + sum(each) / len(each))


def traced(
    operations,
    loss=lepton.losses.cross_entropy,
    **fields,
):
    recipe = lepton.Recipe(
        model=lambda rngs: Sum(operations, rngs),
        loss=loss,
        optimizer=optax.sgd(0.5),
        batch_size=BATCH,
        steps_per_call=1,
        **fields,
    )
    row = jax.ShapeDtypeStruct((1, WIDTH), jnp.float32)
    return lepton.trace(
        recipe,
        row,
        jax.ShapeDtypeStruct((1,), jnp.int32),
    )


def batches():
    rng = np.random.default_rng(0)
    for _ in range(2):
        inputs = rng.normal(size=(BATCH, WIDTH)).astype(np.float32)
        yield inputs, rng.integers(0, 7, BATCH).astype(np.int32)


def trained(trace, plan):
    """Return the losses of two steps, and the parameters after them."""
    devices = jax.devices()[: math.prod(plan.mesh.values())]
    program = Program(trace, plan, devices)
    state = program.init(0)
    losses = []
    for batch in batches():
        batch = jax.device_put(batch, program.block_sharding)
        state, records = program.train(state, batch, 0, 1)
        losses.append(float(records[0, 0]))
    jax.effects_barrier()
    return losses, jax.tree.map(np.asarray, state.params)


def trained_alone(trace):
    """Train on one device."""
    assignment = search.by_hand(trace, (1,), {}, 0)
    return trained(trace, search.fixed(trace, ONE, assignment))


def check_plans(operations):
    """Check that plans for CPU and TPU warn of nothing and have finite figures."""
    trace = traced(operations)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for topology, remat in ((CPU, None), (TPU, "full")):
            plan = planning.plan(trace, topology, remat=remat)
            figures = [
                *plan.bytes_per_device.values(),
                *plan.seconds.values(),
                plan.flops,
            ]
            assert np.isfinite(figures).all()
            assert min(figures) >= 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_planned_without_a_warning(family):
    check_plans(tuple(FAMILIES[family].values()))


@pytest.mark.parametrize("name", ALONE)
def test_what_gives_nothing_is_planned_by_itself(name):
    check_plans((ALONE[name],))


@pytest.mark.parametrize("family", FAMILIES)
def test_eight_devices_train_like_one(family, monkeypatch):
    monkeypatch.setattr(named, "SMALL", 0)
    trace = traced(tuple(FAMILIES[family].values()))
    expected_losses, expected_params = trained_alone(trace)
    groups = named.Names(trace.gradient("none"), trace.arguments).groups
    hidden = [g.name for g in groups if g.size == HIDDEN and g.name.startswith("first")]
    assert any(g.name == "batch" for g in groups)
    masks = {"batch": 1} | dict.fromkeys(hidden, 2)
    assignment = search.by_hand(trace, (2, 4), masks, 1)

    losses, params = trained(trace, search.fixed(trace, CPU, assignment))

    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    near = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(near, params, expected_params)


@pytest.mark.parametrize(
    "looped",
    [
        lambda x, w: lax.map(jnp.sin, x),
        lambda x, w: jax.random.gamma(jax.random.key(KEY), jnp.exp(x)),
        lambda x, w: lax.scan(lambda c, row: (jnp.tanh(c + row), c), x[0], x)[1],
    ],
    ids=["map", "gamma", "scan"],
)
def test_a_loop_over_the_samples_leaves_the_rest_of_the_model_split(looped):
    trace = traced((looped,))
    plan = planning.plan(trace, CPU, mesh={"data": 8})
    assert plan.batch_axes == ("data",)

    losses, _ = trained(trace, plan)

    expected, _ = trained_alone(trace)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_a_loop_over_the_samples_under_a_controller_whose_knobs_enter_the_step():
    trace = traced(
        (lambda x, w: lax.map(jnp.sin, x),),
        controller=lepton.controllers.label_noise(),
    )
    assert planning.plan(trace, CPU, mesh={"data": 8}).batch_axes == ("data",)
