"""The names that users know for several GPUs: a script under torchrun, every field of its configuration, and where a model is put."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.fakes import GIB, FakeBackend, h100s, laptop
from tests.tiny import chats, quiet
from transformers import AutoModelForCausalLM

import pantheraml
from pantheraml import FastLanguageModel, MultiGPUConfig, PantheraMLDistributedTrainer, Trainer, TrainingArguments
from pantheraml.api import _index, _Origin, _origin
from pantheraml.distributed import (
    balanced_device_map,
    cleanup_distributed_training,
    get_rank,
    get_world_size,
    is_main_process,
    multi_gpu,
    setup_distributed_training,
    setup_multi_gpu,
)
from pantheraml.errors import DeviceError, PantheraError, RecipeError
from pantheraml.hardware.device import Inventory
from pantheraml.hardware.find import find_own
from pantheraml.models.load import empty_model, read_config
from pantheraml.models.tiny import tiny_config
from pantheraml.recipe.types import HardwareAsk, ModelSpec
from pantheraml.trainer.survey import _with_room

ROOT = Path(__file__).parents[2]
ROWS = chats(24)
FAST = {"data": {"eval_fraction": 0}, "eval": {"generate_rows": 0}, "hardware": {"threads": 1}}
COPIES: dict[str, Any] = {
    "auto_device_map": False,
    "use_gradient_checkpointing": True,
    "find_unused_parameters": True,
    "timeout_minutes": 2,
}
SAID = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nobody has started several processes, and nothing has been said."""
    for name in SAID:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(multi_gpu, "_said", set())
    yield
    cleanup_distributed_training()


def started(monkeypatch: pytest.MonkeyPatch, rank: int, size: int) -> None:
    """As torchrun says it to the processes of one machine."""
    for name, value in zip(SAID, (rank, rank, size, size, "localhost", 1), strict=True):
        monkeypatch.setenv(name, str(value))


def arguments(folder: Path, name: str, **more: Any) -> TrainingArguments:
    asked: dict[str, Any] = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "recipe": FAST}
    return TrainingArguments(output_dir=str(folder), run_name=name, **{**asked, **more})


def adapted(**load: Any) -> tuple[Any, Any]:
    model, tokenizer = FastLanguageModel.from_pretrained("tiny:llama", max_seq_length=64, dtype="float32", **{"device": "cpu", **load})
    return FastLanguageModel.get_peft_model(model, r=4), tokenizer


def nameless() -> Any:
    """A model that exists in memory only, every weight of which trains but its embeddings."""
    torch.manual_seed(3)
    model: Any = AutoModelForCausalLM.from_config(tiny_config("llama"), dtype=torch.float32)
    model.get_input_embeddings().weight.requires_grad_(False)
    return model


# ---- Two processes -----------------------------------------------------------------------------------------------

TOGETHER = """
import os
import sys
import torch.distributed as dist
from pathlib import Path
from tests.distributed.test_multi_gpu_names import COPIES, FAST, ROWS, adapted, arguments, nameless
from pantheraml import Trainer
from pantheraml.distributed import get_rank, get_world_size, is_main_process
from pantheraml.errors import PantheraError

assert (state.world_size, state.local_rank, state.backend, str(state.device)) == (2, state.rank, "gloo", "cpu")
assert (get_rank(), get_world_size(), is_main_process()) == (state.rank, 2, state.is_first)
assert run.folder == Path("runs/together") and run.report["train"]["steps"] == 2
cleanup_distributed_training()
assert not dist.is_initialized()

config = MultiGPUConfig(num_gpus=2, backend="gloo", init_method="env://", **COPIES)
state = setup_distributed_training(config)
assert dist.is_initialized() and setup_distributed_training(config) == state and state.rank == dist.get_rank()

def refused(do):
    try:
        do()
    except PantheraError as error:
        sys.stderr.write(f"refused: {error}\\n")
    else:
        raise AssertionError("it was not refused")

def args(name):
    return arguments(Path("runs"), name)

refused(lambda: setup_distributed_training(MultiGPUConfig(num_gpus=4)))
refused(lambda: setup_distributed_training(MultiGPUConfig(tensor_parallel_size=3)))
refused(lambda: adapted(use_multi_gpu=False))

model, words = adapted(use_multi_gpu=True, auto_device_map=True)
PantheraMLDistributedTrainer(model, words, ROWS, args=args("copies"), multi_gpu_config=config).train()
model.save_pretrained_merged("merged", words)

model, words = adapted()
PantheraMLDistributedTrainer(model, words, ROWS, args=args("products"), multi_gpu_config=MultiGPUConfig(tensor_parallel=True)).train()
refused(lambda: model.save_pretrained_merged("part", words))
refused(lambda: Trainer(model, words, ROWS))

# A Trainer that knows nothing of the others but what its recipe says.
model = nameless()
model.requires_grad_(True)
Trainer(model, words, ROWS, args=arguments(Path("runs"), "parts", recipe={**FAST, "hardware": {"parallel": "fsdp", "threads": 1}})).train()
PantheraMLDistributedTrainer(nameless(), words, ROWS, args=args("frozen"), multi_gpu_config=MultiGPUConfig(parallel="fsdp")).train()

mine = ROWS if state.is_first else ROWS[1:]
refused(lambda: PantheraMLDistributedTrainer(*adapted(), mine, args=args("other")).train())
os.write(1, f"rank {state.rank} is done\\n".encode())
"""


