"""Streams, stop strings, and texts to tokens and back."""

import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import lepton_jax as lepton
from lepton_jax.generation import Characters
from lepton_jax.generation.codec import Codec
from lepton_jax.generation.text import RowText

pytestmark = pytest.mark.usefixtures("quick_compilation")

ALPHABET = "abcdefghijklm"


class Bytes:
    """UTF-8 bytes as tokens; a character is complete with its last byte."""

    def encode(self, text):
        return list(text.encode())

    def decode(self, tokens):
        return bytes(tokens).decode(errors="replace")


@pytest.fixture(scope="module")
def model():
    return lepton.models.TransformerLM(16, dim=16, layers=1, heads=2, rngs=nnx.Rngs(3))


def test_a_stream_joined_is_what_comes_at_once(model):
    how = {"tokens": 40, "temperature": 1.0, "tokenizer": Characters(ALPHABET)}
    prompts = ["abc", "m"]
    whole = lepton.generate(model, prompts, **how)
    pieces = list(lepton.generate(model, prompts, stream=True, **how))
    assert len(pieces) > len(prompts)
    for number, row in enumerate(whole):
        own = [piece for piece in pieces if piece.row == number]
        assert "".join(piece.text for piece in own) == row.text
        assert [t for piece in own for t in piece.tokens] == row.tokens.tolist()
        assert [piece.reason for piece in own][-1] == "length"
        assert {piece.reason for piece in own[:-1]} == {None}
        # 13 of the head's 16 tokens have a character
        assert set(row.text) <= set(ALPHABET)


def test_a_stop_string_ends_its_own_row_and_is_not_in_the_text(model):
    how = {"tokens": 60, "temperature": 1.0, "tokenizer": Characters(ALPHABET)}
    prompts = ["abc", "m"]
    whole = lepton.generate(model, prompts, **how)
    stop = whole[0].text[37:39]
    stopped = lepton.generate(model, prompts, stop=stop, **how)
    for row, cut in zip(whole, stopped, strict=True):
        place = row.text.find(stop)
        if place < 0:
            assert cut.text == row.text and cut.reason == "length"
            continue
        assert cut.text == row.text[:place] and cut.reason == "stop"
        assert len(cut.tokens) == place + len(stop)


@settings(max_examples=100, deadline=None)
@given(
    text=st.text("ab€😀", max_size=12),
    stops=st.lists(st.text("ab€😀", min_size=1, max_size=3), max_size=2),
    cuts=st.lists(st.integers(1, 5), max_size=50),
)
def test_pieces_never_take_back_a_character_wherever_the_bytes_are_cut(
    text, stops, cuts
):
    tokens = list(text.encode())
    row = RowText(Codec(Bytes()), [], stops)
    shown = ""
    while tokens and not row.stopped:
        size = cuts.pop() if cuts else len(tokens)
        new, tokens = tokens[:size], tokens[size:]
        shown += row.add(new, last=not tokens)
        assert text.startswith(shown)

    expected, count = cut_by_hand(text, stops)
    assert shown == row.text == expected
    assert row.stopped == (count is not None)
    assert row.count == (len(text.encode()) if count is None else count)


def cut_by_hand(text, stops):
    """The text before the first stop string that is complete, and its bytes so far."""
    for end in range(1, len(text) + 1):
        places = [text[:end].find(stop) for stop in stops if stop in text[:end]]
        if places:
            return text[: min(places)], len(text[:end].encode())
    return text, None


def test_a_piece_keeps_the_space_that_a_tokenizer_drops_at_a_begin():
    class Words:
        """As SentencePiece, whose texts lose the first piece's space."""

        words = ("\N{LOWER ONE EIGHTH BLOCK}a", "\N{LOWER ONE EIGHTH BLOCK}b", "c")

        def encode(self, text):
            return [0]

        def decode(self, tokens):
            joined = "".join(self.words[token] for token in tokens)
            return joined.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").removeprefix(" ")

    codec = Codec(Words())
    assert codec.decode([1, 2]) == "bc"
    assert codec.text_after([0], [1, 2]) == " bc"


def test_a_character_that_training_never_saw_is_named(model):
    with pytest.raises(lepton.DataError, match="'z' is no character"):
        lepton.generate(model, "abz", tokenizer=Characters(ALPHABET))
