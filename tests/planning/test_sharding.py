"""Meshes and the rules by which tensors are spread over them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.fakes import fake_device

from pantheraml.errors import DeviceError, RecipeError
from pantheraml.hardware.device import Device, Inventory
from pantheraml.models.load import read_shape
from pantheraml.planning.shape import ModelShape
from pantheraml.planning.sharding import choose_mesh, format_mesh, row_shares, spec_of
from pantheraml.recipe.types import HardwareAsk, ModelSpec

Q = "base_model.model.model.layers.0.self_attn.q_proj."
O = "base_model.model.model.layers.0.self_attn.o_proj."  # noqa: E741 - as the module is called


@pytest.fixture(scope="module")
def shape() -> ModelShape:
    return read_shape(ModelSpec(name="tiny:llama"))


def slice_of(chips: int, **facts: Any) -> tuple[Device, Inventory]:
    devices = tuple(replace(fake_device("tpu", index=index, **facts), simulated=False) for index in range(chips))
    return devices[0], Inventory(devices=devices)


def test_the_rules() -> None:
    mesh = {"fsdp": 4, "tp": 2}
    assert spec_of(Q + "base_layer.weight", (64, 128), mesh) == ("tp", "fsdp")
    assert spec_of(O + "base_layer.weight", (128, 64), mesh) == ("fsdp", "tp")
    # An adapter follows its matrix: what it shares with it is divided alike.
    assert spec_of(Q + "lora_A.default.weight", (4, 128), mesh) == (None, "fsdp")
    assert spec_of(Q + "lora_B.default.weight", (64, 4), mesh) == ("tp", "fsdp")
    assert spec_of(O + "lora_A.default.weight", (4, 64), mesh) == ("fsdp", "tp")
    assert spec_of("model.norm.weight", (128,), mesh) == ("fsdp",)
    assert spec_of("model.norm.weight", (128,), {"dp": 8}) == (None,)


def test_what_an_axis_does_not_divide_stays_whole() -> None:
    assert spec_of(Q + "weight", (63, 130), {"fsdp": 4, "tp": 2}) == (None, None)
    assert spec_of("model.embed_tokens.weight", (263, 128), {"fsdp": 8}) == (None, "fsdp")
    assert spec_of("model.rotary_emb.inv_freq", (), {"fsdp": 8}) == ()


def test_a_slice_is_used_whole_unless_something_else_is_asked_for(shape: ModelShape) -> None:
    device, inventory = slice_of(8)
    for asked, expected in (
        ({}, {"fsdp": 8}),
        ({"devices": "all"}, {"fsdp": 8}),
        ({"devices": 4}, {"fsdp": 4}),
        ({"tp": 2}, {"fsdp": 4, "tp": 2}),
        ({"dp": 8}, {"dp": 8}),
        ({"dp": 4, "tp": 2}, {"dp": 4, "tp": 2}),
        ({"dcn": 2, "fsdp": 4}, {"dcn": 2, "fsdp": 4}),
        ({"fsdp": 2}, {"fsdp": 2}),
        ({"devices": 1}, {"fsdp": 1}),
    ):
        assert choose_mesh(HardwareAsk.model_validate(asked), device, inventory, shape)[0] == expected
    assert (format_mesh({"dp": 4, "tp": 2}), row_shares({"dp": 4, "tp": 2})) == ("dp 4 x tp 2", 4)


def test_what_is_not_there_is_refused_with_the_real_count(shape: ModelShape) -> None:
    device, inventory = slice_of(4)
    for asked in ({"devices": 8}, {"dp": 8}, {"fsdp": 8}):
        with pytest.raises(DeviceError, match="8 devices were asked for, and 4 of kind tpu answered"):
            choose_mesh(HardwareAsk.model_validate(asked), device, inventory, shape)
    with pytest.raises(RecipeError, match="fsdp 2 does not come to 4 devices"):
        choose_mesh(HardwareAsk(devices=4, fsdp=2), device, inventory, shape)
    with pytest.raises(RecipeError, match="dp 3 does not come to 4 devices"):
        choose_mesh(HardwareAsk(dp=3), device, inventory, shape)
    with pytest.raises(RecipeError, match="does not divide the 2 heads of keys"):
        choose_mesh(HardwareAsk(tp=4), device, inventory, shape)


def test_a_simulated_slice_has_as_many_as_are_asked_for(shape: ModelShape) -> None:
    device, _ = slice_of(1)
    device = replace(device, simulated=True)
    assert choose_mesh(HardwareAsk(devices=8), device, Inventory(devices=(device,)), shape)[0] == {"fsdp": 8}


def test_other_kinds_train_alone(shape: ModelShape) -> None:
    devices = tuple(fake_device("cuda", index=index) for index in range(2))
    inventory = Inventory(devices=devices)
    assert choose_mesh(HardwareAsk(), devices[0], inventory, shape)[0] == {}
    assert choose_mesh(HardwareAsk(devices=1), devices[0], inventory, shape)[0] == {}
    for asked in ({"devices": 2}, {"devices": "all"}, {"dp": 2}):
        with pytest.raises(DeviceError, match="cannot train together"):
            choose_mesh(HardwareAsk.model_validate(asked), devices[0], inventory, shape)
