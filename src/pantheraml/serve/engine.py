"""The batcher as coroutines see it: answers that come as events, without a thread for each, and rows that are free when a client is gone."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from pantheraml.errors import DeviceError, PantheraError
from pantheraml.models.batch import Batcher
from pantheraml.models.handle import Handle
from pantheraml.models.request import Answer, Request
from pantheraml.serve.limits import Limits
from pantheraml.serve.metrics import Metrics
from pantheraml.serve.refusal import Refusal

LONGEST_RETRY_S = 60
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Event:
    """What came of one answer of a group: a piece of its text, or its end."""

    index: int
    what: str | Answer | Refusal


class Group:
    """The answers to one client's request, on their way."""

    def __init__(self, count: int) -> None:
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._open = count
        self._handles: list[Handle] = []
        self._cancelled = False
        self.ended_early: str | None = None
        """Why the service ended them; None: it did not."""

    async def events(self) -> AsyncIterator[Event]:
        """Pieces and ends as they come, until all have ended. To be iterated over once."""
        while self._open:
            event = await self._events.get()
            if not isinstance(event.what, str):
                self._open -= 1
            yield event

    async def answers(self) -> list[Answer]:
        """All of them, in order. Raises: Refusal, what the first one that was lost ended with."""
        found: dict[int, Answer] = {}
        async for event in self.events():
            if isinstance(event.what, Refusal):
                raise event.what
            if isinstance(event.what, Answer):
                found[event.index] = event.what
        return [found[index] for index in sorted(found)]

    def holds(self, handles: list[Handle]) -> None:
        """What computes them, from any thread."""
        self._handles = handles
        if self._cancelled:
            self.cancel()

    @property
    def done(self) -> bool:
        """Whether all have ended."""
        return all(handle.done for handle in self._handles)

    def put(self, index: int, what: str | Answer | Refusal) -> None:
        """From the loop's thread."""
        self._events.put_nowait(Event(index, what))

    def end(self, why: str) -> None:
        """They end before the next token, and that is what they say of it."""
        self.ended_early = self.ended_early or why
        self.cancel()

    def cancel(self) -> None:
        """Their rows are free before the next token."""
        self._cancelled = True
        for handle in self._handles:
            handle.cancel()


