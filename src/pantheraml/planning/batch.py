"""Which static shapes a run uses, and how many tokens the device takes at once. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from pantheraml.errors import DeviceError
from pantheraml.hardware.device import Device
from pantheraml.planning.levels import SAID, Levels, mixed
from pantheraml.planning.memory import RECOMPUTED, Level, MemoryEstimate, estimate_memory, format_bytes
from pantheraml.planning.shape import ModelShape
from pantheraml.recipe.kinds import KINDS
from pantheraml.recipe.types import HardwareAsk

SHORTEST_ROW = 64
MOST_LENGTHS = 6
HEADROOM = 0.8
"""Share of the free memory that a plan may fill: the estimate is within about a tenth, allocators leave gaps."""
BUSY_TOKENS = 4096
"""Tokens after which more at once bring nothing on a slow device: matrix products are already at full speed."""
BUSY_TOKENS_FAST = 16384
FAST_FLOPS = 1e13
"""Above 10 TFLOP/s a micro-batch of BUSY_TOKENS may end before the next kernels are launched, so more is taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """What fits: tokens at once, what each layer keeps, the estimate, and the reasons."""

    micro_tokens: int
    levels: Levels
    memory: MemoryEstimate
    reason: str
    levels_reason: str


Estimate = Callable[[int, Levels], MemoryEstimate]
"""(micro_tokens, what each layer keeps) -> bytes."""


