"""The devices of a TPU slice that is not here, by the catalog."""

from __future__ import annotations

from dataclasses import replace

from pantheraml.errors import DeviceError
from pantheraml.hardware.catalog import lookup
from pantheraml.hardware.device import Device, Inventory
from pantheraml.hardware.tpu import TpuSlice


def inventory_of(tpu: TpuSlice, *, free_bytes: int | None = None) -> Inventory:
    """The devices of a slice by the catalog. free_bytes: of each; None: what programs get. Raises: DeviceError if it does not know the generation."""
    entry, program_bytes = lookup("tpu", tpu.generation), tpu.program_bytes
    if entry is None or program_bytes is None:
        raise DeviceError(
            f"the catalog has no TPU {tpu.generation}",
            why="nothing is known of its memory and speed",
            fix="choose v4, v5e, v5p, v6e or tpu7x",
        )
    parts = tpu.devices_each
    device = Device(
        kind="tpu",
        index=0,
        name=entry.names[0],
        memory_bytes=entry.memory_bytes // parts,
        free_bytes=free_bytes or program_bytes,
        dtypes=("bfloat16", "float32"),
        peak_flops=entry.flops.get("bfloat16", 0.0) / parts or None,
        capability=tpu.generation,
        topology=tpu.topology,
    )
    return Inventory(devices=tuple(replace(device, index=index) for index in range(tpu.chips * parts)))
