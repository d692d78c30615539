"""Keys and values of many answers at once, each in a row of a fixed length, and attention over them.

Each row has its own number of tokens. The last place of a row belongs to no token: what stands there only to fill a shape is written
there, and nobody looks at it. A model finds this attention under a name for which transformers makes no mask; windows, bounds on
scores and sinks are taken from what each layer says.

Letters: B rows, T tokens of a row that are computed, S places of a row, H heads, K key heads, G heads of one key head, W width of a head.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache, CacheLayerMixin

ATTENTION = "pantheraml_rows"
"""The name under which transformers finds `_attention`."""
PLACES = 64
"""Rows are as long, and are looked at as far, as a multiple of this: sums over keys are then taken in the same order whatever the length."""


@dataclass(slots=True)
class Step:
    """Which tokens are computed.

    Attributes:
        rows: of the cache, [B] or neighbours. positions_BT: of the tokens in their rows.
        places_BT: where their keys and values are written; the last place for what only fills the shape.
        length: places that are looked at.
    """

    rows: Tensor | range
    positions_BT: Tensor
    places_BT: Tensor
    length: int
    attended: bool = False
    _biases: dict[Any, Tensor] = field(default_factory=dict)
    _written: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def bias(self, window: int | None, group: int, like: Tensor) -> Tensor:
        """What is added to the scores, [B, 1, G * T, S]: 0 for the places that a token sees, those up to its own and of them the last
        `window`; -inf for all others."""
        known = window, group, like.dtype, like.device
        if known not in self._biases:
            back = self.positions_BT[:, :, None] - torch.arange(self.length, device=self.positions_BT.device)
            unseen = back < 0 if window is None else (back < 0) | (back >= window)
            bias = torch.zeros(unseen.shape, dtype=like.dtype, device=unseen.device).masked_fill(unseen, -torch.inf)
            self._biases[known] = bias.repeat(1, group, 1)[:, None].to(like.device)
        return self._biases[known]

    def written(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(rows, places) of the tokens, which index a cache or the neighbours in it."""
        if device not in self._written:
            rows = torch.arange(len(self.rows)) if isinstance(self.rows, range) else self.rows
            self._written[device] = rows[:, None].to(device), self.places_BT.to(device)
        return self._written[device]


class RowCache(Cache):
    """The cache of a model: keys and values [rows, K, places, W] of each layer, made when they are first written.

    Args:
        tokens: of a row.
    """

    def __init__(self, rows: int, tokens: int) -> None:
        make: Any = lambda: _Layer(self)  # noqa: E731 - transformers wants a class, and calls it
        super().__init__(layer_class_to_replicate=make)
        self.rows, self.places = rows, places_for(tokens)
        self.step: Step | None = None

    def copy(self, source: int, target: int, start: int, end: int) -> None:
        """Copy the keys and values of some tokens to another row."""
        for tensor in self._tensors():
            tensor[target, :, start:end] = tensor[source, :, start:end]

    def clear(self, row: int) -> None:
        """Set what a row holds to zero: a value that is not finite would reach those that may not see it, as 0 * inf."""
        for tensor in self._tensors():
            tensor[row] = 0

    @property
    def token_bytes(self) -> int:
        """What the keys and values of one token take; 0 before the first one."""
        return sum(tensor.nbytes for tensor in self._tensors()) // (self.rows * self.places)

    def _tensors(self) -> Iterator[Tensor]:
        for layer in self.layers:
            if isinstance(layer, _Layer) and layer.keys is not None and layer.values is not None:
                yield layer.keys
                yield layer.values


def places_for(tokens: int) -> int:
    """The length of a row for so many tokens: one place more, rounded up."""
    return -(-(tokens + 1) // PLACES) * PLACES


class _Layer(CacheLayerMixin):
    is_sliding = False

    def __init__(self, cache: RowCache) -> None:
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (
            torch.zeros((self._cache.rows, new.shape[1], self._cache.places, new.shape[3]), dtype=new.dtype, device=new.device)
            for new in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the new ones, and give all that the step looks at."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        step = self._cache.step
        assert step is not None and self.keys is not None and self.values is not None
        return self._updated(self.keys, key_states, step), self._updated(self.values, value_states, step)

    def _updated(self, kept: Tensor, new_BKTW: Tensor, step: Step) -> Tensor:
        rows, places = step.written(kept.device)
        neighbours = isinstance(step.rows, range)
        if isinstance(step.rows, range):
            kept = kept[step.rows.start : step.rows.stop]
        kept[rows, :, places] = new_BKTW.transpose(1, 2).to(kept.dtype)
        kept = kept[:, :, : step.length]
        return kept if neighbours else kept.index_select(0, rows[:, 0])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.places, 0

    def get_seq_length(self) -> int:
        return 0  # each row has its own, so positions are always given

    def get_max_length(self) -> int:
        return self._cache.places - 1


def attend(
    q_BHTW: Tensor, k_BKSW: Tensor, v_BKSW: Tensor, bias_B1GTS: Tensor, *, scale: float, softcap: float | None, sinks_H: Tensor | None
) -> Tensor:
    """softmax(scale * q k + bias) v, [B, T, H, W]; no key is repeated for the heads that share it.

    softcap: scores are bounded by it. sinks_H: a score of each head that takes part in the sum and gives nothing (GPT-OSS).
    """
    rows, heads, tokens, _ = q_BHTW.shape
    shared = k_BKSW.shape[1]
    q = q_BHTW.reshape(rows, shared, heads // shared * tokens, -1).to(k_BKSW.dtype)
    if softcap is None and sinks_H is None:
        out = F.scaled_dot_product_attention(q, k_BKSW, v_BKSW, attn_mask=bias_B1GTS, scale=scale)
    else:
        scores = (q @ k_BKSW.transpose(2, 3)).float() * scale
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        scores = scores + bias_B1GTS
        if sinks_H is None:
            shares = scores.softmax(-1)
        else:
            sinks = sinks_H.float().view(1, shared, -1, 1).expand(rows, -1, -1, tokens).reshape(rows, shared, -1, 1)
            shares = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
        out = shares.to(v_BKSW.dtype) @ v_BKSW
    return out.view(rows, heads, tokens, -1).transpose(1, 2).to(q_BHTW.dtype).contiguous()


# ---- As transformers calls it ---------------------------------------------------------------------------------------

_now = threading.local()
"""`step`: what this thread's model computes."""


@contextmanager
def attending(config: Any, cache: RowCache, step: Step) -> Iterator[None]:
    """Within the block the model with this configuration attends to the rows of a cache, in this thread."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attention)
    before, config._attn_implementation = config._attn_implementation, ATTENTION
    cache.step = _now.step = step
    try:
        yield
    finally:
        config._attn_implementation = before
        cache.step = _now.step = None


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """query [B, H, T, W], key and value [B, K, S, W] -> [B, T, H, W]."""
    step: Step = _now.step
    step.attended = True
    bias = step.bias(sliding_window, query.shape[1] // key.shape[1], key)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(query, key, value, bias, scale=scale, softcap=softcap, sinks_H=s_aux), None