def block() -> str:
    """The script of docs/distributed.md."""
    text = (ROOT / "docs" / "distributed.md").read_text("utf-8").partition("## In a script of your own")[2]
    found = re.search(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert found
    return found[1]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(where two processes ran the script, what they printed)"""
    folder = tmp_path_factory.mktemp("together")
    (folder / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "train.py").write_text(block() + TOGETHER)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PANTHERAML_DEVICE_TYPE": "cpu",
        "PYTHONWARNINGS": "ignore",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return folder, ran.stdout + ran.stderr


def single(folder: Path, name: str, model: Any, tokenizer: Any, **config: Any) -> dict[str, torch.Tensor]:
    """What one process learns."""
    console, _ = quiet()
    args = arguments(folder, name)
    trainer = PantheraMLDistributedTrainer(model, tokenizer, ROWS, args=args, console=console, multi_gpu_config=MultiGPUConfig(**config))
    return results(trainer.train().folder)


def results(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors" if (run / "adapter").is_dir() else run / "model" / "model.safetensors")


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """In float32 only the order of additions differs; of a gradient that is all rounding AdamW makes steps of up to the rate, here 1e-3."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5, msg=lambda said, name=name: f"{name}: {said}")


@pytest.mark.slow
def test_two_processes_learn_what_one_does(together: tuple[Path, str], tmp_path: Path) -> None:
    folder, said = together
    assert "rank 0 is done" in said and "rank 1 is done" in said and "2 steps by 2 processes, this one on cpu" in said
    runs = folder / "runs"
    plans = {name: json.loads((runs / name / "plan.json").read_text()) for name in ("together", "copies", "products", "parts", "frozen")}
    assert {name: plan["mesh"] for name, plan in plans.items()} == {
        "together": {"dp": 2},
        "copies": {"dp": 2},
        "products": {"tp": 2},
        "parts": {"fsdp": 2},
        "frozen": {"fsdp": 2},
    }
    assert set(plans["copies"]["levels"]) == {"all"} != set(plans["products"]["levels"])
    wanted = single(tmp_path, "one", *adapted())
    assert max(float(value.abs().max()) for name, value in wanted.items() if "lora_B" in name) > 1e-3
    assert_close(results(runs / "copies"), wanted)
    assert_close(results(runs / "products"), wanted)
    merged = load_file(folder / "merged" / "model.safetensors")
    assert merged.keys() == load_file(runs / "copies" / "base" / "model.safetensors").keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["parts", "frozen"])
def test_a_model_in_parts_is_whole_in_the_folder(together: tuple[Path, str], tmp_path: Path, name: str) -> None:
    _, tokenizer = adapted()
    model = nameless()
    if name == "parts":
        model.requires_grad_(True)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    wanted = single(tmp_path, name, model, tokenizer)
    found = results(together[0] / "runs" / name)
    assert_close(found, wanted)
    same = {key for key, value in found.items() if value.equal(before[key])}
    assert same == ({"model.embed_tokens.weight"} if name == "frozen" else set())


