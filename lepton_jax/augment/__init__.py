"""Augmentation: samples changed at random inside the compiled train step.

augmented   the object that a recipe's `preprocess` holds
draws       random numbers of each sample of a batch
geometry    crops, flips, rotations: where a pixel comes from
colour      brightness, contrast, saturation, hue
erasing     rectangles that are blanked
mixing      samples mixed in pairs, with their targets
policy      RandAugment
"""

from lepton_jax.augment.augmented import Augmented, StepKey, step_key
from lepton_jax.augment.colour import ColourJitter
from lepton_jax.augment.erasing import Cutout, Erase
from lepton_jax.augment.geometry import (
    Affine,
    Crop,
    Flip,
    ResizedCrop,
    resized,
)
from lepton_jax.augment.mixing import Cutmix, Mixed, Mixup, first_of, loss_of
from lepton_jax.augment.policy import RandAugment

__all__ = [
    "Affine",
    "Augmented",
    "ColourJitter",
    "Crop",
    "Cutmix",
    "Cutout",
    "Erase",
    "Flip",
    "Mixed",
    "Mixup",
    "RandAugment",
    "ResizedCrop",
    "StepKey",
    "first_of",
    "loss_of",
    "resized",
    "step_key",
]
