from __future__ import annotations

import gzip
import inspect
import re
import warnings
from pathlib import Path

import numpy as np
import pytest

from lepton_jax.data.notation import is_date
from lepton_jax.data.table import BINS, MISSING, SETTINGS, Schema, table, table_split
from lepton_jax.errors import DataError, LeptonError
from recipes import csv_mlp, logistic, two_tower

PEOPLE = """\
age, job ,pay,sex
39,clerk,1.5,F
 50 , boss,?,M

38,,3e0,M
,clerk,-4,F
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str | bytes, name: str = "t.csv"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_numbers_categories_and_labels(write):
    read = table(write(PEOPLE), "sex")
    np.testing.assert_array_equal(
        read.arrays.inputs["numbers"],
        [
            [39, 1.5],
            [50, np.nan],
            [38, 3],
            [np.nan, -4],
        ],
    )
    np.testing.assert_array_equal(
        read.arrays.inputs["categories"], [[2], [1], [0], [2]]
    )
    np.testing.assert_array_equal(
        read.arrays.targets,
        np.array([0, 1, 1, 0], np.int32),
        strict=True,
    )
    schema = read.schema
    assert (schema.numbers, schema.categories, schema.classes) == (
        ("age", "pay"),
        ("job",),
        ("F", "M"),
    )
    assert schema.vocabularies == (("boss", "clerk"),)
    assert schema.sizes == (3,)
    assert [(edges[0], edges[-1]) for edges in schema.edges] == [(38, 50), (-4, 3)]


@pytest.mark.parametrize(
    "encode",
    [
        lambda t: b"\xef\xbb\xbf" + t,
        gzip.compress,
        lambda t: t.replace(b"\n", b"\r\n"),
        lambda t: t.rstrip(),
    ],
)
def test_other_encodings_of_the_same_table(write, encode):
    plain = table(write(PEOPLE), "sex")
    other = table(write(encode(PEOPLE.encode()), "other"), "sex")
    assert other.schema == plain.schema
    np.testing.assert_array_equal(
        other.arrays.inputs["numbers"], plain.arrays.inputs["numbers"]
    )


def test_a_test_table_is_encoded_as_the_training_table_was(write):
    train = table(write(PEOPLE), "sex")
    schema = Schema.from_json(train.schema.to_json())
    assert schema == train.schema
    text = "sex,extra,job,pay,age\nM,1,pilot,NA,1e3\nM,1, clerk,0,2\n"
    test = table(
        write(text, "test.csv"),
        "sex",
        schema=schema,
    )
    np.testing.assert_array_equal(
        test.arrays.inputs["numbers"], [[1000, np.nan], [2, 0]]
    )
    np.testing.assert_array_equal(test.arrays.inputs["categories"], [[0], [2]])
    np.testing.assert_array_equal(test.arrays.targets, [1, 1])
    assert test.schema is schema


def test_a_block_without_columns_is_left_out(write):
    assert set(table(write("a,y\n1,u\n2,v\n"), "y").arrays.inputs) == {"numbers"}
    assert set(
        table(write("a,y\n1,u\n2,v\n"), "y", categorical=["a"]).arrays.inputs
    ) == {"categories"}
    assert set(table(write("a,y\n?,u\n,v\n"), "y").arrays.inputs) == {"categories"}


def test_quoted_cells_with_commas_and_newlines(write):
    read = table(write('a,y\n"Smith, J.",1\n"two\nlines", 0\n"say ""hi""",1\n'), "y")
    assert read.schema.vocabularies == (("Smith, J.", 'say "hi"', "two\nlines"),)
    with pytest.raises(DataError, match="expected 2 cells, found 1") as caught:
        table(write('a,y\n"two\nlines",0\n7\n'), "y")
    assert caught.value.where.endswith("line 4")


