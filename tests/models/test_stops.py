"""Text that comes piece by piece: whole characters, no part of a stop string, and in the end the whole text."""

from __future__ import annotations

import random
from typing import Any

import pytest

from pantheraml.models.stops import Text

WORDS = "Grüße aus Köln 🐆🦁, 日本語 — naïve café; ñandú"


def pieces(text: Text, tokens: list[int]) -> list[str]:
    found = []
    for token in tokens:
        found.append(text.add(token))
        if text.stopped:
            return found
    return [*found, text.rest()]


def test_no_piece_has_half_a_character(tokenizer: Any) -> None:
    text = Text(tokenizer)
    found = pieces(text, tokenizer.encode(WORDS))  # a token for each byte
    assert "".join(found) == text.text == WORDS
    assert "\ufffd" not in "".join(found)
    assert len([piece for piece in found if piece]) == len(WORDS)  # nothing waits longer than it must


@pytest.mark.parametrize("stop", ["🦁", "日本", " — ", "caf", "é; ñ", "ß"])
def test_the_text_ends_before_a_stop_string_wherever_tokens_end(stop: str, tokenizer: Any) -> None:
    text = Text(tokenizer, [stop, "never there"])
    found = pieces(text, tokenizer.encode(WORDS))
    assert text.stopped
    assert "".join(found) == text.text == WORDS[: WORDS.index(stop)]


def test_what_may_begin_a_stop_string_is_held_back_and_given_when_it_does_not(tokenizer: Any) -> None:
    text = Text(tokenizer, ["abcd"])
    assert [text.add(token) for token in tokenizer.encode("xabcab")] == ["x", "", "", "", "abc", ""]
    assert text.add(*tokenizer.encode("c")) == ""
    assert text.rest() == "abc"
    assert text.text == "xabcabc" and not text.stopped


def test_the_first_of_several_stop_strings_counts(tokenizer: Any) -> None:
    text = Text(tokenizer, ["cd", "bcde", "b"])
    assert "".join(pieces(text, tokenizer.encode("aabcde"))) == "aa"


def test_a_stop_string_that_comes_within_one_token() -> None:
    class Long:
        def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
            return "".join(["one ", "two; three", " four"][token] for token in tokens)

    text = Text(Long(), ["; t"])
    assert [text.add(token) for token in (0, 1)] == ["one ", "two"]
    assert text.stopped


def test_bytes_that_are_no_character_are_given_when_that_is_certain(tokenizer: Any) -> None:
    drawn = random.Random(0)
    for _ in range(50):
        tokens = [drawn.randrange(7, 263) for _ in range(40)]
        text = Text(tokenizer, ["zz"])
        assert "".join(pieces(text, tokens)) == tokenizer.decode(tokens, skip_special_tokens=True)


def test_special_tokens_are_no_text(tokenizer: Any) -> None:
    text = Text(tokenizer)
    found = pieces(text, [3, *tokenizer.encode("a"), 4, 5, *tokenizer.encode("é"), 6])
    assert "".join(found) == "aé"


def test_a_tokenizer_that_writes_the_first_token_of_a_text_differently() -> None:
    """As sentencepiece does: the space before a word is part of its token, and left away at the beginning."""

    class Words:
        def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
            return "".join(f" w{token}" for token in tokens).removeprefix(" ")

    text = Text(Words(), ["w9 w"])
    assert [text.add(token) for token in (1, 2, 3, 9)] == ["w1", " w2", " w3", " "]
    assert text.rest() == "w9"
    assert text.text == "w1 w2 w3 w9"
