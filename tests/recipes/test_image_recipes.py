"""Images of a user: what is read, what is left out and counted, what is refused.

Each case is a folder as people have them.
"""

from __future__ import annotations

import dataclasses
import struct
import tarfile
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

import lepton_jax as lepton
from lepton_jax.errors import DataError
from recipes import _images, cats_dogs, image_classifier, mnist_cnn
from tests.data.pictures import RIGHT, WRONG, saved

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIZE = 8
MP4 = b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + bytes(200)


def grey(value: int) -> bytes:
    """Return a PNG of one shade, which no other value has."""
    return saved(Image.new("RGB", (9, 7), (value, value, value)), "PNG")


def two_classes(folder: Path, count: int = 6) -> Path:
    for number, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        for image in range(count):
            file = folder / name / f"{image}.png"
            file.write_bytes(grey(100 * number + 5 * image))
    return folder


def loaded(data: Path, **more) -> _images.Images:
    return _images.load(_images.Asked(data, SIZE, **more))


def shades(images: _images.Images) -> dict[str, list[int]]:
    """Return the shades of all images of each class."""
    found: dict[str, list[int]] = {}
    for part in (images.train, images.test):
        for pixels, target in zip(part.inputs, part.targets, strict=True):
            found.setdefault(images.classes[target], []).append(int(pixels[0, 0, 0]))
    return {name: sorted(values) for name, values in found.items()}


def dropped_of(images: _images.Images) -> pl.DataFrame:
    """Return the rows that were dropped, with the reasons."""
    notes = images.serving.prepared.quarantine()
    if notes.is_empty():
        return notes
    return notes.filter(notes["lepton.action"] == "dropped")


SHADES = {"cat": [0, 5, 10, 15, 20, 25], "dog": [100, 105, 110, 115, 120, 125]}


# ---- right data ----


def _plain(folder):
    return two_classes(folder)


