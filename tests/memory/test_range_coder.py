"""The range coder against what information theory says, and against messages that nobody wrote."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pantheraml.memory.range_coder import MOST_TOTAL, RangeDecoder, RangeEncoder

Symbols = list[tuple[int, int, int]]


def encoded(symbols: Symbols) -> bytes:
    encoder = RangeEncoder()
    for symbol in symbols:
        encoder.push(*symbol)
    return encoder.finish()


def check_read(message: bytes, symbols: Symbols) -> None:
    decoder = RangeDecoder(message)
    for start, width, total in symbols:
        assert start <= decoder.target(total) < start + width
        decoder.take(start, width)


def bits(symbols: Symbols) -> float:
    return sum(math.log2(total / width) for _, width, total in symbols)


@st.composite
def a_symbol(draw: st.DrawFn) -> tuple[int, int, int]:
    total = draw(st.one_of(st.integers(1, 300), st.integers(1, MOST_TOTAL), st.just(MOST_TOTAL)))
    start = draw(st.one_of(st.just(0), st.integers(0, total - 1)))
    return start, draw(st.one_of(st.just(1), st.just(total - start), st.integers(1, total - start))), total


@given(st.lists(a_symbol(), max_size=60))
def test_what_was_pushed_comes_back_in_as_few_bytes_as_its_frequencies_say(symbols):
    message = encoded(symbols)
    check_read(message, symbols)
    # The interval is as wide as the product of the shares, less 2**-24 of a bit a symbol; a number in it needs one byte more at most.
    assert len(message) <= bits(symbols) / 8 + 1 + 1e-6
    assert not message.endswith(b"\0")


@pytest.mark.parametrize("total", [2, 1000, 1 << 24, MOST_TOTAL])
def test_a_long_message_costs_what_it_should(total):
    draw = random.Random(total)
    symbols = []
    for _ in range(20_000):
        width = max(1, int(total * draw.random() ** 3))
        symbols.append((draw.randrange(total - width + 1), width, total))
    message = encoded(symbols)
    check_read(message, symbols)
    assert len(message) <= bits(symbols) / 8 * (1 + 1e-6) + 1


def test_a_carry_runs_through_all_digits_that_are_out():
    # The top of the interval is pushed until the digits are all 255, then something that goes over.
    symbols = [(255, 1, 256)] * 40 + [(MOST_TOTAL - 1, 1, MOST_TOTAL)] * 3
    check_read(encoded(symbols), symbols)
    # 1/3 = 0.010101... in base 4: after many symbols the interval lies around a border between digits.
    thirds = [(1, 1, 3)] * 500
    assert len(encoded(thirds)) <= math.ceil(500 * math.log2(3) / 8) + 1
    check_read(encoded(thirds), thirds)


def test_what_is_certain_takes_no_bytes():
    assert encoded([]) == b""
    assert encoded([(0, 7, 7)] * 1000) == b""


@given(st.binary(max_size=40), st.lists(a_symbol(), max_size=200))
def test_any_bytes_can_be_read(message, symbols):
    decoder = RangeDecoder(message)
    for start, width, total in symbols:
        target = decoder.target(total)
        assert 0 <= target < total
        start = min(start, target)
        decoder.take(start, max(width, target - start + 1))
    assert decoder._code < 1 << 64, "numbers do not grow with what is read"
