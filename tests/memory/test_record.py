from __future__ import annotations

import json

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from pantheraml.errors import DataError, StorageError
from pantheraml.memory.record import DEEPEST, LONGEST_INT, content_hash, from_bytes, to_bytes

TEXT = st.text(st.characters(exclude_categories=())) | st.text()  # lone surrogates too
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << LONGEST_INT) + 1, (1 << LONGEST_INT) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXT, inner, max_size=5),
    max_leaves=20,
)


def kinds(value):
    """The value with its types and the order of its members: 1, 1.0 and True are equal in Python."""
    if isinstance(value, dict):
        return [(name, kinds(each)) for name, each in value.items()]
    return [kinds(each) for each in value] if isinstance(value, list) else (type(value), repr(value))


@given(TEXT)
def test_text_comes_back(text):
    form, data = to_bytes(text)
    assert form == "text" and from_bytes(form, data) == text


@given(st.binary())
def test_bytes_come_back(data):
    assert to_bytes(data) == to_bytes(memoryview(data)) == to_bytes(bytearray(data)) == ("bytes", data)
    assert from_bytes("bytes", data) == data


@given(VALUES.filter(lambda value: not isinstance(value, str)))
def test_json_comes_back_with_its_types_and_its_order(value):
    form, data = to_bytes(value)
    assert form == "json" and kinds(from_bytes(form, data)) == kinds(value)
    assert kinds(json.loads(data.decode("utf-8", "surrogatepass"))) == kinds(value)


def test_json_is_written_without_spaces_or_escapes():
    assert to_bytes({"b": [1, 2.5, None], "a": "é"})[1] == '{"b":[1,2.5,null],"a":"é"}'.encode()


def nested(levels):
    value = []
    for _ in range(levels - 1):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"a": [1, float("nan")]}, "content.a[1] is nan"),
        ([{"b": float("-inf")}], "content[0].b is -inf"),
        ({"a": {1: 2}}, "content.a has the key 1"),
        ((1, 2), "content is a tuple"),
        ({"when": {"day": object()}}, "content.when.day is a object"),
        ([1 << LONGEST_INT], "content[0] is a number of 14,001 bits"),
        (nested(DEEPEST + 1), f"... is more than {DEEPEST} levels deep"),
    ],
)
def test_what_json_cannot_say_is_refused_with_its_place(value, said):
    with pytest.raises(DataError) as error:
        to_bytes(value)
    assert said in error.value.what


def test_as_deep_as_promised():
    assert from_bytes(*to_bytes(nested(DEEPEST))) == nested(DEEPEST)


def test_a_value_within_itself_is_refused():
    loop: list = []
    loop.append(loop)
    with pytest.raises(DataError, match="levels deep"):
        to_bytes(loop)


@pytest.mark.parametrize(
    ("form", "data", "said"),
    [
        ("text", b"\xff", "1 bytes are not UTF-8"),
        ("json", b"{", "1 bytes are not JSON"),
        ("json", b"[" * 100_000, "100000 bytes are not JSON"),
    ],
)
def test_bytes_that_are_no_content_are_refused(form, data, said):
    with pytest.raises(StorageError) as error:
        from_bytes(form, data)
    assert error.value.what == said


def test_the_hash_tells_the_forms_apart():
    assert content_hash("text", b"1") == blake3(b"\x001").digest()
    assert len({content_hash("text", b"1"), content_hash("bytes", b"1"), content_hash("json", b"1")}) == 3