def test_a_column_is_numeric_from_nine_tenths_on(write):
    def text(bad):
        return "a,b,y\n" + "".join(
            f"{'x' if i < bad else i},{i},{i % 2}\n" for i in range(20)
        )

    with pytest.raises(
        DataError, match=r"'x' is no number.*3 of the column's 20 cells \(15 %\)"
    ):
        table(write(text(3)), "y")
    assert table(write(text(3)), "y", categorical=("a",)).schema.categories == ("a",)
    with pytest.raises(DataError, match="'x' is not a finite number") as caught:
        table(write(text(2)), "y")
    assert caught.value.where.endswith("t.csv, line 2, column 'a'")
    assert "categorical" in caught.value.remedy
    assert table(write(text(2)), "y", categorical=("a",)).schema.categories == ("a",)
    assert table(write(text(2)), "y", missing=("x",)).schema.numbers == ("a", "b")


@pytest.mark.parametrize("cell", ["inf", "1_000", "1e39", "NAN", "0x10"])
def test_cells_that_are_no_numbers(write, cell):
    numbers = "".join(f"{i},{i % 2}\n" for i in range(30))
    with pytest.raises(DataError, match="not a finite number"):
        table(write(f"a,y\n{numbers}{cell},1\n"), "y")


def test_labels_are_ordered_as_numbers_or_are_a_quantity(write):
    few = table(write("a,y\n" + "".join(f"1,{i % 12}\n" for i in range(40))), "y")
    assert few.schema.classes == tuple(map(str, range(12)))
    assert few.arrays.targets.max() == 11
    many = write("a,y\n" + "".join(f"1,{i / 2}\n" for i in range(21)))
    assert table(many, "y").schema.classes is None
    np.testing.assert_array_equal(
        table(many, "y").arrays.targets,
        np.arange(21, dtype=np.float32) / 2,
        strict=True,
    )
    assert len(table(many, "y", categorical=["y"]).schema.classes) == 21
    test = table(
        write("a,y\n1,-7\n", "test.csv"),
        "y",
        schema=table(many, "y").schema,
    )
    assert test.arrays.targets[0] == -7


