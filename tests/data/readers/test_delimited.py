"""CSV in the dialects that people have."""

import csv
import gzip
import io
import itertools
from datetime import date

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_jax import DataError
from lepton_jax.data.readers import ROW, reader_of

BIG = 2**20


def written(tmp_path, content, name="table.csv"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def table_of(reader, size=BIG):
    """All rows of a source, read piece by piece."""
    parts = [reader.read(piece).table for piece in reader.pieces(size)]
    return pl.concat(parts)


def columns_of(path, **dialect):
    return table_of(reader_of(path, **dialect)).drop(ROW).to_dict(as_series=False)


DIALECTS = {
    "comma": ("a,b\n1,x\n2,y\n", {}),
    "semicolon": ("a;b\n1;x\n2;y\n", {}),
    "tab": ("a\tb\n1\tx\n2\ty\n", {}),
    "bar": ("a|b\n1|x\n2|y\n", {}),
    "windows ends": ("a,b\r\n1,x\r\n2,y\r\n", {}),
    "old mac ends": ("a,b\r1,x\r2,y\r", {}),
    "mixed ends": ("a,b\r\n1,x\n2,y\r", {}),
    "no last end": ("a,b\n1,x\n2,y", {}),
    "empty lines": ("\na,b\n\n1,x\n\n\n2,y\n\n", {}),
    "quotes": ('"a","b"\n"1","x"\n"2","y"\n', {}),
    "single quotes": ("a,b\n1,'x'\n2,'y'\n", {}),
    "padded": ("a, b\n1, x\n2, y\n", {}),
    "padded quotes": ('a, b\n1, "x"\n2, "y"\n', {}),
    "sep line": ("sep=;\na;b\n1;x\n2;y\n", {}),
    "trailing delimiter": ("a,b,\n1,x,\n2,y,\n", {}),
    "shorter header": ("a,b\n1,x,\n2,y,\n", {}),
    "preamble": ("made by a tool\na,b\n1,x\n2,y\n", {"skip": 1}),
    "names": ("1,x\n2,y\n", {"names": ["a", "b"], "header": False}),
    "mark": ("\ufeffa,b\n1,x\n2,y\n", {}),
    "mark in the middle": ("\ufeffa,b\n1,x\n\ufeff2,y\n", {}),
    "set delimiter": ("a~b\n1~x\n2~y\n", {"delimiter": "~"}),
}


@pytest.mark.parametrize("name", DIALECTS)
def test_the_same_rows_are_read_from_each_dialect(name, tmp_path):
    text, dialect = DIALECTS[name]
    found = columns_of(written(tmp_path, text), **dialect)
    assert found == {"a": [1, 2], "b": ["x", "y"]}


@pytest.mark.parametrize(
    "encoding",
    ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252"],
)
def test_the_encoding_is_found(encoding, tmp_path):
    euro = "\u20ac" if encoding != "latin-1" else "\xa3"
    text = f"name,n\ncaf\xe9 {euro},1\nna\xefve,2\n"
    found = columns_of(written(tmp_path, text.encode(encoding)))
    assert found == {"name": [f"caf\xe9 {euro}", "na\xefve"], "n": [1, 2]}


def test_gzip_and_zip_are_unpacked(tmp_path):
    packed = gzip.compress(b"a,b\n1,x\n") + gzip.compress(b"2,y\n")
    path = written(tmp_path, packed, "table.csv.gz")
    assert columns_of(path) == {"a": [1, 2], "b": ["x", "y"]}


NUMBERS = {
    "whole": (["1", "-2", "+3"], pl.Int64(), [1, -2, 3]),
    "plain": (["1.5", "2", "-1e3"], pl.Float64(), [1.5, 2.0, -1000.0]),
    "decimal comma": (["1,5", "2,25", "3"], pl.Float64(), [1.5, 2.25, 3.0]),
    "thousands": (["1,234", "1,234,567", "8"], pl.Int64(), [1234, 1234567, 8]),
    "european": (["1.234,5", "2.000,25"], pl.Float64(), [1234.5, 2000.25]),
    "swiss": (["1'234.5", "7'000.0"], pl.Float64(), [1234.5, 7000.0]),
    "spaces": (["1 234 567", "7 000"], pl.Int64(), [1234567, 7000]),
    "percent": (["12%", "3.5%"], pl.Float64(), [12.0, 3.5]),
    "dollars": (["$1,200.50", "-$3.00"], pl.Float64(), [1200.5, -3.0]),
    "euros": (["3,50 €", "12,00 €"], pl.Float64(), [3.5, 12.0]),
    "minus sign": (["\u22125.5", "5"], pl.Float64(), [-5.5, 5.0]),
    "infinite": (["inf", "-Infinity", "1.5"], pl.Float64(), [1e999, -1e999, 1.5]),
    "large": (["18446744073709551615", "1"], pl.UInt64(), [2**64 - 1, 1]),
    "larger": (["1" * 25, "2"], pl.String(), ["1" * 25, "2"]),
    "codes": (["00501", "10115"], pl.String(), ["00501", "10115"]),
    "truth": (["True", "false"], pl.Boolean(), [True, False]),
    "answers": (["yes", "no"], pl.Boolean(), [True, False]),
    "ISO": (["2024-12-31", "2024-01-02"], pl.Date(), [date(2024, 12, 31), None]),
    "day first": (["31/12/2024", "2/1/2024"], pl.Date(), [date(2024, 12, 31), None]),
    "month first": (["12/31/2024", "1/2/2024"], pl.Date(), [date(2024, 12, 31), None]),
    "German": (["31.12.2024", "2.1.2024"], pl.Date(), [date(2024, 12, 31), None]),
    "month's name": (["31 Dec 2024", "2 Jan 2024"], pl.Date(), [date(2024, 12, 31)]),
    "words": (["red", "green"], pl.String(), ["red", "green"]),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_columns_notation_is_found_by_all_of_its_cells(name, tmp_path):
    cells, type_, values = NUMBERS[name]
    text = "a;b\n" + "".join(f"{cell};x\n" for cell in cells)
    reader = reader_of(written(tmp_path, text))
    column = reader.columns()[0]
    assert column.type == type_, column.reason
    assert column.against == 0
    found = table_of(reader)["a"].to_list()
    if type_ == pl.Date():
        values = [date(2024, 12, 31), date(2024, 1, 2)]
    assert found == values


def test_cells_against_the_type_are_missing_counted_and_noted(tmp_path):
    cells = [str(i) for i in range(40)] + ["unknown", "N/A"]
    text = "a,b\n" + "".join(f"{cell},x\n" for cell in cells)
    reader = reader_of(written(tmp_path, text))
    column = reader.columns()[0]
    assert column.type == pl.Int64()
    assert (column.against, column.missing) == (1, 1)
    assert column.examples == ("unknown",)
    rows = reader.read(reader.pieces(BIG)[0])
    assert rows.table["a"].to_list() == [*range(40), None, None]
    note = rows.refused.row(0, named=True)
    assert (note[ROW], note["column"], note["before"]) == (40, "a", "unknown")
    assert note["action"] == "changed"


QUESTIONS = {
    "thousands or decimals": (["1,234", "5,678"], {"decimal": ","}, [1.234, 5.678]),
    "days or months": (["1/2/2024", "3/4/2024"], {"day_first": True}, None),
    "words among numbers": (
        ["1", "2", "3", "4", "5", "6", "oops", "argh"],
        {"missing": ["oops", "argh"]},
        [1, 2, 3, 4, 5, 6, None, None],
    ),
    "units": (["5 kg", "6 kg"], {"types": {"a": "String"}}, ["5 kg", "6 kg"]),
    "two notations": (
        ["1,234.5", "1.234,5", "2.345,6", "2,345.6"],
        {"types": {"a": "String"}},
        ["1,234.5", "1.234,5", "2.345,6", "2,345.6"],
    ),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_what_may_be_numbers_in_two_ways_is_a_question(name, tmp_path):
    cells, answer, values = QUESTIONS[name]
    path = written(tmp_path, "a;b\n" + "".join(f"{cell};x\n" for cell in cells))
    with pytest.raises(DataError) as error:
        reader_of(path).columns()
    assert "line 2" in error.value.where or "line" in error.value.where
    assert "column 'a'" in error.value.where
    assert next(iter(answer)) in error.value.remedy
    found = columns_of(path, **answer)["a"]
    assert found == (values or [date(2024, 2, 1), date(2024, 4, 3)])


def test_the_files_decimal_mark_settles_a_column_that_leaves_it_open(tmp_path):
    path = written(tmp_path, "a;b\n1.234;0,5\n5.678;1,25\n")
    assert columns_of(path) == {"a": [1234, 5678], "b": [0.5, 1.25]}


def test_names_that_are_there_twice_or_empty_are_numbered(tmp_path):
    reader = reader_of(written(tmp_path, "a,a,,a_2\n1,2,3,4\n"))
    assert [column.name for column in reader.columns()] == [
        "a",
        "a_3",
        "column_3",
        "a_2",
    ]
    assert "another column" in reader.columns()[1].reason


def test_rows_without_a_header_are_not_taken_for_one(tmp_path):
    reader = reader_of(written(tmp_path, "1,x\n2,y\n"))
    assert [column.name for column in reader.columns()] == ["column_1", "column_2"]
    assert table_of(reader)["column_1"].to_list() == [1, 2]


def test_an_unknown_setting_is_named_with_the_nearest(tmp_path):
    with pytest.raises(DataError, match="did you mean 'delimiter'"):
        reader_of(written(tmp_path, "a,b\n1,2\n"), delimeter=";")


# ---- properties ----

# Neither surrogates, which are no text, nor what other tests are about.
CHARACTERS = st.characters(
    blacklist_categories=("Cs",), blacklist_characters="\0\ufeff"
)
WORDS = st.text(CHARACTERS, min_size=1, max_size=6).map(lambda text: f"w{text}w")
ROWS = st.lists(
    st.tuples(
        st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1)),
        st.one_of(st.none(), st.floats(allow_nan=False)),
        st.one_of(st.none(), WORDS),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=25, deadline=None)
@given(
    rows=ROWS,
    delimiter=st.sampled_from(",;\t|"),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
    size=st.integers(1, 80),
)
def test_any_table_in_any_dialect_reads_back_equal_in_pieces_of_any_size(
    rows, delimiter, end, quoting, encoding, size, tmp_path_factory
):
    if end == "\r":
        quoting = csv.QUOTE_ALL  # csv does not quote "\n" for its sake
    text = io.StringIO(newline="")
    writer = csv.writer(
        text,
        delimiter=delimiter,
        lineterminator=end,
        quoting=quoting,
    )
    writer.writerow(["whole", "number", "word"])
    writer.writerows(rows)
    path = tmp_path_factory.mktemp("any") / "table.csv"
    path.write_bytes(text.getvalue().encode(encoding))
    types = {"whole": "Int64", "number": "Float64", "word": "String"}
    reader = reader_of(
        path,
        types=types,
        delimiter=delimiter,
        header=True,
        strip=False,
    )
    pieces = reader.pieces(size)
    found = pl.concat([reader.read(piece).table for piece in pieces])
    assert found["whole"].to_list() == [row[0] for row in rows]
    assert found["number"].to_list() == [row[1] for row in rows]
    assert found["word"].to_list() == [row[2] for row in rows]
    assert found[ROW].to_list() == list(range(len(rows)))
    assert all(one.stop == two.start for one, two in itertools.pairwise(pieces))


@settings(max_examples=25, deadline=None)
@given(
    lines=st.lists(st.text('ab,"\r\n ', max_size=12), max_size=10),
    size=st.integers(1, 30),
)
def test_pieces_of_any_size_give_the_same_rows_whatever_the_text(
    lines, size, tmp_path_factory
):
    path = tmp_path_factory.mktemp("any") / "table.csv"
    path.write_text("x,y\n" + "\n".join(lines), newline="")
    dialect = {
        "types": {"x": "String", "y": "String"},
        "delimiter": ",",
        "quote": '"',
        "header": True,
        "strip": False,
        "bad_rows": "refuse",
    }
    whole = reader_of(path, **dialect)
    parts = reader_of(path, **dialect)

    def outcome(reader, size):
        read = [reader.read(piece) for piece in reader.pieces(size)]
        rows = [row for each in read for row in each.table.rows()]
        refused = [row for each in read for row in each.refused.rows()]
        return rows, refused

    assert outcome(parts, size) == outcome(whole, BIG)
