from __future__ import annotations

import gzip

import numpy as np
import pytest

from lepton_jax.data.table import BINS, Schema, table, table_split
from lepton_jax.errors import DataError

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
    np.testing.assert_array_equal(read.arrays.inputs["numbers"], [[39, 1.5], [50, np.nan], [38, 3], [np.nan, -4]])
    np.testing.assert_array_equal(read.arrays.inputs["categories"], [[2], [1], [0], [2]])
    np.testing.assert_array_equal(read.arrays.targets, np.array([0, 1, 1, 0], np.int32), strict=True)
    schema = read.schema
    assert (schema.numbers, schema.categories, schema.classes) == (("age", "pay"), ("job",), ("F", "M"))
    assert schema.vocabularies == (("boss", "clerk"),) and schema.sizes == (3,)
    assert [(edges[0], edges[-1]) for edges in schema.edges] == [(38, 50), (-4, 3)]


@pytest.mark.parametrize("encode", [lambda t: b"\xef\xbb\xbf" + t, gzip.compress,
                                    lambda t: t.replace(b"\n", b"\r\n"), lambda t: t.rstrip()])
def test_other_encodings_of_the_same_table(write, encode):
    plain, other = table(write(PEOPLE), "sex"), table(write(encode(PEOPLE.encode()), "other"), "sex")
    assert other.schema == plain.schema
    np.testing.assert_array_equal(other.arrays.inputs["numbers"], plain.arrays.inputs["numbers"])


def test_a_test_table_is_encoded_as_the_training_table_was(write):
    train = table(write(PEOPLE), "sex")
    schema = Schema.from_json(train.schema.to_json())
    assert schema == train.schema
    text = "sex,extra,job,pay,age\nM,1,pilot,NA,1e3\nM,1, clerk,0,2\n"
    test = table(write(text, "test.csv"), "sex", schema=schema)
    np.testing.assert_array_equal(test.arrays.inputs["numbers"], [[1000, np.nan], [2, 0]])
    np.testing.assert_array_equal(test.arrays.inputs["categories"], [[0], [2]])
    np.testing.assert_array_equal(test.arrays.targets, [1, 1])
    assert test.schema is schema


def test_a_block_without_columns_is_left_out(write):
    assert set(table(write("a,y\n1,u\n2,v\n"), "y").arrays.inputs) == {"numbers"}
    assert set(table(write("a,y\n1,u\n2,v\n"), "y", categorical=["a"]).arrays.inputs) == {"categories"}
    assert set(table(write("a,y\n?,u\n,v\n"), "y").arrays.inputs) == {"categories"}


def test_quoted_cells_with_commas_and_newlines(write):
    read = table(write('a,y\n"Smith, J.",1\n"two\nlines", 0\n"say ""hi""",1\n'), "y")
    assert read.schema.vocabularies == (('Smith, J.', 'say "hi"', "two\nlines"),)
    with pytest.raises(DataError, match="expected 2 cells, found 1") as caught:
        table(write('a,y\n"two\nlines",0\n7\n'), "y")
    assert caught.value.where.endswith("line 4")


def test_a_column_is_numeric_from_nine_tenths_on(write):
    def text(bad):
        return "a,b,y\n" + "".join(f"{'x' if i < bad else i},{i},{i % 2}\n" for i in range(20))

    assert table(write(text(3)), "y").schema.categories == ("a",)
    with pytest.raises(DataError, match="'x' is not a finite number") as caught:
        table(write(text(2)), "y")
    assert caught.value.where.endswith("t.csv, line 2, column 'a'") and "categorical" in caught.value.remedy
    assert table(write(text(2)), "y", categorical=("a",)).schema.categories == ("a",)
    assert table(write(text(2)), "y", missing=("x",)).schema.numbers == ("a", "b")


@pytest.mark.parametrize("cell", ["inf", "1_000", "1e39", "NAN", "0x10"])
def test_cells_that_are_no_numbers(write, cell):
    numbers = "".join(f"{i},{i % 2}\n" for i in range(30))
    with pytest.raises(DataError, match="not a finite number"):
        table(write(f"a,y\n{numbers}{cell},1\n"), "y")


def test_labels_are_ordered_as_numbers_or_are_a_quantity(write):
    few = table(write("a,y\n" + "".join(f"1,{i % 12}\n" for i in range(40))), "y")
    assert few.schema.classes == tuple(map(str, range(12))) and few.arrays.targets.max() == 11
    many = write("a,y\n" + "".join(f"1,{i / 2}\n" for i in range(21)))
    assert table(many, "y").schema.classes is None
    np.testing.assert_array_equal(table(many, "y").arrays.targets, np.arange(21, dtype=np.float32) / 2, strict=True)
    assert len(table(many, "y", categorical=["y"]).schema.classes) == 21
    test = table(write("a,y\n1,-7\n", "test.csv"), "y", schema=table(many, "y").schema)
    assert test.arrays.targets[0] == -7


def test_edges_are_quantiles_and_frequent_values_get_one_each(write):
    rows = [0] * 900 + list(range(1000, 1100))
    edges = table(write("a,y\n" + "".join(f"{x},{x % 2}\n" for x in rows)), "y").schema.edges[0]
    assert edges[0] == 0 and edges[1] == 1000 and edges[-1] == 1099 and len(edges) == BINS + 1
    assert np.all(np.diff(edges) > 0) and edges[len(edges) // 2] == pytest.approx(1050, abs=2)
    # Neighbours in float32 must not become bins of no width.
    close = "a,y\n" + "".join(f"{1e8 + i},{i % 2}\n" for i in range(40))
    assert np.all(np.diff(np.float32(table(write(close), "y").schema.edges[0])) > 0)
    assert table(write("a,y\n5,u\n5,v\n"), "y").schema.edges == ((5.0,),)


def test_a_split_is_fitted_on_its_training_rows_alone(write):
    rows = [(i, f"c{i}", "uv"[i % 2]) for i in range(100)]
    path = write("n,c,y\n" + "".join(f"{n},{c},{y}\n" for n, c, y in rows))
    train, test = table_split(path, "y", 0.3, seed=0)
    assert (len(train.arrays), len(test.arrays)) == (70, 30) and train.schema == test.schema
    assert not test.arrays.inputs["categories"].any() and train.arrays.inputs["categories"].all()
    numbers = train.arrays.inputs["numbers"]
    assert (train.schema.edges[0][0], train.schema.edges[0][-1]) == (numbers.min(), numbers.max())
    both = np.concatenate([numbers, test.arrays.inputs["numbers"]]).ravel()
    assert sorted(both) == list(range(100))
    np.testing.assert_array_equal(test.arrays.targets, test.arrays.inputs["numbers"][:, 0] % 2)


def test_a_split_names_the_line_in_the_file(write):
    path = write("a,y\n" + "".join(f"{'x' if i == 37 else i},{i % 2}\n" for i in range(60)))
    for seed in range(4):
        with pytest.raises(DataError, match="'x'") as caught:
            table_split(path, "y", 0.5, seed=seed)
        assert "line 39," in caught.value.where


@pytest.mark.parametrize(("text", "where", "message"), [
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
])
def test_faulty_files(write, text, where, message):
    with pytest.raises(DataError, match=message) as caught:
        table(write(text), "y")
    assert caught.value.where.endswith(where)


def test_faulty_test_tables(write):
    schema = table(write("a,b,y\n1,u,<=50K\n2,v,>50K\n"), "y").schema
    with pytest.raises(DataError, match=r"'<=50K\.' is not among.*mean '<=50K'") as caught:
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
