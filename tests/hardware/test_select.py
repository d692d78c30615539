from __future__ import annotations

import pytest
from tests.fakes import h100s, laptop

from pantheraml.errors import DeviceError
from pantheraml.hardware.device import Absent, Inventory
from pantheraml.hardware.select import select
from pantheraml.recipe.types import HardwareAsk


def test_select_auto_takes_the_first_and_says_what_is_missing() -> None:
    device, reason = select(laptop(), HardwareAsk())
    assert str(device) == "cpu:0"
    assert "no cuda: torch was built without CUDA" in reason
    assert select(h100s(), HardwareAsk())[0].kind == "cuda"


def test_select_takes_what_is_asked() -> None:
    device, reason = select(h100s(), HardwareAsk(kind="cuda", index=5))
    assert str(device) == "cuda:5"
    assert reason == "the recipe asks for it"
    assert select(h100s(), HardwareAsk(kind="cpu"))[0].kind == "cpu"


def test_select_refuses_an_absent_kind_with_its_reason_and_remedy() -> None:
    with pytest.raises(DeviceError) as caught:
        select(laptop(), HardwareAsk(kind="cuda"))
    assert str(caught.value) == (
        "hardware.kind=cuda, but no cuda device answered; here is cpu:0 (Fake laptop)\n"
        "  why: torch was built without CUDA\n"
        "  fix: install the CUDA build of torch; or set hardware.kind to cpu, or auto"
    )
    assert caught.value.exit_code == 4


def test_select_refuses_a_kind_that_nobody_looked_for() -> None:
    with pytest.raises(DeviceError, match="no xpu device answered") as caught:
        select(h100s(1), HardwareAsk(kind="xpu"))
    assert "nothing is known" in caught.value.why


def test_select_refuses_a_missing_index() -> None:
    with pytest.raises(DeviceError, match=r"there is no cuda:8") as caught:
        select(h100s(2), HardwareAsk(kind="cuda", index=8))
    assert "index 0, 1" in caught.value.why
    # auto does not go on to another kind either: the index was asked for.
    with pytest.raises(DeviceError, match=r"there is no cuda:2"):
        select(h100s(2), HardwareAsk(index=2))


def test_select_refuses_an_empty_machine() -> None:
    nothing = Inventory(devices=(), absent=(Absent(kind="cpu", why="it is on fire", fix="extinguish it"),))
    with pytest.raises(DeviceError, match="no device answered") as caught:
        select(nothing, HardwareAsk())
    assert (caught.value.why, caught.value.fix) == ("cpu: it is on fire", "extinguish it")
