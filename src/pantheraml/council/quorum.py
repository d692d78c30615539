"""When a council has decided: rules over what each advisor holds. They can fail, and say why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

Quorum = Literal["majority", "weighted", "supermajority", "unanimous"]
RULES: tuple[Quorum, ...] = get_args(Quorum)


@dataclass(frozen=True, slots=True, kw_only=True)
class Vote:
    """What an advisor holds. position: None: it has none, since it failed or said nothing. weight: above 0."""

    advisor: str
    position: str | None
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """Who holds a position, and their weight together."""

    position: str
    advisors: tuple[str, ...]
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Whether a rule is satisfied.

    Attributes:
        position: that most hold, by number or in a weighted quorum by weight; None: two hold as many, or nobody holds anything.
        counts: the most first. silent: advisors without a position. why: a sentence, with the numbers.
    """

    rule: Quorum
    reached: bool
    position: str | None
    counts: tuple[Count, ...]
    silent: tuple[str, ...]
    why: str


def decide(votes: Sequence[Vote], rule: Quorum) -> Outcome:
    """Whether enough advisors hold the same. Those without a position count as advisors that do not hold it.

    Equal positions are equal strings: those that only agree are made equal before (see `position.Agreement`).

    majority: more than half of the advisors. weighted: more than half of their weight. supermajority: at least two thirds of the advisors.
    unanimous: all of them.
    """
    held: dict[str, list[Vote]] = {}
    for vote in votes:
        if vote.position is not None:
            held.setdefault(vote.position, []).append(vote)
    silent = tuple(vote.advisor for vote in votes if vote.position is None)
    sizes = {position: _size(each, rule) for position, each in held.items()}
    order = sorted(held, key=lambda position: (-sizes[position], position))
    counts = tuple(
        Count(position=each, advisors=tuple(vote.advisor for vote in held[each]), weight=float(_weight(held[each]))) for each in order
    )
    if not order:
        why = f"none of {len(votes)} advisors holds anything" if votes else "there is no advisor"
        return Outcome(rule=rule, reached=False, position=None, counts=(), silent=silent, why=why)
    total, most = _size(votes, rule), sizes[order[0]]
    tied = [position for position in order if sizes[position] == most]
    reached = enough(most, total, rule)
    of = "of the weight " if rule == "weighted" else ""
    said = f"{_shown(most)} {of}of {_shown(total)} {'' if of else 'advisors '}hold {_quoted(order[0])}"
    needed = _needed(total, rule)
    if reached:
        why = f"{said}, and {rule} takes {needed}"
    elif len(tied) > 1:
        why = f"{len(tied)} positions have {_shown(most)} {of}of {_shown(total)} each, and {rule} takes {needed}"
    else:
        why = f"only {said}, and {rule} takes {needed}"
    if silent and not reached:
        why += f"; {_names(silent)} said nothing"
    return Outcome(rule=rule, reached=reached, position=None if len(tied) > 1 else order[0], counts=counts, silent=silent, why=why)


def enough(size: Fraction, total: Fraction, rule: Quorum) -> bool:
    """Whether so many of so many satisfy a rule; of a weighted one, so much weight."""
    match rule:
        case "majority" | "weighted":
            return 2 * size > total
        case "supermajority":
            return 3 * size >= 2 * total > 0
        case "unanimous":
            return size == total > 0


def within_reach(votes: Sequence[Vote], rule: Quorum) -> bool:
    """Whether the rule would be satisfied if all advisors that hold anything came to hold the same."""
    return enough(_size([vote for vote in votes if vote.position is not None], rule), _size(votes, rule), rule)


def _size(votes: Sequence[Vote], rule: Quorum) -> Fraction:
    return _weight(votes) if rule == "weighted" else Fraction(len(votes))


def _weight(votes: Sequence[Vote]) -> Fraction:
    # Exact, so that it does not matter in which order they are added.
    return sum((Fraction(vote.weight) for vote in votes), Fraction(0))


def _needed(total: Fraction, rule: Quorum) -> str:
    match rule:
        case "majority":
            return str(total // 2 + 1)
        case "weighted":
            return f"more than {_shown(total / 2)}"
        case "supermajority":
            return str(-(-2 * total // 3))
        case "unanimous":
            return "all"


def _shown(number: Fraction) -> str:
    return f"{float(number):g}"


def _quoted(position: str) -> str:
    return repr(position if len(position) <= 60 else position[:57] + "...")


def _names(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
