"""One process of a run that benchmarks/distributed.py measures: 20 steps on a small model, and every byte that it hands to others.

torch.distributed is told by the environment which process this is, as torchrun does it. The first one writes what it saw
beside the specification: result.json, and weights.safetensors with what trained.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from pantheraml.data.chat import Example
from pantheraml.data.pack import StepBatch, pack_step
from pantheraml.engines.parallel import Parallel
from pantheraml.engines.piece import Piece
from pantheraml.engines.torch_engine import TorchEngine
from pantheraml.hardware.backend import open_backend
from pantheraml.hardware.detect import detect
from pantheraml.models.adapters import attach
from pantheraml.models.decoder import Decoder, decodes
from pantheraml.models.load import shape_of
from pantheraml.models.quantize import quantization
from pantheraml.planning.plan import make_plan
from pantheraml.planning.traffic import step_traffic
from pantheraml.recipe.types import LoRA, OptimSpec, Recipe
from pantheraml.trainer.fast import shared
from pantheraml.trainer.sft import sft_loss

VOCABULARY, ROW, MICRO = 263, 64, 128
# Of the operations of torch.distributed: how a collective is called in docs/distributed.md, and which argument is its buffer.
COLLECTIVES = {
    "allreduce_": ("all_reduce", 0),
    "_allgather_base_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "broadcast_": ("broadcast", 0),
    "allgather_": ("all_gather", 0),
    "reduce_scatter_": ("reduce_scatter", 1),
    "alltoall_base_": ("all_to_all", 1),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What to run. adapter: lora, full, or nf4 (LoRA on a base in four bits). base: a folder with the model, for nf4."""

    family: str
    adapter: str
    mesh: dict[str, int]
    level: str
    steps: int
    lr: float
    base: str | None = None


class Counted(TorchDispatchMode):
    """Bytes handed to each collective, and how often; what is not known by name is counted under its own."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.times: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look, and do it."""
        if func.namespace == "c10d":
            name = func._schema.name.partition("::")[2]
            kind, at = COLLECTIVES.get(name, (name, 0))
            self.bytes[kind] += _size(args[at])
            self.times[kind] += 1
        return func(*args, **(kwargs or {}))


def run(place: Path) -> None:
    """Run what stands in a file of JSON, see `Spec`."""
    spec = Spec(**json.loads(place.read_text()))
    alone = not spec.mesh
    torch.set_num_threads(1)
    if not alone:
        dist.init_process_group("gloo")
    parallel = None if alone else Parallel(spec.mesh, torch.device("cpu"))
    model = small(spec)
    shape = shape_of(model, "small")
    if spec.adapter != "full":
        model = attach(model, LoRA(rank=4), seed=1)
    plan = planned(spec, shape)
    decoder = None
    if decodes(model) is None:
        decoder = Decoder(model, plan.levels, tp=parallel.tp if parallel else None, hooked=bool(parallel and parallel.hooks))
    layout = shared(packed, parallel)
    engine = TorchEngine(open_backend("cpu"), parallel=parallel)
    engine.prepare(model, sft_loss(model, decoder), OptimSpec(weight_decay=0.01), plan, seed=1)

    losses: list[float] = []
    counted, expected = Counted(), 0
    for k, examples in enumerate(steps_of(spec.steps)):
        batch = layout(examples)
        expected += formula(spec, shape, batch, plan.levels)
        with counted:
            metrics = engine.step(batch, k, spec.lr)
        losses.append(engine.read([metrics])[0].loss)
    weights = {name: whole(value) for name, value in engine.state_dict().items() if name.startswith("weight/")}
    expected += 0 if alone else 4 * len(weights)  # in the first step: whether each has got a gradient
    if alone or dist.get_rank() == 0:
        save_file(weights, place.with_name("weights.safetensors"))
        result = {"losses": losses, "bytes": dict(counted.bytes), "times": dict(counted.times), "formula_bytes": expected}
        place.with_name("result.json").write_text(json.dumps(result))
    if not alone:
        dist.barrier()
        dist.destroy_process_group()


