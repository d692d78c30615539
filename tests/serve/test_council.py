"""/v1/council: the same debate as without a service, beside its other clients; and a council whose advisors are services."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.serve.conftest import ADAPTERS, Running, eventually, raw, running, slowly

from pantheraml.council import Endpoint, Local, Persona, Settings, Transcript, debate
from pantheraml.memory import Memory
from pantheraml.serve import Limits

PERSONAS = (
    Persona(name="plain", prompt="Answer.", temperature=0),
    Persona(name="lawyer", prompt="Think of the law.", adapter="lawyer", temperature=0.8),
)


@pytest.fixture(scope="module")
def council(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """With personas of its own, and a memory."""
    with Memory.open(tmp_path_factory.mktemp("memory") / "store") as memory:
        how: dict[str, Any] = {"adapters": {name: folders / name for name in ADAPTERS}, "rows": 4, "personas": PERSONAS, "memory": memory}
        with running(folders / "model", limits=Limits(debates=1, grace_seconds=2), **how) as here:
            yield here


def test_the_transcript_is_that_of_the_same_debate_alone(council: Running) -> None:
    asked = {"question": "Is 91 a prime number?", "rounds": 2, "max_tokens": 12, "seed": 3, "samples": 1}
    response = council.post("/v1/council", **asked)
    assert response.status_code == 200, response.text
    found = Transcript.from_dict(response.json())
    assert [turn.round for turn in found.turns] in ([0, 0, 1, 1], [0, 0])
    service = council.service
    local = Local(batcher=service.engine.batcher, tokenizer=service.tokenizer, name="model", called={name: name for name in ADAPTERS})
    settings = Settings(rounds=2, max_new_tokens=12, seed=3, samples=1, synthesis_tokens=256)
    alone = debate("Is 91 a prime number?", PERSONAS, settings, local=local)
    assert [(turn.advisor, turn.round, turn.text) for turn in found.turns] == [
        (turn.advisor, turn.round, turn.text) for turn in alone.turns
    ]
    assert found.outcome == alone.outcome and found.work is not None and found.work.model == "model" and found.work.rows == 4
    assert found.turns[0].text != found.turns[1].text
    assert service.memory is not None and found.key in service.memory


def test_events_come_while_it_goes_on(council: Running) -> None:
    asked = {"question": "What is the sea?", "rounds": 1, "max_tokens": 12, "stream": True, "personas": ["lawyer"]}
    with council.http.stream("POST", "/v1/council", json=asked) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert response.headers["content-type"].startswith("text/event-stream") and lines[-1] == "[DONE]"
    events = [json.loads(line) for line in lines[:-1]]
    assert [event["event"] for event in events if event["event"] != "text"][:2] == ["round", "turn"]
    spoken = "".join(event["text"] for event in events if event["event"] == "text" and event["advisor"] == "lawyer")
    (turn,) = (event for event in events if event["event"] == "turn")
    assert turn["turn"]["text"] == spoken == turn["text"]
    assert Transcript.from_dict(events[-1]["transcript"]).turns[0].text == spoken


def test_advisors_of_ones_own(council: Running) -> None:
    personas = [{"name": "me", "prompt": "Be me.", "model": "doctor", "temperature": 0.0}, "plain"]
    found = council.post("/v1/council", question="Who?", rounds=1, max_tokens=8, personas=personas, quorum="unanimous").json()
    assert [persona["name"] for persona in found["personas"]] == ["me", "plain"] and found["personas"][0]["adapter"] == "doctor"
    for change, status, said in (
        ({"personas": ["nobody"]}, 400, "there is no persona 'nobody' here; there are: plain, lawyer"),
        ({"personas": ["plain", "plain"]}, 400, "the same name"),
        ({"personas": [{**personas[0], "model": "gpt-4"}]}, 404, "not served here"),
        ({"personas": [{"name": "a", "prompt": "b", "endpoint": {"url": "http://10.0.0.1", "model": "x"}}]}, 400, "endpoint"),
        ({"question": "  "}, 400, "empty"),
        ({"quorum": "dictator"}, 400, "quorum"),
        ({"max_tokens": 10_000}, 400, "may follow"),
    ):
        refused = council.post("/v1/council", **{"question": "Who?", "max_tokens": 8, **change})
        assert refused.status_code == status and said in refused.json()["error"]["message"], refused.text


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_debate(council: Running, stream: bool) -> None:
    body = json.dumps({"question": "What is the sea?", "rounds": 8, "max_tokens": 200, "stream": stream}).encode()
    with slowly(council):
        with raw(council.port) as connection:
            head = f"POST /v1/council HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            eventually(lambda: council.metric("pantheraml_rows_busy") >= 1)
            refused = council.post("/v1/council", question="And now?", max_tokens=8)
            assert refused.status_code == 429 and refused.headers["retry-after"]
        eventually(lambda: not council.service.engine.flags and council.metric("pantheraml_rows_busy") == 0)
    assert council.post("/v1/council", question="And now?", max_tokens=8, rounds=1).status_code == 200


def test_advisors_can_be_services(council: Running) -> None:
    """The endpoint of a persona is this service: it says what the model behind it says."""
    url = f"{council.url}/v1"
    far = tuple(
        Persona(name=name, prompt="Answer.", temperature=0, endpoint=Endpoint(url=url, model=model))
        for name, model in (("one", "model"), ("two", "doctor"))
    )
    near = (Persona(name="one", prompt="Answer.", temperature=0), Persona(name="two", prompt="Answer.", temperature=0, adapter="doctor"))
    service = council.service
    local = Local(batcher=service.engine.batcher, tokenizer=service.tokenizer, name="model")
    settings = Settings(rounds=2, max_new_tokens=10, synthesis="extract", stop_early=False)
    by_wire = debate("Is 91 prime?", far, settings)
    at_home = debate("Is 91 prime?", near, settings, local=local)
    assert [turn.text for turn in by_wire.turns] == [turn.text for turn in at_home.turns]
    assert all(turn.error is None and turn.tokens for turn in by_wire.turns)
    assert [turn.mean_logprob for turn in by_wire.turns] == pytest.approx([turn.mean_logprob for turn in at_home.turns], abs=1e-4)


def test_clients_do_not_hear_where_services_are(folders: Path) -> None:
    url = "http://127.0.0.1:9/v1"  # nothing listens there
    far = Persona(name="far", prompt="Answer.", endpoint=Endpoint(url=url, model="x", key_env="SECRET_NAME", timeout_s=1))
    with running(folders / "model", personas=(far, PERSONAS[0]), keys={"SECRET_NAME": "k"}) as here:
        said = here.post("/v1/council", question="Why?", max_tokens=8, rounds=1)
        assert said.status_code == 200 and "127.0.0.1:9" not in said.text and "SECRET_NAME" not in said.text
        assert any("a service cannot be reached" in (turn["error"] or "") for turn in said.json()["turns"])
        assert Transcript.from_dict(said.json()).personas[0].endpoint is None