def test_edges_are_quantiles_and_frequent_values_get_one_each(write):
    rows = [0] * 900 + list(range(1000, 1100))
    edges = table(
        write("a,y\n" + "".join(f"{x},{x % 2}\n" for x in rows)), "y"
    ).schema.edges[0]
    assert edges[0] == 0
    assert edges[1] == 1000
    assert edges[-1] == 1099
    assert len(edges) == BINS + 1
    assert np.all(np.diff(edges) > 0)
    assert edges[len(edges) // 2] == pytest.approx(1050, abs=2)
    # Neighbours in float32 must not become bins of no width.
    close = "a,y\n" + "".join(f"{1e8 + i},{i % 2}\n" for i in range(40))
    assert np.all(np.diff(np.float32(table(write(close), "y").schema.edges[0])) > 0)
    assert table(write("a,y\n5,u\n5,v\n"), "y").schema.edges == ((5.0,),)


def test_a_split_is_fitted_on_its_training_rows_alone(write):
    rows = [(i, f"c{i}", "uv"[i % 2]) for i in range(100)]
    path = write("n,c,y\n" + "".join(f"{n},{c},{y}\n" for n, c, y in rows))
    train, test = table_split(path, "y", 0.3, seed=0)
    assert (len(train.arrays), len(test.arrays)) == (
        70,
        30,
    )
    assert train.schema == test.schema
    assert not test.arrays.inputs["categories"].any()
    assert train.arrays.inputs["categories"].all()
    numbers = train.arrays.inputs["numbers"]
    assert (train.schema.edges[0][0], train.schema.edges[0][-1]) == (
        numbers.min(),
        numbers.max(),
    )
    both = np.concatenate([numbers, test.arrays.inputs["numbers"]]).ravel()
    assert sorted(both) == list(range(100))
    np.testing.assert_array_equal(
        test.arrays.targets, test.arrays.inputs["numbers"][:, 0] % 2
    )


def test_a_split_names_the_line_in_the_file(write):
    path = write(
        "a,y\n" + "".join(f"{'x' if i == 37 else i},{i % 2}\n" for i in range(60))
    )
    for seed in range(4):
        with pytest.raises(DataError, match="'x'") as caught:
            table_split(path, "y", 0.5, seed=seed)
        assert "line 39," in caught.value.where


@pytest.mark.parametrize(
    ("text", "where", "message"),
    [
        ("", "t.csv", "empty"),
        ("a,y\n", "t.csv", "no rows"),
        ("a,a,y\n1,2,3\n", "line 1", "'a' is there twice"),
        (",a,y\n0,1,2\n", "line 1", "column 1 has no name"),
        ("y\n1\n", "line 1", "only column"),
        ("a,Y\n1,2\n", "line 1", "no label column 'y'"),
        ("a,y\n1,2\n\n1,2,3\n", "line 4", "expected 2 cells, found 3"),
        ("a,y\n1,2\n1\n", "line 3", "expected 2 cells, found 1"),
        ("a,y\n1,2\n1,?\n", "line 3, column 'y'", r"'\?' stands for a missing label"),
        ("a,y\n1,2\n3,2\n", "line 2, column 'y'", "'2' is the label of every row"),
        (b"a,y\n1,2\n\xe9,2\n", "line 3", "0xe9 is not UTF-8"),
        ('a,y\n1,2\n"3,2\n', "line 3", "not CSV"),
    ],
)
def test_faulty_files(write, text, where, message):
    with pytest.raises(DataError, match=message) as caught:
        table(write(text), "y")
    assert caught.value.where.endswith(where)


def test_faulty_test_tables(write):
    schema = table(write("a,b,y\n1,u,<=50K\n2,v,>50K\n"), "y").schema
    with pytest.raises(
        DataError, match=r"'<=50K\.' is not among.*mean '<=50K'"
    ) as caught:
        table(write("a,b,y\n1,u,>50K\n1,u,<=50K.\n"), "y", schema=schema)
    assert "line 3" in caught.value.where
    with pytest.raises(DataError, match="'b' of the training table"):
        table(write("a,c,y\n1,u,>50K\n"), "y", schema=schema)
    with pytest.raises(DataError, match="'u' is not a finite number"):
        table(write("a,b,y\nu,u,>50K\n"), "y", schema=schema)
    with pytest.raises(DataError, match="schema's is 'y'"):
        table(write("a,b,y\n1,u,>50K\n"), "b", schema=schema)


def test_other_mistakes(write, tmp_path):
    with pytest.raises(DataError, match="no such file"):
        table(tmp_path / "none.csv", "y")
    with pytest.raises(DataError, match=r"'jobs' to be categorical.*mean 'job'"):
        table(write(PEOPLE), "sex", categorical=["jobs"])
    with pytest.raises(DataError, match=r"no label column 'sexe'.*mean 'sex'"):
        table(write(PEOPLE), "sexe")
    for text in ("", "[]", '{"label": "y"}', '{"colour": 1}'):
        with pytest.raises(DataError, match="schema"):
            Schema.from_json(text)


# ---- columns that are spelled in another way ----


def column(
    cells,
    label=lambda i: "uv"[i % 2],
) -> str:
    """A table of one column, quoted, and a label."""
    return "a,y\n" + "".join(f'"{cell}",{label(i)}\n' for i, cell in enumerate(cells))


def values(read) -> list[float]:
    return read.arrays.inputs["numbers"][:, 0].tolist()


@pytest.mark.parametrize(
    "word",
    [
        "N/A",
        "n/a",
        "NA",
        "#N/A",
        "NULL",
        "null",
        "NaN",
        "nan",
        "<NA>",
        "?",
        "",
        "\\\\N",
    ],
)
def test_numbers_with_words_for_a_missing_value_stay_numbers(word, write):
    word = word.replace("\\\\", "\\")
    cells = [word if i % 7 == 0 else i / 4 for i in range(40)]
    read = table(write(column(cells)), "y")
    np.testing.assert_array_equal(
        values(read), [np.nan if cell == word else cell for cell in cells]
    )
    assert read.schema.numbers == ("a",)
    assert read.schema.categories == ()


@pytest.mark.parametrize(
    "word", ["None", "none", "-", ".", "missing", "unknown", "n.a.", "NAN", "inf", "--"]
)
def test_another_word_among_numbers_is_an_error_whose_remedies_work(word, write):
    cells = [word if i % 7 == 0 else i / 4 for i in range(40)]
    path = write(column(cells))
    with pytest.raises(DataError) as caught:
        table(path, "y")
    error = caught.value
    assert error.where.endswith("line 2, column 'a'")
    assert error.what.startswith(repr(word))
    assert "6 of the column's 40 cells (15 %)" in error.what
    assert f"add {word!r} to `missing`" in error.remedy
    read = table(
        path,
        "y",
        missing=(*MISSING, word),
    )
    np.testing.assert_array_equal(
        values(read), [np.nan if cell == word else cell for cell in cells]
    )
    assert table(path, "y", categorical=["a"]).schema.categories == ("a",)
    with pytest.raises(DataError, match="no column is left"):
        table(path, "y", ignore=["a"])


SPELLED = {
    "decimal-comma": [
        ("0,5", 0.5),
        ("12", 12),
        ("-3,25", -3.25),
        ("1,5e2", 150),
    ],
    "thousands": [
        ("1,234.5", 1234.5),
        ("567", 567),
        ("1,234,567", 1234567),
        ("12.25", 12.25),
    ],
    "thousands-in-europe": [
        ("1.234,5", 1234.5),
        ("567", 567),
        ("1.234", 1234),
    ],
    "thousands-twice": [
        ("1.234.567", 1234567),
        ("1.234", 1234),
        ("999", 999),
    ],
    "thousands-in-india": [("12,34,567", 1234567), ("1,234", 1234)],
    "thousands-by-spaces": [
        ("1 234", 1234),
        ("567", 567),
        ("12\u00a0345", 12345),
        ("9\u202f999", 9999),
    ],
    "spaces-and-comma": [("1 234,5", 1234.5), ("2", 2)],
    "thousands-in-switzerland": [
        ("1'234.50", 1234.5),
        ("2\u2019345", 2345),
        ("7", 7),
    ],
    "percent": [
        ("12%", 12),
        ("5.5 %", 5.5),
        ("-1%", -1),
    ],
    "percent-with-comma": [("12,5 %", 12.5), ("5%", 5)],
    "dollars": [
        ("$3", 3),
        ("$1,234.50", 1234.5),
        ("-$2", -2),
        ("($4)", -4),
    ],
    "euros": [
        ("3 €", 3),
        ("4,50 €", 4.5),
        ("1.000,25€", 1000.25),
    ],
    "codes-of-money": [("USD 3", 3), ("USD 4.5", 4.5)],
    "minus-of-typesetters": [("\u22125", -5), ("6", 6)],
    "zero-point-something": [("1,234", 1.234), ("0,500", 0.5)],
}


@pytest.mark.parametrize("name", SPELLED)
def test_numbers_in_another_notation_are_read_where_the_column_leaves_no_doubt(
    name, write
):
    pairs = SPELLED[name] * 3
    read = table(write(column([cell for cell, _ in pairs])), "y")
    np.testing.assert_array_equal(
        values(read), np.float32([value for _, value in pairs])
    )
    # a test table is encoded by the same notation, whatever it holds by itself, and
    # after JSON
    schema = Schema.from_json(read.schema.to_json())
    assert schema == read.schema
    for cell, value in SPELLED[name]:
        again = table(
            write(column([cell]), "test.csv"),
            "y",
            schema=schema,
        )
        assert values(again) == [np.float32(value)]


def test_what_may_be_a_thousand_or_one_is_an_error_unless_the_file_tells(write):
    path = write(column([f"{i * 997:,}" for i in range(30)]))
    with pytest.raises(
        DataError,
        match=r"'1,994' may be 1\.994 with a decimal mark or 1994 with thousands",
    ) as caught:
        table(path, "y")
    assert caught.value.where.endswith("line 4, column 'a'")
    assert "`decimal`" in caught.value.remedy
    assert values(table(path, "y", thousands=","))[2] == 1994
    assert values(table(path, "y", decimal=","))[2] == np.float32(1.994)
    both = "a;b;y\n" + "".join(f"{i * 997:,};{{}};{'uv'[i % 2]}\n" for i in range(30))
    comma = write(both.replace("{}", "1,5"))
    point = write(both.replace("{}", "1.5"), "point.csv")
    assert table(comma, "y").arrays.inputs["numbers"][2].tolist() == [
        np.float32(1.994),
        1.5,
    ]
    assert table(point, "y").arrays.inputs["numbers"][2].tolist() == [1994, 1.5]


def test_a_point_is_a_mark_of_thousands_in_a_file_of_decimal_commas(write):
    """1.234 next to 3,5 is more than a thousand.

    Read as a decimal it would be less than the 567 above it.
    """
    rows = [
        ("567", "3,5"),
        ("1.234", "4,25"),
        ("2.345", "6"),
    ]
    read = table(
        write(
            "a;b;y\n"
            + "".join(f"{a};{b};{'uv'[i % 2]}\n" for i, (a, b) in enumerate(rows))
        ),
        "y",
    )
    np.testing.assert_array_equal(
        read.arrays.inputs["numbers"],
        np.float32(
            [
                [567, 3.5],
                [1234, 4.25],
                [2345, 6],
            ]
        ),
    )
    alone = table(write(column([a for a, _ in rows])), "y")
    assert values(alone) == [
        567,
        np.float32(1.234),
        np.float32(2.345),
    ], "nothing says so here: points are points"


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (
            [f"2024-{1 + i // 28:02d}-{1 + i % 28:02d}" for i in range(60)],
            "'2024-01-01' is a date or a time",
        ),
        (
            [f"{1 + i % 28}.{1 + i // 28}.2024" for i in range(60)],
            "is a date or a time",
        ),
        ([f"{1 + i % 12}/{1 + i % 28}/24" for i in range(60)], "is a date or a time"),
        (
            [f"2024-01-02T{i % 24:02d}:{i:02d}:00Z" for i in range(60)],
            "is a date or a time",
        ),
        ([f"{i % 24}:{i:02d}" for i in range(60)], "is a date or a time"),
        ([f"Mar {1 + i % 31}, {1990 + i}" for i in range(60)], "is a date or a time"),
        ([f"{i} kg" for i in range(60)], "'0 kg' is a number with 'kg'"),
        ([f"{i / 2}ms" for i in range(60)], "is a number with 'ms'"),
        ([f"${i}" if i % 2 else f"{i} €" for i in range(60)], "spelled otherwise"),
        ([f"{i}%" if i % 2 else f"{i}" for i in range(60)], "spelled otherwise"),
        (
            [f"about {i}" if i % 8 == 0 else i for i in range(60)],
            "'about 0' is no number",
        ),
    ],
)
def test_a_column_that_only_looks_like_numbers_is_an_error_until_it_is_named(
    cells, message, write
):
    path = write(
        "b,"
        + "\n".join(
            f"{i}," * bool(i) + line
            for i, line in enumerate(column(cells).splitlines())
        )
        + "\n"
    )
    with pytest.raises(DataError, match=message) as caught:
        table(path, "y")
    assert " %)" in caught.value.what
    assert caught.value.where.endswith(
        f"line {3 if 'otherwise' in message else 2}, column 'a'"
    )
    assert len(table(path, "y", categorical=["a"]).schema.vocabularies[0]) == len(
        set(cells)
    )
    assert table(path, "y", ignore=["a"]).schema.numbers == ("b",)
    assert table(path, "y", ignore=["a"]).schema.categories == ()


