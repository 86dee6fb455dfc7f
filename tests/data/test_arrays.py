from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton_jax.data.arrays import Arrays, aligned_empty, from_any, partition
from lepton_jax.errors import DataError


def test_take_copies_the_chosen_rows_of_every_array_into_aligned_memory():
    inputs = {"a": np.arange(12.0).reshape(6, 2), "b": np.arange(6, dtype=np.uint8)}
    targets = np.arange(6) * 10
    data = Arrays(inputs, targets)
    for indices in ([5, 0, 5], np.array([2], np.uint8), []):
        x, y = data.take(indices)
        rows = np.asarray(indices, int)
        np.testing.assert_array_equal(x["a"], inputs["a"][rows])
        np.testing.assert_array_equal(x["b"], inputs["b"][rows])
        np.testing.assert_array_equal(y, targets[rows])
        for out in (x["a"], x["b"], y):
            assert out.flags.c_contiguous
            assert out.flags.writeable
            assert not out.size or out.ctypes.data % 64 == 0
    x["a"][...] = -1
    assert data.inputs["a"].min() == 0


def test_take_reads_strided_and_bfloat16_arrays():
    wide = np.arange(24, dtype=np.float32).reshape(4, 6)
    data = Arrays(wide[:, ::2], np.ones(4, ml_dtypes.bfloat16))
    x, y = data.take([3, 1])
    np.testing.assert_array_equal(x, wide[[3, 1], ::2])
    assert y.dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize(
    "indices",
    [
        [-1],
        [3],
        [[0, 1]],
        [0.5],
        [True, False, True],
    ],
)
def test_take_refuses_what_is_no_position(indices):
    with pytest.raises(DataError):
        Arrays(np.arange(3)).take(indices)


@given(
    count=st.integers(2, 300),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 9),
)
def test_a_partition_is_exact_or_refused(count, fraction, seed):
    size = round(fraction * count)
    if not 0 < size < count:
        with pytest.raises(DataError):
            partition(count, fraction, seed)
        return
    first, second = partition(count, fraction, seed)
    assert len(second) == size
    assert sorted([*first, *second]) == list(range(count))
    np.testing.assert_array_equal(second, partition(count, fraction, seed)[1])


def test_split_keeps_samples_whole():
    data = Arrays({"x": np.arange(50)}, np.arange(50) * 2)
    first, second = data.split(0.3, seed=1)
    assert (len(first), len(second)) == (35, 15)
    np.testing.assert_array_equal(second.targets, second.inputs["x"] * 2)
    assert list(second.inputs["x"]) != list(data.split(0.3, seed=2)[1].inputs["x"])


@pytest.mark.parametrize(
    "fraction",
    [
        0,
        1,
        -0.1,
        1.5,
        float("nan"),
        float("inf"),
        0.01,
    ],
)
def test_split_refuses_empty_parts(fraction):
    with pytest.raises(DataError, match="fraction"):
        Arrays(np.arange(10)).split(fraction, seed=0)


@pytest.mark.parametrize(
    ("wide", "narrow"),
    [
        (np.int64, np.int32),
        (np.uint64, np.uint32),
        (np.float64, np.float32),
        (np.complex128, np.complex64),
        (">i4", np.int32),
        (">f8", np.float32),
    ],
)
def test_numbers_become_native_32_bit_ones(wide, narrow):
    x = Arrays(np.array([1, 2, 3], wide)).inputs
    assert x.dtype == narrow
    assert x.dtype.isnative
    assert list(x) == [1, 2, 3]


@pytest.mark.parametrize(
    "dtype",
    [
        np.uint8,
        np.int16,
        np.float16,
        np.bool_,
        np.float32,
        ml_dtypes.bfloat16,
    ],
)
def test_narrow_numbers_stay(dtype):
    assert Arrays(np.ones(3, dtype)).inputs.dtype == dtype


@pytest.mark.parametrize(
    "value",
    [
        2**31,
        -(2**31) - 1,
        np.uint64(2**32),
        1e39,
        np.float64("-1e300"),
    ],
)
def test_a_value_that_does_not_fit_is_an_error_that_names_the_array(value):
    with pytest.raises(DataError, match=r"inputs\['x'\].*fit"):
        Arrays({"x": np.array([value])})


def test_infinity_and_nan_are_no_overflow():
    x = Arrays(np.array([np.inf, np.nan, 1.0])).inputs
    assert np.isinf(x[0])
    assert np.isnan(x[1])


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        (
            np.zeros((3, 2)),
            np.zeros(4),
            r"inputs has 3, targets has 4",
        ),
        (
            {"a": [1], "b": [1, 2]},
            None,
            r"inputs\['a'\] has 1, inputs\['b'\] has 2",
        ),
        (
            np.zeros((0, 3)),
            None,
            "no samples",
        ),
        ({}, None, "keys"),
        ({1: [1]}, None, "keys"),
        (3.0, None, "single value"),
        ([1, 2], 5, "targets is the single value 5"),
        (["a", "b"], None, "no numbers"),
        ([object()], None, "no numbers"),
        (
            np.array(["2020-01-01"], "datetime64[D]"),
            None,
            "no numbers",
        ),
        (
            np.zeros(2, [("a", np.int32)]),
            None,
            "no numbers",
        ),
        (
            [[1, 2], [3]],
            None,
            "inputs can't be made",
        ),
        (
            np.ma.array(
                [1, 2],
                mask=[True, False],
            ),
            None,
            "masked",
        ),
    ],
)
def test_unusable_data_is_refused_by_name(inputs, targets, message):
    with pytest.raises(DataError, match=message):
        Arrays(inputs, targets)


def test_from_any():
    data = Arrays([1], [2])
    assert from_any(data) is data
    assert from_any(([[1.0], [2.0]], None)).targets is None
    assert len(from_any([np.zeros((4, 2)), [1, 2, 3, 4]])) == 4
    for wrong in (np.zeros(3), ([1], [2], [3]), {"x": [1]}, None):
        with pytest.raises(DataError, match="pair"):
            from_any(wrong)


def test_repr_is_one_line_of_shapes():
    text = repr(Arrays({"x": np.zeros((2, 3))}, [1, 2]))
    assert text == "Arrays(inputs['x'] float32[2, 3], targets int32[2])"


@pytest.mark.parametrize(
    "shape",
    [
        (),
        (0,),
        (3, 5),
        (1, 0, 2),
    ],
)
def test_aligned_empty(shape):
    for dtype in (np.uint8, np.float32, ml_dtypes.bfloat16):
        x = aligned_empty(shape, dtype)
        assert x.shape == shape
        assert x.dtype == dtype
        assert not x.size or x.ctypes.data % 64 == 0
