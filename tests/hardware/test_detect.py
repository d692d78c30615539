from __future__ import annotations

import pytest
from tests.fakes import FakeBackend, fake_device

from pantheraml.hardware import detect as detect_module
from pantheraml.hardware.detect import detect
from pantheraml.hardware.device import Absent, Device


def test_detect_finds_the_cpu_and_gives_a_reason_for_each_kind_that_is_not_here() -> None:
    inventory = detect()
    assert inventory.devices[-1].kind == "cpu"
    kinds = {device.kind for device in inventory.devices} | {absent.kind for absent in inventory.absent}
    assert kinds == {"tpu", "torch_tpu", "cuda", "xpu", "mps", "cpu"}
    assert all(absent.why and absent.fix for absent in inventory.absent)


def test_detect_asks_only_the_given_kinds() -> None:
    inventory = detect(["cpu"])
    assert len(inventory.devices) == 1
    assert inventory.absent == ()


def test_detect_keeps_going_when_a_driver_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(FakeBackend):
        def probe(self) -> tuple[Device, ...] | Absent:
            raise RuntimeError("CUDA error: device is lost\nmore text")

    fakes = {"cuda": Broken("cuda"), "xpu": FakeBackend("xpu", count=2), "cpu": FakeBackend("cpu")}
    monkeypatch.setattr(detect_module, "open_backend", fakes.__getitem__)
    inventory = detect(fakes)
    assert [str(device) for device in inventory.devices] == ["xpu:0", "xpu:1", "cpu:0"]
    (absent,) = inventory.absent
    assert absent.why == "it did not answer: CUDA error: device is lost"


def test_detect_does_not_hide_a_mistake_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(FakeBackend):
        def probe(self) -> tuple[Device, ...] | Absent:
            raise TypeError("wrong argument")

    monkeypatch.setattr(detect_module, "open_backend", lambda kind: Wrong(kind))
    with pytest.raises(TypeError):
        detect()


def test_one_device_that_fails_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    class Half(FakeBackend):
        def probe(self) -> tuple[Device | Absent, ...]:
            full = Absent(kind="cuda", why="cuda:0 (Fake) did not answer: CUDA out of memory", fix="free its memory")
            return (full, fake_device("cuda", 1))

    fakes = {"cuda": Half("cuda"), "cpu": FakeBackend("cpu")}
    monkeypatch.setattr(detect_module, "open_backend", fakes.__getitem__)
    inventory = detect(["cuda", "cpu"])
    assert [str(device) for device in inventory.devices] == ["cuda:1", "cpu:0"]
    assert [absent.why for absent in inventory.absent] == ["cuda:0 (Fake) did not answer: CUDA out of memory"]
