"""The plan: every choice that was left open by the recipe, made, with one sentence of reason each. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pantheraml.errors import DeviceError, PantheraError, RecipeError
from pantheraml.hardware.catalog import lookup
from pantheraml.hardware.device import Device, Inventory
from pantheraml.hardware.price import price_of
from pantheraml.hardware.select import select
from pantheraml.planning.base import BYTES_EACH, Dtype, base_reason, quantizer_of, whole_bytes
from pantheraml.planning.batch import HEADROOM, MicroBatch, choose_micro_tokens, known, shared_rows
from pantheraml.planning.compile import choose_compile, choose_graphs, recording_bytes
from pantheraml.planning.cost import FUSED_UTILISATION, UTILISATION, CostEstimate, estimate_cost, format_dollars, format_seconds
from pantheraml.planning.levels import Levels, format_levels, rungs
from pantheraml.planning.memory import RECOMPUTED, MemoryEstimate, format_bytes
from pantheraml.planning.need import counted, fused, need, remedies
from pantheraml.planning.rows import check_micro_tokens, choose_packing, choose_row_tokens, longest_allowed
from pantheraml.planning.shape import ModelShape
from pantheraml.planning.sharding import choose_mesh, format_mesh, process_meshes, row_shares, share_of
from pantheraml.planning.traffic import Links, StepTime, Traffic, step_time, step_traffic
from pantheraml.recipe.kinds import KINDS, in_host_memory
from pantheraml.recipe.types import HardwareAsk, LoRA, Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What will be done. `reasons` maps a choice to its sentence; `pantheraml plan` prints them.

    Attributes:
        device: of this process; where several share one, what one of them has of it.
        world_size: devices that train together. mesh: how they are arranged, axis -> devices; see planning/sharding.py.
        dtype: of the arithmetic; weights that train are kept in float32.
        base_dtype: of the weights that do not train.
        quantizer: how they are held where that is in fewer bits. whole: each matrix in four bits is also kept in `dtype`.
        max_tokens: longest example.
        row_tokens: the static row lengths, rising; a micro-batch has one of the shapes
            [micro_tokens // n, n] for n in row_tokens.
        micro_tokens: tokens that are taken at once: by all chips of a TPU together, by each process of another kind of device.
        packing: several examples share a row.
        levels: what each layer keeps for backward; see planning/levels.py.
        compile: torch compiles each layer.
        graphs: forward and backward are recorded once a shape and replayed.
        memory: on all chips of a TPU together; on one device of another kind.
    """

    device: Device
    world_size: int
    mesh: dict[str, int] = field(default_factory=dict[str, int])
    dtype: Dtype
    base_dtype: Dtype
    attention: str
    quantizer: str | None
    whole: bool
    max_tokens: int
    row_tokens: tuple[int, ...]
    micro_tokens: int
    batch_size: int
    packing: bool
    levels: Levels
    compile: bool
    graphs: bool
    threads: int | None
    lr: float
    memory: MemoryEstimate
    cost: CostEstimate
    reasons: dict[str, str]

    @property
    def checkpointing(self) -> bool:
        """Whether any layer is computed again in backward."""
        return any(level in RECOMPUTED for level in self.levels)

    @property
    def room_bytes(self) -> int | None:
        """What is free on the devices that `memory` is of; None: nobody tells."""
        return None if self.device.free_bytes is None else counted(self.device, self.world_size) * self.device.free_bytes

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON: tuples are lists, and the memory's total stands beside its parts."""
        plan = asdict(self)
        plan["memory"]["total_bytes"] = self.memory.total_bytes
        plan["row_tokens"] = list(self.row_tokens)
        plan["levels"] = list(self.levels)
        plan["device"]["dtypes"] = list(self.device.dtypes)
        return plan

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Plan:
        """What `to_dict` gave, read from JSON. Raises: ValueError if it is not a plan."""
        memory = {name: size for name, size in values.get("memory", {}).items() if name != "total_bytes"}
        try:
            return TypeAdapter(cls).validate_python({**values, "memory": memory})
        except ValidationError as error:
            raise ValueError(str(error)) from error

    def lines(self) -> list[tuple[str, str, str]]:
        """(choice, value, reason) for a person, in the order in which the choices are made."""
        memory, cost = self.memory, self.cost
        speed = "unknown" if cost.tokens_per_s is None else f"about {cost.tokens_per_s:,.0f} tokens/s"
        rows = " ".join(str(length) for length in self.row_tokens)
        values = {
            "device": f"{self.device} {self.device.label}, {format_bytes(self.device.free_bytes)} free",
            "devices": str(self.world_size) + (f": {format_mesh(self.mesh)}" if self.world_size > 1 else ""),
            "dtype": self.dtype,
            "base_dtype": self.quantizer or self.base_dtype,
            "attention": self.attention,
            "threads": "unknown" if self.threads is None else str(self.threads),
            "max_tokens": f"{self.max_tokens}",
            "packing": "on" if self.packing else "off",
            "row_tokens": rows,
            "micro_tokens": f"{self.micro_tokens}",
            "checkpointing": format_levels(self.levels),
            "compile": "on" if self.compile else "off",
            "graphs": "on" if self.graphs else "off",
            "lr": f"{self.lr:g}",
            "memory": f"about {format_bytes(memory.total_bytes)}",
            "speed": speed,
            "time": format_seconds(cost.time_s),
            "price": format_dollars(cost.usd),
        }
        return [(choice, value, self.reasons.get(choice, "")) for choice, value in values.items()]


