"""The client of a service, against a real HTTP server."""

from __future__ import annotations

import json
import math
import socket
import threading
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from tests.council.conftest import Said, Service, completion

from pantheraml.council import DEFAULT_PERSONAS, Local, Settings, debate
from pantheraml.council.endpoint import ATTEMPTS, Client
from pantheraml.council.persona import Endpoint, Persona
from pantheraml.council.reply import Ask, CancelledError
from pantheraml.errors import PantheraError, RecipeError

KEY = "sk-very-secret"


def asked(service: Service, **more: Any) -> Ask:
    given: dict[str, Any] = {"max_new_tokens": 9, "seed": 5, "temperature": 0.25, **more}
    return Ask(persona=service.persona(), messages=[{"role": "user", "content": "Why?"}], **given)


def client(service: Service, waited: list[float] | None = None, **more: Any) -> Client:
    return Client(Endpoint(url=service.url + "/", model="there", **more), KEY, wait=(waited if waited is not None else []).append)


def test_it_asks_as_openai_does_and_reads_all_that_comes(service: Service) -> None:
    tokens = [("Be", -1.0), ("cause", -2.0), ("\n", -0.5), ("Answer", -0.1), (":", -0.1), (" 4", -0.2), ("2", -0.4)]
    service.say = lambda body: Said(completion("Because\nAnswer: 42", tokens))
    with client(service) as there:
        reply = there.ask(asked(service, schema={"type": "object"}))
    (body,) = service.bodies
    assert body | {"response_format": None} == {
        "model": "there",
        "messages": [{"role": "user", "content": "Why?"}],
        "max_tokens": 9,
        "temperature": 0.25,
        "seed": 5,
        "logprobs": True,
        "response_format": None,
    }
    assert body["response_format"]["json_schema"]["schema"] == {"type": "object"}
    assert service.headers[0]["path"] == "/v1/chat/completions" and service.headers[0]["authorization"] == f"Bearer {KEY}"
    assert (reply.text, reply.tokens, reply.prompt_tokens, reply.finished) == ("Because\nAnswer: 42", 7, 7, "stop")
    assert reply.mean_logprob == pytest.approx(-4.3 / 7) and reply.answer_logprob == pytest.approx(-0.3)
    assert not reply.notes and reply.seconds > 0


def test_what_is_busy_is_asked_again_and_waits_as_long_as_it_says(service: Service) -> None:
    answers = [Said({}, 429, {"Retry-After": "7"}), Said({}, 503), Said({}, 500), Said(completion("Answer: 1"))]
    service.say = lambda body: answers[len(service.bodies) - 1]
    waited: list[float] = []
    with client(service, waited) as there:
        assert there.ask(asked(service)).text == "Answer: 1"
    assert waited == [7.0, 1.0, 2.0]


def test_it_gives_up_with_what_the_service_says_and_without_the_key(service: Service) -> None:
    service.say = lambda body: Said({"error": {"message": f"{KEY} has no credit"}}, 429)
    with client(service) as there, pytest.raises(PantheraError) as raised:
        there.ask(asked(service))
    assert raised.value.what == f"{service.url}/ answered 429 after {ATTEMPTS} attempts: *** has no credit"
    assert len(service.bodies) == ATTEMPTS and KEY not in str(raised.value)


@pytest.mark.parametrize(
    ("status", "fix"), [(401, "check the key in the variable K"), (404, "the name of the model"), (400, "see what the service says")]
)
def test_what_is_refused_is_not_asked_again(service: Service, status: int, fix: str) -> None:
    service.say = lambda body: Said(b"<html>no\nway</html>", status)
    with client(service, key_env="K") as there, pytest.raises(PantheraError) as raised:
        there.ask(asked(service))
    assert f"answered {status}: <html>no way</html>" in raised.value.what and fix in raised.value.fix and len(service.bodies) == 1


def test_what_a_service_does_not_know_is_left_out_and_said(service: Service) -> None:
    def say(body: dict[str, Any]) -> Said:
        for name in ("logprobs", "seed", "max_tokens"):
            if name in body:
                return Said({"error": {"message": f"unsupported parameter: {name}"}}, 400)
        return Said(completion("Answer: 1"))

    service.say = say
    with client(service) as there:
        reply = there.ask(asked(service))
    assert set(reply.notes) == {"there takes no logprobs", "there takes no seed"}
    assert service.bodies[-1]["max_completion_tokens"] == 9 and reply.mean_logprob is None


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"not json",
        {},
        {"choices": []},
        {"choices": [{"message": {"content": None}}]},
        {"choices": [{"message": 5}]},
        {"choices": "abc"},
    ],
)
def test_something_else_than_a_completion_is_an_error(service: Service, body: Any) -> None:
    service.say = lambda _: Said(body)
    with client(service) as there, pytest.raises(PantheraError, match="something else than a chat completion"):
        there.ask(asked(service))