@pytest.mark.slow
def test_what_two_processes_refuse_is_said(together: tuple[Path, str]) -> None:
    said = together[1]
    for text in (
        "4 processes are wanted (num_gpus=4), and torchrun has started 2",
        "start it with torchrun --nproc-per-node 4 SCRIPT.py, or leave num_gpus out",
        "3 processes are wanted (tensor_parallel_size=3), and torchrun has started 2",
        "use_multi_gpu=False, and torchrun has started 2 processes",
        "this process has only a part of the model",
        "each process has only a part of this model",
        "process 1 of 2 has read other rows than process 0",
    ):
        assert text in said, text
    assert said.count("refused: ") == 2 * 6


# ---- The configuration -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "keys"),
    [
        ({}, {}),
        ({"num_gpus": 8}, {"devices": 8}),
        ({"num_gpus": 8, "data_parallel_size": 2, "tensor_parallel_size": 2}, {"devices": 8, "dp": 2, "tp": 2}),
        ({"tensor_parallel": True}, {"parallel": "tp"}),
        ({"tensor_parallel": True, "tensor_parallel_size": 4}, {"tp": 4}),
        ({"tensor_parallel": True, "parallel": "fsdp_tp"}, {"parallel": "fsdp_tp"}),
        ({"parallel": "fsdp"}, {"parallel": "fsdp"}),
        ({"parallel": "cp", "data_parallel_size": 2}, {"parallel": "cp", "dp": 2}),
        ({"auto_device_map": False}, {"parallel": "ddp"}),
        ({"use_gradient_checkpointing": True}, {"checkpointing": "on"}),
        ({"use_gradient_checkpointing": False}, {"checkpointing": "off"}),
        ({"timeout_minutes": 0.5}, {"timeout_s": 30.0}),
        # What says nothing to the plan.
        ({"backend": "gloo", "init_method": "env://", "find_unused_parameters": True, "pipeline_parallel_size": 1}, {}),
    ],
)
def test_a_configuration_becomes_keys_of_a_recipe(said: dict[str, Any], keys: dict[str, Any]) -> None:
    assert MultiGPUConfig(**said).hardware() == keys
    HardwareAsk.model_validate(keys)


@pytest.mark.parametrize(
    ("said", "what"),
    [
        ({"num_gpus": 0}, "num_gpus=0) is no number of devices"),
        ({"data_parallel_size": True}, "data_parallel_size=True) is no number of devices"),
        ({"tensor_parallel_size": "2"}, "tensor_parallel_size='2') is no number of devices"),
        ({"tensor_parallel": 2}, "tensor_parallel=2) is neither True nor False"),
        ({"use_gradient_checkpointing": "unsloth"}, "use_gradient_checkpointing='unsloth') is neither True nor False"),
        ({"pipeline_parallel": True}, "pipeline_parallel=True) is not possible"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size=2) is not possible"),
        ({"init_method": "tcp://10.0.0.1:29500"}, "init_method='tcp://10.0.0.1:29500') is not possible"),
        ({"timeout_minutes": 0}, "timeout_minutes=0) is no time"),
        ({"timeout_minutes": float("nan")}, "timeout_minutes=nan) is no time"),
        ({"parallel": "zero3"}, "parallel='zero3') is not known"),
        ({"num_gpus": 8, "tensor_parallel_size": 3}, "num_gpus=8) does not go with data_parallel_size=1 and tensor_parallel_size=3"),
        ({"parallel": "ddp", "tensor_parallel_size": 2}, "parallel='ddp') contradicts tensor parallelism"),
        ({"parallel": "cp", "tensor_parallel_size": 2}, "parallel='cp') contradicts tensor parallelism"),
        ({"auto_device_map": False, "tensor_parallel": True}, "auto_device_map=False) contradicts tensor parallelism"),
        ({"auto_device_map": False, "parallel": "fsdp"}, "auto_device_map=False) contradicts parallel='fsdp'"),
    ],
)
def test_what_no_configuration_can_be_is_refused(said: dict[str, Any], what: str) -> None:
    with pytest.raises(RecipeError) as refused:
        MultiGPUConfig(**said)
    assert str(refused.value).startswith(f"MultiGPUConfig({what}\n  why: ") and "\n  fix: " in str(refused.value)


