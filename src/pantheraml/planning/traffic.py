"""What the processes of a step send each other, in bytes and in seconds: the formulas of docs/distributed.md. Needs no torch.

Axes of a mesh, the outermost first: dp holds copies, fsdp parts of every weight (PyTorch's FSDP2), tp parts of the products.

Payload is what a process hands to a collective, counted as the whole buffer: what an all-reduce sums, what an all-gather gives,
what a reduce-scatter takes. Wire is what of it leaves the process where n of them stand in a ring: 2 (n - 1) / n of an
all-reduce, (n - 1) / n of the others (https://github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pantheraml.planning.cost import flops_per_token
from pantheraml.planning.memory import RECOMPUTED, TILE_TOKENS, TILED, Level
from pantheraml.planning.shape import ModelShape

AXES = ("dp", "fsdp", "tp")
FLAT_ALIGNED = 256
"""Each parameter that trains begins at a multiple of so many numbers in the vector of all of them: engines/flat.py."""
REACHED = 0.8
"""Share of a link's speed that large collectives reach: 235 of 300 GB/s on eight A100, 380 of 450 between two H100
(https://github.com/stas00/ml-engineering/blob/0030e63/network/README.md, https://github.com/NVIDIA/nccl/issues/1264)."""

KNOWN = frozenset({"llama", "mistral", "qwen2", "qwen3", "granite", "gemma", "gemma2", "gemma3_text", "cohere", "cohere2", "phi3"})
"""Families whose parameters are named here: those of models/decoder.py."""
AS_ONE = frozenset({"phi3"})
"""Those that store q, k and v as one matrix, and gate and up as another: tensor parallel cannot divide them."""
SIDE_BY_SIDE = frozenset({"cohere", "cohere2"})
"""Those whose attention and MLP stand behind one norm."""
NORMS_BEHIND = frozenset({"gemma2", "gemma3_text"})
"""Those with a norm behind attention and MLP as well."""
HEAD_NORMS = frozenset({"qwen3", "gemma3_text"})
BIASES = frozenset({"qwen2"})
"""Those with a bias in q, k and v by their configuration class; where others have one, `layer_parameters` counts it with the rest."""

Size = tuple[int, ...]
Parameters = list[tuple[str, Size]]
"""(name, shape) of each."""
Collective = Literal["all_reduce", "all_gather", "reduce_scatter"]


# The parameters of a model.


def layer_parameters(shape: ModelShape) -> Parameters:
    """Those of one decoder layer without adapters: (name within the layer, shape), as transformers has them.

    What a model has beyond its family's (a bias here and there), and norms of families that are not known, are `others`, one vector.
    """
    found = _named(shape) if shape.family in KNOWN else _linears(shape)
    left = shape.parameters - _count(outer_parameters(shape)) - shape.layers * _count(found)
    return [*found, ("others", (left // shape.layers,))] if left >= shape.layers else found


def outer_parameters(shape: ModelShape) -> Parameters:
    """Those outside the layers: embedding, last norm, and the head where it is a matrix of its own."""
    own_head = shape.embedding_parameters > shape.vocab * shape.hidden
    matrix = (shape.vocab, shape.hidden)
    return [("embed_tokens.weight", matrix), ("norm.weight", (shape.hidden,)), *([("lm_head.weight", matrix)] if own_head else [])]


def divided(shape: ModelShape, tp: int) -> ModelShape:
    """What one of the processes of tensor parallel has: q, k, v, gate and up by outputs, o and down by inputs; the rest is whole.

    Raises: ValueError for a family that is not known, or where tp does not divide.
    """
    if tp == 1:
        return shape
    if shape.family not in KNOWN - AS_ONE or shape.heads % tp or shape.kv_heads % tp or shape.intermediate % tp:
        raise ValueError(f"the products of {shape.name} ({shape.family}) do not divide into {tp}")
    part = replace(shape, heads=shape.heads // tp, kv_heads=shape.kv_heads // tp, intermediate=shape.intermediate // tp)
    layer = _named(part)
    return replace(
        part,
        parameters=shape.parameters - shape.layers * (_count(_named(shape)) - _count(layer)),
        linears=tuple((size[1], size[0]) for name, size in layer if is_linear(name, size)) * shape.layers,
    )


def is_linear(name: str, size: Size) -> bool:
    """Whether a parameter of a layer is the matrix of a linear layer."""
    return len(size) == 2 and name.endswith(("proj.weight", "linear.weight"))


def _named(shape: ModelShape) -> Parameters:
    hidden, inner = shape.hidden, shape.intermediate
    q, k = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes: dict[str, Size] = {"input_layernorm.weight": (hidden,)}
    if shape.family in AS_ONE:
        sizes |= {"self_attn.qkv_proj.weight": (q + 2 * k, hidden), "mlp.gate_up_proj.weight": (2 * inner, hidden)}
    else:
        outputs = {"self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": k}
        sizes |= {f"{name}.weight": (n, hidden) for name, n in outputs.items()}
        sizes |= {f"{name}.bias": (n,) for name, n in outputs.items() if shape.family in BIASES}
        sizes |= {"mlp.gate_proj.weight": (inner, hidden), "mlp.up_proj.weight": (inner, hidden)}
    sizes |= {"self_attn.o_proj.weight": (hidden, q), "mlp.down_proj.weight": (hidden, inner)}
    if shape.family in HEAD_NORMS:
        sizes |= {"self_attn.q_norm.weight": (shape.head_dim,), "self_attn.k_norm.weight": (shape.head_dim,)}
    if shape.family not in SIDE_BY_SIDE:
        sizes["post_attention_layernorm.weight"] = (hidden,)
    if shape.family in NORMS_BEHIND:
        sizes |= {"pre_feedforward_layernorm.weight": (hidden,), "post_feedforward_layernorm.weight": (hidden,)}
    return list(sizes.items())


def _linears(shape: ModelShape) -> Parameters:
    """Linear layers of a family that is not known: those of one layer, if all have as many."""
    each, left = divmod(len(shape.linears), shape.layers)
    return [] if left else [(f"{i}.linear.weight", (n_out, n_in)) for i, (n_in, n_out) in enumerate(shape.linears[:each])]


def _count(parameters: Parameters) -> int:
    return sum(math.prod(size) for _, size in parameters)


# How FSDP2 holds them.


def stored(parameters: Parameters, each: int, quantizer: str | None = None) -> list[tuple[Size, int]]:
    """(shape, bytes of an entry) as FSDP sees them: a matrix in four bits is one row of bytes, and its scales stay whole."""
    return [((-(-math.prod(size) // 2),), 1) if quantizer == "nf4" and is_linear(name, size) else (size, each) for name, size in parameters]


def part_bytes(tensors: Sequence[tuple[Size, int]], fsdp: int) -> int:
    """What a process keeps of them: each is cut along its first dimension, which is filled up to a multiple of fsdp."""
    return sum(_part(size, fsdp) * each for size, each in tensors)


def _part(size: Size, fsdp: int) -> int:
    """Numbers in the first process's part."""
    return -(-size[0] // fsdp) * math.prod(size[1:])


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
        tokens: of this process, in all micro-batches of the step, padding included. labelled: those with a label; None: all.
    """
    lora = lora_rank is not None
    made = [
        *(_adapters(shape, lora_rank) if lora_rank is not None else _gradients(shape, mesh)),
        *_weights(shape, mesh, lora=lora, each=compute_bytes_each if lora else 4, quantizer=quantizer, micro_batches=micro_batches),
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
    fsdp, tp = mesh.get("fsdp", 1), mesh.get("tp", 1)
    one = divided(shape, tp)
    every = [(1, "", each) for each in outer_parameters(one)] + [(shape.layers, "layer.", each) for each in layer_parameters(one)]
    numbers = {"divided": 0, "partial": 0, "shared": 0}
    for times, where, (name, size) in every:
        kind = "shared" if tp == 1 or not where else "divided" if _is_divided(name) else "partial" if _is_partial(name, shape) else "shared"
        numbers[kind] += times * _aligned(_part(size, fsdp))
    over: dict[str, tuple[str, ...]] = {
        "divided": ("dp",),
        "partial": ("dp", "tp"),
        "shared": ("dp",) if fsdp > 1 else ("dp", "tp"),  # outside of FSDP a mean keeps the same what every process of tp has
    }
    return [Exchange(kind="all_reduce", what="gradients", axes=over[kind], payload_bytes=4 * count) for kind, count in numbers.items()]


def _weights(
    shape: ModelShape, mesh: Mapping[str, int], *, lora: bool, each: int, quantizer: str | None, micro_batches: int
) -> list[Exchange]:
    """FSDP, for each micro-batch: a layer comes for its forward and again for its backward, what is outside of them once for both."""
    fsdp = mesh.get("fsdp", 1)
    one = divided(shape, mesh.get("tp", 1))
    layers = shape.layers * fsdp * part_bytes(stored(layer_parameters(one), each, quantizer), fsdp)
    outer = fsdp * part_bytes(stored(outer_parameters(one), each), fsdp)
    gathered = Exchange(
        kind="all_gather",
        what="weights",
        axes=("fsdp",),
        payload_bytes=micro_batches * (2 * layers + outer),
        times=micro_batches * (2 * shape.layers + 1),
        hidden=True,
    )
    scattered = Exchange(
        kind="reduce_scatter",
        what="gradients",
        axes=("fsdp",),
        payload_bytes=micro_batches * (layers + outer),
        times=micro_batches * (shape.layers + 1),
        hidden=True,
    )
    return [gathered] if lora else [gathered, scattered]


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


_BY_OUTPUTS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_BY_INPUTS = ("o_proj.weight", "down_proj.weight")


def _is_divided(name: str) -> bool:
    """Whether tensor parallel keeps a part of a layer's parameter."""
    return name.endswith(_BY_INPUTS) or name.rpartition(".")[0].endswith(_BY_OUTPUTS)


def _is_partial(name: str, shape: ModelShape) -> bool:
    """Whether a norm stands between the beginning and the end of a divided product, so that each process has a part of its gradient."""
    before_mlp = "pre_feedforward_layernorm" if shape.family in NORMS_BEHIND else "post_attention_layernorm"
    return name.startswith(("input_layernorm", before_mlp, "self_attn.q_norm", "self_attn.k_norm"))


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

        Processes are numbered along tp first, then fsdp, then dp. A group that reaches over machines has as many rings as it
        has devices in each, and each ring leaves a machine by another device's card.
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
    """A step of so many tokens for each group of tensor parallel.

    Weights come and gradients go while layers are computed; for everything else they wait. Tensor parallel divides the layers
    and not the head, which each process of a group computes for itself.

    Args:
        flops_per_s: what a device really computes in a training step.
    """
    tp = traffic.mesh.get("tp", 1)
    flops = flops_per_token(shape, row_tokens=row_tokens, levels=levels, lora_rank=lora_rank)
    head = 2.0 * shape.vocab * shape.hidden * (3 if lora_rank is None else 2)
    seconds = dict.fromkeys((True, False), 0.0)
    for exchange in traffic.exchanges:
        seconds[exchange.hidden] += links.seconds(exchange, traffic.mesh)
    return StepTime(
        ideal_s=tokens * flops / tp / flops_per_s,
        compute_s=tokens * ((flops - head) / tp + head) / flops_per_s,
        hidden_s=seconds[True],
        waiting_s=seconds[False],
    )