def make_plan(
    recipe: Recipe,
    inventory: Inventory,
    shape: ModelShape,
    *,
    train_tokens: int | None = None,
    train_rows: int | None = None,
    longest_example: int | None = None,
    attention: tuple[str, ...] = ("sdpa", "eager"),
    quantizers: tuple[str, ...] = (),
    available_threads: int | None = None,
    asked_by: str = "the recipe",
    collective: str | None = None,
    processes: int | None = None,
    machines: int | None = None,
) -> Plan:
    """Make every open choice of the recipe, for this machine and this model.

    Args:
        train_tokens, train_rows: of one epoch; None if the data was not read yet.
        longest_example: in tokens, after max_tokens; None if not known.
        attention, quantizers: what the device's backend offers, best first.
        available_threads: cores this process may use; None if not asked.
        asked_by: who named the device, where it was not the recipe.
        collective: through what the device's backend lets processes talk; None: it trains in one alone.
        processes: how many were started to train together; None: nobody has, so the recipe says how many there shall be.
        machines: over how many of them they are spread evenly; None: as the device says.
    Raises:
        DeviceError: the device is not there, cannot do what was asked, or has too little memory.
        RecipeError: the recipe asks for what the model cannot do.
    """
    reasons: dict[str, str] = {}
    device, reasons["device"] = select(inventory, recipe.hardware, asked_by)
    xla = KINDS[device.kind].engine == "xla"
    lora = recipe.adapter if isinstance(recipe.adapter, LoRA) else None
    rank = lora.rank if lora else None

    dtype, reasons["dtype"] = _dtype(recipe, device)
    quantizer = quantizer_of(recipe, device, quantizers)
    base_dtype: Dtype = dtype if lora else "float32"
    reasons["base_dtype"] = base_reason(quantizer, lora is not None, xla=xla)
    chosen_attention, reasons["attention"] = _attention(recipe, device, shape, attention)

    def meshes_for(ask: HardwareAsk) -> tuple[list[dict[str, int]], str]:
        if xla:
            mesh, why = choose_mesh(ask, device, inventory, shape)
            return [mesh], why
        return process_meshes(
            ask,
            device,
            inventory,
            shape,
            quantizer=quantizer,
            kernels=fused(recipe, shape, device),
            states="float32" if lora else recipe.optim.states,
            collective=collective,
            processes=processes,
        )

    meshes, why_devices = meshes_for(recipe.hardware)
    world_size = math.prod(meshes[0].values())
    machines = machines or device.hosts
    here = 1 if xla else math.ceil(world_size / machines)
    others = [] if xla else _other_meshes(recipe.hardware, world_size, meshes_for)
    device = share_of(device, inventory, here) if here > 1 else device
    threads, reasons["threads"] = _threads(recipe, available_threads, here)
    max_tokens, reasons["max_tokens"] = longest_allowed(recipe, shape)
    packing, reasons["packing"] = choose_packing(recipe, shape)
    row_tokens, reasons["row_tokens"] = choose_row_tokens(
        max_tokens,
        longest_example,
        packing,
        None if recipe.batch.micro_tokens == "auto" else recipe.batch.micro_tokens,
        static=KINDS[device.kind].family == "tpu",
    )
    check_micro_tokens(recipe, row_tokens[-1])

    asked = recipe.batch.micro_tokens
    mean_tokens = train_tokens / train_rows if train_tokens and train_rows else longest_example or max_tokens
    free_bytes = counted(device, world_size) * known(device.free_bytes, device)

    def fit(mesh: dict[str, int]) -> MicroBatch:
        """What fits on this mesh. Raises: DeviceError if nothing does."""

        def memory_for(micro_tokens: int, levels: Levels) -> MemoryEstimate:
            return need(recipe, shape, device, mesh, dtype, chosen_attention, row_tokens[-1], micro_tokens, levels)

        # The chips of a TPU share the rows of each micro-batch; processes share the examples of a step, and each has micro-batches of its own.
        sharers, shares = (row_shares(mesh), 1) if xla else (1, row_shares(mesh))
        micro = choose_micro_tokens(
            memory_for,
            free_bytes=free_bytes,
            longest_row=row_tokens[-1] * (sharers if asked == "auto" else 1),
            batch_tokens=math.ceil(recipe.batch.size * min(mean_tokens, max_tokens) / shares),
            most_tokens=None if longest_example is None else math.ceil(recipe.batch.size / shares) * min(longest_example, max_tokens),
            peak_flops=device.peak_flops,
            layers=shape.layers,
            rungs=rungs(device, recipe.hardware.checkpointing, fused=fused(recipe, shape, device)),
            mixes=fused(recipe, shape, device) or xla,
            asked=None if asked == "auto" else asked,
            remedies=remedies(recipe, shape, device, mesh, dtype, chosen_attention, quantizers, row_tokens[-1], others),
        )
        return shared_rows(micro, row_tokens[-1], sharers, memory_for) if asked == "auto" else micro

    mesh, micro, reasons["devices"] = _first_that_fits(meshes, fit, why_devices)
    if not xla and world_size > 1:
        reasons["devices"] += _idle(recipe, row_shares(mesh)) + (
            "; they share the cores and the memory of one machine" if in_host_memory(device.kind) and machines == 1 else ""
        )
    reasons["micro_tokens"], reasons["checkpointing"] = micro.reason, micro.levels_reason
    exchanged = None if xla else _exchanged_in_layers(recipe.hardware, mesh)
    compile_layers, reasons["compile"] = (
        (False, exchanged)
        if exchanged
        else choose_compile(recipe.hardware.compile, device, fused=fused(recipe, shape, device), steps=_steps(recipe, train_rows))
    )
    lr, reasons["lr"] = _lr(recipe, lora is not None)

    price = price_of(device, recipe.hardware.usd_per_hour)
    rented = machines if in_host_memory(device.kind) else world_size
    # The kernels' attention ends where an example ends, the models' own runs over the row.
    attended = min(row_tokens[-1], math.ceil(mean_tokens)) if fused(recipe, shape, device) else row_tokens[-1]
    peak_flops = device.peak_flops if dtype == device.dtypes[0] else None
    sent, efficiency = "", 1.0
    if not xla and world_size > 1:
        step_tokens = math.ceil(recipe.batch.size * min(mean_tokens, max_tokens) / row_shares(mesh))
        traffic = step_traffic(
            shape,
            mesh,
            lora_rank=rank,
            compute_bytes_each=BYTES_EACH[dtype],
            levels=micro.levels,
            tokens=step_tokens,
            micro_batches=math.ceil(step_tokens / micro.micro_tokens),
            quantizer=quantizer,
        )
        time = _step_time(shape, traffic, device, machines, micro, step_tokens, attended, rank, fused(recipe, shape, device), peak_flops)
        sent, efficiency = _sent(traffic, time), time.efficiency if time else 1.0
    cost = estimate_cost(
        shape,
        row_tokens=attended,
        levels=micro.levels,
        lora_rank=rank,
        peak_flops=world_size * peak_flops * efficiency if peak_flops else None,
        total_tokens=_total_tokens(recipe, train_tokens, train_rows),
        fused=fused(recipe, shape, device),
        usd_per_hour=None if price.usd_per_hour is None else rented * price.usd_per_hour,
    )
    budget = int((device.free_bytes or 0) * HEADROOM)
    graphs, reasons["graphs"] = (
        (False, exchanged)
        if exchanged
        else choose_graphs(
            recipe.hardware.graphs,
            device,
            fused=fused(recipe, shape, device),
            lora=lora is not None,
            levels=micro.levels,
            compiled=compile_layers,
            fits=micro.memory.total_bytes + recording_bytes(micro.memory) <= budget,
            micro_batch_s=None if cost.tokens_per_s is None else micro.micro_tokens * (1 if xla else row_shares(mesh)) / cost.tokens_per_s,
        )
    )
    room = budget - (recording_bytes(micro.memory) if graphs else 0)
    whole = 0 if exchanged else whole_bytes(recipe, shape, dtype, micro.memory, room)
    memory = replace(micro.memory, weights_bytes=micro.memory.weights_bytes + whole)
    if whole:
        reasons["base_dtype"] += f"; {format_bytes(whole)} are free to keep each matrix in {dtype} as well, so that it is made only once"
    reasons["memory"] = (
        ("" if xla or world_size == 1 else f"on each of {world_size} devices: ")
        + f"weights {format_bytes(memory.weights_bytes)}, gradients {format_bytes(memory.gradients_bytes)}, "
        f"optimizer {format_bytes(memory.optimizer_bytes)}, activations {format_bytes(memory.activations_bytes)}, "
        f"logits {format_bytes(memory.logits_bytes)}, libraries {format_bytes(memory.runtime_bytes)} (an allowance)"
        + ("" if shape.packs else "; the states of state-space layers are not counted, so expect more")
    )
    reasons["speed"] = (
        f"{cost.flops_per_token / 1e9:.2g} GFLOP a token; a first guess from the measured matrix product{sent}"
        if cost.tokens_per_s is not None
        else f"no matrix product was measured in {dtype} on this device{sent}"
    )
    reasons["time"] = (
        "for the whole run, without loading and evaluation" if cost.time_s is not None else "the speed or the data is not known yet"
    )
    reasons["price"] = price.source if price.usd_per_hour is None else f"${rented * price.usd_per_hour:.2f} an hour ({price.source})"

    return Plan(
        device=device,
        world_size=world_size,
        mesh=mesh,
        dtype=dtype,
        base_dtype=base_dtype,
        attention=chosen_attention,
        quantizer=quantizer,
        whole=whole > 0,
        max_tokens=max_tokens,
        row_tokens=row_tokens,
        micro_tokens=micro.micro_tokens,
        batch_size=recipe.batch.size,
        packing=packing,
        levels=micro.levels,
        compile=compile_layers,
        graphs=graphs,
        threads=threads,
        lr=lr,
        memory=memory,
        cost=cost,
        reasons=reasons,
    )


