"""Models that make pictures: who gets which gradient, and what comes out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import lepton_jax as lepton
from lepton_jax.models.diffusion import DEVIATION, Diffusion, direction_loss
from lepton_jax.models.gan import (
    GAN,
    adversarial_loss,
    drawn_classes,
    enlarged,
    folded,
)
from lepton_jax.models.vae import VAE, evidence_loss

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIZE = (8, 8, 1)
IMAGES = np.random.default_rng(0).uniform(-1, 1, (6, *SIZE)).astype(np.float32)
CLASSES = np.array([0, 1, 2, 0, 1, 2], np.int32)
SHARES = (0.25, 0.0, 0.75)


def gradient(module, loss):
    graph, params, rest = nnx.split(module, nnx.Param, ...)

    def total(params):
        outputs = nnx.merge(graph, params, rest, copy=True)(IMAGES, CLASSES)
        return loss(outputs).sum()

    return nnx.to_pure_dict(jax.jit(jax.grad(total))(params))


def called(module, method, *inputs):
    """Call a method in one compiled program."""
    graph, state = nnx.split(module)

    @jax.jit
    def call(state, *inputs):
        return getattr(nnx.merge(graph, state), method)(*inputs)

    return call(state, *inputs)


def is_zero(tree):
    return all(not np.any(x) for x in jax.tree.leaves(tree))


def test_each_player_of_a_gan_gets_the_gradient_of_its_own_loss():
    gan = GAN(SIZE, shares=SHARES, latent=4, width=8, rngs=nnx.Rngs(0))
    both = gradient(gan, lambda outputs: adversarial_loss(outputs, None, penalty=0.5))
    judging = gradient(
        gan,
        lambda outputs: (
            nnx.softplus(outputs["fake"] - outputs["real"])
            + 0.25 * outputs["steepness"]
        ),
    )
    making = gradient(
        gan,
        lambda outputs: nnx.softplus(
            jax.lax.stop_gradient(outputs["real"]) - outputs["fooled"]
        ),
    )
    assert is_zero(judging["generator"])
    assert is_zero(making["discriminator"])
    assert not is_zero(making["generator"])
    for name, own in (("discriminator", judging), ("generator", making)):
        for ours, alone in zip(
            jax.tree.leaves(both[name]), jax.tree.leaves(own[name]), strict=True
        ):
            np.testing.assert_allclose(ours, alone, rtol=1e-4, atol=1e-6)


def test_steepness_is_how_far_the_logits_move_with_the_pixels():
    gan = GAN(SIZE, shares=SHARES, width=8, rngs=nnx.Rngs(0))

    class Made(nnx.Module):
        latent = 4

        def __call__(self, noise, classes):
            return jnp.asarray(IMAGES[::-1])

    gan.generator = Made()

    def logit(image, kind):
        return gan.discriminator(image[None], kind[None])[0]

    outputs = called(gan, "__call__", IMAGES, CLASSES)
    expected = 0
    for images in (IMAGES, IMAGES[::-1]):
        slopes = jax.jit(jax.vmap(jax.grad(logit)))(images, CLASSES)
        expected = expected + (slopes**2).sum((1, 2, 3))
    np.testing.assert_allclose(outputs["steepness"], expected, rtol=1e-4)


def test_classes_are_drawn_by_their_shares():
    drawn = np.asarray(drawn_classes(jax.random.key(0), SHARES, 4000))
    counts = np.bincount(drawn, minlength=3) / 4000
    np.testing.assert_allclose(counts, SHARES, atol=0.03)


@pytest.mark.parametrize("kind", [GAN, Diffusion])
def test_what_is_made_depends_on_the_class(kind):
    one = kind(SIZE, shares=(1, 0), width=8, rngs=nnx.Rngs(0))
    if kind is Diffusion:
        # layers that begin at zero
        one.net.down[0].second.kernel[...] += 0.1
        one.net.output.kernel[...] += 0.1
    other = kind(SIZE, shares=(0, 1), width=8, rngs=nnx.Rngs(0))
    nnx.update(other, nnx.state(one))
    first, second = (
        jax.jit(model.samples, static_argnums=1)(jax.random.key(0), 2)
        for model in (one, other)
    )
    assert np.any(np.asarray(first) != np.asarray(second))


def test_folding_pixels_into_channels_is_undone_by_enlarging():
    x = jnp.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    assert folded(x).shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(enlarged(folded(x)), x)
    # the four pixels of a square stay together
    np.testing.assert_array_equal(folded(x)[0, 0, 0, :3], x[0, 0, 0])
    np.testing.assert_array_equal(folded(x)[0, 0, 0, 3:6], x[0, 0, 1])


def test_the_divergence_of_a_code_is_that_of_two_normal_distributions():
    mean = np.array([[0.5, -1.0]], np.float32)
    log_variance = np.array([[0.2, -0.7]], np.float32)
    outputs = {
        "image": IMAGES[:1],
        "decoded": IMAGES[:1],
        "mean": mean,
        "log_variance": log_variance,
    }
    # by samples: E[log q - log p] under q
    generator = np.random.default_rng(0)
    codes = mean + np.exp(log_variance / 2) * generator.normal(size=(400_000, 2))
    q = -((codes - mean) ** 2) / np.exp(log_variance) - log_variance
    p = -(codes**2)
    sampled = (q - p).sum(1).mean() / 2
    assert float(evidence_loss(outputs, None)[0]) == pytest.approx(sampled, rel=0.01)


def test_a_diffusion_that_knows_the_way_finds_the_image():
    model = Diffusion(SIZE, width=8, steps=7, rngs=nnx.Rngs(0))
    image = jnp.asarray(IMAGES[:1])

    def known(x, time, classes):
        # at time t, x is (1 - t) image + t noise, so this is noise - image
        return (x - image) / time[:, None, None, None]

    model.direction = known
    found = model.samples(jax.random.key(0), 3)
    np.testing.assert_allclose(found, np.repeat((image + 1) / 2, 3, 0), atol=1e-5)


def test_guidance_goes_away_from_the_way_without_a_class():
    model = Diffusion(SIZE, shares=SHARES, width=8, steps=1, rngs=nnx.Rngs(0))

    def known(x, time, classes):
        return jnp.where(classes == len(SHARES), 0.1, 0.3)[:, None, None, None] + x

    model.direction = known
    found = []
    for guidance in (0, 1, 3):
        model.guidance = guidance
        found.append(np.asarray(model.samples(jax.random.key(0), 2)))
    # from noise x straight to x - way, in half of the levels
    np.testing.assert_allclose(found[0], (1 - 0.1) / 2, rtol=1e-5)
    np.testing.assert_allclose(found[1], (1 - 0.3) / 2, rtol=1e-5)
    np.testing.assert_allclose(found[2], (1 - 0.7) / 2, rtol=1e-5)


def test_a_diffusion_asks_the_way_from_the_image_to_the_noise():
    model = Diffusion(SIZE, width=8, rngs=nnx.Rngs(0))
    outputs = called(model, "__call__", IMAGES)
    noise = outputs["direction"] + IMAGES
    assert abs(float(noise.mean())) < 0.2
    assert float(noise.std()) == pytest.approx(1, abs=0.1)
    apart = np.asarray(outputs["predicted"] - outputs["direction"])
    expected = (apart**2).mean((1, 2, 3))
    np.testing.assert_allclose(direction_loss(outputs, None), expected, rtol=1e-5)


def test_a_diffusion_begins_with_the_best_guess_for_independent_pixels():
    model = Diffusion(SIZE, width=8, rngs=nnx.Rngs(0))
    generator = np.random.default_rng(0)
    shape = (4000, *SIZE)
    images = DEVIATION * generator.normal(size=shape).astype(np.float32)
    noise = generator.normal(size=shape).astype(np.float32)
    for time in (0.1, 0.5, 0.9):
        mixed = (1 - time) * images + time * noise
        some = jnp.full(2, time)
        guess = called(model, "direction", mixed[:2], some, jnp.zeros(2, jnp.int32))
        # by least squares
        slope = (mixed * (noise - images)).mean() / (mixed**2).mean()
        np.testing.assert_allclose(guess, slope * mixed[:2], rtol=0.05, atol=0.02)


@pytest.mark.parametrize("kind", [GAN, VAE, Diffusion])
def test_images_that_cannot_be_halved_twice_are_refused(kind):
    with pytest.raises(ValueError, match="divide by 4"):
        kind((10, 8, 1), width=8, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("kind", "loss"),
    [(GAN, adversarial_loss), (VAE, evidence_loss), (Diffusion, direction_loss)],
)
def test_a_trained_model_comes_back_as_a_flax_module_that_makes_pictures(kind, loss):
    trainer = lepton.Trainer(
        model=lambda rngs: kind(SIZE, width=8, rngs=rngs),
        loss=loss,
        optimizer=optax.adam,
        learning_rate=1e-3,
        train=(IMAGES, np.zeros(6, np.int32)),
        batch_size=3,
        devices=1,
    )
    before = trainer.module().samples(jax.random.key(1), 2)
    trainer.fit(steps=2)
    after = trainer.module().samples(jax.random.key(1), 2)
    assert after.shape == (2, *SIZE)
    assert 0 <= float(after.min()) <= float(after.max()) <= 1
    assert np.any(np.asarray(before) != np.asarray(after))


def test_a_module_computes_what_predict_does_with_the_averages():
    x = np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32)
    for net in (lambda rngs: nnx.Linear(4, 2, rngs=rngs), linen.Dense(2)):
        trainer = lepton.Trainer(
            model=net,
            loss=lepton.losses.squared_error,
            optimizer=optax.sgd,
            learning_rate=0.1,
            controller=lepton.controllers.averaging(0.5),
            train=(x, x[:, :2]),
            batch_size=8,
            devices=1,
        )
        trainer.fit(steps=4)
        module = trainer.module()
        np.testing.assert_allclose(module(x), trainer.predict(x), rtol=1e-6)
