"""What the routes answer, for /openapi.json."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

_TEXT, _COUNT, _NUMBER = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "number"}
_ERROR = {
    "error": {
        "type": "object",
        "required": ["message", "type", "param", "code"],
        "properties": {"message": _TEXT, "type": _TEXT, "param": {"type": ["string", "null"]}, "code": {"type": ["string", "null"]}},
    }
}


def _object(properties: dict[str, Any], *, optional: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [name for name in properties if name not in optional]}


def _is(value: str) -> dict[str, Any]:
    return {"type": "string", "const": value}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _said(said: str, schema: dict[str, Any], *, streamed: bool = False) -> dict[int | str, dict[str, Any]]:
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    if streamed:
        content["text/event-stream"] = {"schema": {"type": "string", "description": "data: JSON, and data: [DONE] at the end."}}
    return {200: {"description": said, "content": content}}


def _refused(said: str) -> dict[str, Any]:
    return {"description": said, "content": {"application/json": {"schema": _object(_ERROR)}}}


REFUSED: dict[int | str, dict[str, Any]] = {
    400: _refused("The request cannot be served as it is; param says which field is to blame."),
    401: _refused("The API key is missing, or wrong."),
    403: _refused("The service was asked under a name that it does not have."),
    404: _refused("There is no such model."),
    408: _refused("The body did not come in time."),
    413: _refused("The body is too long."),
    429: _refused("Too many requests; Retry-After says when to try again."),
    503: _refused("The device failed, or the service is shutting down."),
}

_USAGE = _object({"prompt_tokens": _COUNT, "completion_tokens": _COUNT, "total_tokens": _COUNT})
_LOGPROBS = {"type": ["object", "null"]}
_REASON = {"type": "string", "enum": ["stop", "length"]}
_HEAD = {"id": _TEXT, "created": _COUNT, "model": _TEXT}


def _answer(called: str, said: dict[str, Any]) -> dict[str, Any]:
    choice = _object({"index": _COUNT, **said, "logprobs": _LOGPROBS, "finish_reason": _REASON})
    return _object({**_HEAD, "object": _is(called), "choices": _list(choice), "usage": _USAGE})


_TURN = _object({"role": _is("assistant"), "content": _TEXT})
_ONE_MODEL = _object({"id": _TEXT, "object": _is("model"), "created": _COUNT, "owned_by": _TEXT})
_VECTOR = {"oneOf": [_list(_NUMBER), {"type": "string", "description": "base64 of little-endian float32"}]}
_EMBEDDING = _object({"object": _is("embedding"), "index": _COUNT, "embedding": _VECTOR})

CHAT = _said("The answers.", _answer("chat.completion", {"message": _TURN}), streamed=True)
COMPLETION = _said("The answers.", _answer("text_completion", {"text": _TEXT}), streamed=True)
EMBEDDINGS = _said(
    "Means of the last hidden states, of length 1.",
    _object(
        {
            "object": _is("list"),
            "data": _list(_EMBEDDING),
            "model": _TEXT,
            "usage": _object({"prompt_tokens": _COUNT, "total_tokens": _COUNT}),
        }
    ),
)
MODELS = _said("All models.", _object({"object": _is("list"), "data": _list(_ONE_MODEL)}))
MODEL = _said("The model.", _ONE_MODEL)
HEALTH = _said("Requests are taken.", _object({"status": _is("ok")}))
METRICS: dict[int | str, dict[str, Any]] = {
    200: {"description": "Prometheus' text format.", "content": {"text/plain": {"schema": {"type": "string"}}}}
}
COUNCIL = _said("The transcript.", {"type": "object"}, streamed=True)


def tidy(app: FastAPI) -> None:
    """The description as it is served: what FastAPI says of invalid bodies (422) is not what is answered."""
    made = app.openapi()
    for path in made["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
            if operation["responses"]["200"]["content"].get("text/plain"):
                operation["responses"]["200"]["content"].pop("application/json", None)
    for name in ("HTTPValidationError", "ValidationError"):
        made.get("components", {}).get("schemas", {}).pop(name, None)
    made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer", "description": "Where the service has a key."}}
    made["security"] = [{}, {"key": []}]
