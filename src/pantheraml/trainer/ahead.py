"""A run on a TPU slice that is not here: the plan, and what the TPU's own compiler makes of a step for it. No weights, no data, no TPU."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from pantheraml.errors import DeviceError, RecipeError
from pantheraml.hardware.catalog import lookup
from pantheraml.hardware.device import Device, Inventory
from pantheraml.hardware.failures import classify
from pantheraml.hardware.price import price_of
from pantheraml.hardware.tpu import TpuSlice, larger_slices, parse_slice
from pantheraml.hardware.xla import XlaBackend
from pantheraml.hardware.xla_mesh import mesh_of_slice
from pantheraml.models.adapters import attach
from pantheraml.models.load import empty_model, read_config, shape_of
from pantheraml.planning.cost import format_dollars
from pantheraml.planning.levels import format_levels
from pantheraml.planning.memory import format_bytes
from pantheraml.planning.plan import Plan, make_plan
from pantheraml.planning.shape import ModelShape
from pantheraml.recipe.types import LoRA, Recipe
from pantheraml.trainer.sft import sft_loss

if TYPE_CHECKING:
    from pantheraml.engines.xla_ahead import Compiled

USABLE = 15.75 / 16
"""Of a chip's memory, what programs get: v5e reports 15.75 of 16 GiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ahead:
    """What a step would take on a slice.

    Attributes:
        compiled: what the compiler said of the two parts of a step; empty if it refused. refused: its words, then.
        cheapest: the cheapest slice on which one row a chip fits by arithmetic, and its price an hour.
    """

    tpu: TpuSlice
    plan: Plan
    memory_bytes: int
    compiled: tuple[Compiled, ...]
    refused: str | None
    cheapest: str

    @property
    def fits(self) -> bool:
        """Whether the compiler found room."""
        return self.refused is None

    @property
    def peak_bytes(self) -> int | None:
        """At the busiest moment of a step, on each device."""
        return max((each.peak_bytes for each in self.compiled), default=None)

    def lines(self) -> list[tuple[str, str, str]]:
        """(choice, value, reason) for a person."""
        plan, cost = self.plan, self.plan.cost
        rows = plan.micro_tokens // plan.row_tokens[-1]
        lines = [line for line in plan.lines() if line[0] in ("dtype", "base_dtype", "devices")]
        lines = [
            ("slice", str(self.tpu), f"{self.tpu.chips} chips of {plan.device.name}, {format_bytes(self.memory_bytes)} each; none is here"),
            *lines,
        ]
        lines += [
            ("micro-batch", f"{rows} rows of {plan.row_tokens[-1]}", "over all devices"),
            ("checkpointing", format_levels(plan.levels), ""),
            (
                "fits",
                "yes" if self.fits else "no",
                self.refused or f"the compiler of TPUs says {format_bytes(self.peak_bytes)} of {format_bytes(self.memory_bytes)} a device",
            ),
        ]
        for each in self.compiled:
            parts = {
                "arguments": each.arguments_bytes,
                "results": each.results_bytes,
                "temporary": each.temporary_bytes,
                "waiting": each.waiting_bytes,
            }
            said = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
            exchanged = ", ".join(f"{count} {kind}" for kind, count in sorted(each.collectives.items())) or "none"
            lines.append(
                (
                    each.phase,
                    format_bytes(each.peak_bytes),
                    f"{said}; exchanges in its text: {exchanged}; compiled in {each.compile_s:.0f} s",
                )
            )
        step_s = None if cost.tokens_per_s is None else plan.micro_tokens / cost.tokens_per_s
        lines += [
            (
                "arithmetic",
                f"{cost.flops_per_token * plan.micro_tokens / self.plan.world_size / 1e12:.1f} TFLOP",
                "a micro-batch, on each device",
            ),
            (
                "time",
                "unknown" if step_s is None else f"about {step_s:.2f} s",
                "a micro-batch; a first guess from the catalog's peak, not measured",
            ),
            ("price", f"{format_dollars(cost.usd_per_hour)} an hour", plan.reasons["price"]),
            ("cheapest that fits", self.cheapest, "by arithmetic, one row on each device; the compiler was not asked"),
        ]
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        compiled = [{**asdict(each), "peak_bytes": each.peak_bytes} for each in self.compiled]
        return {
            "slice": str(self.tpu),
            "fits": self.fits,
            "refused": self.refused,
            "memory_bytes": self.memory_bytes,
            "peak_bytes": self.peak_bytes,
            "compiled": compiled,
            "cheapest": self.cheapest,
            "plan": self.plan.to_dict(),
        }


