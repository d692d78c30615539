"""What an advisor holds: the line that begins with "Answer:", and when two of them hold the same.

Two positions agree if they are equal but for case, space and punctuation, with numbers compared by value. Longer texts also agree if
the house's embedder finds them alike, they name the same numbers, and both or neither of them is negated. The embedder sees words
in common and no meaning, and the negations are those of English: that is why advisors are asked for a line that holds only the answer.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal, InvalidOperation, Overflow, Underflow
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pantheraml.memory.embed import Embedder

THRESHOLD = 0.9
"""Cosine from which on two texts of several words are taken for the same. Of the lexical embedder: of ten words one may differ."""
FREE_TEXT_WORDS = 4
"""Positions with fewer words agree only if they are equal: in "red" and "reed" a few letters are the whole answer."""

_LINE = re.compile(
    # No two repetitions beside each other can take the same character, or a line of many spaces would take their number squared.
    r"^(?:[^\S\n]|[*_#>-])*(?:final[^\S\n]+)?answer(?:[^\S\n]|[*_])*:[*_]*[^\S\n]*(\S[^\n]*)$",
    re.IGNORECASE | re.MULTILINE,
)
_PART = re.compile(
    r"(?<![\w.])[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:e[-+]?\d+)?(?!\d)|\w+(?:['\u2019]\w+)*|[%$€£°]", re.IGNORECASE
)
_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:e[-+]?\d+)?", re.IGNORECASE)
_NEGATIONS = frozenset(("no", "not", "never", "none", "nor", "neither", "without", "cannot", "against", "nothing", "nobody"))
_SENTENCE_END = re.compile(r"(?<=[.!?\u2026\u3002\uff01\uff1f])[\"'\u201d\u2019)\]]*\s+|\n+")


def answer_span(text: str) -> tuple[int, int] | None:
    """Where the last line that begins with "Answer:" has its answer, in characters; None: there is no such line."""
    found = list(_LINE.finditer(text))
    return (found[-1].start(1), found[-1].start(1) + len(found[-1][1].rstrip())) if found else None


def position(text: str) -> str:
    """What a text holds: its answer line, or all of it where it has none."""
    span = answer_span(text)
    held = text if span is None else text[slice(*span)]
    return " ".join(held.strip().strip("*_`").split())


@lru_cache(maxsize=4096)
def normalised(held: str) -> tuple[str, ...]:
    """Its words and numbers, so that equal ones mean the same; of a text without either, its characters."""
    folded = unicodedata.normalize("NFKC", held).casefold().replace("\u2212", "-")
    parts = tuple(_by_value(part) if _NUMBER.fullmatch(part) else part for part in _PART.findall(folded))
    return parts or tuple("".join(folded.split()))


def _by_value(text: str) -> str:
    digits = text.replace(",", "")
    exact = Context(prec=len(digits) + 1, Emax=MAX_EMAX, Emin=MIN_EMIN, traps=[InvalidOperation, Overflow, Underflow])
    try:
        value = exact.create_decimal(digits)
        return str(Decimal(0) if value.is_zero() else value.normalize(exact))
    except ArithmeticError:  # an exponent beyond all bounds
        return digits


def sentences(text: str) -> list[str]:
    """The sentences of a text, in order, without the space between them."""
    return [each for piece in _SENTENCE_END.split(text) if (each := piece.strip())]


def similarity(texts: Sequence[str], embedder: Embedder | None = None) -> np.ndarray:
    """Cosines [N, N] of texts. embedder: None: of words and their pieces, which needs no model."""
    if embedder is None:
        from pantheraml.memory.embed import LexicalEmbedder

        embedder = LexicalEmbedder()
    vectors = embedder.embed(texts)
    return vectors @ vectors.T


class Agreement:
    """When positions are the same.

    Args:
        threshold: cosine from which on longer texts agree. embedder: None: of words and their pieces.
    """

    def __init__(self, threshold: float = THRESHOLD, embedder: Embedder | None = None) -> None:
        self._threshold, self._embedder = threshold, embedder

    def agree(self, a: str, b: str) -> bool:
        """Whether two positions are the same. An empty one agrees with nothing."""
        return bool(a.strip()) and bool(b.strip()) and (normalised(a) == normalised(b) or (_alike(a, b) and self._close(a, b)))

    def _close(self, a: str, b: str) -> bool:
        return float(similarity([a, b], self._embedder)[0, 1]) >= self._threshold

    def groups(self, positions: Sequence[str]) -> list[int | None]:
        """A number for each position, the same for those that agree, also by way of others; None for an empty one.

        Numbers are given in the order in which positions come, and who is with whom does not depend on it.
        """
        owner = list(range(len(positions)))
        for i in range(len(positions)):
            for j in range(i):
                if _root(owner, i) != _root(owner, j) and self.agree(positions[i], positions[j]):
                    owner[_root(owner, i)] = _root(owner, j)
        numbers: dict[int, int] = {}
        return [numbers.setdefault(_root(owner, i), len(numbers)) if held.strip() else None for i, held in enumerate(positions)]


def _root(owner: list[int], i: int) -> int:
    while owner[i] != i:
        i = owner[i]
    return i


def _alike(a: str, b: str) -> bool:
    """Whether two texts could mean the same: long enough, the same numbers, and both or neither negated."""
    one, other = normalised(a), normalised(b)
    if min(len(one), len(other)) < FREE_TEXT_WORDS:
        return False
    return _numbers(one) == _numbers(other) and _negated(one) == _negated(other)


def _numbers(parts: Sequence[str]) -> list[str]:
    return sorted(part for part in parts if part[0].isdigit() or (part[0] in "+-" and len(part) > 1))


def _negated(parts: Sequence[str]) -> bool:
    return any(part in _NEGATIONS or part.endswith(("n't", "n\u2019t")) for part in parts)
