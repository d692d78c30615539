"""Chat and completions: from the body of a request to requests of the batcher, and from its answers to OpenAI's shapes."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pantheraml.models.request import Answer, Request
from pantheraml.serve.bodies import AsObject, AsSchema, ChatBody, CompletionBody, Sampling
from pantheraml.serve.refusal import Refusal
from pantheraml.serve.service import Service

LEAST_LOGPROB = -9999.0
"""Stands for the logarithm of 0, which JSON does not have; OpenAI writes the same."""
COMPLETION_TOKENS = 16
"""Of a completion where nothing is said, as in OpenAI's API."""
USUAL_TEMPERATURE = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What one client wants.

    Attributes:
        kind: its shape. requests: `each` for every prompt, one after the other. usage: a stream ends with it.
    """

    kind: Literal["chat", "text"]
    model: str
    requests: Sequence[Request]
    each: int
    usage: bool
    id: str
    created: int


async def chat(service: Service, body: ChatBody) -> Asked:
    """What a chat asks for. Raises: Refusal."""
    service.adapter(body.model)
    engine, each = service.engine, _choices(service, body, 1)
    messages = [{"role": "system" if message.role == "developer" else message.role, "content": message.text} for message in body.messages]
    prompt = await engine.aside("prompts", lambda: service.chat_prompt(messages))
    schema = None
    if isinstance(body.response_format, AsSchema):
        schema = body.response_format.json_schema.schema_
    elif isinstance(body.response_format, AsObject):
        schema = {"type": "object"}
    how = {"schema": schema, "logprobs": bool(body.logprobs)}
    return _asked(service, body, "chat", [prompt], each, [service.new_tokens(len(prompt), body.limit)], how)


async def completion(service: Service, body: CompletionBody) -> Asked:
    """What a completion asks for. Raises: Refusal."""
    service.adapter(body.model)
    asked = body.prompts
    if not asked:
        raise Refusal(400, "prompt is empty", param="prompt", code="empty_input")
    each = _choices(service, body, len(asked))
    prompts = await service.engine.aside("prompts", lambda: [service.text_prompt(prompt) for prompt in asked])
    most = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    limits = [service.new_tokens(len(prompt), most) for prompt in prompts]
    return _asked(service, body, "text", prompts, each, limits, {"logprobs": body.logprobs is not None})


def _choices(service: Service, body: Sampling, prompts: int) -> int:
    each = body.n or 1
    if each * prompts > service.limits.choices:
        raise Refusal(400, f"one request has at most {service.limits.choices} answers here; {each * prompts} were asked for", param="n")
    service.engine.check(each * prompts)
    return each


def _asked(
    service: Service, body: Sampling, kind: Literal["chat", "text"], prompts: Sequence[list[int]], each: int, limits: list[int], how: Any
) -> Asked:
    requests = [
        Request(
            prompt=tuple(prompt),
            max_new_tokens=limit,
            temperature=USUAL_TEMPERATURE if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=body.top_k or 0,
            seed=None if body.seed is None else body.seed + choice,
            stop=body.stops,
            adapter=service.adapter(body.model),
            **how,
        )
        for prompt, limit in zip(prompts, limits, strict=True)
        for choice in range(each)
    ]
    return Asked(
        kind=kind,
        model=body.model,
        requests=requests,
        each=each,
        usage=body.usage_at_the_end,
        id=("chatcmpl-" if kind == "chat" else "cmpl-") + secrets.token_hex(12),
        created=int(time.time()),
    )


# ---- What comes back --------------------------------------------------------------------------------------------


async def whole(service: Service, asked: Asked) -> dict[str, Any]:
    """The answers, complete. Raises: Refusal."""
    async with service.engine.asked(asked.requests, pieces=False) as group:
        answers = await group.answers()
    choices = []
    for index, (request, answer) in enumerate(zip(asked.requests, answers, strict=True)):
        said: dict[str, Any] = {"index": index}
        if asked.kind == "chat":
            said["message"] = {"role": "assistant", "content": answer.text, "refusal": None}
        else:
            said["text"] = answer.text
        choices.append({**said, "logprobs": _logprobs(service, asked, request, answer), "finish_reason": _reason(answer)})
    return {**_head(asked, streamed=False), "choices": choices, "usage": _usage(asked, answers)}


async def pieces(service: Service, asked: Asked) -> AsyncGenerator[dict[str, Any], None]:
    """The answers as they come. Raises: Refusal."""
    head = {**_head(asked, streamed=True), **({"usage": None} if asked.usage else {})}
    begun: set[int] = set()
    answers: list[Answer] = []
    async with service.engine.asked(asked.requests, pieces=True) as group:
        async for event in group.events():
            if isinstance(event.what, Refusal):
                raise event.what
            if asked.kind == "chat" and event.index not in begun:
                begun.add(event.index)
                yield {**head, "choices": [_piece(asked, event.index, {"role": "assistant", "content": ""})]}
            if isinstance(event.what, str):
                yield {**head, "choices": [_piece(asked, event.index, {"content": event.what})]}
                continue
            answers.append(event.what)
            last = _piece(asked, event.index, {})
            last["logprobs"] = _logprobs(service, asked, asked.requests[event.index], event.what)
            last["finish_reason"] = _reason(event.what)
            yield {**head, "choices": [last]}
    if asked.usage:
        yield {**head, "choices": [], "usage": _usage(asked, answers)}


def _head(asked: Asked, *, streamed: bool) -> dict[str, Any]:
    called = "text_completion" if asked.kind == "text" else "chat.completion.chunk" if streamed else "chat.completion"
    return {"id": asked.id, "object": called, "created": asked.created, "model": asked.model}


def _piece(asked: Asked, index: int, delta: dict[str, str]) -> dict[str, Any]:
    said: dict[str, Any] = {"delta": delta} if asked.kind == "chat" else {"text": delta.get("content", "")}
    return {"index": index, **said, "logprobs": None, "finish_reason": None}


def _reason(answer: Answer) -> str:
    return "stop" if answer.finished == "stop" else "length"


def _usage(asked: Asked, answers: Sequence[Answer]) -> dict[str, Any]:
    read = sum(len(request.prompt) for request in asked.requests[:: asked.each])
    drawn = sum(len(answer.tokens) for answer in answers)
    shared = min(read, sum(answer.shared_tokens for answer in answers))
    return {
        "prompt_tokens": read,
        "completion_tokens": drawn,
        "total_tokens": read + drawn,
        "prompt_tokens_details": {"cached_tokens": shared},
    }


def _logprobs(service: Service, asked: Asked, request: Request, answer: Answer) -> dict[str, Any] | None:
    if answer.logprobs is None:
        return None
    values = [value if value >= LEAST_LOGPROB else LEAST_LOGPROB for value in answer.logprobs]
    texts = [str(service.encoder.tokenizer.decode([token])) for token in answer.tokens]
    if asked.kind == "chat":
        # A token may be a part of a character only; what its bytes are, a tokenizer does not tell.
        said = [
            {"token": text, "logprob": value, "bytes": None if "\ufffd" in text else list(text.encode()), "top_logprobs": []}
            for text, value in zip(texts, values, strict=True)
        ]
        return {"content": said, "refusal": None}
    offsets = [0]
    for text in texts:
        offsets.append(offsets[-1] + len(text))
    return {"tokens": texts, "token_logprobs": values, "top_logprobs": None, "text_offset": offsets[:-1]}
