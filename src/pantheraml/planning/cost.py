"""How much work a token is, and so how long a run may take. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pantheraml.planning.memory import RECOMPUTED, Level
from pantheraml.planning.shape import ModelShape

UTILISATION = 0.35
"""Share of a plain matrix product's speed that a whole training step reaches with stock modules: a first guess,
which the run's report sets beside what it measured. LoRA on stock transformers + peft in bfloat16 reached 0.31 to
0.43 on two Zen 5 cores (SmolLM2-135M, Qwen2.5-0.5B) and 0.27 on an H100 (Llama-3.2-1B shape, 4 x 2048)."""

FUSED_UTILISATION = 0.55
"""The same where the kernels compute the layers: SmolLM2-135M and Qwen2.5-0.5B in rows of 512 reached 0.5 to 0.65 on two
Zen 4 cores in bfloat16 (benchmarks/train_cpu.py). On a GPU nothing was measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostEstimate:
    """Expected work. Seconds are None where the device's speed is unknown, dollars where its price is too."""

    flops_per_token: float
    tokens_per_s: float | None
    total_tokens: int | None
    time_s: float | None
    usd_per_hour: float | None = None

    @property
    def usd(self) -> float | None:
        """US dollars for the whole run."""
        return None if self.usd_per_hour is None or self.time_s is None else self.usd_per_hour * self.time_s / 3600


def format_seconds(time_s: float | None) -> str:
    """`about 2 h 5 min`, `about 40 s`; None is `unknown`."""
    if time_s is None:
        return "unknown"
    if time_s < 60:
        return f"about {max(1, round(time_s))} s"
    minutes = round(time_s / 60)
    return f"about {minutes} min" if minutes < 60 else f"about {minutes // 60} h {minutes % 60} min"


def format_dollars(usd: float | None) -> str:
    """`$1.50`, `$0.0031`; None is `unknown`."""
    if usd is None:
        return "unknown"
    return f"${usd:.2f}" if usd >= 1 or usd == 0 else f"${usd:.2g}"


def flops_per_token(shape: ModelShape, *, row_tokens: int, levels: Sequence[Level], lora_rank: int | None) -> float:
    """Floating point operations for a token, forward and backward.

    A weight costs 2 forward, 2 for the gradient of its input and, if it trains, 2 for its own; computing a layer again
    adds 2. Attention multiplies each of T = row_tokens keys and values twice forward (4 T Q a layer), and costs twice that
    backward. All T are counted: a mask hides products, it does not save them.
    """
    matrices = shape.parameters - shape.embedding_parameters + shape.vocab * shape.hidden  # the head multiplies, the embedding does not
    again = sum(level in RECOMPUTED for level in levels) / max(1, len(levels))
    weights = 2.0 * matrices * ((3 if lora_rank is None else 2) + again)
    adapters = 0.0 if lora_rank is None else 2.0 * shape.lora_parameters(lora_rank) * (3 + again)
    attention = 4.0 * shape.layers * row_tokens * shape.heads * shape.head_dim * (3 + again)
    return weights + adapters + attention


def estimate_cost(
    shape: ModelShape,
    *,
    row_tokens: int,
    levels: Sequence[Level],
    lora_rank: int | None,
    peak_flops: float | None,
    total_tokens: int | None,
    fused: bool = False,
    usd_per_hour: float | None = None,
) -> CostEstimate:
    """Time from the measured speed of a matrix product times the share of it that a step reaches; None where either is unknown.

    Args:
        row_tokens: length of the rows that attention runs over. peak_flops: of the dtype in use, FLOP/s.
        total_tokens: tokens in the whole run, all epochs. usd_per_hour: of the device. fused: the kernels compute the layers.
    """
    flops = flops_per_token(shape, row_tokens=row_tokens, levels=levels, lora_rank=lora_rank)
    tokens_per_s = None if peak_flops is None else peak_flops * (FUSED_UTILISATION if fused else UTILISATION) / flops
    time_s = None if tokens_per_s is None or total_tokens is None else total_tokens / tokens_per_s
    return CostEstimate(
        flops_per_token=flops, tokens_per_s=tokens_per_s, total_tokens=total_tokens, time_s=time_s, usd_per_hour=usd_per_hour
    )
