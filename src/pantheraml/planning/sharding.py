"""How each tensor of a model is spread over a mesh of devices, by name and shape; and which meshes there are. Needs no torch.

Axes of a mesh: dp holds copies, fsdp parts of every weight that are gathered where they are used, cp parts of the tokens of each
row (DeepSpeed-Ulysses, arXiv 2309.14509), tp parts of a product (Megatron-LM, arXiv 1909.08053); dcn copies on other slices, over a
slower network. One process drives all chips of a TPU, and one each of several GPUs, or a part of a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from pantheraml.errors import DeviceError, RecipeError
from pantheraml.hardware.device import Device, Inventory
from pantheraml.planning.parameters import AS_ONE, KNOWN
from pantheraml.planning.shape import ModelShape
from pantheraml.recipe.kinds import KINDS, in_host_memory
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
    if KINDS[device.kind].engine != "xla":
        meshes, why = process_meshes(ask, device, inventory)
        return meshes[0], why
    if ask.parallel != "auto" or ask.cp > 1:
        said = f"cp={ask.cp}" if ask.parallel == "auto" else f"parallel={ask.parallel}"
        raise RecipeError(
            f"hardware.{said}, but {device} is a TPU",
            why="there dcn, dp, fsdp and tp say how the chips share the work",
            fix=f"leave hardware.{said.partition('=')[0]} out",
        )
    there = device.hosts * sum(each.kind == device.kind for each in inventory.devices)
    fixed = {"dcn": ask.dcn, "dp": ask.dp, "tp": ask.tp}
    others = math.prod(fixed.values())
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


TRIED = (2, 4, 8)
"""Parts of a row, or of a product, that are tried where nobody says how many: more than a machine has devices would wait for the network."""


def process_meshes(
    ask: HardwareAsk,
    device: Device,
    inventory: Inventory,
    shape: ModelShape | None = None,
    *,
    quantizer: str | None = None,
    kernels: bool = True,
    states: str = "float32",
    collective: str | None = None,
    processes: int | None = None,
    machines: int = 1,
) -> tuple[list[dict[str, int]], str]:
    """The meshes that processes of one device each may form, the simplest first, and why so many devices; empty: a single one.

    There is one mesh where the recipe says which. Else copies; parts of the weights, in each machine and then over all of them; parts
    of the rows as well; and parts of the products as well, which send several times as much as parts of the rows.

    Args:
        shape: of the model; None: whether it can be divided is not looked at.
        quantizer: how its base is held. kernels: they compute its layers. states: how the moments of its own weights are held, if they train.
        collective: through what the processes talk; None: they cannot.
        processes: how many were started; None: nobody has, and hardware.devices says how many there shall be.
        machines: over how many of them they are spread evenly, if it pays that each has a copy in parts: where a base is frozen, only
            adapters go from one to the other then. Where every weight trains, sums of all gradients would, for which layers do not
            go on meanwhile; which is faster depends on the batch and the network, so it has to be asked for.
    Raises: DeviceError for more devices than there are; RecipeError for axes that do not fit each other, the number, or the model.
    """
    count, why = _processes(ask, device, inventory, collective, processes)
    _check_axes(ask)
    if count == 1 and ask.dp * _number(ask.fsdp) * ask.cp * ask.tp == 1:
        return [{}], why
    said = ask.dp > 1 or ask.fsdp != "auto" or ask.cp * ask.tp > 1
    found = _possible(ask, count, machines)
    refusals = [None if shape is None else _refusal(mesh, shape, quantizer, kernels, states) for mesh in found]
    allowed = [mesh for mesh, refusal in zip(found, refusals, strict=True) if refusal is None]
    if not allowed:
        raise next(refusal for refusal in refusals if refusal)
    return allowed, "the recipe asks for it" if ask.parallel != "auto" or said else why


def _processes(ask: HardwareAsk, device: Device, inventory: Inventory, collective: str | None, processes: int | None) -> tuple[int, str]:
    """How many devices train together, one process each, and why."""
    kind, shared = device.kind, in_host_memory(device.kind)
    there = device.hosts * sum(each.kind == kind for each in inventory.devices)
    axes = ask.dp * _number(ask.fsdp) * ask.cp * ask.tp
    wanted = processes or (there if ask.devices == "all" else axes if ask.devices == "auto" else ask.devices)
    if max(wanted, axes, ask.dcn) > 1 and collective is None:
        raise DeviceError(
            f"several devices of kind {kind} cannot train together",
            why="nothing is known through which they could talk; the chips of a TPU do so through JAX (hardware.kind=tpu)",
            fix="set hardware.devices to 1, and leave hardware.dcn, dp, fsdp, cp and tp out",
        )
    if processes is not None:
        most, least = ask.devices if isinstance(ask.devices, int) else processes, ask.least_devices
        if not (least or most) <= processes <= most:
            few = least is not None and processes < least
            said = f"hardware.min_devices={least}" if few else f"hardware.devices={most}"
            fix = f"{least} or more, or set hardware.min_devices to {processes}" if few else f"{most}, or leave hardware.devices out"
            why = "each process has one device, and whoever starts them says how many"
            raise RecipeError(f"{said}, but {_started(processes)}", why=why, fix=f"start {fix}")
        return processes, _started(processes)
    asked = wanted
    if ask.min_devices is not None and ask.min_devices > asked and (shared or ask.devices == "auto"):
        what = "are one of a CPU" if shared and ask.devices == "all" else f"come to {asked}"
        raise RecipeError(
            f"hardware.min_devices={ask.min_devices}, but hardware.devices={ask.devices} {what}",
            why="it says with how few a run may go on, not how many there shall be, unless somebody else starts the processes",
            fix=f"set hardware.devices to {ask.min_devices} or more",
        )
    if ask.min_devices is not None and not shared:
        wanted = max(ask.min_devices, min(asked, there))
    if wanted > there and not shared:
        raise DeviceError(
            f"{'' if ask.min_devices is None else 'at least '}{wanted} devices were asked for, and {there} of kind {kind} answered",
            why="the others are not there" if device.hosts == 1 else f"so many are there on {device.hosts} hosts",
            fix=f"set hardware.devices to {there}, or all" if ask.min_devices is None else f"set hardware.min_devices to {there}",
        )
    if wanted > 1 and ask.index:
        raise RecipeError(
            f"hardware.index={ask.index} names one device, and {wanted} are to train together",
            why="they are the first ones that are here",
            fix="leave it out, or set hardware.devices to 1",
        )
    if wanted == 1 and ask.devices == "auto":
        if ask.parallel != "auto":
            what = f"hardware.parallel={ask.parallel} is for several devices, and one is asked for"
            why = f"hardware.devices=auto is one of kind {kind}, unless several processes were started"
            raise RecipeError(what, why=why, fix="set hardware.devices to all, or to how many")
        more = there > 1 and collective is not None
        return 1, f"nothing else is asked for; hardware.devices=all takes all {there}" if more else f"there is one of kind {kind}"
    if ask.devices == "all":
        return wanted, f"all {wanted} that are here" if wanted > 1 else f"there is one of kind {kind}"
    if wanted < asked:
        return wanted, f"{wanted} of the {asked} that the recipe asks for answered, and hardware.min_devices allows it"
    return wanted, "the recipe asks for it"


def _started(processes: int) -> str:
    return f"{processes} processes were started" if processes > 1 else "one process was started"


def _check_axes(ask: HardwareAsk) -> None:
    """Raises: RecipeError for axes that `parallel` excludes, and for that of slices."""
    if ask.dcn > 1:
        raise RecipeError(
            f"hardware.dcn={ask.dcn}, but only TPUs come in slices",
            why="it is their name for copies over a slower network",
            fix="set hardware.dp instead",
        )
    with_fsdp, with_tp = ask.parallel in ("auto", "fsdp", "fsdp_tp"), ask.parallel in ("auto", "tp", "fsdp_tp")
    other = (
        f"tp={ask.tp}"
        if ask.tp > 1 and not with_tp
        else f"cp={ask.cp}"
        if ask.cp > 1 and ask.parallel not in ("auto", "cp")
        else f"fsdp={ask.fsdp}"
        if (_number(ask.fsdp) > 1 and not with_fsdp) or (ask.fsdp == 1 and ask.parallel in ("fsdp", "fsdp_tp"))
        else None
    )
    if other:
        raise RecipeError(
            f"hardware.parallel={ask.parallel}, and hardware.{other}",
            why="one of them says how the work is shared, and the other says otherwise",
            fix="leave one of them out",
        )
    if ask.cp > 1 and ask.tp > 1:
        raise RecipeError(
            f"hardware.cp={ask.cp}, and hardware.tp={ask.tp}",
            why="both divide the heads of a model, and were never tried together",
            fix="leave hardware.tp out; set hardware.fsdp where the weights must be divided as well",
        )


def _possible(ask: HardwareAsk, count: int, machines: int) -> list[dict[str, int]]:
    """The meshes of so many devices that the recipe leaves open, the simplest first. Raises: RecipeError if there is none."""
    fsdp = None if ask.fsdp == "auto" else ask.fsdp
    wanted = {axis for axis in ("fsdp", "cp", "tp") if axis in ask.parallel.split("_")}
    meshes: list[dict[str, int]] = []
    for inner in _inner(ask, count):
        rest = count // max(math.prod(inner.values()), 1)
        copies, parts, in_machine = (rest, 1), (ask.dp, rest // ask.dp), (machines, rest // machines)
        if ask.parallel == "ddp" or fsdp == 1:
            tried = [copies]
        elif ask.parallel in ("cp", "tp"):
            tried = [(ask.dp, 1)]
        elif fsdp is not None:
            tried = [(ask.dp, fsdp)]
        elif ask.parallel != "auto" or (inner["tp"] > ask.tp):
            tried = [parts]
        else:
            tried = [copies, *([in_machine] if inner["cp"] == ask.cp else []), parts]
        for axes in tried:
            mesh = {axis: size for axis, size in zip(("dp", "fsdp", "cp", "tp"), (*axes, *inner.values()), strict=True) if size > 1}
            as_asked = ask.dp in (1, axes[0]) and wanted <= mesh.keys()
            if as_asked and math.prod(mesh.values()) == count and mesh not in meshes:
                meshes.append(mesh)
    if not meshes:
        raise _does_not_come_to(ask, count)
    return meshes


def _inner(ask: HardwareAsk, count: int) -> list[dict[str, int]]:
    """The sizes of cp and tp that come into question: those of the recipe, or what is left of the devices, or some to be tried."""
    fsdp = _number(ask.fsdp)
    said = {"cp": ask.cp, "tp": ask.tp}
    if ask.cp * ask.tp > 1 or ask.parallel in ("ddp", "fsdp"):
        return [said]
    if ask.parallel in ("cp", "tp"):
        return [{**said, ask.parallel: count // ask.dp}]
    if ask.parallel == "fsdp_tp":
        return [{**said, "tp": size} for size in (TRIED if ask.fsdp == "auto" else (count // (ask.dp * fsdp),))]
    return [said] + [{**said, axis: size} for axis in ("cp", "tp") for size in TRIED if fsdp == 1]


def _does_not_come_to(ask: HardwareAsk, count: int) -> RecipeError:
    said = {axis: size for axis, size in (("dp", ask.dp), ("fsdp", _number(ask.fsdp)), ("cp", ask.cp), ("tp", ask.tp)) if size > 1}
    others = math.prod(size for axis, size in said.items() if axis != "dp")
    named = [f"parallel {ask.parallel}"] * (ask.parallel != "auto") + [format_mesh(said)] * bool(said)
    return RecipeError(
        f"{' with '.join(named)} does not come to {count} device{'s' if count > 1 else ''}",
        why="hardware.devices asks for so many, or so many processes were started",
        fix=f"set hardware.dp to {count // others}"
        if others > 1 and count % others == 0
        else "let the product of hardware.dp, fsdp, cp and tp be that number, or leave parallel and all of them out",
    )


def _refusal(mesh: Mapping[str, int], shape: ModelShape, quantizer: str | None, kernels: bool, states: str) -> RecipeError | None:
    """Why a model cannot be divided so; None: it can."""
    fsdp, tp = mesh.get("fsdp", 1), mesh.get("tp", 1)
    axis = f"hardware.tp={tp}" if tp > 1 else f"hardware.fsdp={fsdp}"
    copies = "set hardware.parallel to ddp, so that each device has a copy"
    if fsdp * tp > 1 and states != "float32":
        return RecipeError(
            f"{axis} does not go with optim.states={states}, where every weight trains",
            why="the blocks of 256 values that share a scale would be cut where the weights are",
            fix=f"set optim.states to float32; or {copies}",
        )
    if quantizer and (tp > 1 or (fsdp > 1 and quantizer != "nf4")):
        bits = "4 bits" if quantizer == "nf4" else f"8 bits ({quantizer})"
        return RecipeError(
            f"{axis}, but the base is held in {bits}",
            why="the scales of a matrix in few bits go across the cut"
            if tp > 1
            else "a matrix is brought into eight bits where it lies, and its parts cannot be gathered",
            fix=f"{'set hardware.parallel to fsdp' if quantizer == 'nf4' else copies}; or hold the base in bfloat16",
        )
    name, size = ("tp", tp) if tp > 1 else ("cp", mesh.get("cp", 1))
    if size == 1:
        return None
    axis, fix = f"hardware.{name}={size}", f"leave hardware.{name} out: hardware.parallel=fsdp divides any model"
    if not shape.fused or (tp > 1 and not (kernels and shape.family in KNOWN)):
        return RecipeError(
            f"{axis}, but the kernels do not compute the layers of {shape.name} ({shape.family})" + " with this adapter" * shape.fused,
            why="in the middle of a layer the devices exchange what they have, and only the kernels know where",
            fix=fix,
        )
    if tp > 1 and shape.family in AS_ONE:
        return RecipeError(
            f"{axis} cannot divide the layers of {shape.name}", why=f"{shape.family} stores several matrices as one", fix=fix
        )
    counts = ((shape.kv_heads, "heads of keys"), (shape.heads, "heads"), (shape.intermediate, "gates of the MLP"))
    for number, what in counts if tp > 1 else counts[:2]:
        if number % size:
            return RecipeError(
                f"{axis} does not divide the {number} {what} of {shape.name}",
                why="each device would need a part of one, and fetch the rest in every layer",
                fix=f"set it to a divisor of {number}; or {fix}",
            )
    return None


def share_of(device: Device, inventory: Inventory, here: int) -> Device:
    """What one of so many processes on a machine has of its device: a part of a CPU, or as much of a GPU as each of them has."""
    if in_host_memory(device.kind):
        return replace(
            device,
            free_bytes=None if device.free_bytes is None else device.free_bytes // here,
            peak_flops=None if device.peak_flops is None else device.peak_flops / here,
        )
    others = [each for each in inventory.devices if each.kind == device.kind][:here]
    free = [each.free_bytes for each in others]
    speeds = [each.peak_flops for each in others]
    return replace(
        device,
        free_bytes=None if None in free else min(size for size in free if size is not None),
        peak_flops=None if None in speeds else min(speed for speed in speeds if speed is not None),
    )


def _number(asked: int | str) -> int:
    return asked if isinstance(asked, int) else 1


def format_mesh(mesh: Mapping[str, int]) -> str:
    """`fsdp 4 x tp 2`."""
    return " x ".join(f"{axis} {size}" for axis, size in mesh.items())


def row_shares(mesh: Mapping[str, int]) -> int:
    """Into how many parts the rows of a micro-batch are divided, or the examples of a step; those that share tokens or products take the same."""
    return math.prod(size for axis, size in mesh.items() if axis not in ("cp", "tp"))


def weight_parts(mesh: Mapping[str, int]) -> int:
    """Into how many parts FSDP divides every weight: over those that share tokens as well, since they need the same weights."""
    return mesh["fsdp"] * mesh.get("cp", 1) if mesh.get("fsdp", 1) > 1 else 1