@pytest.mark.parametrize(
    "odd", [{"content": [{"token": "x", "logprob": "?"}]}, {"content": None}, 5, {"content": [{"token": "x", "logprob": -math.inf}]}]
)
def test_log_probabilities_that_are_none_are_unknown(service: Service, odd: Any) -> None:
    whole = completion("Answer: x")
    whole["choices"][0]["logprobs"] = odd
    whole["usage"] = None
    service.say = lambda _: Said(json.dumps(whole).encode())
    with client(service) as there:
        reply = there.ask(asked(service))
    assert reply.mean_logprob is None and reply.tokens is None


def test_a_service_that_is_not_there_or_says_nothing(service: Service) -> None:
    service.say = lambda body: time.sleep(0.5) or "late"
    with (
        client(service, timeout_s=0.05) as there,
        pytest.raises(PantheraError, match=r"cannot be reached: no answer in 0.05 s"),
    ):
        there.ask(asked(service))
    gone = Endpoint(url="http://127.0.0.1:9/v1", model="m", timeout_s=2)
    with Client(gone, wait=lambda _: None) as there, pytest.raises(PantheraError, match="cannot be reached after 4 attempts: ConnectError"):
        there.ask(asked(service))


def test_a_service_that_sends_headers_without_an_end_is_given_up() -> None:
    """Each byte is there within the time-out of a read, so only the whole tells that it takes too long."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip() -> None:
            there, _ = server.accept()
            with there, suppress(OSError):
                there.sendall(b"HTTP/1.1 200 OK\r\nX: ")
                while not over.wait(0.02):
                    there.sendall(b"x")

        over = threading.Event()
        dripping = threading.Thread(target=drip)
        dripping.start()
        try:
            url = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
            slow = Persona(name="slow", prompt="Think.", endpoint=Endpoint(url=url, model="m", timeout_s=0.2))
            found = debate("Why?", [slow], Settings(rounds=1))
            assert [turn.error for turn in found.turns] == [f"{url} gave no answer in 0.4 s"]
            later = time.monotonic() + 0.5  # it is asked by then
            patient = replace(slow, endpoint=Endpoint(url=url, model="m", timeout_s=600))
            assert debate("Why?", [patient], cancelled=lambda: time.monotonic() > later).ended == "cancelled"
        finally:
            over.set()
            dripping.join()


def test_it_does_not_follow_to_somewhere_else_with_the_key(service: Service) -> None:
    service.say = lambda body: Said({}, 307, {"Location": service.url + "/elsewhere"})
    with client(service) as there, pytest.raises(PantheraError, match="answered 307"):
        there.ask(asked(service))
    assert len(service.bodies) == 1


def test_it_can_be_cancelled_between_attempts(service: Service) -> None:
    service.say = lambda body: Said({}, 503)
    with client(service) as there, pytest.raises(CancelledError):
        there.ask(asked(service), lambda: len(service.bodies) == 2)


def test_the_key_is_in_no_transcript_and_no_event(service: Service, local: Local) -> None:
    service.say = lambda body: Said({"error": f"bad key {KEY}"}, 401)
    heard: list[Any] = []
    found = debate(
        "Why?",
        [*DEFAULT_PERSONAS[:2], service.persona(key_env="SECRET")],
        Settings(max_new_tokens=8, synthesis="extract", rounds=1),
        local=local,
        keys={"SECRET": KEY},
        on_event=heard.append,
    )
    said = json.dumps(found.to_dict()) + repr(heard) + found.text()
    assert KEY not in said and "bad key ***" in said and "SECRET" in said
    assert service.headers[0]["authorization"] == f"Bearer {KEY}"


def test_services_are_asked_at_the_same_time(service: Service) -> None:

    together = threading.Barrier(3, timeout=20)

    def say(body: dict[str, Any]) -> str:
        together.wait()  # broken, and so an error, if they come one after the other
        return "Answer: 1"

    service.say = say
    found = debate("Why?", [service.persona(name) for name in "abc"], Settings(rounds=1))
    assert [turn.position for turn in found.turns] == ["1"] * 3


def test_the_key_is_not_shown_where_an_error_is_cut_off_or_an_answer_repeats_it(service: Service) -> None:
    service.say = lambda body: Said({"error": "x" * 190 + KEY}, 401)
    with client(service) as there, pytest.raises(PantheraError) as raised:
        there.ask(asked(service))
    assert KEY[:5] not in raised.value.what
    service.say = lambda body: Said(completion(f"You sent {KEY}"))
    with client(service) as there:
        assert there.ask(asked(service)).text == "You sent ***"


@pytest.mark.parametrize("key", [KEY + "\n", KEY + "\r", "sk-\u00e9", "two words"])
def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(service: Service, key: str) -> None:
    with pytest.raises(RecipeError, match="the variable SECRET holds no key") as raised:
        debate("Why?", [service.persona(key_env="SECRET")], keys={"SECRET": key})
    assert KEY not in str(raised.value) and not service.bodies
