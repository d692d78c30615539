"""Everybody who answers in a debate: the local model in one batch, and the services beside it at the same time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from math import ceil
from typing import TYPE_CHECKING

from pantheraml.council.endpoint import Client
from pantheraml.council.persona import Endpoint, Persona
from pantheraml.council.reply import Ask, CancelledError, Failed, Heard, Reply
from pantheraml.errors import PantheraError, RecipeError

if TYPE_CHECKING:
    from pantheraml.council.local import Local

AT_ONCE = 16
"""Questions to services."""
LONGEST = 2.0
"""Times a service's time-out until its answer is given up: it is asked again until the time-out, and may take as long once more."""
LOOK_S = 0.1
"""Between two looks whether the debate was cancelled."""


class Panel:
    """Opens what the personas need; a context manager.

    Args:
        keys: values of the environment variables that endpoints name.
    Raises: RecipeError for a persona without a voice or a key that is not there.
    """

    def __init__(self, personas: Sequence[Persona], local: Local | None, keys: Mapping[str, str]) -> None:
        mute = [persona.name for persona in personas if persona.endpoint is None]
        if mute and local is None:
            raise RecipeError(
                f"nothing answers for {', '.join(mute)}",
                why="a persona without an endpoint speaks through the local model, and none is given",
                fix="name a model (--model), or give each persona an endpoint",
            )
        self._stack = ExitStack()
        self.speaker = local.speaker() if local is not None else None
        self._clients: dict[Endpoint, Client] = {}
        for persona in personas:
            if persona.endpoint is not None and persona.endpoint not in self._clients:
                key = _key(persona, persona.endpoint, keys)
                self._clients[persona.endpoint] = self._stack.enter_context(Client(persona.endpoint, key))

    def __enter__(self) -> Panel:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def ask(self, asks: Sequence[Ask], heard: Heard | None = None, cancelled: Callable[[], bool] = lambda: False) -> list[Reply | Failed]:
        """The answers, in the order of the asks. One that fails takes no other with it.

        Args:
            heard: the text of local answers piece by piece, and that of services when it is complete.
        Raises: RecipeError for what the local model cannot be asked at all; CancelledError.
        """
        afar = [i for i, each in enumerate(asks) if each.persona.endpoint is not None]
        near = [i for i, each in enumerate(asks) if each.persona.endpoint is None]
        found: dict[int, Reply | Failed] = {}
        begun = time.monotonic()
        pool = ThreadPoolExecutor(max(1, min(AT_ONCE, len(afar))))
        try:
            coming = {i: pool.submit(self._afar, asks[i], heard, cancelled) for i in afar}
            if near:
                assert self.speaker is not None
                found.update(zip(near, self.speaker.ask([asks[i] for i in near], heard, cancelled), strict=True))
            until = {i: begun + ceil(len(afar) / AT_ONCE) * LONGEST * _endpoint(asks[i]).timeout_s for i in afar}
            found.update({i: _arrived(asks[i], future, until[i], cancelled) for i, future in coming.items()})
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # where something was raised, nobody waits for the services
        if cancelled():
            raise CancelledError
        return [found[i] for i in range(len(asks))]

    def _afar(self, ask: Ask, heard: Heard | None, cancelled: Callable[[], bool]) -> Reply | Failed:
        try:
            reply = self._clients[_endpoint(ask)].ask(ask, cancelled)
        except PantheraError as error:
            return Failed(why=error.what)
        if heard is not None:
            heard(ask, reply.text)
        return reply


def _endpoint(ask: Ask) -> Endpoint:
    assert ask.persona.endpoint is not None
    return ask.persona.endpoint


def _arrived(ask: Ask, future: Future[Reply | Failed], until: float, cancelled: Callable[[], bool]) -> Reply | Failed:
    """The answer of a service. One that sends without an end is not waited for, nor any once the debate is cancelled."""
    while not wait([future], LOOK_S).done:
        if cancelled():
            raise CancelledError
        if time.monotonic() > until:
            return Failed(why=f"{_endpoint(ask).url} gave no answer in {LONGEST * _endpoint(ask).timeout_s:g} s")
    return future.result()


def _key(persona: Persona, endpoint: Endpoint, keys: Mapping[str, str]) -> str | None:
    if endpoint.key_env is None:
        return None
    key = keys.get(endpoint.key_env)
    if not key:
        raise RecipeError(
            f"the variable {endpoint.key_env} is not set",
            why=f"{persona.name} is answered by {endpoint.url}, which takes the key in it",
            fix=f"set {endpoint.key_env}, or leave key_env out if the service takes no key",
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise RecipeError(
            f"the variable {endpoint.key_env} holds no key",
            why="a key has no spaces, line ends, or letters beyond ASCII: it goes into the header of a request",
            fix=f"set {endpoint.key_env} to the key alone; what came out of a file may end with a line end",
        )
    return key
