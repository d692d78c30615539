"""The process of a service: a socket, connections that may not dawdle, and a clean end."""

from __future__ import annotations

import asyncio
import ipaddress
import math
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from pantheraml.errors import RecipeError
from pantheraml.serve.app import create_app
from pantheraml.serve.limits import Limits
from pantheraml.serve.service import Service

LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
LAST_SECONDS = 5.0
"""For answers that were ended to reach their clients."""
HEAD_BYTES = 32 * 1024


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a service that is bound to it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_reach(host: str, key: str | None) -> frozenset[str] | None:
    """The names under which a service may be asked; None: any. Raises: RecipeError if everybody could, without a key."""
    if key is not None:
        return None
    if not is_loopback(host):
        raise RecipeError(
            f"the service would be open to everybody who reaches {host}",
            why="it is bound to more than this machine, and asks for no key",
            fix="name a variable that holds a key, --api-key-env NAME, or leave --host out",
        )
    return LOOPBACK | {f"[{host}]" if ":" in host else host}


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises: RecipeError if it cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise RecipeError(
            f"{host}:{port} cannot be listened to: {error.strerror or error}",
            why="the service answers there",
            fix="choose another --port (0: any that is free), or end what listens there",
        ) from error


def serve(service: Service, listening: socket.socket, *, announce: Callable[[str], None] = lambda said: None) -> None:
    """Answer until the process is told to end (SIGTERM, SIGINT); then see `Limits.grace_seconds`. announce: hears of the end."""
    Server(service, listening, announce=announce).run_here()


class Server(uvicorn.Server):
    """A server for one service, on a socket that listens."""

    def __init__(self, service: Service, listening: socket.socket, *, announce: Callable[[str], None] = lambda said: None) -> None:
        limits = service.limits
        super().__init__(
            uvicorn.Config(
                create_app(service),
                http=protocol(limits),
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=math.ceil(limits.idle_seconds),
                timeout_graceful_shutdown=math.ceil(limits.grace_seconds + LAST_SECONDS),
                limit_concurrency=limits.connections,
                h11_max_incomplete_event_size=HEAD_BYTES,
            )
        )
        self._service, self._listening, self._announce = service, listening, announce

    def run_here(self) -> None:
        """Until it is told to end."""
        self.run(sockets=[self._listening])

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """No new requests; those in work have some seconds."""
        self._announce("ending: no new requests, and those in work have a few seconds")
        draining = asyncio.create_task(self._service.engine.drain())
        await super().shutdown(sockets)
        await draining

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn does, but a process that has ended as it was told has not failed: the signal is not raised again."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {each: signal.signal(each, self.handle_exit) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)


def protocol(limits: Limits) -> type[H11Protocol]:
    """Connections that are closed when the head of a request takes too long; uvicorn itself only ends those between two requests."""

    class Connection(H11Protocol):
        _waiting: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            super().connection_lost(exc)

        def _watch(self) -> None:
            if self.conn.their_state is not h11.IDLE:
                self._stop()
            elif self._waiting is None:
                self._waiting = self.loop.call_later(limits.head_seconds, self.transport.close)

        def _stop(self) -> None:
            if self._waiting is not None:
                self._waiting.cancel()
                self._waiting = None

    return Connection
