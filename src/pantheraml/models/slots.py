"""Which answer has which row of the cache, what lies in the rows that are free, and what an answer can copy from the others."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(eq=False, slots=True)
class Held:
    """The tokens whose keys and values are in a row.

    Attributes:
        tokens: of the prompt, and those behind it that others may copy as well. adapter: that computed them.
        read: so many from the beginning have their keys and values in the row.
        active: an answer goes on there; otherwise the row is free and only remembers.
        sources: other rows that begin in the same way, with how many of their tokens can be copied.
    """

    slot: int
    tokens: NDArray[np.int64]
    adapter: int
    read: int = 0
    active: bool = True
    sources: list[tuple[Held, int]] = field(default_factory=list)


class Slots:
    """The rows of a cache.

    Args:
        count: of rows.
        block: only whole blocks of so many tokens are shared; None: nothing is.
    """

    def __init__(self, count: int, block: int | None) -> None:
        self._rows: list[Held | None] = [None] * count
        self._block = block
        self._free = list(range(count))  # those that hold nothing first, then those that were left longest ago

    @property
    def free(self) -> int:
        """How many rows are free."""
        return len(self._free)

    def take(self, tokens: Sequence[int], adapter: int) -> Held:
        """A free row for a prompt. What it remembers of the same beginning counts as read; what others have is among the sources."""
        held = Held(self._free[0], np.asarray(tokens, np.int64), adapter)
        held.sources = [
            (row, common)
            for row in dict.fromkeys(self._rows)
            if row is not None and row.adapter == adapter and (common := self._common(row, held.tokens)) > 0
        ]
        remembered = [(common, row) for row, common in held.sources if not row.active]
        if remembered:
            held.read, best = max(remembered, key=lambda pair: pair[0])
            held.slot = best.slot
        self._free.remove(held.slot)
        self._rows[held.slot] = held
        return held

    def _common(self, row: Held, tokens: NDArray[np.int64]) -> int:
        """Tokens that both begin with, in whole blocks. The last token is always read again: the answer goes on from its logits."""
        if self._block is None:
            return 0
        most = min(len(tokens) - 1, len(row.tokens) if row.active else row.read)
        differ = np.flatnonzero(row.tokens[:most] != tokens[:most])
        return int(differ[0] if len(differ) else most) // self._block * self._block

    def copyable(self, held: Held) -> tuple[Held, int] | None:
        """The row from which more than what is read can be copied now, and up to where; None: there is none."""
        block = self._block or 1
        able = [(min(common, row.read // block * block), row) for row, common in held.sources if self._there(row)]
        most, row = max(able, key=lambda pair: pair[0], default=(0, held))
        return (row, most) if most > held.read else None

    def waits(self, held: Held) -> bool:
        """Whether another answer is about to read what this one needs next."""
        return any(row.active and row.read < common and held.read < common and self._there(row) for row, common in held.sources)

    def leave(self, held: Held, tokens: Sequence[int]) -> None:
        """The answer has ended; its row is free, and remembers those of these tokens that were read."""
        held.active, held.sources = False, []
        held.read = min(held.read, len(tokens))
        held.tokens = np.asarray(tokens[: held.read], np.int64)
        if held.read:
            self._free.append(held.slot)
        else:
            self._rows[held.slot] = None
            self._free.insert(0, held.slot)

    def move(self, held: Held, slot: int) -> None:
        """The answer goes on in another row, which is free, and has got its keys and values."""
        self._free.remove(slot)
        self._free.insert(0, held.slot)
        self._rows[held.slot], self._rows[slot] = None, held
        held.slot = slot

    def _there(self, row: Held) -> bool:
        return self._rows[row.slot] is row


def window(going: Collection[int], taken: Collection[int], count: int, widths: Sequence[int]) -> tuple[range, list[tuple[int, int]]]:
    """Neighbouring rows, as few of `widths` as hold all that go on, and the moves (from, to) that bring them there.

    Args:
        going: rows to be computed together, at least one.
        taken: rows of others, where nothing can be moved to.
        count: of all rows. widths: how many rows can be computed at once, ascending; the last is `count`.
    """
    inside = np.zeros(count + 1, np.int64)
    blocked = np.zeros(count + 1, np.int64)
    inside[[slot + 1 for slot in going]] = 1
    blocked[[slot + 1 for slot in taken]] = 1
    inside, blocked = inside.cumsum(), blocked.cumsum()
    for width in widths:
        room = width - (blocked[width:] - blocked[: count + 1 - width])
        held = inside[width:] - inside[: count + 1 - width]
        if (room >= len(going)).any():
            first = int(np.where(room >= len(going), held, -1).argmax())
            rows = range(first, first + width)
            away = sorted(slot for slot in going if slot not in rows)
            empty = [slot for slot in rows if slot not in going and slot not in taken]
            return rows, list(zip(away, empty, strict=False))
    raise ValueError(f"{len(going)} rows do not go into {count}")
