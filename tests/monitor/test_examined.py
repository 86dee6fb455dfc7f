"""What the report shows of the test rows."""

import json
import math

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import lepton_jax as lepton
from lepton_jax.baselines import Samples
from lepton_jax.errors import DataError, ModelError
from lepton_jax.monitor import examined, png
from lepton_jax.train.examination import (
    calibration,
    confusion,
    facts_of,
    thumbnail,
    write_samples,
)
from lepton_jax.train.judged import Judged

NAMES = ["<cat>", "dog", "eel"]


def judged(inputs, targets, outputs, task="classes", total=None, read_raw=None):
    total = len(targets) if total is None else total
    samples = Samples(inputs, targets, total, task, 3, read_raw)
    return Judged(samples, outputs)


def logs(*shares):
    return np.log(np.array(shares, np.float32))


THREE = logs([0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.6, 0.3, 0.1], [0.1, 0.1, 0.8])
TARGETS = np.array([0, 1, 1, 0])


# ---- the facts ----


def test_the_confusion_counts_what_is_taken_for_what():
    found = confusion(np.array([0, 1, 1, 0, 1]), np.array([0, 1, 0, 2, 0]), NAMES)
    assert found["matrix"] == [[1, 0, 1], [2, 1, 0], [0, 0, 0]]
    assert found["pairs"] == [
        ["dog", "<cat>", 2, pytest.approx(2 / 3)],
        ["<cat>", "eel", 1, 0.5],
    ]


def test_of_many_classes_the_worst_pairs_are_left():
    classes = 5000
    targets = np.arange(classes)
    found = confusion(targets, (targets + 1) % classes, [str(i) for i in targets])
    assert found["matrix"] is None and len(found["pairs"]) == 20


def test_the_calibration_error_is_the_weighted_distance_of_the_bins():
    shares = np.array([[0.9, 0.1]] * 10 + [[0.3, 0.7]] * 10)
    targets = np.array([0] * 6 + [1] * 4 + [1] * 7 + [0] * 3)
    found = calibration(shares, targets)
    # 0.9 is right in 6 of 10, 0.7 in 7 of 10
    assert found["error"] == pytest.approx(0.15)
    assert [row[2] for row in found["bins"]] == [10, 10]
    certain = calibration(np.array([[1.0, 0.0]]), np.array([0]))
    assert certain["error"] == 0 and len(certain["bins"]) == 1


def test_the_worst_rows_come_first_with_their_pictures():
    pictures = np.zeros((4, 8, 8, 1), np.uint8)
    pictures[3] = 200
    facts = facts_of(judged(pictures, TARGETS, THREE), NAMES)
    assert [one["row"] for one in facts["worst"]] == [3, 2, 0, 1]
    worst = facts["worst"][0]
    assert (worst["target"], worst["predicted"]) == ("<cat>", "eel")
    assert worst["bad"] == pytest.approx(-math.log(0.1), rel=1e-5)
    assert worst["picture"].startswith("data:image/png;base64,")


def test_padded_and_unknown_targets_count_nowhere():
    targets = np.array([0, -1, 1, 0])
    facts = facts_of(judged(np.zeros((4, 2)), targets, THREE), NAMES)
    assert sum(map(sum, facts["confusion"]["matrix"])) == 3
    assert 1 not in [one["row"] for one in facts["worst"]]


def test_the_worst_rows_are_the_raw_ones_where_they_are_known():
    pl = pytest.importorskip("polars")
    raw = pl.DataFrame({"text": ["a", "b" * 900, "c", "d"], "x": [1, None, 3, 4]})
    seen = []

    def read(rows):
        seen.append(list(rows))
        return raw[rows]

    tokens = np.zeros((4, 7), np.int32)
    facts = facts_of(judged(tokens, TARGETS, THREE, read_raw=read), NAMES)
    assert seen == [[3, 2, 0, 1]]  # only these are read
    assert facts["worst"][0]["cells"] == {"text": "d", "x": "4"}
    assert len(facts["worst"][3]["cells"]["text"]) == 401

    def gone(rows):
        raise DataError("the file is gone", where="here", remedy="none")

    facts = facts_of(judged(tokens, TARGETS, THREE, read_raw=gone), NAMES)
    assert facts["worst"][0]["cells"] == {"input": "0, 0, 0, 0, 0, 0, 0"}


def test_a_cell_of_a_raw_row_that_holds_a_pictures_levels_is_shown_as_one():
    pl = pytest.importorskip("polars")
    levels = [[[row, 250], [9, 9]] for row in range(4)]
    raw = pl.DataFrame(
        {"image": levels, "odd": [[[1], [2, 3]]] * 4, "word": list("abcd")}
    )
    facts = facts_of(
        judged(np.zeros((4, 8), int), TARGETS, THREE, read_raw=lambda rows: raw[rows]),
        NAMES,
    )
    first = facts["worst"][0]
    pixels = np.array(levels[first["row"]], np.uint8)
    assert first["picture"] == png.address(png.encode(pixels))
    assert set(first["cells"]) == {"odd", "word"}, "rows of two lengths are no picture"


