"""Fitted statistics are those of scikit-learn and Polars, however rows are divided."""

import hypothesis.strategies as st
import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from sklearn.impute import SimpleImputer
from sklearn.preprocessing import (
    KBinsDiscretizer,
    MinMaxScaler,
    QuantileTransformer,
    RobustScaler,
    StandardScaler,
)
from sklearn.utils.class_weight import compute_class_weight

from lepton_jax import DataError
from lepton_jax.data import prepare
from lepton_jax.data.prepare.conformance import fitted

TOLERANCE = 1e-9
GENTLE = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

# Two decimals, as most measured numbers have: sums of them are well conditioned.
values = st.integers(-100_000, 100_000).map(lambda number: number / 100)
cells = st.one_of(values, st.none(), st.just(float("nan")))


@st.composite
def divided_columns(draw, least=2, cells=cells):
    """Draw (all rows, pieces) of a column "x" with two values at least."""
    column = draw(st.lists(cells, min_size=0, max_size=40))
    column += draw(st.lists(values, min_size=least, max_size=least))
    table = pl.DataFrame({"x": column}, schema={"x": pl.Float64})
    cuts = sorted(draw(st.lists(st.integers(0, len(table)), max_size=4)))
    ends = [*cuts, len(table)]
    starts = [0, *cuts]
    return table, [table[a:b] for a, b in zip(starts, ends, strict=True)]


def applied(step, table, pieces):
    return step.run(table.lazy(), fitted(step, pieces)).table.collect()


def array(table):
    return table["x"].to_numpy().reshape(-1, 1)


def assert_near(table, expected):
    found = table.select(pl.col("x").cast(pl.Float64).fill_null(float("nan")))
    np.testing.assert_allclose(
        found["x"].to_numpy(), expected.ravel(), rtol=TOLERANCE, atol=TOLERANCE
    )


@pytest.mark.parametrize(
    ("step", "scaler"),
    [
        (prepare.Standardize("x"), StandardScaler()),
        (prepare.MinMaxScale("x"), MinMaxScaler()),
        (prepare.MinMaxScale("x", -1, 3), MinMaxScaler((-1, 3))),
        (prepare.RobustScale("x"), RobustScaler()),
        (prepare.RobustScale("x", 0.1, 0.95), RobustScaler(quantile_range=(10, 95))),
    ],
    ids=str,
)
@GENTLE
@given(divided=divided_columns())
def test_scaling_is_scikit_learns(step, scaler, divided):
    table, pieces = divided
    scaler.fit(array(table))
    assert_near(applied(step, table, pieces), scaler.transform(array(table)))


@pytest.mark.parametrize("count", [2, 7, 1000])
@GENTLE
@given(divided=divided_columns())
@pytest.mark.filterwarnings("ignore::UserWarning:sklearn")
def test_ranks_are_scikit_learns(count, divided):
    table, pieces = divided
    scaler = QuantileTransformer(n_quantiles=count, subsample=None)
    # scikit-learn counts missing cells, too, when it limits the quantiles.
    scaler.fit(array(table.drop_nans().drop_nulls()))
    step = prepare.QuantileScale("x", count)
    edges = fitted(step, pieces)["edge"].to_numpy()
    np.testing.assert_allclose(edges, scaler.quantiles_.ravel(), atol=1e-9)
    # Its edges of a run of equal values differ by roundings, which decide the rank
    # within the run: the ranks are compared by the same edges.
    scaler.quantiles_ = edges.reshape(-1, 1)
    assert_near(applied(step, table, pieces), scaler.transform(array(table)))


@GENTLE
@given(divided=divided_columns(least=12, cells=values))
def test_normal_quantiles_are_scikit_learns(divided):
    table, pieces = divided
    scaler = QuantileTransformer(
        n_quantiles=5, output_distribution="normal", subsample=None
    )
    expected = scaler.fit_transform(array(table)).ravel()
    found = applied(prepare.QuantileScale("x", 5, "normal"), table, pieces)["x"]
    # At the ends scikit-learn clips a spacing of floats later.
    np.testing.assert_allclose(found.to_numpy(), expected, atol=1e-7)


@pytest.mark.parametrize("by", ["mean", "median", "most_frequent"])
@GENTLE
@given(divided=divided_columns())
def test_filled_cells_are_scikit_learns(by, divided):
    table, pieces = divided
    imputer = SimpleImputer(strategy=by)
    expected = imputer.fit_transform(array(table))
    assert_near(applied(prepare.FillMissing("x", by), table, pieces), expected)


@pytest.mark.parametrize(("by", "strategy"), [("width", "uniform"), ("quantile",) * 2])
@GENTLE
@given(divided=divided_columns(cells=values))
@pytest.mark.filterwarnings("ignore::UserWarning:sklearn")
def test_bins_are_scikit_learns(by, strategy, divided):
    table, pieces = divided
    if table["x"].n_unique() < 2:
        return  # scikit-learn has no bin then
    bins = KBinsDiscretizer(
        4, encode="ordinal", strategy=strategy, quantile_method="linear"
    )
    bins.fit(array(table))
    edges = fitted(prepare.Bins("x", 4, by), pieces)["edge"].to_numpy()
    np.testing.assert_allclose(edges, bins.bin_edges_[0], rtol=TOLERANCE, atol=1e-9)
    # A value may lie within a rounding of an edge: compare by the same edges.
    inner = edges[1:-1]
    expected = np.searchsorted(inner, array(table).ravel(), side="right")
    assert_near(applied(prepare.Bins("x", 4, by), table, pieces), expected)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.25, 0.5, 0.9, 1.0])
