"""Everything that is known of a run before a weight is loaded: the machine, the model and the data, and the plan that follows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pantheraml.data.load import BadRows
from pantheraml.data.prepare import Prepared, Records, prepare
from pantheraml.distributed.world import World
from pantheraml.engines.adamw import check_installed
from pantheraml.errors import DeviceError
from pantheraml.hardware.backend import backend_of
from pantheraml.hardware.cpu import usable_cores
from pantheraml.hardware.device import Device, Inventory
from pantheraml.hardware.find import Found, find
from pantheraml.hardware.processes import read_processes
from pantheraml.models.load import load_tokenizer, read_config, read_shape, shape_of, weight_bytes
from pantheraml.models.quantize import available
from pantheraml.planning.plan import Plan, make_plan
from pantheraml.planning.rows import longest_allowed
from pantheraml.planning.shape import ModelShape
from pantheraml.recipe.kinds import in_host_memory, kind_of
from pantheraml.recipe.types import Recipe
from pantheraml.trainer.folder import BAD_ROWS

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """Everything that is known before a weight is loaded."""

    recipe: Recipe
    shape: ModelShape
    tokenizer: PreTrainedTokenizerBase
    data: Prepared
    plan: Plan
    held_bytes: int | None
    """What this process held of the device's memory before the model, so that what was measured is what was planned."""
    stored_dtype: str
    """Of the weights as their authors store them; a fully trained model is saved in it."""


def survey(
    recipe: Recipe,
    *,
    found: Found | DeviceError | None = None,
    folder: Path | None = None,
    console: Console | None = None,
    rows: Records | None = None,
    held_out: Records | None = None,
    model: Any = None,
    tokenizer: Any = None,
    world: World | None = None,
) -> Survey:
    """Look at machine, model and data, and make the plan. Loads no weight.

    Args:
        found: the device, or why there is none; None: look for it.
        folder: gets bad_rows.jsonl.
        rows, held_out: rows from memory. model, tokenizer: those that are here already.
        world: the processes that train together; None: nobody has started any yet.
    """
    check_installed(recipe.optim)
    if isinstance(found, DeviceError):
        raise found
    found = found or find(recipe.hardware)
    recipe = recipe.model_copy(update={"hardware": found.ask})
    backend = backend_of(found.device)
    held = backend.memory(found.device.index).used_bytes
    inventory = found.inventory
    if model is not None and (found.device.simulated or kind_of(model.device.type) == found.device.kind):
        here = weight_bytes(model)  # what it holds is part of the plan, so it counts as free
        inventory = _with_room(inventory, found.device, here, read_processes().local_world_size if world and world.size > 1 else 1)
        held = None if held is None else held - here
    shape = read_shape(recipe.model) if model is None else shape_of(model, recipe.model.name)
    stored = read_config(recipe.model).dtype if model is None else model.config.dtype
    tokenizer = load_tokenizer(recipe.model) if tokenizer is None else tokenizer
    bad = BadRows(recipe.data.on_bad_row, recipe.data.max_bad_rows)
    try:
        data = prepare(
            recipe.data,
            tokenizer,
            bad,
            max_tokens=longest_allowed(recipe, shape)[0],
            loss_on=recipe.method.loss_on,
            seed=recipe.run.seed,
            questions=recipe.eval.generate_rows,
            memory_bytes=found.device.free_bytes,
            train=rows,
            held_out=held_out,
        )
    finally:
        if folder and bad.rows:
            bad.write(folder / BAD_ROWS)
    plan = make_plan(
        recipe,
        inventory,
        shape,
        train_tokens=int(data.train.lengths.sum()) if data.train is not None else None,
        train_rows=len(data.train) if data.train is not None else None,
        longest_example=int(max(data.train.lengths.max(), *data.held_out.lengths, 1)) if data.train is not None else None,
        attention=backend.attention,
        quantizers=available(backend.quantizers),
        available_threads=usable_cores(),
        asked_by=found.asked_by,
        collective=backend.collective,
        **started(world),
    )
    if data.train is not None and len(data.train) < recipe.batch.size and recipe.optim.steps:
        few = f"batch.size={recipe.batch.size} is more than the {len(data.train)} training rows: a step sees rows more than once."
        data = replace(data, notes=(*data.notes, few))
    if console:
        for note in (f"Data: {data.detected.format} ({data.detected.why}).", *data.notes):
            console.print(note, markup=False, highlight=False)
    return Survey(
        recipe=recipe,
        shape=shape,
        tokenizer=tokenizer,
        data=data,
        plan=plan,
        held_bytes=held,
        stored_dtype=str(stored or "float32").removeprefix("torch."),
    )


def started(world: World | None) -> dict[str, int]:
    """What a plan is to know of the processes that somebody has started to train together."""
    said = read_processes()
    if world is None or not said.launched:
        return {}
    return {"processes": world.size, "machines": max(1, world.size // said.local_world_size)}


def _with_room(inventory: Inventory, device: Device, more_bytes: int, processes: int) -> Inventory:
    """The same devices, those of so many processes with so many bytes more free for each of them."""
    shared = in_host_memory(device.kind)

    def roomier(each: Device) -> Device:
        taken = each == device if shared or processes == 1 else each.kind == device.kind
        if not taken or each.free_bytes is None:
            return each
        return replace(each, free_bytes=each.free_bytes + more_bytes * (processes if shared else 1))

    return replace(inventory, devices=tuple(map(roomier, inventory.devices)))
