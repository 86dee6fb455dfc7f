"""Augmentation: what each change does, and that the compiled step makes it exactly."""

from __future__ import annotations

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lepton_jax as lepton
from lepton_jax import augment
from lepton_jax.augment.draws import row_keys
from lepton_jax.augment.geometry import warped
from lepton_jax.augment.mixing import stride_of, swapped
from lepton_jax.errors import DivergedError, LeptonError, RecipeError

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(3)
IMAGES = np.random.default_rng(0).random((8, 6, 5, 3)).astype(np.float32)
KEYS = row_keys(KEY, len(IMAGES))

CHANGES = [
    augment.Flip(),
    augment.Flip(vertical=True),
    augment.Crop(2),
    augment.Crop(2, edge="reflect"),
    augment.ResizedCrop(),
    augment.Affine(20, 0.2, (0.8, 1.2), 10, edge="reflect"),
    augment.Affine(20, 0.2, (0.8, 1.2), 10, edge="nearest"),
    augment.Affine(20, 0.2, (0.8, 1.2), 10, edge="zero"),
    augment.ColourJitter(0.4, 0.4, 0.4, 0.1),
    augment.Erase(share=0.8),
    augment.Cutout(3),
    augment.RandAugment(),
]


@pytest.mark.parametrize("change", CHANGES, ids=repr)
def test_an_image_stays_one_and_is_changed_by_its_own_key_alone(change):
    function = jax.jit(change)
    changed = np.asarray(function(KEYS, IMAGES))
    assert changed.shape == IMAGES.shape
    assert changed.dtype == np.float32
    assert changed.min() >= -1e-6 and changed.max() <= 1 + 1e-6
    assert not np.allclose(changed, IMAGES)

    back = np.asarray(function(KEYS[::-1], IMAGES[::-1]))
    np.testing.assert_allclose(back[::-1], changed, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        augment.Affine(),
        augment.ResizedCrop(scale=(1, 1), ratio=(1, 1)),
        augment.ColourJitter(),
        augment.Crop(0),
        augment.Erase(share=0),
        augment.RandAugment(share=0),
        augment.Flip(share=0),
    ],
    ids=repr,
)
def test_a_change_of_strength_zero_changes_nothing(change):
    changed = jax.jit(change)(KEYS, IMAGES)
    np.testing.assert_allclose(changed, IMAGES, atol=1e-5)


def test_a_quarter_turn_and_a_whole_shift_are_exact():
    square = IMAGES[:, :5]
    zero = jnp.zeros(8)
    one = jnp.ones(8)
    turned = warped(square, (zero, one, -one, zero), (zero, zero), "zero")
    np.testing.assert_allclose(turned, np.rot90(square, 1, (1, 2)), atol=1e-5)

    moved = np.asarray(warped(square, (one, zero, zero, one), (one, -one), "zero"))
    np.testing.assert_allclose(moved[:, :-1, 1:], square[:, 1:, :-1], atol=1e-5)
    assert not moved[:, -1].any() and not moved[:, :, 0].any()


def test_a_whole_crop_is_scaled_as_jax_scales():
    change = augment.ResizedCrop((3, 9), scale=(1, 1), ratio=(1, 1))
    expected = jax.image.resize(IMAGES, (8, 3, 9, 3), "linear")
    scaled = jax.jit(change)(KEYS, IMAGES)
    np.testing.assert_allclose(scaled, expected, atol=1e-5)


def test_half_of_the_images_are_flipped_and_as_many_erased():
    keys = row_keys(KEY, 2000)
    ramp = jnp.broadcast_to(jnp.linspace(0.1, 1, 4)[:, None], (2000, 4, 4, 1))
    flipped = augment.Flip()(keys, ramp)[:, 0, 0, 0] > 0.5
    assert abs(flipped.mean() - 0.5) < 0.05
    change = augment.Erase(share=0.5, area=(0.3, 0.3), ratio=(1, 1))
    erased = (change(keys, ramp) == 0).any((1, 2, 3))
    assert abs(erased.mean() - 0.5) < 0.05


# ---- mixing ----


@given(st.integers(1, 2000), st.sampled_from([1, 2, 4, 8]))
@settings(max_examples=15, deadline=None)
def test_partners_are_each_others_and_lie_in_one_micro_batch(pairs, parts):
    rows = 2 * pairs
    stride = stride_of(rows)
    places = np.arange(rows)
    partners = np.asarray(swapped(places, stride))
    np.testing.assert_array_equal(partners[partners], places)
    assert (partners != places).all()
    if stride % parts == 0 and rows % parts == 0:
        for part in range(parts):
            own = places[part::parts]
            local = stride_of(len(own), parts)
            np.testing.assert_array_equal(swapped(own, local), partners[part::parts])


