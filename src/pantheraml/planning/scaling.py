"""How fast many GPUs would train a model: predicted from the plan and from what is sent, not measured. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pantheraml.errors import DeviceError
from pantheraml.hardware.catalog import Entry
from pantheraml.hardware.device import Device, Inventory
from pantheraml.planning.base import BYTES_EACH
from pantheraml.planning.plan import Plan, make_plan
from pantheraml.planning.shape import ModelShape
from pantheraml.planning.sharding import row_shares
from pantheraml.planning.traffic import Links, StepTime, Traffic, step_time, step_traffic
from pantheraml.recipe.kinds import Kind
from pantheraml.recipe.types import LoRA, Recipe

UTILISATION = 0.4
"""Share of the vendor's peak that one device reaches in a step, assumed: other people's kernels reach it on an H100 with LoRA on
Llama-3.2-1B in rows of 2048 (71,159 tokens/s of 5.5 GFLOP, of 989 TFLOP/s). Ours were not run on one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """One model on so many devices. `refused` says why it does not train there; then nothing else is known.

    Attributes:
        tokens_each: of a step, for each device. micro_tokens: that a process takes at once.
    """

    model: str
    adapter: Literal["lora", "full"]
    devices: int
    tokens_each: int
    refused: str | None = None
    mesh: Mapping[str, int] | None = None
    micro_tokens: int | None = None
    traffic: Traffic | None = None
    time: StepTime | None = None

    @property
    def tokens_per_s(self) -> float | None:
        """Of all devices."""
        return None if self.time is None else self.devices * self.tokens_each / self.time.step_s


def scaling_table(
    shapes: Sequence[ModelShape],
    gpu: Entry,
    *,
    devices: Sequence[int] = (1, 2, 8, 16, 64, 256, 1024),
    adapters: Sequence[Literal["lora", "full"]] = ("lora", "full"),
    tokens_each: int = 16_384,
    row_tokens: int = 2048,
    utilisation: float = UTILISATION,
    links: Links | None = None,
    in_machine: Literal["fsdp", "cp"] | None = None,
) -> Iterator[Predicted]:
    """A line for each model, adapter and number of devices: what the planner chooses there, and how long a step would take.

    Args:
        gpu: by the catalog, all of its memory free.
        tokens_each: tokens of a step for each device, so that a step grows with their number; less makes waiting weigh more.
        row_tokens: length of all examples. utilisation: share of the peak that a device reaches alone.
        links: None: an H100's, see there.
        in_machine: not what the planner chooses, but parts of the weights, or of every row, in each machine, and copies over machines;
            of whole machines only.
    """
    links = links or Links()
    for shape in shapes:
        for adapter in adapters:
            for count in devices:
                if in_machine and count < links.devices_each:
                    continue
                line = Predicted(model=shape.name, adapter=adapter, devices=count, tokens_each=tokens_each)
                hardware = {"dp": count // links.devices_each, in_machine: links.devices_each} if in_machine else {"devices": count}
                recipe = _recipe(shape, adapter, gpu.kind, hardware, count * tokens_each // row_tokens, row_tokens)
                try:
                    plan = make_plan(
                        recipe,
                        _inventory(gpu, count, links.devices_each),
                        shape,
                        train_tokens=recipe.batch.size * row_tokens,
                        train_rows=recipe.batch.size,
                        longest_example=row_tokens,
                        collective="nccl",
                    )
                except DeviceError as error:
                    yield replace(line, refused=error.what)
                    continue
                yield _predicted(line, plan, recipe, shape, gpu.flops[plan.dtype] * utilisation, row_tokens, links)


def _predicted(
    line: Predicted, plan: Plan, recipe: Recipe, shape: ModelShape, flops_per_s: float, row_tokens: int, links: Links
) -> Predicted:
    rank = recipe.adapter.rank if isinstance(recipe.adapter, LoRA) else None
    tokens = line.devices * line.tokens_each // row_shares(plan.mesh)
    traffic = step_traffic(
        shape,
        plan.mesh,
        lora_rank=rank,
        compute_bytes_each=BYTES_EACH[plan.dtype],
        levels=plan.levels,
        tokens=tokens,
        micro_batches=math.ceil(tokens / plan.micro_tokens),
    )
    time = step_time(
        shape, traffic, links, tokens=tokens, row_tokens=row_tokens, levels=plan.levels, lora_rank=rank, flops_per_s=flops_per_s
    )
    return replace(line, mesh=plan.mesh, micro_tokens=plan.micro_tokens, traffic=traffic, time=time)


def _recipe(shape: ModelShape, adapter: str, kind: Kind, hardware: Mapping[str, int], examples: int, row_tokens: int) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"name": shape.name, "max_tokens": row_tokens},
            "data": "rows.jsonl",
            "adapter": adapter,
            "batch": {"size": max(1, examples)},
            "hardware": {"kind": kind, **hardware},
        }
    )


def _inventory(gpu: Entry, count: int, devices_each: int) -> Inventory:
    """So many of them on paper, in machines of equal size."""
    here = min(count, devices_each)
    device = Device(
        kind=gpu.kind,
        index=0,
        name=gpu.name,
        memory_bytes=gpu.memory_bytes,
        free_bytes=gpu.memory_bytes,
        dtypes=("bfloat16", "float32"),
        peak_flops=gpu.flops["bfloat16"],
        hosts=math.ceil(count / here),
        simulated=True,
    )
    return Inventory(devices=tuple(replace(device, index=index) for index in range(here)))
