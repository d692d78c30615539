"""What the processes of a step send each other, in bytes and in seconds: the formulas of docs/distributed.md. Needs no torch.

Axes of a mesh, the outermost first: dp holds copies, fsdp parts of every weight (PyTorch's FSDP2), cp parts of the tokens of each
micro-batch, tp parts of the products.

Payload is what a process hands to a collective, counted as the whole buffer: what an all-reduce sums, what an all-gather gives,
what a reduce-scatter or an all-to-all takes. Wire is what of it leaves the process where n of them stand in a ring: 2 (n - 1) / n
of an all-reduce, (n - 1) / n of the others (https://github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pantheraml.planning.cost import flops_per_token
from pantheraml.planning.memory import RECOMPUTED, TILE_TOKENS, TILED, Level
from pantheraml.planning.parameters import (
    NORMS_BEHIND,
    SIDE_BY_SIDE,
    divided,
    is_divided,
    is_partial,
    layer_parameters,
    outer_parameters,
    part,
    part_bytes,
    stored,
)
from pantheraml.planning.shape import ModelShape
from pantheraml.planning.sharding import weight_parts

AXES = ("dp", "fsdp", "cp", "tp")
FLAT_ALIGNED = 256
"""Each parameter that trains begins at a multiple of so many numbers in the vector of all of them: engines/flat.py."""
REACHED = 0.8
"""Share of a link's speed that large collectives reach: 235 of 300 GB/s on eight A100, 380 of 450 between two H100
(https://github.com/stas00/ml-engineering/blob/0030e63/network/README.md, https://github.com/NVIDIA/nccl/issues/1264)."""

Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]


