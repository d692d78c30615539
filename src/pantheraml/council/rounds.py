"""A debate: everybody answers, reads what the others said, and answers again; then it is counted, measured and summed up.

    from pantheraml.council import DEFAULT_PERSONAS, Local, debate

    print(debate("Is 91 a prime number?", DEFAULT_PERSONAS, local=Local.open("Qwen/Qwen3-0.6B")).text())

Each round is one batch of the local model, with the services asked beside it. The same settings, personas and model give the same
answers: the seed of each is a hash of the debate's seed, the round, the advisor's name and the number of the sample. What a service
answers is its own affair.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pantheraml.council import archive
from pantheraml.council.confidence import Confidence, of_advisor, of_verdict
from pantheraml.council.panel import Panel
from pantheraml.council.persona import Persona
from pantheraml.council.position import Agreement, position
from pantheraml.council.prompts import Piece, borrowed, first_messages, fitted, later_messages, piece_of, piece_of_recalled
from pantheraml.council.quorum import Outcome, Vote, decide, within_reach
from pantheraml.council.reply import Ask, CancelledError, Failed, Message, Reply, seed_of
from pantheraml.council.settings import Event, Settings
from pantheraml.council.synthesis import SYNTHESISER, by_model, extracted
from pantheraml.council.transcript import Dropped, Ended, Recalled, Synthesis, Transcript, Turn, Work
from pantheraml.errors import RecipeError, StorageError

if TYPE_CHECKING:
    from pantheraml.council.local import Local
    from pantheraml.memory.store import Memory

    Write = Callable[[Persona, str, Sequence[Piece]], list[Message]]


_log = logging.getLogger("pantheraml")


def debate(
    question: str,
    personas: Sequence[Persona],
    settings: Settings | None = None,
    *,
    local: Local | None = None,
    memory: Memory | None = None,
    keys: Mapping[str, str] | None = None,
    on_event: Callable[[Event], None] | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Transcript:
    """Hold a debate.

    Args:
        personas: who debates, with names of their own. local: answers for those without an endpoint.
        memory: earlier debates in it about the like are told in the first round, and this one is put there if it can be written.
        keys: values of the environment variables that endpoints name as key_env; nothing is read from the environment here.
        on_event: hears what happens, one event at a time, from the threads that compute; what it raises ends the debate.
        cancelled: asked between pieces of text; what was complete by then is counted and summed up.
    Raises: RecipeError for personas or a question that cannot be debated; what the device raises. Advisors that fail raise nothing.
    """
    names = [persona.name for persona in personas]
    if not question.strip() or not names or len(set(names)) < len(names):
        raise RecipeError(
            "a debate needs a question, and advisors with different names",
            why=f"there are {len(names)} advisors: {', '.join(names) or 'nobody'}",
            fix="give a question, and rename those that are called the same",
        )
    settings = settings or Settings()
    more = [settings.synthesiser] if settings.synthesiser is not None else []
    with Panel([*personas, *more], local, keys or {}) as panel:
        return _Debate(question.strip(), tuple(personas), settings, panel, local, memory, on_event, cancelled).hold()


class _Debate:
    """One debate on its way."""

    def __init__(
        self,
        question: str,
        personas: tuple[Persona, ...],
        settings: Settings,
        panel: Panel,
        local: Local | None,
        memory: Memory | None,
        on_event: Callable[[Event], None] | None,
        cancelled: Callable[[], bool],
    ) -> None:
        self.question, self.personas, self.settings, self.panel, self.local, self.memory = (
            question,
            personas,
            settings,
            panel,
            local,
            memory,
        )
        self.cancelled = cancelled
        self._on_event, self._lock = on_event, threading.Lock()
        self._agreement = Agreement(settings.threshold)
        self.turns: list[Turn] = []
        self.notes: list[str] = []
        self._asked: dict[str, Ask] = {}
        """What each advisor was asked when it gave its last answer."""

    def hold(self) -> Transcript:
        """From the first question to the verdict."""
        begun, created = time.perf_counter(), datetime.now(UTC)
        before = None if self.local is None else self.local.batcher.work
        recalled = self._recall()
        sampled: dict[str, list[str]] = {}
        ended: Ended
        try:
            ended = self._rounds([piece_of_recalled(each) for each in recalled])
            if self.settings.samples and ended != "out of reach":
                sampled = self._sample()
        except CancelledError:
            ended = "cancelled"
        outcome = self._outcome()
        found = self._confidence(sampled)
        weights = {persona.name: persona.weight for persona in self.personas}
        synthesis = self._synthesis(outcome, found, ended)
        created_text = created.isoformat(timespec="microseconds")
        transcript = Transcript(
            key=archive.key_of(created_text, self.question),
            question=self.question,
            created=created_text,
            personas=self.personas,
            rounds=self.settings.rounds,
            max_new_tokens=self.settings.max_new_tokens,
            seed=self.settings.seed,
            quorum=self.settings.quorum,
            samples=self.settings.samples,
            turns=tuple(self.turns),
            ended=ended,
            outcome=outcome,
            confidence=tuple(found),
            verdict_confidence=of_verdict(found, outcome, weights, self.settings.calibration),
            synthesis=synthesis,
            recalled=tuple(recalled),
            work=None if self.local is None or before is None else _work(self.local, before),
            seconds=time.perf_counter() - begun,
            notes=tuple(dict.fromkeys([*(self.panel.speaker.notes if self.panel.speaker else []), *self.notes])),
        )
        if self.memory is not None:
            try:
                archive.keep(self.memory, transcript)
            except (StorageError, ValueError) as error:  # of the disk, or a memory that was opened for reading
                why = error.what if isinstance(error, StorageError) else str(error)
                transcript = replace(transcript, notes=(*transcript.notes, f"The transcript is not in the memory: {why}."))
        if (work := transcript.work) is not None:
            rate = "no" if work.tokens_per_s is None else f"{work.tokens_per_s:.0f}"
            _log.info("debate on %s (%s): %d rows, %d new tokens, %s a second", work.device, work.dtype, work.rows, work.new_tokens, rate)
        self._tell(Event(kind="verdict", text=transcript.summary()))
        return transcript

    # ---- Rounds --------------------------------------------------------------------------------------------------

    def _rounds(self, earlier: Sequence[Piece]) -> Ended:
        for round in range(self.settings.rounds):
            self._tell(Event(kind="round", round=round))
            before = self._positions()
            self._round(round, earlier)
            if not within_reach(self._votes(), self.settings.quorum):
                return "out of reach"
            if self.settings.stop_early and (why := self._converged(before, round)):
                return why
        return "rounds"

    def _round(self, round: int, earlier: Sequence[Piece]) -> None:
        pieces = [piece_of(turn) for turn in self._last().values()] or list(earlier)
        write = later_messages if self._last() else first_messages
        kept, dropped = self._fitted(write, pieces)
        asks: list[Ask] = []
        for persona in self.personas:
            messages = write(persona, self.question, pieces if persona.endpoint is not None else kept)
            asks.append(self._ask(persona, messages, seed_of(self.settings.seed, round, persona.name), persona.temperature))

        def heard(ask: Ask, piece: str) -> None:
            self._tell(Event(kind="text", round=round, advisor=ask.persona.name, text=piece))

        for ask, reply in zip(asks, self.panel.ask(asks, heard, self.cancelled), strict=True):
            turn = _turn(ask.persona.name, round, reply, () if ask.persona.endpoint is not None else dropped)
            if turn.position:
                self._asked[turn.advisor] = ask
            if isinstance(reply, Reply):
                self.notes += [f"{turn.advisor}: {note}." for note in reply.notes]
            others = [persona.name for persona in self.personas if persona.name != turn.advisor]
            self.notes += [
                f"{turn.advisor} writes in the name of {name} in round {round}, which those that read it may take for {name}'s."
                for name in borrowed(turn.text, [*others, "Question"])
            ]
            self.turns.append(turn)
            self._tell(Event(kind="turn", round=round, advisor=turn.advisor, text=turn.text, turn=turn))

    def _fitted(self, write: Write, pieces: Sequence[Piece]) -> tuple[list[Piece], tuple[Dropped, ...]]:
        """As much of the pieces as has room in the rows of all local advisors, and what has not."""
        near = [persona for persona in self.personas if persona.endpoint is None]
        speaker = self.panel.speaker
        if speaker is None or not near:
            return list(pieces), ()
        return fitted(
            pieces,
            measure=lambda kept: max(len(speaker.prompt(write(persona, self.question, kept))) for persona in near),
            count=speaker.count,
            room=speaker.tokens - self.settings.max_new_tokens,
        )

    def _ask(self, persona: Persona, messages: Sequence[Message], seed: int, temperature: float) -> Ask:
        return Ask(persona=persona, messages=messages, max_new_tokens=self.settings.max_new_tokens, seed=seed, temperature=temperature)

    def _converged(self, before: Mapping[str, str], round: int) -> Ended | None:
        now = self._positions()
        if len(now) < len(self.personas):
            return None
        if len(set(self._agreement.groups([*now.values()]))) == 1:
            return "agreed"
        same = round > 0 and now.keys() == before.keys() and all(self._agreement.agree(before[name], now[name]) for name in now)
        return "unchanged" if same else None

    # ---- What is held --------------------------------------------------------------------------------------------

    def _last(self) -> dict[str, Turn]:
        """The last answer of each advisor that has given one, in the order of personas."""
        given = {turn.advisor: turn for turn in self.turns if turn.position}
        return {persona.name: given[persona.name] for persona in self.personas if persona.name in given}

    def _positions(self) -> dict[str, str]:
        return {name: turn.position for name, turn in self._last().items()}

    def _votes(self) -> list[Vote]:
        """Positions that agree are written as the first of them."""
        held = self._positions()
        groups = dict(zip(held, self._agreement.groups([*held.values()]), strict=True))
        first: dict[int | None, str] = {}
        for name, group in groups.items():
            first.setdefault(group, held[name])
        return [
            Vote(advisor=each.name, position=first[groups[each.name]] if each.name in held else None, weight=each.weight)
            for each in self.personas
        ]

    def _outcome(self) -> Outcome:
        return decide(self._votes(), self.settings.quorum)

    def _sample(self) -> dict[str, list[str]]:
        """What each advisor holds when it is asked its last question again, in one batch."""
        self._tell(Event(kind="sampling"))
        asks: list[Ask] = []
        for name, turn in self._last().items():
            asked = self._asked[name]
            for sample in range(1, self.settings.samples + 1):
                seed = seed_of(self.settings.seed, turn.round, name, sample)
                asks.append(self._ask(asked.persona, asked.messages, seed, asked.temperature or self.settings.sample_temperature))
        found: dict[str, list[str]] = {}
        for ask, reply in zip(asks, self.panel.ask(asks, cancelled=self.cancelled), strict=True):
            if isinstance(reply, Failed):
                self.notes.append(f"{ask.persona.name}: a sample failed: {reply.why}.")
            else:
                found.setdefault(ask.persona.name, []).append(position(reply.text))
        return found

    def _confidence(self, sampled: Mapping[str, Sequence[str]]) -> list[Confidence]:
        return [
            of_advisor(name, turn.answer_logprob, turn.position, sampled.get(name, ()), self._agreement)
            for name, turn in self._last().items()
        ]

    # ---- Before and after ----------------------------------------------------------------------------------------

    def _recall(self) -> list[Recalled]:
        if self.memory is None:
            return []
        try:
            found = archive.recall(self.memory, self.question, self.settings.recall)
        except StorageError as error:
            self.notes.append(f"No earlier debate was recalled: {error.what}.")
            return []
        for each in found:
            self._tell(Event(kind="recalled", text=f"{each.question} -> {each.verdict}"))
        return found

    def _synthesis(self, outcome: Outcome, found: Sequence[Confidence], ended: Ended) -> Synthesis:
        persona = self.settings.synthesiser or SYNTHESISER
        if self.settings.synthesis == "extract":
            why = "as it was asked for"
        elif ended == "cancelled":
            why = "the debate was cancelled"
        elif persona.endpoint is None and self.panel.speaker is None:
            why = "no model is there to word it"
        else:
            try:
                made = by_model(
                    self.question,
                    self.turns,
                    outcome,
                    self.panel,
                    self._agreement,
                    persona=persona,
                    max_new_tokens=self.settings.synthesis_tokens,
                    seed=self.settings.seed,
                    cancelled=self.cancelled,
                )
            except CancelledError:
                made = "the debate was cancelled"
            if isinstance(made, Synthesis):
                return made
            why = made
        return extracted(self.question, self.turns, outcome, found, why)

    def _tell(self, event: Event) -> None:
        if self._on_event is not None:
            with self._lock:
                self._on_event(event)


def _turn(advisor: str, round: int, reply: Reply | Failed, dropped: tuple[Dropped, ...]) -> Turn:
    if isinstance(reply, Failed):
        return Turn(advisor=advisor, round=round, seconds=reply.seconds, dropped=dropped, error=reply.why)
    return Turn(
        advisor=advisor,
        round=round,
        text=reply.text,
        position=position(reply.text),
        tokens=reply.tokens,
        mean_logprob=reply.mean_logprob,
        answer_logprob=reply.answer_logprob,
        finished=reply.finished,
        seconds=reply.seconds,
        prompt_tokens=reply.prompt_tokens,
        shared_tokens=reply.shared_tokens,
        dropped=dropped,
        error=None if reply.text.strip() else "it said nothing",
    )


def _work(local: Local, before: Any) -> Work:
    """What was computed since then."""
    now, batcher = local.batcher.work, local.batcher
    new, busy_s = now.new_tokens - before.new_tokens, now.busy_s - before.busy_s
    return Work(
        model=local.name,
        device_kind=None if local.device is None else local.device.kind,
        device=None if local.device is None else local.device.label,
        dtype=local.dtype,
        rows=batcher.rows,
        new_tokens=new,
        read_tokens=now.read_tokens - before.read_tokens,
        shared_tokens=now.shared_tokens - before.shared_tokens,
        busy_s=busy_s,
        tokens_per_s=new / busy_s if busy_s > 0 else None,
    )
