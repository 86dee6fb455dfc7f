"""A learning rate that is carried from a narrow model to a wide one."""

from __future__ import annotations

import doctest
from functools import partial

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lepton_jax as lepton
from lepton_jax.adapt import by_width, widths
from lepton_jax.errors import RecipeError
from lepton_jax.step import optimizers
from lepton_jax.trees import by_path


def model(width, layers=1, last=2):
    return partial(lepton.models.MLP, (4, *[width] * (layers + 1), last))


def language(width, **more):
    shape = {"vocab": 11, "layers": 1, "heads": width // 8, "hidden": 2 * width}
    return partial(lepton.models.TransformerLM, dim=width, **(shape | more))


def recipe(wide, optimizer=optax.adam):
    return lepton.Recipe(
        model=wide,
        loss=lepton.losses.cross_entropy,
        optimizer=optimizer,
        learning_rate=0.5,
    )


def params_of(factory):
    state = nnx.state(factory(rngs=nnx.Rngs(0)), nnx.Param)
    return {"/".join(map(str, path)): x[...] for path, x in nnx.to_flat_state(state)}


def first_updates(optimizer, paths):
    """Return the size of the first update of each parameter."""
    params = dict.fromkeys(paths, jnp.ones((4, 4)))
    made = optimizer(0.5)
    updates, _ = made.update(params, made.init(params), params)
    return {path: float(jnp.abs(x).max()) for path, x in by_path(updates).items()}


def test_the_examples_of_widths_hold():
    assert doctest.testmod(widths).failed == 0


def test_hidden_and_output_kernels_begin_narrower():
    before = params_of(model(16))
    after = params_of(by_width(recipe(model(64)), model(16)).model)

    factors = {"layers/1/kernel": 1 / 2, "layers/2/kernel": 1 / 4}
    for path, x in after.items():
        expected = float(np.std(before[path])) * factors.get(path, 1.0)
        np.testing.assert_allclose(np.std(x), expected, rtol=1e-3, atol=1e-6)


def test_updates_are_those_that_the_widths_ask_for():
    own = by_width(recipe(model(64)), model(16))
    sizes = first_updates(own.optimizer, widths._params_of(own.model))

    for path, size in sizes.items():
        slower = path in ("layers/1/kernel", "layers/2/kernel")
        assert size == pytest.approx(0.125 if slower else 0.5, rel=1e-3)


@pytest.mark.parametrize("loop", ("scan", "unrolled"))
def test_a_language_model_is_told_by_its_shapes(loop):
    shapes = widths._params_of(language(64, loop=loop))
    base = widths._params_of(language(16, loop=loop))
    growth = widths.kinds(
        {path: x.shape for path, x in shapes.items()},
        {path: x.shape for path, x in base.items()},
    )

    for path, each in growth.items():
        hidden = path.startswith("blocks") and path.endswith("kernel")
        assert each.fan_in == (4 if hidden or path == "head/kernel" else 1)
        assert each.fan_out == (1 if path == "head/kernel" else 4)


def test_muon_scales_by_itself_and_parts_are_scaled_apart():
    growth = widths.Growth(4.0, 4.0)
    parts = optimizers.by_part(
        {"layers/1/*": optax.contrib.muon, "layers/0/*": "frozen"}, default=optax.adamw
    )

    assert growth.rate(optax.contrib.muon) == 1
    alike = partial(optax.contrib.muon, consistent_rms=0.2)
    assert growth.rate(alike) == pytest.approx(0.5)
    own = by_width(recipe(model(64), parts), model(16)).optimizer
    assert [part.label for part in own.parts] == [part.label for part in parts.parts]
    assert own.parts[1].is_frozen


def test_a_wide_model_trains_under_policies():
    x = np.random.default_rng(0).standard_normal((16, 4), dtype=np.float32)
    own = by_width(recipe(model(16)), model(8)).with_(
        train=(x, np.arange(16) % 2),
        learning_rate=0.01,
        batch_size=8,
        controller=lepton.controllers.plateau(),
    )

    history = lepton.Trainer(own, devices=1).fit(steps=3)

    assert np.isfinite(history["loss"]).all()


@pytest.mark.parametrize(
    ("wide", "base", "optimizer", "words"),
    [
        (model(16), model(16), optax.adam, "as wide"),
        (model(64), model(16, layers=2), optax.adam, "only one of the models"),
        (language(16, tied=True), language(8, tied=True), optax.adam, "tied=False"),
        (model(64), model(16), optax.sgd, "'sgd'"),
    ],
)
def test_what_can_not_be_carried_over_is_an_error(wide, base, optimizer, words):
    with pytest.raises(RecipeError, match=words):
        by_width(recipe(wide, optimizer), base)
