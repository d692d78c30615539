"""Debates in a memory: kept, found again, and recalled when a like question is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import blake3

from pantheraml.council.transcript import Recalled, Transcript
from pantheraml.errors import DataError
from pantheraml.memory.record import Record

if TYPE_CHECKING:
    from pantheraml.memory.record import JSON
    from pantheraml.memory.store import Memory

KIND = "debate"
QUESTION = "debate-question"
"""Of a second record, with the question alone: a whole transcript is like many things, and a question is like another one."""
LEAST_LIKENESS = 0.3
"""Cosine of two questions from which on a debate is recalled. Of the lexical embedder: about a third of the words in common."""
_SHOWN_CHARACTERS = 400


def key_of(created: str, question: str) -> str:
    """The key of a debate: when it began, and a hash of the question."""
    return f"debate/{created}/{blake3.blake3(question.encode('utf-8', 'surrogatepass')).hexdigest(8)}"


def keep(memory: Memory, transcript: Transcript) -> None:
    """Put a transcript under its key, and its question beside it, both or none. Raises: StorageError if the memory cannot be written."""
    sure = transcript.verdict_confidence
    about: dict[str, JSON] = {
        "question": transcript.question[:_SHOWN_CHARACTERS],
        "verdict": transcript.synthesis.verdict[:_SHOWN_CHARACTERS],
        "confidence": sure.raw if sure.calibrated is None else sure.calibrated,
    }
    memory.put_many(
        [
            Record(key=transcript.key, content=transcript.to_dict(), kind=KIND, metadata=about),
            Record(key=f"{transcript.key}/question", content=transcript.question, kind=QUESTION, metadata={"debate": transcript.key}),
        ]
    )


def search(memory: Memory, text: str, k: int = 5) -> list[Recalled]:
    """The debates whose question, or all that was said, is most like a text, the likest first."""
    likeness: dict[str, float] = {}
    for kind in (KIND, QUESTION):
        for hit in memory.search(text, k, kind=kind):
            key = hit.key if kind == KIND else str(hit.metadata.get("debate"))
            likeness[key] = max(hit.score, likeness.get(key, -1.0))
    best = sorted(likeness, key=lambda key: (-likeness[key], key))[:k]
    return [_recalled(key, memory, likeness[key]) for key in best if key in memory]


def load(memory: Memory, key: str) -> Transcript:
    """A debate that was kept. Raises: DataError if there is none of that key."""
    found = memory.get(key)
    if found.info.kind != KIND:
        raise DataError(f"the record {key!r} is no debate", why=f"it is of the kind {found.info.kind!r}", fix="pantheraml council search")
    return Transcript.from_dict(found.content)


def recall(memory: Memory, question: str, limit: int) -> list[Recalled]:
    """What earlier debates about the like came to, the likest first."""
    return [each for each in search(memory, question, limit) if each.likeness >= LEAST_LIKENESS] if limit else []


def _recalled(key: str, memory: Memory, likeness: float) -> Recalled:
    about = memory.get(key).info.metadata
    sure = about.get("confidence")
    return Recalled(
        key=key,
        question=str(about.get("question", "")),
        verdict=str(about.get("verdict", "")),
        confidence=float(sure) if isinstance(sure, int | float) else None,
        likeness=likeness,
    )
