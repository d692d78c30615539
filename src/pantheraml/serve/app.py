"""The routes, as an ASGI application."""

from __future__ import annotations

import asyncio
import base64
import threading
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from importlib.metadata import version
from logging import getLogger
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response

from pantheraml.serve import answers, described
from pantheraml.serve.bodies import ChatBody, CompletionBody, CouncilBody, EmbeddingsBody
from pantheraml.serve.deliberation import Deliberation
from pantheraml.serve.events import GONE, EventStream, Gone, unless_gone
from pantheraml.serve.guard import MODELS, Guard
from pantheraml.serve.refusal import Json, Refusal
from pantheraml.serve.service import Service

SAMPLE_SECONDS = 1.0
"""Between two looks at how many tokens were drawn."""
LOG_SECONDS = 10.0
_log = getLogger("pantheraml.serve")


def create_app(service: Service) -> FastAPI:
    """The service as an ASGI application. Its engine starts and ends with it."""
    deliberation = Deliberation(service)

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        watching = asyncio.create_task(_watch(service))
        try:
            yield
        finally:
            watching.cancel()
            await service.engine.drain()
            await asyncio.to_thread(service.engine.close)

    app = FastAPI(
        title="PantheraML",
        version=version("pantheraml"),
        description="Chat, completions and embeddings after OpenAI's API, and councils.",
        lifespan=life,
        docs_url=None,  # its pages load scripts from elsewhere
        redoc_url=None,
        telemetry={"auto_configure": False, "tracing": False, "metrics": False, "logs": False},  # nothing is told to anybody
        responses=described.REFUSED,
    )
    _add_answers(app, service)
    _add_facts(app, service)

    @app.post("/v1/council", summary="Several advisors debate a question.", responses=described.COUNCIL)
    async def council(body: CouncilBody, request: Request) -> Response:
        deliberation.check(body)
        if body.stream:
            return EventStream(lambda: deliberation.events(body), stall_s=service.limits.body_seconds)
        return await _whole(request, deliberation.whole(body))

    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _broken)
    described.tidy(app)
    app.add_middleware(Guard, service=service, routes=frozenset(app.openapi()["paths"]) | {"/openapi.json"})
    return app


