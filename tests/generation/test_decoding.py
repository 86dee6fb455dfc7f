"""Tokens with a cache, without one, in batches, on a mesh, from a seed."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lepton_jax as lepton
from lepton_jax.errors import DataError, ModelError, SettingError
from lepton_jax.generation import Sampling
from lepton_jax.generation.engine import Engine
from lepton_jax.generation.generating import _engine_of
from lepton_jax.generation.source import source_of
from lepton_jax.models.decoder import DecoderLM, DecoderShape

pytestmark = pytest.mark.usefixtures("quick_compilation")

VOCAB = 29
SHAPE = {"vocab": VOCAB, "dim": 32, "layers": 2, "heads": 4, "kv_heads": 2}
PROMPTS = [[1, 2, 3], [4], list(range(20))]
BF16_ULP = 2.0**-8  # relative


@pytest.fixture(scope="module")
def model():
    return lepton.models.TransformerLM(**SHAPE, rngs=nnx.Rngs(0))


def tokens_of(rows):
    return [row.tokens.tolist() for row in rows]


def by_hand(model, prompt, count):
    """Greedy tokens by one whole call a token, without padding."""
    row = list(prompt)
    whole = nnx.jit(lambda model, tokens: model(tokens))
    for _ in range(count):
        logits = whole(model, jnp.array([row]))[0, -1]
        row.append(int(logits.argmax()))
    return row[len(prompt) :]


def test_greedy_tokens_are_those_of_whole_calls_with_a_cache_and_without(model):
    rows = lepton.generate(model, PROMPTS, tokens=12)
    assert tokens_of(rows) == tokens_of(
        lepton.generate(model, PROMPTS, tokens=12, cached=False)
    )
    # one whole call for each token is slow: a short prompt shows it
    assert rows[1].tokens[:4].tolist() == by_hand(model, PROMPTS[1], 4)
    assert {row.reason for row in rows} == {"length"}


def test_a_scan_over_the_layers_generates_alike():
    model = lepton.models.TransformerLM(**SHAPE, loop="scan", rngs=nnx.Rngs(0))
    cached = lepton.generate(model, PROMPTS, tokens=12)
    whole = lepton.generate(model, PROMPTS, tokens=12, cached=False)
    assert tokens_of(cached) == tokens_of(whole)


def test_rows_of_a_batch_leave_each_other_alone(model):
    draws = {"tokens": 12, "temperature": 1.0, "top_p": 0.9}
    batch = lepton.generate(model, PROMPTS, seed=[7, 8, 9], **draws)
    alone = [
        lepton.generate(model, prompt, seed=[seed], **draws)
        for prompt, seed in zip(PROMPTS, [7, 8, 9], strict=True)
    ]
    assert tokens_of(batch) == tokens_of(alone)


def test_a_seed_makes_the_same_tokens_and_another_seed_others(model):
    draw = partial(lepton.generate, model, [[1, 2]] * 2, tokens=12, temperature=1.0)
    first, again, other = (tokens_of(draw(seed=seed)) for seed in (3, 3, 4))
    assert first == again
    assert first != other
    assert first[0] != first[1]  # equal prompts of a batch differ by row


def test_another_temperature_compiles_nothing_and_changes_the_tokens(model):
    draw = partial(lepton.generate, model, [1, 2], tokens=12, top_k=20)
    draw(temperature=0.7)
    engine = _engine_of(source_of(model)[0], Sampling(1.0, 20), None, True)
    assert engine.whole._cache_size() == 1
    hot = draw(temperature=3.0).tokens.tolist()
    assert hot != draw(temperature=0.01).tokens.tolist()
    assert engine.whole._cache_size() == 1


def test_a_padded_vocabulary_is_never_drawn(model):
    # the head's last rows win wherever they may
    biased = nnx.clone(model)
    kernel = biased.head.kernel
    kernel[...] = kernel[...].at[:, 20:].multiply(50.0)
    greedy = partial(lepton.generate, biased, [1, 2, 3], tokens=12)
    assert (greedy().tokens >= 20).any()
    assert (greedy(vocab=20).tokens < 20).all()
    hot = lepton.generate(
        biased, [[1]] * 8, tokens=12, vocab=20, temperature=9.0, top_p=0.99
    )
    assert all((row.tokens < 20).all() for row in hot)


def test_an_end_token_ends_its_own_row_alone(model):
    rows = lepton.generate(model, PROMPTS, tokens=12)
    end = int(rows[0].tokens[3])
    ended = lepton.generate(model, PROMPTS, tokens=12, end=end)
    for whole, row in zip(rows, ended, strict=True):
        places = np.flatnonzero(whole.tokens == end)
        stop = places[0] + 1 if len(places) else 12
        assert row.tokens.tolist() == whole.tokens[:stop].tolist()
        assert row.reason == ("end" if len(places) else "length")


def test_a_row_has_no_more_tokens_than_learned_positions():
    shape = DecoderShape(VOCAB, 8, 1, 2, 12, rotary=None, positions=20)
    model = DecoderLM(shape, rngs=nnx.Rngs(0))
    # filled up to a power of two, the prompt would be longer than the table
    prompts = [list(range(17)), [1]]
    cached = lepton.generate(model, prompts, tokens=3)
    assert tokens_of(cached) == tokens_of(
        lepton.generate(model, prompts, tokens=3, cached=False)
    )
    with pytest.raises(SettingError, match="positions for 20"):
        lepton.generate(model, prompts, tokens=4)


# ---- by a trainer's plan ----


def trainer_of(precision, mesh=None):
    tokens = np.random.default_rng(0).integers(0, VOCAB, (16, 9)).astype(np.int32)
    recipe = lepton.Recipe(
        model=partial(lepton.models.TransformerLM, **(SHAPE | {"layers": 1})),
        loss=lepton.losses.cross_entropy,
        optimizer=optax.sgd(0.1),
        train=(tokens[:, :-1], tokens[:, 1:]),
        batch_size=8,
        precision=precision,
    )
    trainer = lepton.Trainer(recipe, devices=1 if mesh is None else 4)
    if mesh is None:
        return trainer
    split_out = ("query", "key", "value", "gate", "up")
    pins = {f"*/{name}/kernel": (None, "b") for name in split_out}
    pins |= {f"*/{name}/kernel": ("b",) for name in ("out", "down")}
    plan = trainer.plan(mesh=mesh, pins=pins)
    return lepton.Trainer(recipe, devices=4, plan=plan)


def test_a_cache_is_split_over_batch_and_heads_as_the_plan_says():
    trainer = trainer_of("float32", {"a": 2, "b": 2})
    source, weights = source_of(trainer)
    assert source.rows == 2
    engine = Engine(source, Sampling(), None, cached=True)
    carry = engine.begin(
        weights,
        np.ones((4, 5), np.int32),
        np.full(4, 5, np.int32),
        slots=32,
        room=32,
    )
    for name in ("key", "value"):
        # batch, slots, heads
        assert carry.memory[0][name].sharding.spec[:3] == ("a", None, "b")
    # three rows do not fill two devices; a fourth one is made up
    rows = lepton.generate(trainer, PROMPTS, tokens=12)
    assert tokens_of(rows) == tokens_of(
        lepton.generate(trainer.module(), PROMPTS, tokens=12)
    )


def test_in_bfloat16_each_token_is_the_best_but_for_rounding():
    trainer = trainer_of("bfloat16")
    row = lepton.generate(trainer, PROMPTS[2], tokens=12)
    whole = np.concatenate([PROMPTS[2], row.tokens])
    source, weights = source_of(trainer)
    tokens = jnp.asarray(whole[None, :-1], jnp.int32)
    logits, _ = jax.jit(source.forward)(*weights, tokens, None)
    logits = np.asarray(logits[0, len(PROMPTS[2]) - 1 :])
    best = logits.max(-1)
    chosen = logits[np.arange(12), row.tokens]
    # products of two forms round each layer's results by half an ulp, at most
    assert (best - chosen <= 4 * BF16_ULP * abs(logits).max(-1)).all()
    engine = Engine(source, Sampling(), None, cached=True)
    carry = engine.begin(
        weights, np.ones((1, 5), np.int32), np.ones(1, np.int32), slots=32, room=32
    )
    assert carry.memory[0]["key"].dtype == jnp.bfloat16


# ---- what can't be ----


def test_a_model_without_a_cache_generates_and_refuses_to_have_one():
    class Bigram(nnx.Module):
        def __init__(self, rngs):
            self.table = nnx.Embed(7, 7, rngs=rngs)

        def __call__(self, tokens):
            return self.table(tokens)

    model = Bigram(nnx.Rngs(0))
    row = lepton.generate(model, [3], tokens=5)
    assert row.tokens.tolist() == by_hand(model, [3], 5)
    with pytest.raises(ModelError, match="no cache"):
        lepton.generate(model, [3], tokens=5, cached=True)


@pytest.mark.parametrize(
    ("prompts", "settings", "kind", "what"),
    [
        ([[]], {}, DataError, "no token"),
        ([[1], [VOCAB]], {}, DataError, f"token {VOCAB}"),
        ([[-1]], {}, DataError, "token -1"),
        ([[1.5]], {}, DataError, "prompt is"),
        ("text", {}, SettingError, "no tokenizer"),
        ([1], {"tokens": 0}, SettingError, "tokens is 0"),
        ([1], {"vocab": VOCAB + 1}, SettingError, f"{VOCAB + 1} tokens"),
        ([1], {"stop": "x"}, SettingError, "no tokenizer"),
        ([[1], [2]], {"seed": [1]}, SettingError, "for 2 prompts"),
        ([1], {"end": "x"}, SettingError, "end is"),
    ],
)
def test_a_mistake_is_an_error_that_says_which(model, prompts, settings, kind, what):
    with pytest.raises(kind, match=what):
        lepton.generate(model, prompts, **settings)


def test_logits_that_are_not_numbers_are_an_error(model):
    broken = nnx.clone(model)
    broken.norm.scale[...] = broken.norm.scale[...] * jnp.nan
    with pytest.raises(ModelError, match="row 0 are not numbers"):
        lepton.generate(broken, [1, 2], tokens=4)


def test_something_else_than_a_model_is_an_error():
    with pytest.raises(ModelError, match="dict is given"):
        lepton.generate({}, [1])
    with pytest.raises(ModelError, match="maps tokens"):
        lepton.generate(Flat(nnx.Rngs(0)), [1])


class Flat(nnx.Module):
    """A model that forgets which token is which."""

    def __init__(self, rngs):
        self.table = nnx.Embed(5, 3, rngs=rngs)

    def __call__(self, tokens):
        return self.table(tokens).sum(1)
