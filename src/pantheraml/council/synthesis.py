"""What a debate comes to: a verdict, the arguments that it rests on, the dissent, and what is open.

A model words it where there is one that can be held to a JSON schema. What it attributes to somebody must stand in what that advisor
said, or it is refused; and a verdict other than the one that the quorum has decided is not taken. Otherwise the synthesis is put
together from sentences of the turns.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pantheraml.council.confidence import Confidence
from pantheraml.council.panel import Panel
from pantheraml.council.persona import Persona
from pantheraml.council.position import Agreement, answer_span, normalised, sentences, similarity
from pantheraml.council.prompts import Piece, fitted, piece_of
from pantheraml.council.quorum import Outcome
from pantheraml.council.reply import Ask, Failed, Message, seed_of
from pantheraml.council.transcript import Argument, Synthesis, Turn
from pantheraml.errors import MissingExtra, RecipeError

SYNTHESISER = Persona(
    name="synthesiser",
    prompt="You sum up a debate. Quote word for word, and put nothing into anybody's mouth.",
    temperature=0.0,
)
ARGUMENTS = 4
OPEN = 3
_QUOTE_CHARACTERS = 240
_SHORTEST_QUOTE = 3
"""Words or numbers of a quote of a longer text: fewer stand in anything."""


def extracted(question: str, turns: Sequence[Turn], outcome: Outcome, found: Sequence[Confidence], why: str) -> Synthesis:
    """The synthesis put together from what was said.

    The verdict is the position that the quorum has decided, or that it has decided none, with what is held. Each advisor that holds it
    gives its best sentence: the one most like the question, its own answer and what the others of its side say.
    """
    last = {turn.advisor: turn for turn in turns if turn.error is None and turn.position}
    sure = {each.advisor: each.raw or 0.0 for each in found}
    sides = [[last[name] for name in count.advisors if name in last] for count in outcome.counts]
    if outcome.reached and outcome.position is not None:
        verdict = outcome.position
        with_it, against = sides[0], sides[1:]
    else:
        held = "; ".join(f"{len(count.advisors)} for {_short(count.position)}" for count in outcome.counts)
        verdict = f"No decision: {held or 'nobody answered'}."
        with_it, against = [], sides
    arguments = _best(question, with_it, sure)[:ARGUMENTS]
    dissent = [argument for side in against for argument in _best(question, side, sure)[:1]][:ARGUMENTS]
    asked = list(dict.fromkeys(each for turn in last.values() for each in sentences(turn.text) if each.endswith(("?", "\uff1f"))))
    return Synthesis(
        verdict=verdict,
        arguments=tuple(arguments),
        dissent=tuple(dissent),
        open_questions=tuple(asked[:OPEN]),
        made_by="extract",
        why=why,
    )


def _best(question: str, side: Sequence[Turn], sure: Mapping[str, float]) -> list[Argument]:
    """The best sentence of each advisor of one side, those of the surest first."""
    owners: list[int] = []
    said: list[str] = []
    for i, turn in enumerate(side):
        span = answer_span(turn.text)
        body = sentences(turn.text[: turn.text.rfind("\n", 0, span[0]) + 1] if span is not None else turn.text)
        for each in body or [turn.position]:
            owners.append(i)
            said.append(each)
    if not said:
        return []
    likeness = similarity([*said, question, *(turn.position for turn in side)])
    n = len(said)
    chosen: list[Argument] = []
    for i, turn in sorted(enumerate(side), key=lambda each: (-sure.get(each[1].advisor, 0.0), each[0])):
        mine = [j for j in range(n) if owners[j] == i]
        others = [j for j in range(n) if owners[j] != i]
        support = likeness[:n, others].mean(1) if others else np.zeros(n)
        score = likeness[:n, n] + likeness[:n, n + 1 + i] + support
        best = max(mine, key=lambda j: (float(score[j]), -j))
        chosen.append(Argument(advisor=turn.advisor, round=turn.round, quote=_clipped(said[best])))
    return chosen


def schema_for(advisors: Sequence[str]) -> dict[str, Any]:
    """What the model's synthesis must look like."""
    quote = {
        "type": "object",
        "properties": {"advisor": {"enum": list(advisors)}, "quote": {"type": "string", "maxLength": _QUOTE_CHARACTERS}},
        "required": ["advisor", "quote"],
        "additionalProperties": False,
    }
    return {
        "type": "object",
        "properties": {
            "verdict": {"type": "string", "maxLength": 2 * _QUOTE_CHARACTERS},
            "arguments": {"type": "array", "items": quote, "maxItems": ARGUMENTS},
            "dissent": {"type": "array", "items": quote, "maxItems": ARGUMENTS},
            "open_questions": {"type": "array", "items": {"type": "string", "maxLength": _QUOTE_CHARACTERS}, "maxItems": OPEN},
        },
        "required": ["verdict", "arguments", "dissent", "open_questions"],
        "additionalProperties": False,
    }


