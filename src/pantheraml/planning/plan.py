"""The plan: every choice that was left open by the recipe, made, with one sentence of reason each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pantheraml.hardware.device import Device


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Bytes at the busiest moment of a step, by what holds them."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    logits_bytes: int
    runtime_bytes: int

    @property
    def total_bytes(self) -> int:
        return (
            self.weights_bytes
            + self.gradients_bytes
            + self.optimizer_bytes
            + self.activations_bytes
            + self.logits_bytes
            + self.runtime_bytes
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CostEstimate:
    """Expected work. Seconds are None where the device's speed is unknown."""

    flops_per_token: float
    tokens_per_s: float | None
    total_tokens: int | None
    time_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What will be done. `reasons` maps a choice to its sentence; `pantheraml plan` prints them.

    Attributes:
        dtype: of the arithmetic; weights that train are kept in float32.
        base_dtype: of the weights that do not train.
        max_tokens: longest example.
        row_tokens: the static row lengths, rising; a micro-batch has one of the shapes
            [micro_tokens // n, n] for n in row_tokens.
        micro_tokens: tokens the device takes at once.
        packing: several examples share a row.
    """

    device: Device
    world_size: int
    dtype: Literal["float32", "bfloat16", "float16"]
    base_dtype: Literal["float32", "bfloat16", "float16"]
    attention: str
    quantizer: str | None
    max_tokens: int
    row_tokens: tuple[int, ...]
    micro_tokens: int
    batch_size: int
    packing: bool
    checkpointing: bool
    threads: int | None
    lr: float
    memory: MemoryEstimate
    cost: CostEstimate
    reasons: dict[str, str]
