"""An answer that is on its way: what the one who asked holds, and what the one who computes knows of it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from pantheraml.errors import DeviceError
from pantheraml.models.grammar import Grammar
from pantheraml.models.request import Answer, Request
from pantheraml.models.sampling import Draw, uniform
from pantheraml.models.slots import Held
from pantheraml.models.stops import Text


class Handle:
    """An answer that is on its way."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.cancelled = False
        self._pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._done = threading.Event()
        self._changing = threading.Lock()
        self._when_done: list[Callable[[], None]] = []
        self._answer: Answer | None = None
        self._error: BaseException | None = None

    def __iter__(self) -> Iterator[str]:
        """The text as it comes, to be iterated over once. Raises: what ended the computation."""
        while (piece := self._pieces.get()) is not None:
            yield piece
        self.result()

    def result(self, timeout_s: float | None = None) -> Answer:
        """Waits for the end. Raises: what ended the computation; TimeoutError."""
        if not self._done.wait(timeout_s):
            raise TimeoutError(f"no answer after {timeout_s} s")
        if self._answer is None:
            raise self._error or RuntimeError("the answer was lost")
        return self._answer

    def cancel(self) -> None:
        """Ends the answer before the next token, which frees its row."""
        self.cancelled = True

    @property
    def done(self) -> bool:
        """Whether there is an answer, or an error."""
        return self._done.is_set()

    def when_done(self, call: Callable[[], None]) -> None:
        """Call it once there is an answer or an error: now if there is one, otherwise later from the thread that computes, which waits
        for it. It must not raise.
        """
        with self._changing:
            if not self.done:
                self._when_done.append(call)
                return
        call()

    def give(self, piece: str) -> None:
        """More text, from the thread that computes."""
        if piece:
            self._pieces.put(piece)

    def finish(self, answer: Answer | None, error: BaseException | None = None) -> None:
        """The end of it, from the thread that computes."""
        self._answer, self._error = answer, error
        with self._changing:
            self._done.set()
        self._pieces.put(None)
        for call in self._when_done:
            call()


@dataclass(frozen=True, slots=True)
class Work:
    """What was computed since the start.

    Attributes:
        answers: that are complete. read_tokens: of prompts. shared_tokens: of prompts, copied instead.
        new_tokens: drawn, in so many steps. busy_s: seconds in which something was computed.
    """

    answers: int = 0
    read_tokens: int = 0
    shared_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0
    busy_s: float = 0.0


@dataclass(eq=False, slots=True)
class Job:
    """A request in work."""

    handle: Handle
    seed: int
    adapter: int
    grammar: Grammar | None
    text: Text | None
    asked_s: float
    held: Held | None = None
    started_s: float = 0.0
    first_s: float | None = None
    shared: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    error: Exception | None = None

    @property
    def request(self) -> Request:
        """What was asked."""
        return self.handle.request

    @property
    def row(self) -> Held:
        """Where it is computed."""
        assert self.held is not None
        return self.held

    @property
    def reading(self) -> bool:
        """Whether some of the prompt is not read."""
        return self.row.read < len(self.request.prompt)

    def draw(self) -> Draw:
        """How its next token is drawn."""
        request = self.request
        number = uniform(self.seed, len(self.tokens)) if request.temperature > 0 else 0.0
        return Draw(request.temperature, request.top_p, request.top_k, number)


def not_finite() -> DeviceError:
    """What is said of an answer whose logits have no likeliest token."""
    return DeviceError(
        "the model's logits are not finite",
        why="no token is the likeliest one; numbers beyond the range of the dtype do that, or weights that are not finite",
        fix="load the model in bfloat16 or float32, and check the weights",
    )
