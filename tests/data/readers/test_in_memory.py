"""Tables in memory, and readers of several files at once."""

import gzip
import os
import pickle
import zipfile

import numpy as np
import polars as pl
import pytest

from lepton_jax import DataError
from lepton_jax.data.readers import ROW, reader_of
from lepton_jax.data.readers.files import digest

VALUES = {"n": [1, 2, None], "x": [0.5, None, 2.0], "word": ["a", None, "c"]}
FRAME = pl.DataFrame(VALUES)


def arrays():
    return {
        "n": np.ma.array([1, 2, 0], mask=[0, 0, 1]),
        "x": np.array([0.5, np.nan, 2.0]),
        "word": np.array(["a", None, "c"], object),
    }


def pandas():
    module = pytest.importorskip("pandas", reason="pip install pandas")
    frame = FRAME.to_pandas()
    return frame.astype({"n": module.Int64Dtype()})


HELD = {
    "a Polars frame": lambda: FRAME,
    "a lazy frame": FRAME.lazy,
    "an Arrow table": FRAME.to_arrow,
    "a record batch": lambda: FRAME.to_arrow().to_batches()[0],
    "a dict of lists": lambda: VALUES,
    "a dict of arrays": arrays,
    "a list of dicts": FRAME.to_dicts,
    "a pandas frame": pandas,
}


def rows_of(reader, size=2**20):
    parts = [reader.read(piece).table for piece in reader.pieces(size)]
    return pl.concat(parts).drop(ROW)


@pytest.mark.parametrize("name", HELD)
def test_the_same_rows_are_read_whatever_holds_them(name):
    reader = reader_of(HELD[name]())
    assert rows_of(reader).to_dict(as_series=False) == VALUES
    digests = [piece.digest for piece in reader.pieces(2**20)]
    assert digests == [piece.digest for piece in reader_of(FRAME).pieces(2**20)]
    assert [column.missing for column in reader.columns()] == [1, 1, 1]


@pytest.mark.parametrize("size", [1, 30, 2**20])
def test_pieces_of_any_size_hold_all_rows_in_order(size):
    frame = pl.DataFrame({"n": range(100)})
    assert rows_of(reader_of(frame), size)["n"].to_list() == list(range(100))


def test_an_array_of_two_dims_is_columns_and_one_of_more_a_column_of_arrays():
    assert rows_of(reader_of(np.zeros((4, 3)))).columns == [
        "column_1",
        "column_2",
        "column_3",
    ]
    images = rows_of(reader_of((np.zeros((4, 2, 2), np.uint8), np.arange(4))))
    assert images.schema == {
        "inputs": pl.Array(pl.UInt8, (2, 2)),
        "targets": pl.Int64(),
    }


def test_tensors_and_hugging_face_data_sets_are_recognised_by_their_classes():
    class Tensor:
        """The few methods of torch's that are used."""

        dtype = "torch.float32"
        device = type("device", (), {"type": "cpu"})()

        def detach(self):
            return self

        resolve_conj = resolve_neg = detach

        def numpy(self):
            return np.arange(3.0)

    class Dataset:
        """Hugging Face's, as far as it is used."""

        def with_format(self, kind):
            assert kind == "arrow"
            return self

        def __getitem__(self, rows):
            return FRAME.to_arrow()

    Tensor.__module__ = "torch"
    Dataset.__module__ = "datasets.arrow_dataset"
    assert rows_of(reader_of(Tensor()))["column_1"].to_list() == [0.0, 1.0, 2.0]
    assert rows_of(reader_of(Dataset())).equals(FRAME)


NESTED = pl.DataFrame(
    {
        "list": [[1, None], None, [], [2]],
        "array": pl.Series([[1, 2], None, [3, 4], [5, 6]], dtype=pl.Array(pl.Int8, 2)),
        "struct": [{"x": "a"}, None, {"x": None}, {"x": "b"}],
        "truth": [True, None, False, True],
        "day": pl.Series([1, None, 3, 4]).cast(pl.Date),
        "word": ["a", None, "", "bc"],
    }
)


def test_a_digest_is_of_the_values_and_not_of_what_holds_them():
    digests = {
        piece.digest
        for held in (
            NESTED,
            NESTED.to_arrow(),
            pl.concat([NESTED, NESTED]).slice(4),
            pl.concat([NESTED[:1], NESTED[1:]], rechunk=False),
        )
        for piece in reader_of(held).pieces(2**20)
    }
    assert len(digests) == 1
    for name in NESTED.columns:
        changed = NESTED.with_columns(pl.col(name).reverse())
        assert reader_of(changed).pieces(2**20)[0].digest not in digests, name


def test_a_reader_can_be_sent_to_a_worker(tmp_path):
    FRAME.write_csv(tmp_path / "t.csv")
    FRAME.write_parquet(tmp_path / "t.parquet")
    FRAME.write_ndjson(tmp_path / "t.jsonl")
    for name in ("t.csv", "t.parquet", "t.jsonl"):
        reader = reader_of(tmp_path / name)
        pieces = reader.pieces(2**20)
        again = pickle.loads(pickle.dumps(reader))
        assert again.read(pieces[0]).table.drop(ROW).equals(FRAME), name


@pytest.mark.parametrize("name", ["t.csv.gz", "t.zip"])
def test_a_forked_process_reads_packed_files_of_its_own(name, tmp_path):
    text = "n\n" + "".join(f"{i}\n" for i in range(200_000))
    if name == "t.zip":
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("t.csv", text)
    else:
        (tmp_path / name).write_bytes(gzip.compress(text.encode()))
    reader = reader_of(tmp_path / name)
    pieces = reader.pieces(2**16)
    reader.read(pieces[0])

    def content(piece):
        return reader.stored.read(piece.start, piece.stop - piece.start)

    here, there = os.pipe()
    child = os.fork()
    if not child:  # without Polars, whose threads a forked process lacks
        right = [digest(content(piece)) == piece.digest for piece in pieces]
        os.write(there, b"1" if all(right) else b"0")
        os._exit(0)
    rows = [reader.read(piece).table["n"] for piece in pieces[1:]]
    os.waitpid(child, 0)
    assert os.read(here, 1) == b"1"
    assert pl.concat(rows).to_list()[-1] == 199_999


def test_a_table_that_changes_after_it_was_divided_is_an_error():
    array = np.arange(10)
    reader = reader_of({"n": array})
    pieces = reader.pieces(2**20)
    reader.table = reader.table.with_columns(n=pl.col("n") + 1)
    with pytest.raises(DataError, match="changed"):
        reader.read(pieces[0])


def test_types_of_many_files_are_inferred_of_all_of_them(tmp_path):
    (tmp_path / "a.csv").write_text("n,d\n1,1/2/2024\n")
    (tmp_path / "b.csv").write_text("n,d\n1.5,25/2/2024\n")
    reader = reader_of(str(tmp_path / "*.csv"))
    assert [column.type for column in reader.columns()] == [pl.Float64(), pl.Date()]
    table = rows_of(reader)
    assert table["n"].to_list() == [1.0, 1.5]
    assert [day.month for day in table["d"]] == [2, 2]


def test_rows_of_many_files_are_numbered_on(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.csv").write_text("n\n" + f"{number}\n" * 5)
    reader = reader_of(tmp_path)
    parts = [reader.read(piece).table for piece in reader.pieces(4)]
    assert pl.concat(parts)[ROW].to_list() == list(range(15))
