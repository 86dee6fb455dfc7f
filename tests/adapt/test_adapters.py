"""Adapters: what is trained, what it costs, and what is left when they are merged."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lepton_jax as lepton
from lepton_jax import adapt
from lepton_jax.data import instruction
from lepton_jax.trees import by_path

pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    # which parameters begin anew is said in a warning
    pytest.mark.filterwarnings("ignore:parameters of"),
]

VOCAB = 11
MODEL = partial(lepton.models.TransformerLM, VOCAB, dim=16, layers=1, heads=2)
ROWS = np.random.default_rng(0).integers(0, VOCAB, (16, 9)).astype(np.int32)
TOKENS = ROWS[:, :-1]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A trainer whose model was trained a little, and the folder it is saved in."""
    trainer = lepton.Trainer(
        model=MODEL,
        loss=lepton.losses.cross_entropy,
        optimizer=optax.adam,
        learning_rate=0.01,
        train=(TOKENS, ROWS[:, 1:]),
        batch_size=8,
        steps=3,
        devices=1,
    )
    trainer.fit()
    folder = tmp_path_factory.mktemp("base") / "model"
    return trainer, trainer.save(folder)


@pytest.fixture(scope="module", params=["lora", "dora"])
def tuned(request, base):
    """A trainer whose adapters were trained from the saved model on."""
    trainer, folder = base
    make = getattr(adapt, request.param)
    recipe = trainer.recipe.with_(
        model=make(MODEL, rank=2),
        optimizer=adapt.only(optax.adam),
        learning_rate=0.05,
    )
    tuned = lepton.Trainer(recipe, devices=1).load(folder, fresh=[adapt.PATTERN])
    before = tuned.module()(TOKENS)
    np.testing.assert_allclose(before, trainer.module()(TOKENS), atol=2e-6)
    tuned.fit()
    return tuned


def test_only_adapters_move_and_only_they_have_optimizer_memory(base, tuned):
    trainer, _ = base
    old = by_path(trainer.state.params)
    new = by_path(tuned.state.params)
    adapters = {path for path in new if "lora_" in path}
    assert set(old) == set(new) - adapters
    for path, value in old.items():
        np.testing.assert_array_equal(value, new[path])
    assert all(np.abs(new[path]).max() > 0 for path in adapters)

    arrays = tuned.program.plan.arrays
    state = [array for array in arrays if array.kind == "optimizer" and array.shape]
    assert all("lora_" in array.path for array in state)
    # Adam's two moments
    trained = sum(new[path].size for path in adapters)
    assert sum(array.bytes for array in state) == 2 * 4 * trained


def test_merged_is_the_plain_model_that_computes_the_same(tuned):
    merged = tuned.merged()
    assert merged.recipe.model is MODEL
    plain = by_path(nnx.to_pure_dict(nnx.state(MODEL(rngs=nnx.Rngs(0)), nnx.Param)))
    assert set(by_path(merged.state.params)) == set(plain)
    expected = tuned.module()(TOKENS)
    np.testing.assert_allclose(merged.module()(TOKENS), expected, atol=2e-5)
    assert type(merged.module().blocks[0].attention.query) is nnx.Linear


@pytest.mark.parametrize("tuned", ["lora"], indirect=True)
@pytest.mark.parametrize("form", ["with adapters", "merged"])
def test_what_is_saved_opens_without_the_recipes_code(tuned, form, tmp_path):
    trainer = tuned if form == "with adapters" else tuned.merged()
    opened = lepton.Trainer.open(trainer.save(tmp_path / "tuned"), devices=1)
    for path, value in by_path(opened.state.params).items():
        np.testing.assert_array_equal(value, by_path(trainer.state.params)[path])


@pytest.mark.parametrize("tuned", ["lora"], indirect=True)
def test_an_export_has_plain_weights(tuned):
    pytest.importorskip("safetensors", reason="pip install 'lepton-jax[ship]'")
    artifact = lepton.Artifact.of(tuned, rows=4)
    merged = by_path(tuned.merged().state.params)
    assert set(artifact.weights) == {f"params/{path}" for path in merged}
    for path, value in merged.items():
        np.testing.assert_array_equal(artifact.weights[f"params/{path}"], value)


