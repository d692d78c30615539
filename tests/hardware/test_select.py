"""Every preference against every inventory, and what the errors say."""

from __future__ import annotations

import itertools

import pytest
from tests.fakes import FakeBackend, fake_device, h100s, laptop

from pantheraml.errors import DeviceError
from pantheraml.hardware.device import Absent, Inventory
from pantheraml.hardware.select import select
from pantheraml.recipe.kinds import KINDS
from pantheraml.recipe.types import HardwareAsk

GPUS = ("cuda", "xpu", "mps")
EVERY_INVENTORY = [here for count in range(len(KINDS) + 1) for here in itertools.combinations(KINDS, count)]


def machine(*kinds: str, untrained: tuple[str, ...] = ()) -> Inventory:
    """Two devices of each kind that is named, as FakeBackends answer; the others are absent."""
    devices, absent = [], []
    for kind in KINDS:
        backend = FakeBackend(
            kind,
            count=2,
            dtypes=() if kind in untrained else ("bfloat16", "float32"),
            absent=None if kind in kinds else Absent(kind=kind, why=f"no {kind} driver", fix=f"install {kind}"),
        )
        answer = backend.probe()
        if isinstance(answer, Absent):
            absent.append(answer)
        else:
            devices += answer
    return Inventory(devices=tuple(devices), absent=tuple(absent))


def expected(prefer: str, here: tuple[str, ...], *, allow_tpu: bool, allow_cpu: bool) -> str | None:
    """The rule of the issue, written again: TPU (JAX, then torch), CUDA, XPU, MPS, CPU; a kind that is named is taken or refused."""
    if prefer == "auto":
        order = [kind for kind in ("tpu", "torch_tpu", "cuda", "xpu", "mps", "cpu") if kind in here]
        order = [kind for kind in order if ("tpu" not in kind or allow_tpu) and (kind != "cpu" or allow_cpu)]
        return order[0] if order else None
    if prefer == "gpu":
        return next((kind for kind in GPUS if kind in here), None)
    return prefer if prefer in here else None


@pytest.mark.parametrize("prefer", ["auto", "gpu", *KINDS])
@pytest.mark.parametrize("here", EVERY_INVENTORY, ids=lambda here: "+".join(here) or "nothing")
def test_every_preference_on_every_machine(prefer: str, here: tuple[str, ...]) -> None:
    for allow_tpu, allow_cpu in itertools.product((True, False), repeat=2):
        ask = HardwareAsk(kind=prefer, index=1, allow_tpu=allow_tpu, allow_cpu=allow_cpu)
        wanted = expected(prefer, here, allow_tpu=allow_tpu, allow_cpu=allow_cpu)
        if wanted is not None:
            assert str(select(machine(*here), ask)[0]) == f"{wanted}:1"
            continue
        with pytest.raises(DeviceError) as caught:
            select(machine(*here), ask)
        assert caught.value.exit_code == 4
        for kind in here:  # it lists what is there
            assert f"{kind}:0" in caught.value.what


def test_a_device_that_no_engine_trains_on_is_passed_over_for_training_only() -> None:
    inventory = machine("tpu", "cpu", untrained=("tpu",))
    device, why = select(inventory, HardwareAsk())
    assert device.kind == "cpu"
    assert "not tpu: it computes, but no engine of this version trains on it" in why
    assert select(inventory, HardwareAsk(), training=False)[0].kind == "tpu"
    with pytest.raises(DeviceError, match="it cannot be used") as caught:
        select(inventory, HardwareAsk(kind="tpu"))
    assert "no engine" in caught.value.why
    assert caught.value.fix == "set hardware.kind to cpu, or auto"


def test_select_auto_takes_the_first_and_says_what_is_missing() -> None:
    device, reason = select(laptop(), HardwareAsk())
    assert str(device) == "cpu:0"
    assert "no cuda: torch was built without CUDA" in reason
    assert select(h100s(), HardwareAsk())[0].kind == "cuda"


def test_select_says_who_asked() -> None:
    device, reason = select(h100s(), HardwareAsk(kind="cuda", index=5))
    assert str(device) == "cuda:5"
    assert reason == "the recipe asks for it"
    assert select(h100s(), HardwareAsk(kind="cpu"), "COMPUTE_PREFER")[1] == "COMPUTE_PREFER asks for it"
    assert select(h100s(), HardwareAsk(kind="gpu"))[1] == "the first GPU that answered, as the recipe asks"


def test_select_refuses_an_absent_kind_with_its_reason_and_remedy() -> None:
    with pytest.raises(DeviceError) as caught:
        select(laptop(), HardwareAsk(kind="cuda"))
    assert str(caught.value) == (
        "hardware.kind=cuda, but no cuda device answered; here is cpu:0 (Fake laptop (simulated))\n"
        "  why: torch was built without CUDA\n"
        "  fix: install the CUDA build of torch; or set hardware.kind to cpu, or auto"
    )
    assert caught.value.exit_code == 4


def test_select_refuses_a_kind_that_nobody_looked_for() -> None:
    with pytest.raises(DeviceError, match="no xpu device answered") as caught:
        select(h100s(1), HardwareAsk(kind="xpu"))
    assert "nothing is known" in caught.value.why


def test_select_refuses_a_cpu_that_is_not_allowed() -> None:
    with pytest.raises(DeviceError, match="no device may be used; here is cpu:0") as caught:
        select(laptop(), HardwareAsk(allow_cpu=False))
    assert "not cpu: allow_cpu is off" in caught.value.why
    assert "hardware.allow_cpu" in caught.value.fix
    # What is named is meant, whatever auto may take.
    assert select(laptop(), HardwareAsk(kind="cpu", allow_cpu=False))[0].kind == "cpu"


def test_where_no_index_is_said_the_first_that_answered_is_taken() -> None:
    gone = Absent(kind="cuda", why="cuda:0 (Fake H100) did not answer: it is lost", fix="reset it")
    here = Inventory(devices=h100s(3).devices[1:], absent=(gone,))
    for ask, reason in ((HardwareAsk(), "the first that answered"), (HardwareAsk(kind="cuda"), "the recipe asks for it")):
        device, why = select(here, ask)
        assert str(device) == "cuda:1" and why == f"{reason}; cuda:0 (Fake H100) did not answer: it is lost"
    with pytest.raises(DeviceError, match="there is no cuda:0"):
        select(here, HardwareAsk(index=0))


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


def test_a_stand_in_says_so_wherever_it_is_named() -> None:
    assert fake_device(name="Fake").label == "Fake (simulated)"
