"""Which device a piece of work goes to: by time, by money, or by both, from what is known of each. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pantheraml.errors import DeviceError
from pantheraml.hardware.device import Device
from pantheraml.planning.batch import HEADROOM
from pantheraml.planning.cost import FUSED_UTILISATION, UTILISATION, flops_per_token
from pantheraml.planning.memory import Level, MemoryEstimate, format_bytes
from pantheraml.planning.shape import ModelShape

Objective = Literal["time", "cost", "balanced"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Work that runs on one device.

    Attributes:
        flops: floating point operations in all. memory_bytes: the most that it holds.
        transfer_bytes: moved between ordinary memory and the device. launches: operations one after another.
        utilization: share of a plain matrix product's speed that it reaches, above 0 and at most 1.
    Raises: ValueError for a number that is no amount.
    """

    flops: float
    memory_bytes: int = 0
    transfer_bytes: int = 0
    launches: int = 0
    utilization: float = 1.0

    def __post_init__(self) -> None:
        amounts = (self.flops, self.memory_bytes, self.transfer_bytes, self.launches)
        if not all(0 <= amount < math.inf for amount in amounts) or not 0 < self.utilization <= 1:
            raise ValueError(f"a workload has finite amounts of at least 0, and a utilization above 0 and up to 1: {self}")

    @classmethod
    def training(
        cls, shape: ModelShape, memory: MemoryEstimate, *, tokens: int, row_tokens: int, lora_rank: int | None, levels: Sequence[Level] = ()
    ) -> Workload:
        """A training run over so many tokens, at the share of speed that a step reaches (planning/cost.py)."""
        flops = flops_per_token(shape, row_tokens=row_tokens, levels=levels, lora_rank=lora_rank)
        return cls(flops=flops * tokens, memory_bytes=memory.total_bytes, utilization=FUSED_UTILISATION if shape.fused else UTILISATION)


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What is known of a device; None is unknown. `flops_source` and `price_source` say who says so.

    Attributes:
        free_bytes: now. host_bytes_per_s: from ordinary memory; infinite where the device works in it.
    """

    device: Device
    free_bytes: int | None
    flops_per_s: float | None
    flops_source: str
    host_bytes_per_s: float | None
    launch_s: float | None
    usd_per_hour: float | None
    price_source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A workload on one device; `excluded` says why it cannot or may not go there."""

    device: Device
    time_s: float | None
    cost_usd: float | None
    excluded: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Where the work goes and why, and how all devices compare."""

    device: Device
    time_s: float
    cost_usd: float | None
    why: str
    estimates: tuple[Estimate, ...]


def estimate(workload: Workload, profile: Profile) -> Estimate:
    """Time and price of a workload on one device.

    time = flops / (flops_per_s * utilization) + transfer_bytes / host_bytes_per_s + launches * launch_s. A part that the
    work has and whose speed is not known makes the time unknown: it is not nothing.
    """
    if _unknown_speed(workload, profile):
        return Estimate(device=profile.device, time_s=None, cost_usd=None)
    time_s = workload.flops / ((profile.flops_per_s or math.inf) * workload.utilization)
    time_s += workload.transfer_bytes / (profile.host_bytes_per_s or math.inf)
    time_s += workload.launches * (profile.launch_s or 0.0)
    cost = None if profile.usd_per_hour is None else profile.usd_per_hour * time_s / 3600
    return Estimate(device=profile.device, time_s=time_s, cost_usd=cost)


def choose(workload: Workload, profiles: Sequence[Profile], objective: Objective = "time", budget_usd: float | None = None) -> Choice:
    """The device for a workload.

    Args:
        objective: the least time, the least cost, or the least product of both (balanced).
        budget_usd: no device on which the work costs more, or whose price is not known.
    Raises: DeviceError with the reason for each device, if none is left.
    """
    if objective not in ("time", "cost", "balanced"):
        raise ValueError(f"objective is time, cost or balanced, not {objective!r}")
    estimates = tuple(_judged(workload, profile, objective, budget_usd) for profile in profiles)
    possible = [each for each in estimates if each.excluded is None]
    if not possible:
        raise DeviceError(
            "no device can take this work",
            why="; ".join(f"{each.device}: {each.excluded}" for each in estimates) or "there are no devices",
            fix="measure speeds with pantheraml devices --bench, give prices, raise the budget, or make the work smaller",
        )

    def score(each: Estimate) -> float:
        time_s, cost = each.time_s or 0.0, each.cost_usd or 0.0
        return {"time": time_s, "cost": cost, "balanced": time_s * cost}[objective]

    best = min(possible, key=lambda each: (score(each), each.time_s or 0.0))
    profile = next(profile for profile in profiles if profile.device == best.device)
    what = {"time": "the least time", "cost": "the least cost", "balanced": "the least time multiplied by cost"}[objective]
    why = f"{what} of {len(possible)} devices" if len(possible) > 1 else "the only one that can take it"
    price = f"; price: {profile.price_source}" if best.cost_usd is not None else ""
    return Choice(
        device=best.device,
        time_s=best.time_s or 0.0,
        cost_usd=best.cost_usd,
        why=f"{why}; speed: {profile.flops_source}{price}",
        estimates=estimates,
    )


def _unknown_speed(workload: Workload, profile: Profile) -> str | None:
    """Which part of the work takes a time that nobody knows on this device; None: all are known."""
    if workload.flops and profile.flops_per_s is None:
        return f"its speed is not known ({profile.flops_source})"
    if workload.transfer_bytes and profile.host_bytes_per_s is None:
        return "how fast data moves to it is not known (pantheraml devices --bench measures it)"
    if workload.launches and profile.launch_s is None:
        return "how long a launch takes is not known (pantheraml devices --bench measures it)"
    return None


def _judged(workload: Workload, profile: Profile, objective: Objective, budget_usd: float | None) -> Estimate:
    found = estimate(workload, profile)
    room = None if profile.free_bytes is None else int(profile.free_bytes * HEADROOM)
    excluded = None
    if workload.memory_bytes and (room is None or workload.memory_bytes > room):
        excluded = f"needs {format_bytes(workload.memory_bytes)}, and {format_bytes(room)} may be filled"
    elif unknown := _unknown_speed(workload, profile):
        excluded = unknown
    elif found.cost_usd is None and (objective != "time" or budget_usd is not None):
        excluded = f"its price is not known ({profile.price_source})"
    elif found.cost_usd is not None and budget_usd is not None and found.cost_usd > budget_usd:
        excluded = f"costs ${found.cost_usd:.4g}, over the budget of ${budget_usd:.4g}"
    return Estimate(device=found.device, time_s=found.time_s, cost_usd=found.cost_usd, excluded=excluded)
