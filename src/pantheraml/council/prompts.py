"""What advisors see: the question, what was found earlier, and the last answers of all, as far as there is room.

What all of them see comes first, and what a persona is told behind it: so the local model reads the common part once, for everybody
who speaks with the same adapter (or none), and everybody sees the same of the debate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from pantheraml.council.persona import Persona
from pantheraml.council.position import answer_span, sentences
from pantheraml.council.reply import Message
from pantheraml.council.transcript import Dropped, Recalled, Turn
from pantheraml.errors import RecipeError

SYSTEM = "Several advisors debate a question."
ANSWER = 'Say briefly why. End with a line "Answer:" that holds only your answer.'
REVISE = 'Weigh what the others say, keep or change your answer, and end with the line "Answer:" again.'
CUT = " [...]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A text that may be shortened or left out. said: as it stands now; empty: left out."""

    advisor: str
    round: int
    text: str
    said: str


def piece_of(turn: Turn) -> Piece:
    """A turn, in full."""
    return Piece(advisor=turn.advisor, round=turn.round, text=turn.text.strip(), said=turn.text.strip())


def piece_of_recalled(recalled: Recalled) -> Piece:
    """What an earlier debate came to."""
    sure = "" if recalled.confidence is None else f" (confidence {recalled.confidence:.2f})"
    said = f"{recalled.question} - {recalled.verdict}{sure}"
    return Piece(advisor=recalled.key, round=-1, text=said, said=said)


def first_messages(persona: Persona, question: str, earlier: Sequence[Piece]) -> list[Message]:
    """What an advisor sees in round 0."""
    lines = [f"- {piece.said}\n" for piece in earlier if piece.said]
    before = "Earlier debates:\n" + "".join(lines) + "\n" if lines else ""
    return _messages(f"{before}Question: {question}", persona, ANSWER)


def later_messages(persona: Persona, question: str, pieces: Sequence[Piece]) -> list[Message]:
    """What an advisor sees in a later round: the last answers of all, its own among them under its name."""
    said = "\n\n".join(f"{piece.advisor}: {piece.said}" for piece in pieces if piece.said)
    return _messages(f"Question: {question}" + (f"\n\n{said}" if said else ""), persona, REVISE)


def borrowed(text: str, names: Sequence[str]) -> list[str]:
    """The names under which a text has lines that read as if somebody else had said them: advisors tell each other apart by "name:"."""
    begins = [line.strip(" \t*_#>-").casefold() for line in text.splitlines()]
    return [name for name in names if any(line.startswith(f"{name}:".casefold()) for line in begins)]


def _messages(common: str, persona: Persona, asked: str) -> list[Message]:
    own = f"You are {persona.name}. {persona.system}\n{asked}"
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"{common}\n\n{own}"}]


def fitted(
    pieces: Sequence[Piece],
    *,
    measure: Callable[[Sequence[Piece]], int],
    count: Callable[[str], int],
    room: int,
) -> tuple[list[Piece], tuple[Dropped, ...]]:
    """As much of the pieces as there is room for.

    The longest piece loses its last sentence before its answer line, again and again; when none has more than one sentence or
    its answer line left, the longest is left out.

    Args:
        measure: tokens of all that is seen with the pieces. count: tokens of a text. room: most tokens of all.
    Returns: what is missing, too. Raises: RecipeError if there is no room even without pieces.
    """
    kept = list(pieces)
    sizes = [count(piece.said) for piece in kept]
    while (over := measure(kept) - room) > 0:
        if not any(piece.said for piece in kept):
            raise RecipeError(
                f"the question has {room + over} tokens with its instructions, and {room} fit",
                why="a row of the model holds them together with the answer",
                fix="ask for fewer new tokens (max_new_tokens), shorten the question, or take a model with more context",
            )
        while over > 0:  # by what the pieces have, since measuring all of it takes longer
            able = [i for i, piece in enumerate(kept) if _shorter(piece.said)]
            i = max(able or range(len(kept)), key=lambda each: sizes[each])
            kept[i] = replace(kept[i], said=_shorter(kept[i].said))
            size = count(kept[i].said)
            over, sizes[i] = over - (sizes[i] - size), size
            if not able:
                break  # one was left out, and with it its name
    return kept, tuple(
        Dropped(advisor=piece.advisor, round=piece.round, tokens=max(1, count(piece.text) - size), whole=not piece.said)
        for piece, size in zip(kept, sizes, strict=True)
        if piece.said != piece.text
    )


def _shorter(said: str) -> str:
    """A text without its last sentence before the answer line; empty: it cannot be shortened and still say anything."""
    span = answer_span(said)
    line = said.rfind("\n", 0, span[0]) + 1 if span is not None else len(said)
    body = sentences(said[:line].removesuffix(CUT).rstrip().removesuffix(CUT))
    end = said[line:].strip()
    if len(body) + bool(end) < 2 or not body:
        return ""
    rest = body[:-1]
    return "\n".join(part for part in (" ".join(rest) + (CUT if rest else ""), end) if part)
