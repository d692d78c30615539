"""Every kernel becomes machine code for NVIDIA's GPUs, on a machine that has none, in the shapes of real models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from pantheraml.kernels import attention_triton, cross_entropy_triton, fp8_triton, gated_triton, rms_norm_triton, rope_triton

BF16, F32 = torch.bfloat16, torch.float32
SHARED_BYTES = 99 << 10  # what a program may have on the least of Ampere and later (compute capability 8.6, 8.9, 12.0)


class NoGpu:
    """What Triton asks of a driver up to the launch."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # compiled kernels are remembered by device

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture(params=[80, 90], ids="sm_{}".format)
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[list[Any]]:
    """What was compiled; a launch ends there."""
    done: list[Any] = []
    launch = JITFunction.run

    def stop_before_launch(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        done.append(launch(self, *args, grid=grid, warmup=True, **options))

    monkeypatch.setattr(JITFunction, "run", stop_before_launch)
    monkeypatch.setattr(triton.runtime.driver, "_active", NoGpu(request.param))
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path)
        yield done


def norm(dtype: torch.dtype) -> None:
    x, weight = torch.zeros(300, 2048, dtype=dtype), torch.ones(2048)
    y, rstd = rms_norm_triton.rms_norm(x, weight, 1e-6, 0.0)
    rms_norm_triton.rms_norm_backward(y, x, weight, rstd, 0.0, x, True)


def head_norm(dtype: torch.dtype) -> None:
    x, weight = torch.zeros(300, 128, dtype=dtype), torch.ones(128, dtype=dtype)
    y, rstd = rms_norm_triton.rms_norm(x, weight, 1e-6, 1.0)
    rms_norm_triton.rms_norm_backward(y, x, weight, rstd, 1.0, None, False)


def gate(dtype: torch.dtype) -> None:
    gate, up = torch.zeros(3, 2 * 8192, dtype=dtype).chunk(2, dim=1)
    for activation in ("silu", "gelu_tanh", "gelu"):
        gated_triton.gated_backward(gated_triton.gated(gate, up, activation), gate, up, activation)


def rotation(dtype: torch.dtype) -> None:
    x = torch.zeros(3, 32, 128, dtype=dtype)
    for interleaved, pairs in ((False, 64), (True, 32)):
        rope_triton.rope(x, torch.zeros(3, pairs), torch.zeros(3, pairs), interleaved, False)


def loss(dtype: torch.dtype) -> None:
    for softcap in (0.0, 30.0):
        cross_entropy_triton.cross_entropy(torch.zeros(2, 128256, dtype=dtype), torch.zeros(2, dtype=torch.int64), 1.0, softcap, True)


def attend(dtype: torch.dtype, width: int, softcap: float) -> None:
    q, k = torch.zeros(8, 8, width, dtype=dtype), torch.zeros(8, 2, width, dtype=dtype)
    starts = torch.tensor([0, 8], dtype=torch.int32)
    out, lse = attention_triton.attention(q, k, k, starts, 8, 1.0, 4, softcap)
    attention_triton.attention_backward(out, q, k, k, out, lse, starts, 8, 1.0, 4, softcap)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(("use", "kernels"), [(norm, 2), (head_norm, 2), (gate, 6), (rotation, 2), (loss, 2)])
def test_kernels_compile(compiled: list[Any], use: Callable[[torch.dtype], None], kernels: int, dtype: torch.dtype) -> None:
    use(dtype)
    assert len(compiled) == kernels
    assert all(kernel.asm["cubin"] and kernel.metadata.shared <= SHARED_BYTES for kernel in compiled)


@pytest.mark.parametrize(("dtype", "width", "softcap"), [(BF16, 64, 0.0), (BF16, 128, 0.0), (BF16, 256, 50.0), (F32, 64, 50.0)])
def test_attention_compiles_and_fits(compiled: list[Any], dtype: torch.dtype, width: int, softcap: float) -> None:
    attend(dtype, width, softcap)
    assert len(compiled) == 3
    for kernel in compiled:
        assert kernel.asm["cubin"]
        assert kernel.metadata.shared <= SHARED_BYTES, kernel.name
        if dtype == BF16:
            assert "mma" in kernel.asm["ptx"]  # on the matrix units


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_rounding_to_eight_bits_compiles_where_a_gpu_has_them(compiled: list[Any], dtype: torch.dtype) -> None:
    target: Any = triton.runtime.driver.active
    if target.get_current_target().arch < 89:
        pytest.skip("floats of eight bits are there from compute capability 8.9 on")
    fp8_triton.rounded(torch.zeros(3, 8192, dtype=dtype))
    assert len(compiled) == 1 and compiled[0].asm["cubin"] and "e4m3" in compiled[0].asm["ptx"]
