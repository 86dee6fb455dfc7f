"""A learning rate that is carried from a narrow model to a wide one."""

from __future__ import annotations

import doctest
from functools import partial

import jax
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


def model(width, **more):
    shape = {"vocab": 11, "layers": 1, "heads": width // 8, "hidden": 2 * width}
    return partial(lepton.models.TransformerLM, dim=width, **(shape | more))


def recipe(width, optimizer=optax.adam, **more):
    return lepton.Recipe(
        model=model(width, **more),
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
    base = model(16, loop="scan")
    before = params_of(base)
    after = params_of(by_width(recipe(64, loop="scan"), base).model)

    for path, x in after.items():
        factor = 1.0
        if path == "head/kernel":
            factor = 1 / 4
        elif path.endswith("kernel"):
            factor = 1 / 2
        own = float(np.std(before[path]))
        np.testing.assert_allclose(np.std(x), own * factor, rtol=1e-3, atol=1e-6)
    assert float(after["norm/scale"].mean()) == 1


def test_updates_are_those_that_the_widths_ask_for():
    own = by_width(recipe(64), model(16))
    paths = list(jax.eval_shape(partial(params_of, own.model)))
    sizes = first_updates(own.optimizer, paths)

    for path, size in sizes.items():
        slower = path.endswith("kernel")
        assert size == pytest.approx(0.125 if slower else 0.5, rel=1e-3)


def test_muon_scales_by_itself_and_parts_are_scaled_apart():
    growth = widths.Growth(4.0, 4.0)
    parts = optimizers.by_part(
        {"blocks/*": optax.contrib.muon, "embed/*": "frozen"}, default=optax.adamw
    )

    assert growth.rate(optax.contrib.muon) == 1
    alike = partial(optax.contrib.muon, consistent_rms=0.2)
    assert growth.rate(alike) == pytest.approx(0.5)
    own = by_width(recipe(64, parts), model(16)).optimizer
    assert [part.label for part in own.parts] == [part.label for part in parts.parts]
    assert own.parts[1].is_frozen


def test_a_wide_model_trains_under_policies():
    x = np.random.default_rng(0).integers(0, 11, (16, 9), dtype=np.int32)
    own = by_width(recipe(16), model(8)).with_(
        train=(x[:, :-1], x[:, 1:]),
        learning_rate=0.01,
        batch_size=8,
        controller=lepton.controllers.adaptive(),
    )

    history = lepton.Trainer(own, devices=1).fit(steps=3)

    assert np.isfinite(history["loss"]).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"base": model(64)}, "as wide"),
        ({"base": model(16, layers=2)}, "only one of the models"),
        ({"tied": True, "base": model(16, tied=True)}, "tied=False"),
        ({"optimizer": optax.sgd}, "'sgd'"),
    ],
)
def test_what_can_not_be_carried_over_is_an_error(change, words):
    change = dict(change)
    base = change.pop("base", model(16))

    with pytest.raises(RecipeError, match=words):
        by_width(recipe(64, **change), base)
