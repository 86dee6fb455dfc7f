"""The loop by hand that decoding is measured against, and the campaigns' models."""

import argparse
from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx

import lepton_jax as lepton
from tools.bench import shakespeare
from tools.bench.generate import by_hand

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_the_loop_by_hand_generates_the_same_tokens():
    model = lepton.models.TransformerLM(
        13, dim=16, layers=1, heads=2, tied=True, rngs=nnx.Rngs(0)
    )
    prompts = np.array([[1, 2, 3], [4, 5, 6]], np.int32)
    hand = partial(by_hand, heads=2, theta=10_000.0, count=8, top_k=None)
    weights = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    tokens = hand(weights, prompts, jax.random.split(jax.random.key(0), 2))
    rows = lepton.generate(model, prompts.tolist(), tokens=8)
    assert tokens.tolist() == [row.tokens.tolist() for row in rows]


def test_the_model_of_tiny_shakespeare_has_three_million_parameters(tmp_path):
    text = tmp_path / "input.txt"
    text.write_text("".join(map(chr, range(65, 130))) * 100)
    options = argparse.Namespace(
        text=text, tokens=1e6, length=64, batch=8, dropout=0.1, rate=0.02, adam=0.1
    )
    recipe = shakespeare.recipe_of(options)
    model = nnx.eval_shape(lambda: recipe.model(rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(leaf.size for leaf in leaves) == pytest.approx(3e6, rel=0.02)
    # the validation text is the end, and nothing of it is learned
    assert len(recipe.test[0]) == 650 // 64
    assert recipe.train[0].size + recipe.train[1].size < 4 * 5850