def _dtype(recipe: Recipe, device: Device) -> tuple[Dtype, str]:
    asked = recipe.model.dtype
    if asked != "auto":
        if asked not in device.dtypes:
            raise DeviceError(
                f"model.dtype={asked} does not train on {device} ({device.name})",
                why="it trains well in "
                + ", ".join(device.dtypes)
                + ("; float16 overflows without loss scaling" if asked == "float16" else ""),
                fix=f"set model.dtype to {device.dtypes[0]}, or auto",
            )
        return asked, "the recipe asks for it"
    for dtype in device.dtypes:
        if dtype == "bfloat16":
            return dtype, f"the fastest dtype that trains well on {device}"
        if dtype == "float32":
            slower = (
                "bfloat16 has no instructions of its own here, so it would be slower"
                if "bfloat16" in device.dtypes
                else "bfloat16 is not native here"
            )
            return dtype, slower
    raise DeviceError(
        f"{device} ({device.name}) trains in neither float32 nor bfloat16",
        why="it offers " + (", ".join(device.dtypes) or "no dtype at all"),
        fix="choose another device with hardware.kind",
    )


def _attention(recipe: Recipe, device: Device, shape: ModelShape, device_offers: tuple[str, ...]) -> tuple[str, str]:
    asked = recipe.model.attention
    offered = tuple(each for each in device_offers if each in shape.attention) or ("eager",)
    if asked == "auto":
        return offered[0], "the first that the device and the model offer"
    if asked not in offered:
        raise DeviceError(
            f"model.attention={asked} is not offered on {device} for {shape.family}",
            why="here are "
            + ", ".join(offered)
            + ("; flash_attention_2 needs a CUDA device and the package flash-attn" if "flash" in asked else ""),
            fix=f"set model.attention to {offered[0]}, or auto",
        )
    return asked, "the recipe asks for it"


