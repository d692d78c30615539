"""Requests that nobody in their right mind sends: none of them is answered with a failure of the service."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from tests.serve.conftest import Running, eventually, running

from pantheraml.serve import Limits

ROUTES = {
    "/v1/chat/completions": 60,
    "/v1/completions": 60,
    "/v1/embeddings": 40,
    "/v1/council": 30,
    "/v1/models": 3,
    "/v1/models/{model}": 15,
    "/health": 3,
    "/metrics": 3,
}
"""Examples of each, of every kind."""
POSTED = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/council")


@pytest.fixture(scope="module")
def short(folders: Path) -> Iterator[Running]:
    """One whose answers are short."""
    limits = Limits(new_tokens=6, body_bytes=100_000, choices=4, seconds=5, grace_seconds=2)
    with running(folders / "model", rows=4, limits=limits) as here:
        yield here


def operation(here: Running, path: str) -> Any:
    schema = schemathesis.openapi.from_url(f"{here.url}/openapi.json")
    found = [each.ok() for each in schema.get_all_operations()]
    return next(each for each in found if each.path == path)


def test_every_route_is_described_and_tried(short: Running) -> None:
    described = short.http.get("/openapi.json").json()
    assert set(described["paths"]) == set(ROUTES)
    assert described["openapi"].startswith("3.1") and "HTTPValidationError" not in json.dumps(described)


def make_likely(case: Any, path: str) -> None:
    """So that more of them get as far as the model."""
    if path == "/v1/models/{model}":
        case.path_parameters = {"model": "model"}
    if not isinstance(case.body, dict):
        return
    if path == "/v1/council":
        case.body = {**case.body, "max_tokens": 4, "rounds": 1, "samples": 1}
    else:
        case.body = {**case.body, "model": "model"}
        if isinstance(case.body.get("max_tokens"), int):
            case.body["max_tokens"] = 4


@pytest.mark.parametrize(
    ("path", "mode"),
    [
        *((path, GenerationMode.POSITIVE) for path in ROUTES),
        *((path, GenerationMode.NEGATIVE) for path in POSTED),  # where there is no body, nothing can be wrong with it
    ],
    ids=lambda each: each if isinstance(each, str) else each.value,
)
def test_no_request_breaks_the_service(short: Running, path: str, mode: GenerationMode) -> None:
    tried = operation(short, path)
    seen: list[int] = []

    @given(case=tried.as_strategy(generation_mode=mode), likely=st.sampled_from([True, True, True, False]))
    @settings(
        max_examples=ROUTES[path],
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def attempt(case: Any, likely: bool) -> None:
        if likely:
            make_likely(case, path)
        response = case.call(base_url=short.url, timeout=60)
        seen.append(response.status_code)
        assert response.status_code < 500, response.text
        if response.status_code >= 400:
            error = response.json()["error"]
            assert error["message"] and error.keys() == {"message", "type", "param", "code"}

    attempt()
    assert mode is GenerationMode.NEGATIVE or 200 in seen  # some got as far as the model
    eventually(lambda: short.metric("pantheraml_rows_busy") == 0)


ODD: list[tuple[str, bytes]] = [
    ("half a character", b'{"model": "model", "prompt": "\\ud800"}'),
    ("half a character as a name", b'{"model": "model", "prompt": "a", "\\udfff": 1}'),
    ("half a character in a schema", b'{"model":"model","messages":[{"role":"user","content":"a"}],"response_format":{"type":"json_schema",'
     b'"json_schema":{"name":"a","schema":{"enum":["\\ud800"]}}}}'),
    ("no text at all", b"\xff\xfe\x00"),
    ("zero bytes", b'{"model": "model", "prompt": "\\u0000"}'),
    ("a deep hole", b"[" * 50_000),
    ("a deep schema", b'{"model":"model","messages":[{"role":"user","content":"a"}],"response_format":{"type":"json_schema","json_schema":'
     b'{"name":"a","schema":' + b'{"items":' * 300 + b"{}" + b"}" * 300 + b"}}}"),
    ("a schema of itself", b'{"model":"model","max_tokens":6,"messages":[{"role":"user","content":"a"}],"response_format":{"type":'
     b'"json_schema","json_schema":{"name":"a","schema":{"$ref":"#"}}}}'),
    ("a schema elsewhere", b'{"model":"model","max_tokens":6,"messages":[{"role":"user","content":"a"}],"response_format":{"type":'
     b'"json_schema","json_schema":{"name":"a","schema":{"$ref":"http://127.0.0.1:9/x"}}}}'),
    ("a costly pattern", b'{"model":"model","max_tokens":6,"messages":[{"role":"user","content":"a"}],"response_format":{"type":'
     b'"json_schema","json_schema":{"name":"a","schema":{"type":"string","pattern":"^(a{1,1000}){1,1000}$"}}}}'),
    ("no number", b'{"model": "model", "prompt": "a", "temperature": NaN}'),
    ("more than a number", b'{"model": "model", "prompt": "a", "temperature": 1e999}'),
    ("a long number", b'{"model": "model", "prompt": "a", "seed": 1' + b"0" * 5000 + b"}"),
    ("the largest number", b'{"model": "model", "prompt": "a", "max_tokens": 2, "seed": 9223372036854775807, "n": 2}'),
    ("a token that is none", b'{"model": "model", "prompt": [99999]}'),
    ("nothing to go on with", b'{"model": "model", "prompt": ""}'),
    ("nothing of several", b'{"model": "model", "prompt": []}'),
    ("two kinds at once", b'{"model": "model", "prompt": ["a", 1]}'),
    ("the same name twice", b'{"model": "model", "model": 1, "prompt": "a"}'),
    ("no object", b'"model"'),
    ("nothing", b""),
]  # fmt: skip


@pytest.mark.parametrize("body", [body for _, body in ODD], ids=[name for name, _ in ODD])
def test_odd_bodies_are_answered(short: Running, body: bytes) -> None:
    paths = ["/v1/chat/completions"] if b"messages" in body else ["/v1/completions", "/v1/embeddings", "/v1/council"]
    for path in paths:
        for given_body in (body, body.replace(b'"prompt"', b'"input"'), body.replace(b'"prompt"', b'"question"')):
            response = short.http.post(path, content=given_body, headers={"Content-Type": "application/json"})
            assert response.status_code in (200, 400), (path, response.text)
            response.json()
    assert short.post("/v1/completions", model="model", prompt="a", max_tokens=1).status_code == 200


def test_answers_are_as_they_are_described(short: Running) -> None:
    described = short.http.get("/openapi.json").json()
    asked = {
        "/v1/chat/completions": {"model": "model", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "logprobs": True},
        "/v1/completions": {"model": "model", "prompt": "a", "max_tokens": 2},
        "/v1/embeddings": {"model": "model", "input": "a"},
        "/v1/models": None,
        "/v1/models/{model}": None,
        "/health": None,
    }
    for path, body in asked.items():
        method = "get" if body is None else "post"
        content = described["paths"][path][method]["responses"]["200"]["content"]["application/json"]["schema"]
        response = short.http.request(method, path.replace("{model}", "model"), json=body)
        jsonschema.validate(response.json(), {**content, "components": described["components"]})
    refused = described["paths"]["/v1/completions"]["post"]["responses"]["400"]["content"]["application/json"]["schema"]
    jsonschema.validate(short.post("/v1/completions", model="model").json(), refused)
