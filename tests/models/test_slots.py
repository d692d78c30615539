"""Which rows answers get, what they share, and where they move. See test_batch.py for all of it at work."""

from __future__ import annotations

import random

import pytest

from pantheraml.models.slots import Slots, window


def test_a_prompt_shares_whole_blocks_that_others_have_read_and_waits_for_those_they_read() -> None:
    slots = Slots(4, block=4)
    first = slots.take(list(range(11)), 0)
    second = slots.take([*range(9), 99, 98], 0)
    assert first.slot != second.slot
    assert slots.waits(second) and not slots.waits(first)
    assert slots.copyable(second) is None
    first.read = 5
    assert slots.copyable(second) == (first, 4)
    second.read = 4
    assert slots.waits(second)  # the second block comes as well
    first.read = 11
    assert slots.copyable(second) == (first, 8)
    second.read = 8
    assert slots.copyable(second) is None and not slots.waits(second)


def test_the_last_token_is_always_read_and_other_adapters_share_nothing() -> None:
    slots = Slots(4, block=4)
    first = slots.take(range(8), 1)
    first.read = 8
    same, other = slots.take(range(8), 1), slots.take(range(8), 2)
    assert slots.copyable(same) == (first, 4)
    assert slots.copyable(other) is None


def test_a_row_remembers_until_it_is_needed() -> None:
    slots = Slots(2, block=4)
    first = slots.take(range(10), 0)
    first.read = 10
    slots.leave(first, range(10))
    again = slots.take(range(12), 0)
    assert (again.slot, again.read) == (first.slot, 8)
    slots.leave(again, range(12))
    # A prompt that shares nothing goes to the row that holds nothing.
    assert slots.take([7, 7, 7, 7, 7], 0).slot != first.slot
    assert slots.take([8, 8, 8, 8, 8], 0).slot == first.slot
    assert slots.free == 0


def test_a_source_that_is_gone_is_not_waited_for() -> None:
    slots = Slots(2, block=4)
    first, second = slots.take(range(9), 0), slots.take(range(9), 0)
    assert slots.waits(second)
    slots.leave(first, ())  # cancelled before anything was read
    assert not slots.waits(second) and slots.copyable(second) is None


def test_without_blocks_nothing_is_shared() -> None:
    slots = Slots(2, block=None)
    first, second = slots.take(range(9), 0), slots.take(range(9), 0)
    first.read = 9
    assert slots.copyable(second) is None and not slots.waits(second)


@pytest.mark.parametrize(
    ("going", "taken", "rows", "moves"),
    [
        ({0, 1, 2}, set(), range(0, 4), []),
        ({5}, set(), range(2, 6), []),
        ({0, 9}, set(), range(0, 4), [(9, 1)]),
        ({0, 9, 8, 10}, set(), range(7, 11), [(0, 7)]),
        ({0, 5}, {1, 2, 3}, range(2, 6), [(0, 4)]),
        ({0, 5}, {1, 2, 3, 4, 6, 7, 8, 10, 11}, range(0, 8), []),
    ],
)
def test_answers_come_together_in_as_few_rows_as_hold_them(
    going: set[int], taken: set[int], rows: range, moves: list[tuple[int, int]]
) -> None:
    assert window(going, taken, 12, (4, 8, 12)) == (rows, moves)


def test_moves_always_fit() -> None:
    drawn = random.Random(0)
    for _ in range(300):
        count = drawn.randrange(1, 40)
        order = drawn.sample(range(count), count)
        going, taken = set(order[: drawn.randrange(1, count + 1)]), set()
        taken = set(order[len(going) : len(going) + drawn.randrange(0, count - len(going) + 1)])
        widths = (*(width for width in (1, 4, 8, 24) if width < count), count)
        rows, moves = window(going, taken, count, widths)
        after = (going - {source for source, _ in moves}) | {target for _, target in moves}
        assert len(rows) in widths and after <= set(rows) and len(after) == len(going) and not after & taken
        assert not {target for _, target in moves} & going