# What travels in a step.


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """Collectives of one kind, of one step.

    Attributes:
        what: travels. axes: those of the mesh along which the processes of a group differ.
        payload_bytes: of all of them; see the head of this file. times: how many there are. hidden: layers are computed meanwhile.
    """

    kind: Collective
    what: Literal["gradients", "numbers", "weights", "activations"]
    axes: tuple[str, ...]
    payload_bytes: int
    times: int = 1
    hidden: bool = False

    @property
    def rounds(self) -> int:
        """How often a ring goes around: an all-reduce scatters sums, and gathers them."""
        return 2 if self.kind == "all_reduce" else 1

    def wire_bytes(self, mesh: Mapping[str, int]) -> float:
        """What one process sends in a ring of them."""
        n = math.prod(mesh.get(axis, 1) for axis in self.axes)
        return self.rounds * self.payload_bytes * (n - 1) / n


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What one process hands to collectives in one step; an evaluation or a checkpoint comes on top."""

    mesh: Mapping[str, int]
    exchanges: tuple[Exchange, ...]

    @property
    def all_reduce_bytes(self) -> int:
        """Payload: gradients, and the loss and the norm."""
        return self._payload("all_reduce", "gradients", "numbers")

    @property
    def tp_all_reduce_bytes(self) -> int:
        """Payload: activations and their gradients."""
        return self._payload("all_reduce", "activations")

    @property
    def all_to_all_bytes(self) -> int:
        """Payload: q, k, v and what attention gives, and their gradients."""
        return self._payload("all_to_all", "activations")

    @property
    def all_gather_bytes(self) -> int:
        """Payload: weights."""
        return self._payload("all_gather", "weights")

    @property
    def reduce_scatter_bytes(self) -> int:
        """Payload: gradients."""
        return self._payload("reduce_scatter", "gradients")

    @property
    def payload_bytes(self) -> int:
        """All of it."""
        return sum(each.payload_bytes for each in self.exchanges)

    @property
    def wire_bytes(self) -> float:
        """What the process sends."""
        return sum(each.wire_bytes(self.mesh) for each in self.exchanges)

    def _payload(self, kind: Collective, *what: str) -> int:
        return sum(each.payload_bytes for each in self.exchanges if each.kind == kind and each.what in what)


def step_traffic(
    shape: ModelShape,
    mesh: Mapping[str, int],
    *,
    lora_rank: int | None,
    compute_bytes_each: int,
    levels: Sequence[Level],
    tokens: int,
    labelled: int | None = None,
    micro_batches: int = 1,
    quantizer: str | None = None,
) -> Traffic:
    """What one process sends in a step; where parts differ in size, the first one.

    Args:
        lora_rank: of adapters on all linear layers of a frozen base; None: every weight trains.
        compute_bytes_each: of the arithmetic, and of a frozen weight: 2 or 4. quantizer: "nf4", or None.
        tokens: of this process, or of those that share them, in all micro-batches of the step, padding included. labelled: those
            with a label; None: all.
    """
    lora = lora_rank is not None
    made = [
        *(_adapters(shape, lora_rank) if lora_rank is not None else _gradients(shape, mesh)),
        *_weights(shape, mesh, lora=lora, each=compute_bytes_each if lora else 4, quantizer=quantizer, micro_batches=micro_batches),
        *_heads(shape, mesh, compute_bytes_each, levels, tokens, micro_batches),
        *_activations(shape, mesh, lora, compute_bytes_each, levels, tokens, tokens if labelled is None else labelled, micro_batches),
        Exchange(kind="all_reduce", what="numbers", axes=AXES, payload_bytes=2 * 4),  # the sum of the losses, and the norm
    ]
    sent = [replace(each, axes=tuple(axis for axis in each.axes if mesh.get(axis, 1) > 1)) for each in made]
    return Traffic(mesh=dict(mesh), exchanges=tuple(each for each in sent if each.axes and each.payload_bytes))


def _adapters(shape: ModelShape, rank: int) -> list[Exchange]:
    """All processes have all adapters, and one vector of their gradients."""
    size = sum(_aligned(rank * n_in) + _aligned(n_out * rank) for n_in, n_out in shape.linears)
    return [Exchange(kind="all_reduce", what="gradients", axes=AXES, payload_bytes=4 * size)]


def _gradients(shape: ModelShape, mesh: Mapping[str, int]) -> list[Exchange]:
    """Of every weight: what FSDP has not summed over fsdp already, and over tp what tensor parallel leaves in parts or twice."""
    fsdp, tp = weight_parts(mesh), mesh.get("tp", 1)
    one = divided(shape, tp)
    every = [(1, "", each) for each in outer_parameters(one)] + [(shape.layers, "layer.", each) for each in layer_parameters(one)]
    numbers = {"divided": 0, "partial": 0, "shared": 0}
    for times, where, (name, size) in every:
        kind = "shared" if tp == 1 or not where else "divided" if is_divided(name) else "partial" if is_partial(name, shape) else "shared"
        numbers[kind] += times * _aligned(part(size, fsdp))
    over: dict[str, tuple[str, ...]] = {
        "divided": ("dp",),
        "partial": ("dp", "tp"),
        "shared": ("dp",) if fsdp > 1 else ("dp", "cp", "tp"),  # outside of FSDP a mean keeps the same what every process of tp has
    }
    return [Exchange(kind="all_reduce", what="gradients", axes=over[kind], payload_bytes=4 * count) for kind, count in numbers.items()]


def _weights(
    shape: ModelShape, mesh: Mapping[str, int], *, lora: bool, each: int, quantizer: str | None, micro_batches: int
) -> list[Exchange]:
    """FSDP, for each micro-batch: a layer comes for its forward and again for its backward, what is outside of them once for both."""
    fsdp = weight_parts(mesh)
    one = divided(shape, mesh.get("tp", 1))
    axes = ("fsdp", "cp") if fsdp > 1 else ()
    layers = shape.layers * fsdp * part_bytes(stored(layer_parameters(one), each, quantizer), fsdp)
    outer = fsdp * part_bytes(stored(outer_parameters(one), each), fsdp)
    gathered = Exchange(
        kind="all_gather",
        what="weights",
        axes=axes,
        payload_bytes=micro_batches * (2 * layers + outer),
        times=micro_batches * (2 * shape.layers + 1),
        hidden=True,
    )
    scattered = Exchange(
        kind="reduce_scatter",
        what="gradients",
        axes=axes,
        payload_bytes=micro_batches * (layers + outer),
        times=micro_batches * (shape.layers + 1),
        hidden=True,
    )
    return [gathered] if lora else [gathered, scattered]


def _heads(
    shape: ModelShape, mesh: Mapping[str, int], each: int, levels: Sequence[Level], tokens: int, micro_batches: int
) -> list[Exchange]:
    """Context parallel: q, k and v of this process's tokens go to those who have their heads, and what attention gives comes back.

    In backward gradients of the same sizes, and both once more where a layer is computed again.
    """
    cp = mesh.get("cp", 1)
    numbers = 2 * (shape.heads + shape.kv_heads) * shape.head_dim
    passes = 2 * len(levels) + sum(level in RECOMPUTED for level in levels)
    size = passes * -(-tokens // cp) * numbers * each if cp > 1 else 0
    return [Exchange(kind="all_to_all", what="activations", axes=("cp",), payload_bytes=size, times=2 * passes * micro_batches)]


def _activations(
    shape: ModelShape,
    mesh: Mapping[str, int],
    lora: bool,
    each: int,
    levels: Sequence[Level],
    tokens: int,
    labelled: int,
    micro_batches: int,
) -> list[Exchange]:
    """Tensor parallel: sums of [tokens, D], behind o and down in forward, and in backward in front of q, k, v and of gate, up.

    Behind the last attention go only tokens with a label. A layer that is computed again sums behind o again, and behind down
    only where a norm stands there. The first layer's input has no gradient under LoRA.
    """
    if mesh.get("tp", 1) == 1:
        return []
    rows = times = 0
    for i, level in enumerate(levels):
        here = labelled if i == len(levels) - 1 else tokens
        pieces = max(1, -(-here // (micro_batches * TILE_TOKENS))) if level in TILED else 1
        again = 0 if level not in RECOMPUTED else 2 if shape.family in NORMS_BEHIND else 1
        first, own_mlp = lora and i == 0, shape.family not in SIDE_BY_SIDE
        rows += (2 + again + own_mlp) * here + (0 if first else tokens)
        times += 1 + pieces + (again > 0) + (again > 1) * pieces + own_mlp * pieces + (not first)
    size = rows * shape.hidden * each
    return [Exchange(kind="all_reduce", what="activations", axes=("tp",), payload_bytes=size, times=times * micro_batches)]


def _aligned(count: int) -> int:
    return -(-count // FLAT_ALIGNED) * FLAT_ALIGNED


# How long that takes.


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """How fast a device sends, in one direction.

    The defaults are those of H100 SXM in machines of eight (DGX, HGX): NVLink 4 inside, and a network card of 400 Gbit/s for each
    device (https://github.com/stas00/ml-engineering/blob/0030e63/network/README.md; NVIDIA DGX H100 User Guide, table 6). The
    times are those by which NCCL itself chooses (its src/graph/tuning.cc at 01afd20, protocol Simple).

    Attributes:
        devices_each: devices of a machine. inside_bytes_per_s: of a device to others of its machine.
        between_bytes_per_s: of a device to other machines. reached: share of both that collectives reach.
        begin_s: before a ring sends. hop_inside_s, hop_between_s: from one device of it to the next, however little is sent.
        tree_inside_s, tree_between_s: the same for a tree, which sums in fewer hops, and longer ones.
    """

    devices_each: int = 8
    inside_bytes_per_s: float = 450e9
    between_bytes_per_s: float = 50e9
    reached: float = REACHED
    begin_s: float = 8.4e-6
    hop_inside_s: float = 3.4e-6
    hop_between_s: float = 9.6e-6
    tree_inside_s: float = 28e-6
    tree_between_s: float = 50e-6

    def seconds(self, exchange: Exchange, mesh: Mapping[str, int]) -> float:
        """How long an exchange takes if nothing else is sent: as many bytes as in a ring, and for sums the hops of a tree if they are faster.

        Processes are numbered along tp first, then cp, fsdp and dp. A group that reaches over machines has as many rings as it
        has devices in each, and each ring leaves a machine by another device's card; in an all-to-all each device sends by its own.
        """
        inner = [axis for axis in AXES if AXES.index(axis) > max(AXES.index(each) for each in exchange.axes)]
        stride = math.prod(mesh.get(axis, 1) for axis in inner)
        size = math.prod(mesh.get(axis, 1) for axis in exchange.axes)
        here = max(1, min(size, self.devices_each // stride))
        outside = math.ceil(size / here) - 1
        hops_s = self.begin_s + exchange.rounds * ((size - 1 - outside) * self.hop_inside_s + outside * self.hop_between_s)
        if exchange.kind == "all_reduce":
            hops_s = min(hops_s, 2 * ((here - 1) * self.tree_inside_s + math.log2(outside + 1) * self.tree_between_s))
        speed = min(self.inside_bytes_per_s, here * self.between_bytes_per_s) if outside else self.inside_bytes_per_s
        if exchange.kind == "all_to_all" and outside:
            each_s = (here - 1) / self.inside_bytes_per_s + (size - here) / self.between_bytes_per_s
            return exchange.times * hops_s + exchange.payload_bytes / size * each_s / self.reached
        return exchange.times * hops_s + exchange.wire_bytes(mesh) / (speed * self.reached)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """A step of one process. `ideal_s`: what it would take if nothing were sent or computed by more than one process.

    Attributes:
        hidden_s: sending while layers are computed. waiting_s: sending for which they wait.
    """

    ideal_s: float
    compute_s: float
    hidden_s: float
    waiting_s: float

    @property
    def step_s(self) -> float:
        """All of it."""
        return max(self.compute_s, self.hidden_s) + self.waiting_s

    @property
    def efficiency(self) -> float:
        """Share of the devices' speed that is left."""
        return self.ideal_s / self.step_s


def step_time(
    shape: ModelShape,
    traffic: Traffic,
    links: Links,
    *,
    tokens: int,
    row_tokens: int,
    levels: Sequence[Level],
    lora_rank: int | None,
    flops_per_s: float,
) -> StepTime:
    """A step of so many tokens for each group of tensor or context parallel.

    Weights come and gradients go while layers are computed; for everything else they wait. Tensor parallel divides the layers
    and not the head, which each process of a group computes for itself; context parallel divides both.

    Args:
        flops_per_s: what a device really computes in a training step.
    """
    tp, cp = traffic.mesh.get("tp", 1), traffic.mesh.get("cp", 1)
    flops = flops_per_token(shape, row_tokens=row_tokens, levels=levels, lora_rank=lora_rank)
    head = 2.0 * shape.vocab * shape.hidden * (3 if lora_rank is None else 2)
    seconds = dict.fromkeys((True, False), 0.0)
    for exchange in traffic.exchanges:
        seconds[exchange.hidden] += links.seconds(exchange, traffic.mesh)
    return StepTime(
        ideal_s=tokens * flops / (cp * tp) / flops_per_s,
        compute_s=tokens / cp * ((flops - head) / tp + head) / flops_per_s,
        hidden_s=seconds[True],
        waiting_s=seconds[False],
    )
