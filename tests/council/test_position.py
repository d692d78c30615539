"""When two texts hold the same."""

from __future__ import annotations

import time
from decimal import Decimal
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pantheraml.council.position import Agreement, answer_span, normalised, position, sentences

AGREEMENT = Agreement()


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("Because of this.\nAnswer: 42", "42"),
        ("**Answer:** Paris.", "Paris."),
        ("**Final answer: yes**", "yes"),
        ("Answer: 1\nOn second thought\nanswer : 2\n", "2"),
        ("# Answer: `x`\nmore", "x"),
        ("Answer:\nnothing follows on the line", "Answer: nothing follows on the line"),
        ("The answer: is not at the beginning", "The answer: is not at the beginning"),
        ("no   line\n at all", "no line at all"),
        ("", ""),
    ],
)
def test_the_last_answer_line_is_what_is_held(text: str, held: str) -> None:
    assert position(text) == held
    span = answer_span(text)
    assert span is None or held in text[slice(*span)]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("42", " 42. "),
        ("1,000", "1000.0"),
        ("1e3", "1000"),
        ("YES!", "yes"),
        ("-0.5", "\u2212.50"),
        ("Paris, France", "paris france"),
        ("don't", "Don't."),
        ("12 %", "12%"),
        ("?!", "?!"),
    ],
)
def test_equal_but_for_how_it_is_written(a: str, b: str) -> None:
    assert AGREEMENT.agree(a, b) and AGREEMENT.agree(b, a)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("42", "43"),
        ("5", "-5"),
        (".5", "5"),
        ("5%", "5"),
        ("yes", "no"),
        ("red", "reed"),
        ("", ""),
        ("100 dollars for the whole house", "900000 dollars for the whole house"),
        ("We should buy the house by the lake", "We should not buy the house by the lake"),
        ("We can buy the house by the lake", "We can't buy the house by the lake"),
        ("12345678901234567890123456789012", "12345678901234567890123456789013"),
        ("1e999999999999999999999999", "1e999999999999999999999998"),
        ("Buy the old house by the lake", "Sell all shares of the bank now"),
    ],
)
def test_what_is_not_the_same(a: str, b: str) -> None:
    assert not AGREEMENT.agree(a, b)


def test_longer_texts_agree_when_they_are_alike() -> None:
    a = "We should buy the old house by the lake this year"
    b = "This year we should buy the old house by the lake"
    assert AGREEMENT.agree(a, b) and not Agreement(threshold=1.0).agree(a, a.replace("old", "new"))


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**12), max_value=10**12, places=4))
def test_numbers_agree_by_value(number: Decimal) -> None:
    plain, scientific = f"{number:f}", f"{number:e}"
    assert normalised(plain) == normalised(scientific) == normalised(f"{number:,f}")
    assert AGREEMENT.agree(plain, scientific)
    assert not AGREEMENT.agree(plain, f"{number + Decimal('0.0001'):f}")


@given(st.lists(st.sampled_from(["1", "1.0", "2", "two", "Two", ""]), max_size=5))
def test_groups_do_not_depend_on_the_order(held: list[str]) -> None:
    def together(positions: list[str]) -> set[frozenset[str]]:
        groups = AGREEMENT.groups(positions)
        assert [group is None for group in groups] == [not each for each in positions]
        return {frozenset(each for each, group in zip(positions, groups, strict=True) if group == number) for number in {*groups} - {None}}

    assert all(together(list(order)) == together(held) for order in list(permutations(held))[:24])


def test_sentences_end_where_they_end() -> None:
    assert sentences('One. "Two!" Three?\nFour 3.5 and e.g') == ["One.", '"Two!', "Three?", "Four 3.5 and e.g"]


@pytest.mark.parametrize("text", [" " * 100_000 + "x", "Answer: x" + " " * 100_000 + "y", "Answer" + " " * 100_000, "*" * 100_000])
def test_a_line_without_an_end_is_soon_read(text: str) -> None:
    begun = time.process_time()
    answer_span(text)
    assert time.process_time() - begun < 2  # a hundredth of a second, and minutes where each space is tried with each other one