def _other_meshes(
    ask: HardwareAsk, devices: int, meshes_for: Callable[[HardwareAsk], tuple[list[dict[str, int]], str]]
) -> list[tuple[str, dict[str, int]]]:
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


def _first_that_fits(
    meshes: list[dict[str, int]], fit: Callable[[dict[str, int]], MicroBatch], why: str
) -> tuple[dict[str, int], MicroBatch, str]:
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


_SHARED = {"dp": "copies of the model", "fsdp": "parts of every weight", "tp": "parts of the products"}


def _idle(recipe: Recipe, shares: int) -> str:
    """Said where a step has fewer examples than processes that want some."""
    size = recipe.batch.size
    return f"; a step has {size} examples, so {shares - size} of {shares} shares of it are empty (see batch.size)" if size < shares else ""


def _exchanged_in_layers(ask: HardwareAsk, mesh: dict[str, int]) -> str | None:
    """Why layers are neither compiled nor recorded on a mesh; None: they may be. Raises: RecipeError if that is asked for."""
    if mesh.get("fsdp", 1) * mesh.get("tp", 1) == 1:
        return None
    for name in ("compile", "graphs"):
        if getattr(ask, name) == "on":
            raise RecipeError(
                f"hardware.{name}=on does not go with {format_mesh(mesh)}",
                why="devices exchange weights or activations in the middle of each layer, which was never compiled or recorded",
                fix=f"set hardware.{name} to auto, or hardware.parallel to ddp",
            )
    return "devices exchange weights or activations in the middle of each layer"


