"""Which mesh suits a model of some size on the chips that are here, or on a slice by name; and setting it up in one call."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from pantheraml.distributed.multi_tpu import MultiTPUConfig, cleanup_multi_tpu, get_tpu_status, probed, setup_multi_tpu
from pantheraml.distributed.tpu_memory import optimize_tpu_memory
from pantheraml.errors import DeviceError, RecipeError
from pantheraml.hardware.device import Inventory
from pantheraml.hardware.slices import inventory_of
from pantheraml.hardware.tpu import larger_slices, parse_slice
from pantheraml.hardware.xla import XlaBackend
from pantheraml.planning.levels import format_levels
from pantheraml.planning.memory import format_bytes
from pantheraml.planning.plan import Plan, make_plan
from pantheraml.planning.shape import typical_shape
from pantheraml.recipe.types import Recipe

_SIZE = re.compile(r"(\d+(?:\.\d+)?(?:e\d+)?)\s*([mbt])?", re.IGNORECASE)
_UNITS = {"": 1.0, "m": 1e6, "b": 1e9, "t": 1e12}


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimalConfig:
    """How to spread a model of some size, by the planner's arithmetic.

    Attributes:
        tpu: for `setup_multi_tpu` and `PantheraMLTPUTrainer`.
        load_in_8bit: the frozen base must be held in 8 bits.
        micro_tokens: taken at once, over all devices. checkpointing: what layers keep ("32 all").
        memory_bytes, of_bytes: planned and there, on each device.
        why: one sentence.
    """

    tpu: MultiTPUConfig
    load_in_8bit: bool
    micro_tokens: int
    checkpointing: str
    memory_bytes: int
    of_bytes: int | None
    why: str


class TPUConfigManager:
    """Chooses a mesh by the size of a model."""

    @staticmethod
    def get_optimal_config(
        model_size: float | str, *, slice_name: str | None = None, max_tokens: int = 2048, rank: int = 16, simulate: bool | None = None
    ) -> OptimalConfig:
        """For LoRA on a model with so many parameters: copies where each device has room for one, else parts; 8 bits where that must be.

        Args:
            model_size: parameters, as a number or a word (7e9, "8b", "135M"). Its other dimensions are those of published models.
            slice_name: "v5e-8"; None: the chips that are here.
            max_tokens: of a row. rank: of the adapter.
            simulate: see `MultiTPUConfig`.
        Raises: RecipeError for a word that is no size; DeviceError if there is no TPU, or the model does not fit: it names a slice that would do.
        """
        parameters = _parameters(model_size)
        if min(max_tokens, rank) < 1:
            raise RecipeError(
                f"max_tokens={max_tokens}, rank={rank} is not possible", why="both are at least 1", fix="give positive numbers"
            )
        tpu = None if slice_name is None else parse_slice(slice_name)
        slices = 1 if tpu is None else tpu.slices
        start = MultiTPUConfig(simulate=simulate, dcn=slices)
        inventory = Inventory(devices=probed(start)) if tpu is None else inventory_of(tpu)
        devices = len(inventory.devices) * inventory.devices[0].hosts
        start = replace(start, num_cores=devices)
        meshes = [(start, "each device holds its part of every weight" if devices > 1 else "there is one device")]
        if devices > 1:
            copies = "each device has room for a copy and for all that backward needs, so nothing is gathered"
            meshes.insert(0, (replace(start, dp=devices // slices), copies))
        for bits in (False, True):
            for config, why in meshes:
                plan = _planned(parameters, config, inventory, bits=bits, max_tokens=max_tokens, rank=rank)
                if plan is None or (config.dp > 1 and plan.checkpointing):
                    continue
                return OptimalConfig(
                    tpu=config,
                    load_in_8bit=bits,
                    micro_tokens=plan.micro_tokens,
                    checkpointing=format_levels(plan.levels),
                    memory_bytes=-(-plan.memory.total_bytes // plan.world_size),
                    of_bytes=inventory.devices[0].free_bytes,
                    why=why + ("; in 8 bits, since it does not fit in 16" if bits else ""),
                )
        device = inventory.devices[0]
        larger = _smallest(parameters, device.capability, max_tokens, rank)
        raise DeviceError(
            f"a model of {parameters / 1e9:.3g} billion parameters does not fit on {devices} x {device.label}",
            why=f"each has {format_bytes(device.free_bytes)}, and a row of {max_tokens} tokens needs more, even with the base in 8 bits",
            fix=f"take {larger}, or shorter rows" if larger else "take a larger slice, or shorter rows",
        )


def _parameters(size: float | str) -> float:
    found = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    number: object = float(found[1]) * _UNITS[(found[2] or "").lower()] if found else size
    if isinstance(number, bool) or not isinstance(number, int | float) or not 1e6 <= number < 1e14:
        why = "it is a number of parameters, a million or more"
        raise RecipeError(f"{size!r} is no size of a model", why=why, fix='write it like 7e9, "8b" or "135M"')
    return float(number)


def _planned(parameters: float, config: MultiTPUConfig, inventory: Inventory, *, bits: bool, max_tokens: int, rank: int) -> Plan | None:
    recipe = Recipe.model_validate(
        {
            "model": {"name": "a model of this size", "max_tokens": max_tokens, "load_in_8bit": bits},
            "data": "rows",
            "adapter": {"kind": "lora", "rank": rank},
            "hardware": config.hardware(),
        }
    )
    try:
        return make_plan(
            recipe,
            inventory,
            typical_shape(parameters),
            longest_example=max_tokens,
            attention=XlaBackend.attention,
            quantizers=XlaBackend.quantizers,
        )
    except DeviceError:
        return None


def _smallest(parameters: float, generation: str | None, max_tokens: int, rank: int) -> str | None:
    """The smallest slice of a generation on which it fits."""
    for tpu in larger_slices(generation) if generation else ():
        inventory = inventory_of(tpu)
        config = MultiTPUConfig(num_cores=len(inventory.devices), simulate=False)
        for bits in (False, True):
            if _planned(parameters, config, inventory, bits=bits, max_tokens=max_tokens, rank=rank):
                return f"{tpu}{', with load_in_8bit' if bits else ''}"
    return None


def setup_tpu_training(model_size: float | str | None = None, config: MultiTPUConfig | None = None) -> MultiTPUConfig:
    """Take the chips, with a mesh for a model of this size; what comes back is for `PantheraMLTPUTrainer`.

    Args:
        model_size: see `TPUConfigManager.get_optimal_config`; None: the weights lie in parts on all chips.
        config: the mesh, instead.
    Raises: as `setup_multi_tpu` and `get_optimal_config`.
    """
    if config is None:
        config = MultiTPUConfig() if model_size is None else TPUConfigManager.get_optimal_config(model_size).tpu
    setup_multi_tpu(config)
    return config


def cleanup_tpu_training() -> None:
    """Let go of programs and arrays that nothing refers to any more, and forget the set-up."""
    if get_tpu_status()["ready"]:
        optimize_tpu_memory()
    cleanup_multi_tpu()