@pytest.mark.parametrize(
    "cells",
    [
        [f"A{i}" for i in range(60)],
        ["yes", "no"] * 30,
        [f"{i}-{i + 9}" for i in range(60)],
        ["0", "1", "2", "3+"] * 15,
        [f"1{i}{'ABCDEFG'[i % 7]}" for i in range(60)],
        [f"10.0.0.{i}" for i in range(60)],
        ["36 months", "60 months"] * 30,
        ["True", "False", ""] * 20,
        [f"555-{1000 + i}" for i in range(60)],
        ["<=50K", ">50K"] * 30,
        ["1st", "2nd", "3rd"] * 20,
    ],
)
def test_categories_stay_categories(cells, write):
    assert table(write(column(cells)), "y").schema.categories == ("a",)


def test_codes_of_which_most_are_numbers_are_categories_with_a_warning(write):
    path = write(
        column([f"PC {1000 + i}" if i % 3 == 0 else 2000 + i for i in range(60)])
    )
    with pytest.warns(
        UserWarning,
        match=r"column 'a': most of its distinct cells are numbers, others are not",
    ) as told:
        assert table(path, "y").schema.categories == ("a",)
    assert told[0].filename == __file__
    assert "`categorical`" in str(told[0].message)
    with pytest.warns(UserWarning, match="column 'a'"):
        table_split(path, "y", 0.2, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert table(path, "y", categorical=["a"]).schema.categories == ("a",)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2024-02-28", True),
        ("2024/2/8", True),
        ("28.2.2024", True),
        ("12/31/1999", True),
        ("31/12/99", True),
        ("2024-01", True),
        ("3 Jan 2024", True),
        ("January 3rd, 2024", True),
        ("Wed, 3 Jan 2024 10:00", True),
        ("Jan 2024", True),
        ("23:59:59.5", True),
        ("10:30 pm", True),
        ("2024-01-31 12:00:00+01:00", True),
        ("45/45/2024", False),
        ("2024-13-40", False),
        ("1.2.3", False),
        ("1/2", False),
        ("12", False),
        ("May", False),
        ("10-20", False),
        ("", False),
    ],
)
def test_dates_are_known_by_their_form(text, expected):
    assert is_date(text) == expected


