from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch
from tests.fakes import fake_device, h100s, laptop

import pantheraml.hardware
import pantheraml.models._utils
from pantheraml.errors import DeviceError
from pantheraml.hardware import placement
from pantheraml.hardware.device import Absent, Inventory
from pantheraml.hardware.placement import (
    ensure_tpu_initialization,
    get_autocast_device,
    get_device_with_fallback,
    get_inference_context,
    get_pytorch_device,
    get_tpu_safe_device,
    initialize_tpu_context,
    safe_device_placement,
    tpu_compatible_inference_mode,
)

NAMES = (
    "get_pytorch_device",
    "get_autocast_device",
    "get_tpu_safe_device",
    "safe_device_placement",
    "get_device_with_fallback",
    "get_inference_context",
    "tpu_compatible_inference_mode",
    "initialize_tpu_context",
    "ensure_tpu_initialization",
    "custom_fwd",
    "custom_bwd",
    "get_grad_scaler",
    "torch_device_context",
)
NO_TPU = Absent(kind="tpu", why="nothing points to one", fix="run this on a machine with a TPU")


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PANTHERAML_DEVICE_TYPE", "COMPUTE_PREFER", "PANTHERAML_ALLOW_CPU", "COMPUTE_ALLOW_TPU", "PANTHERAML_SIMULATE_TPU"):
        monkeypatch.delenv(name, raising=False)


def machine(monkeypatch: pytest.MonkeyPatch, inventory: Inventory) -> None:
    monkeypatch.setattr(placement, "_machine", lambda simulate_tpu: inventory)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU, and nothing else."""
    cpu = laptop()
    machine(monkeypatch, Inventory(devices=cpu.devices, absent=(NO_TPU, *cpu.absent)))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, h100s(2))


@pytest.fixture
def tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A TPU that answers, and the CPU beside it."""
    chip = fake_device("tpu", name="Fake TPU v5e", dtypes=())
    machine(monkeypatch, Inventory(devices=(chip, *laptop().devices)))


# ---- Names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_each_name_is_the_same_object_in_both_places(name: str) -> None:
    assert getattr(pantheraml.hardware, name) is getattr(pantheraml.models._utils, name)
    assert name in dir(pantheraml.hardware)
    assert name in pantheraml.hardware.__all__


def test_the_room_imports_without_torch_and_an_unknown_name_is_an_attribute_error() -> None:
    code = (
        "import sys, pantheraml.hardware as room; print([n for n in ('torch', 'jax', 'transformers') if n in sys.modules], dir(room)[:1])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("[] ")
    with pytest.raises(AttributeError, match="has no attribute 'get_quantum_device'"):
        _ = pantheraml.hardware.get_quantum_device


# ---- Which device ----------------------------------------------------------------------------------------------------


def test_this_machine_really() -> None:
    placed = safe_device_placement(torch.ones(3), get_pytorch_device("cpu"))
    assert placed.device == torch.device("cpu")
    assert torch.empty(1, device=get_pytorch_device()).device.type == get_autocast_device()


def test_torchs_name_for_a_device(here) -> None:
    assert [get_pytorch_device(name) for name in (None, 0, "auto", "cpu", "cpu:0", torch.device("cpu"))] == ["cpu"] * 6


def test_an_index_is_named_where_it_was_asked_for(gpus) -> None:
    assert get_pytorch_device() == "cuda"  # torch takes it for the current one
    assert [get_pytorch_device(name) for name in (0, 1, "cuda:1", "gpu", "gpu:1")] == ["cuda:0", "cuda:1", "cuda:1", "cuda", "cuda:1"]
    assert get_pytorch_device("cpu") == "cpu"
    assert get_autocast_device(1) == "cuda"
    assert get_tpu_safe_device(1) == torch.device("cuda", 1)


def test_the_environment_decides_what_is_left_open(gpus, monkeypatch) -> None:
    monkeypatch.setenv("PANTHERAML_DEVICE_TYPE", "cpu")
    assert get_pytorch_device() == "cpu"
    assert get_pytorch_device("cuda:1") == "cuda:1"
    monkeypatch.setenv("PANTHERAML_DEVICE_TYPE", "cuda:1")
    assert get_pytorch_device() == "cuda:1"
    assert get_pytorch_device(0) == "cuda:0"


@pytest.mark.parametrize("function", [get_pytorch_device, get_autocast_device, get_tpu_safe_device])
def test_what_is_not_here_is_an_error_that_lists_what_is(here, function) -> None:
    with pytest.raises(DeviceError) as error:
        function("cuda")
    assert "cpu:0 (Fake laptop (simulated))" in error.value.what
    assert error.value.why == "torch was built without CUDA"
    with pytest.raises(DeviceError, match="'xla' is no name of a device"):
        function("xla")


def test_an_index_that_is_not_here(gpus) -> None:
    with pytest.raises(DeviceError) as error:
        get_pytorch_device(7)
    assert "cuda:1" in error.value.what


def test_torch_passes_over_a_tpu_and_refuses_it_by_name(tpu) -> None:
    assert get_pytorch_device() == "cpu"
    with pytest.raises(DeviceError) as error:
        get_tpu_safe_device("tpu")
    assert "tpu:0 (Fake TPU v5e (simulated))" in error.value.what


def test_the_machine_is_looked_at_once(monkeypatch) -> None:
    looked = []

    def detect(*, simulate_tpu: bool) -> Inventory:
        looked.append(simulate_tpu)
        return laptop()

    monkeypatch.setattr(placement, "detect", detect)
    placement._machine.cache_clear()
    try:
        get_pytorch_device()
        get_pytorch_device("cpu")
        monkeypatch.setenv("PANTHERAML_SIMULATE_TPU", "1")
        get_pytorch_device()
    finally:
        placement._machine.cache_clear()
    assert looked == [False, True]


# ---- Moving there ----------------------------------------------------------------------------------------------------


def test_placement_moves_tensors_and_models(here) -> None:
    tensor, model = torch.ones(2), torch.nn.Linear(2, 2)
    assert safe_device_placement(tensor, torch.device("cpu")) is tensor  # it is there already
    assert safe_device_placement(model) is model
    with pytest.raises(DeviceError):
        safe_device_placement(tensor, "cuda")


def test_a_fallback_is_taken_where_it_is_asked_for_and_said(here) -> None:
    with pytest.warns(UserWarning, match="using cpu instead: hardware.kind=cuda, but no cuda device answered") as said:
        assert get_device_with_fallback("cuda") == torch.device("cpu")
    assert said[0].filename == __file__
    assert "torch was built without CUDA" in str(said[0].message)


def test_no_fallback_is_taken_where_none_is_needed(gpus) -> None:
    # A warning would be an error here.
    assert get_device_with_fallback() == torch.device("cuda")
    assert get_device_with_fallback(1) == torch.device("cuda:1")
    assert get_device_with_fallback("gpu:1", "cpu") == torch.device("cuda:1")


def test_a_fallback_that_is_not_here_either_is_an_error(here) -> None:
    with pytest.raises(DeviceError, match=r"hardware.kind=xpu"):
        get_device_with_fallback("cuda", "xpu")


# ---- Without gradients -----------------------------------------------------------------------------------------------


def test_what_was_made_under_inference_mode_cannot_go_on_to_autograd_and_under_no_grad_it_can(here) -> None:
    weight = torch.ones(2, requires_grad=True)
    with get_inference_context("cpu"):
        hidden = torch.ones(2) * 2
    assert hidden.is_inference()
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        (weight * hidden).sum()
    with pytest.raises(RuntimeError, match="Inference tensors do not track version counter"):
        _ = hidden._version
    with get_inference_context("tpu"):
        hidden = torch.ones(2) * 2
    assert not hidden.is_inference()
    (weight * hidden).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    ("device", "context"),
    [("cpu", torch.inference_mode), ("cuda:1", torch.inference_mode), ("mps", torch.inference_mode), ("tpu", torch.no_grad)],
)
def test_the_context_is_chosen_by_what_computes(here, device: str, context: type) -> None:
    assert type(get_inference_context(device)) is context
    assert type(tpu_compatible_inference_mode(device)) is context