def _step_time(
    shape: ModelShape,
    traffic: Traffic,
    device: Device,
    machines: int,
    micro: MicroBatch,
    tokens: int,
    row_tokens: int,
    rank: int | None,
    kernels: bool,
    peak_flops: float | None,
) -> StepTime | None:
    """A step's time, with what is sent; None where nobody knows how fast the devices compute, or send to each other."""
    entry = lookup(device.kind, device.name, device.memory_bytes)
    if entry is None or entry.link_bytes_per_s is None or machines > 1 or peak_flops is None:
        return None
    return step_time(
        shape,
        traffic,
        Links(devices_each=math.prod(traffic.mesh.values()), inside_bytes_per_s=entry.link_bytes_per_s),
        tokens=tokens,
        row_tokens=row_tokens,
        levels=micro.levels,
        lora_rank=rank,
        flops_per_s=peak_flops * (FUSED_UTILISATION if kernels else UTILISATION),
    )


def _sent(traffic: Traffic, time: StepTime | None) -> str:
    sent = f"; each device sends about {format_bytes(round(traffic.wire_bytes))} a step"
    if time is None:
        return f"{sent}, which is not counted, since how fast it does is not known"
    return f"{sent}, after which {time.efficiency:.0%} of the speed is left"


def _threads(recipe: Recipe, available: int | None, here: int) -> tuple[int | None, str]:
    if recipe.hardware.threads is not None:
        return recipe.hardware.threads, "the recipe asks for it"
    if available is not None and here > 1:
        return max(1, available // here), f"{here} processes share the {available} cores of this machine"
    return available, "all cores that this process may use" if available is not None else "decided when the backend opens"


def _lr(recipe: Recipe, lora: bool) -> tuple[float, str]:
    if recipe.optim.lr != "auto":
        return recipe.optim.lr, "the recipe asks for it"
    return (2e-4, "usual for LoRA") if lora else (2e-5, "usual when every weight trains")


def _steps(recipe: Recipe, train_rows: int | None) -> int | None:
    if recipe.optim.steps is not None or train_rows is None:
        return recipe.optim.steps
    return math.ceil(recipe.optim.epochs * train_rows / recipe.batch.size)


def _total_tokens(recipe: Recipe, train_tokens: int | None, train_rows: int | None) -> int | None:
    if train_tokens is None:
        return None
    if recipe.optim.steps is None:
        return round(train_tokens * recipe.optim.epochs)
    return round(recipe.optim.steps * recipe.batch.size * train_tokens / train_rows) if train_rows else None
