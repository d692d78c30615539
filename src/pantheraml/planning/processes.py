"""Which of the meshes that processes may form is taken, and what a plan says of it. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from pantheraml.errors import DeviceError, PantheraError, RecipeError
from pantheraml.hardware.catalog import lookup
from pantheraml.hardware.device import Device
from pantheraml.planning.base import BYTES_EACH, Dtype
from pantheraml.planning.batch import MicroBatch
from pantheraml.planning.cost import FUSED_UTILISATION, UTILISATION
from pantheraml.planning.memory import format_bytes
from pantheraml.planning.shape import ModelShape
from pantheraml.planning.sharding import format_mesh
from pantheraml.planning.traffic import Links, step_time, step_traffic
from pantheraml.recipe.kinds import in_host_memory
from pantheraml.recipe.types import HardwareAsk, Recipe

Mesh = dict[str, int]
_SHARED = {"dp": "copies of the model", "fsdp": "parts of every weight", "cp": "parts of every long row", "tp": "parts of the products"}


def other_meshes(ask: HardwareAsk, devices: int, meshes_for: Callable[[HardwareAsk], tuple[list[Mesh], str]]) -> list[tuple[str, Mesh]]:
    """What the recipe could say for another mesh, and the mesh; nothing where it leaves the choice open already."""
    change = "devices to all" if devices == 1 and ask.devices == "auto" else "parallel to auto" if ask.parallel != "auto" else None
    if change is None:
        return []
    key, _, value = change.split()
    try:
        meshes, _ = meshes_for(ask.model_copy(update={key: value}))
    except PantheraError:  # it could not
        return []
    return [(f"set hardware.{change}", mesh) for mesh in meshes if mesh]


def first_that_fits(meshes: list[Mesh], fit: Callable[[Mesh], MicroBatch], why: str) -> tuple[Mesh, MicroBatch, str]:
    """The first mesh on which something fits, what, and why. Raises: DeviceError, for the last of them, if nothing does."""
    since = ""
    for mesh in meshes:
        try:
            micro = fit(mesh)
        except DeviceError as error:
            if mesh is meshes[-1]:
                named = f"with {format_mesh(mesh)}, " if len(meshes) > 1 else ""
                raise DeviceError(f"{named}{error.what}", why=error.why, fix=error.fix) from error
            since = f", since with {format_mesh(mesh)} {error.what}"
        else:
            kinds = [said for axis, said in _SHARED.items() if mesh.get(axis, 1) > 1]
            return mesh, micro, why if len(meshes) == 1 else f"{why}: {', and '.join(kinds)}{since or ', since it fits on each'}"
    raise AssertionError("there is always a mesh")


def shares_said(recipe: Recipe, device: Device, shares: int, machines: int) -> str:
    """Of a step's examples, where there are fewer than processes that want some; and of a machine, where they share one."""
    size = recipe.batch.size
    empty = f"; a step has {size} examples, so {shares - size} of {shares} shares of it are empty (see batch.size)" if size < shares else ""
    return empty + ("; they share the cores and the memory of one machine" if in_host_memory(device.kind) and machines == 1 else "")


def threads_of(recipe: Recipe, available: int | None, here: int) -> tuple[int | None, str]:
    """Threads of one of so many processes on a machine, and why. available: cores; None: nobody has asked."""
    if recipe.hardware.threads is not None:
        return recipe.hardware.threads, "the recipe asks for it, or OMP_NUM_THREADS"
    if available is not None and here > 1:
        return max(1, available // here), f"{here} processes share the {available} cores of this machine"
    return available, "all cores that this process may use" if available is not None else "decided when the backend opens"


def exchanged_in_layers(ask: HardwareAsk, mesh: Mesh) -> str | None:
    """Why layers are neither compiled nor recorded on a mesh; None: they may be. Raises: RecipeError if that is asked for."""
    if mesh.get("fsdp", 1) * mesh.get("cp", 1) * mesh.get("tp", 1) == 1:
        return None
    for name in ("compile", "graphs"):
        if getattr(ask, name) == "on":
            raise RecipeError(
                f"hardware.{name}=on does not go with {format_mesh(mesh)}",
                why="devices exchange weights or activations in the middle of each layer, which was never compiled or recorded",
                fix=f"set hardware.{name} to auto, or hardware.parallel to ddp",
            )
    return "devices exchange weights or activations in the middle of each layer"


def sending(
    shape: ModelShape,
    mesh: Mapping[str, int],
    device: Device,
    machines: int,
    micro: MicroBatch,
    *,
    dtype: Dtype,
    quantizer: str | None,
    tokens: int,
    row_tokens: int,
    lora_rank: int | None,
    kernels: bool,
    peak_flops: float | None,
) -> tuple[str, float]:
    """What is said of what the devices send, and the share of their speed that is left: 1 where nobody knows how fast they send.

    Args:
        tokens: of a step, for each process, or for those that share them. row_tokens: length of the rows that attention runs over.
        kernels: they compute the layers. peak_flops: of a matrix product on the device; None: not measured.
    """
    traffic = step_traffic(
        shape,
        mesh,
        lora_rank=lora_rank,
        compute_bytes_each=BYTES_EACH[dtype],
        levels=micro.levels,
        tokens=tokens,
        micro_batches=math.ceil(tokens / micro.micro_tokens),
        quantizer=quantizer,
    )
    said = f"; each device sends about {format_bytes(round(traffic.wire_bytes))} a step"
    entry = lookup(device.kind, device.name, device.memory_bytes)
    if entry is None or entry.link_bytes_per_s is None or machines > 1 or peak_flops is None:
        return f"{said}, which is not counted, since how fast it does is not known", 1.0
    time = step_time(
        shape,
        traffic,
        Links(devices_each=math.prod(mesh.values()), inside_bytes_per_s=entry.link_bytes_per_s),
        tokens=tokens,
        row_tokens=row_tokens,
        levels=micro.levels,
        lora_rank=lora_rank,
        flops_per_s=peak_flops * (FUSED_UTILISATION if kernels else UTILISATION),
    )
    return f"{said}, after which {time.efficiency:.0%} of the speed is left", time.efficiency
