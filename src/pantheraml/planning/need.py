"""What training needs of the memory of its devices, and what would make it fit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from pantheraml.hardware.device import Device
from pantheraml.planning.base import BYTES_EACH, Dtype, asked_quantizer, base_bytes_each
from pantheraml.planning.batch import HEADROOM, round_lengths
from pantheraml.planning.levels import Levels, rungs
from pantheraml.planning.memory import OPTIMIZER_BYTES, Level, MemoryEstimate, estimate_memory, format_bytes
from pantheraml.planning.parameters import divided, layer_parameters, outer_parameters, part_bytes, stored
from pantheraml.planning.shape import ModelShape
from pantheraml.planning.sharding import row_shares, weight_parts
from pantheraml.recipe.kinds import KINDS
from pantheraml.recipe.types import LoRA, Recipe

GATHERED_LAYERS = 3
"""Layers that FSDP2 holds whole at the busiest moment: one computes, from the buffer in which it came, which is still there, and the
next one comes (torch 2.13; counted in tests/planning/test_traffic.py)."""


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
    """On all chips of a TPU together; of processes with one device each, on one of them.

    Args:
        row_tokens, micro_tokens: of the whole, also where processes share the tokens.
    """
    rank = recipe.adapter.rank if isinstance(recipe.adapter, LoRA) else None
    xla = KINDS[device.kind].engine == "xla"
    one, cp = shape if xla else divided(shape, mesh.get("tp", 1)), mesh.get("cp", 1)
    alone = estimate_memory(
        one,
        trainable_parameters=shape.lora_parameters(rank) if rank else one.parameters,  # adapters are whole on each process
        base_bytes_each=base_bytes_each(one, dtype, asked_quantizer(recipe), both_ways=not xla) if rank else 4,
        micro_tokens=-(-micro_tokens // cp),
        row_tokens=row_tokens,
        levels=levels,
        exchanged=cp > 1,
        fused=fused(recipe, shape, device),
        xla=xla,
        attention=attention,
        compute_bytes_each=BYTES_EACH[dtype],
        lora_rank=rank,
        optimizer_bytes_each=OPTIMIZER_BYTES[recipe.optim.states],
    )
    if not xla:
        parts = weight_parts(mesh)
        return alone if parts == 1 else _in_parts(alone, one, parts, BYTES_EACH[dtype] if rank else None, asked_quantizer(recipe))
    copies = mesh.get("dp", 1) * mesh.get("dcn", 1)
    return replace(
        alone,
        weights_bytes=copies * alone.weights_bytes,
        gradients_bytes=copies * alone.gradients_bytes,
        optimizer_bytes=copies * alone.optimizer_bytes,
    )


def counted(device: Device, devices: int) -> int:
    """On how many of the devices of a run `need` is: all chips of a TPU, but one machine where they are simulated, and one of any other kind."""
    return devices if KINDS[device.kind].engine == "xla" and not device.simulated else 1


def _in_parts(alone: MemoryEstimate, shape: ModelShape, fsdp: int, base_bytes: int | None, quantizer: str | None) -> MemoryEstimate:
    """With FSDP2: parts of the weights, and whole what it gathers (GATHERED_LAYERS, and what is outside of the layers).

    Args:
        alone: without it. base_bytes: of a frozen weight; None: every weight trains, and its gradient and moments are in parts, too.
    """
    layer = stored(layer_parameters(shape), base_bytes or 4, quantizer)
    outer = stored(outer_parameters(shape), base_bytes or 4)
    parts = shape.layers * part_bytes(layer, fsdp) + part_bytes(outer, fsdp)
    one_layer, outside = fsdp * part_bytes(layer, fsdp), fsdp * part_bytes(outer, fsdp)
    gathered = min(GATHERED_LAYERS, shape.layers) * one_layer + outside
    if base_bytes is not None:
        whole = shape.layers * part_bytes(layer, 1) + part_bytes(outer, 1)
        # What is no part of them: adapters, and of four bits the scales.
        return replace(alone, weights_bytes=max(0, alone.weights_bytes - whole) + parts + gathered)
    return replace(
        alone,
        weights_bytes=parts + gathered,
        gradients_bytes=parts + one_layer + outside - shape.vocab * shape.hidden * 4,  # the head's is counted with the logits
        optimizer_bytes=alone.optimizer_bytes * parts // alone.weights_bytes,
    )


def memory_said(memory: MemoryEstimate, shape: ModelShape) -> str:
    """What the memory is for, in one sentence."""
    return (
        f"weights {format_bytes(memory.weights_bytes)}, gradients {format_bytes(memory.gradients_bytes)}, "
        f"optimizer {format_bytes(memory.optimizer_bytes)}, activations {format_bytes(memory.activations_bytes)}, "
        f"logits {format_bytes(memory.logits_bytes)}, libraries {format_bytes(memory.runtime_bytes)} (an allowance)"
        + ("" if shape.packs else "; the states of state-space layers are not counted, so expect more")
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
    others: Sequence[tuple[str, Mapping[str, int]]] = (),
) -> tuple[str, ...]:
    """Single changes to the recipe after which it would fit, the cheapest first; the estimate says so of each.

    A number of tokens that the recipe asks for stays, whatever else is changed.

    Args:
        others: changes that lead to another mesh, and that mesh.
    """
    possible = rungs(device, recipe.hardware.checkpointing, fused=fused(recipe, shape, device))
    most = rungs(device, "auto", fused=fused(recipe, shape, device))
    budget = counted(device, math.prod(mesh.values())) * (device.free_bytes or 0) * HEADROOM
    xla = KINDS[device.kind].engine == "xla"
    parts = {**mesh, "fsdp": mesh.get("fsdp", 1) * mesh.get("dp", 1), "dp": 1}

    def fits(
        changed: Recipe, row: int = longest_row, arithmetic: Dtype = dtype, level: Level = possible[-1], spread: Mapping[str, int] = mesh
    ) -> bool:
        least, asked = row * (row_shares(mesh) if xla else 1), changed.batch.micro_tokens
        micro_tokens = least if asked == "auto" else max(least, asked)
        levels: Levels = (level,) * shape.layers
        return need(changed, shape, device, spread, arithmetic, attention, row, micro_tokens, levels).total_bytes <= budget

    found: list[str] = []
    automatic = recipe.model_copy(update={"batch": recipe.batch.model_copy(update={"micro_tokens": "auto"})})
    if recipe.batch.micro_tokens != "auto" and fits(automatic):
        found.append("set batch.micro_tokens to auto")
    if possible != most and any(fits(recipe, level=level) for level in most):
        found.append("set hardware.checkpointing to auto")
    if xla and mesh.get("dp", 1) > 1 and fits(recipe, spread=parts):
        found.append("set hardware.dp to 1")
    found += [change for change, other in others if fits(recipe, spread=other)][:1]
    if dtype == "float32" and "bfloat16" in device.dtypes and fits(recipe, arithmetic="bfloat16"):
        found.append("set model.dtype to bfloat16")
    if not isinstance(recipe.adapter, LoRA) and fits(recipe.model_copy(update={"adapter": LoRA()})):
        found.append("set adapter.kind to lora")
    four_bits = recipe.model_copy(update={"model": recipe.model.model_copy(update={"load_in_4bit": True}), "adapter": LoRA()})
    if asked_quantizer(recipe) is None and "nf4" in quantizers and (xla or mesh.get("tp", 1) == 1) and fits(four_bits):
        found.append("set model.load_in_4bit to true" + ("" if isinstance(recipe.adapter, LoRA) else " and adapter.kind to lora"))
    eight_bits = recipe.model_copy(update={"model": recipe.model.model_copy(update={"load_in_8bit": True})})
    whole = xla or mesh.get("fsdp", 1) * mesh.get("tp", 1) == 1
    if asked_quantizer(recipe) is None and "int8" in quantizers and isinstance(recipe.adapter, LoRA) and whole and fits(eight_bits):
        found.append("set model.load_in_8bit to true")
    shorter = next((n for n in reversed(round_lengths(longest_row)) if n < longest_row and fits(recipe, row=n)), None)
    if shorter:
        found.append(f"set model.max_tokens to {shorter}")
    return tuple(found)