def round_lengths(longest: int, *, start: int = SHORTEST_ROW) -> tuple[int, ...]:
    """Powers of two and the points half-way between them (64, 96, 128, 192, ...), up to the first that holds `longest`."""
    lengths = [start]
    while lengths[-1] < longest:
        last = lengths[-1]
        lengths.append(last * 3 // 2 if last & (last - 1) == 0 else last * 4 // 3)
    return tuple(lengths)


def row_lengths(max_tokens: int, longest_example: int | None = None) -> tuple[int, ...]:
    """The static row lengths of a run, rising, at most MOST_LENGTHS of them; the last holds the longest example.

    Args:
        max_tokens: no row is longer. longest_example: in tokens; None if not known yet.

    Each length is a shape to compile or to warm up, and each gap between two is padding: powers of two and the
    points half-way waste at most a third, and beyond MOST_LENGTHS the short ones are thinned out first.
    """
    longest = max_tokens if longest_example is None else min(max(longest_example, 1), max_tokens)
    lengths = [*(n for n in round_lengths(longest)[:-1] if n < max_tokens), min(round_lengths(longest)[-1], max_tokens)]
    # Drop the half-way points from the short end, then the shortest: padding a short row costs little.
    for half_way in [n for n in lengths[:-1] if n & (n - 1)]:
        if len(lengths) > MOST_LENGTHS:
            lengths.remove(half_way)
    return tuple(lengths[-MOST_LENGTHS:])


def known(free_bytes: int | None, device: Device) -> int:
    """The free bytes of a device. Raises: DeviceError if nobody tells them."""
    if free_bytes is None:
        raise DeviceError(
            f"how much memory is free on {device} ({device.label}) is not known",
            why="without it nobody can say what fits",
            fix="choose another device",
        )
    return free_bytes


def rows_that_fit(need: Callable[[int], int], budget_bytes: int, *, most: int = 1 << 20) -> int:
    """The most rows for which need(rows) bytes are within the budget; 0 if not even one is. `need` must not fall as rows rise."""
    fits, fails = 0, 1
    while fails <= most and need(fails) <= budget_bytes:
        fits, fails = fails, fails * 2
    while fails - fits > 1:
        middle = (fits + fails) // 2
        fits, fails = (middle, fails) if need(middle) <= budget_bytes else (fits, middle)
    return min(fits, most)


def choose_micro_tokens(
    estimate: Estimate,
    *,
    free_bytes: int,
    longest_row: int,
    batch_tokens: int,
    most_tokens: int | None = None,
    peak_flops: float | None,
    layers: int,
    rungs: tuple[Level, ...],
    mixes: bool = True,
    sharers: int = 1,
    asked: int | None = None,
    remedies: tuple[str, ...] = (),
) -> MicroBatch:
    """The most tokens at once that fit into HEADROOM of the free memory and still make the step faster.

    Args:
        estimate: bytes for (micro_tokens, levels).
        longest_row: tokens of the longest row; one of them is the least that can be taken.
        batch_tokens: tokens in one optimizer step; more than a step cannot be taken at once. most_tokens: no step has more; None: not known.
        peak_flops: of the device, or None.
        layers: of the model. rungs: levels that may be used, the fastest first. Products are computed again only if not even
            one row fits without, and then in no more layers than it takes. mixes: layers can be at different levels.
        sharers: processes of which each computes a part of the tokens.
        asked: micro_tokens of the recipe, taken as it is; refused only over all of the free memory.
        remedies: what would make it fit, best first, for the error.
    Raises: DeviceError with the numbers, if it does not fit.
    """
    budget = free_bytes if asked else int(free_bytes * HEADROOM)
    busy = sharers * (BUSY_TOKENS_FAST if peak_flops is not None and peak_flops >= FAST_FLOPS else BUSY_TOKENS)
    # Steps differ in length: with a quarter more, nearly all of them are taken at once.
    in_a_step = round_lengths(batch_tokens * 5 // 4)[-1]
    cap = max(longest_row, min(busy, in_a_step if most_tokens is None else min(in_a_step, round_lengths(most_tokens)[-1])))
    sizes = (
        (asked,)
        if asked
        else tuple(dict.fromkeys([*(n for n in reversed(round_lengths(cap, start=64)) if longest_row < n <= cap), longest_row]))
    )

    def fits(tokens: int, levels: Levels) -> bool:
        return estimate(tokens, levels).total_bytes <= budget

    heavy: list[Level] = [rung for rung in rungs if rung in RECOMPUTED] if rungs[1:] else []
    light: list[Level] = [rung for rung in rungs if rung not in heavy]
    tries: tuple[tuple[int, Level], ...] = (*((tokens, rung) for tokens in sizes for rung in light), *((sizes[-1], rung) for rung in heavy))
    for tokens, rung in tries:
        if fits(tokens, (rung,) * layers):
            above = rungs[: rungs.index(rung)]
            mix = mixes and bool(above)
            levels = mixed(layers, above[-1], rung, lambda levels: fits(tokens, levels)) if mix else (rung,) * layers  # noqa: B023 - called in this turn of the loop only
            return _chosen(
                tokens, levels, estimate(tokens, levels), asked=asked, cap=cap, busy=busy, free_bytes=free_bytes, given=len(rungs) == 1
            )

    least = estimate(sizes[-1], (rungs[-1],) * layers)
    with_checkpointing = " even with checkpointing" if rungs[-1] in RECOMPUTED else ""
    raise DeviceError(
        f"training needs {format_bytes(least.total_bytes)}{with_checkpointing}, and the device has {format_bytes(free_bytes)} free"
        + ("" if asked else f", of which a plan fills {HEADROOM:.0%}"),
        why=f"for {sizes[-1]} tokens at once: weights {format_bytes(least.weights_bytes)}, gradients {format_bytes(least.gradients_bytes)}, "
        f"optimizer {format_bytes(least.optimizer_bytes)}, activations {format_bytes(least.activations_bytes)}, "
        f"logits {format_bytes(least.logits_bytes)}, libraries {format_bytes(least.runtime_bytes)}",
        fix="; or ".join(remedies) or "choose a smaller model, or a device with more memory",
    )


def _chosen(
    tokens: int, levels: Levels, memory: MemoryEstimate, *, asked: int | None, cap: int, busy: int, free_bytes: int, given: bool
) -> MicroBatch:
    need = f"{format_bytes(memory.total_bytes)} of {format_bytes(free_bytes)} free"
    if asked:
        reason = f"the recipe asks for it; needs about {need}"
    elif tokens < cap:
        reason = f"the most that fits: about {need}, of which {HEADROOM:.0%} may be filled"
    elif tokens >= busy:
        reason = f"the device is busy with that many, more at once would only take memory; needs about {need}"
    else:
        reason = f"a whole step is not longer; needs about {need}"
    why = "the recipe asks for it: " if given else "" if levels[0] not in RECOMPUTED else "not even one row fits without: "
    why += "; ".join(SAID[level] for level in dict.fromkeys(levels))
    return MicroBatch(micro_tokens=tokens, levels=levels, memory=memory, reason=reason, levels_reason=why)


def shared_rows(micro: MicroBatch, longest_row: int, shares: int, estimate: Estimate) -> MicroBatch:
    """With no more rows than several devices can share evenly; there is at least one for each."""
    rows = micro.micro_tokens // longest_row // shares * shares
    if shares == 1 or rows * longest_row == micro.micro_tokens:
        return micro
    tokens = rows * longest_row
    reason = f"{rows // shares} rows for each of {shares} devices; {micro.reason}"
    return replace(micro, micro_tokens=tokens, memory=estimate(tokens, micro.levels), reason=reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchConfig:
    """How many examples a device takes at once.

    Attributes:
        batch_size: to use. max_batch_size: the most that fits; None where no model is known, so nothing could be counted.
        decided_by: "factor" (a setting times the base), or "planner" (the memory arithmetic for a known model).
        reason: one sentence. simulated: the device is a stand-in.
    """

    batch_size: int
    max_batch_size: int | None
    device: Device
    decided_by: Literal["factor", "planner"]
    reason: str
    simulated: bool


def batch_by_factor(device: Device, base: int, ask: HardwareAsk) -> BatchConfig:
    """The base times the factor of the device's family, to the nearest power of two; the base itself where the factor is 1."""
    family = KINDS[device.kind].family
    factor: int = getattr(ask, f"{family}_batch_factor")
    return BatchConfig(
        batch_size=base if factor == 1 else nearest_power_of_two(base * factor),
        max_batch_size=None,
        device=device,
        decided_by="factor",
        reason=f"the factor of a {family.upper()} (a setting), {factor} x {base}, since no model is known" + _simulated(device),
        simulated=device.simulated,
    )


def batch_by_shape(
    device: Device, base: int, shape: ModelShape, *, free_bytes: int | None, max_tokens: int | None, lora_rank: int | None
) -> BatchConfig:
    """As many examples as training fits into HEADROOM of the free memory, in multiples of the base.

    Args:
        max_tokens: of an example; None: what the model can do, or 2048. lora_rank: None: every weight trains.
    Raises: DeviceError if not even one fits, or nobody tells how much memory is free.
    """
    free_bytes = known(free_bytes, device)
    tokens = min(max_tokens or 2048, shape.max_tokens)
    each = 2 if device.dtypes[:1] == ("bfloat16",) else 4

    def need(rows: int) -> int:
        return estimate_memory(
            shape,
            trainable_parameters=shape.lora_parameters(lora_rank) if lora_rank else shape.parameters,
            base_bytes_each=each if lora_rank else 4,
            micro_tokens=rows * tokens,
            row_tokens=tokens,
            levels=("cheap",) * shape.layers,
            fused=shape.fused,
            attention=shape.attention[0],
            compute_bytes_each=each,
            lora_rank=lora_rank,
        ).total_bytes

    most = rows_that_fit(need, int(free_bytes * HEADROOM))
    if most < 1:
        raise DeviceError(
            f"not even one example of {tokens} tokens of {shape.name} fits on {device}",
            why=f"training needs {format_bytes(need(1))}, and {HEADROOM:.0%} of {format_bytes(free_bytes)} free may be filled",
            fix="pass a smaller max_tokens, an adapter (lora_rank), or choose a smaller model",
        )
    size = most if most < base else most // base * base
    return BatchConfig(
        batch_size=size,
        max_batch_size=most,
        device=device,
        decided_by="planner",
        reason=f"the planner: {size} x {tokens} tokens of {shape.name} need about {format_bytes(need(size))} of "
        f"{format_bytes(free_bytes)} free" + _simulated(device),
        simulated=device.simulated,
    )


def nearest_power_of_two(number: int) -> int:
    """The power of two nearest to a number of at least 1; the larger of two that are equally near."""
    below = 1 << (number.bit_length() - 1)
    return below if number - below < 2 * below - number else 2 * below


def _simulated(device: Device) -> str:
    return "; the device is simulated" if device.simulated else ""
