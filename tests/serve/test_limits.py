"""What is refused, what is ended, and that a row is free again when nobody waits for its answer."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from tests.serve.conftest import Running, eventually, raw, running, slowly

from pantheraml.cli_serve import named_adapters, read_key
from pantheraml.errors import PantheraError, RecipeError
from pantheraml.serve import Limits
from pantheraml.serve.server import bind, check_reach

KEY = "a-key-of-some-length"
LONG = {"model": "endless", "prompt": "a", "temperature": 0, "max_tokens": 500}
"""An answer that goes round in circles."""


@pytest.fixture(scope="module")
def small(folders: Path) -> Iterator[Running]:
    """One row, a queue of one, a key, and little of everything."""
    limits = Limits(
        body_bytes=20_000, queue=1, head_seconds=1, body_seconds=1, prompt_tokens=100, new_tokens=500, choices=2, grace_seconds=1
    )
    with running(folders / "endless", rows=1, limits=limits, key=KEY) as here:
        yield here


def idle(here: Running) -> bool:
    return here.metric("pantheraml_rows_busy") == 0 == here.metric("pantheraml_queue_length")


def head(here: Running, path: str, *more: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", f"Authorization: Bearer {KEY}", "Content-Type: application/json", *more]
    return "\r\n".join([*lines, "", ""]).encode()


def said(connection: socket.socket) -> bytes:
    """All that comes until the other end closes."""
    found = b""
    while piece := connection.recv(65536):
        found += piece
    return found


# ---- Who may ask --------------------------------------------------------------------------------------------------


def test_the_key_is_asked_for_everywhere_but_where_nothing_is_said(small: Running, caplog: pytest.LogCaptureFixture) -> None:
    for shown in (None, "wrong", KEY + "x", KEY[:-1], "\xff"):
        headers = {} if shown is None else {"Authorization": f"Bearer {shown}".encode("latin-1")}
        for method, path in (("GET", "/v1/models"), ("GET", "/metrics"), ("POST", "/v1/completions"), ("GET", "/nowhere")):
            refused = httpx2.request(method, small.url + path, headers=headers)
            assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
            assert refused.json()["error"]["code"] == "invalid_api_key" and KEY not in refused.text
    assert httpx2.get(small.url + "/health").json() == {"status": "ok"}
    assert httpx2.get(small.url + "/openapi.json").status_code == 200
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{small.url}/v1", api_key="wrong", max_retries=0).models.list()
    assert [model.id for model in small.client.models.list()] == ["endless"]
    assert KEY not in repr(small.service) + caplog.text


def test_a_key_is_read_and_never_said(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY + "\n")
    assert read_key({"KEY": f" {KEY} "}, "KEY", None) == read_key({}, None, tmp_path / "key") == KEY
    assert read_key({"KEY": KEY}, None, None) is None
    for environment in ({}, {"KEY": "short"}, {"KEY": "schlüssel-mit-umlauten"}, {"KEY": "with spaces inside of it"}):
        with pytest.raises(RecipeError, match="no API key that can be used") as refused:
            read_key(environment, "KEY", None)
        assert not any(value in str(refused.value) for value in environment.values())
    with pytest.raises(PantheraError, match="cannot be read"):
        read_key({}, None, tmp_path / "absent")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "example.org"])
def test_beyond_this_machine_a_key_is_needed(host: str) -> None:
    with pytest.raises(RecipeError, match=r"open to everybody(?s:.)*--api-key-env"):
        check_reach(host, None)
    assert check_reach(host, KEY) is None


def test_a_page_that_pretends_to_be_this_machine_is_refused(served: Running) -> None:
    for name, status in (
        ("evil.example", 403),
        ("127.0.0.1.evil.example:8000", 403),
        ("localhost", 200),
        ("LOCALHOST:1", 200),
        ("[::1]:7", 200),
    ):
        assert httpx2.get(served.url + "/v1/models", headers={"Host": name}).status_code == status, name


# ---- How much -----------------------------------------------------------------------------------------------------


def test_a_body_that_is_too_long_is_refused_while_it_comes(small: Running) -> None:
    refused = small.post("/v1/completions", model="endless", prompt="a" * 30_000)
    assert refused.status_code == 413 and refused.json()["error"]["code"] == "request_too_large"

    def endless() -> Iterator[bytes]:
        for _ in range(1000):
            yield b" " * 10_000

    chunked = small.http.post("/v1/completions", content=endless(), headers={"Content-Type": "application/json"})
    assert chunked.status_code == 413
    with raw(small.port) as connection:  # one that says it is longer than it is going to be
        connection.sendall(head(small, "/v1/completions", "Content-Length: 1000000000") + b"{")
        assert said(connection).startswith(b"HTTP/1.1 413")
    assert small.post("/v1/completions", model="endless", prompt="a" * 90, max_tokens=1).status_code == 200


def test_more_than_the_limits_is_a_bad_request(small: Running) -> None:
    for change, code in (({"prompt": "a" * 101}, "context_length_exceeded"), ({"max_tokens": 501}, None), ({"n": 3}, None)):
        refused = small.post("/v1/completions", **{**LONG, **change})
        assert refused.status_code == 400 and refused.json()["error"]["code"] == code, refused.text
    assert small.post("/v1/embeddings", model="endless", input=["a"] * 257).status_code == 400


def test_a_connection_may_not_dawdle(small: Running) -> None:
    with raw(small.port) as silent, raw(small.port) as slow, raw(small.port) as cut:
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: 127")
        cut.sendall(head(small, "/v1/completions", "Content-Length: 100") + b'{"model"')
        assert said(silent) == b"" == said(slow)
        assert said(cut).startswith(b"HTTP/1.1 408")
    with raw(small.port) as wrong:
        wrong.sendall(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
        assert said(wrong).startswith(b"HTTP/1.1 400")


# ---- How many, and for how long -----------------------------------------------------------------------------------


def test_a_queue_that_is_full_says_when_to_come_again(small: Running) -> None:
    with slowly(small), small.http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as first:
        pieces = first.iter_bytes()  # kept: where it is dropped, the client hangs up
        next(pieces)
        with raw(small.port) as second:
            body = json.dumps(LONG).encode()
            second.sendall(head(small, "/v1/completions", f"Content-Length: {len(body)}") + body)
            eventually(lambda: small.metric("pantheraml_queue_length") == 1)
            refused = small.post("/v1/completions", **LONG)
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["type"] == "rate_limit_error"
            with pytest.raises(openai.RateLimitError):
                small.client.chat.completions.create(model="endless", messages=[{"role": "user", "content": "a"}])
        # The second client has gone while it waited, so there is room in the queue again.
        eventually(lambda: small.metric("pantheraml_queue_length") == 0)
        assert small.metric("pantheraml_rows_busy") == 1
    eventually(lambda: idle(small))
    assert small.metric('pantheraml_requests_total{route="/v1/completions",status="429"}') == 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_row(small: Running, stream: bool) -> None:
    before = small.metric('pantheraml_answers_total{finished="cancelled"}')
    with slowly(small), raw(small.port) as connection:
        body = json.dumps({**LONG, "stream": stream}).encode()
        connection.sendall(head(small, "/v1/completions", f"Content-Length: {len(body)}") + body)
        eventually(lambda: small.metric("pantheraml_rows_busy") == 1)
        if stream:
            assert connection.recv(65536)
    eventually(lambda: idle(small))
    assert small.metric('pantheraml_answers_total{finished="cancelled"}') == before + 1
    assert small.post("/v1/completions", **{**LONG, "max_tokens": 2}).status_code == 200


def test_a_request_that_takes_too_long_ends_as_it_is(folders: Path) -> None:
    with running(folders / "endless", rows=1, limits=Limits(seconds=0.3, grace_seconds=1)) as here, slowly(here):
        with here.http.stream("POST", "/v1/completions", json={**LONG, "stream": True, "stream_options": {"include_usage": True}}) as first:
            lines = first.iter_lines()
            next(lines)
            waiting = here.post("/v1/completions", **LONG)  # has no row before its time is over, or little of it
            events = [json.loads(line.removeprefix("data: ")) for line in lines if line and line != "data: [DONE]"]
        assert events[-2]["choices"][0]["finish_reason"] == "length" and events[-1]["usage"]["completion_tokens"] < 500
        if waiting.status_code == 503:
            assert waiting.json()["error"]["code"] == "timeout"
        else:
            assert waiting.json()["choices"][0]["finish_reason"] == "length"


# A mistake ends the batcher's thread, and the service makes a new one.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failure_of_the_device_is_told_to_those_it_hit_and_to_nobody_else(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(folders / "endless", rows=2, limits=Limits(grace_seconds=1)) as here:
        rows = here.service.engine.batcher._rows
        read, errors = rows.read, iter([RuntimeError("out of memory on the device"), TypeError("a mistake")])

        def fail(*given: Any) -> Any:
            monkeypatch.setattr(rows, "read", read)
            raise next(errors)

        for what in ("out of memory", "a mistake"):
            monkeypatch.setattr(rows, "read", fail)
            lost = here.post("/v1/completions", **{**LONG, "max_tokens": 3})
            assert lost.status_code == 503 and what in lost.json()["error"]["message"], lost.text
            assert here.post("/v1/completions", **{**LONG, "max_tokens": 3}).status_code == 200
        with here.http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as streaming:
            lines = streaming.iter_lines()
            next(lines)
            errors = iter([RuntimeError("lost in the middle")])
            monkeypatch.setattr(rows, "read", fail)
            rest = [line for line in lines if line]
        assert "lost in the middle" in json.loads(rest[-1].removeprefix("data: "))["error"]["message"]
        eventually(lambda: idle(here))


# ---- What is counted ----------------------------------------------------------------------------------------------


def test_metrics_are_what_prometheus_reads(served: Running) -> None:
    def counted() -> dict[str, float]:
        lines = served.http.get("/metrics").text.splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}

    before = counted()
    served.client.completions.create(model="model", prompt="a sentence that nobody has asked for", max_tokens=7, temperature=0)
    served.http.get("/a/path/that/is/not/there")
    after = counted()
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    assert grown["pantheraml_new_tokens_total"] == 7 and grown["pantheraml_prompt_tokens_total"] == 36
    assert grown['pantheraml_requests_total{route="/v1/completions",status="200"}'] == 1
    assert grown['pantheraml_requests_total{route="other",status="404"}'] == 1
    assert grown["pantheraml_first_token_seconds_count"] == grown['pantheraml_first_token_seconds_bucket{le="+Inf"}'] == 1
    assert after["pantheraml_rows"] == 4 and grown["pantheraml_busy_seconds_total"] > 0
    text = served.http.get("/metrics")
    assert text.headers["content-type"].startswith("text/plain; version=0.0.4")
    typed = [line.split()[2] for line in text.text.splitlines() if line.startswith("# TYPE")]
    assert len(typed) == len(set(typed)) > 8


# ---- What is refused before anything starts -----------------------------------------------------------------------


def test_a_port_that_is_taken_is_said(served: Running) -> None:
    with pytest.raises(RecipeError, match=rf"127.0.0.1:{served.port} cannot be listened to(?s:.)*--port"):
        bind("127.0.0.1", served.port)


@pytest.mark.parametrize("words", [["lawyer"], ["=a"], ["a="], ["a=b", "a=c"]])
def test_adapters_are_named(words: list[str]) -> None:
    with pytest.raises(RecipeError, match="is not NAME=PATH"):
        named_adapters(words)
    assert named_adapters(["a=b=c", "d=e"]) == {"a": Path("b=c"), "d": Path("e")}


def test_an_adapter_that_cannot_be_served_is_said(folders: Path, tmp_path: Path) -> None:
    from pantheraml.serve import open_service

    for adapters, what in (
        ({"lawyer": tmp_path}, "holds no adapter"),
        ({"model": folders / "lawyer"}, "cannot be served as 'model'"),
        ({"a.b": folders / "lawyer"}, "cannot be served as 'a.b'"),
    ):
        with pytest.raises(RecipeError, match=what):
            open_service(str(folders / "model"), adapters=adapters, rows=1)
    with pytest.raises(RecipeError, match="does not go onto this model"):
        open_service("tiny:llama", adapters={"lawyer": folders / "lawyer"}, rows=1)


def test_a_limit_limits() -> None:
    with pytest.raises(ValueError, match="seconds=0"):
        Limits(seconds=0)
    assert Limits(queue=0).queue == 0
