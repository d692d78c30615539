"""What is sent in a step: every formula beside what the engine hands to collectives, counted, and beside numbers made by hand."""

from __future__ import annotations

import math
import runpy
import weakref
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from tests.fakes import FakeBackend, decoder_shape, fake_device, laptop, llama_8b
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pantheraml.data.chat import Example
from pantheraml.data.pack import StepBatch, pack_step
from pantheraml.engines.adamw import FusedAdamW
from pantheraml.engines.flat import ALIGNED, local_part
from pantheraml.engines.parallel import Parallel
from pantheraml.engines.torch_engine import TorchEngine
from pantheraml.hardware.catalog import lookup
from pantheraml.models.adapters import attach
from pantheraml.models.decoder import Decoder
from pantheraml.models.families import FAMILIES
from pantheraml.models.load import shape_of
from pantheraml.models.tiny import tiny_config
from pantheraml.planning.cost import flops_per_token
from pantheraml.planning.memory import Level
from pantheraml.planning.need import need
from pantheraml.planning.parameters import (
    AS_ONE,
    BIASES,
    HEAD_NORMS,
    KNOWN,
    NORMS_BEHIND,
    SIDE_BY_SIDE,
    divided,
    layer_parameters,
    outer_parameters,
    part_bytes,
    stored,
)
from pantheraml.planning.plan import make_plan
from pantheraml.planning.scaling import scaling_table
from pantheraml.planning.shape import ModelShape
from pantheraml.planning.traffic import FLAT_ALIGNED, Exchange, Links, step_time, step_traffic
from pantheraml.recipe.types import LoRA, OptimSpec, Recipe
from pantheraml.trainer.sft import sft_loss

ROOT = Path(__file__).parents[2]
RANK = 5
LENGTHS = (5, 19, 12, 3, 30, 8, 16, 9)


