from __future__ import annotations

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lepton_jax import models
from lepton_jax.models.tabular import Edges

pytestmark = pytest.mark.usefixtures("quick_compilation")

EDGES = (
    (0.0, 1.0, 3.0, 7.0),
    (10.0, 20.0),
    (5.0,),
)


def parameters(model) -> int:
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


def test_the_zoo_imports_nothing_of_lepton():
    for file in Path(models.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            assert all(
                not name.startswith("lepton_jax")
                or name.startswith("lepton_jax.models")
                for name in names
            )


CASES = [
    (
        lambda rngs: models.MLP(
            (12, 8, 3),
            dropout=0.5,
            rngs=rngs,
        ),
        jnp.ones((4, 3, 4)),
        (4, 3),
        12 * 8 + 8 + 27,
    ),
    (
        lambda rngs: models.CNN(
            10,
            padding="VALID",
            rngs=rngs,
        ),
        jnp.ones((2, 28, 28, 1)),
        (2, 10),
        93_322,
    ),
    (
        lambda rngs: models.CNN(
            3,
            size=(8, 8, 1),
            batch_norm=True,
            dropout=0.5,
            rngs=rngs,
        ),
        jnp.ones((4, 8, 8, 1)),
        (4, 3),
        None,
    ),
    (
        lambda rngs: models.CNN(
            3,
            size=(2, 3, 2),
            widths=(4, 4, 4),
            rngs=rngs,
        ),
        jnp.ones((4, 2, 3, 2)),
        (4, 3),
        None,
    ),
    (
        lambda rngs: models.Logistic(10, rngs=rngs),
        jnp.ones((4, 10)),
        (4,),
        11,
    ),
    (
        lambda rngs: models.TabularMLP(
            2,
            edges=EDGES,
            sizes=(3, 2),
            dropout=0.5,
            rngs=rngs,
        ),
        {"numbers": jnp.ones((4, 3)), "categories": jnp.ones((4, 2), int)},
        (4, 2),
        None,
    ),
    (
        lambda rngs: models.TabularMLP(
            None,
            edges=EDGES,
            hidden=(),
            rngs=rngs,
        ),
        {"numbers": jnp.ones((4, 3))},
        (4,),
        13,
    ),
    (
        lambda rngs: models.TabularMLP(
            5,
            sizes=(3,),
            hidden=(),
            embedding=2,
            rngs=rngs,
        ),
        {"categories": jnp.ones((4, 1), int)},
        (4, 5),
        6 + 15,
    ),
    (
        lambda rngs: models.TransformerLM(
            11,
            dim=16,
            layers=2,
            heads=4,
            kv_heads=2,
            rngs=rngs,
        ),
        jnp.ones((2, 6), int),
        (2, 6, 11),
        None,
    ),
    (
        lambda rngs: models.TransformerLM(
            11,
            dim=16,
            layers=2,
            heads=4,
            kv_heads=2,
            loop="scan",
            rngs=rngs,
        ),
        jnp.ones((2, 6), int),
        (2, 6, 11),
        None,
    ),
    (
        lambda rngs: models.MoELM(
            11,
            dim=16,
            layers=2,
            heads=2,
            experts=4,
            tied=True,
            loop="scan",
            rngs=rngs,
        ),
        jnp.ones((2, 6), int),
        (2, 6, 11),
        None,
    ),
    (
        lambda rngs: models.LSTM(
            11,
            3,
            dim=4,
            hidden=8,
            rngs=rngs,
        ),
        jnp.ones((2, 6), int),
        (2, 3),
        44 + 4 * 32 + 32 + 8 * 32 + 27,
    ),
    (
        lambda rngs: models.TwoTower(
            7,
            5,
            dim=4,
            hidden=(6,),
            width=3,
            dropout=0.5,
            rngs=rngs,
        ),
        {"user": jnp.arange(4), "item": jnp.arange(4)},
        (4,),
        48 + 2 * (4 * 6 + 6 + 6 * 3 + 3),
    ),
]


@pytest.mark.parametrize(("build", "inputs", "shape", "size"), CASES)
def test_shapes_sizes_and_gradients_under_jit(build, inputs, shape, size):
    model = build(nnx.Rngs(0))

    def call(model, inputs):
        return model(**inputs) if isinstance(inputs, dict) else model(inputs)

    def loss(model, inputs):
        return jnp.square(call(model, inputs)).sum()

    @nnx.jit
    def gradients(model, inputs):
        return call(model, inputs), nnx.grad(loss)(model, inputs)

    out, grads = gradients(model, inputs)
    assert out.shape == shape
    assert jnp.isfinite(out).all()
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert size is None or parameters(model) == size
    abstract = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    assert jax.tree.structure(nnx.state(abstract)) == jax.tree.structure(
        nnx.state(model)
    )


def test_dropout_and_batch_norm_follow_the_modes():
    model = models.CNN(
        3,
        size=(8, 8, 1),
        batch_norm=True,
        dropout=0.5,
        rngs=nnx.Rngs(0),
    )
    x = jax.random.normal(jax.random.key(0), (16, 8, 8, 1)) + 3
    model.train()
    assert not jnp.array_equal(model(x), model(x))
    assert model.norms[0].mean[...].any()
    model.eval()
    before = model.norms[0].mean[...]
    assert jnp.array_equal(model(x), model(x))
    assert jnp.array_equal(model.norms[0].mean[...], before)


def test_images_too_small_for_the_convolutions_are_refused():
    with pytest.raises(ValueError, match="too small"):
        models.CNN(
            10,
            size=(8, 8, 1),
            padding="VALID",
            rngs=nnx.Rngs(0),
        )


def first_layer_inputs(model, **inputs):
    """Return the inputs of the first layer, which becomes the identity."""
    width = model.layers[0].in_features
    model.layers[0] = nnx.Linear(
        width,
        width,
        kernel_init=lambda *_: jnp.eye(width),
        rngs=nnx.Rngs(0),
    )
    return np.asarray(model(**inputs))


def test_numbers_are_coded_by_their_bins():
    model = models.TabularMLP(
        2,
        edges=EDGES,
        hidden=(),
        rngs=nnx.Rngs(0),
    )
    assert nnx.state(model, nnx.Param).keys() == {"layers"}
    assert isinstance(model.edges, Edges)
    numbers = jnp.array(
        [
            [2.0, 15.0, 5.0],
            [-2.0, 30.0, 9.0],
            [9.0, jnp.nan, jnp.nan],
            [7.0, 10.0, 5.0],
        ]
    )
    # three bins and the entry for missing
    codes = first_layer_inputs(model, numbers=numbers).reshape(4, 3, 4)
    np.testing.assert_allclose(
        codes[:, 0],
        [
            [1, 0.5, 0, 0],
            [-2, 0, 0, 0],
            [1, 1, 1.5, 0],
            [1, 1, 1, 0],
        ],
    )
    np.testing.assert_allclose(
        codes[:, 1],
        [
            [0.5, 0, 0, 0],
            [2, 0, 0, 0],
            [0, 0, 0, 1],
            [0, 0, 0, 0],
        ],
    )
    np.testing.assert_allclose(
        codes[:, 2],
        [
            [0, 0, 0, 0],
            [0, 0, 0, 0],
            [0, 0, 0, 1],
            [0, 0, 0, 0],
        ],
    )


def test_missing_numbers_leave_finite_gradients():
    model = models.TabularMLP(
        2,
        edges=EDGES,
        rngs=nnx.Rngs(0),
    )
    gradient = jax.grad(lambda x: model(numbers=x).sum())(jnp.full((2, 3), jnp.nan))
    assert jnp.isfinite(gradient).all()


def test_each_category_has_rows_of_its_own_and_unseen_starts_at_zero():
    model = models.TabularMLP(
        2,
        sizes=(3, 2),
        hidden=(),
        embedding=2,
        rngs=nnx.Rngs(0),
    )
    out = first_layer_inputs(
        model,
        categories=jnp.array([[0, 0], [1, 1], [2, 1]]),
    )
    rows = np.asarray(model.embed.embedding[...])
    np.testing.assert_array_equal(
        out, np.stack([rows[[0, 3]], rows[[1, 4]], rows[[2, 4]]]).reshape(3, 4)
    )
    assert not out[0].any()
    assert out[1].all()


def test_a_quantity_is_learned_in_its_own_unit():
    x = jnp.linspace(0, 7, 64)[:, None]
    y = 5000 + 1000 * x[:, 0]
    model = models.TabularMLP(
        None,
        edges=EDGES[:1],
        hidden=(16,),
        center=8500.0,
        spread=2000.0,
        rngs=nnx.Rngs(0),
    )
    optimizer = nnx.Optimizer(
        model,
        optax.adam(1e-2),
        wrt=nnx.Param,
    )

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(
            model,
            nnx.grad(lambda m: optax.squared_error(m(numbers=x), y).mean())(model),
        )

    for _ in range(200):
        step(model, optimizer)
    assert jnp.sqrt(jnp.square(model(numbers=x) - y).mean()) < 200


@pytest.mark.parametrize("edges", [((1.0, 0.0),), ((0.0, float("nan")),)])
def test_edges_must_ascend(edges):
    with pytest.raises(ValueError, match="ascending"):
        models.TabularMLP(
            2,
            edges=edges,
            rngs=nnx.Rngs(0),
        )
