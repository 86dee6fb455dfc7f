from __future__ import annotations

import polars as pl
import pytest
from stepping import applied, fitted, rows

from lepton_jax.data import prepare
from lepton_jax.errors import DataError


def test_each_label_has_its_place_whether_text_or_list():
    texts = rows({"tags": ["red; round", "blue", "", None, "red;;red ", "round;blue"]})
    step = prepare.Labels("tags")
    state = fitted(step, [texts])
    assert state.select("value", "count").rows() == [
        ("blue", 2),
        ("red", 2),
        ("round", 2),
    ]
    kept, notes = applied(step, texts, state)
    places = [[0, 1, 1], [1, 0, 0], [0, 0, 0], [0, 1, 0], [1, 0, 1]]
    assert kept["tags"].to_list() == places
    assert notes.select("action", "reason").rows() == [("dropped", "missing")]

    lists = texts.with_columns(pl.col("tags").str.split(";"))
    again, _ = applied(step, lists, state)
    assert again["tags"].to_list() == places


def test_a_label_that_training_did_not_see_is_left_out_with_a_note():
    step = prepare.Labels("tags", separator=",")
    state = fitted(step, [rows({"tags": ["a,b", "b"]})])
    kept, notes = applied(step, rows({"tags": ["b,new", "a"]}), state)
    assert kept["tags"].to_list() == [[0, 1], [1, 0]]
    assert notes.select("action", "reason", "before").rows() == [
        ("changed", "new is no label of the training split: left out", "b, new")
    ]


def test_lists_of_labels_keep_the_laws():
    table = pl.DataFrame({"tags": [["a", "b"], [], None, ["b", None], [" a"]]})
    assert prepare.conformance(prepare.Labels("tags"), table).unlearned is None


def test_what_has_no_label_is_an_error():
    with pytest.raises(DataError, match="no label"):
        fitted(prepare.Labels("tags"), [rows({"tags": [" ", None]})])
    with pytest.raises(DataError, match="lists of labels"):
        prepare.Labels("tags").check(rows({"tags": [1.5]}).schema)