def test_one_process_is_set_up_alone() -> None:
    state = setup_distributed_training(device="cpu")
    assert (state.rank, state.world_size, state.local_rank, state.backend, state.is_first) == (0, 1, 0, None, True)
    assert state.device == torch.device("cpu") and setup_multi_gpu(MultiGPUConfig(num_gpus=1, backend="gloo"), device="cpu") == state
    assert (get_rank(), get_world_size(), is_main_process()) == (0, 1, True)
    assert not torch.distributed.is_initialized()
    cleanup_distributed_training()  # twice is as good as once
    cleanup_distributed_training()


def test_what_is_asked_for_and_not_there_is_refused_with_the_real_count() -> None:
    with pytest.raises(RecipeError, match=r"2 processes are wanted \(num_gpus=2\), and this script runs as 1, without torchrun") as refused:
        setup_distributed_training(MultiGPUConfig(num_gpus=2), device="cpu")
    assert "1 of kind cpu answered here" in refused.value.why and "torchrun --nproc-per-node 2 SCRIPT.py" in refused.value.fix
    with pytest.raises(RecipeError, match=r"4 processes are wanted \(data_parallel_size=4\)"):
        setup_distributed_training(MultiGPUConfig(data_parallel_size=4), device="cpu")
    with pytest.raises(RecipeError, match=r"backend='nccl'\) does not go with cpu:0") as refused:
        setup_distributed_training(MultiGPUConfig(backend="nccl"), device="cpu")
    assert "gloo is what these devices talk through" in refused.value.fix
    with pytest.raises(RecipeError, match="it takes a MultiGPUConfig"):
        setup_distributed_training(2)  # pyright: ignore[reportArgumentType] - what is tested


def test_several_gpus_for_one_process_are_mentioned_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    at(monkeypatch, h100s(4))
    monkeypatch.setattr(multi_gpu, "backend_of", lambda device: FakeBackend(count=4))
    for _ in range(2):
        setup_distributed_training()
    assert len(caplog.records) == 1 and "torchrun --nproc-per-node 4 SCRIPT.py" in caplog.text


def test_a_trainer_says_what_contradicts_its_configuration(tmp_path: Path) -> None:
    model, tokenizer = adapted()
    with pytest.raises(RecipeError, match=r"asks for hardware\.parallel=ddp, and the other arguments for fsdp"):
        PantheraMLDistributedTrainer(
            model,
            tokenizer,
            ROWS,
            args=arguments(tmp_path, "run", recipe={"hardware": {"parallel": "fsdp"}}),
            multi_gpu_config=MultiGPUConfig(parallel="ddp"),
        )
    with pytest.raises(RecipeError, match=r"asks for hardware\.checkpointing=off, and the other arguments for on"):
        PantheraMLDistributedTrainer(
            model,
            tokenizer,
            ROWS,
            args=arguments(tmp_path, "run", gradient_checkpointing=True),
            multi_gpu_config=MultiGPUConfig(use_gradient_checkpointing=False),
        )
    trainer = PantheraMLDistributedTrainer(
        model, tokenizer, ROWS, args=arguments(tmp_path, "run"), multi_gpu_config=MultiGPUConfig(timeout_minutes=1)
    )
    assert (trainer.recipe.hardware.timeout_s, trainer.recipe.hardware.threads, trainer.recipe.hardware.kind) == (60.0, 1, "cpu")


def test_several_devices_in_one_process_are_refused_before_it_trains(tmp_path: Path) -> None:
    model, tokenizer = adapted()
    trainer = Trainer(model, tokenizer, ROWS, args=arguments(tmp_path, "run", recipe={"hardware": {"devices": 2}}), console=quiet()[0])
    with pytest.raises(DeviceError, match="2 devices are to train together, and 1 process of the run is here") as refused:
        trainer.train()
    assert "torchrun --nproc-per-node 2 SCRIPT.py" in refused.value.fix
    with pytest.raises(DeviceError, match="2 devices are to train together"):
        pantheraml.train("tiny:llama", ROWS, hardware__devices=2, hardware__kind="cpu", run__folder=str(tmp_path), console=quiet()[0])


