"""What processes of one model have in common after every step, whatever stands in their shares of it: four real processes, by gloo."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PROCESSES, DRIFT_STEPS = 4, 25

PROGRAM = """
import json, sys
import numpy as np
import torch
import torch.distributed as dist
from tests.fakes import FakeBackend, laptop
from tests.planning.test_traffic import made
from torch import nn
from pantheraml.data.chat import Example
from pantheraml.data.pack import pack_step, share_step
from pantheraml.engines.flat import local_part
from pantheraml.engines.parallel import Parallel
from pantheraml.engines.torch_engine import TorchEngine
from pantheraml.errors import PantheraError
from pantheraml.models.decoder import Decoder
from pantheraml.models.load import shape_of
from pantheraml.planning.plan import make_plan
from pantheraml.recipe.types import OptimSpec, Recipe
from pantheraml.trainer.sft import sft_loss

torch.set_num_threads(1)
dist.init_process_group("gloo")

def start(mesh, family="llama", *, prepare=lambda model, parallel: None, decoded=True):
    torch.manual_seed(0)
    model = made(family)
    shape = shape_of(model, "here")
    asked = {"model": {"name": "here", "max_tokens": 32, "dtype": "float32"}, "data": "rows", "batch": {"micro_tokens": 64}, "adapter": "full"}
    plan = make_plan(Recipe.model_validate(asked), laptop(), shape, longest_example=32)
    parallel = Parallel(mesh, torch.device("cpu"), 60)
    engine = TorchEngine(FakeBackend("cpu"), parallel=parallel)
    decoder = Decoder(model, ("keep",) * shape.layers, tp=parallel.tp, hooked=parallel.hooks) if decoded else None
    prepare(model, parallel)
    engine.prepare(model, sft_loss(model, decoder), OptimSpec(weight_decay=0.1), plan, seed=0)
    return model, parallel, engine

def share(k, parallel):
    drawn = np.random.default_rng(k)
    examples = [Example(drawn.integers(7, 263, n).astype(np.int32), np.arange(n) >= n // 2, "") for n in drawn.integers(3, 32, 16)]
    layout = lambda some: pack_step(list(some), row_tokens=(32,), micro_tokens=64, packing=True, pad_id=0, trim=False)
    return share_step(examples, layout, rank=parallel.data_rank, size=parallel.data_size, in_step=parallel.in_step)

def expert(mesh, reached):
    # A weight as of an expert in a mixture: only the micro-batches of some shares reach it.
    def add(model, parallel):
        mlp = model.model.layers[0].mlp
        mlp.expert = nn.Parameter(torch.ones(4))
        own = mlp.forward
        mlp.forward = lambda x: own(x) + (mlp.expert.sum() if parallel.data_rank in reached else 0.0)

    model, parallel, engine = start(mesh, prepare=add, decoded=False)
    found = []
    try:
        for k in range(3):
            engine.step(share(k, parallel), k, 1e-2)
            weight = model.model.layers[0].mlp.expert
            found.append((weight.full_tensor() if hasattr(weight, "full_tensor") else weight).tolist())
    except PantheraError as error:
        return error.what
    return found

def drift(family):
    # Which of the weights that all processes of tp have as a whole are not the same, to the bit.
    model, parallel, engine = start({"fsdp": 2, "tp": 2}, family)
    for k in range(int(sys.argv[1])):
        engine.step(share(k, parallel), k, 1e-2)
    mine = {name: local_part(each).detach().clone() for name, each in model.named_parameters() if not parallel.kind(name).startswith("part ")}
    every = [None] * 4
    dist.all_gather_object(every, mine)
    rank = dist.get_rank()
    return len(mine), [name for name, value in mine.items() if not torch.equal(value, every[rank ^ 1][name])]

def read_in(dtype):
    # The weights after some steps of a model that was read in this dtype; they were stored in bfloat16.
    def read(model, parallel):
        for each in model.parameters():
            each.data = each.data.bfloat16().to(dtype)

    model, parallel, engine = start({"fsdp": 4}, prepare=read)
    for k in range(3):
        engine.step(share(k, parallel), k, 1e-2)
    return {name: (str(each.dtype), local_part(each).detach().double().sum().item()) for name, each in model.named_parameters()}

found = {f"{mesh} {reached}": expert(mesh, reached) for mesh in ({"dp": 4}, {"fsdp": 4}) for reached in ([1, 3], [])}
found |= {str(dtype): read_in(dtype) for dtype in (torch.bfloat16, torch.float32)}
found |= {family: drift(family) for family in ("llama", "qwen3")}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    """What each of the processes found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(PROCESSES):
        said = {"RANK": rank, "WORLD_SIZE": PROCESSES, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        environment = {**os.environ, **{name: str(value) for name, value in said.items()}, "TORCH_CPP_LOG_LEVEL": "ERROR"}
        words = [sys.executable, "-c", PROGRAM, str(DRIFT_STEPS)]
        started.append(subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    try:
        printed = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * PROCESSES, "\n".join(printed)
    return [json.loads(text.splitlines()[-1]) for text in printed]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"dp": 4}, {"fsdp": 4}], ids=str)
def test_a_parameter_that_some_shares_never_reach_trains(found: list[dict[str, Any]], mesh: dict[str, int]) -> None:
    moved = [each[f"{mesh} [1, 3]"] for each in found]
    assert all(each == moved[0] for each in moved)
    # The first step of AdamW is the rate, whatever the gradient.
    assert [abs(value - 1) for value in moved[0][0]] == pytest.approx([1e-2] * 4, rel=1e-3)
    assert len({tuple(each) for each in moved[0]}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"dp": 4}, {"fsdp": 4}], ids=str)
def test_a_parameter_that_no_share_reaches_is_an_error_in_all(found: list[dict[str, Any]], mesh: dict[str, int]) -> None:
    assert {str(each[f"{mesh} []"]) for each in found} == {"1 of 31 trainable parameters got no gradient: model.layers.0.mlp.expert"}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_what_processes_of_tp_have_as_a_whole_stays_the_same(found: list[dict[str, Any]], family: str) -> None:
    """FSDP sums their gradients, and not over tp: sums of activations have the same bits in all processes, and so has what follows from them."""
    for count, different in (each[family] for each in found):
        assert count > 5 and not different


@pytest.mark.slow
def test_a_divided_model_that_is_read_as_it_is_stored_becomes_float32_part_by_part(found: list[dict[str, Any]]) -> None:
    for each in found:
        assert each["torch.bfloat16"] == each["torch.float32"] and {dtype for dtype, _ in each["torch.bfloat16"].values()} == {
            "torch.float32"
        }
