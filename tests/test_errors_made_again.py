"""An error that Polars makes again from its text keeps its parts."""

import polars as pl
import pytest

from lepton_jax.errors import DataError


@pytest.mark.parametrize("where", [None, "character 3"])
def test_an_error_of_a_worker_keeps_what_where_and_remedy(where):
    def fail(cells):
        raise DataError("'x' is strange", where=where, remedy="leave it out")

    table = pl.LazyFrame({"a": ["x"]})
    with pytest.raises(DataError) as raised:
        table.select(pl.col("a").map_batches(fail, return_dtype=pl.String)).collect()
    error = raised.value
    assert (error.what, error.where, error.remedy) == (
        "'x' is strange",
        where,
        "leave it out",
    )
