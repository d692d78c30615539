"""How each tensor of a model is spread over a mesh of devices: rules by name and shape. Needs no torch.

Axes of a mesh: dp holds copies, fsdp parts of every weight that are gathered where they are used, tp parts of a product
(Megatron-LM, arXiv 1909.08053); dcn copies on other slices, over a slower network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from pantheraml.errors import DeviceError, RecipeError
from pantheraml.hardware.device import Device, Inventory
from pantheraml.planning.shape import ModelShape
from pantheraml.recipe.kinds import KINDS
from pantheraml.recipe.types import HardwareAsk

AXES = ("dcn", "dp", "fsdp", "tp")
_BY_OUTPUT = frozenset({"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head", "embed_tokens"})
_BY_INPUT = frozenset({"o_proj", "down_proj"})

Spec = tuple[str | None, ...]
"""For each dimension the axis over which it is spread; None: it is whole on each device."""


def spec_of(name: str, shape: tuple[int, ...], mesh: Mapping[str, int]) -> Spec:
    """How a tensor of the model is spread.

    Args:
        name: its name in the model. shape: [outputs, inputs] for the weight of a linear layer.
        mesh: axis -> devices along it.
    Returns: one entry for each dimension; a dimension that an axis does not divide is not spread over it.
    """
    tp, fsdp = mesh.get("tp", 1), mesh.get("fsdp", 1)
    spec: list[str | None] = [None] * len(shape)
    parts = name.split(".")
    if tp > 1 and len(shape) == 2 and (along := _tp_dimension(parts)) is not None and shape[along] % tp == 0:
        spec[along] = "tp"
    if fsdp > 1:
        free = [i for i, size in enumerate(shape) if spec[i] is None and size % fsdp == 0 and size >= fsdp]
        if free:
            spec[max(free, key=lambda i: shape[i])] = "fsdp"
    return tuple(spec)


def _tp_dimension(parts: list[str]) -> int | None:
    """Over which dimension of a weight tensor parallelism divides it; None: over neither."""
    by_output, by_input = (any(part in kinds for part in parts) for kinds in (_BY_OUTPUT, _BY_INPUT))
    if not (by_output or by_input):
        return None
    if "lora_A" in parts:  # [rank, inputs]
        return 1 if by_input else None
    if "lora_B" in parts:  # [outputs, rank]
        return 0 if by_output else None
    return 0 if by_output else 1


def choose_mesh(ask: HardwareAsk, device: Device, inventory: Inventory, shape: ModelShape) -> tuple[dict[str, int], str]:
    """`mesh_axes`, for this model. Raises: also RecipeError if tensor parallel does not divide its heads."""
    axes, why = mesh_axes(ask, device, inventory)
    tp = axes.get("tp", 1)
    if shape.kv_heads % tp:
        raise RecipeError(
            f"hardware.tp={tp} does not divide the {shape.kv_heads} heads of keys of {shape.name}",
            why="each device would need a part of a head, and fetch the rest in every layer",
            fix=f"set it to a divisor of {shape.kv_heads}",
        )
    return axes, why


def mesh_axes(ask: HardwareAsk, device: Device, inventory: Inventory) -> tuple[dict[str, int], str]:
    """The axes of the mesh, the outermost first, and why; empty for a single device of any kind but a TPU.

    Raises: DeviceError for more devices than there are, or more than one of another kind; RecipeError for axes that do not fit.
    """
    there = device.hosts * sum(each.kind == device.kind for each in inventory.devices)
    fixed = {"dcn": ask.dcn, "dp": ask.dp, "tp": ask.tp}
    others = math.prod(fixed.values())
    if KINDS[device.kind].engine != "xla":
        wanted = there if ask.devices == "all" else 1 if ask.devices == "auto" else ask.devices
        if max(wanted, others * (1 if ask.fsdp == "auto" else ask.fsdp)) > 1:
            raise DeviceError(
                f"several devices of kind {device.kind} cannot train together",
                why="this version does so on a TPU alone, and there through JAX",
                fix="set hardware.devices to 1, and leave hardware.dcn, dp, fsdp and tp out",
            )
        return {}, "several train together on a TPU alone, through JAX" if there > 1 else f"there is one of kind {device.kind}"
    if ask.index:
        raise RecipeError(
            f"hardware.index={ask.index} names one chip of a TPU",
            why="a process takes the first ones, and they work together",
            fix="leave it out; hardware.devices says how many",
        )
    said = isinstance(ask.devices, int)
    wanted = (
        ask.devices
        if isinstance(ask.devices, int)
        else there
        if ask.devices == "all" or (ask.fsdp == "auto" and others <= there)
        else others * _number(ask.fsdp)
    )
    if wanted > there and not device.simulated:
        raise DeviceError(
            f"{wanted} devices were asked for, and {there} of kind {device.kind} answered",
            why="the others are not there" if device.hosts == 1 else f"so many are there on {device.hosts} hosts",
            fix=f"set hardware.devices to {there}, or all",
        )
    if wanted % device.hosts:
        raise DeviceError(
            f"{wanted} devices were asked for, on {device.hosts} hosts",
            why="each host takes part with as many",
            fix=f"set hardware.devices to a multiple of {device.hosts}, or all",
        )
    if wanted % others or (ask.fsdp != "auto" and others * ask.fsdp != wanted):
        axes = {**fixed, **({} if ask.fsdp == "auto" else {"fsdp": ask.fsdp})}
        raise RecipeError(
            f"{format_mesh({axis: size for axis, size in axes.items() if size > 1})} does not come to {wanted} devices",
            why="hardware.devices asks for so many" if said else "so many are here",
            fix="leave hardware.fsdp out, and let the product of dcn, dp and tp divide the number of devices",
        )
    axes = {axis: size for axis in AXES if (size := {**fixed, "fsdp": wanted // others}[axis]) > 1}
    return axes or {"fsdp": 1}, "the recipe asks for it" if said or others > 1 or ask.fsdp != "auto" else "all that are here"


def _number(asked: int | str) -> int:
    return asked if isinstance(asked, int) else 1


def format_mesh(mesh: Mapping[str, int]) -> str:
    """`fsdp 4 x tp 2`."""
    return " x ".join(f"{axis} {size}" for axis, size in mesh.items())


def row_shares(mesh: Mapping[str, int]) -> int:
    """Into how many parts the rows of a micro-batch are divided."""
    return math.prod(size for axis, size in mesh.items() if axis != "tp")
