"""All that was said in a debate, by whom, when, and on what it was computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import TypeAdapter, ValidationError

from pantheraml.council.confidence import Confidence, Verdict
from pantheraml.council.persona import Persona
from pantheraml.council.quorum import Outcome, Quorum
from pantheraml.errors import DataError

if TYPE_CHECKING:
    from pantheraml.memory.record import JSON

Ended = Literal["agreed", "unchanged", "rounds", "out of reach", "cancelled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """What an advisor did not see, since its row had no room.

    Attributes:
        advisor, round: whose answer it was, and when it was given; of an earlier debate, its key and -1.
        tokens: so many of it are missing. whole: nothing of it was seen.
    """

    advisor: str
    round: int
    tokens: int
    whole: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What an advisor answered in a round.

    Attributes:
        position: what it holds; see position.py. tokens: of the answer; None: the service did not tell.
        mean_logprob: of all its tokens. answer_logprob: of those of its answer line, or of all where it has none. None: unknown.
        finished: stop, length, cancelled, or what a service said. seconds: until the answer was there.
        prompt_tokens, shared_tokens: read, and of these found in memory.
        dropped: what it did not see. error: why there is no answer; None: there is one.
    """

    advisor: str
    round: int
    text: str = ""
    position: str = ""
    tokens: int | None = None
    mean_logprob: float | None = None
    answer_logprob: float | None = None
    finished: str | None = None
    seconds: float = 0.0
    prompt_tokens: int | None = None
    shared_tokens: int | None = None
    dropped: tuple[Dropped, ...] = ()
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Argument:
    """Something that was said, word for word, by whom and in which round."""

    advisor: str
    round: int
    quote: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Synthesis:
    """What the debate comes to.

    Attributes:
        arguments: that the verdict rests on. dissent: of those that hold something else. open_questions: that were asked and not answered.
        made_by: model: a model has chosen and worded it; extract: it was put together from what was said. why: that one and not the other.
        refused: what the model attributed to somebody who did not say it.
    """

    verdict: str
    arguments: tuple[Argument, ...]
    dissent: tuple[Argument, ...]
    open_questions: tuple[str, ...]
    made_by: Literal["model", "extract"]
    why: str
    refused: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Recalled:
    """An earlier debate that the advisors were told of in their first round. likeness: cosine of its record and the question."""

    key: str
    question: str
    verdict: str
    confidence: float | None
    likeness: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What the local model computed for a debate, measured.

    Attributes:
        device_kind, device, dtype: where, and in which numbers; None: whoever gave the model did not say.
        rows: answers that are computed at once. new_tokens: drawn. read_tokens: of prompts. shared_tokens: of prompts, copied instead.
        busy_s: seconds in which it computed; of a model that others use as well, also for them.
        tokens_per_s: new tokens in a busy second; None: nothing was computed.
    """

    model: str
    device_kind: str | None
    device: str | None
    dtype: str | None
    rows: int
    new_tokens: int
    read_tokens: int
    shared_tokens: int
    busy_s: float
    tokens_per_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcript:
    """A debate.

    Attributes:
        key: of its record in a memory. created: when it began, ISO 8601, UTC.
        rounds, max_new_tokens, seed, quorum, samples: as they were set.
        turns: in the order of rounds, and in each of personas. ended: why no further round followed.
        confidence: of the advisors. verdict_confidence: of the verdict. work: of the local model; None: there was none.
        seconds: from the first question to the verdict. notes: what else is to be known.
    """

    key: str
    question: str
    created: str
    personas: tuple[Persona, ...]
    rounds: int
    max_new_tokens: int
    seed: int
    quorum: Quorum
    samples: int
    turns: tuple[Turn, ...]
    ended: Ended
    outcome: Outcome
    confidence: tuple[Confidence, ...]
    verdict_confidence: Verdict
    synthesis: Synthesis
    recalled: tuple[Recalled, ...]
    work: Work | None
    seconds: float
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, JSON]:
        """As JSON can say it."""
        return _adapter().dump_python(self, mode="json")

    @classmethod
    def from_dict(cls, said: Any) -> Transcript:
        """What `to_dict` gave. Raises: DataError for anything else."""
        try:
            return _adapter().validate_python(said)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise DataError(
                f"this is no transcript of a debate: {place}: {first['msg']}",
                why="it has what Transcript.to_dict gives",
                fix="choose a record of the kind debate",
            ) from None

    def last(self) -> dict[str, Turn]:
        """The last answer of each advisor that has given one."""
        return {turn.advisor: turn for turn in self.turns if turn.error is None and turn.position}

    def text(self) -> str:
        """All of it, to be read."""
        lines = [f"Question: {self.question}"]
        lines += [f"Recalled: {each.question} -> {each.verdict} ({each.key})" for each in self.recalled]
        round = -1
        for turn in self.turns:
            if turn.round != round:
                round = turn.round
                lines += ["", f"Round {round}"]
            lines += ["", f"[{turn.advisor}] " + (turn.text.strip() if turn.error is None else f"failed: {turn.error}")]
            lines += [f"  (not seen: {each.tokens} tokens of {each.advisor}, round {each.round})" for each in turn.dropped]
        return shown("\n".join([*lines, "", self.summary()]))

    def summary(self) -> str:
        """The verdict and all that belongs to it, without the turns."""
        made = self.synthesis
        lines = [f"Verdict: {made.verdict}", f"Confidence: {self.verdict_confidence.said}"]
        lines += [f"Quorum: {'reached' if self.outcome.reached else 'not reached'}: {self.outcome.why}"]
        for title, said in (("Because", made.arguments), ("Against it", made.dissent)):
            lines += [f'{title}: "{each.quote}" ({each.advisor}, round {each.round})' for each in said]
        lines += [f"Open: {each}" for each in made.open_questions]
        lines += [f"Synthesis: by {'the model' if made.made_by == 'model' else 'extract'}: {made.why}"]
        for each in self.confidence:
            parts = [] if each.probability is None else [f"probability {each.probability:.2f}"]
            parts += [f"{each.agreeing} of {each.samples} samples agree"] if each.samples else []
            lines += [f"  {each.advisor}: {', '.join(parts) or 'not measured'}"]
        lines += [f"Ended: {_ENDS[self.ended]}, after {self.seconds:.1f} s"]
        if self.work is not None:
            rate = "" if self.work.tokens_per_s is None else f", {self.work.tokens_per_s:.0f} tokens/s"
            where = f"{self.work.device or 'unknown device'}, {self.work.dtype or 'unknown dtype'}"
            lines += [f"Model: {self.work.model} on {where}, {self.work.rows} rows, {self.work.new_tokens} new tokens{rate}"]
        return shown("\n".join([*lines, *(f"Note: {note}" for note in self.notes)]))


_ENDS: dict[Ended, str] = {
    "agreed": "all agreed",
    "unchanged": "nobody changed what they hold",
    "rounds": "all rounds were held",
    "out of reach": "too many failed for the quorum",
    "cancelled": "cancelled",
}


def shown(text: str) -> str:
    """A text without what would move the cursor of a terminal, or speak to it: models and services write what they like."""
    return "".join(each if each.isprintable() or each in "\n\t" else "\ufffd" for each in text)


def _adapter() -> TypeAdapter[Transcript]:
    return TypeAdapter(Transcript)
