"""What an advisor is asked, and what comes back, whoever answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import blake3

from pantheraml.council.persona import Persona
from pantheraml.council.position import answer_span


class Message(TypedDict):
    """A turn of a conversation. role: system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One question to one advisor.

    Attributes:
        persona: who is asked. messages: what it sees. seed: of its draws. schema: a JSON schema that the answer satisfies.
        temperature: in place of the persona's.
    """

    persona: Persona
    messages: Sequence[Message]
    max_new_tokens: int
    seed: int
    temperature: float
    schema: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What was answered; None: unknown. See `Turn` for the numbers. notes: what was done otherwise than asked."""

    text: str
    tokens: int | None
    mean_logprob: float | None
    answer_logprob: float | None
    finished: str | None
    seconds: float
    prompt_tokens: int | None = None
    shared_tokens: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """Why there is no answer, in a sentence without secrets."""

    why: str
    seconds: float = 0.0


Heard = Callable[[Ask, str], None]
"""Is given the text of an answer piece by piece, from any thread."""


class CancelledError(Exception):
    """Whoever asked wants no answer any more."""


def seed_of(seed: int, round: int, name: str, sample: int = 0) -> int:
    """The seed of one answer: a number below 2^53, so that JSON of any language holds it."""
    return int.from_bytes(blake3.blake3(f"{seed}\0{round}\0{name}\0{sample}".encode()).digest(7)) >> 3


def means(text: str, logprobs: Sequence[float], begin: Callable[[int], int]) -> tuple[float | None, float | None]:
    """The mean log-probability of all tokens, and of those from the answer line on.

    Args:
        begin: the number of the first token that has something at or behind a character of the text.
    """
    if not logprobs or not all(map(math.isfinite, logprobs)):
        return None, None
    span = answer_span(text)
    of_answer = logprobs[begin(span[0]) :] if span is not None else ()
    mean = math.fsum(logprobs) / len(logprobs)
    return mean, math.fsum(of_answer) / len(of_answer) if of_answer else mean