# ---- labels ----


def test_a_class_that_only_the_held_out_part_has_is_known_and_told(write):
    path = write(
        "a,y\n" + "".join(f"{i},{'r' if i == 7 else 'uv'[i % 2]}\n" for i in range(40))
    )
    for seed in range(12):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            train, test = table_split(
                path,
                "y",
                0.2,
                seed=seed,
            )
        assert train.schema.classes == ("r", "u", "v")
        assert len(told) == (0 not in train.arrays.targets)
        if told:
            assert "no training row has the label 'r'" in str(told[0].message)
            assert "line 9" in str(told[0].message)
            assert 0 in test.arrays.targets
            assert told[0].filename == __file__


def test_another_tables_unknown_class_can_be_corrected_left_out_or_trained_on(write):
    train = "a,y\n1,u\n2,v\n"
    schema = table(write(train), "y").schema
    with pytest.raises(DataError, match="'w' is not among the labels") as caught:
        table(write("a,y\n1,u\n3,w\n", "test.csv"), "y", schema=schema)
    assert "put rows with this label into the training table" in caught.value.remedy
    wider = table(write(train + "3,w\n"), "y").schema
    assert table(
        write("a,y\n1,u\n3,w\n", "test.csv"), "y", schema=wider
    ).arrays.targets.tolist() == [0, 2]