def test_a_trainer_without_adapters_is_its_own_merger(base):
    assert base[0].merged() is base[0]


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("loop", ["unrolled", "scan"])
def test_merged_kernels_are_those_of_the_formula(kind, loop):
    model = partial(MODEL, loop=loop)
    make = getattr(adapt, kind)
    module = make(model, rank=3, alpha=5.0)(rngs=nnx.Rngs(0))
    keys = iter(jax.random.split(jax.random.key(1), 99))
    for _, node in nnx.iter_graph(module):
        if isinstance(node, adapt.LoRALinear):
            node.lora_b[...] = 0.3 * jax.random.normal(next(keys), node.lora_b.shape)
            if kind == "dora":
                node.lora_gain[...] = 1 + 0.1 * jnp.arange(node.lora_gain.shape[-1])
    blocks = module.blocks if loop == "scan" else module.blocks[0]
    up = blocks.feed_forward.up
    kernel, a, b = (
        np.asarray(x[...], np.float64) for x in (up.kernel, up.lora_a, up.lora_b)
    )
    expected = kernel + 5.0 / 3 * a @ b
    if kind == "dora":
        lengths = np.linalg.norm(kernel, axis=-2, keepdims=True)
        expected *= lengths / np.linalg.norm(expected, axis=-2, keepdims=True)
        expected *= np.asarray(up.lora_gain[...])[..., None, :]

    plain = adapt.merge(module)
    blocks = plain.blocks if loop == "scan" else plain.blocks[0]
    np.testing.assert_allclose(blocks.feed_forward.up.kernel[...], expected, rtol=2e-5)
    whole = nnx.jit(lambda module, tokens: module(tokens))
    np.testing.assert_allclose(whole(plain, TOKENS), whole(module, TOKENS), atol=5e-5)
    assert type(blocks.feed_forward.up) is nnx.Linear


def test_a_module_is_not_changed_by_its_adapters():
    module = MODEL(rngs=nnx.Rngs(0))
    with_adapters = adapt.lora(module, rank=2, targets=["query", "blocks/*/value"])(
        rngs=nnx.Rngs(1)
    )
    assert not any(isinstance(n, adapt.LoRALinear) for _, n in nnx.iter_graph(module))
    adapted = [
        "/".join(map(str, path))
        for path, node in nnx.iter_graph(with_adapters)
        if isinstance(node, adapt.LoRALinear)
    ]
    assert sorted(adapted) == [
        f"blocks/0/attention/{name}" for name in ("query", "value")
    ]


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"targets": "qurey"}, "did you mean 'query'"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": 16}, "as large as the layer"),
        ({"targets": []}, "no targets"),
    ],
)
def test_a_mistake_is_an_error_that_says_which(settings, what):
    with pytest.raises(lepton.ModelError, match=what):
        adapt.lora(MODEL, **settings)(rngs=nnx.Rngs(0))


def test_masked_prompts_are_read_and_not_learned():
    """What a prompt says decides the answer; no loss is ever taken of the prompt."""
    documents = [instruction([5, 6, n], [n + 1, n + 2]) for n in range(7)]
    train = lepton.data.Source(documents).pack(12, end=10, segments=True, fit="best")
    recipe = lepton.Recipe(
        model=MODEL,
        loss=lepton.losses.padded_cross_entropy,
        optimizer=optax.adam,
        learning_rate=0.01,
        train=train,
        batch_size=8,
        steps=60,
    )
    trainer = lepton.Trainer(recipe, devices=1)
    history = trainer.fit()
    # the prompts' last tokens are chance: were they learned, the loss would say so
    assert history["loss"][-1] < 0.1
    rows = lepton.generate(trainer, [[5, 6, n] for n in range(7)], tokens=5, end=10)
    assert [row.tokens.tolist() for row in rows] == [
        [n + 1, n + 2, 10] for n in range(7)
    ]