def small(spec: Spec) -> Any:
    """The same random model in every process."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from pantheraml.models.tiny import FAMILIES

    if spec.base is not None:
        four_bits = quantization("nf4", torch.float32)
        return AutoModelForCausalLM.from_pretrained(spec.base, quantization_config=four_bits, dtype=torch.float32)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4}
    own = {name: value for name, value in FAMILIES[spec.family].items() if name != "head_dim"}
    config = AutoConfig.for_model(spec.family, **sizes, vocab_size=VOCABULARY, max_position_embeddings=512, **own)
    return AutoModelForCausalLM.from_config(config).float()


def planned(spec: Spec, shape: Any) -> Any:
    """The plan of a single process; Parallel knows of the others."""
    asked = {
        "model": {"name": "small", "max_tokens": ROW, "dtype": "float32", "load_in_4bit": spec.adapter == "nf4"},
        "data": "rows",
        "batch": {"size": 8, "micro_tokens": MICRO},
        "adapter": "full" if spec.adapter == "full" else {"kind": "lora", "rank": 4},
        "hardware": {"kind": "cpu"},
    }
    backend = open_backend("cpu")
    plan = make_plan(Recipe.model_validate(asked), detect(("cpu",)), shape, longest_example=ROW, quantizers=backend.quantizers)
    return replace(plan, levels=(spec.level,) * shape.layers, compile=False, graphs=False, whole=False)


def steps_of(count: int) -> list[list[Example]]:
    """Steps of one to nine examples, of lengths that need several micro-batches, some without a label."""
    drawn = np.random.default_rng(0)

    def example() -> Example:
        length = int(drawn.integers(5, ROW))
        return Example(
            drawn.integers(7, VOCABULARY, length).astype(np.int32), drawn.random(length) < drawn.choice([0.0, 0.6, 1.0]), "drawn"
        )

    return [[example() for _ in range(int(drawn.integers(1, 10)))] for _ in range(count)]


def packed(examples: Any) -> StepBatch:
    """Rows of 64 tokens, two at once, several examples to a row."""
    return pack_step(list(examples), row_tokens=(ROW,), micro_tokens=MICRO, packing=True, pad_id=0, trim=True)


def formula(spec: Spec, shape: Any, batch: StepBatch, levels: Any) -> int:
    """What docs/distributed.md says that this process hands over in this step."""
    if not spec.mesh:
        return 0
    traffic = step_traffic(
        shape,
        spec.mesh,
        lora_rank=None if spec.adapter == "full" else 4,
        compute_bytes_each=4,
        levels=levels,
        tokens=sum(_filled(micro.input_ids.size, spec.mesh.get("cp", 1)) for micro in batch.micro),
        labelled=sum(len(micro.labelled) for micro in batch.micro),
        micro_batches=len(batch.micro),
        quantizer="nf4" if spec.adapter == "nf4" else None,
    )
    return traffic.payload_bytes


def whole(value: Any) -> torch.Tensor:
    """A weight from the pieces of all processes."""
    if not isinstance(value, Piece):
        return value.clone()
    total, held = torch.zeros(value.shape), torch.zeros(value.shape)
    place = tuple(slice(start, start + size) for start, size in zip(value.offsets, value.tensor.shape, strict=True))
    total[place], held[place] = value.tensor, 1.0
    dist.all_reduce(total)
    dist.all_reduce(held)  # copies are the same, and are counted as often as they are there
    return total / held


def _filled(tokens: int, parts: int) -> int:
    return -(-tokens // parts) * parts


def _size(argument: Any) -> int:
    if isinstance(argument, torch.Tensor):
        return argument.nbytes
    return sum(_size(each) for each in argument) if isinstance(argument, list | tuple) else 0