def test_targets_are_mixed_as_their_samples_are_also_twice():
    labels = np.arange(8) % 3
    rows = np.eye(3, dtype=np.float32)[labels]
    keys = row_keys(KEY, 8)
    inputs, targets = augment.Mixup(0.4)(keys, rows, labels, 2)
    inputs, targets = augment.Mixup(1.0)(row_keys(KEY, 16)[8:], inputs, targets, 2)
    one_hot = np.eye(3)
    share = np.asarray(targets.share)[:, None]
    expected = share * one_hot[targets.first] + (1 - share) * one_hot[targets.second]
    np.testing.assert_allclose(inputs, expected, atol=1e-6)
    np.testing.assert_array_equal(augment.first_of(targets), labels)


def test_cutmix_takes_the_share_that_it_says_from_the_partner():
    images = np.broadcast_to(np.arange(8.0)[:, None, None, None], (8, 16, 16, 1))
    images = images.astype(np.float32)
    mixed, targets = augment.Cutmix()(row_keys(KEY, 8), images, np.arange(8), 4)
    partners = np.asarray(targets.second)
    own = (np.asarray(mixed) == images).mean((1, 2, 3))
    np.testing.assert_allclose(own, targets.share, atol=1e-6)
    assert (partners == (np.arange(8) + 4) % 8).all()
    assert 0.05 < own.mean() < 0.95


def test_a_mixed_cross_entropy_is_that_of_soft_targets():
    logits = IMAGES[:, 0, :, 0]
    first = np.arange(8) % 5
    second = (first + 2) % 5
    share = jnp.linspace(0, 1, 8)
    targets = augment.Mixed(first, second, share)
    mixed = augment.loss_of(lepton.losses.cross_entropy, targets)(logits, targets)
    one_hot = np.eye(5)
    soft = share[:, None] * one_hot[first] + (1 - share)[:, None] * one_hot[second]
    expected = optax.softmax_cross_entropy(logits, soft)
    np.testing.assert_allclose(mixed, expected, rtol=1e-5)


def test_weights_of_a_loss_are_mixed_too():
    def weighted(outputs, targets):
        return outputs, targets.astype(jnp.float32)

    targets = augment.Mixed(
        jnp.array([1, 0, 0]), jnp.array([0, 1, 0]), jnp.full(3, 0.75)
    )
    values, weights = augment.loss_of(weighted, targets)(jnp.arange(3.0), targets)
    np.testing.assert_allclose(weights, [0.75, 0.25, 0])
    np.testing.assert_allclose(values, [0, 1, 0])


# ---- in the step ----

STEPS = (
    augment.Crop(1),
    augment.Affine(degrees=20, edge="nearest"),
    augment.Mixup(0.4),
)
PIXELS = np.random.default_rng(1).integers(0, 256, (96, 6, 6, 1)).astype(np.uint8)
LABELS = np.arange(96) % 3


def recipe_of(steps=STEPS, **more):
    preprocess = augment.Augmented(steps, partial(lepton.data.divided, by=255))
    usual = {
        "preprocess": preprocess,
        "loss": lepton.losses.cross_entropy,
        "train": (PIXELS, LABELS),
    }
    return lepton.Recipe(
        model=partial(lepton.models.MLP, (36, 8, 3)),
        metrics={"accuracy": lepton.metrics.accuracy},
        optimizer=optax.sgd(0.1),
        batch_size=32,
        steps=6,
        **(usual | more),
    )


def losses_of(recipe, devices=1, **more):
    trainer = lepton.Trainer(recipe, devices=devices, **more)
    return np.asarray(trainer.fit()["loss"])


def test_no_change_at_all_is_the_plain_preprocess_to_the_bit():
    plain = recipe_of(preprocess=partial(lepton.data.divided, by=255))
    np.testing.assert_array_equal(losses_of(recipe_of(())), losses_of(plain))


def test_micro_batches_and_devices_draw_the_same_for_each_sample():
    whole = losses_of(recipe_of())
    assert not np.allclose(whole, losses_of(recipe_of(())), rtol=1e-3)
    again = losses_of(recipe_of(micro_batches=2))
    np.testing.assert_allclose(again, whole, rtol=1e-5)
    spread = losses_of(recipe_of(), devices=4)
    np.testing.assert_allclose(spread, whole, rtol=1e-5)