def test_quantities_have_residuals_and_values_that_are_no_numbers_are_the_worst():
    targets = np.linspace(0, 1, 2000)[:, None]
    outputs = targets + 0.5
    outputs[7] = np.nan
    targets[9] = np.nan  # of which nothing is known
    one = judged(np.zeros((2000, 3)), targets, outputs, "quantities", total=9000)
    facts = facts_of(one, ())
    assert facts["bias"] == pytest.approx(0.5)
    assert len(facts["points"]) == 500 and facts["values"] == 1998
    worst = [row["row"] for row in facts["worst"]]
    assert worst[0] == 7 and 9 not in worst and len(facts["worst"]) == 12
    assert (facts["rows"], facts["total"]) == (2000, 9000)
    json.dumps(facts, allow_nan=False)


def test_yes_or_no_is_shown_as_two_classes_and_other_tasks_not_at_all():
    outputs = np.array([[3.0], [-3.0]])
    facts = facts_of(judged(np.zeros(2), np.array([[1], [1]]), outputs, "binary"), ())
    assert facts["confusion"]["matrix"] == [[0, 0], [1, 1]]
    assert facts["classes"] == ["0", "1"]
    assert facts_of(judged(np.zeros(2), np.zeros((2, 5)), None, "other"), ()) == {}


# ---- pictures ----


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3)])
def test_a_picture_is_read_back_as_it_was(shape, tmp_path):
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    path = tmp_path / "a.png"
    path.write_bytes(png.encode(pixels))
    with image.open(path) as opened:
        assert (np.asarray(opened).reshape(shape) == pixels).all()


def test_a_grid_holds_each_picture_and_floats_are_scaled():
    pictures = np.linspace(0, 1, 5)[:, None, None] * np.ones((5, 2, 3))
    page = png.grid(png.as_pixels(pictures, (0, 1)))
    assert page.shape == (2 * 4 - 2, 3 * 5 - 2)
    assert page[0, 0] == 0 and page[4, 5] == 255 and page[0, 3] == 255
    assert png.as_pixels(np.array([np.nan, 2.0]), (0, 1)).tolist() == [0, 255]


def test_bytes_that_are_no_picture_have_no_thumbnail():
    pytest.importorskip("PIL")
    assert thumbnail(b"no picture") is None
    noise = np.random.default_rng(0).integers(0, 256, (300, 300), np.uint8)
    assert thumbnail(png.encode(noise)).startswith("data:image/jpeg;base64,")
    assert thumbnail(png.encode(noise)[:3000]) is None


# ---- the page ----


class Painter(nnx.Module):
    """A model that generates."""

    def __init__(self, rngs: nnx.Rngs):
        self.layer = nnx.Linear(4, 3, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.layer(self.drop(x))

    def samples(self, key, count):
        noise = jax.random.normal(key, (count, 4))
        return nnx.sigmoid(self(noise))[:, :, None] * np.ones(5)


@pytest.mark.usefixtures("quick_compilation")
def test_a_run_that_is_examined_shows_it_all_in_its_report(tmp_path):
    labels = np.arange(60) % 3
    rows = np.eye(3, 4, dtype=np.float32)[labels]
    recipe = lepton.Recipe(
        model=Painter,
        loss=lepton.losses.cross_entropy,
        metrics={"accuracy": lepton.metrics.accuracy},
        optimizer=optax.sgd(0.5),
        train=(rows, labels),
        test=(rows, labels),
        steps=3,
        batch_size=20,
    )
    trainer = lepton.Trainer(recipe, run_dir=tmp_path)
    trainer.fit()
    done = trainer.examine()
    assert len(done.judged.outputs) == 60
    page = (tmp_path / "report.html").read_text()
    for title in ("Against cheap methods", "Generated samples", "mistaken", "worst"):
        assert title in page
    assert "the most frequent class" in page and "64 samples, not chosen" in page
    header = (tmp_path / "samples.png").read_bytes()[16:24]
    assert header == bytes([0, 0, 0, 54, 0, 0, 0, 38])  # 8 columns of 5, 8 rows of 3


def test_names_of_classes_can_do_no_harm_to_the_page():
    facts = facts_of(judged(np.zeros((4, 2)), TARGETS, THREE), NAMES)
    page = "".join(examined.sections(facts, [], None).values())
    assert "<cat>" not in page and "&lt;cat&gt;" in page


def test_what_a_model_generates_must_be_pictures(tmp_path):

    with pytest.raises(ModelError, match=r"gives float64\[4, 9\]"):
        write_samples(tmp_path, np.zeros((4, 9)))


def test_a_page_of_a_large_test_set_says_of_how_many_rows_it_is_and_stays_small():
    classes = 30
    generator = np.random.default_rng(0)
    outputs = generator.normal(size=(20_000, classes)).astype(np.float32)
    targets = generator.integers(0, classes, 20_000)
    pictures = generator.integers(0, 256, (20_000, 8, 8), np.uint8)
    one = judged(pictures, targets, outputs, total=1_000_000)
    facts = facts_of(one, ())
    page = "".join(examined.sections(facts, [], None).values())
    assert "Of 20,000 of 1,000,000 test rows" in page
    assert len(page) < 2**18
