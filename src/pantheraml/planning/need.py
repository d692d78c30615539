"""What training needs of the memory of all its devices, and what would make it fit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from pantheraml.hardware.device import Device
from pantheraml.planning.base import BYTES_EACH, Dtype, asked_quantizer, base_bytes_each
from pantheraml.planning.batch import HEADROOM, round_lengths
from pantheraml.planning.levels import Levels, rungs
from pantheraml.planning.memory import OPTIMIZER_BYTES, Level, MemoryEstimate, estimate_memory
from pantheraml.planning.shape import ModelShape
from pantheraml.planning.sharding import row_shares
from pantheraml.recipe.kinds import KINDS
from pantheraml.recipe.types import LoRA, Recipe


def fused(recipe: Recipe, shape: ModelShape, device: Device) -> bool:
    """Whether the kernels compute the layers, adapters and all."""
    return (
        shape.fused
        and KINDS[device.kind].family != "tpu"
        and not (isinstance(recipe.adapter, LoRA) and (recipe.adapter.dropout > 0 or recipe.adapter.dora))
    )


def need(
    recipe: Recipe,
    shape: ModelShape,
    device: Device,
    mesh: Mapping[str, int],
    dtype: Dtype,
    attention: str,
    row_tokens: int,
    micro_tokens: int,
    levels: Levels,
) -> MemoryEstimate:
    """On all devices together."""
    rank = recipe.adapter.rank if isinstance(recipe.adapter, LoRA) else None
    alone = estimate_memory(
        shape,
        trainable_parameters=shape.lora_parameters(rank) if rank else shape.parameters,
        base_bytes_each=base_bytes_each(shape, dtype, asked_quantizer(recipe), both_ways=KINDS[device.kind].engine != "xla") if rank else 4,
        micro_tokens=micro_tokens,
        row_tokens=row_tokens,
        levels=levels,
        fused=fused(recipe, shape, device),
        xla=KINDS[device.kind].engine == "xla",
        attention=attention,
        compute_bytes_each=BYTES_EACH[dtype],
        lora_rank=rank,
        optimizer_bytes_each=OPTIMIZER_BYTES[recipe.optim.states],
    )
    copies = mesh.get("dp", 1) * mesh.get("dcn", 1)
    return replace(
        alone,
        weights_bytes=copies * alone.weights_bytes,
        gradients_bytes=copies * alone.gradients_bytes,
        optimizer_bytes=copies * alone.optimizer_bytes,
    )


def remedies(
    recipe: Recipe,
    shape: ModelShape,
    device: Device,
    mesh: Mapping[str, int],
    dtype: Dtype,
    attention: str,
    quantizers: tuple[str, ...],
    longest_row: int,
) -> tuple[str, ...]:
    """Single changes to the recipe after which it would fit, the cheapest first; the estimate says so of each."""
    possible = rungs(device, recipe.hardware.checkpointing, fused=fused(recipe, shape, device))
    most = rungs(device, "auto", fused=fused(recipe, shape, device))
    devices = 1 if device.simulated else math.prod(mesh.values())  # what is simulated shares one machine
    budget = devices * (device.free_bytes or 0) * HEADROOM
    parts = {**mesh, "fsdp": mesh.get("fsdp", 1) * mesh.get("dp", 1), "dp": 1}

    def fits(
        changed: Recipe, row: int = longest_row, arithmetic: Dtype = dtype, level: Level = possible[-1], spread: Mapping[str, int] = mesh
    ) -> bool:
        least = row * row_shares(mesh)
        levels: Levels = (level,) * shape.layers
        return need(changed, shape, device, spread, arithmetic, attention, row, least, levels).total_bytes <= budget

    found: list[str] = []
    if recipe.batch.micro_tokens != "auto" and fits(recipe):
        found.append("set batch.micro_tokens to auto")
    if possible != most and any(fits(recipe, level=level) for level in most):
        found.append("set hardware.checkpointing to auto")
    if mesh.get("dp", 1) > 1 and fits(recipe, spread=parts):
        found.append("set hardware.dp to 1")
    if dtype == "float32" and "bfloat16" in device.dtypes and fits(recipe, arithmetic="bfloat16"):
        found.append("set model.dtype to bfloat16")
    if not isinstance(recipe.adapter, LoRA) and fits(recipe.model_copy(update={"adapter": LoRA()})):
        found.append("set adapter.kind to lora")
    four_bits = recipe.model_copy(update={"model": recipe.model.model_copy(update={"load_in_4bit": True}), "adapter": LoRA()})
    if asked_quantizer(recipe) is None and "nf4" in quantizers and fits(four_bits):
        found.append("set model.load_in_4bit to true" + ("" if isinstance(recipe.adapter, LoRA) else " and adapter.kind to lora"))
    eight_bits = recipe.model_copy(update={"model": recipe.model.model_copy(update={"load_in_8bit": True})})
    if asked_quantizer(recipe) is None and "int8" in quantizers and isinstance(recipe.adapter, LoRA) and fits(eight_bits):
        found.append("set model.load_in_8bit to true")
    shorter = next((n for n in reversed(round_lengths(longest_row)) if n < longest_row and fits(recipe, row=n)), None)
    if shorter:
        found.append(f"set model.max_tokens to {shorter}")
    return tuple(found)
