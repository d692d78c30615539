"""How a debate is held, and what is heard of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pantheraml.council.calibration import Calibration
from pantheraml.council.persona import Persona
from pantheraml.council.position import THRESHOLD
from pantheraml.council.quorum import RULES, Quorum
from pantheraml.council.transcript import Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a debate is held.

    Attributes:
        rounds: at most, the first answers included; 1: nobody reads anybody. max_new_tokens: of an answer.
        seed: of everything that is drawn. quorum: when the council has decided.
        samples: each advisor's last question is asked so often again, to see whether it says the same; 0: never.
        sample_temperature: for that, of an advisor whose own is 0.
        stop_early: no further round when all hold the same, or nobody changed what it holds.
        threshold: from which likeness on two longer texts are taken for the same position; see position.py.
        recall: so many earlier debates at most are told in the first round.
        synthesis: auto: worded by a model where that can be used. extract: put together from what was said.
        synthesis_tokens: of the model's synthesis. synthesiser: who words it; None: the local model.
        calibration: of the verdict's confidence.
    Raises: ValueError for values out of range.
    """

    rounds: int = 2
    max_new_tokens: int = 256
    seed: int = 0
    quorum: Quorum = "majority"
    samples: int = 0
    sample_temperature: float = 0.7
    stop_early: bool = True
    threshold: float = THRESHOLD
    recall: int = 3
    synthesis: Literal["auto", "extract"] = "auto"
    synthesis_tokens: int = 512
    synthesiser: Persona | None = None
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        if min(self.rounds, self.max_new_tokens, self.synthesis_tokens) < 1 or min(self.samples, self.recall) < 0:
            raise ValueError("rounds, max_new_tokens and synthesis_tokens are at least 1, samples and recall at least 0")
        if self.quorum not in RULES or self.synthesis not in ("auto", "extract"):
            raise ValueError(f"quorum is one of {', '.join(RULES)}, and synthesis auto or extract")
        if not 0 < self.sample_temperature < math.inf or not 0 < self.threshold <= 1:
            raise ValueError("sample_temperature is above 0, and threshold above 0 and at most 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened in a debate.

    Attributes:
        kind: recalled, round (one begins), text (more of an advisor's answer), turn (it is complete, or failed), sampling, verdict.
        round, advisor, text: which, who, and what was said; of a verdict, its summary. turn: of that kind.
    """

    kind: Literal["recalled", "round", "text", "turn", "sampling", "verdict"]
    round: int = -1
    advisor: str = ""
    text: str = ""
    turn: Turn | None = None