def test_the_names_are_where_people_look() -> None:
    from pantheraml.trainer import PantheraMLDistributedTrainer as Same

    assert Same is PantheraMLDistributedTrainer is pantheraml.PantheraMLDistributedTrainer
    assert "PantheraMLTPUTrainer" in dir(pantheraml.trainer)


# ---- Where a model is put ----------------------------------------------------------------------------------------


def at(monkeypatch: pytest.MonkeyPatch, inventory: Inventory) -> None:
    """This machine has other devices than it has."""

    def detect(kinds: Any = None, **_: Any) -> Inventory:
        return replace(inventory, devices=tuple(each for each in inventory.devices if kinds is None or each.kind in kinds))

    monkeypatch.setattr("pantheraml.hardware.find.detect", detect)


def put(device: str = "auto", **said: bool | None) -> tuple[str, int]:
    """(device, over how many it is spread)"""
    words = {"use_multi_gpu": None, "auto_device_map": None, "use_tpu": None, **said}
    found, spread = multi_gpu.device_for_model(device, **words)
    return str(found.device), len(spread)


@pytest.mark.parametrize(
    ("said", "where"),
    [
        ({}, ("cuda:0", 0)),
        ({"use_multi_gpu": True}, ("cuda:0", 4)),
        ({"auto_device_map": True}, ("cuda:0", 4)),
        ({"use_multi_gpu": False, "auto_device_map": True}, ("cuda:0", 4)),
        ({"use_multi_gpu": False}, ("cuda:0", 0)),
        ({"device": "cuda:2"}, ("cuda:2", 0)),
        ({"device": "cpu", "auto_device_map": True}, ("cpu:0", 0)),
    ],
)
def test_one_process_spreads_a_model_where_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, said: dict[str, Any], where: tuple[str, int]
) -> None:
    at(monkeypatch, h100s(4))
    assert put(**said) == where


@pytest.mark.parametrize("rank", [0, 3])
def test_each_process_loads_on_its_own_gpu(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    at(monkeypatch, h100s(4))
    started(monkeypatch, rank, 4)
    assert put() == put(use_multi_gpu=True) == put(use_multi_gpu=True, auto_device_map=True) == (f"cuda:{rank}", 0)
    assert put("gpu") == (f"cuda:{rank}", 0) and put("cuda:1") == ("cuda:1", 0)  # an index is meant for this process
    assert put("cpu", use_multi_gpu=True) == ("cpu:0", 0)


def test_fewer_gpus_than_processes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, h100s(2))
    started(monkeypatch, 0, 4)
    with pytest.raises(DeviceError, match="4 processes were started on this machine, and 2 of kind cuda answered") as refused:
        put(use_multi_gpu=True)
    assert "torchrun --nproc-per-node 2" in refused.value.fix
    with pytest.raises(DeviceError, match="1 of kind cuda answered from cuda:1 on"):
        find_own(HardwareAsk(kind="cuda", index=1))
    started(monkeypatch, 1, 2)
    assert str(find_own(HardwareAsk(kind="cuda")).device) == "cuda:1"


@pytest.mark.parametrize(
    ("inventory", "said", "error"),
    [
        (laptop(), {"use_multi_gpu": True}, "use_multi_gpu=True, and no GPU answered here: cpu:0"),
        (h100s(1), {"use_multi_gpu": True, "auto_device_map": True}, "use_multi_gpu=True, and one GPU answered here: cuda:0"),
        (h100s(4), {"use_multi_gpu": True, "auto_device_map": False}, "one process runs this script, where 4 GPUs are"),
        (h100s(4), {"use_multi_gpu": True, "use_tpu": True}, "use_multi_gpu=True and use_tpu=True"),
        (h100s(4), {"use_multi_gpu": True, "device": "tpu"}, "use_multi_gpu=True and device='tpu'"),
        (h100s(4), {"use_tpu": True, "device": "cuda"}, "use_tpu=True and device='cuda'"),
        (h100s(4), {"use_tpu": False, "device": "tpu"}, "use_tpu=False and device='tpu'"),
        (h100s(4), {"auto_device_map": True, "device": "cuda:1"}, "auto_device_map=True and device='cuda:1'"),
        (h100s(4), {"use_tpu": True}, "use_tpu=True asks for tpu, but no tpu device answered"),
    ],
)
def test_what_contradicts_itself_or_is_not_here_is_refused(
    monkeypatch: pytest.MonkeyPatch, inventory: Inventory, said: dict[str, Any], error: str
) -> None:
    at(monkeypatch, inventory)
    with pytest.raises(PantheraError, match=re.escape(error)) as refused:
        put(**said)
    assert refused.value.why and refused.value.fix


