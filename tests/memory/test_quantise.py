"""Codes are what their definition says, their rows can be read by anyone, and what they lose is measured right."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pantheraml.errors import StorageError
from pantheraml.memory.features import unit
from pantheraml.memory.quantise import (
    CENTROIDS,
    HEAD_BYTES,
    KINDS,
    Book,
    Codes,
    decode,
    encode,
    fidelity,
    from_rows,
    recall,
    scores,
    to_rows,
    train_book,
)

FINITE = st.floats(-1e6, 1e6, width=32)
MATRICES = st.integers(1, 6).flatmap(lambda n: arrays(np.float32, (n, 16), elements=FINITE))


def like_texts(count: int, dimensions: int = 64, seed: int = 0) -> np.ndarray:
    """Unit vectors around a few directions, as embeddings of texts lie."""
    rng = np.random.default_rng(seed)
    middles = rng.standard_normal((20, dimensions))
    return unit((middles[rng.integers(0, 20, count)] + 0.7 * rng.standard_normal((count, dimensions))).astype(np.float32))


@pytest.fixture(scope="module")
def book():
    return train_book(like_texts(1000), 16)


@given(MATRICES)
@settings(max_examples=100, deadline=None)
def test_codes_are_as_near_as_their_kind_allows(vectors):
    largest = np.abs(vectors).max(axis=1, keepdims=True)
    # Half a step of float16: 2**-11 of the number, and below 2**-14 of the largest 2**-25 of that. The scale moves each by as much again.
    exact = decode(encode(vectors, "float16"))
    assert np.all(np.abs(exact - vectors) <= np.abs(vectors) * 2**-10 + largest * 2**-24 + 1e-44)
    assert np.all(np.abs(decode(encode(vectors, "int8")) - vectors) <= largest * 1.01 / 127 + 1e-44)
    binary = decode(encode(vectors, "binary"))
    assert np.array_equal(binary > 0, (vectors > 0) & (binary != 0))


@given(MATRICES)
@settings(max_examples=100, deadline=None)
def test_no_other_scale_comes_nearer(vectors):
    for kind in ("float16", "int8", "binary"):
        codes = encode(vectors, kind)
        error = np.square(decode(codes).astype(np.float64) - vectors).sum(axis=1)
        for factor in (0.99, 1.01):
            other = Codes(codes.kind, codes.scale * np.float32(factor), codes.data)
            assert np.all(error <= np.square(decode(other).astype(np.float64) - vectors).sum(axis=1) * (1 + 1e-4) + 1e-6)


def test_a_vector_of_zeros_stays_one():
    for kind in ("float16", "int8", "binary"):
        codes = encode(np.zeros((2, 16), np.float32), kind)
        assert not decode(codes).any() and not fidelity(codes).any()


@pytest.mark.parametrize("kind", KINDS)
def test_fidelity_is_the_cosine_with_what_was_encoded(kind, book):
    vectors = like_texts(50, seed=1)
    codes = encode(vectors, kind, book)
    decoded = decode(codes, book).astype(np.float64)
    cosine = (decoded * vectors).sum(axis=1) / np.linalg.norm(decoded, axis=1)
    assert fidelity(codes, book) == pytest.approx(cosine, abs=1e-5)
    assert fidelity(codes, book).mean() > {"float16": 0.99999, "int8": 0.9999, "binary": 0.78, "pq": 0.8}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_can_be_read_back_and_by_hand(kind, book):
    vectors = like_texts(5, seed=2)
    codes = encode(vectors, kind, book)
    rows = to_rows(codes)
    sizes = {"float16": 128, "int8": 64, "binary": 8, "pq": 16}
    assert {len(row) for row in rows} == {HEAD_BYTES + sizes[kind]} == {codes.row_bytes}
    again = from_rows(rows)
    assert again.kind == kind and np.array_equal(again.scale, codes.scale) and np.array_equal(again.data, codes.data)
    number, scale = struct.unpack("<Bf", rows[3][:5])
    assert KINDS[number - 1] == kind
    data = rows[3][5:]
    by_hand = {
        "float16": lambda: struct.unpack("<64e", data),
        "int8": lambda: struct.unpack("64b", data),
        "binary": lambda: [1 if data[i // 8] >> (7 - i % 8) & 1 else -1 for i in range(64)],
        "pq": lambda: [float(x) for part, number in enumerate(data) for x in book.centroids[part, number]],
    }[kind]()
    assert decode(codes, book)[3] == pytest.approx(np.array(by_hand) * scale, abs=1e-6)
    assert [to_rows(codes[[i]])[0] for i in range(5)] == rows == to_rows(codes[:3]) + to_rows(codes[3:])


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([b""], "0 bytes"),
        ([b"\x02\x00\x00\x80\x3f"], "data follows"),
        ([b"\x09\x00\x00\x80\x3f\x01"], "kinds are 1 to 4"),
        ([b"\x00\x00\x00\x80\x3f\x01"], "kinds are 1 to 4"),
        ([b"\x02\x00\x00\x80\x3f\x01", b"\x02\x00\x00\x80\x3f\x01\x02"], "the first one has 6 bytes"),
        ([b"\x02\x00\x00\x80\x3f\x01", b"\x03\x00\x00\x80\x3f\x01"], "the first one has 6 bytes and kind 2"),
        ([b"\x01\x00\x00\x80\x3f\x01"], "2 bytes each"),
        ([b"\x02\x00\x00\xc0\x7f\x01"], "not finite"),
    ],
)
def test_rows_that_are_none_are_refused(rows, said):
    with pytest.raises(StorageError) as refused:
        from_rows(rows)
    assert said in str(refused.value)


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=4))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_codes_or_refused(rows):
    try:
        codes = from_rows(rows)
    except StorageError:
        return
    assert len(codes) == len(rows)


def test_arguments_that_make_no_sense_are_refused(book):
    with pytest.raises(ValueError, match="finite"):
        encode(np.array([[np.nan] * 8], np.float32), "int8")
    with pytest.raises(ValueError, match=r"\[N, D\]"):
        encode(np.zeros(8, np.float32), "int8")
    with pytest.raises(ValueError, match="multiple of 8"):
        encode(np.zeros((1, 12), np.float32), "binary")
    with pytest.raises(ValueError, match="needs the book"):
        encode(np.zeros((1, 64), np.float32), "pq")
    with pytest.raises(ValueError, match="64 dimensions, not 32"):
        encode(np.zeros((1, 32), np.float32), "pq", book)
    with pytest.raises(ValueError, match="do not divide"):
        train_book(np.zeros((4, 10), np.float32), 3)
    with pytest.raises(ValueError, match="from 1 to 4"):
        recall(np.zeros((1, 8), np.float32), np.zeros((4, 8), np.float32), "int8", 5)


def test_recall_is_what_counting_by_hand_gives():
    vectors = np.eye(8, dtype=np.float32)
    assert recall(vectors, vectors, "int8", 1) == 1
    # By signs alone each row is its own nearest, and the second nearest of two that differ little is decided otherwise.
    rng = np.random.default_rng(0)
    some = rng.standard_normal((200, 16)).astype(np.float32)
    queries = rng.standard_normal((20, 16)).astype(np.float32)
    exact = np.argsort(-(unit(queries) @ unit(some).T), axis=1)[:, :5]
    signs = np.where(some > 0, 1.0, -1.0) * np.abs(unit(some)).mean(axis=1, keepdims=True)
    found = np.argsort(-(unit(queries) @ signs.T), axis=1)[:, :5]
    by_hand = np.mean([len(set(a) & set(b)) / 5 for a, b in zip(exact.tolist(), found.tolist(), strict=True)])
    assert recall(queries, some, "binary", 5) == pytest.approx(by_hand)


def test_more_bytes_recall_more(book):
    vectors, queries = like_texts(3000, seed=3), like_texts(50, seed=4)
    found = {kind: recall(queries, vectors, kind, 10, book) for kind in KINDS}
    assert found["float16"] > 0.99 and found["int8"] > 0.9
    assert found["int8"] > found["pq"] > 0.2 and found["int8"] > found["binary"] > 0.1


def test_scores_are_products_with_what_codes_stand_for(book):
    vectors, queries = like_texts(40, seed=5), like_texts(3, seed=6)
    for kind in KINDS:
        codes = encode(vectors, kind, book)
        assert scores(queries, codes, book) == pytest.approx(queries @ decode(codes, book).T, abs=1e-5)
    assert scores(queries, encode(vectors[:0], "int8")).shape == (3, 0)


def test_books_find_clusters_that_are_there():
    """256 points, repeated: nearly every one becomes a centroid of its own. Clusters that are found at random would lose a tenth."""
    rng = np.random.default_rng(0)
    points = rng.standard_normal((CENTROIDS, 8)).astype(np.float32)
    vectors = np.concatenate([points[rng.permutation(CENTROIDS)] for _ in range(2)] * 4, axis=0)
    book = train_book(vectors, 1)
    codes = encode(vectors, "pq", book)
    assert np.square(decode(codes, book) - vectors).sum() < 0.01 * np.square(vectors).sum()


def test_books_code_by_the_nearest_centroid(book):
    vectors = like_texts(30, seed=7)
    codes = encode(vectors, "pq", book)
    for vector, code in zip(vectors.reshape(30, 16, 4), codes.data, strict=True):
        for part in range(16):
            assert code[part] == np.square(book.centroids[part] - vector[part]).sum(axis=1).argmin()


def test_books_of_few_vectors_hold_them_all():
    vectors = like_texts(7, 16)
    book = train_book(vectors, 4)
    assert fidelity(encode(vectors, "pq", book), book) == pytest.approx(np.ones(7), abs=1e-4)


def test_books_are_their_bytes(book):
    assert np.array_equal(Book.from_bytes(book.to_bytes()).centroids, book.centroids)
    assert book.dimensions == 64
    assert np.array_equal(train_book(like_texts(1000), 16).centroids, book.centroids)
    for wrong in (b"", b"\x00" * 100, book.to_bytes()[:-1]):
        with pytest.raises(StorageError, match="no book"):
            Book.from_bytes(wrong)
