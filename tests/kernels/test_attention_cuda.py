"""Attention on CUDA: which inputs go to torch's flash attention, what it is asked, and, where there is a GPU, what it answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.kernels.interpreted import DEVICES
from tests.kernels.test_attention_triton import BF16, F16, F32, check, cut, eager, inputs, sees
from torch import Tensor, library

import triton  # isort: skip  # once it is known to be there
from triton.backends.compiler import GPUTarget  # isort: skip

from pantheraml.kernels import attention_cuda
from pantheraml.kernels.attention_cuda import attention, attention_backward


class Gpu:
    """A driver that knows one GPU and runs nothing."""

    def __init__(self, backend: str, arch: int | str) -> None:
        self.target = GPUTarget(backend, arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target


@pytest.mark.parametrize(
    ("dtype", "width", "softcap", "backend", "arch", "flash"),
    [
        (BF16, 128, 0.0, "cuda", 80, True),
        (F16, 96, 0.0, "cuda", 120, True),
        (BF16, 256, 0.0, "cuda", 90, True),
        (F32, 128, 0.0, "cuda", 90, False),
        (BF16, 128, 30.0, "cuda", 90, False),
        (BF16, 100, 0.0, "cuda", 90, False),  # no multiple of 8
        (BF16, 224, 0.0, "cuda", 90, False),
        (BF16, 512, 0.0, "cuda", 90, False),
        (F16, 128, 0.0, "cuda", 75, False),
        (BF16, 128, 0.0, "hip", "gfx942", False),
    ],
)
def test_which_inputs_go_to_torchs_flash_attention(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, width: int, softcap: float, backend: str, arch: int | str, flash: bool
) -> None:
    monkeypatch.setattr(triton.runtime.driver, "_active", Gpu(backend, arch))
    with torch._subclasses.FakeTensorMode():
        assert attention_cuda._flash_can(torch.empty(8, 4, width, dtype=dtype, device="cuda"), softcap) == flash
    assert not attention_cuda._flash_can(torch.empty(8, 4, width, dtype=dtype), softcap)


def test_torchs_flash_attention_takes_the_call_and_returns_what_we_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its operators and shapes, without their arithmetic, as on a GPU."""
    monkeypatch.setattr(triton.runtime.driver, "_active", Gpu("cuda", 90))
    for window in (0, 16):
        with torch._subclasses.FakeTensorMode():
            q, k = (torch.empty(70, heads, 64, dtype=BF16, device="cuda") for heads in (8, 2))
            starts = torch.empty(4, dtype=torch.int32, device="cuda")
            out, lse = attention(q, k, k, starts, 40, 0.125, window, 0.0)
            grads = attention_backward(out, q, k, k, out, lse, starts, 40, 0.125, window, 0.0)
        assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, BF16, (8, 70), F32)
        assert [(each.shape, each.dtype) for each in grads] == [(each.shape, BF16) for each in (q, k, k)]


@pytest.fixture
def flash_on_the_cpu() -> Iterator[None]:
    """torch's two operators, which have no CPU kernel, as torch.nn.attention.varlen documents their arguments; in float64."""

    def visible(starts: Tensor, causal: bool, left: int, right: int) -> Tensor:
        before = sees(starts, 0)
        tokens = torch.arange(before.shape[0])
        distance = tokens[:, None] - tokens
        right = 0 if causal else right
        assert right == 0 and (left != -1 or causal)  # what the documentation calls causal attention, with or without a window
        return before if left == -1 else before & (distance <= left)

    def forward(
        q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, max_q: int, max_k: int, *others: Any, **named: Any
    ) -> Any:
        dropout, causal, debug = others
        assert torch.equal(starts_q, starts_k) and max_q == max_k == int(starts_q.diff().max()) and not dropout and not debug
        seen = visible(starts_q, causal, named["window_size_left"], named["window_size_right"])
        out, lse = eager(q.double(), k.double(), v.double(), seen, named["scale"], 0.0)
        return out.to(q.dtype), lse.float(), torch.empty(2), torch.empty(0), torch.empty(0)

    def backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *others: Any, **named: Any) -> Any:
        starts_q, starts_k, max_q, max_k, dropout, causal, *_ = others
        assert torch.equal(starts_q, starts_k) and max_q == max_k == int(starts_q.diff().max()) and not dropout
        seen = visible(starts_q, causal, named["window_size_left"], named["window_size_right"])
        # By the formulas: there is no autograd inside an operator.
        wide_q, wide_dout = (each.double().transpose(0, 1) for each in (q, dout))
        wide_k, wide_v = (each.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1).transpose(0, 1) for each in (k, v))
        p = (wide_q @ wide_k.transpose(1, 2) * named["scale"]).masked_fill(~seen, -float("inf")).softmax(-1)
        dp = wide_dout @ wide_v.transpose(1, 2)
        dz = p * (dp - (p * dp).sum(-1, keepdim=True)) * named["scale"]
        dq, dk, dv = dz @ wide_k, dz.transpose(1, 2) @ wide_q, p.transpose(1, 2) @ wide_dout
        dk, dv = (each.unflatten(0, (k.shape[1], -1)).sum(1) for each in (dk, dv))
        return tuple(each.transpose(0, 1).to(q.dtype) for each in (dq, dk, dv))

    stand_in = library.Library("aten", "IMPL")
    stand_in.impl("_flash_attention_forward", forward, "CPU")
    stand_in.impl("_flash_attention_backward", backward, "CPU")
    yield
    stand_in._destroy()


@pytest.mark.parametrize("window", [0, 1, 7])
def test_what_torchs_flash_attention_is_asked_is_the_definition(flash_on_the_cpu: None, window: int) -> None:
    q, k, v = inputs(70, 4, 2, 32, BF16)
    starts = cut(50, 20)
    out, lse = attention_cuda._flash(q, k, v, starts, 50, 0.2, window)
    grads = attention_cuda._flash_backward(out, q, k, v, out, lse, starts, 50, 0.2, window)
    leaves = [each.double().requires_grad_() for each in (q, k, v)]
    wanted, wanted_lse = eager(*leaves, sees(starts, window), 0.2, 0.0)
    exact = torch.autograd.grad(wanted, leaves, out.double())
    for mine, true in zip((out, lse, *grads), (wanted, wanted_lse, *exact), strict=True):
        assert torch.allclose(mine.double(), true, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize(("width", "softcap"), [(64, 0.0), (64, 30.0), (100, 0.0)])
def test_values_and_gradients_whoever_computes_them(device: str, window: int, width: int, softcap: float) -> None:
    check(device, inputs(90, 6, 2, width, BF16), cut(1, 50, 0, 39), window, softcap, (attention, attention_backward))