def test_a_model_that_has_a_single_place_is_put_there_and_that_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            model, _ = FastLanguageModel.from_pretrained("tiny:llama", device="cpu", auto_device_map=True)
    assert [each.message for each in caplog.records if "auto_device_map" in each.message] == [
        "auto_device_map=True: the model lies on cpu:0 as a whole, since it is the only one of its kind here."
    ]
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_a_model_is_spread_over_the_gpus_of_one_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plain, tokenizer = FastLanguageModel.from_pretrained("tiny:llama", dtype="float32", device="cpu")
    at(monkeypatch, h100s(2))
    fake = FakeBackend(count=2, memory_bytes=GIB)
    monkeypatch.setattr("pantheraml.hardware.backend.backend_of", lambda device: fake)
    model, _ = FastLanguageModel.from_pretrained("tiny:llama", dtype="float32", use_multi_gpu=True)
    assert {"model.embed_tokens", "model.layers.0", "model.layers.3", "model.norm", "lm_head"} <= model.hf_device_map.keys()
    with torch.no_grad():
        row = torch.tensor([[1, 40, 80]])
        assert torch.equal(model(input_ids=row).logits, plain(input_ids=row).logits)
    # Weights from a folder are read to where they belong.
    plain.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    places = model.hf_device_map
    given: list[Any] = []
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *name, **said: given.append(said["device_map"]) or load(*name, **said)
    )
    model, _ = FastLanguageModel.from_pretrained(str(tmp_path / "model"), dtype="float32", use_multi_gpu=True)
    assert given == [places]
    with torch.no_grad():
        assert torch.equal(model(input_ids=row).logits, plain(input_ids=row).logits)
    # What lies on several devices is for answers.
    model = FastLanguageModel.get_peft_model(plain, r=4)
    model.get_output_embeddings().to("meta")
    with pytest.raises(RecipeError, match="this model lies on cpu, meta") as refused:
        Trainer(model, tokenizer, ROWS, args=arguments(tmp_path, "run"))
    assert "torchrun" in refused.value.fix
    with pytest.raises(RecipeError, match="eight bits cannot be spread"):
        fake.quantizers = ("int8",)
        FastLanguageModel.from_pretrained("tiny:llama", load_in_8bit=True, use_multi_gpu=True)


def test_a_process_without_room_for_the_whole_loads_it_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    started(monkeypatch, 1, 2)
    seen: list[bool] = []

    def loading_device(backend: Any, index: int, *, divided: bool = False) -> torch.device:
        seen.append(divided)
        return torch.device("cpu")

    monkeypatch.setattr("pantheraml.engines.open.loading_device", loading_device)
    monkeypatch.setattr("pantheraml.hardware.backend.backend_of", lambda device: FakeBackend(count=2))
    for free_bytes, wanted in ((80 * GIB, False), (3_500_000, True)):  # tiny:llama in float32 has 3,222,528 bytes
        gpus = tuple(replace(each, free_bytes=free_bytes) for each in h100s(2).devices)
        at(monkeypatch, Inventory(devices=gpus))
        model, _ = FastLanguageModel.from_pretrained("tiny:llama", dtype="float32", use_multi_gpu=True)
        origin = _origin(model)
        assert seen[-1] is wanted and (origin.device, origin.index) == ("cuda", 1)
        assert _index(model, replace(origin, on_host=True)) == 0  # a recipe has that of the first process
    at(monkeypatch, Inventory(devices=tuple(replace(each, free_bytes=1_900_000) for each in h100s(2).devices)))
    monkeypatch.setattr("pantheraml.trainer.run.usable_memory", lambda: (GIB, 2_000_000))  # two processes, 1,611,264 bytes each
    with pytest.raises(DeviceError, match=r"2 processes would read all of tiny:llama in bfloat16"):
        FastLanguageModel.from_pretrained("tiny:llama", dtype="bfloat16", use_multi_gpu=True)


