"""How sure an advisor is, measured: by what the model said its tokens were worth, and by whether it says the same when asked again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pantheraml.council.calibration import Calibration
from pantheraml.council.position import Agreement
from pantheraml.council.quorum import Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Confidence:
    """Of one advisor in its last answer.

    Attributes:
        probability: of the answer's tokens, the geometric mean; None: the service did not tell.
        agreeing, samples: how many of so many answers to the same prompt, drawn anew, held the same.
        raw: both together; None: neither was measured. See `raw_confidence`.
    """

    advisor: str
    probability: float | None
    agreeing: int
    samples: int
    raw: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """How sure the council is of the position that most hold.

    Attributes:
        raw: the mean of the advisors' raw confidences, each counted as 0 that holds something else or nothing; those that hold it and
            were not measured are left out, and where that is all of them, it is None.
        calibrated: how often such a verdict was right; None: nothing says so. said: one sentence.
    """

    raw: float | None
    calibrated: float | None
    said: str


def probability(mean_logprob: float | None) -> float | None:
    """The length-normalised probability of a text: the geometric mean of its tokens' probabilities."""
    return None if mean_logprob is None else min(1.0, math.exp(mean_logprob))


def raw_confidence(of_tokens: float | None, agreeing: int, samples: int) -> float | None:
    """The geometric mean of the answer's probability and of (agreeing + 1) / (samples + 2), or the one of the two that was measured.

    The second is how often the next sample would agree, if nothing was known before (Laplace's rule of succession).
    """
    of_samples = (agreeing + 1) / (samples + 2) if samples else None
    measured = [each for each in (of_tokens, of_samples) if each is not None]
    return math.prod(measured) ** (1 / len(measured)) if measured else None


def of_advisor(advisor: str, mean_logprob: float | None, held: str, sampled: Sequence[str], agreement: Agreement) -> Confidence:
    """Of an advisor that holds something, and held `sampled` when it was asked again.

    Args:
        mean_logprob: of the tokens of its answer.
    """
    agreeing = sum(agreement.agree(held, each) for each in sampled)
    of_tokens = probability(mean_logprob)
    return Confidence(
        advisor=advisor,
        probability=of_tokens,
        agreeing=agreeing,
        samples=len(sampled),
        raw=raw_confidence(of_tokens, agreeing, len(sampled)),
    )


def of_verdict(found: Sequence[Confidence], outcome: Outcome, weights: Mapping[str, float], calibration: Calibration | None) -> Verdict:
    """Of the position that most hold. weights: of the advisors, which count in a weighted quorum."""
    weigh = weights if outcome.rule == "weighted" else dict.fromkeys(weights, 1.0)
    if outcome.position is None:
        return Verdict(raw=None, calibrated=None, said="not measured: no position is held by most")
    held_by = set(outcome.counts[0].advisors)
    measured = {each.advisor: each.raw for each in found if each.raw is not None and each.advisor in held_by}
    if not measured:
        why = "the services told no probabilities, and nobody was asked again"
        return Verdict(raw=None, calibrated=None, said=f"not measured: {why}")
    whole = math.fsum(weight for name, weight in weigh.items() if name in measured or name not in held_by)
    raw = math.fsum(weigh[name] * each for name, each in measured.items()) / whole
    if calibration is None:
        return Verdict(raw=raw, calibrated=None, said=f"{raw:.2f}, not calibrated")
    calibrated = calibration(raw)
    fitted = f"{calibration.method}, {calibration.after.count} known answers, expected error {calibration.after.ece:.2f}"
    return Verdict(raw=raw, calibrated=calibrated, said=f"{calibrated:.2f}, calibrated from {raw:.2f} ({fitted})")
