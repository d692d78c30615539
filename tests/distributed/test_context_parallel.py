"""Rows divided over processes: what they exchange, that they learn what one process learns, and what is refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file
from tests.distributed.test_resume import largest, trained
from tests.distributed.test_torch_world import run
from tests.fakes import FakeBackend, laptop
from tests.tiny import chats, losses, tiny_recipe, written
from torch import distributed as dist

from pantheraml.data.chat import Example
from pantheraml.data.pack import StepBatch, in_one_row, pack_step, segments
from pantheraml.engines import torch_engine
from pantheraml.engines.parallel import Parallel
from pantheraml.engines.piece import Piece
from pantheraml.engines.torch_engine import TorchEngine
from pantheraml.errors import RecipeError
from pantheraml.kernels.context_parallel import ContextParallel
from pantheraml.kernels.sums import Sums
from pantheraml.models.adapters import attach
from pantheraml.models.decoder import Decoder
from pantheraml.models.load import shape_of
from pantheraml.models.tiny import tiny_config, tiny_tokenizer
from pantheraml.planning.memory import Level
from pantheraml.planning.plan import make_plan
from pantheraml.recipe.load import dump_recipe, load_recipe
from pantheraml.recipe.types import LoRA, OptimSpec, Recipe
from pantheraml.trainer.fast import shared
from pantheraml.trainer.sft import sft_loss

CPU = torch.device("cpu")
STEPS = 20
PROGRAM = "join(); from tests.distributed import test_context_parallel as those; those.{}"
# Rows of a length that no number of processes divides: what is taken at once has to be filled up.
ROW, MICRO = 49, 98


def test_a_row_is_filled_up_with_an_example_without_labels() -> None:
    rows = np.arange(10).reshape(2, 5)
    positions, labels = np.tile(np.arange(5), (2, 1)), rows + 1
    for multiple, more in ((2, 0), (4, 2), (3, 2), (16, 6)):
        ids, where, found = in_one_row(rows, positions, labels, multiple=multiple)
        assert ids.shape == where.shape == found.shape == (1, 10 + more)
        assert ids[0, :10].tolist() == rows.ravel().tolist() and found[0].tolist() == [*range(1, 11), *[-100] * more]
        assert segments(where)[0].tolist() == [0, 5, 10, *([10 + more] if more else [])]


# What is exchanged.


@pytest.mark.parametrize("size", [2, 4])
def test_every_process_gets_its_heads_of_all_tokens_and_its_tokens_of_all_heads(size: int) -> None:
    for code, printed in run(PROGRAM.format("exchange()"), size=size, timeout_s=500):
        assert code == 0, printed


def exchange() -> None:
    """Beside plain slices of the whole, in a process of several."""
    rank, size = dist.get_rank(), dist.get_world_size()
    sums = Sums(CPU)
    cp = ContextParallel(rank, size, None, sums)
    drawn = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        whole, weights = ([torch.randn(12, heads, 6, generator=drawn).to(dtype) for heads in (8, 4, 4)] for _ in range(2))

        def tokens(x: torch.Tensor) -> torch.Tensor:
            return x.chunk(size, 0)[rank]

        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.chunk(size, 1)[rank]

        own = [tokens(each).clone().requires_grad_() for each in whole]
        found = cp.to_heads(*own)
        assert all(torch.equal(a, heads(b)) and a.stride(-1) == 1 for a, b in zip(found, whole, strict=True))
        back = cp.to_tokens(found[0])
        assert torch.equal(back, own[0]) and back.is_contiguous()
        # Each number is weighed once, wherever it is: the gradient is its weight.
        sum((a * heads(w)).sum() for a, w in zip(found, weights, strict=True)).backward(retain_graph=True)
        assert all(torch.equal(each.grad, tokens(w)) for each, w in zip(own, weights, strict=True))
        (grad,) = torch.autograd.grad((back * tokens(weights[0])).sum(), found[0], retain_graph=True)
        assert torch.equal(grad, heads(weights[0]))
        (grad,) = torch.autograd.grad((back * tokens(weights[0])).sum(), own[0])
        assert torch.equal(grad, tokens(weights[0]))
    assert sums.take_s() > 0


# What is learned.


def test_two_processes_that_share_rows_learn_what_one_does() -> None:
    program = "\n".join(
        (
            PROGRAM.format("alike({'cp': 2}, 'llama', 'lora')"),
            "those.alike({'cp': 2}, 'llama', 'full', level='all')",
            "those.alike({'cp': 2}, 'gemma2', 'lora', level='tiled', steps=4)",  # windows and bounded scores
            "those.by_the_last_position()",
            "those.other_masks()",
        )
    )
    for code, printed in run(program, timeout_s=500):
        assert code == 0, printed


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"cp": 4}, {"dp": 2, "cp": 2}, {"fsdp": 2, "cp": 2}], ids=str)
def test_so_do_four(mesh: dict[str, int]) -> None:
    program = PROGRAM.format(f"alike({mesh}, 'llama', 'lora')") + f"\nthose.alike({mesh}, 'llama', 'full', level='all')"
    for code, printed in run(program, size=4, timeout_s=500):
        assert code == 0, printed


def alike(mesh: dict[str, int], family: str, adapter: str, *, level: Level = "cheap", steps: int = STEPS) -> None:
    """In a process of several: losses, weights, an evaluation and answers beside those of this process alone."""
    torch.set_num_threads(1)
    alone, together = (ready(each, family, adapter, level) for each in ({}, mesh))
    parts: list[tuple[int, int]] = []
    made = torch_engine.micro_tensors

    def seen(ids: np.ndarray, *given: Any, **how: Any) -> Any:
        batch = made(ids, *given, **how)
        parts.append((int((batch.labels != -100).sum()), batch.input_ids.numel() * mesh["cp"] - ids.size))
        return batch

    torch_engine.micro_tensors = seen
    for k, examples in enumerate(steps_of(steps)):
        torch_engine.micro_tensors = made
        one = alone.engine.read([alone.engine.step(alone.layout(examples), k, RATES[adapter])])[0]
        torch_engine.micro_tensors = seen
        several = together.engine.read([together.engine.step(together.layout(examples), k, RATES[adapter])])[0]
        assert several.ok and abs(several.loss - one.loss) <= 1e-6 * one.loss, (k, several, one)
        assert abs(several.grad_norm - one.grad_norm) <= 1e-4 * one.grad_norm, (k, several, one)
    torch_engine.micro_tensors = made
    here, there = ({name: whole(value) for name, value in each.engine.state_dict().items()} for each in (alone, together))
    assert here.keys() == there.keys()
    apart = {name: float((here[name] - there[name]).abs().max()) for name in here if name.startswith("weight/")}
    assert max(apart.values()) <= 1e-5, max(apart, key=lambda name: apart[name])
    # There were parts without a label, and parts that were filled up.
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, parts)
    assert any(not labels for each in gathered for labels, _ in each) and any(more for each in gathered for _, more in each)
    held_out = steps_of(3, seed=1)
    one, several = (each.engine.evaluate([each.layout(examples) for examples in held_out]) for each in (alone, together))
    assert abs(several - one) <= 1e-6 * one
    tokenizer, prompts = tiny_tokenizer(), [[5, 9, 11], [8]]
    answers = [each.engine.generate(tokenizer, prompts, max_new_tokens=4) for each in (alone, together)]
    assert answers[0] == answers[1]


RATES = {"lora": 1e-3, "full": 1e-4}


class Ready:
    """A model, and what trains it."""

    def __init__(self, model: Any, engine: TorchEngine, layout: Any, parallel: Parallel | None) -> None:
        self.model, self.engine, self.layout, self.parallel = model, engine, layout, parallel


def ready(mesh: dict[str, int], family: str, adapter: str, level: Level = "cheap", *, dropout: float = 0.0) -> Ready:
    """The same model in every process."""
    model = small(family)
    shape = shape_of(model, "here")
    if adapter == "lora":
        model = attach(model, LoRA(rank=4, dropout=dropout), seed=1)
    asked = {
        "model": {"name": "here", "max_tokens": ROW, "dtype": "float32"},
        "data": "rows",
        "batch": {"micro_tokens": MICRO},
        "adapter": adapter,
    }
    plan = make_plan(Recipe.model_validate(asked), laptop(), shape, longest_example=ROW)
    plan = replace(plan, levels=(level,) * shape.layers)
    parallel = Parallel(mesh, CPU) if mesh else None
    decoder = Decoder(model, plan.levels, hooked=bool(parallel and parallel.hooks))
    engine = TorchEngine(FakeBackend("cpu"), parallel=parallel)
    engine.prepare(model, sft_loss(model, decoder), OptimSpec(weight_decay=0.01), plan, seed=1)
    return Ready(model, engine, shared(packed, parallel), parallel)


def small(family: str, **more: Any) -> Any:
    from transformers import AutoModelForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4}
    windows = {"sliding_window": 7} if family == "gemma2" else {}
    config = tiny_config(family, **{**sizes, **windows, **more})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def packed(examples: Any) -> StepBatch:
    """Two rows at once, several examples to a row."""
    return pack_step(list(examples), row_tokens=(ROW,), micro_tokens=MICRO, packing=True, pad_id=0, trim=True)


def steps_of(count: int, *, seed: int = 0) -> list[list[Example]]:
    """Steps of several micro-batches, and of one; of a third of the examples nothing is learned."""
    drawn = np.random.default_rng(seed)

    def example() -> Example:
        length = int(drawn.integers(5, ROW + 1))
        learned = drawn.random(length) < drawn.choice([0.0, 0.6, 1.0])
        return Example(drawn.integers(7, 263, length).astype(np.int32), learned, "drawn")

    return [[example() for _ in range(int(drawn.integers(2, 10)))] for _ in range(count)]


def whole(value: Any) -> torch.Tensor:
    """A tensor from the pieces of all processes."""
    if not isinstance(value, Piece):
        return value.clone()
    total, held = torch.zeros(value.shape), torch.zeros(value.shape)
    place = tuple(slice(start, start + size) for start, size in zip(value.offsets, value.tensor.shape, strict=True))
    total[place], held[place] = value.tensor, 1.0
    dist.all_reduce(total)
    dist.all_reduce(held)
    return total / held


def by_the_last_position() -> None:
    """In a process of several: angles that go by the last position of all tokens are the same in every part of them."""
    factors = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 10000.0}
    cp = Parallel({"cp": 2}, CPU).cp
    assert cp is not None
    found = []
    for with_whom in (None, cp):
        model = small("phi3", rope_parameters=factors, original_max_position_embeddings=32)
        ids = torch.randint(7, 263, (1, 48), generator=torch.Generator().manual_seed(0)).numpy()
        batch = torch_engine.micro_tensors(ids, np.arange(48)[None], ids, CPU, cp=with_whom)
        with torch.no_grad():
            found.append(sft_loss(model, Decoder(model))(model, batch))
    dist.all_reduce(found[1])
    assert abs(float(found[1] / found[0]) - 1) < 1e-6


def other_masks() -> None:
    """In a process of several: those that have other tokens draw other random numbers."""
    made = ready({"cp": 2}, "llama", "lora", dropout=0.5)
    assert made.engine.read([made.engine.step(made.layout(steps_of(1)[0]), 0, 1e-3)])[0].ok
    seeds: list[Any] = [None, None]
    dist.all_gather_object(seeds, torch.initial_seed())
    assert seeds[0] != seeds[1]


# What cannot be.


@pytest.fixture
def two() -> Iterator[None]:
    """The first of two processes, of which the other is not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("two")
