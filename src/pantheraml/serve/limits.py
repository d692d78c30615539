"""How much of the service one client, and all of them together, can have."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What is refused, and what is ended.

    Attributes:
        body_bytes: of a request; a longer one is refused while it comes (413).
        prompt_tokens: of a prompt; None: as many as a row has (400).
        new_tokens: that an answer can be asked for; None: what is left of the row (400).
        choices: answers that one request can ask for: prompts times n (400).
        inputs: texts that one request can have embedded (400).
        queue: answers that wait for a row; more are refused (429).
        debates: councils at once; more are refused (429).
        connections: open at once; more are refused (503).
        seconds: of a request, from when it was read; its answer then ends as it is.
        body_seconds: until a body must be there (408). head_seconds: the same for the head of a request; the connection is closed.
        idle_seconds: that a connection stays open between two requests.
        grace_seconds: that answers in work still get when the service is told to end.
    Raises: ValueError for one that is not above 0 (queue and grace_seconds may be 0).
    """

    body_bytes: int = 4 * 2**20
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    choices: int = 16
    inputs: int = 256
    queue: int = 256
    debates: int = 2
    connections: int = 1024
    seconds: float = 600.0
    body_seconds: float = 30.0
    head_seconds: float = 10.0
    idle_seconds: float = 15.0
    grace_seconds: float = 10.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not (value >= 0 if field.name in ("queue", "grace_seconds") else value > 0):
                raise ValueError(f"{field.name}={value} limits nothing: it is above 0")
