"""Records that are alike: sketches that find them among many, and a comparison that says whether they are the same.

A sketch (MinHash, SimHash) only proposes. `verify` decides, and calls two texts the same only if they differ in nothing but Unicode
form, case and white space: never in a number, a sign, a currency, a "not" or a name.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

SHINGLE = 5
"""Bytes in a row that make one feature of a text."""
PERMUTATIONS = 32
BANDS = 8
"""Of four minima each: texts that share 50% of their shingles meet in a band in 40% of cases, 70% in 89%, 80% in 98.5%."""


@dataclass(frozen=True, slots=True)
class Signatures:
    """Sketches of N texts.

    Attributes:
        simhash: [N] uint64; bits that differ between two grow with the angle between their shingle counts (Charikar 2002).
        minhash: [N, PERMUTATIONS] uint32; the part that is equal in two estimates the Jaccard likeness of their shingles (Broder 1997).
    """

    simhash: NDArray[np.uint64]
    minhash: NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Likeness:
    """What a comparison has found.

    Attributes:
        similarity: Jaccard likeness of the shingles, 0 to 1. same: one can stand for the other. why: in words, with the first difference.
    """

    similarity: float
    same: bool
    why: str


def signatures(texts: Sequence[str | bytes]) -> Signatures:
    """Sketches of texts, the same on every machine. Case and white space of text do not count; bytes are taken as they are."""
    parts = [_sketch(part) for part in _batches([_features(each) for each in texts])]
    return Signatures(
        np.concatenate([np.empty(0, np.uint64), *(simhash for simhash, _ in parts)]),
        np.concatenate([np.empty((0, PERMUTATIONS), np.uint32), *(minhash for _, minhash in parts)]),
    )


def bands(minhash: NDArray[np.uint32], salt: int = 0) -> NDArray[np.int64]:
    """[N, BANDS] of numbers to look up: two texts are candidates if they have one in common, wherever it stands.

    Args:
        salt: 64 bits; with different ones, texts have none in common. 0: without.
    """
    band = np.tile(np.arange(1, BANDS + 1, dtype=np.uint64), (len(minhash), 1))
    if salt:
        band = _mix(band ^ np.uint64(salt))
    for column in np.moveaxis(minhash.reshape(len(minhash), BANDS, PERMUTATIONS // BANDS), 2, 0):
        band = _mix(band ^ column)
    return band.view(np.int64)


def estimate(one: NDArray[np.uint32], many: NDArray[np.uint32]) -> NDArray[np.float64]:
    """[N] estimates of the Jaccard likeness of one text to many, with a standard error of 0.09 at worst. one: [P]; many: [N, P]."""
    return (many == one).mean(axis=1)


def pairs(bands_NB: NDArray[np.int64], *, reach: int = 8) -> NDArray[np.int64]:
    """[M, 2] places, first < second, of texts that have a number in common.

    Args:
        reach: each is paired with that many others of a band at most, so that a million equal texts make no million squared.
    """
    found = [np.empty((0, 2), np.int64)]
    for band in bands_NB.T:
        order = np.argsort(band, kind="stable")
        for step in range(1, min(reach, len(order) - 1) + 1):
            equal = band[order[step:]] == band[order[:-step]]
            found.append(np.stack([order[:-step][equal], order[step:][equal]], axis=1))
    return np.unique(np.concatenate(found), axis=0)


def verify(a: str, b: str) -> Likeness:
    """Whether two texts are the same but for Unicode form, case and white space, and if not, the first thing in which they differ.

    Stricter where those carry meaning: case of units ("5 mW", "5 MW"), of abbreviations ("US", "us") and of words like "iOS" counts,
    and so does white space if a text is indented.
    """
    if a == b:
        return Likeness(1.0, True, "they are equal")
    one, other = canonical(a), canonical(b)
    if one == other:
        return Likeness(1.0, True, "they differ in Unicode form, case or white space only")
    return Likeness(_jaccard(_features(a), _features(b)), False, _difference(one, other))


def canonical(text: str) -> str:
    """The text in one Unicode form (NFC), with one space where white space is and lower case, where `verify` lets them differ."""
    text = unicodedata.normalize("NFC", text)
    shouted = not any(map(str.islower, text))
    text = _WORD.sub(lambda found: _without_case(found, shouted), text)
    if _INDENTED.search(text):
        return re.sub(r"[ \t]*(\r\n|\r|\n)", "\n", text).strip("\n")
    return _SPACE.sub(" ", text).strip(" ")


_SPACE = re.compile(r"[^\S\x1c-\x1f]+")  # the four separate fields and records, and are no space between words
_INDENTED = re.compile(r"[\r\n][ \t]+\S")
_WORD = re.compile(r"(\d[.,\d]*\s?)?(\w+)")
_TOKEN = re.compile(r"\d+(?:[.,]\d+)*|\w+(?:['\u2019]\w+)*|[^\w\s]|\s+")
_NEGATIONS = re.compile(
    r"(no|not|non|never|none|nobody|nothing|neither|nor|without|cannot|\w+n['\u2019]t|nicht|kein|keine|nie|ohne|pas|jamais|sans|nunca|sin)",
    re.IGNORECASE,
)


def _without_case(found: re.Match[str], shouted: bool) -> str:
    """A word in lower case, unless its capitals may mean something."""
    number, word = found[1], found[2]
    plain = len(word) > 1 and word.isalpha() and (word.islower() or word.istitle() or (shouted and word.isupper()))
    return word.lower() if plain and not number else found[0]


def _difference(one: str, other: str) -> str:
    """The first tokens in which two canonical texts differ, and what kind of thing they are."""
    tokens = ([found[0] for found in _TOKEN.finditer(text) if not found[0].isspace()] for text in (one, other))
    for a, b in zip_longest(*tokens, fillvalue=""):
        if a != b:
            return f"{_kind_of_difference(a, b)} differs: {a[:40]!r} and {b[:40]!r}"
    return "white space differs that parts words or indents lines"


def _kind_of_difference(a: str, b: str) -> str:
    if _NEGATIONS.fullmatch(a) or _NEGATIONS.fullmatch(b):
        return "a negation"
    categories = {unicodedata.category(token[0]) for token in (a, b) if token}
    if "Sc" in categories:
        return "a currency"
    if categories & {"Sm", "So", "Pd"}:
        return "a sign"
    if any(map(str.isdigit, a + b)):
        return "a number"
    return "the case of a word" if a.lower() == b.lower() else "a word"


def _features(text: str | bytes) -> bytes:
    """The bytes whose shingles are counted."""
    if isinstance(text, bytes):
        return text
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    return " ".join(text.lower().split()).encode("utf-8", "surrogatepass")


def _jaccard(a: bytes, b: bytes) -> float:
    one, other = ({text[i : i + SHINGLE] for i in range(max(1, len(text) - SHINGLE + 1))} for text in (a, b))
    return len(one & other) / len(one | other)


_BATCH_BYTES = 1 << 16
"""Shingles whose hashes, of 8 and 4 bytes, stay in the caches of a core."""
_LANE = 255
"""Ones that a byte can count."""
_SPREAD = np.array([sum((byte >> bit & 1) << 8 * bit for bit in range(8)) for byte in range(256)], np.uint64)
"""Of each byte: its bits, each in a byte of its own."""


def _batches(texts: list[bytes]) -> list[list[bytes]]:
    batches: list[list[bytes]] = []
    room = 0
    for text in texts:
        if len(text) > room or not batches:
            batches.append([])
            room = _BATCH_BYTES
        batches[-1].append(text)
        room -= len(text)
    return batches


def _sketch(texts: list[bytes]) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
    """SimHash [N] and MinHash [N, PERMUTATIONS] of a batch."""
    texts = [text.ljust(SHINGLE, b"\0") for text in texts]
    lengths = np.array([len(text) for text in texts])
    ends = np.cumsum(lengths)
    whole = np.frombuffer(b"".join(texts) + bytes(8), np.uint8)
    words = np.ndarray((ends[-1],), "<u8", whole, strides=(1,)) & np.uint64((1 << 8 * SHINGLE) - 1)
    inside = np.ones(ends[-1], bool)
    for back in range(1, SHINGLE):
        inside[ends - back] = False  # such a shingle would end in the next text
    hashes = _mix(words[inside])
    counts = lengths - SHINGLE + 1
    starts = np.cumsum(counts) - counts
    return _simhash(hashes, starts, counts), _minhash(hashes, starts)


def _minhash(hashes: NDArray[np.uint64], starts: NDArray[np.int64]) -> NDArray[np.uint32]:
    """The smallest of each text's hashes under permutations x -> a x + b of 32 bits."""
    low = hashes.astype(np.uint32)
    moved = np.empty_like(low)
    minima = np.empty((PERMUTATIONS, len(starts)), np.uint32)
    for row, (a, b) in zip(minima, _PERMUTATIONS, strict=True):
        np.multiply(low, a, out=moved)
        np.add(moved, b, out=moved)
        np.minimum.reduceat(moved, starts, out=row)
    return np.ascontiguousarray(minima.T)


