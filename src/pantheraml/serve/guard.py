"""What stands before every route: the key, the name that was asked, the size of a body, and the count of requests."""

from __future__ import annotations

import asyncio
import hmac
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pantheraml.serve.events import GONE
from pantheraml.serve.limits import Limits
from pantheraml.serve.refusal import Refusal
from pantheraml.serve.service import Service

OPEN = ("/health", "/openapi.json")
"""Paths that need no key: they say nothing of what is answered."""
MODELS = "/v1/models/"
DISCARD_SECONDS = 2.0
"""A body that is not wanted is read for so long, and thrown away: a client that is sending does not read why it is refused."""


class Guard:
    """An ASGI application around another one, which it gives whole bodies only.

    routes: paths that metrics may name; others are counted as one, or clients could make the metrics as long as they like.
    """

    def __init__(self, app: ASGIApp, service: Service, routes: frozenset[str]) -> None:
        self._app, self._service, self._routes = app, service, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        status = GONE

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        coming = _Body(scope, receive)
        try:
            self._check(scope)
            body = await coming.read(self._service.limits)
        except Refusal as refusal:
            await coming.discard()
            response = refusal.response()
            if not coming.whole:
                response.headers["Connection"] = "close"
            await response(scope, receive, noting)
        else:
            if body is not None:  # otherwise nobody is there
                await self._app(scope, _given(body, receive), noting)
        finally:
            self._service.engine.metrics.request(self._route(scope["path"]), status)

    def _route(self, path: str) -> str:
        return path if path in self._routes else f"{MODELS}{{model}}" if path.startswith(MODELS) else "other"

    def _check(self, scope: Scope) -> None:
        """Raises: Refusal for a request that has no business here."""
        headers = dict(scope["headers"])
        hosts, key = self._service.hosts, self._service.key
        if hosts is not None:
            # A page from elsewhere may have its name lead to this machine; the name it asks for gives it away.
            name = headers.get(b"host", b"").decode("latin-1").rpartition("@")[2]
            name = name.partition("]")[0] + "]" if name.startswith("[") else name.partition(":")[0]
            if name.lower() not in hosts:
                raise Refusal(403, f"this service is asked as {', '.join(sorted(hosts))} only", code="host_not_allowed")
        if key is not None and scope["path"] not in OPEN:
            scheme, _, shown = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(shown.strip(), key.encode()):
                raise Refusal(401, "this service needs its API key: Authorization: Bearer KEY", code="invalid_api_key")


class _Body:
    """The body of a request while it comes. whole: its end is here."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self._receive, self._said_bytes = receive, int(dict(scope["headers"]).get(b"content-length", b"0"))
        self.whole = self._gone = False

    async def read(self, limits: Limits) -> bytes | None:
        """All of it; None: the client has gone. Raises: Refusal if it is too long, or too slow."""
        too_long = Refusal(413, f"a request has at most {limits.body_bytes} bytes here", code="request_too_large")
        if self._said_bytes > limits.body_bytes:
            raise too_long
        body = bytearray()
        try:
            async with asyncio.timeout(limits.body_seconds):
                while not self.whole:
                    body += await self._next()
                    if self._gone:
                        return None
                    if len(body) > limits.body_bytes:
                        raise too_long
        except TimeoutError:
            said = f"the body of a request must be here in {limits.body_seconds:g} s"
            raise Refusal(408, said, code="request_timeout") from None
        return bytes(body)

    async def discard(self) -> None:
        """Throw away what still comes, for a while, so that the client comes to read why."""
        with suppress(TimeoutError):
            async with asyncio.timeout(DISCARD_SECONDS):
                while not self.whole and not self._gone:
                    await self._next()

    async def _next(self) -> bytes:
        message = await self._receive()
        self._gone = message["type"] == "http.disconnect"
        self.whole = not self._gone and not message.get("more_body", False)
        return message.get("body", b"")


def _given(body: bytes, receive: Receive) -> Receive:
    """A body that is there already, then whatever comes: that the client goes."""
    given = False

    async def one() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return one
