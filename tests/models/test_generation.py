"""Models that make pictures: who gets which gradient, and what comes out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import lepton_jax as lepton
from lepton_jax.models.diffusion import Diffusion, direction_loss
from lepton_jax.models.gan import GAN, adversarial_loss, enlarged, folded
from lepton_jax.models.vae import VAE, evidence_loss

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIZE = (8, 8, 1)
IMAGES = np.random.default_rng(0).uniform(-1, 1, (6, *SIZE)).astype(np.float32)


def gradient(module, loss):
    graph, params, rest = nnx.split(module, nnx.Param, ...)

    def total(params):
        outputs = nnx.merge(graph, params, rest, copy=True)(IMAGES)
        return loss(outputs).sum()

    return nnx.to_pure_dict(jax.jit(jax.grad(total))(params))


def is_zero(tree):
    return all(not np.any(x) for x in jax.tree.leaves(tree))


def test_each_player_of_a_gan_gets_the_gradient_of_its_own_loss():
    gan = GAN(SIZE, latent=4, width=8, rngs=nnx.Rngs(0))
    both = gradient(gan, lambda outputs: adversarial_loss(outputs, None))
    judging = gradient(
        gan,
        lambda outputs: nnx.softplus(-outputs["real"]) + nnx.softplus(outputs["fake"]),
    )
    making = gradient(gan, lambda outputs: nnx.softplus(-outputs["fooled"]))
    assert is_zero(judging["generator"])
    assert is_zero(making["discriminator"])
    assert not is_zero(making["generator"])
    for name, own in (("discriminator", judging), ("generator", making)):
        for ours, alone in zip(
            jax.tree.leaves(both[name]), jax.tree.leaves(own[name]), strict=True
        ):
            np.testing.assert_allclose(ours, alone, rtol=1e-4, atol=1e-6)


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

    class Known:
        def __call__(self, x, time):
            # at time t, x is (1 - t) image + t noise, so this is noise - image
            return (x - image) / time[:, None, None, None]

    model.net = nnx.data(Known())
    found = model.samples(jax.random.key(0), 3)
    np.testing.assert_allclose(found, np.repeat((image + 1) / 2, 3, 0), atol=1e-5)


def test_a_diffusion_asks_the_way_from_the_image_to_the_noise():
    model = Diffusion(SIZE, width=8, rngs=nnx.Rngs(0))
    outputs = model(jnp.asarray(IMAGES))
    noise = outputs["direction"] + IMAGES
    assert abs(float(noise.mean())) < 0.2
    assert float(noise.std()) == pytest.approx(1, abs=0.1)
    # the last layer begins at zero
    np.testing.assert_array_equal(outputs["predicted"], 0)
    expected = (np.asarray(outputs["direction"]) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(direction_loss(outputs, None), expected, rtol=1e-5)


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
