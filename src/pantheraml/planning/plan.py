"""The plan: every choice that was left open by the recipe, made, with one sentence of reason each. Needs no torch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pantheraml.errors import DeviceError
from pantheraml.hardware.device import Device, Inventory
from pantheraml.hardware.price import price_of
from pantheraml.hardware.select import select
from pantheraml.planning.base import Dtype, base_reason, quantizer_of, whole_bytes
from pantheraml.planning.batch import HEADROOM, MicroBatch, choose_micro_tokens, known, shared_rows
from pantheraml.planning.compile import choose_compile, choose_graphs, recording_bytes
from pantheraml.planning.cost import CostEstimate, estimate_cost, format_dollars, format_seconds
from pantheraml.planning.levels import Levels, format_levels, rungs
from pantheraml.planning.memory import RECOMPUTED, MemoryEstimate, format_bytes
from pantheraml.planning.need import counted, fused, memory_said, need, remedies
from pantheraml.planning.processes import exchanged_in_layers, first_that_fits, other_meshes, sending, shares_said, threads_of
from pantheraml.planning.rows import check_micro_tokens, choose_packing, choose_row_tokens, longest_allowed
from pantheraml.planning.shape import ModelShape
from pantheraml.planning.sharding import choose_mesh, format_mesh, process_meshes, row_shares, share_of
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
        micro_tokens: tokens that are taken at once: by all chips of a TPU together, by each process of another kind of device, or
            by those together that share every row (cp).
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
    kernels = fused(recipe, shape, device)
    lora = recipe.adapter if isinstance(recipe.adapter, LoRA) else None
    rank = lora.rank if lora else None

    dtype, reasons["dtype"] = _dtype(recipe, device)
    quantizer = quantizer_of(recipe, device, quantizers)
    base_dtype: Dtype = dtype if lora else "float32"
    reasons["base_dtype"] = base_reason(quantizer, lora is not None, xla=xla)
    chosen_attention, reasons["attention"] = _attention(recipe, device, shape, attention, kernels)

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
            kernels=kernels,
            states="float32" if lora else recipe.optim.states,
            collective=collective,
            processes=processes,
            machines=(machines or device.hosts) if lora else 1,
        )

    meshes, why_devices = meshes_for(recipe.hardware)
    world_size = math.prod(meshes[0].values())
    machines = machines or device.hosts
    here = 1 if xla else math.ceil(world_size / machines)
    others = [] if xla else other_meshes(recipe.hardware, world_size, meshes_for)
    device = share_of(device, inventory, here) if here > 1 else device
    threads, reasons["threads"] = threads_of(recipe, available_threads, here)
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
            rungs=rungs(device, recipe.hardware.checkpointing, fused=kernels),
            mixes=kernels or xla,
            sharers=mesh.get("cp", 1),
            asked=None if asked == "auto" else asked,
            remedies=remedies(recipe, shape, device, mesh, dtype, chosen_attention, quantizers, row_tokens[-1], others),
        )
        return shared_rows(micro, row_tokens[-1], sharers, memory_for) if asked == "auto" else micro

    mesh, micro, reasons["devices"] = first_that_fits(meshes, fit, why_devices)
    if not xla and world_size > 1:
        reasons["devices"] += shares_said(recipe, device, row_shares(mesh), machines)
    reasons["micro_tokens"], reasons["checkpointing"] = micro.reason, micro.levels_reason
    exchanged = None if xla else exchanged_in_layers(recipe.hardware, mesh)
    compile_layers, reasons["compile"] = (
        (False, exchanged)
        if exchanged
        else choose_compile(recipe.hardware.compile, device, fused=kernels, steps=_steps(recipe, train_rows))
    )
    lr, reasons["lr"] = _lr(recipe, lora is not None)

    price = price_of(device, recipe.hardware.usd_per_hour)
    rented = machines if in_host_memory(device.kind) else world_size
    # The kernels' attention ends where an example ends, the models' own runs over the row.
    attended = min(row_tokens[-1], math.ceil(mean_tokens)) if kernels else row_tokens[-1]
    peak_flops = device.peak_flops if dtype == device.dtypes[0] else None
    sent, efficiency = "", 1.0
    if not xla and world_size > 1:
        sent, efficiency = sending(
            shape,
            mesh,
            device,
            machines,
            micro,
            dtype=dtype,
            quantizer=quantizer,
            tokens=math.ceil(recipe.batch.size * min(mean_tokens, max_tokens) / row_shares(mesh)),
            row_tokens=attended,
            lora_rank=rank,
            kernels=kernels,
            peak_flops=peak_flops,
        )
    cost = estimate_cost(
        shape,
        row_tokens=attended,
        levels=micro.levels,
        lora_rank=rank,
        peak_flops=world_size * peak_flops * efficiency if peak_flops else None,
        total_tokens=_total_tokens(recipe, train_tokens, train_rows),
        fused=kernels,
        usd_per_hour=None if price.usd_per_hour is None else rented * price.usd_per_hour,
    )
    budget = int((device.free_bytes or 0) * HEADROOM)
    graphs, reasons["graphs"] = (
        (False, exchanged)
        if exchanged
        else choose_graphs(
            recipe.hardware.graphs,
            device,
            fused=kernels,
            lora=lora is not None,
            levels=micro.levels,
            compiled=compile_layers,
            fits=micro.memory.total_bytes + recording_bytes(micro.memory) <= budget,
            micro_batch_s=None if cost.tokens_per_s is None else micro.micro_tokens * (1 if xla else row_shares(mesh)) / cost.tokens_per_s,
        )
    )
    room = budget - (recording_bytes(micro.memory) if graphs else 0)
    whole = 0 if exchanged and mesh.get("fsdp", 1) > 1 else whole_bytes(recipe, shape, dtype, micro.memory, room)
    memory = replace(micro.memory, weights_bytes=micro.memory.weights_bytes + whole)
    if whole:
        reasons["base_dtype"] += f"; {format_bytes(whole)} are free to keep each matrix in {dtype} as well, so that it is made only once"
    reasons["memory"] = ("" if xla or world_size == 1 else f"on each of {world_size} devices: ") + memory_said(memory, shape)
    reasons["speed"] = (
        f"{cost.flops_per_token / 1e9:.2g} GFLOP a token; a first guess from the measured matrix product{sent}"
        if cost.tokens_per_s is not None
        else f"no matrix product was measured in {dtype} on this device{sent}"
    )
    left_out = "loading, compiling and evaluation" if compile_layers else "loading and evaluation"
    reasons["time"] = f"for the whole run, without {left_out}" if cost.time_s is not None else "the speed or the data is not known yet"
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


def _attention(recipe: Recipe, device: Device, shape: ModelShape, device_offers: tuple[str, ...], kernels: bool) -> tuple[str, str]:
    asked = recipe.model.attention
    offered = tuple(each for each in device_offers if each in shape.attention) or ("eager",)
    where = ", where answers are written; in training the kernels compute it" if kernels else ""
    if asked == "auto":
        return offered[0], "the first that the device and the model offer" + where
    if asked not in offered:
        raise DeviceError(
            f"model.attention={asked} is not offered on {device} for {shape.family}",
            why="here are "
            + ", ".join(offered)
            + ("; flash_attention_2 needs a CUDA device and the package flash-attn" if "flash" in asked else ""),
            fix=f"set model.attention to {offered[0]}, or auto",
        )
    return asked, "the recipe asks for it" + where


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
