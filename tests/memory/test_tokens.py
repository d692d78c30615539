"""Any bytes as tokens, and back."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.memory.models import tokens as byte_tokens
from tokenizers import Tokenizer, models, pre_tokenizers

from pantheraml.errors import RecipeError, StorageError
from pantheraml.memory.tokens import END, Tokens, train_tokenizer

TEXT = "def area(width, height):\n    return width * height\n\nWidth and height are numbers; the area is their product. größer, 中文, 🙂\n"


@lru_cache
def trained() -> Tokens:
    return Tokens.of(train_tokenizer([TEXT] * 20, 320), begin=0, vocabulary=330)


def check_back(tokens: Tokens, contents: list[bytes]) -> list[np.ndarray]:
    encoded = tokens.encode(contents)
    for content, each in zip(contents, encoded, strict=True):
        assert each.dtype == np.int32
        assert tokens.decode(each.tolist()) == content
        assert all(tokens.table[token] for token in each.tolist()), "each says something, so that decoding comes to an end"
    return encoded


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.one_of(st.binary(max_size=60), st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass"))), max_size=4)
)
def test_any_bytes_come_back(contents):
    check_back(trained(), contents)
    check_back(byte_tokens(), contents)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        bytes(range(256)),
        b"\xed\xa0\x80 a lone surrogate \xed\xb0\x80",
        b"\xf0\x9f\x99",  # a character that is cut off
        TEXT.encode("utf-16"),
        f"{END} is a name here {END}{END}".encode(),
        "e\u0301 and \u00e9, \u212b and \u00c5: nothing is normalised".encode(),
        b" leading, trailing \r\n\t\x00 ",
    ],
)
def test_what_tokenizers_stumble_over_comes_back(content):
    check_back(trained(), [content, content + TEXT.encode() + content])


def test_text_like_that_of_its_training_takes_few_tokens_and_other_bytes_one_each():
    text, noise = check_back(trained(), [TEXT.encode(), b"\xff\xfe\x80" * 20])
    assert len(text) < 0.5 * len(TEXT.encode())
    assert len(noise) == 60


def test_a_tokenizer_that_changes_text_costs_tokens_and_not_bytes():
    tokenizer = train_tokenizer([TEXT] * 20, 320)
    from tokenizers import normalizers

    tokenizer.normalizer = normalizers.Lowercase()
    tokens = Tokens.of(tokenizer, begin=0)
    changed, same = check_back(tokens, [b"WIDTH", b"width"])
    assert len(changed) == 5
    assert len(same) < 5


def test_the_table_of_gpt2_letters_is_that_of_tokenizers():
    # What the library itself makes of all bytes that are characters.
    tokenizer = train_tokenizer(["x"], 257)
    tokens = Tokens.of(tokenizer, begin=0)
    for code in (*range(0x250), 0x4E2D, 0x1F642):
        ids = tokenizer.encode(chr(code), add_special_tokens=False).ids
        assert tokens.decode(ids) == chr(code).encode()


def test_arrays_bring_all_of_it_back_and_decoding_needs_no_tokenizer(monkeypatch):
    tokens = trained()
    arrays = tokens.to_arrays()
    again = Tokens.from_arrays(arrays)
    assert (again.table, again.begin) == (tokens.table, 0)
    assert len(again) == 330, "the model may have more tokens than the tokenizer"
    encoded = check_back(again, [TEXT.encode()])[0]
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    assert Tokens.from_arrays(arrays).decode(encoded.tolist()) == TEXT.encode()


def test_damaged_arrays_are_refused():
    arrays = trained().to_arrays()
    for name, value in (
        ("tokens.bytes", arrays["tokens.bytes"][:-1]),
        ("tokens.lengths", arrays["tokens.lengths"][:0]),
        ("tokens.begin", np.array([400], np.int32)),
        ("tokens.spec", arrays["tokens.spec"][::-1]),
    ):
        with pytest.raises(StorageError, match="tokens of a model"):
            Tokens.from_arrays({**arrays, name: value})
    with pytest.raises(StorageError):
        Tokens.from_arrays({})


def test_tokenizers_that_cannot_hold_all_bytes_are_refused_with_a_reason():
    words = Tokenizer(models.WordLevel(vocab={"a": 0, "?": 1}, unk_token="?"))
    with pytest.raises(RecipeError, match="tokenizer") as error:
        Tokens.of(words, begin=0)
    assert "WordLevel" in error.value.why
    few = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    few.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    from tokenizers import decoders

    few.decoder = decoders.ByteLevel()
    with pytest.raises(RecipeError) as error:
        Tokens.of(few, begin=0)
    assert "254 of the 256 bytes" in error.value.why
