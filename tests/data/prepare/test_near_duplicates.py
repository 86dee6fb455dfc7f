from __future__ import annotations

from itertools import pairwise

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stepping import applied, cut, existing, fitted, row_numbers, rows  # noqa: F401

from lepton_jax.data.prepare import NearDuplicates
from lepton_jax.data.prepare.steps.minhash import choose_bands
from lepton_jax.data.readers import ROW, SOURCE
from lepton_jax.errors import DataError


def shingle_set(text: str, size: int, of: str) -> set:
    plain = " ".join(text.lower().split())
    units = plain.split() if of == "words" else list(plain)
    if not units:
        return set()
    count = max(len(units) - size + 1, 1)
    return {tuple(units[at : at + size]) for at in range(count)}


def jaccard(one: str, other: str, size: int = 5, of: str = "characters") -> float:
    a = shingle_set(one, size, of)
    b = shingle_set(other, size, of)
    return len(a & b) / len(a | b) if a | b else 0.0


BASE = "the quick brown fox jumps over the lazy dog and runs into the dark wood"


def test_an_alike_row_is_dropped_and_its_note_gives_the_partner_and_the_likeness():
    edited = BASE.replace("dark", "deep")
    table = rows(
        {"text": [BASE, "something else", BASE.upper(), edited, None, "", "?"]}
    )
    kept, notes = applied(NearDuplicates("text", threshold=0.7), table)
    assert row_numbers(kept) == [0, 1, 4, 5, 6]
    expected = [
        (2, 0, "near duplicate: likeness 1.000"),
        (3, 0, f"near duplicate: likeness {jaccard(BASE, edited):.3f}"),
    ]
    assert notes.select(ROW, "partner_row", "reason").rows() == expected


def test_a_row_alike_only_to_a_dropped_one_stays():
    words = BASE.split()
    texts = [" ".join(words[at : at + 12]) for at in range(3)]
    near = [jaccard(*pair) for pair in pairwise(texts)]
    assert min(near) > 0.75 > jaccard(texts[0], texts[2])
    kept, notes = applied(NearDuplicates("text", threshold=0.75), rows({"text": texts}))
    assert row_numbers(kept) == [0, 2]
    assert notes["partner_row"].to_list() == [0]


def test_words_and_their_order_count_when_shingles_are_of_words():
    table = rows({"text": ["a b c d e f", "A, b. c d e; f!", "f e d c b a"]})
    step = NearDuplicates("text", of="words", size=2)
    kept, notes = applied(step, table)
    assert row_numbers(kept) == [0, 2]
    assert "1.000" in notes["reason"][0]


def edited_texts(seed: int, count: int) -> list[str]:
    """Return texts of 40 words, and copies of each with some words exchanged."""
    random = np.random.default_rng(seed)
    letters = random.integers(97, 123, (3000, 9)).astype(np.uint8)
    lengths = random.integers(2, 10, 3000)
    known = [
        bytes(word[:size]).decode() for word, size in zip(letters, lengths, strict=True)
    ]
    texts = []
    for _ in range(count):
        words = list(random.choice(known, 40))
        texts.append(" ".join(words))
        changes = random.integers(0, 8)
        for place in random.integers(0, 40, changes):
            words[place] = str(random.choice(known))
        texts.append(" ".join(words))
    return texts


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 50),
    st.lists(st.integers(0, 100), max_size=3),
    st.randoms(use_true_random=False),
)
def test_pieces_in_any_order_and_grouping_give_the_same_rows(seed, bounds, random):
    table = rows({"text": edited_texts(seed, 10)}).sample(20, shuffle=True, seed=seed)
    step = NearDuplicates("text", permutations=64)
    partials = [step.partial(piece.lazy()).collect() for piece in cut(table, bounds)]
    random.shuffle(partials)
    state = step.finish(step.merge([step.merge(partials[:1]), *partials[1:]]))
    assert state.equals(fitted(step, [table.sort(ROW)]))
    kept, notes = applied(step, table, state)
    assert len(kept) + len(notes) == len(table)
    assert applied(step, kept)[0].equals(kept)
    text = dict(zip(table[ROW], table["text"], strict=True))
    left = set(row_numbers(kept))
    for row, partner in notes.select(ROW, "partner_row").rows():
        assert partner in left and partner < row
        assert jaccard(text[row], text[partner]) >= 0.8
    # what stays is not alike to an earlier row that stays
    for row in left:
        assert all(jaccard(text[row], text[o]) < 0.8 for o in left if o < row)


def test_rows_alike_to_those_of_an_existing_set_are_dropped(existing):  # noqa: F811
    existing({"text": ["nothing like it", BASE, BASE + "s"]})
    table = rows({"text": ["first of all", BASE + "."]}, source=3)
    step = NearDuplicates("text", existing="published.csv")
    kept, notes = applied(step, table)
    assert row_numbers(kept) == [0]
    assert notes.select(SOURCE, "partner_source", "partner_row").rows() == [
        (3, None, 1)
    ]
    assert notes["reason"][0].endswith("of a row of published.csv")


def test_longer_bands_are_chosen_until_too_few_pairs_would_be_found():
    for threshold, recall in [(0.5, 0.9), (0.8, 0.99), (0.9, 0.999), (1.0, 0.9)]:
        bands, length = choose_bands(threshold, recall, 128)
        assert 1 - (1 - threshold**length) ** bands >= recall
        longer = 1 - (1 - threshold ** (length + 1)) ** (128 // (length + 1))
        assert longer < recall or length == 128
    assert choose_bands(0.1, 0.99, 8) is None
    schema = rows({"text": ["a"]}).schema
    with pytest.raises(DataError, match="8 permutations"):
        NearDuplicates("text", threshold=0.1, permutations=8).check(schema)


def test_most_pairs_at_the_threshold_and_nearly_all_above_it_are_found():
    texts = edited_texts(seed=1, count=500)
    table = rows({"text": texts})
    _, notes = applied(NearDuplicates("text", threshold=0.7), table)
    found = set(notes[ROW].to_list())
    pairs = list(pairwise(texts))[::2]
    alike = {2 * at + 1 for at, pair in enumerate(pairs) if jaccard(*pair) >= 0.7}
    assert len(alike) > 200
    assert found <= alike
    assert len(found) >= 0.98 * len(alike)


def test_many_equal_texts_are_quick():
    table = rows({"text": [BASE] * 5_000})
    kept, notes = applied(NearDuplicates("text", permutations=32), table)
    assert row_numbers(kept) == [0]
    assert notes["partner_row"].unique().to_list() == [0]


def test_wrong_arguments_are_errors():
    schema = pl.Schema({"text": pl.String(), "n": pl.Int64()})
    for step in (
        NearDuplicates("n"),
        NearDuplicates("text", threshold=0),
        NearDuplicates("text", of="letters"),
        NearDuplicates("text", recall=1.0),
        NearDuplicates("text", size=0),
    ):
        with pytest.raises(DataError):
            step.check(schema)
