from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.fakes import h100s, laptop

from pantheraml.errors import DeviceError
from pantheraml.hardware import placement
from pantheraml.hardware.precision import custom_bwd, custom_fwd, get_grad_scaler, torch_device_context
from pantheraml.models._utils import torch_amp_custom_bwd, torch_amp_custom_fwd


class Product(torch.autograd.Function):
    """x @ w, and what autocast was in each direction."""

    seen: list[tuple[bool, torch.dtype]] = []  # noqa: RUF012

    @staticmethod
    @custom_fwd
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        product = x @ w
        Product.seen.append((torch.is_autocast_enabled("cpu"), product.dtype))
        return product

    @staticmethod
    @custom_bwd
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, w = ctx.saved_tensors
        Product.seen.append((torch.is_autocast_enabled("cpu"), (x.T @ x).dtype))
        return gradient @ w.T, x.T @ gradient


class InFloat32(torch.autograd.Function):
    @staticmethod
    @custom_fwd(cast_inputs=torch.float32)
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        assert not torch.is_autocast_enabled("cpu")
        return x @ x

    @staticmethod
    @custom_bwd
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


@pytest.fixture(autouse=True)
def nothing_seen() -> None:
    Product.seen.clear()


def test_backward_runs_under_the_autocast_of_forward() -> None:
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        product = Product.apply(x, w)
    product.float().sum().backward()  # outside: without custom_bwd, autocast would be off in it
    assert Product.seen == [(True, torch.bfloat16), (True, torch.bfloat16)]


def test_without_autocast_nothing_is_cast_and_the_gradients_are_right() -> None:
    x, w = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Product.apply, (x, w))
    assert {enabled for enabled, _ in Product.seen} == {False}


def test_inputs_are_cast_where_that_is_asked_for() -> None:
    half = torch.randn(3, 3, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert InFloat32.apply(half).dtype == torch.float32
    assert InFloat32.apply(half).dtype == torch.bfloat16  # torch.amp casts under autocast only


def test_the_device_is_that_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def spy(forward: Any, *, device_type: str, cast_inputs: torch.dtype | None = None) -> Any:
        asked.append(device_type)
        return forward

    monkeypatch.setattr(torch.amp, "custom_fwd", spy)
    monkeypatch.setattr(torch.amp, "custom_bwd", spy)
    elsewhere = torch.empty(2, device="meta")
    custom_fwd(lambda ctx, scale, x: None)(SimpleNamespace(), 2.0, elsewhere)
    custom_fwd(lambda ctx, *, x: None)(SimpleNamespace(), x=torch.empty(2))
    custom_bwd(lambda ctx, first, second: None)(SimpleNamespace(), None, elsewhere)
    assert asked == ["meta", "cpu", "meta"]


def test_without_a_tensor_there_is_no_device_to_go_by() -> None:
    for around in (custom_fwd, custom_bwd):
        with pytest.raises(ValueError, match="none of the arguments is a tensor"):
            around(lambda ctx, x: x)(SimpleNamespace(), 1)


def test_the_names_of_unsloth() -> None:
    assert (torch_amp_custom_fwd, torch_amp_custom_bwd) == (custom_fwd, custom_bwd)


# ---- Gradient scaler -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, "bfloat16", "float32", "torch.bfloat16"])
def test_no_scaler_where_gradients_do_not_underflow(dtype: torch.dtype | str) -> None:
    assert get_grad_scaler(dtype, "cuda:99") is None  # so no device is asked for


@pytest.mark.parametrize("dtype", [torch.float16, "float16", "torch.float16"])
def test_the_scaler_of_float16_saves_gradients_that_would_vanish(dtype: torch.dtype | str) -> None:
    scaler = get_grad_scaler(dtype, "cpu")
    assert scaler is not None
    assert scaler.is_enabled()
    small = 2.0**-26  # half of the smallest float16 is 2**-25
    weight = torch.ones(1, dtype=torch.float16, requires_grad=True)
    (weight.float() * small).sum().backward()
    assert weight.grad is not None
    assert weight.grad.item() == 0
    weight.grad = None
    scaler.scale((weight.float() * small).sum()).backward()
    assert weight.grad is not None
    assert weight.grad.item() == small * scaler.get_scale()


def test_the_scaler_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PANTHERAML_DEVICE_TYPE", "COMPUTE_PREFER"):
        monkeypatch.delenv(name, raising=False)
    made = []
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device: made.append(device))
    monkeypatch.setattr(placement, "_machine", lambda simulate_tpu: h100s(2))
    get_grad_scaler(torch.float16, 1)
    get_grad_scaler(torch.float16)
    assert made == ["cuda", "cuda"]
    monkeypatch.setattr(placement, "_machine", lambda simulate_tpu: laptop())
    with pytest.raises(DeviceError, match="here is cpu:0"):
        get_grad_scaler(torch.float16, "cuda")


# ---- Current device --------------------------------------------------------------------------------------------------


def test_the_cpu_has_no_current_device() -> None:
    assert isinstance(torch_device_context(torch.ones(1)), nullcontext)
    assert isinstance(torch_device_context(torch.device("cpu")), nullcontext)
    with torch_device_context(torch.ones(1)):
        assert torch.ones(1).device == torch.device("cpu")


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_a_gpu_is_made_current_by_its_index(kind: str) -> None:
    module = torch.get_device_module(kind)
    context = torch_device_context(torch.device(kind, 1))
    assert isinstance(context, module.device)
    assert context.idx == 1
    assert isinstance(torch_device_context(torch.device(kind)), nullcontext)  # no index: it is the current one
