"""A base in fewer bits is a choice of the recipe, and refused in words where recipe or device have no room for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.fakes import FakeBackend, decoder_shape, fake_device, h100s, laptop

from pantheraml.errors import DeviceError, RecipeError
from pantheraml.hardware.device import Device, Inventory
from pantheraml.planning.base import quantizer_of
from pantheraml.planning.plan import Plan, make_plan
from pantheraml.recipe.load import recipe_from
from pantheraml.recipe.types import Recipe

FIELDS = {"nf4": "load_in_4bit", "int8": "load_in_8bit", "fp8": "load_in_fp8"}


def recipe(*fields: str, **parts: Any) -> Recipe:
    return recipe_from({"model": {"name": "fake", **dict.fromkeys(fields, True)}, "data": "rows.jsonl", **parts})


def planned(inventory: Inventory, *fields: str, quantizers: tuple[str, ...] = tuple(FIELDS), **parts: Any) -> Plan:
    return make_plan(recipe(*fields, **parts), inventory, decoder_shape(), quantizers=quantizers)


@pytest.mark.parametrize(("quantizer", "field"), FIELDS.items())
def test_what_the_recipe_asks_for_is_planned(quantizer: str, field: str) -> None:
    made = planned(h100s(1), field)
    assert made.quantizer == quantizer and made.base_dtype == "bfloat16"
    assert ("base_dtype", quantizer, made.reasons["base_dtype"]) in made.lines()
    assert ("4 bits" if quantizer == "nf4" else "8 bits") in made.reasons["base_dtype"]
    plain = planned(h100s(1))
    assert plain.quantizer is None
    # Half a byte and a scale for each 64 weights; or a byte for each direction of the product, which is what bfloat16 takes.
    if quantizer == "nf4":
        tight = planned(h100s(1), field, hardware={"checkpointing": "on"})
        assert tight.memory.weights_bytes < 0.6 * plain.memory.weights_bytes
    else:
        assert made.memory.weights_bytes == plain.memory.weights_bytes


def test_four_bits_are_kept_whole_as_well_where_memory_is_free() -> None:
    shape = decoder_shape()
    whole = 2 * sum(n_in * n_out for n_in, n_out in shape.linears)
    roomy, tight = planned(h100s(1), "load_in_4bit"), planned(h100s(1, memory_gib=3.5), "load_in_4bit")
    asked = [planned(h100s(1), "load_in_4bit", hardware={"checkpointing": level}) for level in ("off", "on")]
    assert [made.whole for made in (roomy, tight, *asked)] == [True, False, True, False]
    four_bits = tight.memory.weights_bytes
    assert roomy.memory.weights_bytes == four_bits + whole and asked[1].memory.weights_bytes == four_bits
    assert "free to keep each matrix in bfloat16 as well" in roomy.reasons["base_dtype"] and "free" not in tight.reasons["base_dtype"]
    # It must not be what makes the plan too large.
    for gib in (3.5, 4, 5, 6, 7, 8):
        made = planned(h100s(1, memory_gib=gib), "load_in_4bit")
        assert made.memory.total_bytes <= 0.8 * gib * (1 << 30)
    # PEFT's own layers read the four bits themselves; and only they are made whole.
    assert not planned(h100s(1), "load_in_4bit", adapter={"kind": "lora", "dropout": 0.1}).whole
    assert not planned(h100s(1)).whole and not planned(h100s(1), "load_in_8bit").whole


@pytest.mark.parametrize(
    ("quantizer", "form", "why", "fix"),
    [
        ("nf4", "4 bits", "NF4 needs bitsandbytes", "pip install bitsandbytes, or set model.load_in_4bit to false"),
        ("int8", "8-bit whole numbers", "no fast products of eight-bit whole numbers", "set model.load_in_8bit to false"),
        ("fp8", "8-bit floats", "an NVIDIA GPU of compute capability 8.9 or more", "set model.load_in_fp8 to false"),
    ],
)
@pytest.mark.parametrize("kind", ["cpu", "cuda", "xpu", "mps"])
def test_a_device_that_cannot_is_refused_with_what_why_and_fix(quantizer: str, form: str, why: str, fix: str, kind: Any) -> None:
    backend = FakeBackend(kind, quantizers=tuple(each for each in FIELDS if each != quantizer))
    found = backend.probe()
    assert isinstance(found, tuple)
    with pytest.raises(DeviceError) as caught:
        planned(Inventory(devices=found), FIELDS[quantizer], quantizers=backend.quantizers)
    assert caught.value.what == f"model.{FIELDS[quantizer]}=true, but {kind}:0 (Fake (simulated)) cannot hold a base in {form}"
    assert why in caught.value.why and caught.value.fix == fix


@pytest.mark.parametrize(
    ("capability", "can"),
    [("8.0", False), ("8.6", False), ("8.9", True), ("9.0", True), ("10.0", True), ("12.0", True), ("gfx942", False), ("gfx90a", False)],
)
def test_floats_of_eight_bits_need_a_gpu_that_multiplies_them(capability: str, can: bool) -> None:
    device: Device = replace(fake_device("cuda"), capability=capability)
    if can:
        assert quantizer_of(recipe("load_in_fp8"), device, ("fp8",)) == "fp8"
    else:
        with pytest.raises(DeviceError, match=r"compute capability 8\.9"):
            quantizer_of(recipe("load_in_fp8"), device, ("fp8",))
    assert quantizer_of(recipe("load_in_8bit"), device, ("int8",)) == "int8"


@pytest.mark.parametrize("fields", [("load_in_4bit", "load_in_8bit"), ("load_in_8bit", "load_in_fp8"), tuple(FIELDS.values())], ids=str)
def test_two_forms_at_once_are_refused(fields: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(*fields)
    assert caught.value.what.endswith(f"model.{' and model.'.join(fields)} are asked for at once, and a base is held in one form")
    assert caught.value.why and all(f"model.{field}" in caught.value.fix for field in fields)


@pytest.mark.parametrize("field", FIELDS.values())
def test_every_weight_cannot_train_on_a_base_that_is_held_so(field: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(field, adapter="full")
    assert caught.value.what.endswith(f"model.{field} freezes the base, so adapter.kind must be lora")
    assert caught.value.fix == f"change model.{field} or adapter.kind"


def test_fewer_bits_are_never_chosen_by_themselves() -> None:
    for inventory in (h100s(1), laptop()):
        assert planned(inventory).quantizer is None
