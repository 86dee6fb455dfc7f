"""Recipes that make pictures, on a user's folder: its classes and their shares."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from recipes import diffusion, gan, vae
from tests.data.pictures import saved


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Make a folder with 30 dark cats and 10 bright dogs."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, count, shade in (("cat", 30, 0), ("dog", 10, 150)):
        (folder / name).mkdir()
        for number in range(count):
            picture = Image.new("RGB", (9, 7), (shade + number,) * 3)
            (folder / name / f"{number}.png").write_bytes(saved(picture, "PNG"))
    return folder


@pytest.mark.parametrize("module", [gan, diffusion])
def test_the_model_learns_each_picture_with_its_class(module, folder):
    recipe = module.recipe(data=folder, size=8)
    for part, count in ((recipe.train, 36), (recipe.test, 4)):
        assert part.inputs["images"].shape == (count, 8, 8, 3)
        is_dog = part.inputs["images"][:, 0, 0, 0] >= 150
        np.testing.assert_array_equal(part.inputs["classes"], is_dog)
        np.testing.assert_array_equal(part.targets, is_dog)
    assert recipe.model.keywords["shares"] == (0.75, 0.25)

    inputs = recipe.preprocess(recipe.train.inputs)
    assert inputs["images"].min() == -1
    assert inputs["classes"] is recipe.train.inputs["classes"]


def test_a_model_without_classes_gets_the_pictures_alone(folder):
    assert vae.recipe(data=folder, size=8).train.inputs.shape == (36, 8, 8, 3)