def test_a_model_must_be_on_the_gpu_of_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    started(monkeypatch, 1, 2)

    def index(of: int) -> int:
        model: Any = SimpleNamespace(device=torch.device("cuda", of))
        return _index(model, _Origin(spec=TINY))

    assert (index(1), index(2)) == (0, 1)
    with pytest.raises(RecipeError, match="process 1 of this machine has its model on cuda:0"):
        index(0)


def test_what_all_processes_hold_of_the_model_counts_as_free() -> None:
    four = h100s(4, memory_gib=10).devices[:4]
    found = _with_room(Inventory(devices=four), four[1], GIB, 2)
    assert {each.free_bytes for each in found.devices} == {11 * GIB}
    assert [each.free_bytes for each in _with_room(Inventory(devices=four), four[1], GIB, 1).devices] == [
        size * GIB for size in (10, 11, 10, 10)
    ]
    shared = laptop(16)
    assert _with_room(shared, shared.devices[0], GIB, 4).devices[0].free_bytes == 20 * GIB


# ---- Device maps -------------------------------------------------------------------------------------------------

TINY = ModelSpec(name="tiny:llama")


def filled(model: Any, placed: dict[str, int], free_bytes: dict[int, int]) -> list[float]:
    """Share of what is free that is taken on each device: counted from the weights, each where the longest name that fits says."""
    taken = dict.fromkeys(free_bytes, 0)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        owner = max((key for key in placed if f"{name}.".startswith(f"{key}.")), key=len)
        taken[placed[owner]] += tensor.numel() * tensor.element_size()
    return [taken[index] / free_bytes[index] for index in free_bytes]


@pytest.mark.parametrize(
    "free_bytes", [{0: 10**8, 1: 10**8}, {0: 10**8, 1: 3 * 10**8}, {2: 10**7, 5: 4 * 10**7, 7: 10**7}, {0: 2_500_000, 1: 2_500_000}]
)
def test_devices_are_filled_to_the_same_share_of_what_is_free(free_bytes: dict[int, int]) -> None:
    model = empty_model(TINY, read_config(TINY))
    placed = balanced_device_map(model, free_bytes)
    shares = filled(model, placed, free_bytes)
    layer = sum(parameter.numel() * 4 for parameter in model.model.layers[0].parameters())
    even = 3_223_168 / sum(free_bytes.values())
    # As even as whole layers allow: one layer less on the smallest device would do.
    assert max(shares) <= min(even + layer / min(free_bytes.values()), 0.8)
    order = [placed[f"model.layers.{i}"] for i in range(4)]
    assert order == sorted(order) and placed["model.embed_tokens"] == min(free_bytes)
    # transformers and accelerate know where every weight goes.
    from accelerate.utils import check_device_map

    check_device_map(model, {**placed})


def test_a_full_device_gets_nothing_and_a_full_machine_is_refused() -> None:
    model = empty_model(TINY, read_config(TINY))
    assert set(balanced_device_map(model, {0: 1000, 1: 10**8}).values()) == {1}
    with pytest.raises(DeviceError, match="the model needs 3 MiB, and on 2 devices 2 MiB are free") as refused:
        balanced_device_map(model, {0: 10**6, 1: 10**6})
    assert "80% of that may be filled" in refused.value.why and "977 KiB on 0, 977 KiB on 1" in refused.value.why
    # As it will be held: in half of the bytes, or with linear layers in four bits.
    assert balanced_device_map(model, {0: 10**6, 1: 2 * 10**6}, bytes_each=2)
    assert balanced_device_map(model, {0: 6 * 10**5, 1: 10**6}, bytes_each=2, linear_bytes_each=0.5625)


def test_a_weight_that_is_shared_lies_in_one_place() -> None:
    spec = ModelSpec(name="tiny:gemma3")
    model: Any = empty_model(spec, read_config(spec))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    placed = balanced_device_map(model, {0: 10**8, 1: 10**8})
    first, last = (next(index for name, index in placed.items() if name.endswith(end)) for end in ("embed_tokens", "lm_head"))
    assert first == last == 0 and 1 in placed.values()
