"""JSON lines of any values, in pieces of any size."""

import json

import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_jax.data.readers import ROW, reader_of

TEXT = st.text(st.characters(blacklist_categories=("Cs",)), max_size=6)
ROWS = st.lists(
    st.fixed_dictionaries(
        {"whole": st.integers(-(2**63), 2**63 - 1)},
        optional={
            "number": st.none() | st.floats(allow_nan=False, allow_infinity=False),
            "word": st.none() | TEXT,
            "truth": st.none() | st.booleans(),
            "list": st.none() | st.lists(st.none() | TEXT, max_size=3),
            "inner": st.none() | st.fixed_dictionaries({"x": st.none() | TEXT}),
        },
    ),
    min_size=1,
    max_size=10,
)
NAMES = ("whole", "number", "word", "truth", "list", "inner")


@settings(max_examples=25, deadline=None)
@given(
    rows=ROWS,
    ends=st.sampled_from(["\n", "\r\n", "\n\n"]),
    ascii=st.booleans(),
    size=st.integers(1, 200),
)
def test_any_rows_read_back_equal_in_pieces_of_any_size(
    rows, ends, ascii, size, tmp_path_factory
):
    path = tmp_path_factory.mktemp("any") / "rows.jsonl"
    text = ends.join(json.dumps(row, ensure_ascii=ascii) for row in rows)
    path.write_text(text, encoding="utf-8", newline="")
    reader = reader_of(path)
    found = pl.concat([reader.read(piece).table for piece in reader.pieces(size)])
    assert found[ROW].to_list() == list(range(len(rows)))
    for name in NAMES:
        if name in found.columns:
            values = [row.get(name) for row in rows]
            assert found[name].to_list() == values, name