def test_unnamed_it_is_for_the_device_that_is_here(tpu, monkeypatch) -> None:
    assert type(get_inference_context()) is torch.no_grad
    monkeypatch.setenv("COMPUTE_ALLOW_TPU", "0")
    assert type(get_inference_context()) is torch.inference_mode


def test_as_a_decorator(here, monkeypatch) -> None:
    @tpu_compatible_inference_mode
    def double(x: torch.Tensor, *, times: int = 2) -> torch.Tensor:
        """Twice."""
        return x * times

    assert (double.__name__, double.__doc__) == ("double", "Twice.")
    assert list(inspect.signature(double).parameters) == ["x", "times"]
    x = torch.ones(1, requires_grad=True)
    assert double(x, times=3).is_inference()
    # The device is looked up at each call, not when the function was written.
    chip = fake_device("tpu", dtypes=())
    machine(monkeypatch, Inventory(devices=(chip, *laptop().devices)))
    tripled = double(x, times=3)
    assert not tripled.is_inference()
    assert not tripled.requires_grad
    assert tripled.item() == 3


def test_as_a_decorator_with_a_device_and_as_a_context() -> None:
    @tpu_compatible_inference_mode("tpu")
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    x = torch.ones(1, requires_grad=True)
    assert not double(x).requires_grad
    assert not double(x).is_inference()
    with tpu_compatible_inference_mode("cpu"):
        assert torch.is_inference_mode_enabled()


def test_a_generator_keeps_its_gradients_off_between_steps(here) -> None:
    @tpu_compatible_inference_mode
    def steps():
        yield torch.is_inference_mode_enabled()
        yield torch.is_inference_mode_enabled()

    assert list(steps()) == [True, True]


# ---- TPU -------------------------------------------------------------------------------------------------------------


def test_no_tpu(here) -> None:
    with pytest.raises(DeviceError) as error:
        initialize_tpu_context()
    assert error.value.why == "nothing points to one"
    assert error.value.fix.startswith("run this on a machine with a TPU")
    assert ensure_tpu_initialization() is False


def test_a_tpu(tpu) -> None:
    assert (initialize_tpu_context().kind, initialize_tpu_context().simulated) == ("tpu", True)
    assert ensure_tpu_initialization() is True
    assert ensure_tpu_initialization("tpu:0") is True
    assert ensure_tpu_initialization("tpu:5") is False
    assert ensure_tpu_initialization("cpu") is False  # none is meant
    assert ensure_tpu_initialization("auto") is False
