"""The next token of each row: the likeliest, or drawn, by a draw that depends on the request's seed and the token's place alone.

Letters: N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Draw:
    """How one token is drawn; see `Request`. number: uniform in [0, 1)."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    number: float = 0.0

    @property
    def cuts(self) -> bool:
        """Whether some tokens cannot be drawn."""
        return self.top_p < 1 or self.top_k > 0


def uniform(seed: int, place: int) -> float:
    """A number in [0, 1), a multiple of 2**-53; those of other seeds and places are independent of it.

    Source: SplitMix64 (Steele, Lea, Flood 2014), whose start is the mixed seed, and which can be entered at any place.
    """
    return (_mixed(_mixed(seed) + (place + 1) * 0x9E3779B97F4A7C15) >> 11) * 2.0**-53


def _mixed(x: int) -> int:
    x &= _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def choose(logits_NV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """The token of each row [N], int64; -inf in the logits is never chosen. Nothing of a row depends on the others."""
    tokens = logits_NV.argmax(-1)
    hot = [i for i, draw in enumerate(draws) if draw.temperature > 0]
    for cuts in (False, True):
        rows = [i for i in hot if draws[i].cuts == cuts]
        if rows:
            at = torch.tensor(rows, device=logits_NV.device)
            tokens[at] = _drawn(logits_NV[at].float(), [draws[i] for i in rows], cuts=cuts)
    return tokens


def _drawn(logits_NV: Tensor, draws: Sequence[Draw], *, cuts: bool) -> Tensor:
    """The first token at which the sum of the probabilities exceeds the number: in the order of the vocabulary, or of the likeliest."""

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits_NV.device)[:, None]

    order = None
    # The largest logit is taken off before the division: a temperature near 0 gives no infinity.
    # One that float32 takes for 0 would still give 0 / 0.
    least = torch.finfo(torch.float32).tiny
    logits_NV = (logits_NV - logits_NV.amax(-1, keepdim=True)) / column([max(draw.temperature, least) for draw in draws])
    if cuts:
        logits_NV, order = logits_NV.sort(dim=-1, descending=True, stable=True)
        places = torch.arange(logits_NV.shape[1], device=logits_NV.device)
        last = column([draw.top_k or logits_NV.shape[1] for draw in draws])
        logits_NV = logits_NV.masked_fill(places >= last, -torch.inf)
    shares = logits_NV.softmax(-1)
    sums = shares.cumsum(-1)
    if cuts:
        shares = shares.masked_fill(sums - shares >= column([draw.top_p for draw in draws]), 0.0)
        shares[:, 0] = shares[:, 0].clamp_min(torch.finfo(shares.dtype).tiny)  # the likeliest one always can be
        sums = shares.cumsum(-1)
    found = torch.searchsorted(sums, sums[:, -1:] * column([draw.number for draw in draws]), right=True)
    # A number so near 1 that it is rounded up: the last token with a share.
    last_one = (shares > 0).cumsum(-1).argmax(-1, keepdim=True)
    found = torch.minimum(found, last_one)
    return (found if order is None else order.gather(-1, found))[:, 0]


def log_probabilities(logits_NV: Tensor, tokens_N: Tensor) -> Tensor:
    """Log-probability of one token of each row, [N] float32."""
    logits = logits_NV.float()
    return logits.gather(-1, tokens_N[:, None])[:, 0] - logits.logsumexp(-1)