@GENTLE
@given(divided=divided_columns())
def test_quantiles_are_those_of_polars(share, divided):
    table, pieces = divided
    step = prepare.FlagOutliers("x", by="quantile", limit=min(share, 1 - share))
    row = fitted(step, pieces).row(0, named=True)
    known = table["x"].fill_nan(None)
    low = known.quantile(min(share, 1 - share), interpolation="linear")
    high = known.quantile(max(share, 1 - share), interpolation="linear")
    np.testing.assert_allclose([row["low"], row["high"]], [low, high], rtol=TOLERANCE)


@GENTLE
@given(divided=divided_columns())
def test_limits_of_outliers_are_those_of_polars(divided):
    table, pieces = divided
    known = table["x"].fill_nan(None)
    row = fitted(prepare.DropOutliers("x", "zscore"), pieces).row(0, named=True)
    deviation = known.std(ddof=0)
    expected = [known.mean() - 3 * deviation, known.mean() + 3 * deviation]
    np.testing.assert_allclose([row["low"], row["high"]], expected, atol=1e-9)

    row = fitted(prepare.DropOutliers("x", "iqr", 2.0), pieces).row(0, named=True)
    first = known.quantile(0.25, interpolation="linear")
    third = known.quantile(0.75, interpolation="linear")
    expected = [first - 2 * (third - first), third + 2 * (third - first)]
    np.testing.assert_allclose([row["low"], row["high"]], expected, atol=1e-9)


def test_class_weights_are_scikit_learns():
    classes = ["a"] * 5 + ["b"] * 2 + ["c"]
    table = pl.DataFrame({"y": classes})
    found = applied(prepare.Weigh("y"), table, [table[:3], table[3:]])["weight"]
    weights = compute_class_weight("balanced", classes=np.unique(classes), y=classes)
    expected = [dict(zip("abc", weights, strict=True))[name] for name in classes]
    np.testing.assert_allclose(found.to_numpy(), expected, rtol=TOLERANCE)


@pytest.mark.parametrize("scale", [1e-150, 1.0, 1e150])
def test_a_million_rows_far_from_zero_keep_nine_digits(scale):
    rng = np.random.default_rng(0)
    column = (1e6 + rng.normal(size=200_000)) * scale
    table = pl.DataFrame({"x": column})
    pieces = [table[start : start + 9_973] for start in range(0, len(table), 9_973)]
    row = fitted(prepare.Standardize("x"), pieces).row(0, named=True)
    scaled = column / scale  # numpy's own squares leave the range of floats
    np.testing.assert_allclose(row["center"], scaled.mean() * scale, rtol=1e-12)
    np.testing.assert_allclose(row["scale"], scaled.std() * scale, rtol=TOLERANCE)


def test_values_without_a_finite_square_are_an_error_with_a_way_out():
    table = pl.DataFrame({"x": [1e200, -1e200, 3.0]})
    with pytest.raises(DataError, match="too large to be squared"):
        fitted(prepare.Standardize("x"), [table])
    endless = pl.DataFrame({"x": [1.0, float("inf"), 3.0]})
    with pytest.raises(DataError, match=r"1 infinite values.*\n.*\n.*Derive\('x'"):
        fitted(prepare.Standardize("x"), [endless])
    way_out = prepare.Derive("x", 'col("x") if abs(col("x")) < 1e300 else None')
    again = way_out.run(endless.lazy(), None).table.collect()
    assert fitted(prepare.Standardize("x"), [again])["center"].item() == 2.0


@pytest.mark.parametrize(
    "step",
    [
        prepare.Standardize("x"),
        prepare.MinMaxScale("x"),
        prepare.RobustScale("x"),
        prepare.QuantileScale("x"),
        prepare.Bins("x"),
        prepare.ClipOutliers("x"),
        prepare.FillMissing("x", "median"),
        prepare.FillMissing("x", "most_frequent"),
    ],
    ids=str,
)
@pytest.mark.parametrize("cells", [[], [None, None], [float("nan")]], ids=str)
def test_a_column_without_a_value_is_an_error_that_names_it(step, cells):
    table = pl.DataFrame({"x": cells}, schema={"x": pl.Float64})
    with pytest.raises(DataError, match=r"'x' has no value(.|\n)*FillWith"):
        fitted(step, [table])


def test_constant_columns_are_not_divided_by_rounding():
    table = pl.DataFrame({"x": [0.1] * 10})
    pieces = [table[:3], table[3:]]
    for step in (prepare.Standardize("x"), prepare.MinMaxScale("x")):
        assert applied(step, table, pieces)["x"].to_list() == pytest.approx([0.0] * 10)