def _add_answers(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", summary="The next turn of a conversation.", responses=described.CHAT)
    async def chat(body: ChatBody, request: Request) -> Response:
        return await _answered(service, request, await answers.chat(service, body), stream=bool(body.stream))

    @app.post("/v1/completions", summary="How a text goes on.", responses=described.COMPLETION)
    async def completion(body: CompletionBody, request: Request) -> Response:
        return await _answered(service, request, await answers.completion(service, body), stream=bool(body.stream))

    @app.post("/v1/embeddings", summary="Texts as vectors.", responses=described.EMBEDDINGS)
    async def embeddings(body: EmbeddingsBody, request: Request) -> Response:
        return await _whole(request, _embedded(service, body))


def _add_facts(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", summary="The models that are served.", responses=described.MODELS)
    async def models() -> Response:
        return Json({"object": "list", "data": [_model(service, name) for name in service.models]})

    @app.get(MODELS + "{model:path}", summary="One of them.", responses=described.MODEL)
    async def model(model: str) -> Response:
        service.adapter(model)
        return Json(_model(service, model))

    @app.get("/health", summary="Whether requests are taken.", responses=described.HEALTH)
    async def health() -> Response:
        service.engine.check(0)
        return Json({"status": "ok"})

    @app.get("/metrics", summary="What is counted, for Prometheus.", responses=described.METRICS)
    async def metrics() -> Response:
        return PlainTextResponse(service.engine.counted(), media_type="text/plain; version=0.0.4")


# ---- What the routes share --------------------------------------------------------------------------------------


async def _answered(service: Service, request: Request, asked: answers.Asked, *, stream: bool) -> Response:
    if stream:
        return EventStream(lambda: answers.pieces(service, asked), stall_s=service.limits.body_seconds)
    return await _whole(request, answers.whole(service, asked))


async def _whole(request: Request, work: Awaitable[Any]) -> Response:
    """The result as JSON, unless the client goes before: then the work ends."""
    try:
        return Json(await unless_gone(request.receive, work))
    except Gone:
        return Response(status_code=GONE)


async def _embedded(service: Service, body: EmbeddingsBody) -> dict[str, Any]:
    adapter, vectors, inputs = service.adapter(body.model), service.vectors, body.inputs
    if not 1 <= len(inputs) <= service.limits.inputs:
        raise Refusal(400, f"one request has 1 to {service.limits.inputs} texts here, and not {len(inputs)}", param="input")
    if body.dimensions not in (None, vectors.dimensions):
        raise Refusal(400, f"the vectors of this model have {vectors.dimensions} dimensions", param="dimensions")
    tokens = await service.engine.aside("prompts", lambda: [service.text_input(text) for text in inputs])
    gone = threading.Event()
    try:
        found = await service.engine.aside("vectors", lambda: vectors.embed(tokens, adapter=adapter, gone=gone))
    except (RuntimeError, MemoryError) as error:  # of the device
        raise Refusal(503, f"the vectors could not be computed: {str(error).splitlines()[0]}", code="device_error") from error
    finally:
        gone.set()
    if not np.isfinite(found).all():
        raise Refusal(503, "the model's hidden states are not finite", code="device_error")
    data = [
        base64.b64encode(vector.astype("<f4").tobytes()).decode() if body.encoding_format == "base64" else vector.tolist()
        for vector in found
    ]
    read = sum(map(len, tokens))
    return {
        "object": "list",
        "data": [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(data)],
        "model": body.model,
        "usage": {"prompt_tokens": read, "total_tokens": read},
    }


def _model(service: Service, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": service.created, "owned_by": "pantheraml"}


async def _watch(service: Service) -> None:
    """Measures tokens per second, and says so while there are any."""
    engine, batcher, said_s = service.engine, service.engine.batcher, 0.0
    while True:
        now = time.monotonic()
        engine.metrics.drawn(now, batcher.work.new_tokens)
        if engine.metrics.tokens_per_s > 0 and now - said_s >= LOG_SECONDS:
            said_s, (busy, waiting) = now, batcher.going
            rate = engine.metrics.tokens_per_s
            _log.info("%s: %d of %d rows busy, %d wait, %.0f tokens/s", service.device.label, busy, batcher.rows, waiting, rate)
        await asyncio.sleep(SAMPLE_SECONDS)


# ---- Errors -----------------------------------------------------------------------------------------------------


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return error.response()


async def _invalid(_: Request, error: Exception) -> Response:
    """The first thing that is wrong with a body. What was sent is not said back: it may be anything."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    broken = first["type"] == "json_invalid"  # then its place is a number of characters, and no field
    path = "" if broken else ".".join(str(part) for part in first["loc"] if part != "body")
    field = (first.get("ctx") or {}).get("field")
    param = ".".join(part for part in (path, field) if part) or None
    code = {"extra_forbidden": "unknown_parameter", "missing": "missing_required_parameter", "json_invalid": "invalid_json"}.get(
        first["type"], first["type"] if first["type"] == "unsupported_value" else "invalid_value"
    )
    said = "it is not known here; leave it out" if first["type"] == "extra_forbidden" else first["msg"]
    if broken:
        said = f"this is not JSON: {(first.get('ctx') or {}).get('error', 'it cannot be read')} at character {first['loc'][-1]}"
    return Refusal(400, f"{param or 'the body'}: {said}", param=param, code=code).response()


async def _http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = {404: "there is no such route; see /openapi.json", 405: "this route takes another method; see /openapi.json"}
    response = Refusal(error.status_code, said.get(error.status_code, str(error.detail))).response()
    response.headers.update(error.headers or {})
    return response


async def _broken(_: Request, error: Exception) -> Response:
    return Refusal(500, f"this is a mistake in the service: {type(error).__name__}", code="internal_error").response()
