"""Distillation: the loss, and a student that learns from an artifact."""

import jax
import numpy as np
import pytest

import lepton_jax as lepton
from lepton_jax.ship import Artifact, shrink
from tests.ship import shrinking

pytest.importorskip("safetensors", reason="needs the extra ship")
pytest.importorskip("flatbuffers", reason="needs the extra ship")
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def trained(quick_compilation):
    return shrinking.trained()


def test_the_loss_is_the_papers():
    draw = np.random.default_rng(0)
    student, teacher = draw.normal(size=(2, 5, 4)).astype(np.float32)
    labels = draw.integers(0, 4, 5)

    def softmax(x):
        e = np.exp(x - x.max(axis=1, keepdims=True))
        return e / e.sum(axis=1, keepdims=True)

    t = 3.0
    p, q = softmax(teacher / t), softmax(student / t)
    apart = (p * np.log(p / q)).sum(axis=1)
    own = -np.log(softmax(student)[np.arange(5), labels])
    loss = shrink.distillation_loss(
        student,
        {"target": labels, "teacher": teacher},
        loss=lepton.losses.cross_entropy,
        temperature=t,
        weight=0.7,
    )
    np.testing.assert_allclose(loss, 0.3 * own + 0.7 * t**2 * apart, rtol=1e-4)


def test_a_student_that_answers_as_the_teacher_has_no_loss_but_its_own():
    outputs = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    targets = {"target": np.zeros(5, int), "teacher": outputs}
    common = {"loss": lepton.losses.cross_entropy, "weight": 1.0}
    loss = shrink.distillation_loss(outputs, targets, **common)
    np.testing.assert_allclose(loss, 0, atol=1e-5)
    slope = jax.grad(lambda x: shrink.distillation_loss(x, targets, **common).sum())
    np.testing.assert_allclose(slope(outputs), 0, atol=1e-5)


def test_a_student_learns_from_an_artifact_and_predicts_as_any_model(trained, tmp_path):
    Artifact.of(trained, rows=0).save(tmp_path / "teacher.lepton")
    teacher = Artifact.open(tmp_path / "teacher.lepton")
    train = trained.recipe.train
    pair = (train.inputs, train.targets)
    plain = trained.recipe.with_(train=pair)
    recipe = shrink.distilled(plain, teacher, weight=1.0)
    asked = recipe.train.targets["teacher"]
    expected = trained.predict(trained.recipe.train.inputs, decode=lambda x: x)
    np.testing.assert_allclose(asked, expected, atol=1e-5)
    student = lepton.Trainer(recipe, devices=1)
    before = student.evaluate()
    student.fit(steps=40)
    after = student.evaluate()
    assert after.loss < before.loss / 2
    labels = student.predict(recipe.test.inputs)
    assert labels.dtype.kind == "i"
    right = (labels == recipe.test.targets["target"]).mean()
    assert after.accuracy == pytest.approx(right)


def test_quantities_are_learned_by_their_distance():
    outputs = np.asarray([[1.0], [3.0]], np.float32)
    targets = {"target": outputs, "teacher": outputs + 2}
    loss = shrink.distillation_loss(
        outputs,
        targets,
        loss=lepton.losses.squared_error,
        weight=0.5,
        classes=False,
    )
    np.testing.assert_allclose(loss, [1.0, 1.0])


def test_mistakes_are_errors_with_a_remedy(trained):
    recipe = trained.recipe
    with pytest.raises(lepton.SettingError):
        shrink.distilled(recipe, trained, temperature=0)
    with pytest.raises(lepton.DataError, match="arrays in memory"):
        shrink.distilled(recipe.with_(train=None), trained)
    with pytest.raises(lepton.ModelError, match="one row a sample"):
        shrink.distilled(recipe, lambda inputs: inputs[:1])
