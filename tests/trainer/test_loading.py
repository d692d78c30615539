"""In which numbers a model is read that is then divided, and what of the host's memory its processes need for that."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.fakes import GIB, h100s, llama_8b
from tests.tiny import quiet, tiny_recipe
from transformers import AutoModelForCausalLM

from pantheraml.errors import DeviceError
from pantheraml.models.load import load_model
from pantheraml.models.tiny import tiny_config
from pantheraml.planning.plan import Plan, make_plan
from pantheraml.recipe.types import ModelSpec
from pantheraml.trainer import run
from pantheraml.trainer.run import check_host_room, isolated, loading_dtype


def plan_of(recipe: Any) -> Plan:
    return make_plan(recipe, h100s(8), replace(llama_8b(), fused=True), collective="nccl")


@pytest.mark.parametrize(
    ("hardware", "adapter", "stored", "wanted"),
    [
        ({"parallel": "fsdp"}, "full", "bfloat16", "bfloat16"),
        ({"parallel": "fsdp"}, "full", "float16", "float16"),
        ({"parallel": "fsdp"}, "full", "float8_e4m3fn", "float32"),
        ({"parallel": "fsdp"}, "lora", "float32", "bfloat16"),
        ({"parallel": "tp"}, "full", "bfloat16", "bfloat16"),
        ({"parallel": "ddp"}, "lora", "float32", "bfloat16"),
    ],
)
def test_what_is_divided_and_trains_as_a_whole_is_read_as_it_is_stored(
    hardware: dict[str, str], adapter: str, stored: str, wanted: str
) -> None:
    recipe = tiny_recipe(
        Path("runs"), model="llama-8b", adapter={"kind": adapter}, hardware={"kind": "cuda", "threads": None, "devices": "all", **hardware}
    )
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": "bfloat16"})})
    assert loading_dtype(recipe, plan_of(recipe), stored) == wanted


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what is free on a machine with eight processes."""
    for name, value in {
        "RANK": 8,
        "WORLD_SIZE": 16,
        "LOCAL_RANK": 0,
        "LOCAL_WORLD_SIZE": 8,
        "MASTER_ADDR": "there",
        "MASTER_PORT": 1,
    }.items():
        monkeypatch.setenv(name, str(value))

    def set_free(gib: float) -> None:
        monkeypatch.setattr(run, "usable_memory", lambda: (2 * int(gib * GIB), int(gib * GIB)))

    return set_free


def test_no_room_for_all_that_the_processes_of_a_machine_read_is_said_before(free: Any) -> None:
    free(200)
    with pytest.raises(DeviceError) as refused:  # 8.03 billion parameters, four bytes each, eight times
        check_host_room(llama_8b(), "float32", "bfloat16", None)
    said = str(refused.value)
    assert "8 processes would read all of" in said and "in float32, which takes 239.3 GiB" in said and "200.0 GiB of this machine's" in said
    assert "why: each makes its part from the whole. It is stored in bfloat16" in said
    assert refused.value.fix == "set model.dtype to bfloat16, or start fewer processes on a machine"
    free(240)
    check_host_room(llama_8b(), "float32", "bfloat16", None)


def test_what_is_read_unchanged_needs_no_room_of_its_own(free: Any) -> None:
    free(1)
    check_host_room(llama_8b(), "bfloat16", "bfloat16", None)
    with pytest.raises(DeviceError, match="in nf4, which takes") as refused:
        check_host_room(llama_8b(), "bfloat16", "bfloat16", "nf4")
    assert "leave load_in_4bit out" in refused.value.fix


def test_what_will_be_divided_is_tried_on_the_host_only_if_the_kernels_do_not_know_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    monkeypatch.setattr(run, "keeps_apart", lambda model: tried.append(model.config.model_type) or False)
    for family, hardware, wanted in (
        ("llama", {"parallel": "fsdp"}, True),
        ("falcon_h1", {"parallel": "fsdp"}, False),
        ("llama", {"parallel": "ddp"}, False),
    ):
        recipe = tiny_recipe(Path("runs"), model="llama-8b", hardware={"kind": "cuda", "threads": None, "devices": "all", **hardware})
        model = AutoModelForCausalLM.from_config(tiny_config(family))
        console, printed = quiet()
        assert isolated(model, plan_of(recipe), recipe, console).packing is wanted
        assert ("Packing is off" in printed()) is not wanted
    assert tried == ["falcon_h1", "llama"]


def anonymous() -> int:
    """Bytes of this process that are no pages of a file."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Anonymous:"))


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="the kernel does not tell pages of files from others")
def test_a_model_that_is_read_as_it_is_stored_is_pages_of_its_files(tmp_path: Path) -> None:
    config = tiny_config("llama", vocab_size=30_000, hidden_size=512, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    taken = {}
    for dtype in (torch.bfloat16, torch.bfloat16, torch.float32):  # the first time, what loads it is loaded
        before = anonymous()
        model = load_model(ModelSpec(name=str(tmp_path / "base")), dtype=dtype, device=torch.device("cpu"))
        with torch.no_grad():
            assert all(each.sum().isfinite() for each in model.parameters())  # which reads all of it
        size = sum(each.nbytes for each in model.parameters())
        taken[dtype] = (anonymous() - before) / size
        del model
    assert size > 100 << 20
    assert taken[torch.bfloat16] < 0.1 and taken[torch.float32] > 0.5, taken
