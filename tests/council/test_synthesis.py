"""The synthesis depends on what was said, and attributes nothing to anybody who did not say it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import jsonschema
import pytest
from tests.council.conftest import Service

from pantheraml.council import DEFAULT_PERSONAS, Local, Persona, Settings, Turn, debate
from pantheraml.council.confidence import of_advisor
from pantheraml.council.position import Agreement, position
from pantheraml.council.quorum import Outcome, Vote, decide
from pantheraml.council.synthesis import attributed, by_model, extracted, read, schema_for
from pantheraml.council.transcript import Synthesis

QUESTION = "Should we buy the house by the lake?"
SAID = {
    "ann": "The lake floods the house every spring. Is it insured?\nAnswer: no",
    "bob": "Repairs cost more than the house by the lake is worth.\nAnswer: No.",
    "cid": "Prices at the lake rise every year.\nAnswer: yes",
}
AGREEMENT = Agreement()


def turns(said: Mapping[str, str]) -> list[Turn]:
    return [Turn(advisor=name, round=1, text=text, position=position(text)) for name, text in said.items()]


def outcome(said: Mapping[str, str]) -> Outcome:
    return decide([Vote(advisor=name, position=position(text).lower().strip(".")) for name, text in said.items()], "majority")


def extract(said: Mapping[str, str]) -> Synthesis:
    found = [of_advisor(name, -0.1, position(text), [], AGREEMENT) for name, text in said.items()]
    return extracted(QUESTION, turns(said), outcome(said), found, "as it was asked for")


def test_an_extract_rests_on_those_who_hold_the_verdict_and_shows_the_others() -> None:
    made = extract(SAID)
    assert made.verdict == "no" and made.made_by == "extract"
    assert [(each.advisor, each.quote) for each in made.arguments] == [
        ("ann", "The lake floods the house every spring."),
        ("bob", "Repairs cost more than the house by the lake is worth."),
    ]
    assert [(each.advisor, each.quote) for each in made.dissent] == [("cid", "Prices at the lake rise every year.")]
    assert made.open_questions == ("Is it insured?",)


def test_swapping_arguments_between_advisors_changes_who_is_quoted() -> None:
    swapped = extract(SAID | {"ann": SAID["cid"], "cid": SAID["ann"]})
    assert swapped.verdict == "no"
    assert {(each.advisor, each.quote) for each in swapped.arguments} == {
        ("cid", "The lake floods the house every spring."),
        ("bob", "Repairs cost more than the house by the lake is worth."),
    }
    assert [(each.advisor, each.quote) for each in swapped.dissent] == [("ann", "Prices at the lake rise every year.")]


def test_changing_arguments_changes_the_verdict() -> None:
    changed = extract(SAID | {"bob": "The view is worth it.\nAnswer: yes"})
    assert changed.verdict == "yes" and [each.advisor for each in changed.dissent] == ["ann"]
    other = extract(SAID | {"bob": "The roof leaks, and nobody mends a roof there.\nAnswer: no"})
    assert other.verdict == "no" and {each.quote for each in other.arguments} != {each.quote for each in extract(SAID).arguments}


def test_without_a_quorum_the_verdict_says_that() -> None:
    made = extract({"ann": SAID["ann"], "cid": SAID["cid"]})
    assert made.verdict == "No decision: 1 for 'no'; 1 for 'yes'." and not made.arguments and len(made.dissent) == 2
    assert extract({}).verdict == "No decision: nobody answered."


@pytest.mark.parametrize(
    ("advisor", "quote", "found"),
    [
        ("ann", "the lake FLOODS the house, every spring", True),
        ("ann", "Prices at the lake rise every year.", False),
        ("cid", "Prices at the lake rise every year.", True),
        ("ann", "the lake", False),
        ("ann", "The lake never floods the house", False),
        ("dan", "The lake floods the house", False),
        ("ann", "", False),
    ],
)
def test_a_quote_must_stand_in_what_the_advisor_said(advisor: str, quote: str, found: bool) -> None:
    assert (attributed(advisor, quote, turns(SAID)) is not None) == found


def test_a_quote_is_of_the_last_round_in_which_it_was_said() -> None:
    both = [Turn(advisor="ann", round=0, text="It floods in spring. So no."), Turn(advisor="ann", round=1, text="So no. I insist on it.")]
    assert [attributed("ann", quote, both).round for quote in ("it floods in spring", "I insist on it")] == [0, 1]  # pyright: ignore[reportOptionalMemberAccess]


def worded(**changes: Any) -> str:
    return json.dumps(
        {
            "verdict": "No.",
            "arguments": [{"advisor": "ann", "quote": "The lake floods the house"}, {"advisor": "bob", "quote": "it is haunted by ghosts"}],
            "dissent": [{"advisor": "cid", "quote": "Prices at the lake rise every year"}],
            "open_questions": ["What does the bank say?"],
        }
        | changes
    )


def test_what_the_model_puts_into_a_mouth_is_refused() -> None:
    made = read(worded(), turns(SAID), outcome(SAID), AGREEMENT)
    assert isinstance(made, Synthesis) and made.made_by == "model" and made.verdict == "No."
    assert [(each.advisor, each.round) for each in made.arguments] == [("ann", 1)]
    assert made.refused == ("bob: 'it is haunted by ghosts'",) and made.open_questions == ("What does the bank say?",)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("no json", "not what was asked for"),
        ("{}", "not what was asked for"),
        (worded(verdict="Yes, buy it."), "not what the quorum has decided"),
        (worded(arguments=[{"advisor": "ann", "quote": "Prices at the lake rise every year"}]), "1 refused"),
        (worded(arguments=[]), "0 refused"),
    ],
)
def test_a_models_synthesis_that_cannot_be_used(text: str, why: str) -> None:
    made = read(text, turns(SAID), outcome(SAID), AGREEMENT)
    assert isinstance(made, str) and why in made


def test_without_a_quorum_a_models_verdict_is_one_that_somebody_holds() -> None:
    said = {"ann": SAID["ann"], "cid": SAID["cid"]}
    made = read(worded(verdict="maybe"), turns(said), outcome(said), AGREEMENT)
    assert made == "the model's verdict is nothing that an advisor holds"
    made = read(worded(verdict="no"), turns(said), outcome(said), AGREEMENT)
    assert isinstance(made, Synthesis) and made.verdict.startswith("No decision: ") and made.verdict.endswith("Most likely: no")


def test_a_service_words_the_synthesis_and_it_changes_with_the_arguments(service: Service) -> None:
    def say(body: dict[str, Any]) -> str:
        if "response_format" not in body:
            return SAID[body["messages"][-1]["content"].split("Speak like ")[1][:3]]
        names = body["response_format"]["json_schema"]["schema"]["properties"]["arguments"]["items"]["properties"]["advisor"]["enum"]
        asked = body["messages"][-1]["content"]
        answer = asked.split("The council decided: ")[1].split("\n")[0]
        text = asked.split(f"{names[0]}: ")[1].split("\n")[0]
        synthesis = {"verdict": answer, "arguments": [{"advisor": names[0], "quote": text}], "dissent": [], "open_questions": []}
        jsonschema.validate(synthesis, body["response_format"]["json_schema"]["schema"])
        return "```json\n" + json.dumps(synthesis) + "\n```"

    service.say = say
    endpoint = service.persona().endpoint
    settings = Settings(rounds=1, synthesiser=Persona(name="scribe", prompt="Sum up.", endpoint=endpoint))
    who = [Persona(name=f"is {name}", prompt=f"Speak like {name}", endpoint=endpoint) for name in SAID]
    made = debate(QUESTION, who, settings).synthesis
    assert made.made_by == "model" and made.verdict == "no" and made.arguments[0].quote.startswith("The lake floods")
    swapped = debate(
        QUESTION, [replace(who[0], prompt="Speak like cid"), who[1], replace(who[2], prompt="Speak like cid")], settings
    ).synthesis
    assert swapped.made_by == "model" and swapped.verdict == "yes" and swapped.arguments[0].quote.startswith("Prices at")


def test_the_local_model_is_held_to_the_schema(local: Local) -> None:
    """Its words are chance, but its form is not: it is read, and what it says is refused for what it says."""
    heard: list[str] = []
    speaker_ask = type(local.speaker()).ask

    def ask(self: Any, asks: Any, *rest: Any) -> Any:
        replies = speaker_ask(self, asks, *rest)
        heard.extend(reply.text for each, reply in zip(asks, replies, strict=True) if each.schema is not None)
        return replies

    with patch.object(type(local.speaker()), "ask", ask):
        found = debate("Why?", DEFAULT_PERSONAS[:2], Settings(max_new_tokens=12, rounds=1, synthesis_tokens=300), local=local)
    jsonschema.validate(json.loads(heard[0]), schema_for([each.name for each in DEFAULT_PERSONAS[:2]]))
    assert found.synthesis.made_by == "extract" and "model's verdict" in found.synthesis.why


def test_without_llguidance_it_is_an_extract_and_says_so(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance.hf", None)
    found = debate("Why?", DEFAULT_PERSONAS[:2], Settings(max_new_tokens=12, rounds=1), local=local)
    assert found.synthesis.made_by == "extract" and found.synthesis.why == "llguidance is not installed"


def test_nobody_said_anything() -> None:
    assert by_model(QUESTION, [], outcome({}), None, AGREEMENT, max_new_tokens=9, seed=0) == "nobody said anything"  # pyright: ignore[reportArgumentType]
