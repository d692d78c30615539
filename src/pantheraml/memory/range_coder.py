"""A range coder: symbols in as few bits as their frequencies say, in whole numbers alone (G. N. N. Martin, 1979).

A symbol has `width` of `total` frequencies, behind the `start` that belong to those before it. The message is a number in
[0, 1), written in base 256. The encoder keeps the interval [low, low + range) of the numbers that say what was pushed so far.
"""

from __future__ import annotations

MOST_TOTAL = 1 << 32
"""Frequencies that a symbol can be one of. Rounding then costs less than 2**-24 of a bit a symbol."""

_BITS = 64
_MASK = (1 << _BITS) - 1
_TOP = _BITS - 8
_LEAST = 1 << _TOP
"""`range` is never less between two symbols."""


class RangeEncoder:
    """Writes symbols; `finish` gives the message."""

    def __init__(self) -> None:
        self._low, self._range = 0, _MASK
        self._out = bytearray()

    def push(self, start: int, width: int, total: int) -> None:
        """One symbol, with 0 <= start, 1 <= width, start + width <= total <= `MOST_TOTAL`."""
        each = self._range // total
        self._low += each * start
        self._range = each * width
        if self._low > _MASK:
            self._carry()
        while self._range < _LEAST:
            self._out.append(self._low >> _TOP)
            self._low = self._low << 8 & _MASK
            self._range <<= 8

    def finish(self) -> bytes:
        """The shortest message; the decoder reads zeros behind its end, so that zeros are left out there."""
        for kept in range(0, _BITS + 8, 8):
            rest = _MASK >> kept
            chosen = (self._low + rest) & ~rest
            if chosen < self._low + self._range:
                self._low = chosen
                break
        if self._low > _MASK:
            self._carry()
        return bytes(self._out + self._low.to_bytes(_BITS // 8, "big")).rstrip(b"\0")

    def _carry(self) -> None:
        """One more in the digits that are out already."""
        self._low &= _MASK
        place = len(self._out) - 1
        while self._out[place] == 255:
            self._out[place] = 0
            place -= 1
        self._out[place] += 1


class RangeDecoder:
    """Reads what `RangeEncoder` wrote: for each symbol `target`, then `take` with the frequencies of the symbol that holds it.

    Any bytes can be read: from what no encoder wrote come symbols without a meaning, and never an error.
    """

    def __init__(self, message: bytes) -> None:
        self._message, self._next = message, _BITS // 8
        self._code = int.from_bytes(message[: _BITS // 8].ljust(_BITS // 8, b"\0"), "big")
        """The number, less `low`."""
        self._range = _MASK
        self._each = 0

    def target(self, total: int) -> int:
        """A number below total: the next symbol is the one with start <= target < start + width."""
        self._each = self._range // total
        return min(self._code // self._each, total - 1)

    def take(self, start: int, width: int) -> None:
        """Goes behind the symbol that has the frequencies [start, start + width) of the total of the last `target`."""
        self._range = self._each * width
        self._code = min(self._code - self._each * start, self._range - 1)
        while self._range < _LEAST:
            digit = self._message[self._next] if self._next < len(self._message) else 0
            self._code = self._code << 8 | digit
            self._range <<= 8
            self._next += 1
