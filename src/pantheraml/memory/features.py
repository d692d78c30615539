"""Words and pieces of words of many texts at once, as 64-bit hashes: what embedders that need no model count.

A text is normalised (NFKC, lower case) and seen as code points. Its features are its words, the runs of four characters within a
word and the one beside it on either side, and for scripts without spaces each character and each pair. Hashes depend on nothing
but the text, so they may be stored. Everything is computed on arrays.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MOST_CHARACTERS = 1 << 20
"""Of one text; what stands behind them does not count."""
PIECE = 4
"""Characters in a piece of a word."""
_CHUNK_CHARACTERS = 1 << 15
_WIDE = 0x2E80
"""From here on are scripts whose words are not divided by spaces (CJK, kana, hangul), and few others."""
_PUNCTUATION = (
    (0x80, 0xA9),
    (0xAB, 0xB4),
    (0xB6, 0xB9),
    (0xBB, 0xBF),
    (0x2000, 0x206F),
    (0x20A0, 0x2BFF),
    (0x3000, 0x3004),
    (0x3008, 0x3020),
)
_BASE = 0x9E3779B97F4A7C15
_BASE_INVERSE = pow(_BASE, -1, 1 << 64)
_LENGTH_BITS = 8
_TEXT_BITS = 16

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
F32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Features:
    """What some texts consist of, in the order of the texts; each feature of a text once.

    Attributes:
        text: [F] which of the texts. hash: [F] of the feature. count: [F] how often it stands there.
        letters: [F] of a word, at most 255; 0: it is a piece of a word.
    """

    text: I64
    hash: U64
    count: I64
    letters: I64


def chunks(texts: Sequence[str]) -> Iterator[tuple[int, Features]]:
    """(index of the first text, features) of stretches of the texts that are small enough for the processor's caches."""
    begin, size = 0, 0
    for i, text in enumerate(texts):
        if i > begin and (size + len(text) > _CHUNK_CHARACTERS or i - begin == 1 << _TEXT_BITS):
            yield begin, features(texts[begin:i])
            begin, size = i, 0
        size += min(len(text), MOST_CHARACTERS)
    if begin < len(texts):
        yield begin, features(texts[begin:])


def features(texts: Sequence[str]) -> Features:
    """The features of each of at most 65,536 texts; memory is about 100 bytes a character."""
    plain = [_normal(text[:MOST_CHARACTERS]) for text in texts]
    points = np.frombuffer("".join(plain).encode("utf-32-le", "surrogatepass"), np.uint32)
    text = np.repeat(np.arange(len(plain)), [len(each) for each in plain])
    letter, wide = _letters(points)
    start, end = _words(letter, wide)
    length = np.minimum(end - start, (1 << _LENGTH_BITS) - 1)
    words = _counted(text[start], _hash_spans(points, start, end), length)
    pieces = [_pieces(points, letter & ~wide, PIECE)]
    if wide.any():
        at = np.flatnonzero(wide[:-1] & wide[1:])
        pieces.append((at, points[at].astype(np.uint64) << np.uint64(32) | points[at + 1]))
    at = np.concatenate([each[0] for each in pieces])
    counted = _counted(text[at], _mixed(np.concatenate([each[1] for each in pieces])), np.zeros(len(at), np.int64))
    return joined([words, counted])


def joined(parts: Sequence[Features]) -> Features:
    """One behind the other."""
    return Features(
        np.concatenate([np.zeros(0, np.int64), *(each.text for each in parts)]),
        np.concatenate([np.zeros(0, np.uint64), *(each.hash for each in parts)]),
        np.concatenate([np.zeros(0, np.int64), *(each.count for each in parts)]),
        np.concatenate([np.zeros(0, np.int64), *(each.letters for each in parts)]),
    )


def hashed(found: Features, weights: NDArray[np.floating], texts: int, dimensions: int) -> F32:
    """[texts, dimensions] sums of the weights, each with the signs and at the places that the feature's hash says, then rotated.

    The dot product of two rows estimates that of the weights themselves, without bias (Weinberger et al. 2009, arXiv 0902.2206).
    The rotation leaves it alone; it spreads each weight over all numbers, so that few bits are enough for each of them.
    """
    sums = np.zeros(texts * dimensions)
    for shift in (0, 24):  # two places for each, so that no feature covers another one whole
        place = ((found.hash >> np.uint64(shift)) & np.uint64(dimensions - 1)).astype(np.int64) + found.text * dimensions
        sign = 1.0 - 2.0 * ((found.hash >> np.uint64(shift + 20)) & np.uint64(1)).astype(np.float64)
        sums += np.bincount(place, weights=weights * sign, minlength=texts * dimensions)
    sums *= np.sqrt(0.5)
    return sums.reshape(texts, dimensions).astype(np.float32) @ rotation(dimensions)


