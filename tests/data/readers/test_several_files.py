"""Several files of one source are read as one table, whatever the pieces."""

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lepton_jax.data.readers import ROW, reader_of

WRITERS = {
    "parquet": lambda table, path: table.write_parquet(path, row_group_size=2),
    "arrow": lambda table, path: table.write_ipc(path),
    "csv": lambda table, path: table.write_csv(path),
    "jsonl": lambda table, path: table.write_ndjson(path),
}


@pytest.mark.parametrize("suffix", WRITERS)
@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    sizes=st.lists(st.integers(1, 7), min_size=2, max_size=4),
    piece=st.sampled_from([1, 60, 10**6]),
)
def test_no_file_loses_a_row(suffix, sizes, piece, tmp_path):
    for old in tmp_path.iterdir():
        old.unlink()
    paths = []
    wanted = []
    for number, size in enumerate(sizes):
        values = [100 * number + i for i in range(size)]
        paths.append(tmp_path / f"part-{number}.{suffix}")
        WRITERS[suffix](
            pl.DataFrame({"value": values, "word": [f"w{x}" for x in values]}),
            paths[-1],
        )
        wanted += values

    reader = reader_of(paths)
    parts = [reader.read(each) for each in reader.pieces(piece)]
    table = pl.concat([part.table for part in parts])

    assert table["value"].to_list() == wanted
    assert table["word"].to_list() == [f"w{x}" for x in wanted]
    assert table[ROW].to_list() == list(range(len(wanted)))
    assert not any(len(part.refused) for part in parts)
