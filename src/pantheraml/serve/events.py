"""Answers over a connection whose other end may go away: then the work ends as well."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pantheraml.serve.refusal import Refusal, as_json

GONE = 499
"""What the metrics count for a client that has gone before its answer; it is never sent."""
DONE = b"data: [DONE]\n\n"
T = TypeVar("T")


class Gone(Exception):
    """The client is no longer there."""


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The result of some work. Raises: what it raises; Gone if the client goes first: the work is then cancelled, and has ended."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Gone
        return working.result()
    finally:
        for each in (working, leaving):
            each.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events, one for each value of `events`, and `[DONE]`.

    What is refused before the first event has the status of a refusal; afterwards an error is an event, and there is no `[DONE]`.

    Args:
        events: gives what is sent as JSON. It is closed when the client goes, or takes nothing for `stall_s` seconds.
    """

    media_type = "text/event-stream"

    def __init__(self, events: Callable[[], AsyncGenerator[Any, None]], *, stall_s: float) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._stall_s = events, stall_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        try:
            refusal = await unless_gone(receive, self._write(send))
        except (Gone, TimeoutError):
            return
        if refusal is not None:
            await refusal.response()(scope, receive, send)

    async def _write(self, send: Send) -> Refusal | None:
        """Sends all of it; returns what is to be answered instead."""
        started = False

        async def put(data: bytes, *, more: bool = True) -> None:
            nonlocal started
            async with asyncio.timeout(self._stall_s):
                if not started:
                    started = True
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await send({"type": "http.response.body", "body": data, "more_body": more})

        try:
            async with aclosing(self._events()) as events:
                async for event in events:
                    await put(_event(event))
        except Refusal as refusal:
            if not started:
                return refusal
            await put(_event(refusal.to_dict()), more=False)
            return None
        await put(DONE, more=False)
        return None


def _event(what: Any) -> bytes:
    return b"data: " + as_json(what) + b"\n\n"
