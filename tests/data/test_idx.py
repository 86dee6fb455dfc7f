from __future__ import annotations

import gzip

import numpy as np
import pytest

from lepton_jax.data.idx import idx, read_idx
from lepton_jax.errors import DataError

CODES = {
    "u1": 8,
    "i1": 9,
    "i2": 0x0B,
    "i4": 0x0C,
    "f4": 0x0D,
    "f8": 0x0E,
}


def encoded(array: np.ndarray) -> bytes:
    header = bytes(
        [
            0,
            0,
            CODES[array.dtype.str[1:]],
            array.ndim,
        ]
    )
    sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + sizes + array.astype(array.dtype.newbyteorder(">")).tobytes()


def dataset(
    folder,
    *,
    train=5,
    test=3,
    dot="-",
    pack=False,
):
    for part, count in (("train", train), ("t10k", test)):
        images = np.arange(count * 12, dtype=np.uint8).reshape(count, 4, 3)
        for kind, array in (
            ("images", images),
            ("labels", np.arange(count, dtype=np.uint8)),
        ):
            name = f"{part}-{kind}{dot}idx{array.ndim}-ubyte"
            data = encoded(array)
            (folder / (name + ".gz" * pack)).write_bytes(
                gzip.compress(data) if pack else data
            )


@pytest.mark.parametrize("dtype", list(CODES))
@pytest.mark.parametrize(
    "shape",
    [
        (5,),
        (2, 3),
        (2, 1, 3, 2),
        (0, 4),
        (),
    ],
)
def test_every_dtype_and_rank(tmp_path, dtype, shape):
    array = np.random.default_rng(0).integers(-100, 100, shape).astype(dtype)
    (tmp_path / "x").write_bytes(encoded(array))
    out = read_idx(tmp_path / "x")
    np.testing.assert_array_equal(out, array, strict=True)
    assert out.dtype.isnative
    assert out.flags.writeable


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("dot", ["-", "."])
def test_a_folder_of_four_files(tmp_path, dot, pack):
    dataset(tmp_path, dot=dot, pack=pack)
    train, test = idx(str(tmp_path))
    assert repr(train) == "Arrays(inputs uint8[5, 4, 3, 1], targets int32[5])"
    np.testing.assert_array_equal(
        test.inputs[1, ..., 0], np.arange(12, 24).reshape(4, 3)
    )
    assert list(test.targets) == [0, 1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-1], "cut short: expected 76 bytes.*found 75"),
        (lambda data: data + b"\0", "other bytes: expected 76 bytes.*found 77"),
        (lambda data: b"<htm" + data[4:], "idx header.*3c 68 74 6d"),
        (lambda data: b"\0\0\x07" + data[3:], "idx header"),
        (lambda data: data[:9], "header of 16 bytes, found 9"),
        (lambda data: b"", "none"),
        (lambda data: gzip.compress(data)[:-9], "gzip"),
        (lambda data: gzip.compress(data)[:20] + b"\xff" * 20, "gzip"),
    ],
)
def test_damaged_files(tmp_path, change, message):
    dataset(tmp_path)
    file = tmp_path / "train-images-idx3-ubyte"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(DataError, match=message) as caught:
        idx(tmp_path)
    assert caught.value.where == str(file)


def test_counts_that_differ(tmp_path):
    dataset(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(encoded(np.zeros(4, np.uint8)))
    with pytest.raises(DataError, match="3 images, but 4 labels"):
        idx(tmp_path)


def test_images_in_the_place_of_labels(tmp_path):
    dataset(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(
        (tmp_path / "train-images-idx3-ubyte").read_bytes()
    )
    with pytest.raises(DataError, match="uint8 values of 1 dims, found uint8 of 3"):
        idx(tmp_path)


def test_train_and_test_images_of_different_size(tmp_path):
    dataset(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(
        encoded(np.zeros((3, 4, 4), np.uint8))
    )
    with pytest.raises(DataError, match=r"\(4, 3, 1\), test images \(4, 4, 1\)"):
        idx(tmp_path)


def test_missing_files_and_folders(tmp_path):
    dataset(tmp_path, pack=True)
    (tmp_path / "t10k-images-idx3-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte.*it has t10k-labels"):
        idx(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        idx(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no such file"):
        read_idx(tmp_path / "nothing")
    with pytest.raises(DataError, match="can't be read"):
        read_idx(tmp_path)
