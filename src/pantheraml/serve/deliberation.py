"""/v1/council: a debate of advisors on the model that is served, in a thread of its own."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pantheraml.errors import PantheraError, RecipeError
from pantheraml.serve.bodies import CouncilBody, PersonaBody
from pantheraml.serve.refusal import Refusal
from pantheraml.serve.service import Service

if TYPE_CHECKING:
    from pantheraml.council import Event, Persona, Settings, Transcript


class Deliberation:
    """Debates over the rows of a service. Its methods belong to the loop's thread."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._threads = ThreadPoolExecutor(service.limits.debates, "pantheraml-council")

    def check(self, body: CouncilBody) -> tuple[list[Persona], Settings]:
        """Who debates, and how. Raises: Refusal."""
        from pantheraml.council import Settings

        service = self._service
        service.engine.check(0)
        if len(service.engine.flags) >= service.limits.debates:
            said = f"{service.limits.debates} councils are in session, and no more can be; try again later"
            raise Refusal(429, said, code="queue_full", retry_after_s=10)
        service.new_tokens(1, body.max_tokens)
        personas = self._personas(body)
        names = [persona.name for persona in personas]
        if len(set(names)) < len(names):
            raise Refusal(400, "two personas have the same name", param="personas")
        most = service.engine.batcher.rows + service.limits.queue
        if len(personas) * max(1, body.samples) > most:
            raise Refusal(400, f"{len(personas)} personas with {body.samples} samples each are more than {most} answers", param="samples")
        if not body.question.strip():
            raise Refusal(400, "the question is empty", param="question", code="empty_input")
        return personas, Settings(
            rounds=body.rounds,
            samples=body.samples,
            quorum=body.quorum,
            max_new_tokens=body.max_tokens,
            synthesis_tokens=min(512, max(1, service.engine.batcher.tokens // 2)),
            seed=body.seed,
        )

    async def whole(self, body: CouncilBody) -> dict[str, Any]:
        """The transcript. Raises: Refusal."""
        async with aclosing(self.events(body)) as events:
            said = [event async for event in events]
        return said[-1]["transcript"]

    async def events(self, body: CouncilBody) -> AsyncGenerator[dict[str, Any], None]:
        """What happens, and the transcript at the end. Where it is closed before, the debate ends as well. Raises: Refusal."""
        personas, settings = self.check(body)
        loop, ended = asyncio.get_running_loop(), threading.Event()
        queue: asyncio.Queue[Event | None] = asyncio.Queue()
        urls = [persona.endpoint.url for persona in personas if persona.endpoint is not None]

        def tell(event: Event) -> None:
            with suppress(RuntimeError):  # the loop has ended, and with it all clients
                loop.call_soon_threadsafe(queue.put_nowait, event)

        flags = self._service.engine.flags
        flags.add(ended)
        held = loop.run_in_executor(self._threads, lambda: self._hold(body.question, personas, settings, tell, ended))
        held.add_done_callback(lambda _: flags.discard(ended))
        held.add_done_callback(lambda _: queue.put_nowait(None))
        timer = loop.call_later(self._service.limits.seconds, ended.set)
        try:
            while (event := await queue.get()) is not None:
                yield _event(event, urls)
            yield {"event": "transcript", "transcript": _told(await held, urls)}
        finally:
            timer.cancel()
            ended.set()
            held.add_done_callback(lambda done: done.cancelled() or done.exception())  # somebody has heard of it

    def _hold(self, question: str, personas: list[Persona], settings: Settings, tell: Any, ended: threading.Event) -> Any:
        """Runs in a thread."""
        from pantheraml.council import Local, debate

        service = self._service
        local = Local(
            batcher=service.engine.batcher,
            tokenizer=service.tokenizer,
            name=service.name,
            adapter=service.adapter(None),
            called={name: adapter for name, adapter in service.models.items() if adapter is not None},
            device=service.device,
            dtype=service.dtype,
        )
        try:
            transcript: Transcript = debate(
                question,
                personas,
                settings,
                local=local,
                memory=service.memory,
                keys=service.keys,
                on_event=tell,
                cancelled=ended.is_set,
            )
        except RecipeError as error:
            raise Refusal.of(error) from error
        except PantheraError as error:
            raise Refusal.of(error, 503) from error
        except (RuntimeError, MemoryError, ValueError) as error:  # of the device, or a service that ends
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise Refusal(503, f"the debate was ended by an error: {said}", code="batch_error", retry_after_s=1) from error
        return transcript.to_dict()

    def _personas(self, body: CouncilBody) -> list[Persona]:
        from pantheraml.council import DEFAULT_PERSONAS

        own = {persona.name: persona for persona in self._service.personas or DEFAULT_PERSONAS}
        if body.personas is None:
            return list(own.values())
        found: list[Persona] = []
        for asked in body.personas:
            if isinstance(asked, PersonaBody):
                found.append(self._persona(asked))
            elif asked in own:
                found.append(own[asked])
            else:
                raise Refusal(400, f"there is no persona {asked!r} here; there are: {', '.join(own)}", param="personas")
        return found

    def _persona(self, asked: PersonaBody) -> Persona:
        from pantheraml.council import Persona

        adapter = self._service.adapter(asked.model)
        if asked.model is not None and adapter is None and self._service.adapter(None) is not None:
            raise Refusal(400, "an advisor has the model that is served, or one of its adapters, and not the base", param="personas")
        try:
            return Persona(
                name=asked.name,
                prompt=asked.prompt,
                adapter=adapter,
                temperature=asked.temperature,
                expertise=tuple(asked.expertise),
                weight=asked.weight,
            )
        except ValueError as error:
            raise Refusal(400, f"the persona {asked.name!r} cannot be used: {error}", param="personas") from error


def _event(event: Event, urls: Sequence[str]) -> dict[str, Any]:
    said: dict[str, Any] = {"event": event.kind, "text": event.text}
    if event.round >= 0:
        said["round"] = event.round
    if event.advisor:
        said["advisor"] = event.advisor
    if event.turn is not None:
        said["turn"] = asdict(event.turn)
    return _told(said, urls)


def _told(said: Any, urls: Sequence[str]) -> Any:
    """What a client hears: nothing in the place of numbers that JSON does not have, and not where the services of personas are."""
    if isinstance(said, dict):
        return {name: None if name == "endpoint" else _told(value, urls) for name, value in said.items()}
    if isinstance(said, list | tuple):
        return [_told(value, urls) for value in said]
    if isinstance(said, str):
        for url in urls:
            said = said.replace(url, "a service")
        return said
    return None if isinstance(said, float) and not math.isfinite(said) else said