def test_the_kind_of_the_label_can_be_set(write):
    few = write("a,y\n" + "".join(f"{i},{i % 5}\n" for i in range(40)))
    assert table(few, "y").schema.classes == ("0", "1", "2", "3", "4")
    quantity = table(few, "y", label_kind="quantity")
    assert quantity.schema.classes is None
    np.testing.assert_array_equal(
        quantity.arrays.targets,
        np.arange(40, dtype=np.float32) % 5,
        strict=True,
    )
    many = write("a,y\n" + "".join(f"{i},{i / 2}\n" for i in range(40)))
    assert table(many, "y").schema.classes is None
    assert len(table(many, "y", label_kind="classes").schema.classes) == 40
    comma = table(write(column(range(30), label=lambda i: f'"{i},5"')), "y")
    np.testing.assert_array_equal(comma.arrays.targets, np.arange(30) + np.float32(0.5))
    words = write("a,y\n" + "".join(f"{i},{'uv'[i % 2]}\n" for i in range(40)))
    with pytest.raises(
        DataError, match="'u' is one of 2 distinct labels that are no numbers"
    ) as caught:
        table(words, "y", label_kind="quantity")
    assert "`label_kind`" in caught.value.remedy
    assert table(words, "y", label_kind="classes").schema.classes == ("u", "v")
    with pytest.raises(DataError, match="did you mean 'quantity'"):
        table(few, "y", label_kind="quantty")
    with pytest.raises(DataError, match="named in `categorical`"):
        table(
            few,
            "y",
            label_kind="quantity",
            categorical=["y"],
        )


