"""Debates in a real memory: kept, found, and recalled into later ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.council.conftest import Service

from pantheraml.council import Local, Settings, Transcript, archive, debate
from pantheraml.council.persona import DEFAULT_PERSONAS
from pantheraml.errors import DataError
from pantheraml.memory import Memory

SETTINGS = Settings(rounds=1, max_new_tokens=24, synthesis="extract")


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Memory]:
    with Memory.open(tmp_path / "debates") as opened:
        yield opened


def asked(question: str, service: Service, memory: Memory | None, answer: str = "yes") -> Transcript:
    service.say = lambda body: f"So I think.\nAnswer: {answer}"
    return debate(question, [service.persona("a"), service.persona("b")], SETTINGS, memory=memory)


def test_a_debate_is_kept_found_and_read_back(service: Service, memory: Memory) -> None:
    lake = asked("Should we buy the house by the lake?", service, memory)
    asked("Is 91 a prime number?", service, memory, "no")
    assert archive.load(memory, lake.key) == lake
    info = memory.get(lake.key).info
    assert info.kind == "debate" and info.metadata["question"] == lake.question and info.metadata["verdict"] == "yes"
    hits = archive.search(memory, "a house at the lake", 1)
    assert [(hit.key, hit.verdict) for hit in hits] == [(lake.key, "yes")]
    assert len(archive.search(memory, "anything")) == 2
    memory.put("note", "Should we buy the house by the lake?")
    with pytest.raises(DataError, match="is no debate"):
        archive.load(memory, "note")
    memory.delete(lake.key)
    assert lake.key not in [hit.key for hit in archive.search(memory, "Should we buy the house by the lake?")]


def test_an_earlier_verdict_is_told_in_the_first_round_of_a_like_debate(service: Service, memory: Memory) -> None:
    asked("Is 91 a prime number?", service, memory, "no")
    earlier = asked("Should we buy the house by the lake?", service, memory)
    service.bodies.clear()
    later = asked("Should we sell the house by the lake?", service, memory)
    assert [each.key for each in later.recalled] == [earlier.key] and later.recalled[0].verdict == "yes"
    assert "Earlier debates:\n- Should we buy the house by the lake? - yes" in service.bodies[0]["messages"][-1]["content"]
    assert "prime" not in service.bodies[0]["messages"][-1]["content"]
    service.bodies.clear()
    service.say = lambda body: "Answer: 1"
    none = debate("Should we sell the house by the lake?", [service.persona()], replace(SETTINGS, recall=0), memory=memory)
    assert none.recalled == () and "Earlier" not in service.bodies[0]["messages"][-1]["content"]


def test_what_is_recalled_changes_what_a_model_says_and_what_has_no_room_is_recorded(local: Local, memory: Memory, model: Any) -> None:
    question = "Should we buy the house by the lake?"
    first = debate(question, DEFAULT_PERSONAS[:2], SETTINGS, local=local, memory=memory)
    again = debate(question, DEFAULT_PERSONAS[:2], SETTINGS, local=local, memory=memory)
    assert [each.key for each in again.recalled] == [first.key]
    assert [turn.text for turn in again.turns] != [turn.text for turn in first.turns]
    narrow = Local.of(model, local.tokenizer, "tiny", rows=2, tokens=440)
    tight = debate(question, DEFAULT_PERSONAS[:2], SETTINGS, local=narrow, memory=memory)
    dropped = [each for turn in tight.turns for each in turn.dropped]
    assert dropped and all(each.round == -1 and each.advisor.startswith("debate/") for each in dropped)


def test_a_memory_that_cannot_be_written_loses_no_debate(service: Service, tmp_path: Path) -> None:
    with Memory.open(tmp_path / "debates"):
        pass
    with Memory.open(tmp_path / "debates", readonly=True) as closed:
        found = asked("Why?", service, closed)
    assert found.outcome.reached and "The transcript is not in the memory" in found.notes[-1]
