"""What advisors see when there is not room for all."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pantheraml.council import Persona
from pantheraml.council.prompts import Piece, borrowed, first_messages, fitted, later_messages
from pantheraml.council.reply import Message
from pantheraml.council.transcript import Dropped
from pantheraml.errors import RecipeError

WHO = Persona(name="me", prompt="Think.")


def piece(name: str, text: str) -> Piece:
    return Piece(advisor=name, round=0, text=text, said=text)


def words(text: str) -> int:
    return len(text.split())


def measure(messages: Sequence[Message]) -> int:
    return sum(words(each["content"]) for each in messages)


def seen(pieces: Sequence[Piece]) -> list[Message]:
    return later_messages(WHO, "Which?", pieces)


def fit(pieces: Sequence[Piece], room: int) -> tuple[list[Message], tuple[Dropped, ...]]:
    kept, dropped = fitted(pieces, measure=lambda each: measure(seen(each)), count=words, room=room)
    return seen(kept), dropped


LONG = "one two three four five six. Seven eight nine ten eleven. Twelve thirteen fourteen.\nAnswer: long"
SHORT = "Because it is so.\nAnswer: short"


def test_all_is_seen_where_there_is_room_the_common_part_first() -> None:
    pieces = [piece("me", "I think.\nAnswer: mine"), piece("a", LONG), piece("b", SHORT)]
    messages, dropped = fit(pieces, 1000)
    assert dropped == () and [each["role"] for each in messages] == ["system", "user"]
    common, own = messages[1]["content"].split("You are me. Think.")
    assert all(f"{each.advisor}: {each.text}" in common for each in pieces) and "Which?" in common and "Answer" in own
    other = later_messages(Persona(name="you", prompt="Doubt."), "Which?", pieces)
    assert other[1]["content"].startswith(common) and other[0] == messages[0]


def test_the_longest_loses_sentences_from_its_end_and_keeps_its_answer() -> None:
    pieces = [piece("a", LONG), piece("b", SHORT)]
    whole = measure(fit(pieces, 1000)[0])
    messages, dropped = fit(pieces, whole - 2)
    assert "a: one two three four five six. Seven eight nine ten eleven. [...]\nAnswer: long" in messages[-1]["content"]
    assert SHORT in messages[-1]["content"]
    assert dropped == (Dropped(advisor="a", round=0, tokens=2, whole=False),)
    messages, dropped = fit(pieces, whole - 9)
    assert "a: one two three four five six. [...]\nAnswer: long" in messages[-1]["content"] or "a: Answer: long" in messages[-1]["content"]


def test_what_still_does_not_fit_is_left_out_the_longest_first() -> None:
    many = "Answer: " + "word " * 12 + "end"
    pieces = [piece("me", "I am alone here."), piece("a", f"{LONG}\n{many}"), piece("b", many)]
    messages, dropped = fit(pieces, measure(seen(pieces[:1])))
    assert "me: I am alone here." in messages[1]["content"] and many not in messages[1]["content"]
    assert dropped == (
        Dropped(advisor="a", round=0, tokens=words(LONG) + words(many), whole=True),
        Dropped(advisor="b", round=0, tokens=words(many), whole=True),
    )


def test_a_question_without_room_is_an_error_with_the_numbers() -> None:
    with pytest.raises(RecipeError, match=r"has \d+ tokens with its instructions, and 5 fit"):
        fit([piece("a", LONG)], 5)


@given(
    st.lists(st.lists(st.text("ab .", min_size=1, max_size=12), min_size=1, max_size=4).map(". ".join).filter(str.strip), max_size=5),
    st.integers(0, 120),
)
def test_it_fits_or_it_is_an_error_and_what_is_missing_is_said(texts: list[str], room: int) -> None:
    pieces = [piece(f"n{i}", text.strip()) for i, text in enumerate(texts)]
    try:
        messages, dropped = fit(pieces, room)
    except RecipeError:
        assert measure(seen([])) > room
        return
    assert measure(messages) <= room
    content = "".join(each["content"] for each in messages)
    missing = {each.advisor for each in dropped}
    assert all(each.text in content for each in pieces if each.advisor not in missing)
    assert all(each.tokens >= 1 for each in dropped)


def test_earlier_debates_stand_before_the_question() -> None:
    (_, user) = first_messages(WHO, "Which?", [piece("debate/1", "Was it? - Yes (confidence 0.50)"), piece("debate/2", "")])
    assert user["content"].startswith("Earlier debates:\n- Was it? - Yes (confidence 0.50)\n\nQuestion: Which?")


def test_lines_in_the_name_of_another_are_found() -> None:
    text = "I think so.\n\n**Sceptic:** I agree.\nAnswer: yes\nquestion: another one"
    assert borrowed(text, ["sceptic", "think", "Answer it", "Question"]) == ["sceptic", "Question"]
    assert borrowed("The sceptic: is right", ["sceptic"]) == []