def test_a_stopped_run_goes_on_with_the_same_draws(tmp_path):
    whole = losses_of(recipe_of())
    first = lepton.Trainer(recipe_of(), devices=1)
    first.fit(steps=3)
    first.save(tmp_path / "half")
    second = lepton.Trainer(recipe_of(), devices=1)
    second.load(tmp_path / "half")
    rest = np.asarray(second.fit(steps=3)["loss"])
    np.testing.assert_array_equal(rest[-3:], whole[3:])


def test_samples_never_leave_their_device():
    trace = lepton.trace(
        recipe_of(),
        jax.ShapeDtypeStruct((1, 6, 6, 1), jnp.uint8),
        jax.ShapeDtypeStruct((1,), jnp.int32),
    )
    plan = lepton.plan(trace, lepton.topology("cpu:4"))
    program = lepton.Program(trace, plan, jax.devices()[:4])
    text = program.lower().compile().as_text()
    kinds = set(
        re.findall(r"(all-gather|all-to-all|collective-permute|all-reduce)", text)
    )
    assert kinds == {"all-reduce"}


def test_outside_of_training_nothing_is_random_and_a_saved_model_knows_it(tmp_path):
    preprocess = augment.Augmented(
        (augment.ResizedCrop((6, 6)), *STEPS),
        partial(lepton.data.divided, by=255),
        outside=partial(augment.resized, size=(6, 6)),
    )
    large = np.random.default_rng(2).integers(0, 256, (96, 9, 9, 1)).astype(np.uint8)
    recipe = recipe_of(preprocess=preprocess, train=(large, LABELS))
    trainer = lepton.Trainer(recipe, devices=1)
    trainer.fit(steps=1)
    trainer.save(tmp_path / "model")
    opened = lepton.Trainer.open(tmp_path / "model")
    assert repr(opened.recipe.preprocess) == repr(preprocess)
    small = augment.resized(large.astype(np.float32), (6, 6))
    floats = recipe_of(
        preprocess=partial(lepton.data.divided, by=255),
        train=(PIXELS.astype(np.float32), LABELS),
    )
    plain = lepton.Trainer(floats, devices=1)
    plain.load(tmp_path / "model")
    classes = opened.predict(large)
    np.testing.assert_array_equal(classes, plain.predict(np.asarray(small)))


def test_a_loss_that_is_not_a_number_is_traced_to_its_operation():
    def loss(outputs, targets):
        return jnp.log(lepton.losses.cross_entropy(outputs, targets) - 100)

    with pytest.raises(DivergedError, match="'log'"):
        lepton.Trainer(recipe_of(loss=loss), devices=1).fit()


# ---- mistakes ----


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: augment.Flip(share=2), "share"),
        (lambda: augment.Crop(-1), "padding"),
        (lambda: augment.Crop(edge="mirror"), "edge"),
        (lambda: augment.ResizedCrop(scale=(0, 1)), "scale"),
        (lambda: augment.ResizedCrop(scale=(0.5, 2)), "scale"),
        (lambda: augment.Affine(zoom=(2, 1)), "zoom"),
        (lambda: augment.ColourJitter(hue=3), "hue"),
        (lambda: augment.Mixup(alpha=0), "alpha"),
        (lambda: augment.RandAugment(count=0), "count"),
        (lambda: augment.Augmented((augment.Flip,)), "parentheses"),
        (lambda: augment.Crop(9, edge="reflect")(KEYS, IMAGES), "padding"),
        (lambda: augment.Flip()(KEYS, IMAGES[..., 0]), "channels"),
        (lambda: augment.Flip()(KEYS, IMAGES.astype(np.uint8)), "divide"),
        (lambda: augment.ColourJitter(hue=0.1)(KEYS, IMAGES[..., :1]), "hue"),
        (lambda: stride_of(7), "pairs"),
    ],
)
def test_a_setting_that_can_not_be_is_named(make, word):
    with pytest.raises(RecipeError, match=word):
        make()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"batch_size": 31}, "pairs"),
        ({"loss": lambda outputs, targets: outputs.sum()}, "one value per sample"),
        ({"preprocess": augment.Augmented(STEPS)}, "divide"),
        ({"preprocess": augment.Augmented(STEPS, only="image")}, "only"),
    ],
)
def test_what_can_not_be_augmented_is_an_error_before_the_first_step(change, word):
    recipe = recipe_of().with_(**change)
    with pytest.raises(LeptonError, match=word):
        lepton.Trainer(recipe, devices=1).fit()
