"""What is asked of a model, and what it answered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Finished = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt, and how it is to be answered.

    Attributes:
        prompt: token ids, at least one.
        max_new_tokens: the answer ends after so many.
        temperature: 0: always the likeliest token.
        top_p: tokens are drawn from the likeliest ones that together have this share of the probability.
        top_k: from so many of the likeliest; 0: from all.
        seed: the same request with the same seed has the same answer, whatever is answered beside it. None: another one each time.
        stop: strings that end the answer, which they are no part of.
        adapter: name of the adapter that answers; None: the base alone, or where none can be chosen, the model as it is.
        schema: a JSON schema that the answer satisfies.
        logprobs: the answer says how likely its tokens were.
        stream: the handle gives the text piece by piece; otherwise in one piece.
        on_text: is given the text piece by piece, by the thread that computes.
    Raises: ValueError for values out of range.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    adapter: str | None = None
    schema: Mapping[str, Any] | None = None
    logprobs: bool = False
    stream: bool = False
    on_text: Callable[[str], None] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("every prompt needs a token")
        if self.max_new_tokens < 1 or not self.temperature >= 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError("max_new_tokens is at least 1, temperature and top_k at least 0, and top_p above 0 and at most 1")
        if isinstance(self.stop, str) or not all(self.stop):
            raise ValueError("stop is a sequence of strings, none of them empty")

    @property
    def in_pieces(self) -> bool:
        """Whether somebody hears of the text before it is complete."""
        return self.stream or self.on_text is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came of a request.

    Attributes:
        text: without what ended it.
        tokens: as they were drawn, without the token that ended it; of a stop string, with those that spell it.
        logprobs: log-probability of each token as the model gave it, before temperature, limits and schema; None: not asked for.
        finished: stop: by a token, a stop string, or because the schema allows no more; length: by a limit.
        prompt_tokens: read. shared_tokens: of these, found in memory, since another prompt begins in the same way.
        waited_s: until a row was free. first_s: until the first token, from the start. total_s: until the last one.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    finished: Finished
    prompt_tokens: int
    shared_tokens: int
    waited_s: float
    first_s: float | None
    total_s: float
