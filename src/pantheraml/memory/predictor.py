"""How likely each next token is, as whole frequencies: in one go for text that is known, token by token for text that is not yet.

Both ways come to the same frequencies. What a token is predicted from is a window: the first `context` tokens see all before them;
from then on, whenever a window is full, the next begins with its second half.
Letters: R rows, T tokens of a content, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from pantheraml.memory.record import Origin
from pantheraml.memory.tokens import Tokens


class State(Protocol):
    """Rows that are being read.

    Attributes:
        totals: int64 [R], the sum of the frequencies of each row's next token, below 2**31.
    """

    totals: np.ndarray

    def find(self, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(token, start, width) int64 [R] each: start <= target < start + width. targets: int64 [R], below `totals`."""
        ...

    def advance(self, tokens: np.ndarray) -> None:
        """Each row goes on behind its token, int64 [R]."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows go on."""
        ...


class Predictor(Protocol):
    """A model as a source of frequencies. Safe to use from several threads.

    Attributes:
        number: of the codec, see container.py. fingerprint: 8 to 16 bytes; what it has encoded can be decoded where they are the same.
        context: tokens of a window. rows: that are best read at once.
    """

    @property
    def number(self) -> int: ...  # noqa: D102
    @property
    def fingerprint(self) -> bytes: ...  # noqa: D102
    @property
    def tokens(self) -> Tokens: ...  # noqa: D102
    @property
    def context(self) -> int: ...  # noqa: D102
    @property
    def rows(self) -> int: ...  # noqa: D102

    def intervals(self, contents: Sequence[np.ndarray]) -> list[np.ndarray]:
        """int64 [3, T] of each content, int [T]: start, width and total of each token behind those before it."""
        ...

    def begin(self, rows: int) -> State:
        """Rows that stand before their first token."""
        ...

    def origin(self, batch: int) -> Origin:
        """Where it computes."""
        ...


def windows(length: int, context: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, skip) of the windows of so many tokens: of the inputs start to stop all but the first `skip` predict."""
    yield 0, min(length, context), 0
    half = context // 2
    for start in range(half, length - context + half, half):
        yield start, min(start + context, length), context - half


def as_inputs(content: np.ndarray, begin: int) -> np.ndarray:
    """What stands before each token: int32 [T]."""
    return np.concatenate([np.array([begin], np.int32), content[:-1]]).astype(np.int32)[: len(content)]
