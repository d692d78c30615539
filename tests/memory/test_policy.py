"""A plan keeps to its budgets, is the same for the same records, and never brings one lower for being used more."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pantheraml.memory.policy import TIERS, Budgets, Entries, heat, plan_moves, worn_segments

DAY = 86_400.0
NOW = 1000 * DAY
HOT, WARM, COLD = range(len(TIERS))

ROWS = st.lists(
    st.tuples(
        st.sampled_from([HOT, WARM, COLD]),
        st.integers(0, 5000),
        st.integers(0, 2000),
        st.floats(-10 * DAY, 90 * DAY),
        st.integers(0, 50),
    ),
    max_size=30,
)
BUDGETS = st.builds(
    Budgets,
    hot_bytes=st.integers(0, 20_000),
    warm_bytes=st.none() | st.integers(0, 20_000),
    cold_after_s=st.floats(0, 60 * DAY),
    half_life_s=st.floats(0.1 * DAY, 30 * DAY),
)


def entries_of(rows) -> Entries:
    """Rows of (tier, raw bytes, stored bytes, age in seconds, uses); ids count from 1."""
    tier, raw, stored, age, uses = zip(*rows, strict=True) if rows else ((), (), (), (), ())
    return Entries(
        id=np.arange(1, len(rows) + 1),
        tier=np.array(tier, np.int64),
        raw_bytes=np.array(raw, np.int64),
        stored_bytes=np.array(stored, np.int64),
        touched=NOW - np.array(age, np.float64),
        uses=np.array(uses, np.int64),
    )


def after(entries: Entries, budgets: Budgets) -> np.ndarray:
    """Tiers when the plan has been carried out."""
    tier = np.array(entries.tier)
    moves = plan_moves(entries, budgets, NOW)
    for name, ids in (("hot", moves.hot), ("warm", moves.warm), ("cold", moves.cold)):
        tier[ids - 1] = TIERS.index(name)
    return tier


@given(ROWS, BUDGETS)
@settings(max_examples=300, deadline=None)
def test_budgets_are_kept(rows, budgets):
    entries = entries_of(rows)
    tier = after(entries, budgets)
    assert entries.raw_bytes[tier == HOT].sum() <= budgets.hot_bytes
    if budgets.warm_bytes is not None:
        assert entries.stored_bytes[tier != COLD].sum() <= budgets.warm_bytes
    assert not (NOW - entries.touched[tier != COLD] > budgets.cold_after_s).any()


@given(ROWS, BUDGETS)
@settings(max_examples=200, deadline=None)
def test_each_record_moves_once_at_most_and_to_another_tier(rows, budgets):
    entries = entries_of(rows)
    moves = plan_moves(entries, budgets, NOW)
    every = np.concatenate([moves.hot, moves.warm, moves.cold])
    assert len(np.unique(every)) == len(every) == len(moves)
    for number, ids in enumerate((moves.hot, moves.warm, moves.cold)):
        assert (entries.tier[ids - 1] != number).all()


@given(ROWS, BUDGETS, st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_the_order_of_the_records_does_not_matter(rows, budgets, random):
    entries = entries_of(rows)
    order = list(range(len(rows)))
    random.shuffle(order)
    shuffled = Entries(**{name: getattr(entries, name)[order] for name in Entries.__slots__})
    one, other = plan_moves(entries, budgets, NOW), plan_moves(shuffled, budgets, NOW)
    for name in TIERS:
        assert getattr(one, name).tolist() == getattr(other, name).tolist()


@given(ROWS, BUDGETS)
@settings(max_examples=200, deadline=None)
def test_a_plan_that_was_carried_out_leaves_nothing_to_do(rows, budgets):
    entries = entries_of(rows)
    done = replace(entries, tier=after(entries, budgets))
    assert len(plan_moves(done, budgets, NOW)) == 0


@given(ROWS.filter(len), BUDGETS, st.data())
@settings(max_examples=300, deadline=None)
def test_more_or_later_use_never_brings_a_record_lower(rows, budgets, data):
    which = data.draw(st.integers(0, len(rows) - 1))
    tier, raw, stored, age, uses = rows[which]
    better = list(rows)
    better[which] = (tier, raw, stored, age - data.draw(st.floats(0, 90 * DAY)), uses + data.draw(st.integers(0, 20)))
    assert after(entries_of(better), budgets)[which] <= after(entries_of(rows), budgets)[which]


# The second record has more heat a byte in memory, and comes to stay with more space in the database.
@example([(WARM, 100, 10, 0.0, 3), (WARM, 60, 60, 0.0, 9)], Budgets(hot_bytes=100, warm_bytes=10), 0, 90)
@given(ROWS, BUDGETS, st.integers(0, 20_000), st.integers(0, 20_000))
@settings(max_examples=300, deadline=None)
def test_more_space_never_brings_a_record_lower(rows, budgets, more_hot, more_warm):
    wider = replace(
        budgets,
        hot_bytes=budgets.hot_bytes + more_hot,
        warm_bytes=None if budgets.warm_bytes is None else budgets.warm_bytes + more_warm,
    )
    entries = entries_of(rows)
    assert (after(entries, wider) <= after(entries, budgets)).all()


def test_heat_falls_by_half_in_a_half_life():
    entries = entries_of([(WARM, 1, 1, 0, 3), (WARM, 1, 1, 7 * DAY, 3), (WARM, 1, 1, 14 * DAY, 0), (WARM, 1, 1, -DAY, 0)])
    assert heat(entries, 7 * DAY, NOW).tolist() == [4, 2, 0.25, 1]


def test_what_is_used_goes_up_and_what_is_not_goes_down():
    entries = entries_of(
        [
            (WARM, 100, 50, DAY, 9),  # used often
            (WARM, 100, 50, 31 * DAY, 9),  # not for long
            (COLD, 100, 50, 3600, 1),  # used again
            (COLD, 100, 50, 20 * DAY, 1),  # used once, some time ago
            (HOT, 100, 50, 20 * DAY, 2),  # no longer hot
            (WARM, 100, 50, DAY, 0),  # stays
        ]
    )
    moves = plan_moves(entries, Budgets(), NOW)
    assert (moves.hot.tolist(), moves.warm.tolist(), moves.cold.tolist()) == ([1, 3], [5], [2])


def test_what_is_hottest_moves_up_first_and_what_is_coldest_down_first():
    entries = entries_of([(WARM, 1, 1, DAY, uses) for uses in (3, 9, 5)] + [(WARM, 1, 1, days * DAY, 0) for days in (40, 90, 50)])
    moves = plan_moves(entries, Budgets(), NOW)
    assert moves.hot.tolist() == [2, 3, 1]
    assert moves.cold.tolist() == [5, 6, 4]


def test_nothing_is_no_problem_and_nonsense_is_refused():
    assert len(plan_moves(entries_of([]), Budgets(), NOW)) == 0
    for wrong in ({"hot_bytes": -1}, {"warm_bytes": -1}, {"half_life_s": 0}, {"cold_after_s": -1}):
        with pytest.raises(ValueError, match=r"below 0|above 0"):
            Budgets(**wrong)


def test_a_million_records_are_planned_in_seconds():
    rng = np.random.default_rng(0)
    count = 1_000_000
    entries = Entries(
        id=np.arange(count),
        tier=rng.integers(0, 3, count),
        raw_bytes=rng.integers(1, 1000, count),
        stored_bytes=rng.integers(1, 500, count),
        touched=NOW - rng.random(count) * 60 * DAY,
        uses=rng.integers(0, 9, count),
    )
    moves = plan_moves(entries, Budgets(hot_bytes=10 << 20, warm_bytes=100 << 20), NOW)
    assert len(moves) > 100_000


def test_worn_segments_are_those_that_hold_little_that_is_alive():
    assert worn_segments({1: 100, 2: 100, 3: 100, 4: 0}, {1: 49, 2: 50}) == [1, 3]
    assert worn_segments({1: 100, 2: 100}, {1: 89, 2: 91}, least_live=0.9) == [1]