def test_what_the_kernels_do_not_compute_is_refused_before_it_trains() -> None:
    own_head = attach(small("llama"), LoRA(rank=4, targets=("lm_head", "q_proj")), seed=0)
    one_key_head = small("llama", num_key_value_heads=1)
    for model, why in ((own_head, "its output head is more than a matrix"), (one_key_head, "2 does not divide its 1 key heads")):
        with pytest.raises(RecipeError, match=r"hardware\.cp=2 does not go with this model") as caught:
            Parallel({"cp": 2}, CPU).divide(model)
        assert why in caught.value.why and "leave hardware.cp out" in caught.value.fix


@pytest.mark.usefixtures("two")
def test_a_part_of_the_tokens_is_not_for_the_models_own_forward() -> None:
    model = small("llama")
    ids = np.arange(8)[None] + 7
    batch = torch_engine.micro_tensors(ids, np.arange(8)[None], ids, CPU, cp=Parallel({"cp": 2}, CPU).cp)
    with pytest.raises(AssertionError, match="a part of the tokens"):
        sft_loss(model, static=True)(model, batch)


# A whole run.


@pytest.mark.slow
def test_a_run_of_four_goes_on_with_one(tmp_path: Path) -> None:
    rows = written(tmp_path / "rows.jsonl", chats(40))
    parts: dict[str, Any] = {"adapter": {"kind": "full"}, "batch": {"size": 6}, "optim": {"steps": 4, "lr": 1e-4}}
    parts["eval"] = {"every": 2, "generate_rows": 1}
    for name, hardware in (("four", {"devices": 4, "fsdp": 2, "cp": 2}), ("one", {})):
        recipe = tiny_recipe(tmp_path, rows, run={"name": name, "save_every": 2}, hardware=hardware, **parts)
        (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
        said = trained(tmp_path / "recipe.yaml", "train")
        assert name == "one" or ("fsdp 2 x cp 2" in said and "4 processes" in said)
    four, one = tmp_path / "four", tmp_path / "one"
    assert losses(four) == pytest.approx(losses(one), rel=1e-6)
    assert losses(four, "eval_loss") == pytest.approx(losses(one, "eval_loss"), rel=1e-6)
    weights = [load_file(each / "model" / "model.safetensors") for each in (four, one)]
    assert largest(*weights) < 1e-5

    for left in ("model", "checkpoints/step-00000004", "logs"):
        shutil.rmtree(four / left)
    for report in four.glob("report.*"):
        report.unlink()
    asked = load_recipe(four / "recipe.yaml")
    hardware = asked.hardware.model_copy(update={"devices": 1, "fsdp": "auto", "cp": 1})
    (four / "recipe.yaml").write_text(dump_recipe(asked.model_copy(update={"hardware": hardware})))
    assert "Going on after step 2 of 4" in trained(four, "resume")
    assert largest(weights[1], load_file(four / "model" / "model.safetensors")) < 1e-5


@pytest.mark.slow
def test_where_one_that_shares_rows_hangs_the_stacks_say_where_the_other_waits(tmp_path: Path) -> None:
    """The launcher must be first to give up: a group of some of the processes waits no shorter than that of all."""
    rows = written(tmp_path / "rows.jsonl", chats(40))
    words = f"tiny:llama {rows} run.folder={tmp_path} run.name=it run.log_every=1 batch.size=4 optim.steps=2000 adapter.rank=4"
    words += (
        " model.dtype=float32 eval.generate_rows=0 eval.every=end hardware.kind=cpu hardware.threads=1 hardware.cp=2 hardware.timeout_s=4"
    )
    environment = {**os.environ, "PANTHERAML_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "pantheraml", "train", *words.split()]
    launcher = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = tmp_path / "it" / "metrics.jsonl"
    while launcher.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) > 4):
        time.sleep(0.05)
    second = next(each for each in psutil.Process(launcher.pid).children() if each.environ().get("RANK") == "1")
    second.suspend()
    printed, _ = launcher.communicate(timeout=200)
    assert launcher.returncode == 4 and "gave no sign of life for 4 s" in printed, printed
    assert "Timed out waiting" not in printed, printed
    stacks = (tmp_path / "it" / "logs" / "rank-00000.log").read_text()
    assert "in _backward" in stacks or "in forward" in stacks or "in sum_gradients" in stacks or "in totals" in stacks, stacks