def synthesis_messages(persona: Persona, question: str, said: Sequence[tuple[str, str]], outcome: Outcome) -> list[Message]:
    """What the synthesiser sees. said: (advisor, text) of the last answers."""
    answers = "\n\n".join(f"{name}: {text}" for name, text in said if text)
    decided = f"The council decided: {outcome.position}" if outcome.reached else f"The council did not decide: {outcome.why}"
    asked = (
        "Write JSON with the verdict, the arguments it rests on and the dissent, each with its advisor and a quote of that "
        "advisor's words, and the open questions."
    )
    return [
        {"role": "system", "content": persona.system},
        {"role": "user", "content": f"Question: {question}\n\n{answers}\n\n{decided}\n\n{asked}"},
    ]


def by_model(
    question: str,
    turns: Sequence[Turn],
    outcome: Outcome,
    panel: Panel,
    agreement: Agreement,
    *,
    persona: Persona = SYNTHESISER,
    max_new_tokens: int,
    seed: int,
    cancelled: Callable[[], bool] = lambda: False,
) -> Synthesis | str:
    """The synthesis worded by a model, or why there is none that can be used.

    Raises: CancelledError.
    """
    last = list({turn.advisor: turn for turn in turns if turn.error is None and turn.position}.values())
    if not last:
        return "nobody said anything"

    def build(pieces: Sequence[Piece]) -> list[Message]:
        return synthesis_messages(persona, question, [(piece.advisor, piece.said) for piece in pieces], outcome)

    kept = [piece_of(turn) for turn in last]
    try:
        if persona.endpoint is None:
            assert panel.speaker is not None
            speaker = panel.speaker
            max_new_tokens = min(max_new_tokens, speaker.tokens // 2)
            kept, _ = fitted(
                kept,
                measure=lambda each: len(speaker.prompt(build(each))),
                count=speaker.count,
                room=speaker.tokens - max_new_tokens,
            )
        ask = Ask(
            persona=persona,
            messages=build(kept),
            max_new_tokens=max_new_tokens,
            seed=seed_of(seed, -1, persona.name),
            temperature=persona.temperature,
            schema=schema_for([turn.advisor for turn in last]),
        )
        (reply,) = panel.ask([ask], cancelled=cancelled)
    except (MissingExtra, RecipeError) as error:
        return error.what
    if isinstance(reply, Failed):
        return reply.why
    return read(reply.text, turns, outcome, agreement)


def read(text: str, turns: Sequence[Turn], outcome: Outcome, agreement: Agreement) -> Synthesis | str:
    """A model's synthesis, as far as it says what was said; or why it cannot be used."""
    try:
        said = json.loads(text[text.index("{") : text.rindex("}") + 1])
        verdict = " ".join(str(said["verdict"]).split())
        questions = [" ".join(str(each).split()) for each in said["open_questions"]]
        pairs = {name: [(str(each["advisor"]), str(each["quote"])) for each in said[name]] for name in ("arguments", "dissent")}
    except (ValueError, KeyError, TypeError) as error:
        return f"the model's synthesis is not what was asked for: {type(error).__name__} {error}"
    if outcome.reached and outcome.position is not None and not _says(verdict, outcome.position, agreement):
        return "the model's verdict is not what the quorum has decided"
    if not outcome.reached and not any(_says(verdict, count.position, agreement) for count in outcome.counts):
        return "the model's verdict is nothing that an advisor holds"
    found: dict[str, list[Argument]] = {name: [] for name in pairs}
    refused: list[str] = []
    for name, quotes in pairs.items():
        for advisor, quote in quotes:
            argument = attributed(advisor, quote, turns)
            if argument is None:
                refused.append(f"{advisor}: {_short(quote)}")
            elif argument not in found[name]:
                found[name].append(argument)
    if not found["arguments"]:
        return f"none of the model's arguments was said by the advisor that it names ({len(refused)} refused)"
    if not outcome.reached:
        verdict = f"No decision: {outcome.why}. Most likely: {verdict}"
    return Synthesis(
        verdict=verdict,
        arguments=tuple(found["arguments"][:ARGUMENTS]),
        dissent=tuple(found["dissent"][:ARGUMENTS]),
        open_questions=tuple(each for each in questions if each)[:OPEN],
        made_by="model",
        why="worded by the model, every quote found in the turns",
        refused=tuple(refused),
    )


def attributed(advisor: str, quote: str, turns: Sequence[Turn]) -> Argument | None:
    """A quote with the last round in which the advisor said it, case, space and punctuation aside; None: it never did."""
    words = normalised(quote)
    for turn in reversed(turns):
        if turn.advisor != advisor or turn.error is not None:
            continue
        text = normalised(turn.text)
        least = min(_SHORTEST_QUOTE, len(text))
        if len(words) >= least and any(text[i : i + len(words)] == words for i in range(len(text) - len(words) + 1)):
            return Argument(advisor=advisor, round=turn.round, quote=_clipped(" ".join(quote.split())))
    return None


def _says(verdict: str, position: str, agreement: Agreement) -> bool:
    """Whether a verdict is a position, or has it in it."""
    words, held = normalised(verdict), normalised(position)
    return agreement.agree(verdict, position) or any(words[i : i + len(held)] == held for i in range(len(words) - len(held) + 1))


def _clipped(text: str) -> str:
    """Up to the last word that fits."""
    return text if len(text) <= _QUOTE_CHARACTERS else text[: _QUOTE_CHARACTERS - 3].rpartition(" ")[0] + "..."


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