def _simhash(hashes: NDArray[np.uint64], starts: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Each bit: whether most of the text's hashes have it. Eight counters share a word, for 255 hashes at a time."""
    pieces = -(-counts // _LANE)
    first = np.cumsum(pieces) - pieces
    within = np.arange(pieces.sum()) - np.repeat(first, pieces)
    piece_starts = np.repeat(starts, pieces) + within * _LANE
    bits = np.empty((len(starts), 8), np.uint8)
    for i, column in enumerate(hashes.astype("<u8").view(np.uint8).reshape(-1, 8).T):
        lanes = np.add.reduceat(_SPREAD[column], piece_starts).astype("<u8").view(np.uint8).reshape(-1, 8)
        ones = np.add.reduceat(lanes, first, axis=0, dtype=np.int64)
        bits[:, i] = np.packbits(2 * ones > counts[:, None], axis=1, bitorder="little")[:, 0]
    return bits.view("<u8")[:, 0].astype(np.uint64)


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Every bit of a hash depends on every bit of the word (the end of splitmix64, Steele et al. 2014)."""
    words = (words ^ words >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ words >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return words ^ words >> np.uint64(31)


def _permutations() -> NDArray[np.uint32]:
    """[PERMUTATIONS, 2] odd factors and summands, which the signatures of a store depend on for good."""
    drawn = _mix(np.arange(1, 2 * PERMUTATIONS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)).astype(np.uint32).reshape(-1, 2)
    return drawn | np.array([1, 0], np.uint32)


_PERMUTATIONS = _permutations()