def plan_ahead(recipe: Recipe, word: str) -> Ahead:
    """Plan for a slice ("v5e-8"), and compile a step for it with libtpu. Takes a minute or two for a large model.

    Raises: DeviceError if there is no such slice, libtpu is not installed, or a row does not fit by arithmetic; RecipeError.
    """
    from pantheraml.engines.xla_engine import XlaEngine

    tpu = parse_slice(word)
    recipe = recipe.model_copy(update={"hardware": recipe.hardware.model_copy(update={"kind": "tpu"})})
    if tpu.slices > 1 and recipe.hardware.dcn == 1:
        recipe = recipe.model_copy(update={"hardware": recipe.hardware.model_copy(update={"dcn": tpu.slices})})
    model: Any = empty_model(recipe.model, read_config(recipe.model))
    shape = shape_of(model, recipe.model.name)
    inventory = _inventory(tpu)
    plan = _planned(recipe, inventory, shape)

    import torch

    model = model.to(getattr(torch, plan.base_dtype))
    if isinstance(recipe.adapter, LoRA):
        model = attach(model, recipe.adapter, seed=recipe.run.seed)
    engine = XlaEngine(mesh_of_slice(tpu, plan.mesh))
    rows = plan.micro_tokens // plan.row_tokens[-1]
    compiled: tuple[Compiled, ...] = ()
    refused = None
    engine.prepare(model, sft_loss(model), recipe.optim, plan, seed=recipe.run.seed)
    try:
        compiled = engine.compile_ahead(rows, plan.row_tokens[-1])
    except RuntimeError as error:
        if classify(error) != "out of memory":
            raise
        refused = str(error).strip().splitlines()[0]
    return Ahead(
        tpu=tpu,
        plan=plan,
        memory_bytes=inventory.devices[0].free_bytes or 0,
        compiled=compiled,
        refused=refused,
        cheapest=_cheapest(recipe, shape),
    )


def _planned(recipe: Recipe, inventory: Inventory, shape: ModelShape) -> Plan:
    return make_plan(
        recipe,
        inventory,
        shape,
        longest_example=recipe.model.max_tokens if isinstance(recipe.model.max_tokens, int) else None,
        attention=XlaBackend.attention,
        quantizers=XlaBackend.quantizers,
    )


def _inventory(tpu: TpuSlice) -> Inventory:
    """The devices of a slice by the catalog. Raises: DeviceError if it does not know the generation."""
    entry = lookup("tpu", tpu.generation)
    if entry is None:
        raise DeviceError(
            f"the catalog has no TPU {tpu.generation}",
            why="nothing is known of its memory and speed",
            fix="choose v4, v5e, v5p, v6e or tpu7x",
        )
    cores = entry.cores if entry.cores and tpu.generation in ("v2", "v3", "tpu7x") else 1
    device = Device(
        kind="tpu",
        index=0,
        name=entry.names[0],
        memory_bytes=entry.memory_bytes // cores,
        free_bytes=int(entry.memory_bytes * USABLE) // cores,
        dtypes=("bfloat16", "float32"),
        peak_flops=entry.flops.get("bfloat16", 0.0) / cores or None,
        capability=tpu.generation,
        topology=tpu.topology,
    )
    return Inventory(devices=tuple(replace(device, index=index) for index in range(tpu.chips * cores)))


def _cheapest(recipe: Recipe, shape: ModelShape) -> str:
    """The slice with the lowest price an hour for which a plan can be made, by arithmetic."""
    found: list[tuple[float, str]] = []
    plain = recipe.hardware.model_copy(update={"devices": "auto", "dcn": 1, "dp": 1, "fsdp": "auto", "tp": 1})
    recipe = recipe.model_copy(update={"hardware": plain})
    for generation in ("v5e", "v6e", "v4", "v5p"):
        for tpu in larger_slices(generation):
            inventory = _inventory(tpu)
            price = price_of(inventory.devices[0]).usd_per_hour
            try:
                plan = _planned(recipe, inventory, shape)
            except (DeviceError, RecipeError):
                continue
            if price is not None:
                found.append((price * tpu.chips, f"{tpu} ({plan.world_size} devices), {format_dollars(price * tpu.chips)} an hour"))
            break
    return min(found)[1] if found else "none is known"