def made(family: str, **sizes: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(tiny_config(family, **{"num_hidden_layers": 3, **sizes})).eval()


# The parameters.


@pytest.mark.parametrize("family", sorted(KNOWN))
def test_the_parameters_of_a_layer_are_those_of_transformers(family: str) -> None:
    model = made(family)
    shape = shape_of(model, "here")
    assert dict(layer_parameters(shape)) == {name: tuple(each.shape) for name, each in model.model.layers[1].named_parameters()}
    outer = {name.removeprefix("model."): tuple(each.shape) for name, each in model.named_parameters() if ".layers." not in name}
    assert dict(outer_parameters(shape)) == outer


def test_the_families_are_those_that_the_kernels_know() -> None:
    assert set(FAMILIES) == KNOWN
    assert {name for name, family in FAMILIES.items() if len(family.qkv) == 1} == AS_ONE
    assert {name for name, family in FAMILIES.items() if family.before_mlp is None} == SIDE_BY_SIDE
    assert {name for name, family in FAMILIES.items() if family.after_mlp} == NORMS_BEHIND
    assert HEAD_NORMS | BIASES <= KNOWN
    assert FLAT_ALIGNED == ALIGNED


def test_what_a_family_does_not_usually_have_is_counted_all_the_same() -> None:
    model = made("llama", attention_bias=True)
    counted = [each.numel() for name, each in model.model.layers[0].named_parameters() if name.endswith("bias")]
    assert ("others", (sum(counted),)) in layer_parameters(shape_of(model, "here"))
    other = made("falcon_h1")  # no family of ours: linear layers, and the rest
    shape = shape_of(other, "here")
    parameters = [*layer_parameters(shape) * shape.layers, *outer_parameters(shape)]
    assert sum(math.prod(size) for _, size in parameters) == pytest.approx(shape.parameters, abs=shape.layers)


def test_the_parts_of_tensor_parallel_are_the_whole() -> None:
    shape = shape_of(made("qwen2"), "here")
    whole, part = dict(layer_parameters(shape)), dict(layer_parameters(divided(shape, 2)))
    halves = {name for name in whole if math.prod(whole[name]) == 2 * math.prod(part[name])}
    assert whole.keys() - halves == {name for name in whole if "norm" in name and whole[name] == part[name]}
    assert (
        part["self_attn.k_proj.weight"] == (32, 128)
        and part["self_attn.o_proj.weight"] == (128, 64)
        and part["self_attn.k_proj.bias"] == (32,)
    )
    for family, tp in (("phi3", 2), ("llama", 4), ("falcon_h1", 2)):
        with pytest.raises(ValueError, match="do not divide"):
            divided(shape_of(made(family), "here"), tp)


def test_fsdp_fills_up_the_first_dimension() -> None:
    # 263 rows over 4: parts of 66, 66, 66 and 65, and room for 66 in each.
    assert part_bytes([((263, 10), 4), ((5,), 2)], 4) == 66 * 10 * 4 + 2 * 2
    # In four bits a matrix of 7 x 9 is 32 bytes; a norm stays as it is.
    assert stored([("mlp.up_proj.weight", (7, 9)), ("input_layernorm.weight", (9,))], 2, "nf4") == [((32,), 1), ((9,), 2)]


# What the engine sends, counted. The processes are not there: a process group of torch's own tests does nothing with what it gets.


class Counted(TorchDispatchMode):
    """Payload bytes and calls of every collective that is called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[int]] = defaultdict(lambda: [0, 0])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name.startswith("c10d::"):
            kinds = {"allreduce_": ("all_reduce", args[0]), "_allgather_base_": ("all_gather", args[:1])}
            kinds |= {"_reduce_scatter_base_": ("reduce_scatter", args[1:2]), "alltoall_base_": ("all_to_all", args[1:2])}
            kind, buffers = kinds[name.removeprefix("c10d::")]
            self.found[kind][0] += sum(each.numel() * each.element_size() for each in buffers)
            self.found[kind][1] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def processes(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The first of so many processes, the others of which are not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    mesh = request.param
    dist.init_process_group("fake", rank=0, world_size=math.prod(mesh.values()), store=FakeStore())
    yield mesh
    dist.destroy_process_group()


class Process(NamedTuple):
    """The first process of several, ready for a step of two micro-batches."""

    model: Any
    shape: ModelShape
    recipe: Recipe
    engine: TorchEngine
    batch: StepBatch
    levels: tuple[Level, ...]


def process(mesh: dict[str, int], adapter: str, family: str, level: Level, dtype: str, **sizes: Any) -> Process:
    model = made(family, **sizes)
    shape = shape_of(model, "here")
    asked = {
        "model": {"name": "here", "max_tokens": 32, "dtype": dtype},
        "data": "rows",
        "batch": {"micro_tokens": 64},
        "adapter": {"kind": "lora", "rank": RANK} if adapter == "lora" else "full",
    }
    recipe = Recipe.model_validate(asked)
    plan = make_plan(recipe, laptop(), shape, longest_example=32)
    if isinstance(recipe.adapter, LoRA):
        model = attach(model.to(getattr(torch, dtype)), recipe.adapter, seed=0)
    levels: tuple[Level, ...] = (level,) * shape.layers
    parallel = Parallel(mesh, torch.device("cpu"))
    engine = TorchEngine(FakeBackend("cpu"), parallel=parallel)
    decoder = Decoder(model, levels, tp=parallel.tp, hooked=parallel.hooks)
    engine.prepare(model, sft_loss(model, decoder), OptimSpec(), plan, seed=0)
    drawn = np.random.default_rng(0)
    examples = [Example(drawn.integers(7, 263, length).astype(np.int32), np.arange(length) >= length // 2, "") for length in LENGTHS]
    batch = pack_step(examples, row_tokens=(32,), micro_tokens=64, packing=True, pad_id=0, trim=False)
    assert len(batch.micro) == 2
    return Process(model, shape, recipe, engine, batch, levels)


def counted(mesh: dict[str, int], adapter: str, family: str, level: Level, dtype: str) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Kind of collective -> (payload bytes, calls) of one step: counted, and by formula."""
    ready = process(mesh, adapter, family, level, dtype)
    ready.engine.step(ready.batch, 0, 1e-3)  # the first one also asks whether every parameter has got a gradient
    with Counted() as found:
        ready.engine.step(ready.batch, 1, 1e-3)
    cp = mesh.get("cp", 1)
    traffic = step_traffic(
        ready.shape,
        mesh,
        lora_rank=RANK if adapter == "lora" else None,
        compute_bytes_each=getattr(torch, dtype).itemsize,
        levels=ready.levels,
        tokens=sum(-(-each.input_ids.size // cp) * cp for each in ready.batch.micro),
        labelled=sum(len(each.labelled) for each in ready.batch.micro),
        micro_batches=2,
    )
    formula: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for exchange in traffic.exchanges:
        formula[exchange.kind][0] += exchange.payload_bytes
        formula[exchange.kind][1] += exchange.times
    assert traffic.payload_bytes == sum(size for size, _ in formula.values())
    assert traffic.all_reduce_bytes + traffic.tp_all_reduce_bytes == formula["all_reduce"][0]
    assert (traffic.all_gather_bytes, traffic.reduce_scatter_bytes) == (formula["all_gather"][0], formula["reduce_scatter"][0])
    assert traffic.all_to_all_bytes == formula["all_to_all"][0]
    return dict(found.found), {kind: each for kind, each in formula.items() if each[0]}


MESHES = [
    *({"dp": 4}, {"fsdp": 3}, {"dp": 2, "fsdp": 2}),
    *({"tp": 2}, {"dp": 2, "tp": 2}, {"fsdp": 3, "tp": 2}, {"dp": 2, "fsdp": 2, "tp": 2}),
    *({"cp": 2}, {"dp": 2, "cp": 2}, {"fsdp": 3, "cp": 2}, {"dp": 2, "fsdp": 2, "cp": 2}),
]


@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("processes", MESHES, indirect=True, ids=str)
def test_what_the_engine_hands_to_collectives_is_the_formula_to_the_byte(processes: dict[str, int], adapter: str) -> None:
    found, formula = counted(processes, adapter, "llama", "keep", "float32")
    assert found == formula and found


@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize(
    ("family", "level"), [("llama", "tiled"), ("gemma2", "all"), ("cohere", "all"), ("qwen2", "cheap"), ("qwen3", "all")]
)
@pytest.mark.parametrize("processes", [{"fsdp": 3, "tp": 2}, {"dp": 2, "tp": 2}, {"dp": 2, "cp": 2}], indirect=True, ids=str)
def test_so_it_is_in_every_kind_of_layer(processes: dict[str, int], family: str, level: Level, adapter: str) -> None:
    found, formula = counted(processes, adapter, family, level, "float32")
    assert found == formula


@pytest.mark.parametrize("processes", [{"fsdp": 3}, {"cp": 2}], indirect=True, ids=str)
def test_a_family_that_stores_matrices_as_one_can_be_gathered(processes: dict[str, int]) -> None:
    found, formula = counted(processes, "full", "phi3", "keep", "float32")
    assert found == formula


@pytest.mark.parametrize("processes", [{"fsdp": 2, "tp": 2}, {"fsdp": 2, "cp": 2}], indirect=True, ids=str)
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_frozen_base_and_activations_travel_in_the_dtype_of_the_arithmetic(processes: dict[str, int], adapter: str) -> None:
    found, formula = counted(processes, adapter, "llama", "keep", "bfloat16")
    assert found == formula


# What a process holds meanwhile.


class Held(TorchDispatchMode):
    """The most bytes that the tensors of other memory than `known` had at one time. FSDP empties a tensor's memory and fills it again."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._live: dict[int, Any] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((result, args)):
            if type(tensor) in (torch.Tensor, torch.nn.Parameter):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known and storage._cdata not in self._live:
                    self._live[storage._cdata] = weakref.ref(storage)
                    weakref.finalize(storage, self._live.pop, storage._cdata, None)
        held = [storage.nbytes() for each in [*self._live.values()] if (storage := each()) is not None]
        self.peak = max(self.peak, sum(held))
        return result


WIDE = {"num_hidden_layers": 6, "hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 4}


@pytest.mark.parametrize(("level", "dtype"), [("keep", "bfloat16"), ("all", "float32")])
@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize(
    "processes", [{"dp": 4}, {"fsdp": 4}, {"tp": 2}, {"fsdp": 4, "tp": 2}, {"cp": 2}, {"fsdp": 2, "cp": 2}], indirect=True, ids=str
)
def test_the_plan_knows_what_one_process_holds(processes: dict[str, int], adapter: str, level: Level, dtype: Any) -> None:
    ready = process(processes, adapter, "llama", level, dtype, vocab_size=2000, **WIDE)
    ready.engine.step(ready.batch, 0, 1e-3)
    flat, adamw = ready.engine._flat, ready.engine._adamw
    assert flat.gradients is not None and isinstance(adamw, FusedAdamW)
    own = [*(local_part(each) for each in ready.model.parameters()), flat.weights, flat.gradients, *adamw._moments.values()]
    before = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in own}
    with Held(own) as held:
        ready.engine.step(ready.batch, 1, 1e-3)
    planned = need(ready.recipe, ready.shape, fake_device("cpu"), processes, dtype, "sdpa", 32, 64, ready.levels)
    planned = replace(planned, runtime_bytes=0)
    # What a plan may fill leaves a fifth: the estimate is within a tenth.
    assert planned.total_bytes == pytest.approx(sum(before.values()) + held.peak, rel=0.1)


# By hand: Llama-3.1-8B with LoRA of rank 16, D 4096, F 14336, K 1024, V 128256, 32 layers.

LAYER = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
ADAPTERS = 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))


def traffic_of(mesh: dict[str, int], *, lora: bool = True, **more: Any) -> Any:
    given: dict[str, Any] = {"compute_bytes_each": 2, "levels": ("keep",) * 32, "tokens": 8192, "micro_batches": 2, **more}
    return step_traffic(llama_8b(), mesh, lora_rank=16 if lora else None, **given)


def test_by_hand_for_8b() -> None:
    assert llama_8b().lora_parameters(16) == ADAPTERS
    # Copies: the adapters' gradients in float32, and two numbers.
    copies = traffic_of({"dp": 8})
    assert (copies.payload_bytes, copies.all_reduce_bytes) == (4 * ADAPTERS + 8,) * 2
    assert copies.wire_bytes == 2 * 7 / 8 * (4 * ADAPTERS + 8)
    # Parts: each layer twice a micro-batch, embedding, head and the last norm once, in two bytes. Every dimension divides by 8.
    parts = traffic_of({"fsdp": 8})
    outside = 2 * 128256 * 4096 + 4096
    gathered = 2 * 2 * (2 * 32 * (LAYER + 2 * 4096) + outside)
    assert (parts.all_gather_bytes, parts.reduce_scatter_bytes, parts.all_reduce_bytes) == (gathered, 0, 4 * ADAPTERS + 8)
    assert parts.wire_bytes == pytest.approx(7 / 8 * gathered + 2 * 7 / 8 * (4 * ADAPTERS + 8))
    full = traffic_of({"fsdp": 8}, lora=False)
    assert (full.all_gather_bytes, full.all_reduce_bytes) == (2 * gathered, 8)
    assert full.reduce_scatter_bytes == 4 * 2 * (32 * (LAYER + 2 * 4096) + outside)
    # Products: four sums of [8192, 4096] in two bytes a layer, but for one in front of the first.
    products = traffic_of({"tp": 8})
    assert products.tp_all_reduce_bytes == (4 * 32 - 1) * 8192 * 4096 * 2
    assert traffic_of({"tp": 8}, levels=("all",) * 32).tp_all_reduce_bytes == (5 * 32 - 1) * 8192 * 4096 * 2
    # Where a quarter has labels: all four sums of the last layer but that in front of its attention.
    few = traffic_of({"tp": 8}, labelled=2048).tp_all_reduce_bytes
    assert few == ((4 * 31 - 1 + 1) * 8192 + 3 * 2048) * 4096 * 2
    assert traffic_of({}).exchanges == ()
    # Rows: of an eighth of the tokens q, k and v go and what attention gives comes back, and so in backward; in two bytes.
    rows = traffic_of({"cp": 8})
    assert rows.all_to_all_bytes == 2 * 32 * 1024 * (2 * 4096 + 2 * 1024) * 2
    assert rows.wire_bytes == pytest.approx(7 / 8 * rows.all_to_all_bytes + 2 * 7 / 8 * (4 * ADAPTERS + 8))
    assert traffic_of({"cp": 8}, levels=("all",) * 32).all_to_all_bytes == 1.5 * rows.all_to_all_bytes
    assert traffic_of({"cp": 8}, labelled=2048) == rows
    # Weights are in parts over those that share rows, too.
    both = traffic_of({"fsdp": 2, "cp": 4}, lora=False)
    assert (both.all_gather_bytes, both.reduce_scatter_bytes, both.all_reduce_bytes) == (2 * gathered, full.reduce_scatter_bytes, 8)
    assert both.all_to_all_bytes == 2 * rows.all_to_all_bytes


def test_four_bits_travel_as_they_are_and_their_scales_do_not() -> None:
    four = traffic_of({"fsdp": 8}, quantizer="nf4").all_gather_bytes
    assert four == 2 * (2 * 32 * (LAYER // 2 + 2 * 2 * 4096) + 2 * (2 * 128256 * 4096 + 4096))


def test_copies_of_parts_sum_what_each_process_has_left() -> None:
    found = traffic_of({"dp": 2, "fsdp": 4}, lora=False)
    # A quarter of every weight; all parts are multiples of 256 numbers.
    assert found.all_reduce_bytes == 4 * (32 * (LAYER + 2 * 4096) + 2 * 128256 * 4096 + 4096) // 4 + 8


def test_the_time_of_an_exchange_by_hand() -> None:
    links = Links(
        devices_each=8, inside_bytes_per_s=400e9, between_bytes_per_s=50e9, reached=0.5, begin_s=1e-3, hop_inside_s=1e-4, hop_between_s=1e-2
    )
    gather = Exchange(kind="all_gather", what="weights", axes=("fsdp",), payload_bytes=10**9, times=3)
    # Four in one machine: three hops, and 3/4 of the bytes at 200 GB/s.
    assert links.seconds(gather, {"fsdp": 4}) == pytest.approx(3 * (1e-3 + 3e-4) + 0.75e9 / 200e9)
    # Sixteen in two machines: eight rings, each leaving by a card of its own; of 15 hops one goes between machines.
    assert links.seconds(gather, {"fsdp": 16}) == pytest.approx(3 * (1e-3 + 14e-4 + 1e-2) + 15 / 16 * 1e9 / 200e9)
    # Copies that lie 8 apart: one in each machine, with its card alone.
    reduce = replace(gather, kind="all_reduce", axes=("dp",), times=1, what="gradients")
    slow = replace(links, tree_inside_s=1.0, tree_between_s=1.0)
    assert slow.seconds(reduce, {"dp": 4, "fsdp": 8}) == pytest.approx(1e-3 + 2 * 3 * 1e-2 + 2 * 3 / 4 * 1e9 / 25e9)
    # In an all-to-all of sixteen, eight of them in each machine, half of all leaves by the device's own card.
    heads = replace(gather, kind="all_to_all", what="activations", axes=("cp",), times=1)
    assert links.seconds(heads, {"cp": 4}) == pytest.approx(1e-3 + 3e-4 + 0.75e9 / 200e9)
    assert links.seconds(heads, {"cp": 16}) == pytest.approx(1e-3 + 14e-4 + 1e-2 + 7 / 16 * 1e9 / 200e9 + 8 / 16 * 1e9 / 25e9)
    # A tree sums in hops that grow with the logarithm of the machines.
    tree = replace(links, tree_inside_s=1e-5, tree_between_s=1e-4)
    assert tree.seconds(reduce, {"dp": 1024}) == pytest.approx(2 * (7e-5 + 7e-4) + 2 * 1023 / 1024 * 1e9 / 200e9)


def test_layers_wait_for_sums_and_not_for_weights_that_come_meanwhile() -> None:
    shape, levels = llama_8b(), ("keep",) * 32
    flops = flops_per_token(shape, row_tokens=2048, levels=levels, lora_rank=16)
    given: dict[str, Any] = {"tokens": 8192, "row_tokens": 2048, "levels": levels, "lora_rank": 16}
    slow = step_time(shape, traffic_of({"fsdp": 8}), Links(), **given, flops_per_s=1e14)
    assert slow.compute_s == slow.ideal_s == pytest.approx(8192 * flops / 1e14)
    assert slow.step_s == slow.compute_s + slow.waiting_s and slow.efficiency > 0.99
    fast = step_time(shape, traffic_of({"fsdp": 8}), Links(), **given, flops_per_s=1e17)
    assert fast.step_s == fast.hidden_s + fast.waiting_s and fast.efficiency < 0.1
    # Two processes that share products both compute the head.
    tp = step_time(shape, traffic_of({"tp": 2}), Links(), **given, flops_per_s=1e14)
    head = 2 * 2 * 128256 * 4096
    assert tp.compute_s == pytest.approx(8192 * ((flops - head) / 2 + head) / 1e14)
    # Two that share tokens do not, and wait for less.
    cp = step_time(shape, traffic_of({"cp": 2}), Links(), **given, flops_per_s=1e14)
    assert cp.compute_s == cp.ideal_s == pytest.approx(8192 * flops / 2 / 1e14) and 0 < cp.waiting_s < tp.waiting_s / 2


# The table on paper.


def test_a_table_says_what_fits_and_never_more_than_the_devices_can() -> None:
    gpu = lookup("cuda", "NVIDIA H100 80GB HBM3")
    assert gpu is not None
    table = list(scaling_table([replace(llama_8b(), fused=True)], gpu, devices=(1, 8, 1024)))
    assert [(line.adapter, line.devices) for line in table] == [(each, n) for each in ("lora", "full") for n in (1, 8, 1024)]
    assert [line.mesh for line in table] == [{}, {"dp": 8}, {"dp": 1024}, None, {"fsdp": 8}, {"fsdp": 1024}]
    assert table[3].refused is not None and "training needs" in table[3].refused
    times = [line.time for line in table if line.time is not None]
    assert times[0].efficiency == 1 and all(0 < time.efficiency <= 1 for time in times)
    # One device alone: the operations of its tokens at 0.4 of 989 TFLOP/s.
    assert times[0].step_s == pytest.approx(
        16384 * flops_per_token(llama_8b(), row_tokens=2048, levels=("keep",) * 32, lora_rank=16) / (0.4 * 989e12), rel=1e-6
    )
    copies = list(scaling_table([replace(llama_8b(), fused=True)], gpu, devices=(2, 8, 64), adapters=("full",), in_machine="fsdp"))
    assert [line.mesh for line in copies] == [{"fsdp": 8}, {"dp": 8, "fsdp": 8}]
    rows = list(
        scaling_table([replace(llama_8b(), fused=True)], gpu, devices=(8, 64), adapters=("lora",), row_tokens=131_072, in_machine="cp")
    )
    assert [line.mesh for line in rows] == [{"cp": 8}, {"dp": 8, "cp": 8}]
    assert all(line.micro_tokens == 131_072 and line.time is not None and 0.9 < line.time.efficiency < 1 for line in rows)


@pytest.fixture(scope="module")
def paper() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "benchmarks" / "distributed.py"))


def test_the_shapes_of_the_table_are_the_published_ones(paper: dict[str, Any]) -> None:
    # As their pages on the Hub count them.
    sizes: dict[str, ModelShape] = {name: paper["shape_of"](name) for name in paper["MODELS"]}
    assert {name: shape.parameters for name, shape in sizes.items()} == {
        "Qwen2.5-0.5B": 494_032_768,
        "Llama-3.1-8B": 8_030_261_248,
        "Llama-3.1-70B": 70_553_706_496,
    }
    assert all(("others" not in dict(layer_parameters(shape))) for shape in sizes.values())


def test_the_page_holds_the_table_that_the_benchmark_prints(paper: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert paper["paper"](quick=False) == 0
    printed = capsys.readouterr().out
    page = (ROOT / "docs" / "distributed.md").read_text("utf-8").splitlines()
    rows = [line for line in page if line.endswith(f"| {paper['PREDICTED']} |")]
    assert len(rows) > 10 and not [line for line in rows if line not in printed.splitlines()]
    assert all(paper["PREDICTED"] in line for line in printed.splitlines() if line.startswith(("| Qwen", "| Llama")))


def test_a_line_that_contradicts_another_is_found(paper: dict[str, Any]) -> None:
    line = {"model": "m", "adapter": "lora", "tokens_each": 1, "devices": 1, "mesh": {}, "tokens_per_s": 2.0, "efficiency": 1.0}
    slower = {**line, "devices": 2, "tokens_per_s": 1.9, "efficiency": 0.5}
    assert paper["contradictions"]([line, slower]) == ["m is no faster on 2 devices than on 1"]
    assert paper["contradictions"]([{**line, "efficiency": 1.1}]) and not paper["contradictions"]([line])


def test_a_small_shape_and_a_large_one_are_described_alike() -> None:
    shape = decoder_shape()
    assert (
        sum(math.prod(size) for _, size in layer_parameters(shape)) * shape.layers
        + sum(math.prod(size) for _, size in outer_parameters(shape))
        == shape.parameters
    )
