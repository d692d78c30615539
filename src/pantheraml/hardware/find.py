"""The one way to a device: what was asked, what the environment says, and what answers here, brought together."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pantheraml.errors import DeviceError
from pantheraml.hardware.detect import detect
from pantheraml.hardware.device import Device, Inventory
from pantheraml.hardware.processes import read_processes
from pantheraml.hardware.select import select
from pantheraml.hardware.settings import read_settings
from pantheraml.recipe.kinds import KINDS, kinds_meant
from pantheraml.recipe.types import HardwareAsk


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A device, and how it was come by.

    Attributes:
        ask: what was asked, with the environment where that left something open; asked_by: who named the device.
        inventory: everything that was looked for. why: one sentence.
    """

    device: Device
    why: str
    ask: HardwareAsk
    asked_by: str
    inventory: Inventory


def find(
    ask: HardwareAsk | None = None, *, inventory: Inventory | None = None, training: bool = True, asked_by: str | None = None
) -> Found:
    """Look for what is asked (None: whatever the environment or `auto` gives), and choose.

    Args:
        asked_by: who asks, for the reason and for errors, where it is not the recipe or the environment.
        inventory: what was found before; None: look now.
        training: the device must be one that an engine trains on.
    Raises: DeviceError if it is not here; RecipeError if a variable of the environment cannot be used.
    """
    complete, environment = read_settings().over(ask or HardwareAsk())
    by = asked_by or environment
    here = inventory or detect(kinds_meant(complete.kind), simulate_tpu=complete.simulate_tpu, named=complete.kind)
    try:
        device, why = select(here, complete, by, training=training)
    except DeviceError:
        if inventory is not None or complete.kind == "auto":
            raise
        # Only what was asked for was looked for, and the error is to list everything that is here.
        here = detect(simulate_tpu=complete.simulate_tpu, named=complete.kind)
        device, why = select(here, complete, by, training=training)
    return Found(device=device, why=why, ask=complete, asked_by=by, inventory=here)


def find_own(ask: HardwareAsk | None = None, *, asked_by: str | None = None) -> Found:
    """`find`, for one of the processes that were started on this machine: each has a GPU of its own, and all share a CPU.

    Args:
        ask: what the first of them takes; the others take those behind it, or what our launcher has counted.
    Raises: as `find`; DeviceError if there are fewer GPUs than processes.
    """
    said = read_processes()
    if said.devices:
        ask = (ask or HardwareAsk()).model_copy(update={"index": said.devices[said.local_rank]})
    found = find(ask, asked_by=asked_by)
    kind, here = found.device.kind, found.inventory
    if KINDS[kind].family != "gpu":
        return found
    if said.devices:  # others may be there which are to be left out
        mine = tuple(each for each in here.devices if each.kind != kind or each.index in said.devices)
        return replace(found, inventory=replace(here, devices=mine))
    if said.local_world_size == 1:
        return found
    first = found.ask.index
    there = sum(each.kind == kind for each in here.devices) - first
    if there < said.local_world_size:
        behind = f" from {found.device} on" if first else ""
        raise DeviceError(
            f"{said.local_world_size} processes were started on this machine, and {there} of kind {kind} answered{behind}",
            why="each process computes on a device of its own",
            fix=f"start {there} (torchrun --nproc-per-node {there}); or set hardware.kind to cpu, which they share",
        )
    own = found.ask.model_copy(update={"kind": kind, "index": first + said.local_rank})
    return find(own, inventory=here, asked_by=found.asked_by)