class Engine:
    """One batcher for many clients. Its methods belong to the loop's thread, where nothing else is said.

    Args:
        batcher: with the rows; it is started here. wanted: that it is at work again after an error that ended its thread.
    """

    def __init__(self, batcher: Batcher, limits: Limits, metrics: Metrics) -> None:
        self.batcher, self.limits, self.metrics = batcher, limits, metrics
        # A tokenizer serves one thread at a time; and a schema may take long, which must not keep plain prompts waiting.
        self._readers = {kind: ThreadPoolExecutor(1, f"pantheraml-{kind}") for kind in ("prompts", "schemas", "vectors")}
        self._groups: set[Group] = set()
        self._taken = 0
        self._aside = Counter[str]()
        self._starting = threading.Lock()
        self.flags: set[threading.Event] = set()
        """Of other work that uses the rows: set where it is to end."""
        self.closing = False
        """Whether no more requests are taken."""

    def start(self) -> None:
        """From here on requests are taken."""
        self.batcher.start()

    def close(self) -> None:
        """Answers that are in work are cancelled. From any thread, when the loop is done."""
        self.closing = True
        for reader in self._readers.values():
            reader.shutdown(wait=True, cancel_futures=True)
        self.batcher.close()

    async def drain(self) -> None:
        """No more requests; those in work have `grace_seconds`, then they end as they are."""
        self.closing = True
        until = time.monotonic() + self.limits.grace_seconds
        while (self._groups or self.flags) and time.monotonic() < until:
            await asyncio.sleep(0.02)
        for group in list(self._groups):
            group.end("the service is shutting down")
        for flag in list(self.flags):
            flag.set()

    async def aside(self, kind: str, call: Callable[[], T]) -> T:
        """The result of a call that may take long, in the thread for prompts, schemas or vectors; one at a time.

        Raises: what it raises; Refusal if too many wait, or the service ends.
        """
        self.check(0)
        if self._aside[kind] > self.limits.queue:
            raise Refusal(429, "too many requests wait to be read; try again later", code="queue_full", retry_after_s=1)
        self._aside[kind] += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._readers[kind], call)
        finally:
            self._aside[kind] -= 1

    def counted(self) -> str:
        """All metrics, as Prometheus reads them."""
        busy, waiting = self.batcher.going
        work = self.batcher.work
        gauges: dict[str, tuple[str, float]] = {
            "pantheraml_rows": ("Answers that can be computed at once.", self.batcher.rows),
            "pantheraml_rows_busy": ("Answers that are computed now.", busy),
            "pantheraml_queue_length": ("Requests that wait for a row.", waiting),
            "pantheraml_tokens_per_second": ("Tokens drawn, of the last seconds.", self.metrics.tokens_per_s),
        }
        counters: dict[str, tuple[str, float]] = {
            "pantheraml_prompt_tokens_total": ("Tokens of prompts that were read.", work.read_tokens),
            "pantheraml_shared_tokens_total": ("Tokens of prompts that were in memory already.", work.shared_tokens),
            "pantheraml_new_tokens_total": ("Tokens that were drawn.", work.new_tokens),
            "pantheraml_steps_total": ("Steps that drew a token for every answer in work.", work.steps),
            "pantheraml_busy_seconds_total": ("Seconds in which something was computed.", work.busy_s),
        }
        return self.metrics.text(gauges, counters)

    # ---- Asking -------------------------------------------------------------------------------------------------

    def check(self, count: int) -> None:
        """Raises: Refusal if so many answers more are too many, or the service ends."""
        if self.closing:
            raise Refusal(503, "the service is shutting down", code="shutting_down", retry_after_s=1)
        rows, queue = self.batcher.rows, self.limits.queue
        if self._taken + count > rows + queue:
            raise Refusal(
                429,
                f"{self._taken} answers are in work or wait, and {rows + queue} can; try again later",
                code="queue_full",
                retry_after_s=self._retry_after_s(count),
            )

    def _retry_after_s(self, count: int) -> int:
        """When about as many rows as are asked for have become free, by how long an answer took so far."""
        mean_s = self.metrics.total_s.mean or 1.0
        too_many = self._taken + count - self.batcher.rows - self.limits.queue
        return min(LONGEST_RETRY_S, max(1, math.ceil(mean_s * too_many / self.batcher.rows)))

    @asynccontextmanager
    async def asked(self, requests: Sequence[Request], *, pieces: bool) -> AsyncIterator[Group]:
        """Within the block the requests are answered; what is not answered at its end is cancelled, which frees its row.

        Args:
            pieces: the text comes piece by piece, too.
        Raises: Refusal: too many, or one that cannot be answered.
        """
        self.check(len(requests))
        loop = asyncio.get_running_loop()
        group = Group(len(requests))
        self._taken += len(requests)
        self._groups.add(group)
        kind = "schemas" if any(request.schema is not None for request in requests) else "prompts"
        submitting = loop.run_in_executor(self._readers[kind], lambda: self._submit(loop, group, requests, pieces))
        try:
            await asyncio.shield(submitting)
        except asyncio.CancelledError:
            submitting.add_done_callback(lambda done: None if done.cancelled() or done.exception() else group.cancel())
            raise
        except PantheraError as error:
            raise Refusal.of(error) from error
        except ValueError as error:
            raise Refusal(503 if self.closing else 400, str(error)) from error
        timer = loop.call_later(self.limits.seconds, group.end, f"an answer may take {self.limits.seconds:g} s here")
        try:
            yield group
        finally:
            timer.cancel()
            group.cancel()

    def _submit(self, loop: asyncio.AbstractEventLoop, group: Group, requests: Sequence[Request], pieces: bool) -> None:
        """Runs in a thread of a reader."""

        def later(call: Callable[..., None], *args: Any) -> None:
            with suppress(RuntimeError):  # the loop has ended, and with it all clients
                loop.call_soon_threadsafe(call, *args)

        handles: list[Handle] = []
        try:
            self._revive()
            for index, request in enumerate(requests):
                if pieces:
                    request = replace(request, on_text=lambda piece, index=index: later(group.put, index, piece))
                handles.append(self.batcher.submit(request))
        except BaseException:
            for handle in handles:
                handle.cancel()
            later(self._leave, group, len(requests) - len(handles))
            raise
        finally:
            group.holds(handles)
            for index, handle in enumerate(handles):
                handle.when_done(lambda index=index, handle=handle: later(self._ended, group, index, handle))

    def _revive(self) -> None:
        """An error that was not the device's ends the batcher's thread, and all that it had in work; what comes after has a new one."""
        with self._starting:
            if not self.batcher.at_work and not self.closing:
                self.batcher.close()
                self.batcher.start()

    def _leave(self, group: Group, count: int) -> None:
        self._taken -= count
        self._groups.discard(group)

    def _ended(self, group: Group, index: int, handle: Handle) -> None:
        self._taken -= 1
        if group.done:
            self._groups.discard(group)
        what = _result(handle, group.ended_early)
        if isinstance(what, Answer):
            self.metrics.ended[what.finished] += 1
            if what.first_s is not None:
                self.metrics.first_s.add(what.waited_s + what.first_s)
                self.metrics.total_s.add(what.total_s)
        else:
            self.metrics.ended["error"] += 1
        group.put(index, what)


def _result(handle: Handle, ended_early: str | None) -> Answer | Refusal:
    """What is told to the client of an answer that has ended."""
    try:
        answer = handle.result(0)
    except DeviceError as error:
        return Refusal.of(error, 503, code="device_error")
    except PantheraError as error:
        return Refusal.of(error)
    except Exception as error:  # noqa: BLE001 - whatever ended the computation, this request is lost, and the service goes on
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        return Refusal(503, f"the computation of this answer was ended by an error: {said}; ask again", code="batch_error", retry_after_s=1)
    if ended_early and answer.finished == "cancelled" and not answer.tokens:
        return Refusal(503, f"no token of this answer was drawn in time: {ended_early}; ask again", code="timeout", retry_after_s=1)
    return answer
