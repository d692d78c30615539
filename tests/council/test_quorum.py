"""The rules against their definitions, by brute force."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pantheraml.council.quorum import RULES, Quorum, Vote, decide, within_reach

VOTES = st.lists(st.tuples(st.sampled_from(["a", "b", "c", None]), st.floats(0.1, 10)), min_size=1, max_size=9).map(
    lambda each: [Vote(advisor=f"n{i}", position=held, weight=weight) for i, (held, weight) in enumerate(each)]
)
RULE = st.sampled_from(RULES)


def votes(*held: str | None) -> list[Vote]:
    return [Vote(advisor=f"n{i}", position=each) for i, each in enumerate(held)]


@given(VOTES, RULE)
def test_a_rule_is_satisfied_exactly_when_its_definition_is(cast: list[Vote], rule: Quorum) -> None:
    outcome = decide(cast, rule)
    n = len(cast)
    satisfied = []
    for held in "abc":
        mine = [vote for vote in cast if vote.position == held]
        share = sum((Fraction(vote.weight) for vote in mine), Fraction(0)) / sum((Fraction(vote.weight) for vote in cast), Fraction(0))
        definition = {
            "majority": len(mine) > n / 2,
            "weighted": share > Fraction(1, 2),
            "supermajority": Fraction(len(mine), n) >= Fraction(2, 3),
            "unanimous": len(mine) == n,
        }
        satisfied += [held] if definition[rule] else []
    assert len(satisfied) <= 1
    assert outcome.reached == bool(satisfied) and (not satisfied or outcome.position == satisfied[0])
    assert sorted(name for count in outcome.counts for name in count.advisors) + sorted(outcome.silent) != [] and outcome.why


@given(VOTES, RULE, st.randoms())
def test_the_order_of_votes_does_not_matter(cast: list[Vote], rule: Quorum, drawn: random.Random) -> None:
    mixed = drawn.sample(cast, len(cast))
    one, other = decide(cast, rule), decide(mixed, rule)
    assert (one.reached, one.position, one.why if not one.silent else "") == (
        other.reached,
        other.position,
        other.why if not other.silent else "",
    )
    assert [(count.position, set(count.advisors), count.weight) for count in one.counts] == [
        (count.position, set(count.advisors), count.weight) for count in other.counts
    ]


@given(VOTES, RULE)
def test_what_is_reached_is_within_reach_and_stays_reached_with_one_more_voice(cast: list[Vote], rule: Quorum) -> None:
    outcome = decide(cast, rule)
    assert within_reach(cast, rule) or not outcome.reached
    if outcome.reached:
        assert decide([*cast, Vote(advisor="more", position=outcome.position)], rule).reached


@given(VOTES)
def test_rules_from_strict_to_mild(cast: list[Vote]) -> None:
    strict = [decide(cast, rule).reached for rule in ("unanimous", "supermajority", "majority")]
    assert strict == sorted(strict)


def test_a_tie_has_no_position_and_says_so() -> None:
    outcome = decide(votes("a", "a", "b", "b", None), "majority")
    assert not outcome.reached and outcome.position is None
    assert outcome.why == "2 positions have 2 of 5 each, and majority takes 3; n4 said nothing"


@pytest.mark.parametrize(
    ("rule", "held", "reached", "why"),
    [
        ("majority", "aab", True, "2 of 3 advisors hold 'a', and majority takes 2"),
        ("supermajority", "aab", True, "2 of 3 advisors hold 'a', and supermajority takes 2"),
        ("supermajority", "aaabb", False, "only 3 of 5 advisors hold 'a', and supermajority takes 4"),
        ("unanimous", "aab", False, "only 2 of 3 advisors hold 'a', and unanimous takes all"),
        ("weighted", "aab", True, "2 of the weight of 3 hold 'a', and weighted takes more than 1.5"),
    ],
)
def test_it_says_why(rule: Quorum, held: str, reached: bool, why: str) -> None:
    outcome = decide(votes(*held), rule)
    assert (outcome.reached, outcome.why) == (reached, why)


def test_weight_decides_a_weighted_quorum() -> None:
    cast = [*votes("a", "a"), Vote(advisor="heavy", position="b", weight=2.5)]
    assert decide(cast, "weighted").position == "b" and decide(cast, "majority").position == "a"


def test_nobody_holds_anything() -> None:
    assert decide(votes(None, None), "majority").why == "none of 2 advisors holds anything"
    assert not decide([], "unanimous").reached and not within_reach([], "supermajority")