# ---- files ----


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("quoted", [False, True])
def test_the_delimiter_is_found(separator, quoted, write):
    cell = (lambda text: f'"{text}"') if quoted else str
    others = " and ".join({",", ";", "|"} - {separator}) if quoted else "plain"
    lines = [
        ["a", "b", "y"],
        *[[i, f"{others} {i % 3}", "uv"[i % 2]] for i in range(30)],
    ]
    text = "".join(separator.join(cell(each) for each in line) + "\n" for line in lines)
    for content in (
        text,
        text.encode("utf-16"),
        b"\xef\xbb\xbf" + text.encode(),
        text.replace("\n", "\r\n"),
    ):
        read = table(write(content), "y")
        assert values(read) == list(range(30))
        assert read.schema.vocabularies == (tuple(f"{others} {i}" for i in range(3)),)
        assert read.arrays.targets.tolist() == [0, 1] * 15
    assert (
        table(
            write(text),
            "y",
            delimiter="tab" if separator == "\t" else separator,
        ).schema
        == read.schema
    )


def test_a_delimiter_that_excel_names_or_a_person(write):
    assert values(table(write("sep=;\na;b;y\n1;p;u\n2;q;v\n"), "y")) == [1, 2]
    text = "a:b:y\n1:p:u\n2:q:v\n"
    with pytest.raises(DataError, match="no label column 'y'") as caught:
        table(write(text), "y")
    assert "`delimiter`" in caught.value.remedy
    assert values(table(write(text), "y", delimiter=":")) == [1, 2]
    with pytest.raises(DataError, match="not one character"):
        table(write(text), "y", delimiter="::")
    with pytest.raises(DataError) as caught:
        table(write("a;b;y\n1;p;u\n2;q;v\n"), "y", delimiter="|")
    assert "correct `delimiter`" in caught.value.remedy
    # of a label that is nowhere the columns are listed as they are
    with pytest.raises(DataError, match="did you mean 'label'") as caught:
        table(write("a;b;label\n1;p;u\n2;q;v\n"), "lable")
    assert "name one of a, b, label" in caught.value.remedy


@pytest.mark.parametrize(
    ("content", "what", "remedy"),
    [
        ("a,y\n1,ü\n2,v\n".encode("utf-16-le"), "zero bytes", "utf-16le"),
        (b"PK\x03\x04...", "xlsx", "as a CSV"),
        (b"PAR1...", "Parquet", "as a CSV"),
        (b"a,y\n1,\x80\n", "0x80", "cp1252"),
        (b"a,y\n1,\xe9\n", "0xe9", "latin1"),
        (b"a,y\nr1,1,u\nr2,2,v\n", "expected 2 cells, found 3", "row names"),
        (b"\n\n", "empty", "header"),
        (b'a,y\n"1,u\n2,v\n', "not CSV", "close every quote"),
        (b"\xff\xfea", "0x61", "cut short"),
    ],
)
def test_files_that_are_no_csv_say_what_they_are(content, what, remedy, write):
    with pytest.raises(DataError, match=what) as caught:
        table(write(content), "y")
    assert remedy in caught.value.remedy
    assert ("quote" in caught.value.remedy) == ("quote" in remedy)