def _with_readme(folder):
    two_classes(folder)
    (folder / "README.txt").write_text("who made this, and when")
    (folder / "cat" / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    return folder


def _upper_case_endings(folder):
    two_classes(folder)
    for file in folder.rglob("*.png"):
        file.rename(file.with_suffix(".PNG"))
    return folder


def _no_endings(folder):
    two_classes(folder)
    for file in folder.rglob("*.png"):
        file.rename(file.with_suffix(""))
    return folder


def _wrong_endings(folder):
    two_classes(folder)
    for file in folder.rglob("*.png"):
        file.rename(file.with_suffix(".jpg"))
    return folder


def _odd_names(folder):
    two_classes(folder)
    names = ["ä ö.png", "новый.png", "写真.png", "a,b;c.png", 'q"uote.png', "🐈.png"]
    for number, name in enumerate(names):
        (folder / "cat" / f"{number}.png").rename(folder / "cat" / name)
    return folder


def _deeper(folder):
    return two_classes(folder / "pictures" / "all").parents[1]


def _links_to_files(folder):
    two_classes(folder / "real")
    for name in ("cat", "dog"):
        (folder / "linked" / name).mkdir(parents=True)
        for file in (folder / "real" / name).iterdir():
            (folder / "linked" / name / file.name).symlink_to(file)
    return folder / "linked"


def _tar(folder):
    two_classes(folder / "all")
    with tarfile.open(folder / "all.tar.gz", "w:gz") as archive:
        archive.add(folder / "all", ".")
    return folder / "all.tar.gz"


def _zip(folder):
    two_classes(folder / "all")
    with zipfile.ZipFile(folder / "all.zip", "w") as archive:
        for file in (folder / "all").rglob("*.png"):
            archive.write(file, file.relative_to(folder))
    return folder / "all.zip"


def _table(folder, rows=None, name="table.csv"):
    two_classes(folder)
    if rows is None:
        files = sorted(folder.rglob("*.png"))
        rows = [(file.relative_to(folder), file.parent.name) for file in files]
    lines = ["file,label", *(f"{file},{label}" for file, label in rows)]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / name


ALIKE = (
    _plain,
    _with_readme,
    _upper_case_endings,
    _no_endings,
    _wrong_endings,
    _odd_names,
    _deeper,
    _links_to_files,
    _tar,
    _zip,
    _table,
)


@pytest.mark.parametrize("make", ALIKE, ids=lambda make: make.__name__)
def test_the_same_images_are_read_however_they_lie(make, tmp_path):
    assert shades(loaded(make(tmp_path))) == SHADES


def test_unusual_images_are_read_and_broken_ones_dropped_each_with_its_reason(tmp_path):
    folder = two_classes(tmp_path)
    for number, (content, *_) in enumerate(RIGHT.values()):
        (folder / "cat" / f"right-{number:02}.jpg").write_bytes(content)
    for number, (content, *_) in enumerate(WRONG.values()):
        (folder / "dog" / f"wrong-{number:02}.jpg").write_bytes(content)
    images = loaded(folder)
    counts = {name: len(values) for name, values in shades(images).items()}
    assert counts == {"cat": 6 + len(RIGHT), "dog": 6}
    dropped = dropped_of(images)
    assert dropped.height == len(WRONG)
    assert dropped["lepton.reason"].str.len_chars().min() > 3


# ---- left out and counted, or an error, as configured ----


def _video(folder):
    two_classes(folder)
    (folder / "cat" / "clip.mp4").write_bytes(MP4)
    return "clip.mp4"


def _text(folder):
    two_classes(folder)
    (folder / "dog" / "list.txt").write_text("one\ntwo\n")
    return "list.txt"


def _thumbnails(folder):
    two_classes(folder)
    (folder / "dog" / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0" + bytes(100))
    return "Thumbs.db"


def _empty_class(folder):
    two_classes(folder)
    (folder / "bird").mkdir()
    return "bird"


def _link_to_a_folder(folder):
    two_classes(folder / "real")
    outside = two_classes(folder / "outside")
    (folder / "real" / "more").symlink_to(outside / "cat")
    return "more"


def _link_to_nothing(folder):
    two_classes(folder)
    (folder / "cat" / "gone.png").symlink_to(folder / "nowhere.png")
    return "gone.png"


LEFT_OUT = (
    _video,
    _text,
    _thumbnails,
    _empty_class,
    _link_to_a_folder,
    _link_to_nothing,
)


@pytest.mark.parametrize("make", LEFT_OUT, ids=lambda make: make.__name__)
def test_what_gives_no_image_is_named_and_left_out_or_an_error(make, tmp_path, capsys):
    name = make(tmp_path)
    folder = tmp_path / "real" if (tmp_path / "real").is_dir() else tmp_path
    assert shades(loaded(folder)) == SHADES
    assert name in capsys.readouterr().err
    with pytest.raises(DataError, match=name):
        loaded(folder, broken="error")


@pytest.mark.parametrize("name", ["a JPEG cut off in the middle", "no bytes", "text"])
def test_a_broken_image_is_an_error_that_names_it_if_asked(name, tmp_path):
    folder = two_classes(tmp_path)
    (folder / "cat" / "bad.jpg").write_bytes(WRONG[name][0])
    with pytest.raises(DataError, match=r"bad\.jpg"):
        loaded(folder, broken="error")


def test_an_image_that_is_there_twice_is_counted(tmp_path, capsys):
    folder = two_classes(tmp_path)
    (folder / "cat" / "copy.png").write_bytes(grey(0))
    loaded(folder)
    assert "1 duplicate rows" in capsys.readouterr().err


# ---- refused ----


def _one_folder(folder):
    two_classes(folder)
    return folder / "cat"


def _one_class(folder):
    two_classes(folder)
    for file in (folder / "dog").iterdir():
        file.write_bytes(b"no image")
    return folder


def _no_image_at_all(folder):
    two_classes(folder)
    for file in folder.rglob("*.png"):
        file.write_bytes(b"no image")
    return folder


def _not_there(folder):
    return folder / "gone"


def _no_files(folder):
    (folder / "cat").mkdir()
    return folder


def _table_of_a_missing_file(folder):
    return _table(folder, [("cat/0.png", "cat"), ("cat/none.png", "cat")])


def _table_without_files(folder):
    table = _table(folder)
    table.write_text(table.read_text().replace("file,label", "what,label"))
    return table


def _table_without_labels(folder):
    table = _table(folder)
    table.write_text(table.read_text().replace("file,label", "file,kind"))
    return table


def _table_of_one_class(folder):
    rows = [(f"cat/{number}.png", "cat") for number in range(6)]
    return _table(folder, rows)


def _empty_table(folder):
    return _table(folder, [])


def _idx(folder, images=(6, 4, 4), labels=6, cut=0):
    pixels = np.arange(np.prod(images), dtype=np.uint8).tobytes()
    names = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
    header = struct.pack(">IIII", 2051, *images)
    (folder / names[0]).write_bytes((header + pixels)[: -cut or None])
    values = bytes(number % 2 for number in range(labels))
    (folder / names[1]).write_bytes(struct.pack(">II", 2049, labels) + values)
    return folder


def _idx_without_labels(folder):
    _idx(folder)
    (folder / "train-labels-idx1-ubyte").unlink()
    return folder


def _idx_of_one_class(folder):
    _idx(folder)
    labels = struct.pack(">II", 2049, 6) + bytes(6)
    (folder / "train-labels-idx1-ubyte").write_bytes(labels)
    return folder


def _idx_that_is_a_page(folder):
    _idx(folder)
    (folder / "train-images-idx3-ubyte").write_bytes(b"<html>404</html>")
    return folder


REFUSED = {
    _one_folder: "all images are in one folder",
    _one_class: "one value, 'cat'",
    _no_image_at_all: "no row|class|empty",
    _not_there: "gone",
    _no_files: "no files",
    _table_of_a_missing_file: r"none\.png",
    _table_without_files: "no column",
    _table_without_labels: "no column 'label'",
    _table_of_one_class: "one value, 'cat'",
    _empty_table: "row|empty",
    partial(_idx, labels=5): "5|6",
    partial(_idx, cut=7): "96|89|cut|bytes",
    partial(_idx, images=(2**30, 4, 4)): "6 rows, but",
    _idx_without_labels: "hold",
    _idx_of_one_class: "one value, '0'",
    _idx_that_is_a_page: "idx header",
}
NAMES = [
    "_idx_" + "_".join(make.keywords) if isinstance(make, partial) else make.__name__
    for make in REFUSED
]


@pytest.mark.parametrize("number", range(len(REFUSED)), ids=NAMES)
def test_what_can_not_be_learned_from_is_refused_with_a_remedy(number, tmp_path):
    make, words = list(REFUSED.items())[number]
    if isinstance(make, partial) and make.keywords.get("images"):
        _idx(tmp_path)
        header = struct.pack(">IIII", 2051, *make.keywords["images"])
        (tmp_path / "train-images-idx3-ubyte").write_bytes(header + bytes(96))
        data = tmp_path
    else:
        data = make(tmp_path)
    with pytest.raises(DataError, match=words) as caught:
        loaded(data)
    assert caught.value.remedy


def test_a_label_that_is_missing_is_a_counted_drop(tmp_path):
    rows = [(f"{kind}/{n}.png", kind) for kind in ("cat", "dog") for n in range(6)]
    rows[3] = (rows[3][0], "")
    images = loaded(_table(tmp_path, rows))
    assert len(images.train) + len(images.test) == 11
    assert dropped_of(images).height == 1


def test_a_label_that_training_never_saw_is_counted(tmp_path):
    folder = two_classes(tmp_path)
    (folder / "bird").mkdir()
    (folder / "bird" / "0.png").write_bytes(grey(200))
    seen = [loaded(folder, split_seed=seed) for seed in range(3)]
    for images in seen:
        total = len(images.train) + len(images.test)
        dropped = dropped_of(images).height
        assert total + dropped == 13
        assert ("bird" in images.classes) == (total == 13)


def test_labels_may_be_numbers_and_of_another_column(tmp_path):
    table = _table(tmp_path, [(f"cat/{n}.png", n % 3) for n in range(6)] * 2)
    table.write_text(table.read_text().replace("file,label", "picture,kind"))
    images = loaded(table, file_column="picture", label="kind")
    assert images.classes == ("0", "1", "2")


def test_classes_that_are_rare_weigh_as_much_as_others(tmp_path):
    folder = two_classes(tmp_path, count=10)
    for number in range(5):
        (folder / "dog" / f"{number}.png").unlink()
    images = loaded(folder)
    counts = np.bincount(images.train.targets)
    np.testing.assert_allclose(np.array(images.balanced()) * counts, counts.mean())


# ---- the recipes ----


def small(folder, **more):
    settings = {"size": 16, "width": 4, "steps": 3, "batch_size": 8} | more
    return image_classifier.recipe(folder, **settings)


@pytest.mark.parametrize("model", ["cnn", "resnet18", "resnet50", "vit", "convnext"])
def test_each_model_can_be_made_for_the_images(model, tmp_path):
    recipe = small(two_classes(tmp_path), model=model, augment="strong")
    trace = lepton.trace(recipe, recipe.train.inputs[:1], recipe.train.targets[:1])
    assert trace.outputs.shape == (8, 2)
    assert trace.inputs.shape == (8, 24, 24, 3)


def test_a_recipe_trains_on_eight_devices(tmp_path):
    recipe = small(two_classes(tmp_path, 10), augment="strong", batch_size=16)
    trainer = lepton.Trainer(recipe, devices=8)
    history = trainer.fit()
    assert np.isfinite(history["loss"]).all()
    assert 0 <= history.metrics["accuracy"] <= 1
    classes = trainer.predict(recipe.test.inputs)
    assert set(classes.tolist()) <= {0, 1}


def test_cheap_methods_see_small_images(tmp_path):
    recipe = image_classifier.recipe(two_classes(tmp_path, 10), size=40, steps=1)
    parts = []
    for part in (recipe.train, recipe.test):
        inputs = np.asarray(part.inputs)
        targets = np.asarray(part.targets)
        samples = lepton.baselines.Samples(inputs, targets, len(targets), "classes", 2)
        parts.append(samples)
    assert parts[0].inputs.shape[1:] == (40, 40, 3)
    for method in recipe.baseline:
        outputs = method(*parts).outputs
        assert outputs.shape == (4, 2)
        # two shades are told apart by anything
        assert (outputs.argmax(1) == parts[1].targets).all()


def test_cats_and_dogs_is_the_classifier_with_other_settings(tmp_path):
    folder = two_classes(tmp_path, 10)
    recipe = cats_dogs.recipe(folder, size=16, width=4, steps=2, fold=1)
    assert recipe.name == "cats_dogs"
    assert len(recipe.test) == 4
    other = cats_dogs.recipe(folder, size=16, width=4, steps=2, fold=2)
    first = {pixels.tobytes() for pixels in np.asarray(recipe.test.inputs)}
    second = {pixels.tobytes() for pixels in np.asarray(other.test.inputs)}
    assert not first & second


def test_digits_in_idx_files_keep_their_size(tmp_path):
    _idx(tmp_path, images=(40, 28, 28), labels=40)
    recipe = small(tmp_path, mirror=False)
    trace = lepton.trace(recipe, recipe.train.inputs[:1], recipe.train.targets[:1])
    assert trace.inputs.shape == (8, 28, 28)
    assert dataclasses.is_dataclass(recipe.preprocess)
    assert mnist_cnn.recipe(steps=1).preprocess.steps
