"""Several GPUs, or processes on a CPU: which mesh is taken, what each of them holds and takes, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from tests.fakes import GIB, decoder_shape, fake_device, h100s, laptop, llama_8b

from pantheraml.errors import DeviceError, PantheraError, RecipeError
from pantheraml.hardware.device import Inventory
from pantheraml.planning.batch import HEADROOM
from pantheraml.planning.plan import Plan, make_plan
from pantheraml.planning.shape import ModelShape
from pantheraml.planning.sharding import choose_mesh, process_meshes
from pantheraml.recipe.types import HardwareAsk, Recipe

LLAMA = replace(llama_8b(), fused=True)
SMALL = replace(decoder_shape(layers=4, hidden=512, intermediate=1536, heads=8, kv_heads=4, vocab=32000), fused=True)


def recipe(hardware: dict[str, Any] | None = None, **parts: Any) -> Recipe:
    return Recipe.model_validate({"model": {"name": "fake"}, "data": "rows.jsonl", "hardware": hardware or {}, **parts})


def plan(hardware: dict[str, Any], shape: ModelShape = SMALL, inventory: Inventory | None = None, **more: Any) -> Plan:
    facts = {
        name: more.pop(name) for name in ("processes", "machines", "quantizers", "available_threads", "longest_example") if name in more
    }
    return make_plan(recipe(hardware, **more), inventory or h100s(), shape, collective="nccl", **facts)


def meshes(count: int = 8, processes: int | None = None, **asked: Any) -> list[dict[str, int]]:
    inventory = h100s(count)
    ask = HardwareAsk.model_validate(asked)
    return process_meshes(ask, inventory.devices[0], inventory, collective="nccl", processes=processes)[0]


# How many, and how they are arranged.

ROWS_OF_8 = [{"dp": 4, "cp": 2}, {"fsdp": 4, "cp": 2}, {"dp": 2, "cp": 4}, {"fsdp": 2, "cp": 4}, {"cp": 8}]
"""Meshes of eight devices that share rows."""


@pytest.mark.parametrize(
    ("asked", "possible"),
    [
        ({}, [{}]),
        ({"devices": 1, "parallel": "fsdp"}, [{}]),
        ({"devices": "all"}, [{"dp": 8}, {"fsdp": 8}, *ROWS_OF_8, {"fsdp": 4, "tp": 2}, {"fsdp": 2, "tp": 4}, {"tp": 8}]),
        ({"devices": 6}, [{"dp": 6}, {"fsdp": 6}, {"dp": 3, "cp": 2}, {"fsdp": 3, "cp": 2}, {"fsdp": 3, "tp": 2}]),
        ({"devices": 3}, [{"dp": 3}, {"fsdp": 3}]),
        # What is said is kept, and what is left open fills the rest.
        ({"dp": 2}, [{"dp": 2}]),
        ({"fsdp": 4}, [{"fsdp": 4}]),
        ({"dp": 2, "fsdp": 2, "tp": 2}, [{"dp": 2, "fsdp": 2, "tp": 2}]),
        (
            {"devices": 8, "dp": 2},
            [{"dp": 2, "fsdp": 4}, {"dp": 2, "fsdp": 2, "cp": 2}, {"dp": 2, "cp": 4}, {"dp": 2, "fsdp": 2, "tp": 2}, {"dp": 2, "tp": 4}],
        ),
        ({"cp": 2}, [{"cp": 2}]),
        ({"fsdp": 2, "cp": 2}, [{"fsdp": 2, "cp": 2}]),
        ({"devices": 8, "cp": 2}, [{"dp": 4, "cp": 2}, {"fsdp": 4, "cp": 2}]),
        ({"devices": 8, "fsdp": 1, "cp": 4}, [{"dp": 2, "cp": 4}]),
        ({"devices": 8, "parallel": "cp"}, [{"cp": 8}]),
        ({"devices": 8, "parallel": "cp", "dp": 4}, [{"dp": 4, "cp": 2}]),
        ({"devices": 8, "parallel": "cp", "dp": 2, "cp": 4}, [{"dp": 2, "cp": 4}]),
        ({"devices": 8, "tp": 2}, [{"dp": 4, "tp": 2}, {"fsdp": 4, "tp": 2}]),
        ({"devices": 8, "fsdp": 1, "tp": 4}, [{"dp": 2, "tp": 4}]),
        ({"devices": 8, "parallel": "ddp"}, [{"dp": 8}]),
        ({"devices": 8, "parallel": "fsdp"}, [{"fsdp": 8}]),
        ({"devices": 8, "parallel": "fsdp", "dp": 2}, [{"dp": 2, "fsdp": 4}]),
        ({"devices": 8, "parallel": "tp"}, [{"tp": 8}]),
        ({"devices": 8, "parallel": "tp", "dp": 4}, [{"dp": 4, "tp": 2}]),
        ({"devices": 8, "parallel": "fsdp_tp"}, [{"fsdp": 4, "tp": 2}, {"fsdp": 2, "tp": 4}]),
        ({"devices": 8, "parallel": "fsdp_tp", "fsdp": 2}, [{"fsdp": 2, "tp": 4}]),
        ({"devices": 8, "parallel": "fsdp_tp", "tp": 2, "dp": 2}, [{"dp": 2, "fsdp": 2, "tp": 2}]),
    ],
)
def test_the_meshes_that_a_recipe_leaves_open(asked: dict[str, Any], possible: list[dict[str, int]]) -> None:
    assert meshes(**asked) == possible


def test_each_machine_may_have_a_copy_in_parts() -> None:
    inventory = h100s(8)
    for machines, first in ((1, [{"dp": 16}, {"fsdp": 16}]), (2, [{"dp": 16}, {"dp": 2, "fsdp": 8}, {"fsdp": 16}])):
        found, _ = process_meshes(HardwareAsk(), inventory.devices[0], inventory, collective="nccl", processes=16, machines=machines)
        assert found[: len(first)] == first
        for asked in ({"parallel": "fsdp"}, {"dp": 4}):  # what is said is kept
            ask = HardwareAsk.model_validate(asked)
            kept, _ = process_meshes(ask, inventory.devices[0], inventory, collective="nccl", processes=16, machines=machines)
            assert kept[0] == ({"fsdp": 16} if "parallel" in asked else {"dp": 4, "fsdp": 4})


def test_every_mesh_has_as_many_places_as_there_are_devices() -> None:
    for count in range(2, 33):
        for asked in ({}, {"parallel": "fsdp"}, {"parallel": "ddp"}, {"parallel": "cp"}, {"parallel": "tp"}):
            assert {math.prod(mesh.values()) for mesh in meshes(32, devices=count, **asked)} == {count}


def test_a_launcher_says_how_many_there_are() -> None:
    for asked in ({}, {"devices": "all"}, {"devices": 16}):
        assert meshes(8, processes=16, **asked)[0] == {"dp": 16}
    assert meshes(8, processes=1, parallel="fsdp") == [{}]
    assert meshes(8, processes=4, fsdp=4) == [{"fsdp": 4}]
    with pytest.raises(RecipeError) as caught:
        meshes(8, processes=16, devices=4)
    assert caught.value.what == "hardware.devices=4, but 16 processes were started"
    assert caught.value.fix == "start 4, or leave hardware.devices out"


@pytest.mark.parametrize(
    ("asked", "what", "fix"),
    [
        ({"devices": 16}, "16 devices were asked for, and 8 of kind cuda answered", "set hardware.devices to 8, or all"),
        ({"dp": 9}, "9 devices were asked for, and 8", "set hardware.devices to 8"),
        ({"devices": 8, "parallel": "ddp", "fsdp": 2}, "hardware.parallel=ddp, and hardware.fsdp=2", "leave one of them out"),
        ({"devices": 8, "parallel": "fsdp", "tp": 2}, "hardware.parallel=fsdp, and hardware.tp=2", "leave one of them out"),
        ({"devices": 8, "parallel": "tp", "fsdp": 2}, "hardware.parallel=tp, and hardware.fsdp=2", "leave one of them out"),
        ({"devices": 8, "parallel": "fsdp", "cp": 2}, "hardware.parallel=fsdp, and hardware.cp=2", "leave one of them out"),
        ({"devices": 8, "parallel": "tp", "cp": 2}, "hardware.parallel=tp, and hardware.cp=2", "leave one of them out"),
        ({"devices": 8, "parallel": "cp", "fsdp": 2}, "hardware.parallel=cp, and hardware.fsdp=2", "leave one of them out"),
        ({"devices": 8, "parallel": "cp", "tp": 2}, "hardware.parallel=cp, and hardware.tp=2", "leave one of them out"),
        ({"devices": 8, "cp": 2, "tp": 2}, "hardware.cp=2, and hardware.tp=2", "leave hardware.tp out"),
        ({"devices": 8, "cp": 3}, "cp 3 does not come to 8 devices", "let the product"),
        ({"devices": 8, "parallel": "fsdp", "fsdp": 1}, "hardware.parallel=fsdp, and hardware.fsdp=1", "leave one of them out"),
        ({"devices": 8, "fsdp": 4}, "fsdp 4 does not come to 8 devices", "set hardware.dp to 2"),
        ({"devices": 8, "fsdp": 2, "tp": 2}, "fsdp 2 x tp 2 does not come to 8 devices", "set hardware.dp to 2"),
        ({"devices": 8, "dp": 3}, "dp 3 does not come to 8 devices", "let the product"),
        ({"devices": 8, "parallel": "fsdp", "dp": 8}, "parallel fsdp with dp 8 does not come to 8 devices", "let the product"),
        ({"devices": 2, "parallel": "fsdp_tp"}, "parallel fsdp_tp does not come to 2 devices", "let the product"),
        ({"devices": 1, "dp": 2}, "dp 2 does not come to 1 device", "let the product"),
        ({"parallel": "fsdp"}, "hardware.parallel=fsdp is for several devices, and one is asked for", "set hardware.devices to all"),
        ({"devices": 8, "dcn": 2}, "hardware.dcn=2, but only TPUs come in slices", "set hardware.dp instead"),
        ({"devices": 2, "index": 1}, "hardware.index=1 names one device, and 2 are to train together", "leave it out"),
    ],
)
def test_what_contradicts_itself_is_refused_with_the_fix(asked: dict[str, Any], what: str, fix: str) -> None:
    with pytest.raises(PantheraError) as caught:
        meshes(**asked)
    assert what in caught.value.what and caught.value.why and fix in caught.value.fix


def test_devices_that_cannot_talk_train_alone() -> None:
    inventory = Inventory(devices=(fake_device("mps"),))
    assert process_meshes(HardwareAsk(), inventory.devices[0], inventory) == ([{}], "there is one of kind mps")
    for asked in (HardwareAsk(devices=2), HardwareAsk(dp=2), HardwareAsk(cp=2), HardwareAsk(parallel="fsdp", fsdp=2)):
        with pytest.raises(DeviceError, match="several devices of kind mps cannot train together"):
            process_meshes(asked, inventory.devices[0], inventory)


def test_a_tpu_says_it_by_its_axes() -> None:
    device = replace(fake_device("tpu"), simulated=False)
    for said in ({"parallel": "fsdp"}, {"parallel": "cp"}, {"cp": 2}):
        ((name, value),) = said.items()
        with pytest.raises(RecipeError, match=rf"hardware\.{name}={value}, but tpu:0 is a TPU") as caught:
            choose_mesh(HardwareAsk.model_validate(said), device, Inventory(devices=(device,)), LLAMA)
        assert caught.value.fix == f"leave hardware.{name} out"


# What is chosen for the memory that is there.


@pytest.mark.parametrize(
    ("count", "memory_gib", "adapter", "mesh"),
    [
        (8, 80, "lora", {"dp": 8}),  # 16 GB of weights on each
        (8, 16, "lora", {"fsdp": 8}),
        (8, 80, "full", {"fsdp": 8}),  # 128 GB of weights, gradients and moments on all
        (2, 80, "lora", {"dp": 2}),
        (2, 16, "lora", {"fsdp": 2}),
    ],
)
def test_copies_where_they_fit_and_else_parts(count: int, memory_gib: int, adapter: str, mesh: dict[str, int]) -> None:
    made = plan({"devices": "all"}, LLAMA, h100s(count, memory_gib=memory_gib), adapter=adapter)
    assert (made.mesh, made.world_size) == (mesh, count)
    assert made.memory.total_bytes <= HEADROOM * memory_gib * GIB
    reason = made.reasons["devices"]
    if "fsdp" in mesh:
        assert reason.startswith(f"all {count} that are here: parts of every weight, since with dp {count} training needs")
        assert f"the device has {memory_gib}.0 GiB free" in reason
        with pytest.raises(DeviceError):
            plan({"devices": "all", "parallel": "ddp"}, LLAMA, h100s(count, memory_gib=memory_gib), adapter=adapter)
    else:
        assert reason == f"all {count} that are here: copies of the model, since it fits on each"


def test_rows_are_divided_where_parts_of_the_weights_do_not_do() -> None:
    # One row of 128k tokens: what a single layer works with does not fit beside the parts, but half of it does.
    asked = {"model": {"name": "fake", "max_tokens": 131_072}}
    inventory = h100s(8, memory_gib=12)
    made = plan({"devices": "all"}, LLAMA, inventory, **asked)
    assert made.mesh == {"fsdp": 4, "cp": 2} and made.micro_tokens == 131_072
    assert "parts of every weight, and parts of every long row, since with dp 4 x cp 2 training needs" in made.reasons["devices"]
    small = plan({"devices": "all"}, SMALL, h100s(8, memory_gib=1.4), **asked)
    assert small.mesh == {"dp": 4, "cp": 2}
    assert small.reasons["devices"].startswith(
        "all 8 that are here: copies of the model, and parts of every long row, since with fsdp 8 training needs"
    )
    for parallel in ("ddp", "fsdp"):
        with pytest.raises(DeviceError, match="training needs") as caught:
            plan({"devices": "all", "parallel": parallel}, LLAMA, inventory, **asked)
        assert "set hardware.parallel to auto" in caught.value.fix


def test_products_are_divided_where_a_layer_is_too_large() -> None:
    wide = replace(decoder_shape(layers=8, hidden=16384, intermediate=65536, heads=128, kv_heads=8, head_dim=128, vocab=32000), fused=True)
    made = plan({"devices": "all"}, wide, h100s(8, memory_gib=24), longest_example=128)
    assert (
        made.mesh == {"fsdp": 2, "tp": 4}
        and "parts of every weight, and parts of the products, since with fsdp 4 x tp 2" in made.reasons["devices"]
    )


def test_what_one_device_cannot_all_of_them_may() -> None:
    with pytest.raises(DeviceError) as caught:
        plan({}, LLAMA, adapter="full")
    assert caught.value.fix.startswith("set hardware.devices to all; or set adapter.kind to lora")
    assert plan({"devices": "all"}, LLAMA, adapter="full").mesh == {"fsdp": 8}
    with pytest.raises(DeviceError) as caught:
        plan({"devices": "all"}, LLAMA, h100s(2), adapter="full")
    assert caught.value.what.startswith("with tp 2, training needs") and "hardware.devices" not in caught.value.fix


# What cannot be divided.


@pytest.mark.parametrize(
    ("asked", "more", "what", "fix"),
    [
        ({"fsdp": 2}, {"model": {"name": "fake", "load_in_8bit": True}}, "hardware.fsdp=2, but the base is held in 8 bits (int8)", "parallel to ddp"),
        ({"tp": 2}, {"model": {"name": "fake", "load_in_8bit": True}}, "hardware.tp=2, but the base is held in 8 bits (int8)", "parallel to ddp"),
        ({"tp": 2}, {"model": {"name": "fake", "load_in_4bit": True}}, "hardware.tp=2, but the base is held in 4 bits", "parallel to fsdp"),
        ({"fsdp": 2}, {"adapter": "full", "optim": {"states": "8bit"}}, "hardware.fsdp=2 does not go with optim.states=8bit", "optim.states to float32"),
        ({"tp": 2}, {"adapter": {"kind": "lora", "dropout": 0.1}}, "the kernels do not compute the layers of fake/1b (llama)", "parallel=fsdp divides any model"),
        ({"tp": 8}, {}, "hardware.tp=8 does not divide the 4 heads of keys of fake/1b", "set it to a divisor of 4"),
        ({"tp": 2}, {"shape": replace(SMALL, family="phi3")}, "hardware.tp=2 cannot divide the layers of fake/1b", "parallel=fsdp divides any model"),
        ({"tp": 2}, {"shape": replace(SMALL, fused=False)}, "the kernels do not compute the layers", "leave hardware.tp out"),
        ({"cp": 8}, {}, "hardware.cp=8 does not divide the 4 heads of keys of fake/1b", "set it to a divisor of 4"),
        ({"cp": 2}, {"shape": replace(SMALL, fused=False)}, "hardware.cp=2, but the kernels do not compute the layers", "leave hardware.cp out"),
        ({"fsdp": 2, "cp": 2}, {"model": {"name": "fake", "load_in_8bit": True}}, "hardware.fsdp=2, but the base is held in 8 bits", "parallel to ddp"),
        ({"tp": 2}, {"shape": replace(SMALL, intermediate=1535)}, "does not divide the 1535 gates of the MLP", "set it to a divisor of 1535"),
    ],
)  # fmt: skip
def test_what_cannot_be_divided_is_refused_with_the_fix(asked: dict[str, Any], more: dict[str, Any], what: str, fix: str) -> None:
    with pytest.raises(RecipeError) as caught:
        plan(asked, quantizers=("nf4", "int8"), **more)
    assert what in caught.value.what and caught.value.why and fix in caught.value.fix


def test_what_can_be_divided_is() -> None:
    four, eight = ({"name": "fake", f"load_in_{bits}bit": True} for bits in (4, 8))
    for mesh, model in (({"dp": 2}, eight), ({"dp": 2}, four), ({"fsdp": 2}, four), ({"dp": 2, "fsdp": 2}, four)):
        assert plan(mesh, model=model, quantizers=("nf4", "int8")).mesh == mesh
    assert plan({"fsdp": 2}, replace(SMALL, family="phi3"), adapter="full").mesh == {"fsdp": 2}
    for model in (four, eight):
        assert plan({"cp": 2}, model=model, quantizers=("nf4", "int8")).mesh == {"cp": 2}
    assert plan({"cp": 2}, adapter="full", optim={"states": "8bit"}).mesh == {"cp": 2}
    # Dropout, DoRA, and families that store matrices as one exchange heads like all others; gates need not divide.
    assert plan({"cp": 2}, adapter={"kind": "lora", "dropout": 0.1}).mesh == {"cp": 2}
    assert plan({"cp": 4}, replace(SMALL, family="phi3", intermediate=1535)).mesh == {"cp": 4}
    assert plan({"fsdp": 2}, optim={"states": "8bit"}).mesh == {"fsdp": 2}  # of adapters, which are whole
    # What is refused is not chosen either: eight bits stay whole, and what does not fit then is an error.
    with pytest.raises(DeviceError, match="training needs") as caught:
        plan({"devices": "all"}, LLAMA, h100s(8, memory_gib=16), model=eight, quantizers=("int8",))
    assert "tp" not in caught.value.what


def test_layers_in_which_devices_meet_are_neither_compiled_nor_recorded() -> None:
    for axes in ({"fsdp": 2}, {"cp": 2}, {"tp": 2}):
        made = plan(axes)
        assert (made.compile, made.graphs) == (False, False)
        assert made.reasons["graphs"] == made.reasons["compile"] == "devices exchange weights or activations in the middle of each layer"
        for name in ("compile", "graphs"):
            with pytest.raises(RecipeError, match=f"hardware.{name}=on does not go with"):
                plan({**axes, name: "on"})
    alone, copies = (plan(axes, batch={"micro_tokens": 2048}) for axes in ({}, {"dp": 2}))
    assert copies.graphs and alone.graphs
    assert plan({"dp": 2, "compile": "on"}).compile


# What each of them holds. Llama-3.1-8B: D 4096, F 14336, K 1024, V 128256, 32 layers; bfloat16.

LAYER = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
OUTSIDE = 2 * 128256 * 4096 + 4096


def weights(made: Plan) -> int:
    return made.memory.weights_bytes


def test_memory_of_one_device_by_hand() -> None:
    adapters = 4 * LLAMA.lora_parameters(16)
    assert weights(plan({"dp": 8}, LLAMA)) == weights(plan({}, LLAMA)) == 2 * (32 * LAYER + OUTSIDE) + adapters
    # An eighth of all, and whole three layers and what is outside of them.
    made = plan({"fsdp": 8}, LLAMA)
    assert weights(made) == 2 * ((32 * LAYER + OUTSIDE) // 8 + 3 * LAYER + OUTSIDE) + adapters
    assert (made.memory.gradients_bytes, made.memory.optimizer_bytes) == (adapters, 2 * adapters)
    # Half of the matrices in the layers; adapters, norms and what is outside are whole.
    products = plan({"tp": 2}, LLAMA)
    assert weights(products) == 2 * (32 * ((LAYER - 2 * 4096) // 2 + 2 * 4096) + OUTSIDE) + adapters
    both = plan({"fsdp": 4, "tp": 2}, LLAMA)
    half = (LAYER - 2 * 4096) // 2 + 2 * 4096
    assert weights(both) == 2 * ((32 * half + OUTSIDE) // 4 + 3 * half + OUTSIDE) + adapters


def test_memory_of_a_full_fine_tune_by_hand() -> None:
    made = plan({"fsdp": 8}, LLAMA, adapter="full")
    part = (32 * LAYER + OUTSIDE) // 8
    assert weights(made) == 4 * (part + 3 * LAYER + OUTSIDE)
    # Those of a layer and of what is outside are there before they are scattered. That of the head is with the logits.
    assert made.memory.gradients_bytes == 4 * (part + LAYER + OUTSIDE - 128256 * 4096)
    assert made.memory.optimizer_bytes == 8 * part


def test_memory_in_four_bits_by_hand() -> None:
    model = {"name": "fake", "load_in_4bit": True}
    alone, parts = (
        plan({**axes, "checkpointing": "on"}, LLAMA, model=model, quantizers=("nf4",))  # at which no matrix is kept whole
        for axes in ({}, {"fsdp": 8})
    )
    matrices = LAYER - 2 * 4096
    rest = 32 * 2 * 4096 + OUTSIDE
    adapters = 4 * LLAMA.lora_parameters(16)
    scales = 32 * matrices // 16
    assert weights(alone) == pytest.approx(32 * matrices // 2 + scales + 2 * rest + adapters, abs=16)
    expected = (32 * matrices // 2 + 2 * rest) // 8 + 3 * (matrices // 2 + 4 * 4096) + 2 * OUTSIDE + scales + adapters
    assert weights(parts) == pytest.approx(expected, abs=16)
    assert not plan({"fsdp": 8}, LLAMA, model=model, quantizers=("nf4",)).whole  # nothing is kept whole that FSDP gathers


def test_products_that_are_divided_keep_a_part_of_what_they_keep() -> None:
    kept = {tp: plan({"tp": tp, "checkpointing": "off"}, LLAMA, batch={"micro_tokens": 8192}).memory.activations_bytes for tp in (2, 4)}
    whole = plan({"dp": 2, "checkpointing": "off"}, LLAMA, batch={"micro_tokens": 8192}).memory.activations_bytes
    # Of a layer and token, in bfloat16: q twice, k twice, gate, up and their product are divided, and the sums of attention in float32.
    divided = 32 * 8192 * (2 * (2 * 4096 + 2 * 1024 + 3 * 14336) + 4 * 32)
    assert whole - kept[2] >= divided / 2 and kept[2] - kept[4] >= divided / 4
    assert whole - kept[2] == pytest.approx(divided / 2, rel=0.05)  # and a little that a layer works with


def test_rows_that_are_divided_need_a_part_of_what_a_row_needs() -> None:
    asked: dict[str, Any] = {"batch": {"micro_tokens": 8192}, "longest_example": 8192, "model": {"name": "fake", "max_tokens": 8192}}
    made = {cp: plan({"devices": 8, "cp": cp, "checkpointing": "off"}, LLAMA, **asked).memory for cp in (1, 2, 4, 8)}
    # All of it but what attention gives, which each device then has twice: of the tokens before the exchange, and of those after it.
    twice = 32 * 8192 * 2 * 4096
    for cp in (2, 4, 8):
        assert made[cp].activations_bytes == pytest.approx((made[1].activations_bytes + twice) / cp, rel=0.02)
    assert made[1].weights_bytes == made[8].weights_bytes
    filled = [plan({"cp": 8, "checkpointing": "off"}, LLAMA, **{**asked, "batch": {"micro_tokens": n}}).memory for n in (8193, 8200)]
    assert filled[0] == filled[1]
    # Those that share rows need the same weights: with FSDP they have them in parts.
    assert weights(plan({"fsdp": 4, "cp": 2}, LLAMA)) == weights(plan({"fsdp": 8}, LLAMA))
    trained = [plan({**axes, "checkpointing": "on"}, LLAMA, adapter="full").memory for axes in ({"fsdp": 4, "cp": 2}, {"fsdp": 8})]
    assert trained[0].gradients_bytes == trained[1].gradients_bytes and trained[0].optimizer_bytes == trained[1].optimizer_bytes


def test_more_parts_never_need_more_memory() -> None:
    for adapter in ("lora", "full"):
        needs = [
            plan({"fsdp": n, "checkpointing": "on"}, LLAMA, h100s(64), adapter=adapter, batch={"micro_tokens": 2048})
            for n in (8, 16, 32, 64)
        ]
        assert [made.memory.total_bytes for made in needs] == sorted((made.memory.total_bytes for made in needs), reverse=True)


# What each of them takes.


def test_each_process_takes_its_share_of_a_step() -> None:
    sizes = {n: plan({"devices": n}, SMALL, batch={"size": 64}, longest_example=512).micro_tokens for n in (1, 2, 8)}
    assert sizes == {1: 16384, 2: 16384, 8: 4096}  # 64, 32 and 8 examples of 512
    # Those that share products share examples.
    assert plan({"tp": 4}, SMALL, batch={"size": 64}, longest_example=512).micro_tokens == 16384
    assert plan({"dp": 2, "tp": 4}, SMALL, batch={"size": 16}, longest_example=512).micro_tokens == 4096
    # So do those that share tokens, of which each computes a part: together they are busy with more.
    assert plan({"cp": 4}, SMALL, batch={"size": 256}, longest_example=512).micro_tokens == 65536
    assert plan({"dp": 2, "cp": 4}, SMALL, batch={"size": 16}, longest_example=512).micro_tokens == 4096
    few = plan({"devices": 8}, SMALL, batch={"size": 6})
    assert "a step has 6 examples, so 2 of 8 shares of it are empty (see batch.size)" in few.reasons["devices"]


def test_processes_share_the_cores_and_the_memory_of_a_machine() -> None:
    made = plan({"kind": "cpu", "devices": 4}, SMALL, laptop(64), available_threads=10)
    assert (made.world_size, made.mesh, made.threads) == (4, {"dp": 4}, 2)
    assert made.device.free_bytes == made.room_bytes == 16 * GIB and made.device.memory_bytes == 64 * GIB
    assert made.reasons["devices"].endswith("they share the cores and the memory of one machine")
    assert made.reasons["threads"] == "4 processes share the 10 cores of this machine"
    assert plan({"kind": "cpu", "devices": 4}, SMALL, laptop(64), available_threads=2).threads == 1
    assert plan({"kind": "cpu", "devices": 4, "threads": 5}, SMALL, laptop(64), available_threads=10).threads == 5
    assert plan({"kind": "cpu", "devices": "all"}, SMALL, laptop(64)).world_size == 1  # there is one CPU
    spread = plan({"kind": "cpu"}, SMALL, laptop(64), processes=4, machines=2, available_threads=10)
    assert (spread.world_size, spread.threads, spread.room_bytes) == (4, 5, 32 * GIB)
    # All of them together are as fast as the machine.
    alone = plan({"kind": "cpu"}, SMALL, laptop(64, dtypes=("float32",)))
    together = plan({"kind": "cpu", "devices": 4}, SMALL, laptop(64, dtypes=("float32",)))
    assert together.cost.tokens_per_s == pytest.approx(alone.cost.tokens_per_s)


def test_the_one_with_the_least_memory_and_speed_decides() -> None:
    gpus = tuple(fake_device("cuda", i, free_bytes=(80 - 30 * (i == 3)) * GIB, peak_flops=(7 - 3 * (i == 1)) * 1e14) for i in range(4))
    made = plan({"devices": "all"}, LLAMA, Inventory(devices=gpus))
    assert made.room_bytes == 50 * GIB and made.device.peak_flops == 4e14 and str(made.device) == "cuda:0"
    assert plan({"devices": 2}, LLAMA, Inventory(devices=gpus)).room_bytes == 80 * GIB
    assert plan({}, LLAMA, Inventory(devices=gpus)).room_bytes == 80 * GIB


# What it takes and costs.


def named_h100s(count: int) -> Inventory:
    return Inventory(
        devices=tuple(replace(fake_device("cuda", i, name="NVIDIA H100 80GB HBM3", peak_flops=7e14), simulated=False) for i in range(count))
    )


def test_the_speed_is_that_of_all_devices_less_what_they_wait() -> None:
    alone = plan({}, LLAMA, named_h100s(8)).cost.tokens_per_s
    copies, products = (plan(axes, LLAMA, named_h100s(8)) for axes in ({"dp": 8}, {"tp": 8}))
    assert alone and copies.cost.tokens_per_s and products.cost.tokens_per_s
    assert 7.9 * alone < copies.cost.tokens_per_s < 8 * alone
    assert products.cost.tokens_per_s < 6 * alone  # each computes the head, and waits four times a layer
    # 160 MiB of gradients, 2 * 7/8 of them sent.
    assert "; each device sends about 280 MiB a step, after which 100% of the speed is left" in copies.reasons["speed"]
    assert copies.reasons["price"].startswith("$55.04 an hour")
    assert "which is not counted, since how fast it does is not known" in plan({"dp": 8}, LLAMA).reasons["speed"]
    over = plan({}, LLAMA, named_h100s(8), processes=16, machines=2)
    assert over.cost.tokens_per_s == pytest.approx(16 * alone) and "not counted" in over.reasons["speed"]


def test_a_machine_is_paid_once_however_many_processes_share_it() -> None:
    hour = {"usd_per_hour": 2.0}
    assert plan({"kind": "cpu", "devices": 4, **hour}, SMALL, laptop(64)).cost.usd_per_hour == 2
    assert plan({"kind": "cpu", **hour}, SMALL, laptop(64), processes=4, machines=2).cost.usd_per_hour == 4
    assert plan({"devices": 4, **hour}).cost.usd_per_hour == 8


def test_a_plan_is_kept_and_printed() -> None:
    made = plan({"devices": 8}, LLAMA, h100s(8, memory_gib=16))
    assert Plan.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    lines = {choice: (value, why) for choice, value, why in made.lines()}
    assert lines["devices"][0] == "8: fsdp 8" and lines["memory"][1].startswith("on each of 8 devices: weights")
    assert all(why for _, why in lines.values())
    tpus = Inventory(devices=tuple(replace(fake_device("tpu", i), simulated=False) for i in range(4)))
    assert plan({}, LLAMA, tpus).room_bytes == 4 * 80 * GIB
    assert plan({}, LLAMA, Inventory(devices=(fake_device("tpu"),))).room_bytes == 80 * GIB