# ---- remedies name what can be set where one is ----

FAULTS = [
    column([f"{i}" if i % 7 else "none" for i in range(40)]),
    column([f"{i * 997:,}" for i in range(30)]),
    column([f"2024-01-{1 + i % 28:02d}" for i in range(60)]),
    column([f"{i} kg" for i in range(60)]),
    column([f"{i}" if i else "x" for i in range(60)]),
    "a,y\n1,\n2,u\n3,v\n",
    "a:y\n1:2\n",
    "a,y\n1,1\n2,1\n",
    column(range(30), label=lambda i: f'"{i * 997:,}"'),
    column(range(30), label=lambda i: f"{i}" if i else "good"),
]


@pytest.mark.parametrize(
    "function",
    [csv_mlp.recipe, logistic.recipe, two_tower.recipe],
    ids=["csv_mlp", "logistic", "two_tower"],
)
@pytest.mark.parametrize(
    "text",
    FAULTS,
    ids=range(len(FAULTS)),
)
def test_remedies_name_only_settings_that_the_recipe_has(function, text, write):
    path = write(text)
    own = inspect.signature(function).parameters
    names = {"label": "y"}
    if function is two_tower.recipe:
        path = write(
            "\n".join(
                f"u{i}," * bool(i) + "user," * (not i) + line
                for i, line in enumerate(text.splitlines())
            )
        )
        names = {"user": "user", "item": "a", "rating": "y"}
    try:
        function(data=path, **names)
    except LeptonError as error:
        assert set(re.findall(r"`(\w+)`", error.remedy)) <= own.keys(), error
    assert (
        function is two_tower.recipe or {"ignore", "missing", "delimiter"} <= own.keys()
    )
    assert function is not csv_mlp.recipe or own.keys() >= set(SETTINGS)


@pytest.mark.parametrize(
    ("cells", "settings"),
    [
        ([f"{i}" if i % 7 else "none" for i in range(40)], {"missing": "NA,none"}),
        ([f"{i}" if i % 7 else "-" for i in range(40)], {"missing": "?,-"}),
        ([f"{i * 997:,}" for i in range(40)], {"thousands": ","}),
        ([f"{i * 997:,}" for i in range(40)], {"decimal": ","}),
        ([f"{i} kg" for i in range(40)], {"categorical": "a"}),
        ([f"{i} kg" for i in range(40)], {"ignore": "a"}),
    ],
)
def test_each_remedy_can_be_followed_in_csv_mlp(cells, settings, write):
    path = write(
        "b,"
        + "\n".join(
            f"{i}," * bool(i) + line
            for i, line in enumerate(column(cells).splitlines())
        )
        + "\n"
    )
    with pytest.raises(DataError) as caught:
        csv_mlp.recipe(data=path, label="y")
    assert f"`{next(iter(settings))}`" in caught.value.remedy
    assert "types=" not in caught.value.remedy
    recipe = csv_mlp.recipe(
        data=path,
        label="y",
        **settings,
    )
    assert len(recipe.train) == 32
    assert len(recipe.test) == 8


def test_csv_mlp_takes_a_label_for_a_quantity_where_it_is_told_to(write):
    path = Path(write("a,y\n" + "".join(f"{i},{i % 5}\n" for i in range(40))))
    assert "accuracy" in csv_mlp.recipe(data=path, label="y").metrics
    recipe = csv_mlp.recipe(
        data=path,
        label="y",
        label_kind="quantity",
    )
    assert "rmse" in recipe.metrics
    assert recipe.train.targets.dtype == np.float32
    recipe = csv_mlp.recipe(
        data=path,
        label="y",
        test=path,
        label_kind="quantity",
    )
    assert recipe.test.targets.tolist() == [i % 5 for i in range(40)]