@functools.lru_cache
def rotation(dimensions: int) -> F32:
    """An orthogonal matrix that is the same everywhere: Hadamard's with signs. Raises: ValueError if dimensions is no power of two."""
    if dimensions < 2 or dimensions & (dimensions - 1):
        raise ValueError(f"dimensions is a power of two, not {dimensions}")
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < dimensions:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    signs = 1.0 - 2.0 * (_mixed(np.arange(dimensions, dtype=np.uint64)) & np.uint64(1)).astype(np.float32)
    matrix = (signs[:, None] * matrix / np.sqrt(dimensions)).astype(np.float32)
    matrix.flags.writeable = False
    return matrix


def unit(rows: F32) -> F32:
    """Rows of length 1; a row of zeros stays one."""
    length = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))
    return (rows / np.where(length == 0, 1, length)[:, None]).astype(np.float32)


def _normal(text: str) -> str:
    """One way to write each character. The space around it ends its first and last word."""
    return f" {text if text.isascii() else unicodedata.normalize('NFKC', text)} ".lower()


def _letters(points: NDArray[np.uint32]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which code points are part of words, and which of those are words by themselves."""
    letter = _ASCII_LETTER[np.minimum(points, 0x80)]
    if points.max(initial=0) < 0x80:
        return letter, np.zeros(len(points), bool)
    for first, last in _PUNCTUATION:
        letter &= (points < first) | (points > last)
    return letter, letter & (points >= _WIDE)


_ASCII_LETTER = np.array([chr(point).isalnum() for point in range(0x80)] + [True])


def _words(letter: NDArray[np.bool_], wide: NDArray[np.bool_]) -> tuple[I64, I64]:
    """Where words begin and end."""
    before = np.concatenate([[False], letter[:-1]])
    after = np.concatenate([letter[1:], [False]])
    if wide.any():
        before &= ~(wide | np.concatenate([[False], wide[:-1]]))
        after &= ~(wide | np.concatenate([wide[1:], [False]]))
    return np.flatnonzero(letter & ~before), np.flatnonzero(letter & ~after) + 1


def _hash_spans(points: NDArray[np.uint32], start: I64, end: I64) -> U64:
    """A hash of each stretch: the value of a polynomial, as a difference of sums up to its ends (Karp and Rabin 1987)."""
    rising, falling = _powers(len(points))
    sums = np.concatenate([[np.uint64(0)], np.cumsum((points + np.uint64(1)) * rising[: len(points)], dtype=np.uint64)])
    return _mixed((sums[end] - sums[start]) * falling[start])


def _powers(count: int) -> tuple[U64, U64]:
    """At least so many powers of the base, and of its inverse, modulo 2**64."""
    size = max(_CHUNK_CHARACTERS, 1 << count.bit_length())
    if size not in _POWERS:
        _POWERS.clear()
        _POWERS[size] = _row_of_powers(_BASE, size), _row_of_powers(_BASE_INVERSE, size)
    return _POWERS[size]


_POWERS: dict[int, tuple[U64, U64]] = {}


def _row_of_powers(base: int, size: int) -> U64:
    row = np.full(size, base, np.uint64)
    row[0] = 1
    return np.cumprod(row, dtype=np.uint64)


def _pieces(points: NDArray[np.uint32], letter: NDArray[np.bool_], length: int) -> tuple[I64, U64]:
    """Where runs of characters begin of which all but the first and last must be letters, and a hash of each before it is mixed."""
    count = max(0, len(points) - length + 1)
    inner = np.ones(count, bool)
    for i in range(1, length - 1):
        inner &= letter[i : i + count]
    at = np.flatnonzero(inner)
    spaced = np.where(letter, points, 0x20).astype(np.uint64)
    value = np.full(len(at), length, np.uint64)
    for i in range(length):
        value = value * np.uint64(_BASE) + spaced[at + i]
    return at, value


def _mixed(value: U64) -> U64:
    """A permutation of 64-bit numbers whose every bit depends on all (splitmix64, Steele et al. 2014)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _counted(text: I64, value: U64, length: I64) -> Features:
    """Each (text, hash) once, with its count: by sorting numbers that hold the text, 40 bits of the hash, and the length."""
    if not len(text):
        return Features(text, value, np.zeros(0, np.int64), length)
    key = text.astype(np.uint64) << np.uint64(64 - _TEXT_BITS)
    key |= value >> np.uint64(_TEXT_BITS + _LENGTH_BITS) << np.uint64(_LENGTH_BITS)
    key |= length.astype(np.uint64)
    key.sort()
    first = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]]))
    count = np.diff(np.append(first, len(key)))
    key = key[first]
    hashes = key << np.uint64(_TEXT_BITS) >> np.uint64(_TEXT_BITS + _LENGTH_BITS)
    longest = np.uint64((1 << _LENGTH_BITS) - 1)
    return Features((key >> np.uint64(64 - _TEXT_BITS)).astype(np.int64), _mixed(hashes), count, (key & longest).astype(np.int64))
